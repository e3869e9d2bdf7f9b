"""Gemma 3 and PaliGemma: a SigLIP tower on pictures of one size, decoders whose images see themselves both ways."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from mmtoken.backbones.fixed_size import FixedSize


class Gemma3(FixedSize):
    """`Gemma3ForConditionalGeneration`.

    The projector averages squares of patches. Tokens of an image see each other both ways; most decoder layers see a
    sliding window. With pan-and-scan the processor sends crops along, which are items of their own: a prompt does not
    tell them from further pictures.
    """

    name: ClassVar[str] = "Gemma 3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    @property
    def unit(self) -> int:
        return self._side // int(self.model.config.mm_tokens_per_image**0.5)


class PaliGemma(FixedSize):
    """`PaliGemmaForConditionalGeneration` with Gemma (PaliGemma) or Gemma 2 (PaliGemma 2) as decoder.

    A prefix language model: images and prompt see each other both ways. Position ids begin at 1.
    """

    name: ClassVar[str] = "PaliGemma / PaliGemma 2"
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    tokenwise_projector: ClassVar[bool] = True

    def projector(self) -> nn.Module:
        projector: nn.Module = self.root.multi_modal_projector
        return projector
