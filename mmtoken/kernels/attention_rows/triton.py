"""Rows of attention as Triton kernels.

`_statistics` goes over the keys once and leaves, per row, maximum and sum of exponentials of every share of the keys
(`splits`, so that a few rows fill a device too); where rows are wanted it also writes the scores. `_rows` turns scores
into rows or their mean over heads. `_columns` forms the scores again, tile by tile, and adds what each key receives:
its output is linear in the keys. No order of additions depends on timing, so results repeat bit by bit.

The rows of the heads that share a key head are taken together: row m of a group is head m // R, query m % R.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtoken.kernels.attention_rows import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU; triton decides it when a kernel is defined. There each tile costs the same time
whatever its size, so tiles are large and few."""
ROWS, KEYS = (256, 256) if INTERPRETED else (64, 64)
"""Most rows, and keys, of a tile."""
MOST_WIDTH = 128
"""Channels that a tile holds at once; wider heads take several."""
ROWS_FLOAT32, MOST_WIDTH_FLOAT32 = 32, 32
"""The same for float32, whose products are no tensor core's: each is an instruction, and registers spill of more."""
MOST_SPLITS = 64
PROGRAMS = 4 if INTERPRETED else 512
"""Enough programs to fill a device."""
MOST_SCORES = 1 << 26
"""Scores held at once where the mean over heads of many rows is asked for: more rows go one part after the other."""


@triton.jit
def _scores(
    query, key, index, mask, strides, b, group, rows, keys, count, length, width, shared, scale, offset, lowest,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, INDEX: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """float32[ROWS, KEYS]: scaled and masked scores of the group's rows `rows` and of the keys `keys`."""
    in_rows = rows < count * shared
    in_keys = keys < length
    place = rows % count
    if INDEX:
        place = tl.load(index + b * strides[6] + place * strides[7], mask=in_rows, other=0).to(tl.int64)
    head = group * shared + rows // count
    from_query = query + b * strides[0] + head * strides[1] + place * strides[2]
    from_key = key + b * strides[3] + group * strides[4] + keys * strides[5]
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    for chunk in range(CHUNKS):
        channel = chunk * WIDTH + tl.arange(0, WIDTH)
        in_width = channel < width
        q = tl.load(from_query[:, None] + channel[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0)
        k = tl.load(from_key[:, None] + channel[None, :], mask=in_keys[:, None] & in_width[None, :], other=0.0)
        if CAST:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        scores += tl.dot(q, tl.trans(k), input_precision="ieee")
    scores *= scale
    seen = in_rows[:, None] & in_keys[None, :]
    if MASK > 0:
        from_mask = mask + b * strides[8] + place[:, None] * strides[9] + keys[None, :] * strides[10]
        if MASK == 1:
            seen = seen & (tl.load(from_mask, mask=seen, other=0) != 0)
        else:
            added = tl.load(from_mask, mask=seen, other=0.0).to(tl.float32)
            seen = seen & (added > lowest)
            scores += added
    if CAUSAL:
        seen = seen & (keys[None, :] <= place[:, None] + offset)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def _statistics(
    query, key, index, mask, strides, scores_out, maxima, sums, groups, count, length, width, shared, scale, offset,
    lowest,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, INDEX: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAST: tl.constexpr, SPLITS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tiles = tl.cdiv(count * shared, ROWS)
    pair = tile // tiles
    rows = tile % tiles * ROWS + tl.arange(0, ROWS)
    in_rows = rows < count * shared
    row = pair * shared * count + rows
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    each = tl.cdiv(tl.cdiv(length, KEYS), SPLITS)
    for number in range(0, each):
        keys = (split * each + number).to(tl.int64) * KEYS + tl.arange(0, KEYS)
        scores = _scores(
            query, key, index, mask, strides, pair // groups, pair % groups, rows, keys, count, length, width, shared,
            scale, offset, lowest, WIDTH, CHUNKS, ROWS, KEYS, INDEX, MASK, CAUSAL, CAST,
        )  # fmt: skip
        if STORE:
            here = in_rows[:, None] & (keys < length)[None, :]
            tl.store(scores_out + row[:, None] * length + keys[None, :], scores, mask=here)
        higher = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet: minus infinity less itself would be NaN.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        most = higher
    tl.store(maxima + row * SPLITS + split, most, mask=in_rows)
    tl.store(sums + row * SPLITS + split, total, mask=in_rows)


@triton.jit
def _rows(scores, most, totals, out, heads, count, length, KEYS: tl.constexpr):
    """One program per output row and tile of keys: the mean over heads; for rows per head, heads = 1 and in place."""
    number = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    in_keys = keys < length
    mean = tl.zeros([KEYS], tl.float32)
    for head in range(0, heads):
        row = (number // count * heads + head) * count + number % count
        values = tl.load(scores + row * length + keys, mask=in_keys, other=-float("inf"))
        mean += tl.exp(values - tl.load(most + row)) / tl.load(totals + row)
    tl.store(out + number * length + keys, mean / heads, mask=in_keys)


@triton.jit
def _columns(
    query, key, index, mask, strides, most, weights, out, groups, count, length, width, shared, scale, offset,
    lowest,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, INDEX: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """One program per group and tile of keys: float32[KEYS], what these keys receive from rows with `weights`."""
    pair = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros([KEYS], tl.float32)
    for number in range(0, tl.cdiv(count * shared, ROWS)):
        rows = (number * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = rows < count * shared
        scores = _scores(
            query, key, index, mask, strides, pair // groups, pair % groups, rows, keys, count, length, width, shared,
            scale, offset, lowest, WIDTH, CHUNKS, ROWS, KEYS, INDEX, MASK, CAUSAL, CAST,
        )  # fmt: skip
        row = pair * shared * count + rows
        highest = tl.load(most + row, mask=in_rows, other=0.0)
        part = tl.load(weights + row, mask=in_rows, other=0.0)
        share = tl.exp(scores - highest[:, None]) * part[:, None]
        # A query that does not count may be padding, and zero times NaN is NaN.
        total += tl.sum(tl.where(part[:, None] > 0, share, 0.0), 0)
    tl.store(out + pair * length + keys, total, mask=keys < length)


def _power(size: int, least: int, most: int) -> int:
    """The power of two from `size` on, at least `least`, at most `most`."""
    return int(max(least, min(most, triton.next_power_of_2(size))))


class Rows:
    """Rows of attention that kernels are launched for; none of the sizes may be zero.

    Args:
        query, key, index, mask, scale, offset: as of `operator`.
    """

    def __init__(
        self, query: Tensor, key: Tensor, index: Tensor | None, mask: Tensor | None, scale: float, offset: int | None
    ) -> None:
        (batch, heads, queries, width), (groups, length) = query.shape, key.shape[1:3]
        shared, count = heads // groups, queries if index is None else index.shape[1]
        # Channels next to each other in memory, as models leave them.
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        kind, lowest = 0, 0.0
        mask_strides: tuple[int, ...] = (0, 0, 0)
        if mask is not None:
            mask_strides = mask.expand(batch, queries, length).stride()
            if mask.dtype == torch.bool:
                kind, mask = 1, mask.view(torch.uint8)
            else:
                kind, lowest = 2, torch.finfo(mask.dtype).min / 2
        strides = (
            *(*query.stride()[:3], *key.stride()[:3]),
            *((0, 0) if index is None else index.stride()),
            *mask_strides,
        )
        exact = not INTERPRETED and (query.dtype == torch.float32 or query.dtype != key.dtype)
        rows, keys = _power(count * shared, 16, ROWS_FLOAT32 if exact else ROWS), KEYS
        chunk = _power(width, 16, MOST_WIDTH_FLOAT32 if exact else MOST_WIDTH)
        self.tiles = batch * groups * triton.cdiv(count * shared, rows)
        self.splits = _power(min(triton.cdiv(PROGRAMS, self.tiles), triton.cdiv(length, keys)), 1, MOST_SPLITS)
        self.shape = batch, heads, groups, count, length
        self.sources = (query, key, index, mask, strides)
        self.numbers = (groups, count, length, width, shared, scale, offset or 0, lowest)
        self.kinds = {
            "WIDTH": chunk,
            "CHUNKS": triton.cdiv(width, chunk),
            "ROWS": rows,
            "KEYS": keys,
            "INDEX": index is not None,
            "MASK": kind,
            "CAUSAL": offset is not None,
            # The interpreter multiplies bfloat16 wrongly.
            "CAST": INTERPRETED or query.dtype != key.dtype,
        }
        self.exact = exact
        self.options = {"num_warps": 8 if exact or rows > 32 else 4, "num_stages": 2}

    def normalisers(self, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32[B, H, R] each: the highest score of a row, 0 of dead ones, and its sum of exponentials, 1 of those.

        Args:
            scores: float32[B, H, R, N], gets the scores; None: they are not wanted.
        """
        batch, heads, _, count, _ = self.shape
        query = self.sources[0]
        maxima, sums = query.new_empty(2, batch, heads, count, self.splits, dtype=torch.float32)
        with torch.cuda.device_of(query):
            _statistics[(self.tiles, self.splits)](
                *self.sources, maxima if scores is None else scores, maxima, sums, *self.numbers, **self.kinds,
                SPLITS=self.splits, STORE=scores is not None, **self.options,
            )  # fmt: skip
        most = maxima.amax(-1)
        most = most.masked_fill(most == -torch.inf, 0.0)
        total = (sums * (maxima - most[..., None]).exp()).sum(-1)
        return most, total.masked_fill(total == 0, 1.0)

    def columns(self, most: Tensor, weights: Tensor) -> Tensor:
        """float32[B, G, N]: what each key receives.

        Args:
            most: first of `normalisers`.
            weights: float32[B, H, R], over the second of them; rows where it is not above 0 may hold NaN.
        """
        batch, _, groups, _, length = self.shape
        query = self.sources[0]
        out = query.new_empty(batch, groups, length, dtype=torch.float32)
        grid = (batch * groups, triton.cdiv(length, self.kinds["KEYS"]))
        # Float32 waits for its products, not for memory: to load ahead would only spill registers here.
        options = self.options | ({"num_stages": 1} if self.exact else {})
        with torch.cuda.device_of(query):
            _columns[grid](*self.sources, most, weights.contiguous(), out, *self.numbers, **self.kinds, **options)
        return out


@torch.library.custom_op("mmtoken::attention_rows", mutates_args=())
def operator(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    scale: float,
    offset: int | None,
    mean: str,
) -> Tensor:
    (batch, heads, queries, _), length = query.shape, key.shape[2]
    count = queries if index is None else index.shape[1]
    out = _empty(query, key, index, mean)
    if out.numel() == 0:
        return out
    if count == 0:
        return out.zero_()
    part = max(1, MOST_SCORES // (batch * heads * length))
    if mean == "heads" and count > part:
        places = torch.arange(queries, device=query.device).expand(batch, -1) if index is None else index
        parts = places.split(part, 1)
        return torch.cat([operator(query, key, some, mask, None, scale, offset, mean) for some in parts], 1)
    rows = Rows(query, key, index, mask, scale, offset)
    if mean == "queries":
        counts = reference.counts(query, index, valid).expand(batch, count)
        most, totals = rows.normalisers()
        return rows.columns(most, counts[:, None] / totals).sum(1)
    scores = out
    if mean == "heads":
        scores = query.new_empty(batch, heads, count, length, dtype=torch.float32)
    most, totals = rows.normalisers(scores)
    along = _power(length, 16, 1024)
    grid = (out.numel() // length, triton.cdiv(length, along))
    averaged = heads if mean == "heads" else 1
    with torch.cuda.device_of(query):
        _rows[grid](scores, most, totals, out, averaged, count, length, KEYS=along)
    return out


def _empty(query: Tensor, key: Tensor, index: Tensor | None, mean: str) -> Tensor:
    """Room for the output."""
    (batch, heads, queries, _), length = query.shape, key.shape[2]
    count = queries if index is None else index.shape[1]
    shape = {"none": (batch, heads, count, length), "heads": (batch, count, length), "queries": (batch, length)}
    return query.new_empty(shape[mean], dtype=torch.float32)


@operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    scale: float,
    offset: int | None,
    mean: str,
) -> Tensor:
    return _empty(query, key, index, mean)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *reference.gradients(upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 6


operator.register_autograd(_backward, setup_context=_setup)


def attention_rows(*arguments: Any) -> Tensor:
    """`operator`, whose arguments these are."""
    found: Tensor = operator(*arguments)
    return found
