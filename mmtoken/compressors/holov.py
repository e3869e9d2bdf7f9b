"""HoloV: spread the budget over crops of the image, and keep the most attended tokens of each crop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor, Context, Cost, Need, Positions, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.tokens import VisualTokens, refuse_nan

_SCALE = 1000.0
_EPSILON = 1e-6


@dataclass(frozen=True)
class HoloV(Compressor):
    """A budget per crop, from the crop's attention and the variety of its tokens.

    An image's tokens are cut into `crops` runs of equal length in raster order (those of a video: that many per
    frame). A token's score is the attention that it receives in the tower's feature block, plus `weight` times the
    variance of its cosine similarities to the others of its crop, scaled to the crop's mean attention. Crops share the
    budget in proportion to their mean scores; inside a crop the most attended tokens stay.

    As the variance is scaled to the attention, it nearly cancels out of the shares: they follow the crop's mean
    attention (so does the official code).

    Differs from the official code: budget that a crop cannot use goes to the others, so that it is met with real
    tokens; tokens come out in raster order and keep their positions; a crop of one token is scored like any other; the
    attention of towers without CLS is the mean over all patches. Attention is summed over heads, not averaged, which
    scales all crops alike.

    Attributes:
        crops: runs that an image (or frame) is cut into.
        weight: of the variance term.
    """

    keep: int | float = 64
    positions: Positions = "keep"
    crops: int = 16
    weight: float = 0.09

    title: ClassVar[str] = "HoloV"
    paper: ClassVar[str] = (
        "Zou et al., Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention, "
        "NeurIPS 2025, arXiv 2510.02912"
    )
    year: ClassVar[int] = 2025
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("crops", self.crops, lowest=1)
        if not isinstance(self.weight, float) or not 0 <= self.weight < math.inf:
            raise MMTokenError(f"weight={self.weight!r} is no factor; give a float of at least 0.0.")

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        attention = ctx.tower_attention(tokens).float()
        features = tokens.features.detach().float()
        refuse_nan(attention, tokens.eligible, "tower_attention")
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        mask = tokens.protected.clone()
        for row, (budget, steps) in enumerate(zip(tokens.budget(self.keep), tokens.steps, strict=True)):
            places = tokens.eligible[row].nonzero()[:, 0]
            kept = crop_select(features[row, places], attention[row, places], budget, self.crops * steps, self.weight)
            mask[row, places[kept]] = True
        return tokens.where(mask)


def crop_select(features: Tensor, attention: Tensor, count: int, crops: int = 16, weight: float = 0.09) -> Tensor:
    """int[count]: the tokens that are kept, crop by crop, by falling attention in a crop (ties: lower index).

    Args:
        features: float[N, D] projected tokens in raster order.
        attention: float[N].
        count: tokens to keep, at most N.
        crops: contiguous runs; the first ones are a token longer where N does not divide, and none is empty.
        weight: of the variance term.
    """
    total = len(features)
    crops = min(crops, total)
    lengths = [total // crops + (number < total % crops) for number in range(crops)]
    parts = list(zip(features.split(lengths), attention.split(lengths), strict=True)) if crops else []
    scores = [float(token_scores(*part, weight).mean()) for part in parts]
    kept, start = [], 0
    for length, (_, received), budget in zip(lengths, parts, split_budget(scores, lengths, count), strict=True):
        kept.append(received.argsort(descending=True, stable=True)[:budget] + start)
        start += length
    return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.long, device=features.device)


def token_scores(features: Tensor, attention: Tensor, weight: float = 0.09) -> Tensor:
    """float[n]: scaled attention plus the weighted variance of cosines, for the tokens [n, D] of one crop.

    The variance counts a token's similarity to itself as 0, as the official code does.
    """
    count, scaled = len(features), attention.float() * _SCALE
    if count < 2:
        return scaled
    unit = features.float() / (features.float().norm(dim=-1, keepdim=True) + _EPSILON)
    variance = []
    for part, first in zip(unit.split(256), range(0, count, 256), strict=True):
        similarity = part @ unit.T
        similarity.diagonal(first).zero_()
        mean = similarity.sum(-1, keepdim=True) / (count - 1)
        variance.append((similarity - mean).square().sum(-1) / (count - 1))
    spread = torch.cat(variance)
    return scaled + weight * scaled.abs().mean() / (spread.abs().mean() + _EPSILON) * spread


def split_budget(scores: list[float], lengths: list[int], count: int) -> list[int]:
    """Tokens per crop: shares of `count` in proportion to the scores, rounded down, at most the crop's length.

    What is left is dealt out one by one, the crops with the largest share first, until `count` is reached.
    """
    total = sum(scores) + _EPSILON
    shares = [score / total for score in scores]
    budgets = [min(length, int(share * count)) for share, length in zip(shares, lengths, strict=True)]
    order = sorted(range(len(shares)), key=lambda crop: (-shares[crop], crop))
    left = count - sum(budgets)
    while left > 0:
        for crop in order:
            if left and budgets[crop] < lengths[crop]:
                budgets[crop] += 1
                left -= 1
    return budgets
