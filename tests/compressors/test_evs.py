"""EVS against plain loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import EVS
from mmtoken.compressors.evs import change, moved_tokens
from mmtoken.errors import InputError
from mmtoken.tokens import VisualTokens, kept_count
from tests.compressors.videos import VideoContext, noise, offline, together, video


def plain(frames: Tensor, keep: int | float) -> tuple[list[int], float]:
    """What stays, frame * P + place, and how close the decision was."""
    number, area = frames.shape[:2]
    values = frames.double()
    moved = {}
    for f in range(1, number):
        for i in range(area):
            a, b = values[f, i], values[f - 1, i]
            moved[f * area + i] = 1 - float(a @ b) / (float(a.norm()) * float(b.norm()))
    count = max(area, kept_count(keep, number * area, number))
    best = sorted(moved, key=lambda i: -moved[i])
    more = count - area
    gap = moved[best[more - 1]] - moved[best[more]] if 0 < more < len(best) else math.inf
    return [*range(area), *sorted(best[:more])], gap


@settings(deadline=None, max_examples=80)
@given(
    frames=st.integers(1, 7),
    area=st.integers(1, 8),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 10)),
    seed=st.integers(0, 999),
    newlines=st.sampled_from(["none", "end", "rows"]),
)
def test_selection_is_the_plain_loop(frames, area, keep, seed, newlines):
    features = noise(frames, area, 6, seed=seed)
    found = offline(EVS(keep=keep), features, 1, newlines)
    kept, gap = plain(features, keep)
    assert len(found) == len(kept) and found[:area] == list(range(area))
    if gap > 1e-5:
        assert found == kept


FRAMES = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [1, 1]], [[0, 1], [1, 1]]])


def test_two_places_over_three_frames():
    torch.testing.assert_close(
        change(FRAMES), torch.tensor([[255.0, 255.0], [0.0, 0.292893], [1.0, 0.0]]), atol=1e-6, rtol=1e-5
    )
    assert moved_tokens(FRAMES, 0.5).tolist() == [0, 1, 4]
    assert moved_tokens(FRAMES, 1 - 0.9).tolist() == [0, 1]
    assert offline(EVS(keep=0.5), FRAMES) == [0, 1, 4]


def test_of_equal_changes_the_earlier_stay():
    still = torch.ones(4, 3, 2)
    assert moved_tokens(still, 0.5).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_still_frame_may_end_with_nothing():
    frames = noise(1, 4, 8).repeat(3, 1, 1)
    frames[2] = noise(4, 8, seed=1)
    left = EVS(keep=2 / 3).llm_input(video(frames, 2, "rows"), VideoContext())
    assert torch.bincount(left.item[0][left.eligible[0]], minlength=3).tolist() == [4, 0, 4]
    assert int(left.protected.sum()) == 6


def test_a_token_is_compared_with_the_frame_before_even_if_that_one_went():
    # Slow motion: every step is small, so that none of them stays, however far they lead together.
    angle = torch.arange(5.0) * 0.3
    slow = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    fast = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1]])[:, None]
    assert moved_tokens(torch.cat([slow, fast], 1), 0.3).tolist() == [0, 1, 9]


def test_it_needs_the_whole_video():
    assert not EVS.causal
    features = noise(3, 6, 8)
    calm = torch.cat([features[:2], features[1:2]])
    one, two = (offline(EVS(keep=0.5), frames) for frames in (features, calm))
    assert [i for i in one if i < 12] != [i for i in two if i < 12]


def test_images_and_crops_pass_unchanged_beside_videos():
    features = noise(3, 12, 5)
    tokens = VisualTokens.from_features(features, grid=((1, 3, 4), None, (4, 1, 3)))
    left = EVS(keep=1).llm_input(tokens, VideoContext())
    assert left.counts() == [12, 12, 4]
    assert torch.equal(left.features[:2], features[:2])


def test_videos_of_a_batch_are_their_own():
    videos = [video(noise(size, 6, 8, seed=size), 2, "rows") for size in (4, 1, 3)]
    left = EVS(keep=0.4).llm_input(together(videos), VideoContext())
    for row, one in enumerate(videos):
        alone = EVS(keep=0.4).llm_input(one, VideoContext())
        assert torch.equal(left.source[row, left.valid[row]], alone.source[0, alone.valid[0]])


def test_the_whole_budget_is_the_identity():
    tokens = video(noise(3, 6, 8), 2, "rows")
    for keep in (6, 64, 1.0):
        assert torch.equal(EVS(keep=keep).llm_input(tokens, VideoContext()).source, tokens.source)


def test_frames_with_holes_cannot_be_compared():
    holed = video(noise(4, 3, 5)).where(torch.arange(12)[None] != 5)
    with pytest.raises(InputError, match=r"grid=\(4, 1, 3\) of item 0 has 12 tokens but 11 came.*before methods"):
        EVS().llm_input(holed, VideoContext())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_single(dtype):
    features = noise(3, 6, 8).to(dtype)
    assert offline(EVS(keep=0.6), features) == offline(EVS(keep=0.6), features.float())


def test_gradients_reach_what_stays():
    features = noise(2, 6, 8).requires_grad_()
    EVS(keep=0.75).llm_input(video(features), VideoContext()).features.sum().backward()
    assert int((features.grad != 0).all(-1).sum()) == 9


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_is_an_error(bad):
    features = noise(2, 4, 6)
    features[1, 2, 0] = bad
    with pytest.raises(InputError, match="features contains NaN for item 0"):
        offline(EVS(), features)
