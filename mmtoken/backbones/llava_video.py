"""LLaVA-Video: LLaVA-OneVision whose video frames end every row with a newline token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtoken.backbones.base import Layout, Modality, patch_side
from mmtoken.backbones.llava_onevision import LlavaOneVision
from mmtoken.backbones.stacked import stacked_videos


class LlavaVideo(LlavaOneVision):
    """`mmtoken.models.llava_video.LlavaVideoForConditionalGeneration`.

    Images are laid out as in LLaVA-OneVision. A frame of a video is rows * (columns + 1) tokens, the last of each row a
    separator; after the last frame comes nothing.
    """

    name: ClassVar[str] = "LLaVA-Video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_video",)

    def _rows(self, device: torch.device) -> int:
        """Rows (and columns) of a pooled frame, as the model itself pools them."""
        side = patch_side(self.model)
        pooled: Tensor = self.root.apply_pooling(torch.zeros(1, side * side, 1, device=device))
        return int(pooled.shape[1] ** 0.5 + 0.5)

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        if modality == "image":
            return super().layout(modality, call, tiles)
        pixels = stacked_videos(call)
        videos, frames = pixels.shape[:2]
        side = self._rows(pixels.device)
        row = torch.zeros(side + 1, dtype=torch.bool, device=pixels.device)
        row[-1] = True
        protected = row.repeat(videos * frames * side)
        return Layout([frames * side * (side + 1)] * videos, ((frames, side, side),) * videos, protected)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        if modality == "image":
            return super().to_prompt(modality, call, values)
        pooled: Tensor = self.root.apply_pooling(values)
        side = self._rows(values.device)
        rows = pooled.reshape(-1, side, pooled.shape[-1])
        return F.pad(rows, (0, 0, 0, 1)).flatten(0, 1)
