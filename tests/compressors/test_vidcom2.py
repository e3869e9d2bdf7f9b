"""VidCom2 against plain loops over its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import VidCom2
from mmtoken.compressors.vidcom2 import corrected, unique_tokens
from mmtoken.errors import InputError
from mmtoken.tokens import VisualTokens, kept_count
from tests.compressors.test_stcpruner import bells, mean_of, unit
from tests.compressors.videos import VideoContext, noise, offline, together, video


def plain(method: VidCom2, frames: Tensor) -> tuple[list[int], float]:
    """What stays, frame * P + place, and how close a decision was."""
    number, area, width = frames.shape
    values = frames.double().flatten(0, 1).tolist()
    middle = mean_of(values)
    variances = [sum((t[c] - middle[c]) ** 2 for t in values) / len(values) for c in range(width)]
    many = max(1, int(width * method.channel_ratio))
    channels = sorted(range(width), key=lambda c: variances[c])[:many]
    gap = min([math.inf, *(100 * (b - a) for a, b in itertools.pairwise(sorted(variances)[many - 1 : many + 1]))])
    units = [unit([t[c] for c in channels]) for t in values]
    everything, typical, unlike = mean_of(units), [], []
    for first in range(0, len(units), area):
        frame = units[first : first + area]
        to_video = [bells(u, everything) for u in frame]
        own = mean_of(frame)
        typical += [v + bells(u, own) for u, v in zip(frame, to_video, strict=True)]
        unlike.append(-sum(to_video) / area)
    top = max(unlike)
    weights = [math.exp((u - top) / 0.01) for u in unlike]
    share = [w / sum(weights) for w in weights]
    base = method.keep if isinstance(method.keep, float) else min(1.0, method.keep / area)
    total = kept_count(method.keep, len(units), number)
    if base >= 1:
        return list(range(len(units))), math.inf
    kept: set[int] = set()
    for f in range(number):
        wanted = min(1.0, base * (1 + share[f] - 1 / number)) * area
        gap = min(gap, abs(wanted % 1 - 0.5))  # where rounding turns
        best = sorted(range(f * area, (f + 1) * area), key=lambda i: typical[i])
        kept |= set(best[: max(1, round(wanted))])
    ranked = sorted(typical)
    gap = min([gap, *(10 * (b - a) for a, b in itertools.pairwise(ranked))])
    if not method.exact:
        return sorted(kept), gap
    saved: set[int] = set()
    for f in range(number):
        best = sorted(range(f * area, (f + 1) * area), key=lambda i: typical[i])
        saved |= set(best[: min(method.floor, total // number)])
    while len(kept) > total:
        kept.remove(max(kept - saved or kept, key=lambda i: typical[i]))
    while len(kept) < total:
        kept.add(min(set(range(len(units))) - kept, key=lambda i: typical[i]))
    return sorted(kept), gap


@settings(deadline=None, max_examples=80)
@given(
    frames=st.integers(1, 6),
    area=st.integers(1, 8),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 10)),
    exact=st.booleans(),
    floor=st.integers(0, 1),
    ratio=st.sampled_from([0.2, 0.5, 1.0]),
    seed=st.integers(0, 999),
    newlines=st.sampled_from(["none", "end", "rows"]),
)
def test_selection_is_the_plain_loop(frames, area, keep, exact, floor, ratio, seed, newlines):
    features = noise(frames, area, 6, seed=seed) + noise(frames, 1, 6, seed=seed + 1)
    method = VidCom2(keep=keep, channel_ratio=ratio, exact=exact, floor=floor)
    found = offline(method, features, 1, newlines)
    kept, gap = plain(method, features)
    if exact:
        assert len(found) == kept_count(keep, frames * area, frames)
    if gap > 1e-4:
        assert found == kept


FRAMES = [torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])]


def test_two_frames_of_which_one_is_unlike_the_other():
    assert unique_tokens(FRAMES, 0.5, channel_ratio=1.0).tolist() == [0, 2, 3]
    assert unique_tokens(FRAMES, 0.5, channel_ratio=1.0, exact=2).tolist() == [2, 3]
    # A floor leaves one of each frame.
    assert unique_tokens(FRAMES, 0.5, channel_ratio=1.0, exact=2, floor=1).tolist() == [0, 3]
    assert offline(VidCom2(keep=0.5, channel_ratio=1.0, exact=False), torch.stack(FRAMES)) == [0, 2, 3]
    assert offline(VidCom2(keep=1, channel_ratio=1.0), torch.stack(FRAMES)) == [2, 3]


def test_a_correction_takes_the_most_typical_and_adds_the_least_typical():
    typical = [torch.tensor([1.0, 5.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])]
    chosen = torch.tensor([0, 1, 5])
    assert [corrected(chosen, typical, total, 0).tolist() for total in range(1, 7)] == [
        [0],
        [0, 1],
        [0, 1, 5],
        [0, 1, 3, 5],
        [0, 1, 2, 3, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    # The floor of one keeps the least typical of each frame, even if no frame had chosen it.
    assert corrected(chosen, typical, 2, 1).tolist() == [0, 3]
    # A budget below one per frame has no floor.
    assert corrected(chosen, typical, 1, 1).tolist() == [0]


def test_a_frame_that_is_unlike_the_others_gets_more():
    calm = noise(1, 1, 32) + 0.05 * noise(7, 16, 32, seed=1)
    calm[3] = noise(16, 32, seed=2)
    kept = torch.tensor(offline(VidCom2(keep=0.25, exact=False), calm))
    counts = torch.bincount(kept // 16, minlength=7).tolist()
    assert counts[3] == 7  # .25 * (2 - 1/7) of 16
    assert set(counts[:3] + counts[4:]) == {3}  # .25 * (1 - 1/7) of 16


def test_it_needs_the_whole_video():
    assert not VidCom2.causal
    features = noise(4, 8, 16)
    other = torch.cat([features[:3], features[3:] * -1 + 2])
    one, two = (offline(VidCom2(keep=0.5), frames) for frames in (features, other))
    assert [i for i in one if i < 24] != [i for i in two if i < 24]


@pytest.mark.parametrize("exact", [True, False])
def test_the_whole_budget_is_the_identity(exact):
    tokens = video(noise(3, 6, 8), 2, "rows")
    for keep in (6, 64, 1.0):
        left = VidCom2(keep=keep, exact=exact).llm_input(tokens, VideoContext())
        assert torch.equal(left.source, tokens.source)


def test_videos_of_a_batch_are_their_own():
    videos = [video(noise(size, 6, 8, seed=size), 2, "rows") for size in (4, 1, 3)]
    left = VidCom2(keep=0.3).llm_input(together(videos), VideoContext())
    for row, one in enumerate(videos):
        alone = VidCom2(keep=0.3).llm_input(one, VideoContext())
        assert torch.equal(left.source[row, left.valid[row]], alone.source[0, alone.valid[0]])


def test_an_image_is_a_frame():
    features = noise(2, 12, 8)
    tokens = VisualTokens.from_features(features, grid=((1, 3, 4), None))
    assert VidCom2(keep=0.4).llm_input(tokens, VideoContext()).counts() == [5, 5]


def test_frames_may_have_holes():
    tokens = video(noise(3, 6, 8)).where(torch.arange(18)[None] % 6 > torch.arange(18)[None] // 6)
    left = VidCom2(keep=0.5).llm_input(tokens, VideoContext())
    assert left.counts() == [6]
    emptied = tokens.where(torch.arange(tokens.source.shape[1])[None] < 0)
    assert VidCom2(keep=0.5).llm_input(emptied, VideoContext()).counts() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype):
    features = noise(3, 6, 8).to(dtype)
    assert offline(VidCom2(keep=0.4), features) == offline(VidCom2(keep=0.4), features.float())


def test_gradients_reach_what_stays():
    features = noise(2, 6, 8).requires_grad_()
    left = VidCom2(keep=0.4).llm_input(video(features), VideoContext())
    left.features.sum().backward()
    assert int((features.grad != 0).all(-1).sum()) == left.counts()[0] == 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_is_an_error(bad):
    features = noise(2, 4, 6)
    features[1, 2, 0] = bad
    with pytest.raises(InputError, match="features contains NaN for item 0"):
        offline(VidCom2(), features)
    with pytest.raises(InputError, match="give at least one frame and token"):
        unique_tokens([], 0.5)
