"""DivPrune: keep the subset of visual tokens in which the closest pair is as far apart as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Positions
from mmtoken.tokens import VisualTokens, refuse_nan


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
    unit = torch.nn.functional.normalize(features.detach().float(), dim=-1)
    refuse_nan(unit, eligible, "features")
    rows, length = eligible.shape
    picked = torch.zeros_like(eligible)
    if not rows or not length:
        return picked
    limit = torch.tensor(counts, device=features.device)
    row = torch.arange(rows, device=features.device)
    similarity = unit @ unit.transpose(1, 2)
    # Products of blocks round (i, j) and (j, i) apart, and of two mutual neighbours the lower index must win.
    distance = 1 - (similarity + similarity.transpose(1, 2)) / 2
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distance.masked_fill(~eligible[:, None, :], torch.inf).amin(-1)
    for step in range(max(counts, default=0)):
        # A chosen or ineligible token must lose against every other one, also against those at distance 0.
        best = nearest.masked_fill(picked | ~eligible, -torch.inf).argmax(-1)
        picked[row, best] |= (step < limit) & eligible[row, best]
        to_best = distance[row, best].clamp(max=2.0)
        nearest = to_best if step == 0 else torch.minimum(nearest, to_best)
    return picked
