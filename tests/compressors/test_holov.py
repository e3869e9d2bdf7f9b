"""HoloV against a case worked out by hand and a plain loop over its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import HoloV
from mmtoken.compressors.holov import crop_select, split_budget, token_scores
from mmtoken.tokens import VisualTokens
from tests.compressors.batches import act, lengths, make

ATTENTION = torch.tensor([0.4, 0.1, 0.05, 0.05, 0.1, 0.3])
FEATURES = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0], [1, 0], [0, 1]])


def score(features: Tensor, attention: Tensor, weight: float) -> float:
    """The mean score of a crop with loops, in double precision."""
    scaled = [1000 * float(a) for a in attention]
    n = len(scaled)
    if n == 1:
        return scaled[0]
    unit = [row / (float(row.norm()) + 1e-6) for row in features.double()]
    variance = []
    for i in range(n):
        row = [0.0 if i == j else float(unit[i] @ unit[j]) for j in range(n)]
        mean = sum(row) / (n - 1)
        variance.append(sum((value - mean) ** 2 for value in row) / (n - 1))
    gamma = (sum(map(abs, scaled)) / n) / (sum(map(abs, variance)) / n + 1e-6)
    return sum(a + weight * gamma * v for a, v in zip(scaled, variance, strict=True)) / n


def plain(features: Tensor, attention: Tensor, count: int, crops: int, weight: float) -> tuple[list[int], float]:
    """Kept tokens, and how far any decision was from another."""
    n, start, parts = len(features), 0, []
    crops = min(crops, n)
    for crop in range(crops):
        length = n // crops + (1 if crop < n % crops else 0)
        parts.append(list(range(start, start + length)))
        start += length
    scores = [score(features[part], attention[part], weight) for part in parts]
    shares = [value / (sum(scores) + 1e-6) for value in scores]
    exact = [share * count for share in shares]
    gap = min([abs(value - round(value)) for value in exact if value] + [1.0])
    budgets = [min(len(part), math.floor(value)) for part, value in zip(parts, exact, strict=True)]
    ranked = sorted(range(crops), key=lambda c: (-shares[c], c))
    spare = count - sum(budgets)
    close = [shares[a] - shares[b] for a, b in itertools.pairwise(ranked)]
    if all(budget < len(part) for budget, part in zip(budgets, parts, strict=True)) and 0 < spare <= crops:
        close = close[spare - 1 : spare]  # one each: only the last one who gets one matters
    # Crops that get no attention at all (padding) are equal to the bit.
    gap = min([gap, *(distance for distance in close if distance or shares[ranked[-1]])])
    while sum(budgets) < count:
        for crop in ranked:
            if sum(budgets) < count and budgets[crop] < len(parts[crop]):
                budgets[crop] += 1
    kept = []
    for part, budget in zip(parts, budgets, strict=True):
        kept += sorted(part, key=lambda i: (-float(attention[i]), i))[:budget]
    return sorted(kept), gap


def test_a_small_case_worked_out_by_hand():
    first = token_scores(FEATURES[:3], ATTENTION[:3])
    torch.testing.assert_close(first, torch.tensor([414.85, 114.85, 69.80]), rtol=0, atol=5e-3)
    assert float(first.mean()) == pytest.approx(199.833254, abs=1e-3)
    assert float(token_scores(FEATURES[3:], ATTENTION[3:]).mean()) == pytest.approx(163.499946, abs=1e-3)
    # Shares .55 and .45 of 3 are 1.65 and 1.35: one each, and the spare one to the first.
    assert split_budget([199.833254, 163.499946], [3, 3], 3) == [2, 1]
    assert crop_select(FEATURES, ATTENTION, 3, crops=2).tolist() == [0, 1, 5]


def test_variances_of_the_small_case():
    # Without attention to scale to, gamma is 0 and the variance goes: read it from two weights instead.
    without, with_one = token_scores(FEATURES[:3], ATTENTION[:3], 0.0), token_scores(FEATURES[:3], ATTENTION[:3], 1.0)
    variance = torch.tensor([0.1875, 0.1875, 0.25])
    gamma = 550 / 3 / (variance.mean() + 1e-6)
    torch.testing.assert_close(with_one - without, gamma * variance, rtol=1e-5, atol=1e-3)


def test_the_variance_term_nearly_cancels_out_of_a_crops_score():
    mean = float(ATTENTION[:3].mean()) * 1000
    assert float(token_scores(FEATURES[:3], ATTENTION[:3]).mean()) == pytest.approx(1.09 * mean, rel=1e-5)


def test_what_a_full_crop_cannot_use_goes_to_the_others_in_turn():
    # 9 of 10 belong to a crop of 2; the other 8 go to crops 2 and 1 in turn, the larger share first.
    assert split_budget([90.0, 4.0, 6.0], [2, 6, 6], 10) == [2, 4, 4]
    assert split_budget([90.0, 4.0, 6.0], [2, 6, 6], 9) == [2, 3, 4]
    assert split_budget([1.0, 1.0], [3, 3], 6) == [3, 3]
    assert split_budget([0.0, 0.0], [3, 3], 3) == [2, 1]


def test_a_crop_of_one_token_is_scored_like_any_other():
    assert token_scores(torch.ones(1, 2), torch.tensor([0.25])).tolist() == [250.0]


def test_a_video_has_crops_in_every_frame():
    # Four frames of four tokens and the same mean: of each one stays, although two frames have the four highest.
    tokens = VisualTokens.from_features(torch.randn(1, 16, 5), grid=((4, 2, 2),))
    _, context = make([16])
    context.received = torch.tensor([[0.6, 0.6, 0.0, 0.0, 0.3, 0.3, 0.3, 0.3] * 2])
    left = act(HoloV(keep=0.25, crops=1, weight=0.0), tokens, context)
    assert left.kept()[0].tolist() == [0, 4, 8, 12]


@settings(deadline=None, max_examples=60)
@given(
    sizes=lengths(40),
    seed=st.integers(0, 9999),
    keep=st.floats(0.05, 1.0),
    crops=st.integers(1, 20),
    weight=st.sampled_from([0.0, 0.09, 3.0]),
    separators=st.booleans(),
)
def test_selection_is_the_plain_loop(sizes, seed, keep, crops, weight, separators):
    tokens, context = make(sizes, seed, separators=separators)
    left = act(HoloV(keep=keep, crops=crops, weight=weight), tokens, context)
    for row, budget in enumerate(tokens.budget(keep)):
        where = tokens.eligible[row].nonzero()[:, 0]
        kept, gap = plain(tokens.features[row, where], context.received[row, where], budget, crops, weight)
        if gap > 1e-5 or crops == 1:
            assert left.kept()[row].tolist() == where[kept].tolist()


def test_the_plain_loop_mostly_has_a_clear_decision():
    gaps = []
    for seed in range(20):
        tokens, context = make([40], seed)
        gaps.append(plain(tokens.features[0], context.received[0], 15, 8, 0.09)[1])
    assert sum(gap > 1e-5 for gap in gaps) >= 18


def test_tiles_of_similarities_do_not_show():
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(600, 4, generator=generator), torch.rand(600, generator=generator)
    assert float(token_scores(features, attention, 2.0).mean()) == pytest.approx(
        score(features, attention, 2.0), rel=1e-4
    )
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-6)
    similarity = (unit @ unit.T).fill_diagonal_(0)
    variance = (similarity - similarity.sum(-1, keepdim=True) / 599).square().sum(-1) / 599
    scaled = attention * 1000
    want = scaled + 2.0 * scaled.mean() / (variance.mean() + 1e-6) * variance
    torch.testing.assert_close(token_scores(features, attention, 2.0), want, rtol=1e-5, atol=1e-2)
