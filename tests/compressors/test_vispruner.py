"""VisPruner against a case worked out by hand and a plain loop over its definition."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import VisPruner
from mmtoken.compressors.vispruner import remove_similar, salient_and_diverse
from tests.compressors.batches import act, lengths, make

FEATURES = torch.tensor(
    [[1, 0], [0, 1], [1, 1], [1, 0.1], [0.1, 1], [1, 0], [-1, 0], [0, -1]],
)
ATTENTION = torch.tensor([0.30, 0.05, 0.20, 0.10, 0.08, 0.12, 0.09, 0.06])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (float(a.norm()) * float(b.norm()))


def plain(features: Tensor, attention: Tensor, count: int, share: float, step: int) -> tuple[list[int], float]:
    """Kept tokens by loops in double precision, and how far any decision was from another."""
    features, gap = features.double(), math.inf
    order = sorted(range(len(features)), key=lambda i: (-float(attention[i]), i))
    salient, rest = order[: int(count * share)], order[int(count * share) :]
    diverse = count - len(salient)
    if not diverse:
        rest = []
    while len(rest) > diverse:
        first = [token for place, token in enumerate(rest) if place % 2 == 0]
        second = [token for place, token in enumerate(rest) if place % 2 == 1]
        nearest = {i: max(cosine(features[i], features[j]) for j in second) for i in first}
        ranked = sorted(first, key=lambda i: (-nearest[i], i))
        gap = min([gap, *(nearest[a] - nearest[b] for a, b in itertools.pairwise(ranked))])
        rest = ranked[min(step, len(rest) - diverse, len(first)) :] + second
    return sorted(salient + rest), gap


def test_a_small_case_worked_out_by_hand():
    # Important: 0, 2. The others by attention: 5 3 6 4 7 1. Of 5, 6, 7 against 3, 4, 1 the nearest are .995, 0, -.0995:
    # 5 and 6 go. Of 7, 4 against 3, 1 they are -.0995, .995: both go.
    assert remove_similar(FEATURES, torch.tensor([5, 3, 6, 4, 7, 1]), 4, step=2).tolist() == [7, 3, 4, 1]
    assert remove_similar(FEATURES, torch.tensor([5, 3, 6, 4, 7, 1]), 2, step=2).tolist() == [3, 1]
    assert salient_and_diverse(FEATURES, ATTENTION, 4, step=2).tolist() == [0, 2, 3, 1]


def test_the_last_round_removes_no_more_than_is_asked_for():
    order = torch.tensor([5, 3, 6, 4, 7, 1])
    # Only 5 of 5, 6, 7 goes; what is left of them stands in front, the most similar first.
    assert remove_similar(FEATURES, order, 5, step=8).tolist() == [6, 7, 3, 4, 1]
    assert remove_similar(FEATURES, order, 6).tolist() == order.tolist()
    assert remove_similar(FEATURES, order, 0).tolist() == []


def test_of_an_odd_number_the_first_half_has_one_more():
    # 5, 6, 7 against 3, 4: all three may go, with one step of 8.
    assert sorted(remove_similar(FEATURES, torch.tensor([5, 3, 6, 4, 7]), 2).tolist()) == [3, 4]
    # A single token beside what stays cannot be compared with more than that.
    assert remove_similar(FEATURES, torch.tensor([5, 3]), 1).tolist() == [3]


def test_of_equally_similar_tokens_the_lower_index_goes():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert remove_similar(features, torch.tensor([2, 0, 1, 3]), 3).tolist() == [2, 0, 3]


@settings(deadline=None, max_examples=60)
@given(
    sizes=lengths(40),
    seed=st.integers(0, 9999),
    keep=st.floats(0.05, 1.0),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    step=st.integers(1, 9),
    separators=st.booleans(),
)
def test_selection_is_the_plain_loop(sizes, seed, keep, share, step, separators):
    tokens, context = make(sizes, seed, separators=separators)
    left = act(VisPruner(keep=keep, important=share, step=step), tokens, context)
    for row, budget in enumerate(tokens.budget(keep)):
        where = tokens.eligible[row].nonzero()[:, 0]
        kept, gap = plain(tokens.features[row, where], context.received[row, where], budget, share, step)
        if gap > 1e-5:
            assert left.kept()[row].tolist() == where[kept].tolist()


def test_the_plain_loop_mostly_has_a_clear_decision():
    gaps = []
    for seed in range(20):
        tokens, context = make([30], seed)
        gaps.append(plain(tokens.features[0], context.received[0], 12, 0.5, 8)[1])
    assert sum(gap > 1e-5 for gap in gaps) >= 18


def test_tiles_of_similarities_do_not_show():
    features = torch.randn(1200, 6, generator=torch.Generator().manual_seed(0))
    order = torch.arange(1200)
    unit = torch.nn.functional.normalize(features, dim=-1)
    first, second = order[::2], order[1::2]
    nearest = (unit[first] @ unit[second].T).amax(-1)
    gone = first[nearest.argsort(descending=True, stable=True)[:8]]
    assert set(order.tolist()) - set(remove_similar(features, order, 1192).tolist()) == set(gone.tolist())
