"""Mistral Small 3.1 and its successors: a Pixtral tower on pictures of any size, a patch merger, any decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, hidden_state_block, prefix_flags


class Mistral3(Backbone):
    """`Mistral3ForConditionalGeneration`.

    The tower holds the patches of all images in one row, kept apart by a mask: methods that act in it or read from it
    are refused. In the prompt a text token follows every row of an image ([IMG_BREAK], behind the last one [IMG_END]):
    these are no visual tokens, and stay.
    """

    name: ClassVar[str] = "Mistral 3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    dynamic_resolution: ClassVar[bool] = True

    def tower(self) -> Tower:
        tower = self.root.vision_tower
        blocks = tower.transformer.layers
        return Tower(
            module=tower,
            blocks=blocks,
            feature_block=hidden_state_block(self.model.config.vision_feature_layer, len(blocks)),
            prefix=0,
            unit=self.model.config.spatial_merge_size,
            heads=self.model.config.vision_config.num_attention_heads,
            opaque=True,
        )

    @staticmethod
    def _sizes(call: Mapping[str, Any]) -> list[list[int]]:
        """(height, width) of each image."""
        sizes: list[list[int]] = torch.as_tensor(call["image_sizes"]).tolist()
        return sizes

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = self.model.config.vision_config.patch_size * self.model.config.spatial_merge_size
        grids = tuple((1, height // side, width // side) for height, width in self._sizes(call))
        counts = [rows * columns for _, rows, columns in grids]
        return Layout(counts, grids, prefix_flags(sum(counts), call["pixel_values"].device))

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return values

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        pixels = zip(call["pixel_values"], self._sizes(call), strict=True)
        return [picture[:, :height, :width] for picture, (height, width) in pixels]
