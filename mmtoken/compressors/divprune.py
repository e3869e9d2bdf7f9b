"""DivPrune: keep the subset of visual tokens in which the closest pair is as far apart as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Cost, Positions
from mmtoken.tokens import VisualTokens, refuse_nan

TILE = 256
"""Tokens whose distances to as many others are held at once."""


@dataclass(frozen=True)
class DivPrune(Compressor):
    """Greedy max-min diversity over the projected tokens.

    Starts with the token whose nearest neighbour is farthest, then adds the token farthest from all chosen ones
    (distance = 1 - cosine), per item. Needs no attention and does not see the question.

    Differs from the public code: a chosen token is never picked twice, so the budget is exact; zero vectors have
    distance 1 to everything instead of NaN; the kept tokens keep their positions. NaN features are an error.
    """

    keep: int | float = 0.098
    positions: Positions = "keep"

    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "Alvar et al., DivPrune: Diversity-based Visual Token Pruning, CVPR 2025, arXiv 2503.02175"
    year: ClassVar[int] = 2025
    cost: ClassVar[Cost] = "pairs"

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        picked = maxmin_select(tokens.features, tokens.budget(self.keep), tokens.eligible)
        return tokens.where(picked | tokens.protected)


def maxmin_select(features: Tensor, counts: list[int], eligible: Tensor) -> Tensor:
    """Greedy max-min diverse subsets.

    Args:
        features: float[B, N, D].
        counts: tokens to pick per row.
        eligible: bool[B, N], tokens that may be picked and that distances are measured between.

    Returns:
        bool[B, N] with `counts[b]` tokens picked in row b. Ties go to the lower index.

    Raises:
        InputError: features of an eligible token are NaN or infinite.
    """
    picked = torch.zeros_like(eligible)
    for row, order in enumerate(maxmin_order(features, counts, eligible)):
        picked[row, order] = True
    return picked & eligible


def maxmin_order(features: Tensor, counts: list[int], eligible: Tensor) -> list[Tensor]:
    """The same, as int[counts[b]] indices of each row in the order in which they are picked."""
    unit = torch.nn.functional.normalize(features.detach().float(), dim=-1)
    refuse_nan(unit, eligible, "features")
    unit.masked_fill_(~eligible[..., None], 0)
    rows, length = eligible.shape
    steps = max(counts, default=0)
    if not rows or not length or not steps:
        return [torch.zeros(0, dtype=torch.long, device=features.device)] * rows
    row = torch.arange(rows, device=features.device)
    # A chosen or ineligible token must lose against every other one, also against those at distance 0.
    best = _isolation(unit, eligible).masked_fill(~eligible, -torch.inf).argmax(-1)
    nearest = torch.full_like(unit[..., 0], torch.inf).masked_fill(~eligible, -torch.inf)
    order = [best]
    for _ in range(steps - 1):
        nearest[row, best] = -torch.inf
        # One row of distances at a time: all of them would take N x N numbers.
        distance = 1 - (unit @ unit[row, best][..., None])[..., 0]
        torch.minimum(nearest, distance, out=nearest)
        best = nearest.argmax(-1)
        order.append(best)
    # Rows with a smaller budget stopped counting earlier.
    return [picks[:count] for picks, count in zip(torch.stack(order, 1), counts, strict=True)]


def _isolation(unit: Tensor, eligible: Tensor) -> Tensor:
    """float[B, N]: distance of every token to its nearest eligible neighbour, in tiles of TILE x TILE pairs.

    Every number counts for both of its tokens: products round (i, j) and (j, i) apart, and of two mutual neighbours the
    lower index must win.
    """
    nearest = torch.full_like(unit[..., 0], torch.inf)
    blocks = [slice(start, start + TILE) for start in range(0, unit.shape[1], TILE)]
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            distance = 1 - unit[:, rows] @ unit[:, columns].transpose(1, 2)
            if rows == columns:
                distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
            for mine, others, dim in ((rows, columns, 2), (columns, rows, 1)):
                seen = distance.masked_fill(~eligible[:, others].unsqueeze(3 - dim), torch.inf)
                nearest[:, mine] = torch.minimum(nearest[:, mine], seen.amin(dim))
    return nearest
