"""VisPruner: half of the tokens are those that CLS looks at, the other half what is left after removing look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.compressors.base import Compressor, Context, Cost, Need, Positions, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.tokens import VisualTokens, refuse_nan


@dataclass(frozen=True)
class VisPruner(Compressor):
    """Salient and diverse patches, chosen by the tower's feature block before the projector.

    A share `important` of the budget goes to the patches that receive most attention from CLS (from all patches where
    the tower has no CLS). The others, in falling order of attention, are dealt alternately into two halves; of the
    first half the `step` patches most similar to any of the second half (cosine of their features) are removed, and so
    on until the budget is met. Rounds put what is left of the first half, the most similar first, before the second.

    Where the projector merges or re-samples patches, tokens are selected behind it, with attention averaged the same
    way and their own features compared.

    Differs from the official code: an odd number of remaining patches does not fail, the first half then has one more;
    tokens keep their positions (positions="renumber" compacts them as the code does).

    Attributes:
        important: share of the budget chosen by attention, in [0, 1]; rounded down.
        step: most tokens removed in one round.
    """

    keep: int | float = 128
    positions: Positions = "keep"
    important: float = 0.5
    step: int = 8

    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = (
        "Zhang et al., Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, "
        "ICCV 2025, arXiv 2412.01818"
    )
    year: ClassVar[int] = 2025
    cost: ClassVar[Cost] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"tower_attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("step", self.step, lowest=1)
        if not isinstance(self.important, float) or not 0 <= self.important <= 1:
            raise MMTokenError(f"important={self.important!r} is no share; give a float from 0.0 to 1.0.")

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        attention = ctx.tower_attention(tokens).float()
        refuse_nan(attention, tokens.eligible, "tower_attention")
        unit = normalize(tokens.features.detach().float(), dim=-1)
        refuse_nan(unit, tokens.eligible, "features")
        mask = tokens.protected.clone()
        for row, budget in enumerate(tokens.budget(self.keep)):
            places = tokens.eligible[row].nonzero()[:, 0]
            kept = salient_and_diverse(unit[row, places], attention[row, places], budget, self.important, self.step)
            mask[row, places[kept]] = True
        return default(tokens.where(mask))


def salient_and_diverse(
    features: Tensor, attention: Tensor, count: int, important: float = 0.5, step: int = 8
) -> Tensor:
    """int[count]: the `int(count * important)` most attended tokens, then what `remove_similar` leaves of the others.

    Args:
        features: float[N, D].
        attention: float[N]; ties go to the lower index.
        count: tokens to keep, at most N.
        important: share of them chosen by attention.
        step: most tokens removed in one round.
    """
    order = attention.argsort(descending=True, stable=True)
    salient = int(count * important)
    return torch.cat([order[:salient], remove_similar(features, order[salient:], count - salient, step)])


def remove_similar(features: Tensor, order: Tensor, count: int, step: int = 8) -> Tensor:
    """int[count]: what is left of the tokens int[R] `order` after removing look-alikes round by round.

    Args:
        features: float[N, D]; similarity is the cosine.
        order: the tokens, in the order in which the first round deals them alternately into halves.
        count: tokens to leave.
        step: most tokens removed in one round; of equally similar ones the lower index goes.
    """
    if not count:
        return order[:0]
    unit = normalize(features.detach().float(), dim=-1)
    while len(order) > count:
        first, second = order[::2], order[1::2]
        removed = min(step, len(order) - count, len(first))
        first = first.sort().values
        similarity = _nearest(unit[first], unit[second])
        first = first[similarity.argsort(descending=True, stable=True)]
        order = torch.cat([first[removed:], second])
    return order


def _nearest(rows: Tensor, columns: Tensor, chunk: int = 256) -> Tensor:
    """float[R]: the largest product of each row [R, D] with any of the columns [C, D]; chunks bound the memory."""
    return torch.cat([(part @ columns.T).amax(-1) for part in rows.split(chunk)])
