"""Aya Vision and Command A Vision: a SigLIP tower on tiles, pixel shuffle, Cohere 2 as decoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmtoken.backbones.base import numbered_crops
from mmtoken.backbones.fixed_size import FixedSize


class CohereVision(FixedSize):
    """`AyaVisionForConditionalGeneration` and `Cohere2VisionForConditionalGeneration`.

    Every tile that the processor cuts from an image, and the thumbnail behind the tiles, is an item of its own. Of four
    decoder layers three see a sliding window; the fourth sees everything and rotates nothing.
    """

    name: ClassVar[str] = "Aya Vision / Command A Vision"
    model_types: ClassVar[tuple[str, ...]] = ("aya_vision", "cohere2_vision")

    @property
    def unit(self) -> int:
        return int(self.model.config.downsample_factor)

    def prompt_crops(self, ids: Tensor, places: list[Tensor]) -> list[tuple[int, bool]] | None:
        # A mark ends every picture: right behind its last tile in Aya Vision, whose tiles begin with a mark; behind the
        # line break that ends every tile in Command A Vision. A prompt's last tile ends a picture.
        step = 1 if self.model.config.model_type == "aya_vision" else 2
        behind = [int(ids[min(int(place[-1]) + step, len(ids) - 1)]) for place in places]
        whole = behind[-1]
        if whole == self.placeholder_ids("image"):  # a prompt without marks
            return [(0, False)] * len(places)
        return numbered_crops([mark == whole for mark in behind])
