"""ToMe's matching, merging and schedule against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.compressors import ToMe
from mmtoken.compressors.tome import bipartite_soft_matching, merge_weighted
from mmtoken.errors import InputError
from mmtoken.tokens import kept_count
from tests.compressors.batches import act, item, lengths, make


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def match(metric: torch.Tensor, r: int, cls: bool, distill: bool) -> tuple[list[int], list[int], list[int]]:
    """(unmerged, source, destination) of one row, as numbers among even and odd tokens, with loops."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    even, odd = range(0, len(metric), 2), range(1, len(metric), 2)
    r = min(r, (len(metric) - cls - distill) // 2)
    best: list[tuple[float, int]] = []
    for place, i in enumerate(even):
        found = [(float(unit[i] @ unit[j]), -n) for n, j in enumerate(odd) if not (distill and n == 0)]
        if cls and place == 0:
            found = []
        similarity, number = max(found, default=(-float("inf"), 0))
        best.append((similarity, -number))
    order = sorted(range(len(best)), key=lambda place: (-best[place][0], place))
    source, unmerged = order[:r], order[r:]
    return sorted(unmerged) if cls else unmerged, source, [best[place][1] for place in source]


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 3),
    length=st.integers(4, 21),
    r=st.integers(0, 14),
    cls=st.booleans(),
    distill=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_matching_and_merging_are_the_plain_loop(rows, length, r, cls, distill, seed):
    metric, values = random(rows, length, 6, seed=seed), random(rows, length, 4, seed=seed + 1)
    size = torch.randint(1, 5, (rows, length, 1), generator=torch.Generator().manual_seed(seed)).float()
    matching = bipartite_soft_matching(metric, r, class_token=cls, distill_token=distill)
    weighted, total = merge_weighted(matching, values, size)
    means, back = matching.merge(values, "mean"), matching.unmerge(weighted)
    for row in range(rows):
        unmerged, source, destination = match(metric[row], r, cls, distill)
        assert matching.unmerged[row].tolist() == unmerged
        assert matching.source[row].tolist() == source
        assert matching.destination[row].tolist() == destination
        groups = [[2 * i] for i in unmerged]
        odd = [
            [2 * n + 1, *(2 * i for i, to in zip(source, destination, strict=True) if to == n)]
            for n in range(length // 2)
        ]
        groups = [*groups[:1], *odd[:1], *groups[1:], *odd[1:]] if distill else [*groups, *odd]
        assert sorted(token for group in groups for token in group) == list(range(length))
        for place, group in enumerate(groups):
            weight = size[row, group].double()
            mean = (values[row, group].double() * weight).sum(0) / weight.sum()
            torch.testing.assert_close(weighted[row, place].double(), mean, rtol=1e-5, atol=1e-5)
            assert float(total[row, place]) == float(weight.sum())
            torch.testing.assert_close(means[row, place], values[row, group].mean(0), rtol=1e-5, atol=1e-5)
            for token in group:
                assert torch.equal(back[row, token], weighted[row, place])


def test_neither_cls_nor_the_distillation_token_ever_merges():
    metric = torch.ones(1, 10, 3)  # everything is alike
    matching = bipartite_soft_matching(metric, 99, class_token=True, distill_token=True)
    assert matching.source.tolist() == [[1, 2, 3, 4]] and 0 not in matching.destination
    assert matching.order()[0, :2].tolist() == [0, 1]


def test_r_is_capped_at_half_of_the_tokens_that_may_merge():
    for length, cls, distill, most in ((10, 0, 0, 5), (11, 0, 0, 5), (11, 1, 0, 5), (12, 1, 1, 5), (10, 1, 0, 4)):
        matching = bipartite_soft_matching(random(1, length, 3), 99, class_token=bool(cls), distill_token=bool(distill))
        assert matching.source.shape[1] == most


def test_nothing_to_merge_returns_every_token():
    for length in (1, 2, 7):
        matching = bipartite_soft_matching(random(2, length, 3), 0)
        values = random(2, length, 4)
        merged = matching.merge(values)
        assert merged.shape == values.shape and torch.equal(matching.unmerge(merged), values)


def test_a_negative_r_is_refused():
    with pytest.raises(InputError, match="r=-1 is negative"):
        bipartite_soft_matching(random(1, 4, 3), -1)


def test_keys_that_are_not_numbers_are_refused():
    metric = random(2, 6, 3)
    metric[1, 2, 0] = torch.nan
    with pytest.raises(InputError, match="metric contains NaN for item 1"):
        bipartite_soft_matching(metric, 1)


@given(total=st.integers(1, 800), depth=st.integers(1, 30), keep=st.one_of(st.integers(1, 800), st.floats(0.001, 1.0)))
def test_the_schedule_falls_evenly_never_asks_for_more_than_half_and_ends_at_the_budget(total, depth, keep):
    method, final = ToMe(keep=keep), kept_count(keep, total)
    targets = [total, *(method.target(total, layer, depth) for layer in range(depth))]
    assert targets[-1] == final and targets == sorted(targets, reverse=True)
    for layer in range(depth):  # what a block leaves can be halved down to the budget in the blocks that remain
        assert final <= targets[layer + 1] <= final * 2 ** (depth - 1 - layer)
    reachable = final * 2 ** (depth - 1)
    if reachable >= total - round((total - final) / depth):
        # Evenly as long as halving keeps up.
        assert abs((total - targets[1]) - (total - final) / depth) <= 1


def test_every_block_merges_the_same_number_the_first_and_the_last_one_too():
    assert [ToMe(keep=16).target(64, layer, 8) for layer in range(8)] == [58, 52, 46, 40, 34, 28, 22, 16]
    assert [ToMe(keep=4).target(64, layer, 4) for layer in range(4)] == [32, 16, 8, 4]  # by half, where more is asked


@settings(deadline=None, max_examples=30)
@given(sizes=lengths(24), seed=st.integers(0, 9999), keep=st.floats(0.02, 1.0), separators=st.booleans())
def test_sizes_add_up_and_every_feature_is_a_mean_of_what_went_in(sizes, seed, keep, separators):
    tokens, context = make(sizes, seed, separators=separators)
    left = act(ToMe(keep=keep), tokens, context)
    for row in range(len(sizes)):
        before, after = item(tokens, row), item(left, row)
        assert float(after["size"].sum()) == len(before["source"])
        weighted = (after["features"] * after["size"][:, None]).sum(0)
        torch.testing.assert_close(weighted, before["features"].sum(0), rtol=1e-4, atol=1e-4)


def test_the_most_similar_pair_merges_and_the_odd_one_keeps_its_place():
    tokens, context = make([6], 1)
    context.depth = 2
    context.keys[0] = torch.eye(6, 4)
    context.keys[0, 4] = context.keys[0, 1] + 0.1
    left = act(ToMe(keep=5), tokens, context)
    assert left.source[0].tolist() == [0, 1, 2, 3, 5] and left.size[0].tolist() == [1, 2, 1, 1, 1]
    torch.testing.assert_close(left.features[0, 1], tokens.features[0, [1, 4]].mean(0))
    assert torch.equal(left.features[0, [0, 2, 3, 4]], tokens.features[0, [0, 2, 3, 5]])


@pytest.mark.parametrize("depth", [1, 2])
def test_a_tower_of_few_blocks_reaches_any_budget(depth):
    tokens, context = make([24, 17], 2)
    context.depth = depth
    assert act(ToMe(keep=1), tokens, context).counts() == [1, 1]
