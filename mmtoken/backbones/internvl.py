"""InternVL: an InternViT tower on tiles, pixel shuffle, any decoder; frames of videos come as pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mmtoken.backbones.base import (
    Backbone,
    Layout,
    Modality,
    Tower,
    hidden_state_block,
    numbered_crops,
    prefix_flags,
    unit_mean,
)


class InternVL(Backbone):
    """`InternVLForConditionalGeneration` of transformers, and checkpoints in its format (`OpenGVLab/InternVL3-1B-hf`).

    Every tile that the processor cuts from an image, the thumbnail behind the tiles and every frame of a video is an
    item of its own: the model gets all of them as `pixel_values` and cannot tell a frame from a picture.
    """

    name: ClassVar[str] = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def tower(self) -> Tower:
        tower = self.root.vision_tower
        blocks = tower.encoder.layer
        return Tower(
            module=tower,
            blocks=blocks,
            feature_block=hidden_state_block(self.model.config.vision_feature_layer, len(blocks)),
            prefix=1,
            unit=self._unit(),
            heads=self.model.config.vision_config.num_attention_heads,
            attention="attention",
            # The norms of queries and keys, which are identities in the smaller models.
            queries="q_norm",
            keys="k_norm",
            output="projection_layer",
            norms=("layernorm_before", "layernorm_after"),
            masks_attention=True,
        )

    def _unit(self) -> int:
        return int(1 / self.model.config.downsample_ratio + 0.5)

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        pixels = call["pixel_values"]
        rows, columns = (side // self._unit() for side in self.patch_grid(pixels))
        flags = prefix_flags(tiles * rows * columns, pixels.device)
        return Layout([rows * columns] * tiles, ((1, rows, columns),) * tiles, flags)

    def prompt_crops(self, ids: Tensor, places: list[Tensor]) -> list[tuple[int, bool]] | None:
        # The tiles of a picture follow each other without a token between them, the thumbnail last; pictures and frames
        # have marks around them.
        follows = [int(after[0]) == int(place[-1]) + 1 for place, after in itertools.pairwise(places)]
        return numbered_crops([*(not same for same in follows), True])

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return unit_mean(values, *self.patch_grid(call["pixel_values"]), self._unit()).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return list(call["pixel_values"])
