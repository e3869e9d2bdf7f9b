"""Families whose tower gets pictures of one size, without tokens before the patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, hidden_state_block, prefix_flags, unit_mean


class FixedSize(Backbone):
    """Every picture is one square, of whose patches squares of `unit` become a token; each picture is an item."""

    @property
    def _side(self) -> int:
        """Patches per side."""
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)

    @property
    def unit(self) -> int:
        """Side of the square of patches that become one token."""
        return 1

    def tower(self) -> Tower:
        tower = self.root.vision_tower
        blocks = tower.encoder.layers
        return Tower(
            module=tower,
            blocks=blocks,
            feature_block=hidden_state_block(getattr(self.model.config, "vision_feature_layer", -1), len(blocks)),
            prefix=0,
            unit=self.unit,
            heads=self.model.config.vision_config.num_attention_heads,
        )

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = self._side // self.unit
        flags = prefix_flags(tiles * side * side, call["pixel_values"].device)
        return Layout([side * side] * tiles, ((1, side, side),) * tiles, flags)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return unit_mean(values, self._side, self._side, self.unit).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return list(call["pixel_values"])
