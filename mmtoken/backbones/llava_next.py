"""LLaVA-NeXT and LLaVA-NeXT-Video: CLIP tower, every image in crops beside its thumbnail, pooled video frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmtoken.backbones.anyres import AnyResolution
from mmtoken.backbones.base import Layout, Modality, patch_side, prefix_flags
from mmtoken.backbones.stacked import StackedVideos, stacked_videos


class LlavaNext(AnyResolution):
    """`LlavaNextForConditionalGeneration`. Every image of a prompt is cut, also where there are several."""

    name: ClassVar[str] = "LLaVA-NeXT"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)


class LlavaNextVideo(StackedVideos, LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`.

    Patches of video frames are pooled before the projector reads them; nothing separates rows or frames. Values per
    patch are averaged, also where the model takes the largest one or learns how to pool.
    """

    name: ClassVar[str] = "LLaVA-NeXT-Video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        if modality == "image":
            return super().layout(modality, call, tiles)
        pixels = stacked_videos(call)
        videos, frames = pixels.shape[:2]
        side = patch_side(self.model) // self.model.config.spatial_pool_stride
        area = frames * side**2
        return Layout([area] * videos, ((frames, side, side),) * videos, prefix_flags(videos * area, pixels.device))

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        if modality == "image":
            return super().to_prompt(modality, call, values)
        side = patch_side(self.model)
        pictures = values.transpose(1, 2).unflatten(-1, (side, side))
        pooled = F.avg_pool2d(pictures, self.model.config.spatial_pool_stride)
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return self.clips(call) if modality == "video" else super().item_pixels(modality, call)
