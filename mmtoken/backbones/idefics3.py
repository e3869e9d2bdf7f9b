"""Idefics3 and SmolVLM: SigLIP-like tower on tiles, pixel-shuffle connector, `text_model` as decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, numbered_crops, prefix_flags, unit_mean


class Idefics3(Backbone):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`.

    Every tile that the processor cuts from an image, and the global view, is an item of its own.
    """

    name: ClassVar[str] = "Idefics3 / SmolVLM"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")

    @property
    def decoder(self) -> Any:
        return self.root.text_model

    def tower(self) -> Tower:
        tower = self.root.vision_model
        return Tower(
            module=tower,
            blocks=tower.encoder.layers,
            feature_block=len(tower.encoder.layers) - 1,
            prefix=0,
            unit=self.model.config.scale_factor,
            heads=self.model.config.vision_config.num_attention_heads,
        )

    def _grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        patch = self.model.config.vision_config.patch_size
        height, width = call["pixel_values"].shape[-2:]
        return height // patch, width // patch

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        rows, columns = (side // self.model.config.scale_factor for side in self._grid(call))
        device = call["pixel_values"].device
        return Layout(
            [rows * columns] * tiles, ((1, rows, columns),) * tiles, prefix_flags(tiles * rows * columns, device)
        )

    def prompt_crops(self, ids: Tensor, places: list[Tensor]) -> list[tuple[int, bool]] | None:
        # Pixels do not tell several pictures from the crops of one. The processor marks every tile with a token right
        # before it: crops with their row and column, whole pictures with one and the same; a prompt's last tile is one.
        marks = [int(ids[place[0] - 1]) if int(place[0]) else -1 for place in places]
        whole = marks[-1]
        if whole in (-1, self.placeholder_ids("image")):  # a prompt without marks
            return [(0, False)] * len(places)
        return numbered_crops([mark == whole for mark in marks])

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return unit_mean(values, *self._grid(call), self.model.config.scale_factor).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        # Rows of a batch are padded with all-zero tiles, which the model leaves out.
        tiles = call["pixel_values"].flatten(0, 1)
        real = tiles.flatten(1).ne(0).any(-1)
        real[0] |= ~real.any()
        return list(tiles[real])
