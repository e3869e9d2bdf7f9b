"""Numbers that stand beside an accuracy: intervals and baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927, JASA 22): 95 % for the default `z`.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at `total` correct answers.

    Returns:
        (low, high); (0, 1) when nothing was asked.
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def majority(answers: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent of `answers`; 0 when there are none."""
    return max(Counter(answers).values()) / len(answers) if answers else 0.0


def paired_difference(mine: Sequence[int], base: Sequence[int], z: float = 1.959964) -> tuple[float, float, float]:
    """How much more often `mine` succeeds than `base` on the same tries, with a 95 % interval for the default `z`.

    Adjusted Wald interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37), which adds a try won by one only to
    both sides, so that it has a width where the two never differ.

    Args:
        mine, base: 0 or 1 per try, in the same order.

    Returns:
        (difference as it was seen, low, high), in [-1, 1].
    """
    total = len(mine)
    only_mine = sum(m > b for m, b in zip(mine, base, strict=True))
    only_base = sum(m < b for m, b in zip(mine, base, strict=True))
    up, down = (only_mine + 1) / (total + 2), (only_base + 1) / (total + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    seen = (only_mine - only_base) / total if total else 0.0
    return seen, max(-1.0, up - down - half), min(1.0, up - down + half)
