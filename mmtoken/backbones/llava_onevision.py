"""LLaVA-OneVision: SigLIP tower, any-resolution tiles with newline tokens, pooled video frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, hidden_state_block
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import Grid


class LlavaOneVision(Backbone):
    """`LlavaOnevisionForConditionalGeneration`.

    The model re-samples projected features (un-padding, bilinear scaling, pooling), so values per patch travel
    through the model's own `pack_image_features` and `apply_pooling`.
    """

    name: ClassVar[str] = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")

    def tower(self) -> Tower:
        tower = self.root.vision_tower
        blocks = tower.encoder.layers
        return Tower(
            module=tower,
            blocks=blocks,
            feature_block=hidden_state_block(self.model.config.vision_feature_layer, len(blocks)),
            # SigLIP has no CLS; a CLIP tower has one, which "default" drops.
            prefix=int(self.model.config.vision_config.model_type == "clip_vision_model"),
            unit=1,
            heads=self.model.config.vision_config.num_attention_heads,
        )

    def _side(self) -> int:
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)

    @staticmethod
    def _video_pixels(call: Mapping[str, Any]) -> Tensor:
        # transformers 5.17 names the argument `pixel_values`.
        pixels = call.get("pixel_values_videos")
        video: Tensor = call["pixel_values"] if pixels is None else pixels
        return video

    def _crop_grids(self, call: Mapping[str, Any]) -> list[tuple[int, int] | None]:
        """Rows and columns of crops per image: None where several images share a prompt, for they are not cut."""
        sizes = torch.as_tensor(call["image_sizes"]).tolist()
        counts = call.get("batch_num_images")
        patched = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(int(n))]
        size = int(self.model.config.vision_config.image_size)
        return [
            _best_resolution(image, self.model.config.image_grid_pinpoints, size) if crop else None
            for image, crop in zip(sizes, patched, strict=True)
        ]

    def _tiles(self, call: Mapping[str, Any]) -> list[int]:
        """Tiles per image: the base view and the crops."""
        return [1 if grid is None else 1 + math.prod(grid) for grid in self._crop_grids(call)]

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = self._side()
        if modality == "video":
            pixels = self._video_pixels(call)
            videos, frames = pixels.shape[:2]
            pooled = math.ceil(side / 2)
            ones = torch.ones(tiles, side * side, 1, device=pixels.device)
            protected = self.to_prompt(modality, call, ones)[:, 0] < 0.5
            return Layout([frames * pooled**2 + 1] * videos, ((frames, pooled, pooled),) * videos, protected)
        tile_counts = self._tiles(call)
        ones = torch.ones(tiles, side * side, 1, device=call["pixel_values"].device)
        packed = self._pack(call, ones)
        grids: tuple[Grid | None, ...] = tuple((1, side, side) if n == 1 else None for n in tile_counts)
        protected = torch.cat(packed)[:, 0] < 0.5
        return Layout([len(p) for p in packed], grids, protected, self._crops(call, protected, side * side))

    def _crops(self, call: Mapping[str, Any], protected: Tensor, patches: int) -> Tensor:
        """int[tokens]: the crop of each token, 0 for base views; newline tokens belong to what is before them."""
        grids = self._crop_grids(call)
        at = []
        for grid in grids:
            rows, columns = grid or (0, 0)
            inside = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2) + 1
            at.append(torch.cat([torch.zeros(1, 2, dtype=torch.long), inside]))
        # Rows and columns apart: where the model scales the crops down, a mean of two numbers is one between them only
        # if they are neighbours.
        values = torch.cat(at).float()[:, None].expand(-1, patches, -1).to(protected.device)
        crops = []
        for item, grid in zip(self._pack(call, values), grids, strict=True):
            row, column = item.round().long().unbind(-1)
            crops.append(((row - 1) * (1 if grid is None else grid[1]) + column).masked_fill(row == 0, 0))
        return _fill(torch.cat(crops), protected)

    def _pack(self, call: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        newline = torch.zeros(values.shape[-1], device=values.device, dtype=values.dtype)
        aspect = call.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        packed, _ = self.root.pack_image_features(
            torch.split(values, self._tiles(call)),
            call["image_sizes"],
            image_newline=newline,
            vision_aspect_ratio=aspect,
        )
        return list(packed)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        if modality == "image":
            return torch.cat(self._pack(call, values))
        videos, frames = self._video_pixels(call).shape[:2]
        pooled: Tensor = self.root.apply_pooling(values)
        pooled = pooled.reshape(videos, frames * pooled.shape[1], -1)
        return torch.nn.functional.pad(pooled, (0, 0, 0, 1)).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        if modality == "video":
            return list(self._video_pixels(call))
        pixels = call["pixel_values"]
        if pixels.ndim == 4:
            return list(torch.split(pixels, self._tiles(call)))
        return [image[:n] for image, n in zip(pixels, self._tiles(call), strict=True)]

    def pooled_projector(self) -> nn.Module:
        projector: nn.Module = self.root.multi_modal_projector
        return projector

    def unpooled(self, call: Mapping[str, Any], projected: Tensor) -> list[Tensor]:
        side = self._side()
        return list(projected.reshape(*self._video_pixels(call).shape[:2], side, side, -1))

    def pictures(self, call: Mapping[str, Any]) -> list[Tensor]:
        return list(self._video_pixels(call))

    def clips(self, call: Mapping[str, Any]) -> list[Tensor]:
        return list(self._video_pixels(call))

    def with_frames(self, call: Mapping[str, Any], picks: list[Tensor]) -> dict[str, Any]:
        if len({len(pick) for pick in picks}) > 1:
            raise UnsupportedError("LLaVA-OneVision stacks videos: leave the same number of frames in each of a batch.")
        name = "pixel_values" if call.get("pixel_values_videos") is None else "pixel_values_videos"
        return {**call, name: torch.stack([clip[pick] for clip, pick in zip(call[name], picks, strict=True)])}


def _fill(values: Tensor, gaps: Tensor) -> Tensor:
    """`values` [n] with those at `gaps` bool[n] replaced by the last one before them."""
    place = torch.arange(len(values), device=values.device).masked_fill(gaps, 0).cummax(0).values
    return values[place]


def _best_resolution(size: list[int], pinpoints: list[list[int]], tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image of (height, width): the candidate that wastes least after fitting it in.

    Candidates are compared by the usable area of the scaled image, then by the least unused area, as LLaVA-NeXT
    describes its any-resolution grid.
    """
    height, width = size
    best = max(
        pinpoints,
        key=lambda candidate: _fit(height, width, candidate[0], candidate[1]),
    )
    return best[0] // tile, best[1] // tile


def _fit(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    scale = min(columns / width, rows / height)
    used = min(int(width * scale) * int(height * scale), width * height)
    return used, used - rows * columns
