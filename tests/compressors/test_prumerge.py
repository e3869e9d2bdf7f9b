"""LLaVA-PruMerge against cases worked out by hand and a plain loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import PruMerge
from mmtoken.compressors.prumerge import merge_neighbours, official_centres, others, outlier_ratio
from tests.compressors.batches import act, item, lengths, make


def quantile(values: list[float], share: float) -> float:
    """Linearly interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def outliers(attention: list[float]) -> tuple[int, float]:
    """How many values are above Q3 + 1.5 IQR, and how far the nearest one is from that bound."""
    first, third = quantile(attention, 0.25), quantile(attention, 0.75)
    bound = third + 1.5 * (third - first)
    return sum(value > bound for value in attention), min(abs(value - bound) for value in attention)


def evenly(values: list[int], count: int) -> list[int]:
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def plain(
    features: Tensor, attention: Tensor, keys: Tensor, budget: int, adaptive: bool, plus: bool, neighbours: int
) -> tuple[dict[int, tuple[Tensor, float]], float]:
    """By index (feature, size) of what is left, with loops in double precision; and how close a decision was."""
    features, keys, weights = features.double(), keys.double(), [float(a) for a in attention]
    total = len(weights)
    ranked = sorted(range(total), key=lambda i: (-weights[i], i))
    room = budget if budget in (1, total) else budget - 1
    gap = math.inf
    if adaptive:
        count, gap = outliers(weights)
        count = min(room, max(1, count))
        centres = ranked[:count]
        if plus:
            apart = max(1, math.floor(math.floor(total / count) / 3))
            centres += evenly([i for i in range(0, total, apart) if i not in centres], room - count)
    else:
        centres = ranked[: math.ceil(room / 2) if plus else room]
        centres += evenly([i for i in range(total) if i not in centres], room - len(centres)) if plus else []
    found = {}
    for centre in centres:
        similar = {
            j: float(keys[centre] @ keys[j]) / (float(keys[centre].norm()) * float(keys[j].norm()))
            for j in range(total)
            if j != centre
        }
        near = sorted(similar, key=lambda j: (-similar[j], j))
        if 0 < neighbours < len(near):
            gap = min(gap, similar[near[neighbours - 1]] - similar[near[neighbours]])
        value = features[centre].clone()
        for j in near[:neighbours]:
            value += weights[j] * features[j]
        found[centre] = value, 1.0 + len(near[:neighbours])
    rest = [i for i in range(total) if i not in centres]
    if rest and len(centres) < budget:
        found[max(rest, key=lambda i: (weights[i], -i))] = sum(weights[i] * features[i] for i in rest), float(len(rest))
    return found, gap


@pytest.mark.parametrize(
    ("attention", "want"),
    [
        # Q1 .03, Q3 .0525, bound .08625
        ([0.02, 0.03, 0.03, 0.04, 0.04, 0.05, 0.06, 0.73], 1),
        # Q1 1.75, Q3 3.25, bound 5.5
        ([1, 1, 2, 2, 3, 3, 4, 20], 1),
        ([0.3] * 8, 0),
        # The bound itself is no outlier: Q1 1, Q3 2, bound 3.5
        ([1, 1, 1, 2, 3.5], 0),
    ],
)
def test_outliers_worked_out_by_hand(attention, want):
    assert outlier_ratio(torch.tensor(attention)) * len(attention) == want
    assert outliers(list(attention))[0] == want


@settings(deadline=None, max_examples=80)
@given(
    sizes=lengths(40),
    seed=st.integers(0, 9999),
    keep=st.floats(0.05, 1.0),
    adaptive=st.booleans(),
    plus=st.booleans(),
    neighbours=st.integers(0, 6),
    separators=st.booleans(),
)
def test_selection_and_merging_are_the_plain_loop(sizes, seed, keep, adaptive, plus, neighbours, separators):
    tokens, context = make(sizes, seed, separators=separators)
    context.received = context.received**4  # sharper, so that there are outliers
    method = PruMerge(keep=keep, adaptive=adaptive, plus=plus, neighbours=neighbours)
    left = act(method, tokens, context)
    for row, budget in enumerate(tokens.budget(keep)):
        where = tokens.eligible[row].nonzero()[:, 0]
        facts = (tokens.features[row, where], context.received[row, where], context.keys[row, where])
        want, gap = plain(*facts, budget, adaptive, plus, neighbours)
        assert len(want) == budget or (adaptive and len(want) <= budget)
        if gap <= 1e-5:
            continue
        after = item(left, row)
        real = ~after["protected"]
        assert after["source"][real].tolist() == where[sorted(want)].tolist()
        values = torch.stack([want[i][0] for i in sorted(want)]).float()
        torch.testing.assert_close(after["features"][real], values, rtol=1e-5, atol=1e-5)
        assert after["size"][real].tolist() == [want[i][1] for i in sorted(want)]


def test_the_plain_loop_mostly_has_a_clear_decision_and_outliers():
    gaps, counts = [], []
    for seed in range(20):
        tokens, context = make([40], seed)
        attention = context.received[0] ** 4
        gaps.append(plain(tokens.features[0], attention, context.keys[0], 20, True, True, 4)[1])
        counts.append(outliers(attention.tolist())[0])
    assert sum(gap > 1e-5 for gap in gaps) >= 15
    assert sum(count > 1 for count in counts) >= 8


def test_an_image_has_thresholds_of_its_own():
    tokens, context = make([12, 12])
    context.received[0] = torch.tensor([1.0] * 11 + [2.0])
    context.received[1] = torch.tensor([5.0, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
    # Pooled, half of the numbers would be far above the first image's, and its outlier lost.
    assert outlier_ratio(context.received) == 0
    left = act(PruMerge(neighbours=0), tokens, context)
    assert left.kept()[0].tolist() == [0, 11]  # the outlier, and the extra token at the first of equals
    assert left.kept()[1].tolist() == [10, 11]  # no outlier: the most attended one


def test_neighbours_are_the_most_similar_keys_and_may_be_centres():
    features = torch.tensor([[1.0, 0], [0, 1], [2, 2], [4, 0]])
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1])
    keys = torch.tensor([[1.0, 0], [2.0, 0.1], [0, 1], [0, 3]])
    merged, extra = merge_neighbours(features, attention, keys, torch.tensor([0, 1]), torch.tensor([2, 3]), 1)
    torch.testing.assert_close(merged, torch.tensor([[1.0, 0.3], [0.4, 1.0]]))
    torch.testing.assert_close(extra, torch.tensor([0.8, 0.4]))
    # More neighbours than there are others: all of them
    merged, _ = merge_neighbours(features, attention, keys, torch.tensor([3]), torch.tensor([]).long(), 32)
    torch.testing.assert_close(merged, torch.tensor([[4 + 0.4 + 0.4, 0.3 + 0.4]]))


@pytest.mark.parametrize(
    ("total", "losing"), [(49, {1, 2, 4, 8, 16, 27, 32}), (100, {29, 57, 58}), (576, set()), (64, set())]
)
def test_the_official_count_loses_a_token_to_floating_point(total, losing):
    attention = torch.rand(total, generator=torch.Generator().manual_seed(0))
    lost = {
        count
        for count in range(1, total)
        if len(official_centres(attention, count / total, adaptive=True, plus=False)) == count - 1
    }
    assert lost == losing


def test_official_samples_worked_out_by_hand():
    attention = torch.zeros(576)
    attention[[3, 8, 100]] = torch.tensor([0.1, 0.3, 0.2])
    # floor(1 / (80 / 576)) = 7, a third of it is 2: 0, 2, .. 574 without those that are there already.
    top = official_centres(attention, 80 / 576, adaptive=True, plus=False)
    assert len(top) == 80 and top[:3].tolist() == [8, 100, 3]
    both = official_centres(attention, 80 / 576, adaptive=True, plus=True)
    assert both[:80].tolist() == top.tolist()
    assert both[80:].tolist() == [i for i in range(0, 575, 2) if i not in top.tolist()]
    # A third of 16 is 5: the last sample is 570, as 575 is not below 575.
    assert official_centres(attention, 36 / 576, adaptive=True, plus=True)[-1] == 570
    # Fixed share: floor(1 / .125) = 8 apart, from 4 on, as many as the others and with repetitions.
    both = official_centres(attention, 0.125, adaptive=False, plus=True)
    assert len(both) == 144 and both[72:].tolist() == list(range(4, 575, 8))
    assert 100 in both[:72] and 100 in both[72:]


def test_the_official_rest_lacks_as_many_low_tokens_as_there_are_repeated_centres():
    # What sorting the numbers with the centres' set to 0, and leaving out one per centre, comes to.
    for centres in ([5, 2, 2, 7], [0, 3, 3, 3], [1, 4], [6, 6]):
        numbers = [0 if i in centres else i for i in range(9)]
        assert others(torch.tensor(centres), 9, official=True).tolist() == sorted(numbers)[len(centres) :]
        assert others(torch.tensor(centres), 9).tolist() == [i for i in range(9) if i not in centres]


@pytest.mark.parametrize("plus", [False, True])
def test_a_fixed_share_is_met_and_holds_the_extra_token(plus):
    tokens, context = make([24])
    left = act(PruMerge(keep=0.5, adaptive=False, plus=plus), tokens, context)
    assert left.counts() == [12]
    assert sorted(left.size[0].tolist()) == [13.0] + [24.0] * 11  # 23 neighbours at most; 13 in the extra token
    assert PruMerge(keep=0.5, adaptive=False).budget == "exact"
    assert PruMerge(keep=0.5).budget == PruMerge(adaptive=False, variant="repo").budget == "adaptive"


def test_half_of_a_fixed_plus_budget_is_spread_over_the_image():
    tokens, context = make([30])
    context.received = torch.linspace(1, 2, 30)[None]
    left = act(PruMerge(keep=11, adaptive=False, plus=True), tokens, context)
    # 25 .. 29 are attended most, of the other 25 every fifth is sampled; the extra token is the best of the rest.
    assert left.kept()[0].tolist() == [0, 5, 10, 15, 20, 24, 25, 26, 27, 28, 29]


def test_the_repo_variant_has_official_counts_and_one_token_more():
    tokens, context = make([49])
    for keep, want in ((27 / 49, 26 + 1), (27, 26 + 1), (26, 26 + 1), (0.5, 24 + 1)):
        assert act(PruMerge(keep=keep, adaptive=False, variant="repo"), tokens, context).counts() == [want]
    # Samples that lie beyond the image do not exist, and no place is taken twice.
    left = act(PruMerge(keep=0.25, adaptive=False, plus=True, variant="repo"), tokens, context)
    top = context.received[0].argsort(descending=True)[:12].tolist()
    assert len(set(top) | set(range(2, 49, 4))) + 1 == left.counts()[0]
