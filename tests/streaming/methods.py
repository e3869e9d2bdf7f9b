"""Small compressors that decide by rules which a test can follow by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, HeldFrame, Positions, StreamFrame
from mmtoken.tokens import VisualTokens


@dataclass(frozen=True)
class Loudest(Compressor):
    """Of every temporal step the `keep` tokens with the longest vectors enter the decoder."""

    keep: int | float = 2
    positions: Positions = "keep"
    title: ClassVar[str] = "Loudest"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        mask = tokens.protected.clone()
        for row in range(len(tokens)):
            for step in range(tokens.steps[row]):
                places = (tokens.eligible[row] & (tokens.item[row] == step)).nonzero()[:, 0]
                norms = tokens.features[row, places].float().norm(dim=-1)
                mask[row, places[norms.argsort(descending=True, stable=True)[: int(self.keep)]]] = True
        return tokens.where(mask)


@dataclass(frozen=True)
class Thins(Compressor):
    """Of every step a layer holds every second row, odd layers the odd ones, even layers the even ones."""

    keep: int | float = 1.0
    positions: Positions = "keep"
    title: ClassVar[str] = "Thins"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026

    def retain(self, frame: StreamFrame, ctx: Context) -> Tensor | Sequence[Tensor]:
        return [held_rows(len(frame.embeddings), layer) for layer in range(len(frame.keys))]


def held_rows(count: int, layer: int) -> Tensor:
    """int[K]: what `Thins` holds in a layer; layer 0 also holds the last row, so that layers differ in number."""
    rows = torch.arange(layer % 2, count, 2)
    return torch.unique(torch.cat([rows, torch.tensor([count - 1])])) if layer == 0 else rows


@dataclass(frozen=True)
class SecondOldest(Compressor):
    """When too much is held, the second oldest step leaves; `most` steps are held in any case."""

    keep: int | float = 1.0
    positions: Positions = "keep"
    most: int = 3
    title: ClassVar[str] = "SecondOldest"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026

    def evict(self, held: Sequence[HeldFrame], over: bool, ctx: Context) -> int | None:
        return 1 if over or len(held) > self.most else None
