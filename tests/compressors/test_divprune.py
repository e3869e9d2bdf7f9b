"""DivPrune against a plain loop over its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.compressors import DivPrune
from mmtoken.compressors.divprune import maxmin_mask
from mmtoken.kernels.maxmin_select import reference as maxmin_select
from mmtoken.kernels.similarity_stats import reference as similarity_stats
from mmtoken.tokens import VisualTokens
from tests.compressors.batches import act, lengths, make


def greedy(features: torch.Tensor, count: int) -> list[int]:
    """Max-min diversity with a loop: farthest from its nearest neighbour first, then farthest from the chosen ones."""
    unit = torch.stack([row / max(float(row.norm()), 1e-12) for row in features.double()])
    distance = [[1 - float(a @ b) for b in unit] for a in unit]
    everyone = range(len(features))
    chosen: list[int] = []
    while len(chosen) < count:
        best, farthest = -1, -1.0
        for i in everyone:
            if i in chosen:
                continue
            others = chosen or [j for j in everyone if j != i]
            nearest = min((distance[i][j] for j in others), default=2.0)
            if nearest > farthest + 1e-9:
                best, farthest = i, nearest
        chosen.append(best)
    return sorted(chosen)


def select(features: torch.Tensor, count: int) -> list[int]:
    (picked,) = maxmin_mask(features[None], [count], torch.ones(1, len(features), dtype=torch.bool))
    return picked.nonzero()[:, 0].tolist()


def test_a_small_case_worked_out_by_hand():
    # Distances to the nearest other: .2, .04, .2, 1, .04. Token 3 is the most isolated, 0 the farthest from it, then 2.
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    assert [select(features, count) for count in (1, 2, 3)] == [[3], [0, 3], [0, 2, 3]]


@settings(deadline=None, max_examples=40)
@given(sizes=lengths(20), seed=st.integers(0, 9999), keep=st.floats(0.05, 1.0), separators=st.booleans())
def test_selection_is_the_plain_loop(sizes, seed, keep, separators):
    tokens, context = make(sizes, seed, separators=separators)
    left = act(DivPrune(keep=keep), tokens, context)
    for row, budget in enumerate(tokens.budget(keep)):
        where = tokens.eligible[row].nonzero()[:, 0]
        expected = where[greedy(tokens.features[row, where], budget)] if budget else where
        assert left.kept()[row].tolist() == expected.tolist()


def test_length_of_a_vector_does_not_matter_but_its_direction_does():
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    scaled = features * torch.linspace(0.1, 50, 12)[:, None]
    assert select(scaled, 5) == select(features, 5)


def test_duplicates_do_not_use_up_the_budget():
    features = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    assert select(features, 2) == [0, 4]
    assert len(select(features, 6)) == 6 and len(select(features, 8)) == 8


def test_equal_tokens_are_taken_from_the_lowest_index():
    assert select(torch.ones(6, 3), 3) == [0, 1, 2]


def test_of_two_mutual_neighbours_the_lower_index_is_taken_whatever_rounding_says():
    features = torch.randn(300, 11, 29, generator=torch.Generator().manual_seed(4))
    eligible = torch.zeros(300, 11, dtype=torch.bool)
    eligible[:, [2, 9]] = True  # each is the other's nearest, at the very same distance
    assert maxmin_mask(features, [1] * 300, eligible).nonzero()[:, 1].tolist() == [2] * 300


def test_tiles_change_nothing(monkeypatch):
    features = torch.randn(3, 23, 6, generator=torch.Generator().manual_seed(5))
    eligible = torch.rand(3, 23, generator=torch.Generator().manual_seed(6)) > 0.2
    whole = maxmin_mask(features, [4, 7, 9], eligible)
    monkeypatch.setattr(similarity_stats, "TILE", 4)
    monkeypatch.setattr(maxmin_select, "WHOLE", 0)
    assert torch.equal(maxmin_mask(features, [4, 7, 9], eligible), whole)
    for row, count in enumerate((4, 7, 9)):
        where = eligible[row].nonzero()[:, 0]
        assert whole[row].nonzero()[:, 0].tolist() == where[greedy(features[row, where], count)].tolist()


def test_mutual_neighbours_in_different_tiles_are_at_the_same_distance(monkeypatch):
    monkeypatch.setattr(similarity_stats, "TILE", 3)
    monkeypatch.setattr(maxmin_select, "WHOLE", 0)
    test_of_two_mutual_neighbours_the_lower_index_is_taken_whatever_rounding_says()


def test_vectors_of_zeros_are_as_far_from_all_as_can_be_without_being_opposite():
    features = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.99, 0.01]])
    assert select(features, 1) == [1]  # distance 1 to both; the others are next to each other
    assert select(torch.zeros(3, 2), 2) == [0, 1]


def test_a_single_token_is_kept():
    assert select(torch.ones(1, 3), 1) == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert select(features, 11) == greedy(features.float(), 11)


def test_the_default_budget_is_the_papers():
    tokens = VisualTokens.from_features(torch.randn(1, 576, 4, generator=torch.Generator().manual_seed(3)))
    assert tokens.budget(DivPrune().keep) == [56]
