"""Rows of attention in plain torch, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = {"cpu": 512}
"""Rows of N scores (over batch, heads and queries) formed at a time: few enough for caches, measured."""
ROWS_OF_DEVICE = 8192
"""The same on a device, where launches cost more than memory."""


class Tile(NamedTuple):
    """Some rows of attention.

    Attributes:
        batch, groups, rows: which of them; slices of B, G and R.
        query: float32[b, g, H / G * r, d], scaled.
        key: float32[b, g, N, d].
        weight: float32[b, g, H / G * r, N]. Rows that see nothing are uniform.
        alive: float32[b or 1, r, 1], zero for those rows; None: there are none.
    """

    batch: slice
    groups: slice
    rows: slice
    query: Tensor
    key: Tensor
    weight: Tensor
    alive: Tensor | None


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _seen(
    mask: Tensor | None, index: Tensor | None, offset: int | None, batch: slice, rows: slice, keys: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(bool[b or 1, r, N] keys that each query sees, what is added to their scores); None: all, nothing."""
    seen = bias = None
    index = None if index is None else index[batch, rows]
    if mask is not None:
        part = mask if mask.shape[0] == 1 else mask[batch]
        if part.shape[1] > 1:
            if index is None:
                part = part[:, rows]
            else:
                part = part.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, part.shape[2]))
        if part.dtype == torch.bool:
            seen = part
        else:
            seen = part > torch.finfo(part.dtype).min / 2
            # Minus infinity in a row that sees nothing would give NaN.
            bias = part.float().masked_fill(~seen, 0.0)
    if offset is not None:
        places = torch.arange(rows.start, rows.stop, device=keys.device)[None] if index is None else index
        causal = keys <= (places + offset)[..., None]
        seen = causal if seen is None else seen & causal
    return seen, bias


def _tiles(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    scale: float,
    offset: int | None,
) -> Iterator[Tile]:
    (batch, heads, queries, width), (groups, length) = query.shape, key.shape[1:3]
    shared = heads // groups
    query = query.unflatten(1, (groups, shared))
    count = queries if index is None else index.shape[1]
    most = ROWS.get(key.device.type, ROWS_OF_DEVICE)
    rows = max(1, min(count, most // shared))
    some = max(1, min(groups, most // (shared * rows)))
    items = max(1, most // (shared * rows * some))
    places = torch.arange(length, device=key.device)
    for b in _slices(batch, items):
        for r in _slices(count, rows):
            seen, bias = _seen(mask, index, offset, b, r, places)
            alive = None
            if seen is not None:
                if mask is not None or (offset is not None and offset < 0):
                    live = seen.any(-1, keepdim=True)
                    seen, alive = seen | ~live, live.float()
                hidden = ~seen[:, None, None]
            for g in _slices(groups, some):
                part = query[b, g]
                if index is None:
                    part = part[:, :, :, r]
                else:
                    part = part.gather(3, index[b, None, None, r, None].expand(*part.shape[:3], -1, width))
                part = part.float() * scale
                if valid is not None:
                    # Zero times what stands in padding may be NaN.
                    part = part.masked_fill(~valid[b, None, None, r, None], 0.0)
                ask = part.reshape(*part.shape[:2], -1, width)
                keys = key[b, g].float()
                scores = ask @ keys.transpose(-1, -2)
                if seen is not None:
                    square = scores.unflatten(2, (shared, -1))
                    if bias is not None:
                        square += bias[:, None, None]
                    square.masked_fill_(hidden, -torch.inf)
                yield Tile(b, g, r, ask, keys, scores.softmax(-1), alive)


def counts(query: Tensor, index: Tensor | None, valid: Tensor | None) -> Tensor:
    """float32[B or 1, R or 1]: what a row counts in the mean over heads and queries."""
    heads, queries = query.shape[1:3]
    if valid is None:
        number = queries if index is None else index.shape[1]
        return query.new_full((1, 1), 1 / max(1, heads * number), dtype=torch.float32)
    return valid.float() / (valid.sum(-1, keepdim=True).clamp(min=1) * heads)


def _share(tile: Tile, index: Tensor | None, valid: Tensor | None, query: Tensor, mean: str) -> Tensor:
    """What the rows of a tile count in the output: float32, broadcasts with [b, g, H / G, r, N]."""
    if mean == "queries":
        share = counts(query, index, valid)
        share = share if valid is None else share[tile.batch, tile.rows]
    else:
        share = query.new_full((1, 1), 1 / query.shape[1] if mean == "heads" else 1.0, dtype=torch.float32)
    share = share[:, None, None, :, None]
    return share if tile.alive is None else share * tile.alive[:, None, None]


def forward(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    scale: float,
    offset: int | None,
    mean: str,
) -> Tensor:
    """What `mmtoken.kernels.attention_rows` returns, without gradients; `offset` is its causal_offset."""
    (batch, heads, queries, _), (groups, length) = query.shape, key.shape[1:3]
    shared, count = heads // groups, queries if index is None else index.shape[1]
    shape = {
        "none": (batch, groups, shared, count, length),
        "heads": (batch, count, length),
        "queries": (batch, length),
    }
    total = query.new_zeros(shape[mean], dtype=torch.float32)
    for tile in _tiles(query, key, index, mask, valid if mean == "queries" else None, scale, offset):
        share = _share(tile, index, valid, query, mean)
        some = tile.weight.unflatten(2, (shared, -1))
        if mean == "none":
            torch.mul(some, share, out=total[tile.batch, tile.groups, :, tile.rows])
        elif mean == "heads":
            total[tile.batch, tile.rows] += some.sum((1, 2)) * share[:, 0, 0]
        else:
            each = share.expand(*some.shape[:4], 1).reshape(len(some), 1, -1)
            total[tile.batch] += (each @ some.flatten(1, 3))[:, 0]
    return total.flatten(1, 2) if mean == "none" else total


def gradients(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    scale: float,
    offset: int | None,
    mean: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, in their dtypes, of those of the output; forms the rows again."""
    (batch, heads, queries, width), groups = query.shape, key.shape[1]
    shared = heads // groups
    of_query = query.new_zeros(batch, groups, shared, queries, width, dtype=torch.float32)
    of_key = key.new_zeros(key.shape, dtype=torch.float32)
    if mean == "none":
        upstream = upstream.unflatten(1, (groups, shared))
    for tile in _tiles(query, key, index, mask, valid if mean == "queries" else None, scale, offset):
        if mean == "none":
            above = upstream[tile.batch, tile.groups, :, tile.rows]
        elif mean == "heads":
            above = upstream[tile.batch, None, None, tile.rows]
        else:
            above = upstream[tile.batch, None, None, None]
        some = tile.weight.unflatten(2, (shared, -1))
        above = above * _share(tile, index, valid, query, mean)
        of_scores = (some * (above - (some * above).sum(-1, keepdim=True))).flatten(2, 3)
        of_key[tile.batch, tile.groups] += of_scores.transpose(-1, -2) @ tile.query
        of_asked = (of_scores @ tile.key * scale).unflatten(2, (shared, -1))
        part = of_query[tile.batch, tile.groups]
        if index is None:
            part[:, :, :, tile.rows] = of_asked
        else:
            places = index[tile.batch, None, None, tile.rows, None]
            part.scatter_add_(3, places.expand_as(of_asked), of_asked)
    return of_query.flatten(1, 2).to(query.dtype), of_key.to(key.dtype)


class _AttentionRows(torch.autograd.Function):
    """`forward`, with `gradients` behind it instead of what autograd would keep: every row."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:5])
        ctx.settings = arguments[5:]
        return forward(*arguments)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 6


def attention_rows(*arguments: Any) -> Tensor:
    """`forward` with gradients; the same arguments."""
    found: Tensor = _AttentionRows.apply(*arguments)
    return found
