"""The specification in plain torch: tiles of similarities, of which only the statistics stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

TILE = 256
"""Tokens that are compared with as many others at once."""


class SimilarityStats(NamedTuple):
    """What is known of each row's similarities.

    Attributes:
        max: float32[B, N], the largest one; -inf where there is nothing to compare with.
        index: int64[B, N], the column of the largest one, the lowest of equal ones; -1 where there is none.
        count: int64[B, N], how many are above the threshold.
    """

    max: Tensor
    index: Tensor
    count: Tensor


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


def scan(unit: Tensor, other: Tensor | None, *, columns: Tensor | None, threshold: float = 1.0) -> SimilarityStats:
    """The statistics of all rows of unit vectors float32[B, N, D] against others, or (None) among themselves.

    Among themselves each product is made once and counts for both of its tokens: half the work, and (i, j) and (j, i)
    cannot be rounded apart.
    """
    against = unit if other is None else other
    best = torch.full_like(unit[..., 0], -torch.inf)
    index = torch.full_like(best, -1, dtype=torch.long)
    count = torch.zeros_like(index)

    def add(tile: Tensor, mine: slice, others: slice) -> None:
        """Take in the similarities [B, n, m] of the tokens `mine` to the tokens `others`, which come in order."""
        if columns is not None:
            tile = tile.masked_fill(~columns[:, None, others], -torch.inf)
        value, place = tile.max(-1)
        better = value > best[:, mine]
        best[:, mine] = torch.where(better, value, best[:, mine])
        index[:, mine] = torch.where(better, place + others.start, index[:, mine])
        if threshold < 1:  # above 1 is rounding only
            count[:, mine] += (tile > threshold).sum(-1)

    blocks = _blocks(against.shape[1])
    for number, mine in enumerate(_blocks(unit.shape[1])):
        for others in blocks[number:] if other is None else blocks:
            tile = unit[:, mine] @ against[:, others].transpose(1, 2)
            if other is None and mine == others:
                tile.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            add(tile, mine, others)
            if other is None and mine != others:
                add(tile.transpose(1, 2), others, mine)
    return SimilarityStats(best, index, count)


def _blocks(length: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, length, TILE)]
