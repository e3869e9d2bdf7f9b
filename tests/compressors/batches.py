"""A stand-in for the model, and batches of tokens: all that a compressor's own tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from mmtoken.compressors import BUS, Compressor, Context, FlowCutHR, QueCC, QuoTA, RegionMask, TokenCorr, VideoScan
from mmtoken.compressors.base import CacheEntry, Dims, Rows, States, TextTokens, TowerStates, Transition
from mmtoken.compressors.registry import names
from mmtoken.tokens import VisualTokens, pick_rows

_OTHERS: dict[str, Compressor] = {
    "bus": BUS(keep=0.4, heads=1),
    "flowcuthr": FlowCutHR(keep=0.4, spread=1.5),
    "quecc": QueCC(keep=0.4, heads=1),
    "quota": QuoTA(keep=0.4, scorer="random"),
    "regionmask": RegionMask(),
    "tokencorr": TokenCorr(keep=0.4, tau_s=0.5),
    "videoscan": VideoScan(),
}
"""Those that need more than a budget to cut, or to fit the width of these tokens."""

SETTINGS: dict[str, Compressor] = {
    name: _OTHERS[name] if name in _OTHERS else kind(keep=0.4) for name, kind in names().items()
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
        states: float[B, N, H, 3, d], queries, keys and values, wherever they are asked for; 2 heads.
        prefix: float[B, 1, H, 3, d], the same of a CLS token.
        words: float[B, T, D], the text tokens of each item's row; the first one comes before the item.
        word_states: float[B, T, H, 3, d].
        word_counts: int[B], how many of them are real.
        turned, stretched: float[B, T + N], cosines and magnitudes of transitions, text first.
        calls: float[h, B, N], attention in earlier calls.
        asked: names of the facts that were asked for.
    """

    received: Tensor
    keys: Tensor
    cls: Tensor | None
    seeds: list[int]
    original_counts: list[int]
    states: Tensor
    prefix: Tensor
    words: Tensor
    word_states: Tensor
    word_counts: Tensor
    turned: Tensor
    stretched: Tensor
    calls: Tensor
    depth: int = 8
    blocks: int = 9
    tokenwise_projector: bool = True
    learned: Any = None
    memory: dict[str, Any] = field(default_factory=dict)
    asked: tuple[str, ...] = ()

    @property
    def steps(self) -> list[int]:
        return [1] * len(self.original_counts)

    @property
    def encoded_counts(self) -> list[int]:  # type: ignore[override]
        return self.original_counts

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        return self.seeds

    def tower_attention(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        self.scores = self._at("tower_attention", self.received, tokens)
        return self.scores

    def tower_keys(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        return self._at("tower_keys", self.keys, tokens)

    def tower_cls(self, tokens: VisualTokens) -> Tensor | None:
        return self.cls

    def tower_states(self, tokens: VisualTokens) -> TowerStates:
        states = self._at("tower_states", self.states, tokens)
        query, key, value = (states[:, :, :, i].transpose(1, 2)[..., None, :] for i in range(3))
        first = (self.prefix[:, :, :, i].transpose(1, 2) for i in range(3))
        return TowerStates(query, key, value, *first)

    def tower_features(self, tokens: VisualTokens, blocks: Sequence[int]) -> Tensor:
        features = self._at("tower_features", self.keys, tokens)
        return torch.cat([features * (block + 1) for block in blocks], -1)

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        self.asked = (*self.asked, "prompt")
        real = self._real()[..., None]
        return self.words.masked_fill(~real, 0).sum(1) / self.word_counts[:, None]

    def question_state(self, tokens: VisualTokens) -> Tensor:
        return self.prompt_embedding(tokens)

    def to_llm(self, tokens: VisualTokens) -> Tensor:
        return tokens.features

    def unpooled(self, tokens: VisualTokens) -> list[Tensor | None]:
        self.asked = (*self.asked, "unpooled")
        return [
            None if grid is None else tokens.features[row, tokens.eligible[row]].view(*grid, -1)
            for row, grid in enumerate(tokens.grid)
        ]

    def text(self, tokens: VisualTokens) -> TextTokens:
        self.asked = (*self.asked, "text")
        after = self._real() & (torch.arange(self.words.shape[1]) > 0)
        return TextTokens(self.words, self.words * 0.5, self._real(), after)

    def embeddings(self, tokens: VisualTokens) -> Tensor:
        return tokens.features

    def final_norm(self, features: Tensor) -> Tensor:
        return features / features.norm(dim=-1, keepdim=True)

    def text_attention(self, tokens: VisualTokens, layer: int, rows: Rows = "last") -> Tensor:
        self.scores = self._at("text_attention", self.received, tokens)
        return self.scores

    def next_attention(self, tokens: VisualTokens, rows: Rows = "last") -> Tensor:
        self.scores = self._at("next_attention", self.received, tokens)
        return self.scores

    def head_attention(self, tokens: VisualTokens, layer: int, rows: Tensor) -> Tensor:
        received = self._at("text_attention", self.received, tokens)
        most = int(rows.sum(-1).max())
        some = torch.arange(most) < rows.sum(-1)[:, None]
        scale = torch.arange(1, 1 + self.states.shape[2]) / 2
        result = received[:, None, None, :] * scale[:, None, None] / (1 + torch.arange(most))[:, None]
        return result.masked_fill(~some[:, None, :, None], 0.0)

    def decoder_states(self, tokens: VisualTokens, layer: int) -> States:
        return self._states(self._at("decoder_states", self.states, tokens), tokens.source + 1)

    def text_states(self, tokens: VisualTokens, layer: int) -> States:
        places = torch.arange(self.words.shape[1]).expand(len(tokens), -1) + 40
        return self._states(self.word_states, places)

    @staticmethod
    def _states(states: Tensor, places: Tensor) -> States:
        query, key, value = (states[:, :, :, i].transpose(1, 2) for i in range(3))
        angle = places[..., None] * torch.ones(states.shape[-1]) * 0.1
        return States(query, key, value, angle.cos(), angle.sin())

    def transition(self, tokens: VisualTokens, layer: int, module: Literal["attention", "mlp"]) -> Transition:
        self.asked = (*self.asked, "transitions")
        length = self.words.shape[1]
        valid = torch.cat([self._real(), ~self.received.isnan()], 1)
        shift = 0.1 * layer + (module == "mlp")
        return Transition(self.stretched + shift, (self.turned + shift).tanh(), valid, tokens.source + length)

    def history(self, tokens: VisualTokens) -> Tensor:
        self.asked = (*self.asked, "history")
        return torch.stack([call.gather(1, tokens.source) for call in self.calls])

    def _real(self) -> Tensor:
        return torch.arange(self.words.shape[1]) < self.word_counts[:, None]

    def _at(self, name: str, values: Tensor, tokens: VisualTokens) -> Tensor:
        self.asked = (*self.asked, name)
        return pick_rows(values, tokens.source)

    def rows(self, index: list[int], length: int | None = None) -> Given:
        """The same for some items, with places for `length` tokens each."""
        longest = self.received.shape[1]
        length = longest if length is None else length
        width = self.words.shape[1]

        def some(values: Tensor) -> Tensor:
            return values[index, :length]

        def row(values: Tensor) -> Tensor:
            return values[index, : width + length]

        return replace(
            self,
            received=some(self.received),
            keys=some(self.keys),
            cls=None if self.cls is None else self.cls[index],
            seeds=[self.seeds[i] for i in index],
            original_counts=[self.original_counts[i] for i in index],
            states=some(self.states),
            prefix=self.prefix[index],
            words=self.words[index],
            word_states=self.word_states[index],
            word_counts=self.word_counts[index],
            turned=row(self.turned),
            stretched=row(self.stretched),
            calls=self.calls[:, index, :length],
            memory={},
        )


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

    def random(*shape: int, real: Tensor = valid) -> Tensor:
        values = torch.randn(*real.shape, *shape, generator=generator).to(dtype)
        return values.masked_fill(~real.view(*real.shape, *[1] * len(shape)), torch.nan)

    features = random(width)
    tokens = VisualTokens.from_features(features, valid=valid, protected=protected)
    seeds = [seed * 1000 + row for row in range(rows)]
    cls = torch.randn(rows, width, generator=generator).to(dtype)
    received, keys = random().float().sigmoid(), random(4)
    word_counts = torch.randint(2, 6, (rows,), generator=generator)
    words = torch.arange(5) < word_counts[:, None]
    prefix = torch.randn(rows, 1, 2, 3, 4, generator=generator)
    return tokens, Given(
        received,
        keys,
        cls,
        seeds,
        tokens.counts(),
        states=random(2, 3, 4).float(),
        prefix=prefix,
        words=random(width, real=words),
        word_states=random(2, 3, 4, real=words).float(),
        word_counts=word_counts,
        turned=random(real=torch.cat([words, valid], 1)).float(),
        stretched=random(real=torch.cat([words, valid], 1)).float().exp(),
        calls=torch.stack([random().float().sigmoid() for _ in range(3)]),
    )


def act(method: Compressor, tokens: VisualTokens, given: Given) -> VisualTokens:
    """Run the sites of a compressor over one batch, as the engine would: tower blocks, projector, input, layers.

    Of a cache with one head, the tokens whose entries stay are left.
    """
    given.memory.clear()
    if method.trainable:
        given.learned = parts(method, given)
    if "vision_layer" in method.sites:
        for layer in range(int(method.tower_cut == "block"), given.depth):
            tokens = method.vision_layer(tokens, layer, given)
    if "project" in method.sites:
        tokens = method.project(tokens, lambda same: same, given)
    if "llm_input" in method.sites:
        tokens = method.llm_input(tokens, given)
    if "llm_layer" in method.sites:
        given.memory.clear()
        for layer in method.cut_layers(given.depth):
            tokens = method.llm_layer(tokens, layer, given)
    if "cache" in method.sites:
        tokens = tokens.where(method.cache(entry(tokens, given), 0, given)[:, 0])
    return tokens


def parts(method: Compressor, given: Given) -> nn.Module:
    """Learned parts for these batches, the same ones every time."""
    width = given.words.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return method.build(Dims(tower=given.keys.shape[-1], tokens=width, llm=width, blocks=given.depth)).eval()


def entry(tokens: VisualTokens, given: Given) -> CacheEntry:
    """A cache with one head that holds one item per row, without text."""
    query, key, value = (given.states[:, :, 0, i].gather(1, _wide(tokens.source, given)) for i in range(3))

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None] * torch.ones(query.shape[-1]) * 0.1
        return angle.cos(), angle.sin()

    return CacheEntry(
        keys=key[:, None],
        values=value[:, None],
        queries=query[:, None],
        unrotated=query[:, None] * 0.5,
        valid=tokens.valid,
        item=torch.where(tokens.eligible, 0, -1),
        length=tokens.valid.sum(-1),
        scaling=query.shape[-1] ** -0.5,
        rotary=rotary,
    )


def _wide(index: Tensor, given: Given) -> Tensor:
    return index[..., None].expand(-1, -1, given.states.shape[-1])


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
