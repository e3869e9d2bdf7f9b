"""VisionZip against a plain loop over its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.compressors import VisionZip
from mmtoken.compressors.visionzip import assign_to_anchors, merge_into_anchors
from tests.compressors.batches import act, item, lengths, make


def zipped(features, scores, keys, dominant: int, contextual: int) -> dict[int, tuple[list[float], int]]:
    """By original index (feature, number of tokens it stands for), with loops in double precision."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    first = sorted(order[:dominant])
    rest = [i for i in range(len(scores)) if i not in first]
    contextual = min(contextual, len(rest))
    step = len(rest) // contextual if contextual else 0
    anchors = [rest[k * step] for k in range(contextual)]
    members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    for i in rest:
        if anchors and i not in anchors:
            members[max(anchors, key=lambda a: (round(float(unit[i] @ unit[a]), 12), -a))].append(i)
    result = {i: (features[i].double().tolist(), 1) for i in first}
    for anchor in anchors:
        feature = features[anchor].double()
        if members[anchor]:
            feature = feature + features[members[anchor]].double().mean(0)
        result[anchor] = (feature.tolist(), 1 + len(members[anchor]))
    return result


@settings(deadline=None, max_examples=40)
@given(
    sizes=lengths(24),
    seed=st.integers(0, 9999),
    keep=st.one_of(st.integers(1, 26), st.floats(0.05, 1.0)),
    contextual=st.one_of(st.none(), st.integers(0, 8)),
    separators=st.booleans(),
)
def test_selection_and_merging_are_the_plain_loop(sizes, seed, keep, contextual, separators):
    tokens, context = make(sizes, seed, separators=separators)
    method = VisionZip(keep=keep, contextual=contextual)
    left = act(method, tokens, context)
    for row, budget in enumerate(tokens.budget(keep)):
        where = tokens.eligible[row].nonzero()[:, 0]
        parts = (values[row, where] for values in (tokens.features, context.received, context.keys))
        expected = zipped(*parts, *method.split(budget, cls=False))
        found = item(left, row)
        plain = ~found["protected"]
        assert found["source"][plain].tolist() == where[sorted(expected)].tolist()
        values = torch.tensor([expected[i][0] for i in sorted(expected)]).view(-1, tokens.features.shape[-1])
        torch.testing.assert_close(found["features"][plain], values.float(), rtol=1e-5, atol=1e-5)
        assert found["size"][plain].tolist() == [expected[i][1] for i in sorted(expected)]


@pytest.mark.parametrize(
    ("budget", "cls", "contextual", "split"),
    [
        (64, False, None, (54, 10)),  # the paper's
        (128, False, None, (108, 20)),
        (192, False, None, (162, 30)),
        (6, False, None, (5, 1)),  # rounded, not cut off
        (3, False, None, (3, 0)),
        (64, True, None, (53, 10)),  # CLS counts as one of the dominant ones
        (13, True, 4, (8, 4)),
        (1, False, None, (1, 0)),
        (1, True, None, (0, 0)),
        (2, True, None, (1, 0)),
        (5, False, 9, (1, 4)),  # one dominant token at least
        (0, False, None, (0, 0)),
        (9, False, 0, (9, 0)),
    ],
)
def test_budgets_are_split_as_in_the_paper(budget, cls, contextual, split):
    assert VisionZip(keep=0.5, contextual=contextual).split(budget, cls) == split


@given(st.integers(0, 600), st.booleans(), st.one_of(st.none(), st.integers(0, 600)))
def test_both_shares_and_cls_add_up_to_the_budget(budget, cls, contextual):
    dominant, merged = VisionZip(contextual=contextual).split(budget, cls and budget > 0)
    assert dominant + merged + int(cls and budget > 0) == budget and dominant >= 0 and merged >= 0


def test_anchors_are_the_first_at_regular_steps_and_equal_ones_share_no_members():
    keys = torch.tensor([[1.0, 0.0]] * 7)
    anchors, members, owner = assign_to_anchors(keys, 3)
    assert anchors.tolist() == [0, 2, 4] and members.tolist() == [1, 3, 5, 6]
    assert owner.tolist() == [0, 0, 0, 0]  # ties go to the lower anchor


def test_an_anchor_without_members_stays_the_same_to_the_bit():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.1]])
    anchors, members, owner = assign_to_anchors(keys, 2)
    assert anchors.tolist() == [0, 2] and owner.tolist() == [0, 0]
    merged, size = merge_into_anchors(features, torch.ones(4), anchors, members, owner)
    assert torch.equal(merged[1], features[2]) and size.tolist() == [3.0, 1.0]


def test_no_anchors_and_more_anchors_than_tokens():
    assert [len(part) for part in assign_to_anchors(torch.ones(5, 2), 0)] == [0, 0, 0]
    assert [len(part) for part in assign_to_anchors(torch.ones(3, 2), 9)] == [3, 0, 0]
    assert [len(part) for part in assign_to_anchors(torch.ones(0, 2), 9)] == [0, 0, 0]


def test_means_of_many_half_precision_members_lose_no_digits():
    features = torch.full((2001, 1), 1.001, dtype=torch.bfloat16)
    members = torch.arange(1, 2001)
    merged, size = merge_into_anchors(
        features, torch.ones(2001), torch.tensor([0]), members, torch.zeros(2000, dtype=torch.long)
    )
    assert float(merged) == 2 * float(features[0]) and size.tolist() == [2001.0]


def test_the_official_variant_puts_cls_first_within_the_budget_at_a_free_position():
    tokens, context = make([12, 12], 3)
    left = act(VisionZip(keep=6, contextual=2, variant="repo"), tokens, context)
    assert left.counts() == [6, 6] and torch.equal(left.features[:, 0], context.cls)
    for row in range(2):
        used = left.source[row].tolist()
        assert len(set(used)) == 6 and used[0] == min(set(range(12)) - set(used[1:]))


@pytest.mark.parametrize("keep", [1, 2, 12, 1.0])
def test_cls_finds_a_place_at_any_budget(keep):
    tokens, context = make([12], 4)
    left = act(VisionZip(keep=keep, variant="repo"), tokens, context)
    assert left.counts() == tokens.budget(keep) and len(set(left.source[0].tolist())) == left.counts()[0]


def test_cls_finds_a_free_place_in_rows_of_different_length():
    tokens, context = make([9, 4], 5)
    # Token 0 is dominant in the short row, whose padding points at position 0.
    context.received[1, 0] = 2.0
    left = act(VisionZip(keep=0.5, contextual=0, variant="repo"), tokens, context)
    assert 0 in left.source[1, 1:2].tolist() and int(left.source[1, 0]) != 0


def test_behind_a_projector_that_resamples_there_is_no_cls():
    tokens, context = make([12], 6)
    context.tokenwise_projector = False
    left = act(VisionZip(keep=6, variant="repo"), tokens, context)
    assert left.counts() == [6] and bool(left.features[0].isfinite().all())
    same = act(VisionZip(keep=6), tokens, context)
    assert torch.equal(left.source, same.source)


def test_projection_happens_once_and_after_merging_where_patches_are_mapped_one_by_one():
    tokens, context = make([12], 7)
    seen = []

    def project(some):
        seen.append(some.features.shape[1])
        return some.replace(features=2 * some.features)

    VisionZip(keep=6).project(tokens, project, context)
    context.tokenwise_projector = False
    VisionZip(keep=6).project(tokens, project, context)
    assert seen == [6, 12]
