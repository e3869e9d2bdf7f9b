"""Video-LLaVA: a CLIP-like tower for images, another one for videos, and one token-wise projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmtoken.backbones.base import (
    Layout,
    Modality,
    Tower,
    feature_tower,
    patch_side,
    prefix_flags,
)
from mmtoken.backbones.llava import Llava
from mmtoken.backbones.stacked import StackedVideos, stacked_videos


class VideoLlava(StackedVideos, Llava):
    """`VideoLlavaForConditionalGeneration`.

    Images are laid out as in LLaVA-1.5. A frame of a video is its CLS token, which counts as a separator, and its
    patches.
    """

    name: ClassVar[str] = "Video-LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    tokenwise_projector: ClassVar[bool] = False

    def tower(self) -> Tower:
        return feature_tower(self.model, self.root.image_tower)

    def video_tower(self) -> Tower:
        return feature_tower(self.model, self.root.video_tower)

    def projector(self) -> None:
        # A video is one item with one budget, and the projector gets its frames as rows.
        return None

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        if modality == "image":
            return super().layout(modality, _renamed(call), tiles)
        pixels = stacked_videos(call)
        videos, frames = pixels.shape[:2]
        side, extra = patch_side(self.model), self.video_tower().prefix
        protected = prefix_flags(tiles * (side * side + extra), pixels.device).view(tiles, -1)
        protected[:, :extra] = True
        counts = [frames * protected.shape[1]] * videos
        return Layout(counts, ((frames, side, side),) * videos, protected.flatten())

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        if modality == "image":
            return super().to_prompt(modality, call, values)
        return F.pad(values, (0, 0, self.video_tower().prefix, 0)).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return self.clips(call) if modality == "video" else super().item_pixels(modality, _renamed(call))


def _renamed(call: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with images under `pixel_values`, which versions up to 5.22 name `pixel_values_images`."""
    pixels = call.get("pixel_values")
    return {**call, "pixel_values": call.get("pixel_values_images") if pixels is None else pixels}
