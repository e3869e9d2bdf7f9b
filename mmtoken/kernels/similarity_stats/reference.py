"""The specification in plain torch: tiles of similarities, of which only the statistics stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

TILE = 320
"""Rows of similarities that are in memory at once, and among themselves columns too."""


class SimilarityStats(NamedTuple):
    """What is known of each row's similarities.

    Attributes:
        max: float32[B, N], the largest one; -inf where there is nothing to compare with.
        argmax: int64[B, N], the column of the largest one, the lowest of equal ones; -1 where there is none.
        above: int64[B, N], how many are above the threshold.
    """

    max: Tensor
    argmax: Tensor
    above: Tensor


def similarity_stats(
    features: Tensor,
    other: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    threshold: float = 1.0,
) -> SimilarityStats:
    """See `mmtoken.kernels.similarity_stats.similarity_stats`."""
    unit = normalize(features.float(), dim=-1)
    against = unit if other is None else normalize(other.float(), dim=-1)
    best, index, count = scan(
        unit.detach(), None if other is None else against.detach(), columns=columns, threshold=threshold
    )
    if rows is not None:
        best = best.masked_fill(~rows, -torch.inf)
        index = index.masked_fill(~rows, -1)
        count = count.masked_fill(~rows, 0)
    if torch.is_grad_enabled() and (unit.requires_grad or against.requires_grad):
        # The scan needs no gradient of its own: the maximum is the similarity of one pair per row.
        partner = against if against.shape[1] else pad(against, (0, 0, 0, 1))  # one for rows without any
        pick = index.clamp(min=0)[..., None].expand(-1, -1, unit.shape[-1])
        pair = torch.where(index >= 0, (unit * partner.gather(1, pick)).sum(-1), 0.0)
        best = best + (pair - pair.detach())
    return SimilarityStats(best, index, count)


def scan(
    unit: Tensor, other: Tensor | None = None, *, columns: Tensor | None = None, threshold: float = 1.0
) -> SimilarityStats:
    """The statistics of all rows of unit vectors float32[B, N, D] against others, or (None) among themselves."""
    if other is None:
        return _scan_halves(unit, columns, threshold)
    parts = [_stats(unit[:, mine] @ other.transpose(1, 2), columns, threshold) for mine in _blocks(unit.shape[1])]
    best, index, count = parts[0]
    if len(parts) > 1:
        best, index, count = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    if columns is None and other.shape[1]:
        return SimilarityStats(best, index, count)
    return SimilarityStats(best, index.masked_fill(best == -torch.inf, -1), count)


def products(unit: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
    """Similarities of unit vectors float32[B, N, D] among themselves: (float32[B, n, m], its n rows, its m columns).

    Each product is made once and counts for both of its tokens: the tiles below the diagonal ones are left out. That is
    half the work, and (i, j) and (j, i) are the same number, which a matrix product does not promise within a tile.
    """
    blocks = _blocks(unit.shape[1])
    for number, mine in enumerate(blocks):
        for others in blocks[number:]:
            tile = unit[:, mine] @ unit[:, others].transpose(1, 2)
            yield torch.maximum(tile, tile.transpose(1, 2)) if mine == others else tile, mine, others


def _scan_halves(unit: Tensor, columns: Tensor | None, threshold: float) -> SimilarityStats:
    """The same among themselves."""
    best = torch.full_like(unit[..., 0], -torch.inf)
    index = torch.full_like(best, -1, dtype=torch.long)
    count = torch.zeros_like(index)

    def add(tile: Tensor, mine: slice, others: slice) -> None:
        """Take in the similarities [B, n, m] of the tokens `mine` to the tokens `others`, which come in order."""
        value, place, near = _stats(tile, None if columns is None else columns[:, others], threshold)
        better = value > best[:, mine]
        best[:, mine] = torch.where(better, value, best[:, mine])
        index[:, mine] = torch.where(better, place + others.start, index[:, mine])
        count[:, mine] += near

    for tile, mine, others in products(unit):
        if mine == others:
            tile.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            add(tile, mine, mine)
        else:
            add(tile, mine, others)
            add(tile.transpose(1, 2), others, mine)
    return SimilarityStats(best, index, count)


def _stats(tile: Tensor, columns: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(max, place of it, count), each [B, n], of similarities [B, n, m]."""
    if not tile.shape[2]:
        nothing = torch.zeros_like(tile[..., :1].sum(-1), dtype=torch.long)
        return torch.full_like(nothing, -torch.inf, dtype=tile.dtype), nothing, nothing
    if columns is not None:
        tile = tile.masked_fill(~columns[:, None], -torch.inf)
    value, place = tile.max(-1)
    # Above 1 is rounding only.
    return value, place, (tile > threshold).sum(-1) if threshold < 1 else torch.zeros_like(place)


def _blocks(length: int) -> list[slice]:
    """At least one block, of at most TILE tokens, alike in size."""
    size = max(1, math.ceil(length / max(1, math.ceil(length / TILE))))
    return [slice(start, start + size) for start in range(0, max(1, length), size)]
