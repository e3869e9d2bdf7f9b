"""DyCoke's temporal stage against a plain loop over its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import DyCoke
from mmtoken.compressors.dycoke import changed_tokens, references
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens, kept_count
from tests.compressors.videos import VideoContext, noise, offline, streamed, together, video


def plain(frames: Tensor, keep: int | float) -> tuple[list[int], float]:
    """Kept indices with loops in double precision, and how close a decision was."""
    count, kept, gap = kept_count(keep, frames.shape[1]), [], 1.0
    for number, frame in enumerate(frames.double()):
        place = number % 4
        if place == 0:
            kept += [number * len(frame) + i for i in range(len(frame))]
            continue
        other = frames[number - (2 if place == 2 else 1)].double()
        same = [float(a @ b) / (float(a.norm()) * float(b.norm())) for a, b in zip(frame, other, strict=True)]
        ranked = sorted(range(len(frame)), key=lambda i: (same[i], i))
        if count < len(ranked):
            gap = min(gap, same[ranked[count]] - same[ranked[count - 1]])
        kept += [number * len(frame) + i for i in sorted(ranked[:count])]
    return kept, gap


def test_frames_go_in_groups_of_four():
    assert references(8) == [None, 0, 0, 2, None, 4, 4, 6]
    assert references(1) == [None]
    assert references(3) == [None, 0, 0]
    assert references(9)[8:] == [None]


def test_the_official_frames_have_their_faults():
    # The last group is not reduced in its third frame; of an odd number the last frame is gone.
    assert references(8, "repo") == [None, 0, 0, 2, None, 4, None, 6]
    assert references(9, "repo") == [None, 0, 0, 2, None, 4, 4, 6]
    assert references(6, "repo") == [None, 0, 0, 2, None, 4]
    assert references(16, "repo")[12:] == [None, 12, None, 14]
    for frames in range(1, 5):
        with pytest.raises(InputError, match=f"frames={frames} is too few .* use variant='paper'"):
            references(frames, "repo")


@pytest.mark.parametrize(
    ("keep", "places", "paper", "repo"),
    [(1 - 0.8, 10, 2, 1), (1 - 0.8, 100, 20, 19), (1 - 0.9, 100, 10, 9), (1 - 0.7, 16, 5, 4), (3, 16, 3, 3)],
)
def test_counts_of_a_reduced_frame(keep, places, paper, repo):
    frames = torch.randn(6, places, 4, generator=torch.Generator().manual_seed(0))
    for variant, want in (("paper", paper), ("repo", repo)):
        index = changed_tokens(frames, keep, variant)
        assert int((index // places == 1).sum()) == want


def test_what_changed_stays_and_comes_out_by_rising_similarity():
    still = torch.eye(4)
    moved = still.clone()
    moved[1] = torch.tensor([0.0, 0.6, 0.8, 0.0])  # similarity .6
    moved[3] = torch.tensor([0.0, 0.0, 0.0, -1.0])  # similarity -1
    assert changed_tokens(torch.stack([still, moved]), 2).tolist() == [0, 1, 2, 3, 7, 5]
    # Of equally similar tokens the first ones stay.
    assert changed_tokens(torch.stack([still, still]), 2).tolist() == [0, 1, 2, 3, 4, 5]


@settings(deadline=None, max_examples=60)
@given(
    frames=st.integers(2, 11),
    places=st.integers(1, 9),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 12)),
    seed=st.integers(0, 999),
    newline=st.booleans(),
)
def test_selection_is_the_plain_loop(frames, places, keep, seed, newline):
    features = torch.randn(frames, places, 5, generator=torch.Generator().manual_seed(seed))
    left = DyCoke(keep=keep).llm_input(video(features, newlines="end" if newline else "none"), VideoContext())
    kept, gap = plain(features, keep)
    if gap > 1e-5:
        assert left.kept()[0].tolist() == kept
    assert left.counts() == [len(kept)]
    assert int(left.protected.sum()) == newline


def test_images_pass_unchanged_beside_videos():
    # A batch of two images, one of them in crops, and a video.
    features = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(1))
    tokens = VisualTokens.from_features(features, grid=((1, 3, 4), None, (4, 1, 3)))
    left = DyCoke(keep=1).llm_input(tokens, VideoContext())
    assert left.counts() == [12, 12, 6]
    assert torch.equal(left.features[:2], features[:2])
    # Images have no frames to compare, so that holes in them do not matter.
    image = VisualTokens.from_features(features[:1], grid=((1, 3, 4),)).where(torch.arange(12)[None] > 3)
    assert DyCoke(keep=1).llm_input(image, VideoContext()).counts() == [8]


def test_with_the_default_a_video_of_fours_keeps_about_0475():
    frames = torch.randn(8, 100, 4, generator=torch.Generator().manual_seed(0))
    assert DyCoke().llm_input(video(frames), VideoContext()).counts() == [380]


def test_frames_with_holes_cannot_be_compared():
    tokens = video(torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)))
    holed = tokens.where(torch.arange(12)[None] != 5)
    with pytest.raises(InputError, match=r"grid=\(4, 1, 3\) of item 0 has 12 tokens but 11 came.*before methods"):
        DyCoke().llm_input(holed, VideoContext())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_in_a_video_is_an_error(bad):
    frames = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    frames[2, 1, 0] = bad
    with pytest.raises(InputError, match="features contains NaN for item 0"):
        DyCoke().llm_input(video(frames), VideoContext())


@settings(deadline=None, max_examples=40)
@given(
    frames=st.integers(1, 11),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 8)),
    seed=st.integers(0, 999),
    newlines=st.sampled_from(["none", "end", "rows"]),
)
def test_a_stream_keeps_what_the_whole_video_does(frames, keep, seed, newlines):
    features = noise(frames, 6, 5, seed=seed)
    assert streamed(DyCoke(keep=keep), features, 2, newlines) == offline(DyCoke(keep=keep), features, 2, newlines)


@pytest.mark.parametrize("sizes", [(9,), (3, 6), (1, 4, 4), (2, 2, 3, 2)])
def test_groups_go_on_over_pushes_of_any_size(sizes):
    features, context, kept, first = noise(9, 6, 5), VideoContext(streaming=True), [], 0
    for size in sizes:
        left = DyCoke(keep=2).llm_input(video(features[first : first + size]), context)
        kept += [first * 6 + place for place in left.kept()[0].tolist()]
        first += size
    assert kept == offline(DyCoke(keep=2), features)


@pytest.mark.parametrize("cut", range(1, 9))
def test_what_stays_of_a_frame_does_not_depend_on_later_ones(cut):
    assert DyCoke.causal
    features, others = noise(9, 4, 6), noise(9, 4, 6, seed=1)
    one = offline(DyCoke(keep=2), features)
    other = offline(DyCoke(keep=2), torch.cat([features[:cut], others[cut:]]))
    assert [i for i in one if i < cut * 4] == [i for i in other if i < cut * 4]


def test_one_frame_is_remembered_and_a_copy_of_the_memory_goes_back():
    features, context = noise(40, 6, 5), VideoContext(streaming=True)
    for number, frame in enumerate(features):
        before = dict(context.memory)
        wrong = DyCoke(keep=2).llm_input(video(noise(1, 6, 5, seed=number + 1)), context)
        context.memory = before
        left = DyCoke(keep=2).llm_input(video(frame[None]), context)
        assert left.counts() == wrong.counts() == [6 if number % 4 == 0 else 2]
        reference = context.memory["groups"][0].reference
        assert (reference is None) == (number % 4 == 3)
        assert reference is None or reference.untyped_storage().nbytes() == 6 * 5 * 4
    # Nor does a push of many frames stay in memory.
    DyCoke(keep=2).llm_input(video(features[:39]), context)
    assert context.memory["groups"][0].reference.untyped_storage().nbytes() == 6 * 5 * 4


def test_a_stream_has_no_last_frames_and_one_size():
    with pytest.raises(UnsupportedError, match=r"variant='repo' treats the last frames.*use 'paper'"):
        DyCoke(variant="repo").llm_input(video(noise(1, 4, 5)), VideoContext(streaming=True))
    context = VideoContext(streaming=True)
    DyCoke().llm_input(video(noise(1, 4, 5)), context)
    with pytest.raises(InputError, match=r"a frame has 6 tokens .* before it 4 .* the same size"):
        DyCoke().llm_input(video(noise(1, 6, 5)), context)


def test_videos_of_a_batch_have_groups_of_their_own():
    videos = [video(noise(size, 6, 8, seed=size), 2, "rows") for size in (6, 1, 3)]
    left = DyCoke(keep=2).llm_input(together(videos), VideoContext())
    for row, one in enumerate(videos):
        alone = DyCoke(keep=2).llm_input(one, VideoContext())
        assert torch.equal(left.source[row, left.valid[row]], alone.source[0, alone.valid[0]])
