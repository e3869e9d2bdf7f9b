"""Gemma 3 and PaliGemma: a SigLIP tower on pictures of one size, decoders whose images see themselves both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mmtoken.backbones.base import Backbone, Layout, Modality, Tower, prefix_flags, unit_mean


class _FixedSize(Backbone):
    """What both share: every picture is scaled to one square, whose patches are averaged over squares of `_unit`."""

    @property
    def _side(self) -> int:
        """Patches per side."""
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)

    @property
    def _unit(self) -> int:
        """Side of the square of patches that become one token."""
        return 1

    def tower(self) -> Tower:
        tower = self.root.vision_tower
        blocks = tower.encoder.layers
        return Tower(
            module=tower,
            blocks=blocks,
            feature_block=len(blocks) - 1,
            prefix=0,
            unit=self._unit,
            heads=self.model.config.vision_config.num_attention_heads,
        )

    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        side = self._side // self._unit
        flags = prefix_flags(tiles * side * side, call["pixel_values"].device)
        return Layout([side * side] * tiles, ((1, side, side),) * tiles, flags)

    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        return unit_mean(values, self._side, self._side, self._unit).flatten(0, 1)

    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        return list(call["pixel_values"])


class Gemma3(_FixedSize):
    """`Gemma3ForConditionalGeneration`.

    The projector averages squares of patches. Tokens of an image see each other both ways; most decoder layers see a
    sliding window. With pan-and-scan the processor sends crops along, which are items of their own: a prompt does not
    tell them from further pictures.
    """

    name: ClassVar[str] = "Gemma 3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    @property
    def _unit(self) -> int:
        return self._side // int(self.model.config.mm_tokens_per_image**0.5)


class PaliGemma(_FixedSize):
    """`PaliGemmaForConditionalGeneration` with Gemma (PaliGemma) or Gemma 2 (PaliGemma 2) as decoder.

    A prefix language model: images and prompt see each other both ways. Position ids begin at 1.
    """

    name: ClassVar[str] = "PaliGemma / PaliGemma 2"
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    tokenwise_projector: ClassVar[bool] = True

    def projector(self) -> nn.Module:
        projector: nn.Module = self.root.multi_modal_projector
        return projector
