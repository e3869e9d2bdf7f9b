"""The specification in plain torch: attention is formed once where one head of it is small, else in every round."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

KEPT = 1 << 24
"""Most entries of attention that stay in memory over the rounds, 64 MiB whatever n is: one head of 4096 tokens."""
TILE = {"cpu": 1 << 20}
"""Entries of attention that are formed at a time: few enough for caches, measured."""
TILE_OF_DEVICE = 1 << 24
"""The same on a device, where launches cost more than memory."""


def pagerank(
    query: Tensor, key: Tensor, seen: Tensor, start: Tensor, rounds: int, scale: float, tolerance: float
) -> Tensor:
    """See `mmtoken.kernels.pagerank.pagerank`; every argument is given."""
    if not rounds or not query.numel():
        return start.float()[:, None].repeat(1, query.shape[1], 1)
    hidden = ~seen[:, None, :, None]
    # Zero times what stands in padding may be NaN.
    query, key = (query.float() * scale).masked_fill_(hidden, 0.0), key.float().masked_fill(hidden, 0.0)
    ranked = attention_kept if query.shape[2] ** 2 <= KEPT else attention_formed_again
    return ranked(query, key, seen, start.float(), rounds, tolerance)


def attention_kept(query: Tensor, key: Tensor, seen: Tensor, start: Tensor, rounds: int, tolerance: float) -> Tensor:
    """All rounds of some heads, then of others. When an item stood still is known at the end only, from all heads."""
    batch, heads, length, _ = query.shape
    scores = start.new_zeros(rounds + 1, batch, heads, length)
    scores[0] = start[:, None]
    some = max(1, _tile(query) // length**2)
    for item in range(batch):
        for group in _slices(heads, some):
            weight = query.new_empty(min(some, heads - group.start), length, length)
            for rows in _slices(length, max(1, _tile(query) // (len(weight) * length))):
                weight[:, rows] = _attention(query, key, seen, item, group, rows)
            for number in range(rounds):
                scores[number + 1, item, group] = (scores[number, item, group, None] @ weight)[:, 0]
    still = torch.stack([change(scores[n + 1], scores[n], seen) for n in range(rounds)]) < tolerance
    after = torch.where(still.any(0), still.int().argmax(0) + 1, rounds)
    return scores[after, torch.arange(batch, device=seen.device)]


def attention_formed_again(
    query: Tensor, key: Tensor, seen: Tensor, start: Tensor, rounds: int, tolerance: float
) -> Tensor:
    """One round of all heads after the other, until every item stands still."""
    batch, heads, length, _ = query.shape
    scores = start[:, None].repeat(1, heads, 1)
    moving = seen.any(-1)
    for _ in range(rounds):
        voted = torch.zeros_like(scores)
        for item in range(batch):
            for head in _slices(heads, 1):
                for rows in _slices(length, max(1, _tile(query) // length)):
                    weight = _attention(query, key, seen, item, head, rows)
                    voted[item, head] += (scores[item, head, None, rows] @ weight)[:, 0]
        moved = change(voted, scores, seen)
        scores = torch.where(moving[:, None, None], voted, scores)
        moving = moving & (moved >= tolerance)
        # torch.compile cannot know what a number is.
        if tolerance > 0 and not torch.compiler.is_compiling() and not bool(moving.any()):
            break
    return scores


def _attention(query: Tensor, key: Tensor, seen: Tensor, item: int, heads: slice, rows: slice) -> Tensor:
    """float32[h, r, n]: some rows of attention of an item, whose queries are scaled."""
    products = query[item, heads, rows] @ key[item, heads].transpose(-1, -2)
    return products.masked_fill_(~seen[item], torch.finfo(products.dtype).min).softmax(-1)


def change(after: Tensor, before: Tensor, seen: Tensor) -> Tensor:
    """float32[B]: how far scores [B, H, n] have moved, mean over heads and tokens seen."""
    return (after - before).abs().sum((1, 2)) / (after.shape[1] * seen.sum(-1).clamp(min=1))


def _tile(query: Tensor) -> int:
    return TILE.get(query.device.type, TILE_OF_DEVICE)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))
