"""Any-resolution images: a thumbnail, the image again in crops, and a newline token behind every row of patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, feature_tower, patch_side
from mmtoken.tokens import Grid


class AnyResolution(Backbone):
    """Families with `pack_image_features`: crops lie side by side as one large grid, of which the padding is cut off.

    The processor pads an image to the shape of its grid of crops; the model leaves the rows or columns of patches that
    hold padding only out of the prompt, and values per patch travel through the model's own packing, so that a token
    never stands for padding.
    """

    def tower(self) -> Tower:
        return feature_tower(self.model, self.root.vision_tower)

    def is_cut(self, call: Mapping[str, Any]) -> list[bool]:
        """Per image of a call, whether it comes in crops beside its thumbnail."""
        return [True] * len(call["image_sizes"])

    def packing(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What the family's `pack_image_features` wants to know besides features, sizes and the newline."""
        config = self.model.config
        strategy = call.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        return {"vision_feature_select_strategy": strategy}

    def _crop_grids(self, call: Mapping[str, Any]) -> list[tuple[int, int] | None]:
        """Rows and columns of crops per image, None where it is not cut."""
        sizes = torch.as_tensor(call["image_sizes"]).tolist()
        tile = int(self.model.config.vision_config.image_size)
        return [
            best_resolution(image, self.model.config.image_grid_pinpoints, tile) if cut else None
            for image, cut in zip(sizes, self.is_cut(call), strict=True)
        ]

    def _tiles(self, call: Mapping[str, Any]) -> list[int]:
        """Tiles per image: the thumbnail and the crops."""
        return [1 if grid is None else 1 + math.prod(grid) for grid in self._crop_grids(call)]

    def _pack(self, call: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Per image float[tokens, C] of values float[tiles, patches, C]; 0 at newline tokens."""
        newline = torch.zeros(values.shape[-1], device=values.device, dtype=values.dtype)
        packed, _ = self.root.pack_image_features(
            torch.split(values, self._tiles(call)), call["image_sizes"], image_newline=newline, **self.packing(call)
        )
        return list(packed)

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side, counts = patch_side(self.model), self._tiles(call)
        packed = self._pack(call, torch.ones(tiles, side * side, 1, device=call["pixel_values"].device))
        grids: tuple[Grid | None, ...] = tuple((1, side, side) if n == 1 else None for n in counts)
        protected = torch.cat(packed)[:, 0] < 0.5
        return Layout([len(p) for p in packed], grids, protected, self._crops(call, protected, side * side))

    def _crops(self, call: Mapping[str, Any], protected: Tensor, patches: int) -> Tensor:
        """int[tokens]: the crop of each token, 0 for thumbnails; newline tokens belong to what is before them."""
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

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return torch.cat(self._pack(call, values))

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        pixels, tiles = call["pixel_values"], self._tiles(call)
        if pixels.ndim == 4:
            return list(torch.split(pixels, tiles))
        return [image[:n] for image, n in zip(pixels, tiles, strict=True)]


def _fill(values: Tensor, gaps: Tensor) -> Tensor:
    """`values` [n] with those at `gaps` bool[n] replaced by the last one before them."""
    place = torch.arange(len(values), device=values.device).masked_fill(gaps, 0).cummax(0).values
    return values[place]


def best_resolution(size: list[int], pinpoints: list[list[int]], tile: int) -> tuple[int, int]:
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
