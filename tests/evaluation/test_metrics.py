"""Intervals and baselines against numbers worked out elsewhere."""

from __future__ import annotations

import pytest

from mmtoken.evaluation.metrics import majority, paired_difference, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_intervals(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_where_the_score_test_turns() -> None:
    """Its ends are the proportions p with |share - p| = z sqrt(p (1 - p) / n)."""
    for correct, total in ((3, 10), (50, 100), (99, 100)):
        for p in wilson(correct, total):
            assert abs(correct / total - p) == pytest.approx(1.959964 * (p * (1 - p) / total) ** 0.5)


def test_wilson_stays_inside_zero_and_one_and_has_a_width_at_both_ends() -> None:
    for total in (1, 5, 1000):
        (low, some), (most, high) = wilson(0, total), wilson(total, total)
        assert 0 <= low < 1e-12 and 1 - 1e-12 < high <= 1
        assert some > 0.003 and most < 0.997
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_larger_z_gives_a_wider_interval() -> None:
    (low, high), (wide_low, wide_high) = wilson(3, 10), wilson(3, 10, z=2.575829)
    assert wide_low < low < high < wide_high


def test_majority_is_the_share_of_the_most_frequent_answer() -> None:
    assert majority(["red", "blue", "red", "two"]) == 0.5
    assert majority(["red"]) == 1.0
    assert majority(["1", "2", "3"]) == pytest.approx(1 / 3)
    assert majority([]) == 0.0


def test_a_paired_difference_worked_out_by_hand() -> None:
    # 50 tries, 3 won by the first only, 8 by the second only: (4 - 9) / 52 +- 1.959964 sqrt((13/52 - (5/52)^2) / 52).
    mine, base = [1] * 3 + [0] * 8 + [1] * 30 + [0] * 9, [0] * 3 + [1] * 8 + [1] * 30 + [0] * 9
    assert paired_difference(mine, base) == pytest.approx((-0.1, -0.229516, 0.037209), abs=2e-6)
    seen, low, high = paired_difference(base, mine)
    assert (seen, low, high) == pytest.approx((0.1, -0.037209, 0.229516), abs=2e-6)


def test_equal_outcomes_leave_a_width_and_ends_stay_in_range() -> None:
    seen, low, high = paired_difference([1, 0, 1], [1, 0, 1])
    assert seen == 0 and low == -high and 0.5 < high < 1
    assert paired_difference([1] * 2, [0] * 2)[2] == 1.0
    assert paired_difference([], []) == (0.0, -1.0, 1.0)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1], [1, 0])
