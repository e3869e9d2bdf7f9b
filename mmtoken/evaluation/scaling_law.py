"""How the error of a vision-language model depends on its size and on its visual tokens, and how to split a budget.

The law is that of Li et al., Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters, ICLR 2025, arXiv
2411.03312: error = A / (N^alpha V^beta) + D, for N billion parameters of the language model and V visual tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtoken.errors import MMTokenError

SIZES = (0.5, 1.8, 4.0, 7.0)
"""Billions of parameters of the language models behind POINTS."""

TOKENS = (1, 4, 16, 36, 64, 144, 576)
"""Visual tokens behind POINTS."""

AVERAGES = (
    (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
    (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
    (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
    (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
)
"""Published average score (1 - error) per size and number of tokens."""

POINTS: tuple[tuple[float, float, float], ...] = tuple(
    (size, float(tokens), 1 - score)
    for size, scores in zip(SIZES, AVERAGES, strict=True)
    for tokens, score in zip(TOKENS, scores, strict=True)
)
"""(billions of parameters, visual tokens, error), as published."""

_GRID = 33
_ROUNDS = 40
_WIDEST = 0.5


@dataclass(frozen=True)
class ScalingLaw:
    """error = a / (N^alpha V^beta) + d.

    Attributes:
        a, alpha, beta: at least 0.
        d: the error that no size and no tokens take away.
        squares: sum of squared errors over the points it was fitted to, None where it was not.
    """

    a: float
    alpha: float
    beta: float
    d: float = 0.0
    squares: float | None = None

    def error(self, billions: float, tokens: float) -> float:
        """Expected error of a language model of `billions` parameters that reads `tokens` visual tokens.

        Raises:
            MMTokenError: one of them is not positive.
        """
        _check_positive(billions=billions, tokens=tokens)
        return float(self.a / (billions**self.alpha * tokens**self.beta) + self.d)

    def relative_error(self, billions: float, tokens: float, all_tokens: float) -> float:
        """Expected error with `tokens` over the expected error with `all_tokens`; 1.0 where nothing is lost."""
        return self.error(billions, tokens) / self.error(billions, all_tokens)

    def best_tokens(self, text_tokens: float) -> float:
        """Visual tokens of least error for prompts of `text_tokens`, whatever the budget: beta Q / (alpha - beta).

        At equal FLOPs 2 N (Q + V); at least 1, and infinite where alpha <= beta: there tokens pay more than parameters.

        Raises:
            MMTokenError: text_tokens is negative or no number.
        """
        if not 0 <= text_tokens < math.inf:
            raise MMTokenError(f"text_tokens={text_tokens!r}; give a number of at least 0.")
        if self.alpha <= self.beta:
            return math.inf
        return max(1.0, self.beta * text_tokens / (self.alpha - self.beta))


@dataclass(frozen=True)
class Plan:
    """How to spend a budget.

    Attributes:
        billions: parameters of the language model.
        tokens: visual tokens.
        error: what the law expects.
    """

    billions: float
    tokens: int
    error: float


def fit(
    points: Sequence[tuple[float, float, float]] = POINTS,
    *,
    exponents: tuple[float, float] | None = None,
    d_range: tuple[float, float] = (0.0, math.inf),
) -> ScalingLaw:
    """Least squares of the law, by a grid over the exponents that closes in on the best; A and D are linear.

    Args:
        points: (billions of parameters, visual tokens, error).
        exponents: (alpha, beta) where they are known.
        d_range: bounds of D. Without a lower bound D is not identifiable: on POINTS the fit gets better and better
            the lower it goes.

    Raises:
        MMTokenError: there are too few points, or some are not positive; or the range is empty.
    """
    if not d_range[0] <= d_range[1]:
        raise MMTokenError(f"d_range={d_range!r} is empty; give (lowest, highest).")
    needed = 2 if exponents is not None else 4
    if len({(size, tokens) for size, tokens, _ in points}) < needed:
        raise MMTokenError(f"points has {len(points)} entries; give at least {needed} different sizes and tokens.")
    for point in points:
        _check_positive(**dict(zip(("billions", "tokens", "error"), point, strict=True)))
    table = torch.tensor(points, dtype=torch.float64)
    logs, error = (table[:, 0].log(), table[:, 1].log()), table[:, 2]
    if exponents is not None:
        alpha, beta = (torch.tensor([[value]], dtype=torch.float64) for value in exponents)
        a, d, squares = _linear(alpha, beta, logs, error, d_range)
        return ScalingLaw(float(a), *exponents, float(d), float(squares))
    centre, half = (_WIDEST / 2, _WIDEST / 2), _WIDEST / 2
    best = ScalingLaw(0.0, 0.0, 0.0, 0.0, math.inf)
    for _ in range(_ROUNDS):
        steps = torch.linspace(-half, half, _GRID, dtype=torch.float64)
        alpha, beta = ((steps + place).clamp(min=0) for place in centre)
        a, d, squares = _linear(alpha[:, None], beta[None, :], logs, error, d_range)
        row, column = divmod(int(squares.argmin()), _GRID)
        if float(squares[row, column]) < (best.squares or 0.0):
            found = (a[row, column], alpha[row], beta[column], d[row, column], squares[row, column])
            best = ScalingLaw(*(float(value) for value in found))
        centre, half = (best.alpha, best.beta), half * 0.6
    return best


def _linear(
    alpha: Tensor, beta: Tensor, logs: tuple[Tensor, Tensor], error: Tensor, d_range: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, D, sum of squares) for every pair of exponents float[I, 1], float[1, J]."""
    basis = (-(alpha[..., None] * logs[0] + beta[..., None] * logs[1])).exp()
    mean, error_mean = basis.mean(-1), error.mean()
    centred = basis - mean[..., None]
    spread = centred.square().sum(-1)
    # Over A and D without bounds; the best A for a given D makes a parabola in D, so the nearest bound is the best.
    free = (centred * (error - error_mean)).sum(-1) / spread.clamp(min=1e-300)
    d = (error_mean - free * mean).clamp(*d_range)
    a = (basis * (error - d[..., None])).sum(-1) / basis.square().sum(-1)
    return a, d, (error - a[..., None] * basis - d[..., None]).square().sum(-1)


PUBLISHED = ScalingLaw(a=0.55342, alpha=0.077, beta=0.015, d=0.03569, squares=4.3737e-4)
"""The law with the published exponents; A and D by least squares, for they were not published."""

REFITTED = ScalingLaw(a=0.59077, alpha=0.070937, beta=0.015102, d=0.0, squares=3.7938e-4)
"""The law fitted to POINTS with D >= 0, as `fit` finds it."""


def plan_tokens(
    tflops: float,
    text_tokens: int,
    *,
    sizes: Sequence[float] | None = None,
    most: int = 576,
    law: ScalingLaw = REFITTED,
) -> Plan:
    """The size of the language model and the visual tokens of least expected error within a budget.

    Args:
        tflops: budget of a prefill in 10^12 FLOPs, counted as 2 N (Q + V).
        text_tokens: Q.
        sizes: billions of parameters to choose from; None: any.
        most: no more visual tokens than an image has.
        law: what is expected.

    Raises:
        MMTokenError: a number is out of range, or no size leaves room for one visual token.
    """
    _check_positive(tflops=tflops, most=most)
    best = law.best_tokens(text_tokens)
    if sizes is None:
        tokens = max(1, round(min(best, most)))
        billions = 1e12 * tflops / (2e9 * (text_tokens + tokens))
        return Plan(billions, tokens, law.error(billions, tokens))
    plans = []
    for size in sizes:
        _check_positive(sizes=size)
        tokens = min(most, math.floor(1e12 * tflops / (2e9 * size) + 1e-9) - text_tokens)
        if tokens >= 1:
            plans.append(Plan(size, tokens, law.error(size, tokens)))
    if not plans:
        raise MMTokenError(f"tflops={tflops!r} leaves no visual token beside {text_tokens} of text for any of {sizes}.")
    return min(plans, key=lambda plan: plan.error)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not 0 < value < math.inf:
            raise MMTokenError(f"{name}={value!r}; give a positive number.")
