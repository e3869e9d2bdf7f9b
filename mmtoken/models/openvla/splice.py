"""Room for visual tokens in rows that were tokenized without them."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label of tokens that are not to be predicted."""


def insert(rows: Tensor, at: Tensor, count: int, value: int) -> Tensor:
    """[B, L + count]: `value` written `count` times into each row before position `at` of it.

    Args:
        rows: [B, L] of any dtype.
        at: int[B], 0 to L.
        count: how many.
        value: what to write.
    """
    place = torch.arange(rows.shape[1] + count, device=rows.device).expand(len(rows), -1)
    start = at[:, None]
    moved = torch.where(place < start, place, place - count).clamp(0, rows.shape[1] - 1)
    return rows.gather(1, moved).masked_fill((place >= start) & (place < start + count), value)
