"""A stand-in for the model, and batches of tokens: all that a compressor's own tests need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import (
    Compressor,
    Context,
    DivPrune,
    Downscale,
    FastV,
    PyramidDrop,
    Random,
    ToMe,
    UniformGrid,
    VisionZip,
)
from mmtoken.tokens import VisualTokens

SETTINGS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "downscale": Downscale(keep=0.4),
    "fastv": FastV(keep=0.4),
    "pyramiddrop": PyramidDrop(keep=0.4),
    "random": Random(keep=0.4),
    "tome": ToMe(keep=0.4),
    "uniformgrid": UniformGrid(keep=0.4),
    "visionzip": VisionZip(keep=0.4),
}
"""Every compressor of the library, with a budget that cuts."""

FIELDS = ("features", "source", "size", "valid", "protected", "item")


@dataclass
class Given(Context):
    """A context whose answers are given: what tokens at their original positions receive and have.

    Attributes:
        received: float[B, N] attention, whichever kind is asked for.
        keys: float[B, N, d].
        cls: float[B, D] or None.
        seeds: per item.
        original_counts: eligible tokens per item before any cut.
    """

    received: Tensor
    keys: Tensor
    cls: Tensor | None
    seeds: list[int]
    original_counts: list[int]
    depth: int = 8
    tokenwise_projector: bool = True
    asked: tuple[str, ...] = ()

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        return self.seeds

    def tower_attention(self, tokens: VisualTokens) -> Tensor:
        return self._at("tower_attention", self.received, tokens)

    def tower_keys(self, tokens: VisualTokens) -> Tensor:
        return self._at("tower_keys", self.keys, tokens)

    def tower_cls(self, tokens: VisualTokens) -> Tensor | None:
        return self.cls

    def text_attention(self, tokens: VisualTokens, layer: int) -> Tensor:
        return self._at("text_attention", self.received, tokens)

    def next_attention(self, tokens: VisualTokens) -> Tensor:
        return self._at("next_attention", self.received, tokens)

    def _at(self, name: str, values: Tensor, tokens: VisualTokens) -> Tensor:
        self.asked = (*self.asked, name)
        index = tokens.source
        return values.gather(1, index if values.ndim == 2 else index[..., None].expand(-1, -1, values.shape[-1]))

    def rows(self, index: list[int]) -> Given:
        """The same for some items."""
        cls = None if self.cls is None else self.cls[index]
        seeds, counts = ([values[i] for i in index] for values in (self.seeds, self.original_counts))
        return Given(self.received[index], self.keys[index], cls, seeds, counts, self.depth, self.tokenwise_projector)


def make(
    lengths: list[int], seed: int = 0, *, width: int = 5, separators: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[VisualTokens, Given]:
    """Random tokens of items of these lengths, padding filled with NaN: whoever reads it is found out."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(valid)
    if separators:
        protected = (torch.rand(rows, longest, generator=generator) < 0.2) & valid
        protected[:, 0] = False

    def random(*shape: int) -> Tensor:
        values = torch.randn(rows, longest, *shape, generator=generator).to(dtype)
        return values.masked_fill(~valid.view(rows, longest, *[1] * len(shape)), torch.nan)

    features = random(width)
    tokens = VisualTokens.from_features(features, valid=valid, protected=protected)
    seeds = [seed * 1000 + row for row in range(rows)]
    cls = torch.randn(rows, width, generator=generator).to(dtype)
    return tokens, Given(random().float().sigmoid(), random(4), cls, seeds, tokens.counts())


def act(method: Compressor, tokens: VisualTokens, given: Given) -> VisualTokens:
    """Run the sites of a compressor over one batch, as the engine would: tower blocks, projector, input, layers."""
    if "vision_layer" in method.sites:
        for layer in range(1, given.depth):
            tokens = method.vision_layer(tokens, layer, given)
    if "project" in method.sites:
        tokens = method.project(tokens, lambda same: same, given)
    if "llm_input" in method.sites:
        tokens = method.llm_input(tokens, given)
    if "llm_layer" in method.sites:
        for layer in method.cut_layers(given.depth):
            tokens = method.llm_layer(tokens, layer, given)
    return tokens


def subset(tokens: VisualTokens, index: list[int]) -> VisualTokens:
    """Some items of a batch, in this order."""
    fields = {name: getattr(tokens, name)[index] for name in FIELDS}
    return VisualTokens(**fields, grid=tuple(tokens.grid[i] for i in index))


def item(tokens: VisualTokens, row: int) -> dict[str, Tensor]:
    """What is left of one item, padding taken away, by original position."""
    real = tokens.valid[row].nonzero()[:, 0]
    real = real[tokens.source[row, real].argsort(stable=True)]
    return {name: getattr(tokens, name)[row, real] for name in FIELDS}


def lengths(largest: int = 30) -> st.SearchStrategy[list[int]]:
    """Ragged batches."""
    return st.lists(st.integers(1, largest), min_size=1, max_size=4)


def budgets() -> st.SearchStrategy[int | float]:
    return st.one_of(st.integers(1, 32), st.floats(0.01, 1.0))
