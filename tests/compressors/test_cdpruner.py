"""CDPruner against a case worked out by hand and a plain loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import CDPruner
from mmtoken.compressors.cdpruner import conditional_map, relevance
from mmtoken.errors import InputError
from tests.compressors.batches import act, lengths, make

FEATURES = torch.tensor([[1.0, 0], [0, 1], [0.96, 0.28], [-0.6, 0.8]])
WEIGHTS = torch.tensor([1, 0.5, 0.9, 0.2])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12))


def determinant(features: Tensor, weights: list[float], chosen: list[int]) -> float:
    kernel = [[weights[i] * cosine(features[i], features[j]) * weights[j] for j in chosen] for i in chosen]
    return float(torch.linalg.det(torch.tensor(kernel, dtype=torch.float64)))


def plain(features: Tensor, weights: list[float], count: int) -> tuple[list[int], float]:
    """Picks by enlarging the determinant step by step, computed afresh each time; and how close any step was."""
    features, chosen, before, gap = features.double(), [], 1.0, math.inf
    while len(chosen) < count:
        free = [i for i in range(len(features)) if i not in chosen]
        gains = {i: determinant(features, weights, [*chosen, i]) / before for i in free}
        if max(gains.values()) <= 1e-9:
            chosen += sorted(free, key=lambda i: (-weights[i], i))[: count - len(chosen)]
            break
        ranked = sorted(free, key=lambda i: (-gains[i], i))
        if len(ranked) > 1:
            gap = min(gap, gains[ranked[0]] / max(gains[ranked[1]], 1e-300) - 1)
        gap = min(gap, gains[ranked[0]] * 1e6)  # what is nearly dependent is left to rounding
        chosen.append(ranked[0])
        before = determinant(features, weights, chosen)
    return chosen, gap


def relevances(features: Tensor, words: Tensor, flip: bool) -> list[float]:
    mean = words.double().mean(0)
    raw = [cosine(row, mean) * (-1 if flip else 1) for row in features.double()]
    low, high = min(raw), max(raw)
    if high - low <= 1e-6:
        return [1.0] * len(raw)
    return [(value - low + 1e-6) / (high - low) for value in raw]


def test_a_small_case_worked_out_by_hand():
    # Gains 1, .25, .81, .04: token 0 first. Then -, .25, .0635, .0256: token 2 is more relevant but a near copy of 0.
    assert conditional_map(FEATURES, WEIGHTS, 2).tolist() == [0, 1]
    assert conditional_map(FEATURES, WEIGHTS, 1).tolist() == [0]


def test_relevance_worked_out_by_hand():
    # Cosines .3, .2, .1 with the only text; flipped, the lowest is the most relevant.
    patches = torch.tensor([[value, math.sqrt(1 - value**2)] for value in (0.3, 0.2, 0.1)])
    flipped = relevance(patches, torch.tensor([[1.0, 0.0]]), sign_flip=True)
    torch.testing.assert_close(flipped, torch.tensor([5e-6, 0.500005, 1.000005]), rtol=0, atol=1e-6)
    straight = relevance(patches, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(straight, torch.tensor([1.000005, 0.500005, 5e-6]), rtol=0, atol=1e-6)


def test_relevance_averages_cosines_over_the_texts():
    generator = torch.Generator().manual_seed(3)
    patches, text = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    raw = [sum(cosine(p, t) for t in text.double()) / 3 for p in patches.double()]
    want = [(value - min(raw) + 1e-6) / (max(raw) - min(raw)) for value in raw]
    torch.testing.assert_close(relevance(patches, text), torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_without_differences_or_text_all_are_equally_relevant():
    same = torch.ones(4, 3) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert relevance(same, torch.randn(2, 3)).tolist() == [1.0] * 4
    assert relevance(torch.randn(4, 3), torch.zeros(0, 3)).tolist() == [1.0] * 4


def test_where_nothing_independent_is_left_the_most_relevant_fill_up():
    # Two directions only: after one token of each, relevance decides, and the lower index of equals.
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3], [0, 2]])
    weights = torch.tensor([0.3, 0.9, 0.6, 0.4, 0.4])
    assert conditional_map(features, weights, 5).tolist() == [1, 2, 3, 4, 0]
    assert conditional_map(torch.zeros(3, 2), torch.tensor([0.1, 0.3, 0.2]), 3).tolist() == [1, 2, 0]


@settings(deadline=None, max_examples=60)
@given(
    sizes=lengths(12),
    seed=st.integers(0, 9999),
    keep=st.floats(0.05, 1.0),
    theta=st.sampled_from([None, 0.2, 0.5, 0.9]),
    flip=st.booleans(),
    separators=st.booleans(),
)
def test_selection_is_the_plain_loop(sizes, seed, keep, theta, flip, separators):
    tokens, context = make(sizes, seed, separators=separators)
    left = act(CDPruner(keep=keep, theta=theta, sign_flip=flip), tokens, context)
    for row, budget in enumerate(tokens.budget(keep)):
        where = tokens.eligible[row].nonzero()[:, 0]
        features = tokens.features[row, where]
        words = context.words[row, : int(context.word_counts[row])] * 0.5  # as they entered the decoder
        weights = relevances(features, words, flip)
        if theta is not None:
            # up to a factor, which changes no choice
            weights = [math.exp(theta / (2 * (1 - theta)) * (value - 1)) for value in weights]
        chosen, gap = plain(features, weights, budget)
        if gap > 1e-3:
            assert left.kept()[row].tolist() == where[sorted(chosen)].tolist()


def test_the_plain_loop_mostly_has_a_clear_decision():
    gaps = []
    for seed in range(20):
        tokens, context = make([12], seed)
        words = context.words[0, : int(context.word_counts[0])]
        gaps.append(plain(tokens.features[0], relevances(tokens.features[0], words, False), 5)[1])
    assert sum(gap > 1e-3 for gap in gaps) >= 15


def test_theta_leads_from_diversity_to_relevance():
    generator = torch.Generator().manual_seed(0)
    tokens, context = make([12], 5)
    context.words = torch.randn(1, 5, 5, generator=generator)
    words = context.words[0, : int(context.word_counts[0])]
    weights = relevance(tokens.features[0], words.mean(0, keepdim=True))
    best = weights.argsort(descending=True)[:3].sort().values.tolist()
    kept = {theta: act(CDPruner(keep=3, theta=theta), tokens, context).kept()[0].tolist() for theta in (0.01, 0.999)}
    assert kept[0.999] == best
    ones = conditional_map(tokens.features[0], torch.ones(12) + 0.005 * weights, 3)
    assert kept[0.01] == sorted(ones.tolist()) != best


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_text_that_is_not_a_number_is_an_error(bad):
    tokens, context = make([8])
    context.words[0, 0, 0] = bad
    with pytest.raises(InputError, match="text embeddings contains NaN for item 0"):
        act(CDPruner(keep=3), tokens, context)
