"""LLaVA-OneVision: SigLIP tower, any-resolution tiles with newline tokens, pooled video frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtoken.backbones.anyres import AnyResolution
from mmtoken.backbones.base import Layout, Modality, patch_side
from mmtoken.backbones.stacked import StackedVideos, stacked_videos


class LlavaOneVision(StackedVideos, AnyResolution):
    """`LlavaOnevisionForConditionalGeneration`.

    The model re-samples projected features (un-padding, bilinear scaling, pooling), so values per patch travel
    through the model's own `pack_image_features` and `apply_pooling`.
    """

    name: ClassVar[str] = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def is_cut(self, call: Mapping[str, Any]) -> list[bool]:
        # Several images of one prompt are not cut.
        counts = call.get("batch_num_images")
        return super().is_cut(call) if counts is None else [n == 1 for n in counts for _ in range(int(n))]

    def packing(self, call: Mapping[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": call.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio}

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        if modality == "image":
            return super().layout(modality, call, tiles)
        side, pixels = patch_side(self.model), stacked_videos(call)
        videos, frames = pixels.shape[:2]
        pooled = math.ceil(side / 2)
        ones = torch.ones(tiles, side * side, 1, device=pixels.device)
        protected = self.to_prompt(modality, call, ones)[:, 0] < 0.5
        return Layout([frames * pooled**2 + 1] * videos, ((frames, pooled, pooled),) * videos, protected)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        if modality == "image":
            return super().to_prompt(modality, call, values)
        videos, frames = stacked_videos(call).shape[:2]
        pooled: Tensor = self.root.apply_pooling(values)
        pooled = pooled.reshape(videos, frames * pooled.shape[1], -1)
        return nn.functional.pad(pooled, (0, 0, 0, 1)).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return self.clips(call) if modality == "video" else super().item_pixels(modality, call)

    def pooled_projector(self) -> nn.Module:
        projector: nn.Module = self.root.multi_modal_projector
        return projector

    def unpooled(self, call: Mapping[str, Any], projected: Tensor) -> list[Tensor]:
        side = patch_side(self.model)
        return list(projected.reshape(*stacked_videos(call).shape[:2], side, side, -1))
