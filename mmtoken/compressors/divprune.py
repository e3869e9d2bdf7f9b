"""DivPrune: keep the subset of visual tokens in which the closest pair is as far apart as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Cost, Positions
from mmtoken.kernels.maxmin_select import maxmin_select
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
    year: ClassVar[int] = 2025
    cost: ClassVar[Cost] = "pairs"

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        picked = maxmin_mask(tokens.features, tokens.budget(self.keep), tokens.eligible)
        return tokens.where(picked | tokens.protected)


def maxmin_mask(features: Tensor, counts: list[int], eligible: Tensor) -> Tensor:
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
    order = maxmin_order(features, counts, eligible)
    rows, length = eligible.shape
    picked = torch.zeros(rows, length + 1, dtype=torch.bool, device=features.device)
    return picked.scatter_(1, order % (length + 1), True)[:, :length]  # -1 goes into the column more


def maxmin_order(features: Tensor, counts: list[int], eligible: Tensor) -> Tensor:
    """The same, as int64[B, max(counts)] indices in the order in which they are picked, -1 behind the last one."""
    refuse_nan(features.detach().abs().amax(-1) * 0, eligible, "features")  # infinity times 0 is NaN as well
    steps = torch.tensor(counts, dtype=torch.long, device=features.device)
    return maxmin_select(features, max(counts, default=0), eligible=eligible, counts=steps)
