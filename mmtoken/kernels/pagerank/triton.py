"""Page rank as Triton kernels: those of `attention_rows`, which hold no row of attention.

Maximum and sum of exponentials of every row are the same in all rounds, so they are found once. A round then forms the
scores again, tile by tile, and adds what each key receives from rows that weigh as much as they are ranked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmtoken.kernels.attention_rows.triton import Rows
from mmtoken.kernels.pagerank.reference import change


@torch.library.custom_op("mmtoken::pagerank", mutates_args=())
def operator(
    query: Tensor, key: Tensor, seen: Tensor, start: Tensor, rounds: int, scale: float, tolerance: float
) -> Tensor:
    """See `mmtoken.kernels.pagerank.pagerank`; every argument is given."""
    scores = start.float()[:, None].repeat(1, query.shape[1], 1)
    if not rounds or not query.numel():
        return scores
    attention = Rows(query, key, None, seen[:, None], scale, None)
    most, total = attention.normalisers()
    moving = seen.any(-1)
    for _ in range(rounds):
        voted = attention.columns(most, scores / total)
        moved = change(voted, scores, seen)
        scores = torch.where(moving[:, None, None], voted, scores)
        moving = moving & (moved >= tolerance)
        # To wait for the device in every round costs less than rounds that change nothing.
        if tolerance > 0 and not bool(moving.any()):
            break
    return scores


@operator.register_fake
def _(query: Tensor, key: Tensor, seen: Tensor, start: Tensor, rounds: int, scale: float, tolerance: float) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)
