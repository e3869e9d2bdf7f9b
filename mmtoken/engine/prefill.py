"""One prefill: which tokens are visual, what is left of them, and what each decoder layer must be told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmtoken.backbones.base import Layout, Modality
from mmtoken.engine import gather
from mmtoken.engine.encode import Encoded
from mmtoken.errors import InputError
from mmtoken.tokens import Grid, VisualTokens, top_mask

if TYPE_CHECKING:
    from mmtoken.engine.states import LayerStates


@dataclass
class Items:
    """Where the items of a call lie in its prompt.

    Attributes:
        rows: prompt row of each item.
        places: int[I, N] positions in the row, padded with 0.
        valid, protected: bool[I, N].
        grids: per item.
        mass, size: float[I, N] or None, see `Encoded`.
        tower: float[I, N, C], a fact of a tower block (see `TowerFacts.read`), or None where none are known.
        cls: float[I, D] or None.
        seeds: per item, or None.
        frames: of an item and "unpooled" or "pixels", what `Context` gives by these names; None unless asked for.
        known: whether the encoder call was seen, so that tower facts exist.
        crops: int[I, N], see `Layout.crops`; None where no picture is cut.
        cropped: per item, whether it is, or belongs to, a picture that is cut into crops.
    """

    rows: list[int]
    places: Tensor
    valid: Tensor
    protected: Tensor
    grids: tuple[Grid | None, ...]
    mass: Tensor | None = None
    size: Tensor | None = None
    tower: Callable[[Literal["attention", "keys", "features"], int | None, bool], Tensor] | None = None
    cls: Tensor | None = None
    seeds: list[int] | None = None
    frames: Callable[[int, Literal["unpooled", "pixels"]], Tensor | None] | None = None
    known: bool = False
    crops: Tensor | None = None
    cropped: list[bool] = field(default_factory=list)

    def spans(self) -> list[tuple[int, Tensor]]:
        """(row, int[n] positions) of every item."""
        return [(row, self.places[i][self.valid[i]]) for i, row in enumerate(self.rows)]

    @functools.cached_property
    def row_index(self) -> Tensor:
        return torch.tensor(self.rows, device=self.places.device)

    def mark(self, like: Tensor, places: Tensor, valid: Tensor) -> Tensor:
        """bool[B, L] as `like`: True at the positions int[I, K] of every item that are valid."""
        rows, length = like.shape
        # What is not valid goes to one place behind the last row.
        flat = (self.row_index[:, None] * length + places).masked_fill(~valid, rows * length)
        marked = torch.zeros(rows * length + 1, dtype=torch.bool, device=like.device)
        return marked.index_fill_(0, flat.flatten(), True)[:-1].view(rows, length)


def locate(visual: Mapping[str, Tensor], encoded: Mapping[str, Encoded]) -> Items:
    """Find the items of a prompt.

    Args:
        visual: per modality bool[B, L].
        encoded: per modality what the encoder left behind; a missing one makes every run of visual tokens an item.

    Raises:
        InputError: the number of placeholders does not fit the encoded features.
    """
    rows: list[int] = []
    spans: list[Tensor] = []
    grids: list[Grid | None] = []
    sources: list[tuple[Encoded, int, int, int] | None] = []
    for modality, mask in visual.items():
        where = mask.nonzero()
        if not len(where):
            continue
        record = encoded.get(modality)
        per_row = mask.sum(-1).tolist()
        if record is None:
            for row, span in _runs(where):
                rows.append(row)
                spans.append(span)
                grids.append(None)
                sources.append(None)
            continue
        check_placeholders(mask, record)
        total = sum(record.layout.counts)
        start = 0
        for row, item, first in assign(per_row, record.layout.counts, len(where) // total, modality):
            count = record.layout.counts[item]
            rows.append(row)
            spans.append(where[start : start + count, 1])
            grids.append(record.layout.grids[item])
            sources.append((record, item, first, count))
            start += count
    order = sorted(range(len(rows)), key=lambda i: (rows[i], int(spans[i][0])))
    return _stack(
        [rows[i] for i in order], [spans[i] for i in order], [grids[i] for i in order], [sources[i] for i in order]
    )


def check_placeholders(mask: Tensor, record: Encoded) -> None:
    """Refuse a prompt whose placeholders do not fit what was encoded; beams repeat rows, so multiples fit.

    Args:
        mask: bool[B, L], where the placeholders of the record's modality are.
        record: what the encoder left behind.

    Raises:
        InputError: they do not fit.
    """
    check_counts(mask, record.modality, record.layout)


def check_counts(mask: Tensor, kind: Modality, layout: Layout) -> None:
    """The same, where only the layout of what is encoded is known."""
    count, total, items = int(mask.sum()), sum(layout.counts), len(layout.counts)
    if count and (not total or count % total):
        raise InputError(
            f"input_ids has {count} {kind} tokens but the {items} {kind}s give {total} features; the prompt must hold "
            f"one placeholder per feature (truncated prompt, or more {kind}s than placeholders?)."
        )


def _runs(where: Tensor) -> list[tuple[int, Tensor]]:
    """Runs of consecutive positions in int[n, 2] (row, position)."""
    step = where.diff(dim=0)
    breaks = ((step[:, 0] != 0) | (step[:, 1] != 1)).nonzero()[:, 0] + 1
    return [(int(part[0, 0]), part[:, 1]) for part in where.tensor_split(breaks.cpu())]


def assign(per_row: list[int], counts: list[int], copies: int, modality: str) -> list[tuple[int, int, int]]:
    """(row, item, first token of the item) for every row; beams repeat each row `copies` times in a row."""
    assigned: list[tuple[int, int, int]] = []
    item = first = 0
    for row in range(0, len(per_row), copies):
        mine: list[tuple[int, int]] = []
        left = per_row[row]
        while left > 0:
            if item >= len(counts) or counts[item] > left:
                raise InputError(
                    f"row {row} of input_ids has {per_row[row]} {modality} tokens, which is not a whole number of "
                    f"{modality}s (features per {modality}: {counts}); was the prompt truncated?"
                )
            mine.append((item, first))
            left -= counts[item]
            first += counts[item]
            item += 1
        assigned += [(copy, *entry) for copy in range(row, row + copies) for entry in mine]
    return assigned


def _stack(
    rows: list[int],
    spans: list[Tensor],
    grids: list[Grid | None],
    sources: list[tuple[Encoded, int, int, int] | None],
) -> Items:
    places = torch.nn.utils.rnn.pad_sequence(spans, batch_first=True)
    lengths = torch.tensor([len(span) for span in spans], device=places.device)
    valid = torch.arange(places.shape[1], device=places.device) < lengths[:, None]
    items = Items(rows, places, valid, torch.zeros_like(valid), tuple(grids))
    known = [source for source in sources if source is not None]
    if len(known) != len(sources):
        return items
    items.known = True

    def collect(name: str) -> Tensor | None:
        parts = [getattr(record, name) for record, *_ in known]
        if any(part is None for part in parts):
            return None
        cut = [part[first : first + n] for part, (_, _, first, n) in zip(parts, known, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True).to(places.device)

    items.protected = torch.nn.utils.rnn.pad_sequence(
        [record.layout.protected[first : first + n] for record, _, first, n in known], batch_first=True
    ).to(places.device)
    items.mass, items.size = collect("mass"), collect("size")
    crops = [
        valid.new_zeros(n, dtype=torch.long) if record.layout.crops is None else record.layout.crops[first : first + n]
        for record, _, first, n in known
    ]
    items.crops = torch.nn.utils.rnn.pad_sequence(crops, batch_first=True).to(places.device)
    items.cropped = items.crops.any(-1).tolist()
    if all(record.tower is not None for record, *_ in known):

        @functools.cache
        def fact(name: Literal["attention", "keys", "features"], block: int | None, joint: bool) -> Tensor:
            parts = [
                record.tower.read(name, block, joint)[first : first + n]  # type: ignore[union-attr]
                for record, _, first, n in known
            ]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(places.device)

        items.tower = fact
    if any(record.frames is not None for record, *_ in known):

        @functools.cache
        def shown(call: int) -> list[Tensor] | None:
            frames = known[call][0].frames
            return None if frames is None or frames.pictures is None else frames.pictures()

        calls = [next(i for i, (other, *_) in enumerate(known) if other is record) for record, *_ in known]

        def frames_of(number: int, name: Literal["unpooled", "pixels"]) -> Tensor | None:
            record, item, *_ = known[number]
            if record.frames is None:
                return None
            values = record.frames.unpooled if name == "unpooled" else shown(calls[number])
            return None if values is None else values[item]

        items.frames = frames_of
    if all(record.cls is not None and len(record.cls) == len(record.layout.counts) for record, *_ in known):
        items.cls = torch.stack([record.cls[item] for record, item, *_ in known])  # type: ignore[index]
    if all(record.seeds is not None for record, *_ in known):
        items.seeds = [record.seeds[item] for record, item, *_ in known]  # type: ignore[index]
    return items


@dataclass
class Cut:
    """What a group of decoder layers sees of the call.

    Attributes:
        group: 0 for the decoder's input, then 1, 2, ... for cuts between layers.
        index: int[B, n] positions of the call that are left, ascending, short rows padded on the left.
        valid: bool[B, n], None if no row is padded.
        rank: int[B, L] row in the shortened sequence of each position that is left.
        shift: int[B] by which later positions move down, None if positions are kept.
        position_ids: renumbered ones for `index`, None if positions are kept.
        hides: whether tokens that are gone stay in the sequence, out of everyone's sight (mode="mask").
    """

    group: int
    index: Tensor
    valid: Tensor | None
    rank: Tensor
    shift: Tensor | None = None
    position_ids: Tensor | None = None
    hides: bool = False
    memo: dict[tuple[int, ...], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, group: int, keep: Tensor, *, hides: bool = False) -> Cut:
        """From bool[B, L]; `hides` leaves the others in the sequence and marks them as not valid."""
        whole = bool(keep.all())
        if hides or whole:
            everything = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
            return cls(group, everything, None if whole else keep, everything, hides=hides)
        index, valid = gather.right_aligned(keep)
        order = torch.arange(index.shape[1], device=index.device).expand_as(index)
        # Padding points at positions that are not left, so it never overwrites a rank that is read.
        rank = torch.zeros_like(keep, dtype=torch.long).scatter(1, index, order)
        return cls(group, index, valid, rank)

    def valid_mask(self) -> Tensor:
        """bool[B, n]."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def lengths(self, prompt: list[int]) -> list[int]:
        """Tokens of each row that a layer processes, of `prompt` tokens before compression; padding not counted."""
        if self.hides or (self.valid is None and self.index.shape[1] == self.rank.shape[1]):
            return list(prompt)
        rows, n = self.index.shape
        return [n] * rows if self.valid is None else [int(v) for v in self.valid.sum(-1).tolist()]


@dataclass
class Prefill:
    """State of one decoder call with visual tokens.

    Attributes:
        items: where they are.
        length: L, tokens fed in this call.
        past: tokens the cache had seen before.
        real: bool[B, L], False on padding.
        masks: per decoder layer the mask of the uncompressed model (logical rows and columns), None where its attention
            does without one.
        embeds: float[B, L, D].
        dropped: bool[B, L] visual tokens that are gone.
        tokens: what is left of the items.
        entered: eligible tokens per item that entered the decoder.
        states: queries, keys and values of the layers that are read.
        tables: rotary tables that those layers were given.
        transitions: per (layer, module) what `Context.transition` reads: (magnitude, cosine) float32[B, n], cut.
        memory: what the compressor wants to remember.
        layer_cut: the cut that each decoder layer ran under.
        recorded: layers whose cache knows already what it stores.
        weight: float[B, L] log(size) of merged tokens, None while there are none or nobody asks for them.
        layer_weight: per decoder layer float[B, 1, n], those of its sequence.
        prompt: its text (a `Prompt`), for methods that read it.
        queries: how many tokens at the end of each row are action queries, see `Backbone.action_queries`.
    """

    items: Items
    length: int
    past: int
    real: Tensor
    masks: list[Tensor | None]
    embeds: Tensor
    position_ids: Tensor
    cut: Cut
    tokens: VisualTokens
    dropped: Tensor
    base: Cut | None = None
    input_ids: Tensor | None = None
    cache: Any = None
    entered: list[int] = field(default_factory=list)
    states: dict[int, LayerStates] = field(default_factory=dict)
    tables: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    transitions: dict[tuple[int, str], tuple[Tensor, Tensor, Cut]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    layer_cut: dict[int, Cut] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    weight: Tensor | None = None
    layer_weight: dict[int, Tensor] = field(default_factory=dict)
    started: float = 0.0
    prompt: Any = None
    queries: int = 0

    @functools.cached_property
    def said(self) -> Tensor:
        """bool[B, L]: the real tokens but action queries."""
        return without_last(self.real, self.queries)

    @property
    def last_token(self) -> Tensor:
        """int[B]: position of the last of these in each row."""
        return (self.said * torch.arange(self.length, device=self.real.device)).amax(-1)

    def query_rows(self) -> Tensor:
        """int[B, queries]: rows of the action queries in the current sequence."""
        places = (self.real & ~self.said).nonzero()[:, 1].view(len(self.real), self.queries)
        return self.cut.rank.gather(1, places)

    @functools.cached_property
    def visual(self) -> Tensor:
        """bool[B, L]: every position of an item, separators included."""
        return self.items.mark(self.real, self.items.places, self.items.valid)

    def last_row(self) -> Tensor:
        """int[B]: row of that token in the current sequence."""
        return self.cut.rank.gather(1, self.last_token[:, None])[:, 0]

    def forward_fill(self) -> Tensor:
        """int[B, L]: for each position of the call, the row of the last token left up to it, else of the first one.

        The output keeps the caller's length, so that `logits[:, -1]`, `labels` and `logits_to_keep` mean what they
        meant.
        """
        cut = self.cut
        left = torch.zeros_like(self.real).scatter(1, cut.index, cut.valid_mask())
        first = cut.rank.masked_fill(~left, self.length).amin(-1, keepdim=True)
        return torch.where(left, cut.rank, first).cummax(-1).values

    def places(self, tokens: VisualTokens) -> Tensor:
        """int[I, K] positions of tokens in their prompt rows."""
        return self.items.places.gather(1, tokens.source)

    def apply(self, tokens: VisualTokens) -> Tensor:
        """Take over what a compressor left: returns bool[B, L] of the positions that are left.

        Padding leaves together with the first visual token that is dropped; before that nothing moves at all, so that
        keeping everything is the uncompressed model to the bit.
        """
        self.tokens = tokens
        self.dropped = self.visual & ~self.items.mark(self.real, self.places(tokens), tokens.valid)
        if not bool(self.dropped.any()):
            return torch.ones_like(self.real)
        return self.real & ~self.dropped

    def hidden(self, tokens: VisualTokens, hidden: Tensor) -> Tensor:
        """float[I, K, D]: the rows of `hidden` [B, n, D] (current sequence) that hold `tokens`."""
        rows = self.items.row_index[:, None]
        return hidden[rows, self.cut.rank[rows, self.places(tokens)]]

    def write(self, tokens: VisualTokens, hidden: Tensor) -> Tensor:
        """Put merged features at their tokens' places in `hidden` [B, n, D] (current sequence)."""
        rows = self.items.row_index[:, None]
        places = self.cut.rank[rows, self.places(tokens)]
        changed = hidden.clone()
        where = tokens.valid
        changed[rows.expand_as(places)[where], places[where]] = tokens.features[where].to(hidden.dtype)
        return changed


def without_last(real: Tensor, count: int) -> Tensor:
    """bool[B, L]: `real` bool[B, L] without the last `count` of each row."""
    return real & (real.flip(-1).cumsum(-1).flip(-1) > count) if count else real


def most_mass(tokens: VisualTokens, mass: Tensor, keep: int | float) -> VisualTokens:
    """Of the tokens with a patch that the tower left, those with the largest share of such patches, up to the budget.

    Args:
        tokens: projected tokens in original order.
        mass: float[B, N].
        keep: the compressor's budget.
    """
    eligible = tokens.eligible & (mass > 0)
    return tokens.where(top_mask(mass, tokens.budget(keep), eligible) | tokens.protected)
