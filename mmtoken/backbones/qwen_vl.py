"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one packed sequence of patches, 2x2 merger, three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, prefix_flags


class QwenVL(Backbone):
    """`Qwen2VLForConditionalGeneration` and its successors Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE."""

    name: ClassVar[str] = "Qwen2-VL / Qwen2.5-VL / Qwen3-VL"
    model_types: ClassVar[tuple[str, ...]] = (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
    )
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    dynamic_resolution: ClassVar[bool] = True

    def tower(self) -> Tower:
        visual = self.root.visual
        config = self.model.config.vision_config
        window = None
        if self.model.config.model_type == "qwen2_5_vl":
            window = config.window_size // config.spatial_merge_size // config.patch_size
        return Tower(
            module=visual,
            blocks=visual.blocks,
            feature_block=len(visual.blocks) - 1,
            prefix=0,
            unit=config.spatial_merge_size,
            heads=config.num_heads,
            packed=True,
            attention="attn",
            queries="qkv",
            keys="qkv",
            values="qkv",
            output="proj",
            norms=("norm1", "norm2"),
            mergers=(visual.merger, *(visual.deepstack_merger_list if _has_deepstack(self.model) else ())),
            window=window,
        )

    def widths(self) -> tuple[int, int]:
        config = self.model.config.vision_config
        # Qwen2-VL calls the decoder's width the `hidden_size` of its tower.
        width = config.embed_dim if self.model.config.model_type == "qwen2_vl" else config.hidden_size
        return int(width), int(width)

    @staticmethod
    def _grids(modality: Modality, call: Mapping[str, Any]) -> list[list[int]]:
        grids: list[list[int]] = torch.as_tensor(call[f"{modality}_grid_thw"]).tolist()
        return grids

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = self.model.config.vision_config.spatial_merge_size
        grids = tuple((t, h // side, w // side) for t, h, w in self._grids(modality, call))
        counts = [t * h * w for t, h, w in grids]
        pixels = call["pixel_values" if modality == "image" else "pixel_values_videos"]
        return Layout(counts, grids, prefix_flags(sum(counts), pixels.device))

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return values

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        pixels = call["pixel_values" if modality == "image" else "pixel_values_videos"]
        return list(torch.split(pixels, [t * h * w for t, h, w in self._grids(modality, call)]))

    def pictures(self, call: Mapping[str, Any]) -> list[Tensor]:
        vision = self.model.config.vision_config
        merge, side, steps = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        found = []
        for (frames, rows, columns), patches in zip(
            self._grids("video", call), self.item_pixels("video", call), strict=True
        ):
            shape = (frames, rows // merge, columns // merge, merge, merge, -1, steps, side, side)
            # (frame, step, colour), then row of squares, of patches and of pixels, then the same for columns
            ordered = patches.view(shape).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            found.append(ordered.reshape(frames, steps, -1, rows * side, columns * side)[:, 0])
        return found

    def clips(self, call: Mapping[str, Any]) -> list[Tensor]:
        grids = self._grids("video", call)
        return [
            clip.view(grid[0], -1, clip.shape[-1])
            for clip, grid in zip(self.item_pixels("video", call), grids, strict=True)
        ]

    def with_frames(self, call: Mapping[str, Any], picks: list[Tensor]) -> dict[str, Any]:
        kept = [clip[pick].flatten(0, 1) for clip, pick in zip(self.clips(call), picks, strict=True)]
        grids = torch.as_tensor(call["video_grid_thw"]).clone()
        grids[:, 0] = torch.tensor([len(pick) for pick in picks])
        return {**call, "pixel_values_videos": torch.cat(kept), "video_grid_thw": grids}


def _has_deepstack(model: Any) -> bool:
    return bool(model.config.model_type in ("qwen3_vl", "qwen3_vl_moe"))
