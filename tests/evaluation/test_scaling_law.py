"""The scaling law against numbers that were worked out independently, and its closed-form optimum against a search."""

from __future__ import annotations

import math

import pytest

from mmtoken import MMTokenError
from mmtoken.evaluation.scaling_law import POINTS, PUBLISHED, REFITTED, SIZES, ScalingLaw, fit, plan_tokens

FREE = (-math.inf, math.inf)


def squares(law: ScalingLaw) -> float:
    """Sum of squared errors in a plain loop."""
    total = 0.0
    for size, tokens, error in POINTS:
        total += (law.a / (size**law.alpha * tokens**law.beta) + law.d - error) ** 2
    return total


def test_the_points_are_the_published_ones() -> None:
    assert len(POINTS) == 28 and len(set(POINTS)) == 28
    assert POINTS[0] == (0.5, 1.0, 1 - 0.3855) and POINTS[-1] == (7.0, 576.0, 1 - 0.5354)
    assert POINTS[9] == (1.8, 16.0, 1 - 0.4528)


def test_the_fit_with_d_at_least_0() -> None:
    law = fit()
    assert law.d == 0.0
    assert law.a == pytest.approx(0.5906, abs=5e-4)
    assert law.alpha == pytest.approx(0.071, abs=5e-4) and law.beta == pytest.approx(0.015, abs=5e-4)
    assert law.squares == pytest.approx(3.80e-4, abs=1e-6) == squares(law)
    for name in ("a", "alpha", "beta", "d", "squares"):
        assert getattr(REFITTED, name) == pytest.approx(getattr(law, name), abs=1e-5)


def test_the_published_exponents() -> None:
    law = fit(exponents=(0.077, 0.015))
    assert law.squares == pytest.approx(4.37e-4, abs=1e-6) == squares(law)
    assert fit(exponents=(0.077, 0.015), d_range=(0.0, 0.0)).squares == pytest.approx(6.82e-4, abs=1e-6)
    assert fit(exponents=(0.077, 0.015), d_range=FREE).d == pytest.approx(law.d)  # its best D is positive by itself
    for name in ("a", "alpha", "beta", "d", "squares"):
        assert getattr(PUBLISHED, name) == pytest.approx(getattr(law, name), abs=1e-5)


def test_d_is_not_identifiable_without_a_lower_bound() -> None:
    law = fit(d_range=(-1.48, math.inf))
    assert law.d == -1.48 and law.squares == pytest.approx(2.94e-4, abs=1e-6)
    assert law.alpha == pytest.approx(0.019, abs=5e-4) and law.beta == pytest.approx(0.004, abs=5e-4)
    lower = fit(d_range=(-10.0, math.inf))
    assert lower.d == -10.0 and lower.squares is not None and law.squares is not None and lower.squares < law.squares


def test_a_law_is_found_again_from_its_own_points() -> None:
    law = ScalingLaw(a=0.4, alpha=0.21, beta=0.09, d=0.15)
    points = [(size, tokens, law.error(size, tokens)) for size in (0.5, 2, 9) for tokens in (1, 8, 100, 700)]
    found = fit(points)
    assert found.squares == pytest.approx(0, abs=1e-12)
    for name in ("a", "alpha", "beta", "d"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), abs=1e-3)


@pytest.mark.parametrize(
    ("law", "text", "tokens"),
    [
        (PUBLISHED, 50, 12.1),
        (ScalingLaw(0.5906, 0.071, 0.015), 50, 13.4),
        (PUBLISHED, 0, 1.0),
        (ScalingLaw(1, 0.2, 0.1), 40, 40.0),
        (ScalingLaw(1, 0.1, 0.2), 40, math.inf),
        (ScalingLaw(1, 0.1, 0.1), 40, math.inf),
    ],
)
def test_the_best_number_of_tokens(law: ScalingLaw, text: int, tokens: float) -> None:
    assert law.best_tokens(text) == pytest.approx(tokens, abs=0.05)


@pytest.mark.parametrize("tflops", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("text", [0, 50, 400])
def test_the_closed_form_is_what_a_search_finds_whatever_the_budget(tflops: float, text: int) -> None:
    errors = {v: REFITTED.error(1e12 * tflops / (2e9 * (text + v)), v) for v in range(1, 600)}
    best = min(errors, key=errors.__getitem__)
    assert abs(best - REFITTED.best_tokens(text)) <= 0.5
    plan = plan_tokens(tflops, text)
    assert plan.tokens == best and plan.error == pytest.approx(errors[best])
    assert 2e9 * plan.billions * (text + plan.tokens) == pytest.approx(1e12 * tflops)


def test_of_given_sizes_the_best_affordable_one_is_taken() -> None:
    budget = 0.8  # TFLOPs: 750, 172, 50 and 7 tokens beside 50 of text
    wanted = {0.5: 576, 1.8: 172, 4.0: 50, 7.0: 7}
    by_hand = {size: REFITTED.error(size, tokens) for size, tokens in wanted.items()}
    plan = plan_tokens(budget, 50, sizes=SIZES)
    assert plan.billions == min(by_hand, key=by_hand.__getitem__) and plan.tokens == wanted[plan.billions]
    for size, tokens in wanted.items():
        assert plan_tokens(budget, 50, sizes=[size]).tokens == tokens
    ocr = ScalingLaw(0.6, alpha=0.01, beta=0.3)  # reading small print: tokens matter more than parameters
    assert plan_tokens(budget, 50, law=ocr).tokens == 576
    assert plan_tokens(budget, 50, sizes=SIZES, law=ocr).billions == 0.5


def test_relative_error() -> None:
    assert REFITTED.relative_error(7, 576, 576) == 1.0
    assert REFITTED.relative_error(7, 1, 576) == pytest.approx(576**0.015102)  # D = 0: the size drops out
    assert PUBLISHED.relative_error(7, 1, 576) < 576**0.015


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: REFITTED.error(0, 5), "billions=0"),
        (lambda: REFITTED.error(7, -1), "tokens=-1"),
        (lambda: REFITTED.error(7, math.nan), "tokens=nan"),
        (lambda: REFITTED.best_tokens(-1), "text_tokens=-1"),
        (lambda: fit(POINTS[:3]), "points has 3 entries"),
        (lambda: fit([*POINTS, (1.0, 0.0, 0.5)]), "tokens=0"),
        (lambda: fit(d_range=(1.0, 0.0)), "d_range="),
        (lambda: plan_tokens(0, 50), "tflops=0"),
        (lambda: plan_tokens(0.1, 50, sizes=[7.0]), "leaves no visual token"),
        (lambda: plan_tokens(0.1, 50, sizes=[]), "leaves no visual token"),
    ],
)
def test_what_means_nothing_is_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MMTokenError, match=message):
        call()
