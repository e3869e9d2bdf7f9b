"""QuoTA's sampler, budget and assigners: its paper's numbers, plain loops over the definitions, and properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors.framebudget import (
    ON_GRID,
    assign_tokens,
    capped_shares,
    frame_budgets,
    frame_grid,
    frame_shares,
    linspace_places,
    merged,
    sampled_count,
    sampled_frames,
)
from mmtoken.errors import InputError, MMTokenError

N = 12544


def budgets(scores: list[float], budget: int = N) -> list[int]:
    return frame_budgets(frame_shares(torch.tensor(scores, dtype=torch.float64)), budget)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- the paper's numbers


def test_three_frames_of_the_paper():
    assert budgets([0.9, 0.1, 0.5]) == [9495, 117, 2930]
    assert [frame_grid(n) for n in (9495, 117, 2930)] == [(97, 97), (11, 10), (54, 54)]


@pytest.mark.parametrize(
    ("frames", "tokens", "grid"),
    [(64, 196, (14, 14)), (96, 130, (11, 11)), (106, 118, (11, 10)), (128, 98, (10, 9)), (160, 78, (9, 8))],
)
@pytest.mark.parametrize("score", [0.37, 1.0, 1e-6, 0.1])
def test_equal_scores_share_the_budget_alike(frames, tokens, grid, score):
    assert budgets([score] * frames) == [tokens] * frames
    assert frame_grid(tokens) == grid


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (1, (1, 1)),
        (2, (2, 1)),
        (3, (2, 1)),
        (4, (2, 2)),
        (5, (2, 2)),
        (6, (3, 2)),
        (729, (27, 27)),
        (730, (27, 27)),
    ],
)
def test_grids_of_a_budget(tokens, grid):
    assert frame_grid(tokens) == grid


@pytest.mark.parametrize(("seconds", "count"), [(30, 96), (600, 106), (1800, 128), (3600, 160), (5400, 192), (0, 96)])
def test_frames_to_sample_grow_with_the_length(seconds, count):
    assert sampled_count(seconds) == count


def test_sampled_frames_run_from_the_first_to_the_last_and_repeat_in_short_videos():
    assert sampled_frames(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert sampled_frames(10, 4).tolist() == [0, 3, 6, 9]
    assert sampled_frames(3, 5).tolist() == [0, 0, 1, 1, 2]
    assert sampled_frames(50, 1).tolist() == [0]
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="seconds="):
            sampled_count(seconds)
    for total, count in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match=f"total={total} frames and count={count}"):
            sampled_frames(total, count)


def test_the_cap_of_the_paper_loses_what_it_cannot_place():
    shares = torch.tensor([0.5] + [0.025] * 20, dtype=torch.float64)
    capped = capped_shares(shares, 0.058115)
    assert float(capped[0]) == pytest.approx(0.058115, abs=1e-9)
    assert capped[1:].tolist() == pytest.approx([0.044794] * 20, abs=1e-6)
    assert float(capped.sum()) == pytest.approx(0.953987, abs=1e-5)


def test_bilinear_reads_at_half_pixel_centres():
    assert torch.allclose(assign_tokens(torch.full((27, 27, 3), 2.5), 196), torch.full((14, 14, 3), 2.5))
    ramp = torch.arange(27.0)
    down = assign_tokens(ramp[:, None, None].expand(27, 27, 1), 196)[:, 0, 0]
    assert [float(down[i]) for i in (0, 1, 13)] == pytest.approx([0.464286, 2.392857, 25.535714], abs=1e-5)
    across = assign_tokens(ramp[None, :, None].expand(27, 27, 1), 196)[0, :, 0]
    assert torch.allclose(down, across)


# ----------------------------------------------------------------------------------------------------------- properties


score_lists = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@settings(deadline=None, max_examples=150)
@given(scores=score_lists, budget=st.integers(1, 2000), power=st.floats(0, 4), cap=st.floats(0.01, 1.5))
def test_a_budget_is_never_exceeded_and_never_left_empty(scores, budget, power, cap):
    shares = frame_shares(torch.tensor(scores, dtype=torch.float64), power)
    for some in (shares, capped_shares(shares, cap)):
        counts = frame_budgets(some, budget)
        assert len(counts) == len(scores) and min(counts) >= 0
        assert 1 <= sum(counts) <= budget
        assert all(math.prod(frame_grid(n)) <= n for n in counts if n)
        assert sum(math.prod(frame_grid(n)) for n in counts if n) <= sum(counts)
    assert float(capped_shares(shares, cap).max()) <= cap


@settings(deadline=None, max_examples=100)
@given(scores=score_lists, budget=st.integers(1, 2000), cap=st.one_of(st.none(), st.floats(0.05, 1.0)))
def test_a_frame_with_a_higher_score_gets_no_fewer_tokens(scores, budget, cap):
    shares = frame_shares(torch.tensor(scores, dtype=torch.float64))
    counts = frame_budgets(shares, budget)
    for score, count in zip(scores, counts, strict=True):
        for other, others in zip(scores, counts, strict=True):
            if score > other and any(n > 1 for n in counts):
                assert count >= others


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(st.floats(0.001, 1), min_size=1, max_size=20),
    factor=st.floats(1e-3, 1e3),
    budget=st.integers(1, 3000),
)
def test_a_common_factor_changes_nothing(scores, factor, budget):
    given_, scaled = (torch.tensor(values, dtype=torch.float64) for values in (scores, [s * factor for s in scores]))
    assert torch.allclose(frame_shares(given_), frame_shares(scaled), rtol=1e-12, atol=0)
    exact = frame_shares(given_) * budget
    if bool((exact - (exact + 1e-6).floor()).gt(1e-9).all()):
        assert frame_budgets(frame_shares(given_), budget) == frame_budgets(frame_shares(scaled), budget)


def test_scores_too_small_to_square_still_count():
    assert budgets([1e-170, 2e-170], 10) == [2, 8]


def test_a_share_that_rounding_leaves_a_hair_short_is_whole():
    assert 98 * (1 / 49) < 2
    assert budgets([0.5] * 49, 98) == [2] * 49


def test_all_zero_scores_share_alike():
    assert budgets([0.0] * 4, 18) == [4, 4, 4, 4]
    assert frame_shares(torch.zeros(3)).tolist() == pytest.approx([1 / 3] * 3)


def test_where_every_share_is_below_one_token_the_best_frames_get_one_each():
    assert budgets([0.2, 0.3, 0.3, 0.1], 2) == [0, 1, 1, 0]
    assert budgets([0.5] * 8, 3) == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_scores_that_are_no_scores_are_refused(bad):
    with pytest.raises(InputError, match=r"scores\[1\]="):
        frame_shares(torch.tensor([0.5, bad]))
    for shape in ((0,), (2, 2)):
        with pytest.raises(InputError, match="scores has shape"):
            frame_shares(torch.zeros(shape))


# -------------------------------------------------------------------------------------------------------- plain loops


def plain_cap(shares: list[float], most: float) -> list[float]:
    """One pass, in order, with the excess growing as frames overshoot."""
    after = [w if w < most else most for w in shares]
    denominator, excess = sum(after), sum(w - most for w in shares if w > most)
    for t in range(len(shares)):
        if shares[t] < most:
            after[t] = shares[t] + excess * shares[t] / denominator
            if after[t] > most:
                excess += after[t] - most
                after[t] = most
    return after


@settings(deadline=None, max_examples=150)
@given(scores=st.lists(st.floats(0.01, 1), min_size=1, max_size=12), most=st.floats(0.02, 1.2))
def test_capping_is_the_plain_loop(scores, most):
    shares = frame_shares(torch.tensor(scores, dtype=torch.float64))
    assert capped_shares(shares, most).tolist() == pytest.approx(plain_cap(shares.tolist(), most), abs=1e-12)


def test_what_a_frame_overshoots_reaches_later_frames_only():
    # Cap .4: .5 is cut by .1 of a sum of .9. The second grows by .1 * .38 / .9 to .42, and is cut by .0222, which the
    # third gets a share of, and the frame before it does not.
    first, over, second, last = capped_shares(torch.tensor([0.06, 0.5, 0.38, 0.06], dtype=torch.float64), 0.4).tolist()
    assert over == second == 0.4
    assert first == pytest.approx(0.06 + 0.1 * 0.06 / 0.9)
    assert last == pytest.approx(0.06 + (0.1 + 0.38 + 0.1 * 0.38 / 0.9 - 0.4) * 0.06 / 0.9)


def plain_bilinear(frame: Tensor, height: int, width: int) -> Tensor:
    rows, columns, depth = frame.shape
    out = torch.zeros(height, width, depth, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y = max(0.0, (i + 0.5) * rows / height - 0.5)
            x = max(0.0, (j + 0.5) * columns / width - 0.5)
            y0, x0 = min(int(y), rows - 1), min(int(x), columns - 1)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            fy, fx = y - y0, x - x0
            top = frame[y0, x0] * (1 - fx) + frame[y0, x1] * fx
            low = frame[y1, x0] * (1 - fx) + frame[y1, x1] * fx
            out[i, j] = top * (1 - fy) + low * fy
    return out


def plain_pool(frame: Tensor, height: int, width: int) -> Tensor:
    rows, columns, depth = frame.shape
    out = torch.zeros(height, width, depth, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            ys = range(i * rows // height, math.ceil((i + 1) * rows / height))
            xs = range(j * columns // width, math.ceil((j + 1) * columns / width))
            out[i, j] = sum((frame[y, x] for y in ys for x in xs), torch.zeros(depth)) / (len(ys) * len(xs))
    return out


def plain_merge(rows: list[Tensor], tokens: int) -> tuple[list[Tensor], float]:
    """Rounds of merging one row, and how close a decision was."""
    gap = math.inf
    while len(rows) > tokens:
        merging = min(len(rows) // 2, len(rows) - tokens)
        even, odd = rows[::2], rows[1::2]
        best = []
        for a in even:
            found = [float(a @ b / (a.norm() * b.norm())) for b in odd]
            ranked = sorted(found, reverse=True)
            if len(ranked) > 1:
                gap = min(gap, ranked[0] - ranked[1])
            best.append((max(found), found.index(max(found))))
        order = sorted(range(len(even)), key=lambda i: -best[i][0])
        values = [best[i][0] for i in order]
        gap = min([gap, *(a - b for a, b in itertools.pairwise(values))])
        groups = [[b] for b in odd]
        for i in order[:merging]:
            groups[best[i][1]].append(even[i])
        rows = [even[i] for i in order[merging:]] + [torch.stack(g).mean(0) for g in groups]
    return rows, gap


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_resizing_is_the_plain_loop(rows, columns, tokens, seed):
    frame = random(rows, columns, 3, seed=seed)
    height, width = (rows, columns) if tokens == rows * columns else frame_grid(tokens)
    for assigner, plain in (("bilinear", plain_bilinear), ("adaptive_pool", plain_pool)):
        got = assign_tokens(frame, tokens, assigner)
        torch.testing.assert_close(got.double(), plain(frame.double(), height, width), rtol=1e-5, atol=1e-5)
    index = [int(i * (rows * columns - 1) / max(1, min(tokens, rows * columns) - 1)) for i in range(tokens)]
    places = linspace_places(rows * columns, tokens)
    assert len(places) == min(tokens, rows * columns)
    assert all(abs(a - b) <= 1 for a, b in zip(places.tolist(), index, strict=False))  # float32 rounds at whole numbers
    assert torch.equal(assign_tokens(frame, tokens, "linspace"), frame.flatten(0, 1)[places])


@settings(deadline=None, max_examples=80)
@given(count=st.integers(1, 24), tokens=st.integers(1, 26), seed=st.integers(0, 999))
def test_merging_is_the_plain_loop(count, tokens, seed):
    features = random(count, 6, seed=seed)
    want, gap = plain_merge(list(features.double()), tokens)
    got = merged(features[None], tokens)[0]
    assert len(got) == min(count, tokens)
    if gap > 1e-5:
        torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(side=st.integers(1, 6), tokens=st.integers(1, 36), seed=st.integers(0, 999))
def test_merging_rows_then_columns_is_the_plain_loop(side, tokens, seed):
    frame = random(side, side, 6, seed=seed)
    height, width = frame_grid(tokens)
    rows = [plain_merge(list(row.double()), width) for row in frame]
    gap = min(g for _, g in rows)
    columns = [plain_merge([row[j] for row, _ in rows], height) for j in range(min(side, width))]
    gap = min([gap, *(g for _, g in columns)])
    got = assign_tokens(frame, tokens, "merge_rows_cols")
    assert got.shape[:2] == (min(side, height), min(side, width))
    if gap > 1e-5:
        for j, (column, _) in enumerate(columns):
            torch.testing.assert_close(got[:, j].double(), torch.stack(column), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- other corners


@pytest.mark.parametrize("assigner", ON_GRID)
@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 7)])
def test_at_its_own_number_of_tokens_a_frame_keeps_its_grid(assigner, shape):
    frame = random(*shape, 4)
    assert torch.equal(assign_tokens(frame, math.prod(shape), assigner), frame)


def test_only_resizing_enlarges():
    frame = random(3, 3, 4)
    assert assign_tokens(frame, 30, "bilinear").shape == (6, 5, 4)
    assert assign_tokens(frame, 30, "adaptive_pool").shape == (6, 5, 4)
    assert torch.equal(assign_tokens(frame, 30, "linspace"), frame.flatten(0, 1))
    assert torch.equal(assign_tokens(frame, 30, "merge"), frame.flatten(0, 1))
    assert torch.equal(assign_tokens(frame, 30, "merge_rows_cols"), frame)


@pytest.mark.parametrize("assigner", ["bilinear", "adaptive_pool", "linspace", "merge", "merge_rows_cols"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_gradients_pass(assigner, dtype):
    frame = random(4, 4, 6).to(dtype).requires_grad_()
    out = assign_tokens(frame, 6, assigner)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert bool(frame.grad.isfinite().all()) and bool(frame.grad.ne(0).any())


def test_tokens_without_direction_can_be_merged():
    assert merged(torch.zeros(1, 6, 3), 2).shape == (1, 2, 3)


def test_an_unknown_assigner_and_no_tokens_are_refused():
    with pytest.raises(MMTokenError, match=r"assigner='v1' is unknown; use one of bilinear"):
        assign_tokens(random(2, 2, 1), 1, "v1")
    with pytest.raises(InputError, match="tokens=0"):
        assign_tokens(random(2, 2, 1), 0)
