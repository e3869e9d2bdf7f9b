"""`keep` arithmetic, and that visual tokens never lose what must travel with them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken import MMTokenError
from mmtoken.errors import InputError, KeepError
from mmtoken.tokens import VisualTokens, check_keep, kept_count, refuse_nan, top_mask

FIELDS = ("features", "source", "size", "valid", "protected", "item")


def numbered(rows: int, length: int, width: int = 3, **facts) -> VisualTokens:
    """Tokens of which every number says where it comes from: features[b, n, d] = 100 b + n + d / 10."""
    b, n, d = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(width), indexing="ij")
    tokens = VisualTokens.from_features(100.0 * b + n + d / 10, **facts)
    return tokens.replace(size=tokens.source + 1.0 + 10 * torch.arange(rows)[:, None])


def same(a: VisualTokens, b: VisualTokens) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, msg=name)
    assert a.grid == b.grid


# ---------------------------------------------------------------------------------------------------------------- keep


@pytest.mark.parametrize("keep", [1, 64, 10**30, 1.0, 0.5, 1e-12, np.float64(0.25), Fraction(1, 2).__float__()])
def test_positive_counts_and_fractions_up_to_one_are_budgets(keep):
    assert check_keep(keep) == keep


@pytest.mark.parametrize(
    "keep",
    [
        *(0, -1, 0.0, -0.0, -0.5, 1.0000001, 64.0, 1e300, math.nan, math.inf, -math.inf, True, False),
        *("0.5", "64", b"64", None, [64], (0.5,), {"keep": 1}, 0.5j, Fraction(1, 2)),
        *(np.int64(64), np.float32(0.5), np.bool_(True), np.array(64), torch.tensor(64), torch.tensor(0.5)),
    ],
    ids=repr,
)
def test_anything_else_is_refused_by_name_and_value(keep):
    with pytest.raises(KeepError) as error:
        check_keep(keep, "budget")
    assert f"budget={keep!r}" in str(error.value)
    assert "fraction" in str(error.value) and "int" in str(error.value)
    assert isinstance(error.value, MMTokenError)


def test_a_float_above_one_is_told_the_count_that_was_meant():
    with pytest.raises(KeepError, match=r"keep=64\.0 .*\(keep=64\)"):
        check_keep(64.0)


@pytest.mark.parametrize(
    ("keep", "total", "steps", "count"),
    [
        (0.5, 5, 1, 3),  # halves go up
        (0.5, 7, 1, 4),
        (0.25, 10, 1, 3),
        (0.1, 4, 1, 1),  # never nothing
        (1e-9, 576, 1, 1),
        (1.0, 576, 1, 576),
        (0.999999, 576, 1, 576),
        (1 / 3, 576, 1, 192),
        (1 / 9, 576, 1, 64),
        (64, 576, 1, 64),
        (1, 576, 1, 1),
        (577, 576, 1, 576),  # more than there is
        (10**30, 576, 1, 576),
        (64, 2304, 4, 256),  # a count is per temporal step, pooled over the video
        (64, 200, 4, 200),
        (0.5, 2304, 4, 1152),  # a fraction knows no steps
        (0.5, 0, 1, 0),
        (64, 0, 4, 0),
    ],
)
def test_budgets_are_rounded_half_up_and_stay_within_what_there_is(keep, total, steps, count):
    assert kept_count(keep, total, steps) == count


@given(st.floats(min_value=1e-6, max_value=1.0), st.integers(1, 5000), st.integers(1, 16))
def test_a_fraction_keeps_the_nearest_whole_number_of_at_least_one(keep, total, steps):
    count = kept_count(keep, total, steps)
    assert 1 <= count <= total
    assert count == 1 or abs(count - keep * total) <= 0.5


@given(st.integers(1, 10_000), st.integers(1, 5000), st.integers(1, 16))
def test_a_count_is_met_exactly_where_there_are_enough_tokens(keep, total, steps):
    assert kept_count(keep, total, steps) == min(total, keep * steps)


@given(st.floats(min_value=1e-3, max_value=0.999), st.floats(min_value=1e-3, max_value=0.999), st.integers(1, 3000))
def test_a_larger_fraction_never_keeps_fewer(a, b, total):
    assert kept_count(min(a, b), total) <= kept_count(max(a, b), total)


# ------------------------------------------------------------------------------------------------------------- tokens


def test_new_tokens_are_in_original_order_and_stand_for_themselves():
    tokens = VisualTokens.from_features(torch.randn(2, 6, 3), grid=((1, 2, 3), None))
    assert tokens.source.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert bool((tokens.size == 1).all() and tokens.valid.all() and not tokens.protected.any())
    assert tokens.item.eq(0).all() and tokens.steps == (1, 1) and len(tokens) == 2


def test_a_video_token_knows_its_frame_and_separators_do_not_shift_it():
    # Three frames of 1 x 2 tokens, a separator behind each.
    protected = torch.tensor([[False, False, True] * 3])
    tokens = VisualTokens.from_features(torch.zeros(1, 9, 1), protected=protected, grid=((3, 1, 2),))
    assert tokens.item[0, ~protected[0]].tolist() == [0, 0, 1, 1, 2, 2]
    assert tokens.steps == (3,) and tokens.counts() == [6] and tokens.budget(1) == [3]


def test_features_without_an_item_dimension_are_refused_with_their_shape():
    with pytest.raises(InputError, match=r"\(6, 3\).*\[items, tokens, width\]"):
        VisualTokens.from_features(torch.zeros(6, 3))


def test_taking_tokens_takes_everything_that_belongs_to_them():
    tokens = numbered(2, 5, protected=torch.tensor([[0, 0, 0, 0, 1]] * 2).bool(), grid=((5, 1, 1), (1, 1, 5)))
    index = torch.tensor([[4, 0, 2], [1, 1, 3]])
    taken = tokens.take(index)
    for row in range(2):
        for place, origin in enumerate(index[row].tolist()):
            for name in FIELDS:
                assert torch.equal(getattr(taken, name)[row, place], getattr(tokens, name)[row, origin]), name
    assert taken.grid == tokens.grid


def test_taking_with_a_mask_marks_padding_and_cannot_revive_it():
    tokens = numbered(1, 3, valid=torch.tensor([[True, True, False]]))
    taken = tokens.take(torch.tensor([[0, 1, 2]]), torch.tensor([[True, False, True]]))
    assert taken.valid.tolist() == [[True, False, False]]


@pytest.mark.parametrize("index", [torch.tensor([0, 1]), torch.zeros(3, 2, dtype=torch.long)])
def test_an_index_of_another_shape_is_refused(index):
    with pytest.raises(InputError, match=r"index has shape .*expected \[2, kept\]"):
        numbered(2, 4).take(index)


def test_an_index_beyond_the_tokens_raises_and_reads_nothing():
    with pytest.raises(RuntimeError, match="out of bounds"):
        numbered(1, 4).take(torch.tensor([[4]]))


def test_choosing_by_mask_keeps_order_and_pads_shorter_rows_on_the_right():
    tokens = numbered(2, 4)
    left = tokens.where(torch.tensor([[True, False, True, True], [False, True, False, False]]))
    assert left.valid.tolist() == [[True, True, True], [True, False, False]]
    assert [kept.tolist() for kept in left.kept()] == [[0, 2, 3], [1]]
    assert left.features[0, :, 0].tolist() == [0.0, 2.0, 3.0] and float(left.features[1, 0, 0]) == 101.0


def test_choosing_all_is_the_same_tokens_and_choosing_none_leaves_empty_rows():
    tokens = numbered(2, 4)
    same(tokens.where(torch.ones(2, 4, dtype=torch.bool)), tokens)
    nothing = tokens.where(torch.zeros(2, 4, dtype=torch.bool))
    assert nothing.features.shape == (2, 0, 3) and nothing.counts() == [0, 0]


def test_choosing_never_brings_padding_back():
    tokens = numbered(1, 4, valid=torch.tensor([[True, True, False, False]]))
    assert tokens.where(torch.ones(1, 4, dtype=torch.bool)).source[0].tolist() == [0, 1]


def test_a_row_by_itself_is_that_row():
    tokens = numbered(3, 4, grid=((1, 2, 2), None, (4, 1, 1)))
    row = tokens.row(2)
    assert len(row) == 1 and row.grid == ((4, 1, 1),)
    for name in FIELDS:
        assert torch.equal(getattr(row, name)[0], getattr(tokens, name)[2])


def test_values_per_item_leave_out_padding_and_separators():
    tokens = numbered(
        1, 4, valid=torch.tensor([[True, True, True, False]]), protected=torch.tensor([[False, True, False, False]])
    )
    (values,) = tokens.per_item(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert values.tolist() == [1.0, 3.0]


def test_no_items_at_all_pass_through():
    empty = VisualTokens.from_features(torch.zeros(0, 4, 2))
    assert empty.where(empty.valid).features.shape[0] == 0 and empty.counts() == [] and empty.budget(0.5) == []


# --------------------------------------------------------------------------------------------------------------- top-k


def test_the_best_scores_are_kept_in_original_order_with_all_separators():
    tokens = numbered(1, 5, protected=torch.tensor([[False, False, False, False, True]]))
    left = tokens.top(torch.tensor([[0.1, 0.9, 0.3, 0.8, -9.0]]), 2)
    assert left.source[0].tolist() == [1, 3, 4] and left.counts() == [2]


def test_ties_go_to_the_lower_index():
    tokens = numbered(2, 6)
    scores = torch.tensor([[1.0] * 6, [0.0, 2.0, 1.0, 1.0, 1.0, 2.0]])
    assert [kept.tolist() for kept in tokens.top(scores, 3).kept()] == [[0, 1, 2], [1, 2, 5]]
    # Long enough that an unstable sort would show.
    many = numbered(1, 3000)
    assert many.top(torch.zeros(1, 3000), 100).source[0].tolist() == list(range(100))


def test_counts_may_differ_per_item():
    left = numbered(3, 4).top(torch.arange(12.0).view(3, 4), [1, 0, 9])
    assert [kept.tolist() for kept in left.kept()] == [[3], [], [0, 1, 2, 3]]


def test_minus_infinity_is_a_score_and_the_budget_stays_exact():
    left = numbered(1, 4).top(torch.tensor([[-math.inf, 1.0, -math.inf, math.inf]]), 3)
    assert left.source[0].tolist() == [0, 1, 3]


def test_a_score_that_is_not_a_number_is_refused_with_its_item():
    scores = torch.zeros(2, 3)
    scores[1, 2] = math.nan
    with pytest.raises(InputError, match="scores contains NaN for item 1"):
        numbered(2, 3).top(scores, 1)


def test_not_a_number_at_padding_and_separators_does_no_harm():
    tokens = numbered(
        1, 4, valid=torch.tensor([[True, True, True, False]]), protected=torch.tensor([[True, False, False, False]])
    )
    left = tokens.top(torch.tensor([[math.nan, 1.0, 2.0, math.nan]]), 1)
    assert left.source[0].tolist() == [0, 2]


def test_scores_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(InputError, match=r"\(2, 2\).*\(2, 3\)"):
        numbered(2, 3).top(torch.zeros(2, 2), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_float_type_are_ranked(dtype):
    scores = torch.tensor([[3, 1, 2, 4]], dtype=dtype, requires_grad=True)
    assert numbered(1, 4).top(scores, 2).source[0].tolist() == [0, 3]


def test_features_with_a_single_nan_are_found_only_where_they_count():
    values, eligible = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    values[1, 2, 3] = math.nan
    with pytest.raises(InputError, match="keys contains NaN for item 1"):
        refuse_nan(values, eligible, "keys")
    eligible[1, 2] = False
    refuse_nan(values, eligible, "keys")


@st.composite
def batches(draw):
    """(scores, valid, protected, keep): ragged rows with separators, scores from few values so that many are equal."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    valid = torch.arange(length) < lengths
    protected = (torch.rand(rows, length, generator=generator) < 0.2) & valid
    scores = torch.randint(0, 4, (rows, length), generator=generator).float()
    keep = draw(st.one_of(st.integers(1, 14), st.floats(0.01, 1.0)))
    return scores, valid, protected, keep


@settings(deadline=None)
@given(batches())
def test_top_is_a_plain_sort_per_row(batch):
    scores, valid, protected, keep = batch
    tokens = numbered(*scores.shape, valid=valid, protected=protected)
    left = tokens.top(scores, keep)
    assert left.counts() == tokens.budget(keep)
    for row in range(len(tokens)):
        eligible = [i for i in range(scores.shape[1]) if valid[row, i] and not protected[row, i]]
        best = sorted(eligible, key=lambda i: (-float(scores[row, i]), i))[: kept_count(keep, len(eligible))]
        assert left.kept()[row].tolist() == sorted(best)
        everything = left.source[row, left.valid[row]].tolist()
        assert everything == sorted([*best, *protected[row].nonzero()[:, 0].tolist()])


@settings(deadline=None)
@given(batches())
def test_a_row_in_a_batch_is_chosen_as_it_is_alone(batch):
    scores, valid, protected, keep = batch
    tokens = numbered(*scores.shape, valid=valid, protected=protected)
    together = tokens.top(scores, keep)
    for row in range(len(tokens)):
        alone = tokens.row(row).top(scores[row : row + 1], keep)
        real = together.valid[row]
        for name in FIELDS:
            assert torch.equal(getattr(together, name)[row, real], getattr(alone, name)[0, alone.valid[0]]), name


@settings(deadline=None)
@given(batches())
def test_the_mask_holds_the_smaller_of_count_and_eligible(batch):
    scores, valid, protected, _ = batch
    eligible = valid & ~protected
    mask = top_mask(scores, [3] * len(scores), eligible)
    assert mask.sum(-1).tolist() == [min(3, n) for n in eligible.sum(-1).tolist()]
    assert not bool((mask & ~eligible).any())
