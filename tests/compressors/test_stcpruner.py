"""STC-Pruner against plain loops over its definition, and what streams need of it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.compressors import STCPruner
from mmtoken.compressors.stcpruner import History, kernel, lowest, quiet_channels, score_chunk, with_newlines
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens, kept_count
from tests.compressors.videos import VideoContext, noise, offline, positions, streamed, together, video

# ------------------------------------------------------------------------------------------------------- plain loops


def mean_of(vectors: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector]


def bells(a: Sequence[float], b: Sequence[float]) -> float:
    squared = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return sum(math.exp(-squared / (2 * 2.0**power)) for power in range(-3, 2))


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    return 1 - sum(x * y for x, y in zip(unit(a), unit(b), strict=True))


def plain(method: STCPruner, frames: Tensor) -> tuple[list[int], float]:
    """What stays, frame * P + place, and how close a decision was: loops over lists of all that ever came."""
    values = frames.double().tolist()
    width, area = frames.shape[2], frames.shape[1]
    many = max(1, int(width * method.channel_ratio))
    past_chunks: list[list[float]] = []
    past_frames: list[list[float]] = []
    kept: list[int] = []
    gap = math.inf
    for first in range(0, len(values), method.chunk_frames):
        chunk = values[first : first + method.chunk_frames]
        everything = [token for frame in chunk for token in frame]
        middle = mean_of(everything)
        variances = [sum((t[c] - middle[c]) ** 2 for t in everything) / len(everything) for c in range(width)]
        order = sorted(range(width), key=lambda c: variances[c])
        ranked = sorted(variances)
        # Variances come out the same to six digits, so that neighbours may be closer than scores may.
        gap = min([gap, *(100 * (b - a) for a, b in itertools.pairwise(ranked[: many + 1]))])
        channels = order[:many]
        past_chunks.append([middle[c] for c in channels])
        for number, frame in enumerate(chunk, first):
            looked = [[token[c] for c in channels] for token in frame]
            if method.memory == "running":
                memory = mean_of(past_chunks)
            else:
                own = mean_of(frame)
                memory = [mean_of(past_frames[-method.window :] or [own])[c] for c in channels]
                past_frames.append(own)
            if method.score == "gaussian":
                units = [unit(token) for token in looked]
                scores = [bells(u, mean_of(units)) + bells(u, unit(memory)) for u in units]
            else:
                anchor = mean_of(looked)
                scores = [
                    -method.alpha * apart(token, memory) - (1 - method.alpha) * apart(token, anchor) for token in looked
                ]
            count = kept_count(method.keep, area)
            best = sorted(range(area), key=lambda i: scores[i])
            if count < area:
                gap = min(gap, scores[best[count]] - scores[best[count - 1]])
            kept += [number * area + i for i in sorted(best[:count])]
    return kept, gap


def methods() -> st.SearchStrategy[STCPruner]:
    return st.builds(
        STCPruner,
        keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 12)),
        score=st.sampled_from(["gaussian", "dual_anchor"]),
        alpha=st.floats(0.0, 1.0),
        channel_ratio=st.sampled_from([0.2, 0.5, 1.0]),
        memory=st.sampled_from(["running", "window"]),
        window=st.integers(1, 4),
    )


@settings(deadline=None, max_examples=80)
@given(
    method=methods(),
    frames=st.integers(1, 7),
    shape=st.sampled_from([(1, 1), (1, 5), (2, 3), (3, 3)]),
    chunk=st.integers(1, 4),
    seed=st.integers(0, 999),
    newlines=st.sampled_from(["none", "end", "rows"]),
)
def test_selection_is_the_plain_loop(method, frames, shape, chunk, seed, newlines):
    rows, columns = shape
    method = STCPruner(**{**method.settings(), "chunk_frames": chunk})
    features = noise(frames, rows * columns, 6, seed=seed) + noise(frames, 1, 6, seed=seed + 1)
    kept, gap = plain(method, features)
    found = offline(method, features, rows, newlines)
    assert len(found) == frames * kept_count(method.keep, rows * columns)
    if gap > 1e-4:
        assert found == kept


# ------------------------------------------------------------------------------------------------------ tiny oracles


def test_the_kernel_has_five_bells():
    values = kernel(torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0]))
    torch.testing.assert_close(
        values, torch.tensor([5.0, 2.771043, 1.906862, 1.128396, 0.521866]), atol=1e-6, rtol=1e-6
    )
    assert bool((kernel(torch.linspace(0, 9, 50)).diff() < 0).all())


ROWS = torch.tensor([[1.0, 0, 5, -5], [1, 0, -5, 5], [0, 1, 5, 5], [1, 0, -5, -5]])


def test_four_tokens_of_which_one_is_unlike_the_others():
    scores = score_chunk([ROWS], History())
    assert sorted(scores.channels.tolist()) == [0, 1]
    one, other = 4.176475, 1.765783
    torch.testing.assert_close(scores.frame[0], torch.tensor([one, one, other, one]), atol=1e-5, rtol=1e-5)
    one, other = 4.304830, 1.538969
    torch.testing.assert_close(scores.memory[0], torch.tensor([one, one, other, one]), atol=1e-5, rtol=1e-5)
    one, other = 8.481304, 3.304752
    torch.testing.assert_close(scores.total[0], torch.tensor([one, one, other, one]), atol=1e-5, rtol=1e-5)
    assert offline(STCPruner(keep=1), ROWS[None]) == [2]


def test_the_same_four_by_their_distance_to_two_anchors():
    scores = score_chunk([ROWS], History(), score="dual_anchor")
    one, other = -0.051317, -0.683772
    torch.testing.assert_close(scores.total[0], torch.tensor([one, one, other, one]), atol=1e-5, rtol=1e-5)
    for memory in ("running", "window"):
        assert offline(STCPruner(keep=1, score="dual_anchor", memory=memory), ROWS[None]) == [2]


def test_alpha_weighs_the_memory():
    frames = torch.stack([torch.eye(3), torch.eye(3).roll(1, 0)]) + 0.1 * noise(2, 3, 3)
    history = History(None, 1, (frames[0].mean(0),))
    read = {
        alpha: score_chunk([frames[1]], history, score="dual_anchor", memory="window", alpha=alpha, channel_ratio=1.0)
        for alpha in (0.0, 0.25, 1.0)
    }
    torch.testing.assert_close(read[0.0].total[0], -read[0.0].frame[0])
    torch.testing.assert_close(read[1.0].total[0], -read[1.0].memory[0])
    torch.testing.assert_close(read[0.25].total[0], 0.25 * read[1.0].total[0] + 0.75 * read[0.0].total[0])


def test_rising_variance_is_the_order_that_is_remembered():
    # The loud channel of the first frame is the quiet one of the second: position by position, not channel by channel.
    first = torch.tensor([[1.0, 5.0], [1.0, 7.0]])
    second = torch.tensor([[2.0, 9.0], [4.0, 9.0]])
    assert quiet_channels(second, 1.0).tolist() == [1, 0]
    history = score_chunk([first], History(), channel_ratio=1.0).history
    history = score_chunk([second], history, channel_ratio=1.0).history
    assert history.chunks == 2
    assert history.mean.tolist() == [(1 + 9) / 2, (6 + 3) / 2]


def test_a_window_remembers_channel_by_channel():
    frames = [torch.full((2, 2), float(i)) + torch.tensor([[0.0, 10.0], [0.0, 20.0]]) for i in range(5)]
    history = History()
    for frame in frames:
        history = score_chunk([frame], history, memory="window", window=3).history
    assert [vector.tolist() for vector in history.recent] == [[float(i), i + 15.0] for i in (2, 3, 4)]


@pytest.mark.parametrize(("width", "ratio", "count"), [(24, 0.5, 12), (5, 0.5, 2), (1, 0.5, 1), (7, 1.0, 7)])
def test_as_many_channels_as_the_ratio_says(width, ratio, count):
    assert len(quiet_channels(noise(9, width), ratio)) == count


def test_of_equal_scores_the_first_stay():
    assert lowest(torch.tensor([1.0, 0, 0, 0, 2]), 2).tolist() == [1, 2]
    assert offline(STCPruner(keep=2), torch.ones(2, 4, 3)) == [0, 1, 4, 5]


def test_newlines_in_both_orders():
    kept = torch.tensor([1, 3, 4])
    assert with_newlines(kept, 2, 3).tolist() == [1, 3, 4, 5, 7]
    assert with_newlines(kept, 2, 3, "append").tolist() == [1, 4, 5, 3, 7]
    # 13 x 13 and 13 newlines
    assert len(with_newlines(torch.arange(64), 13, 13, "append")) == 77
    assert with_newlines(torch.arange(169), 13, 13).tolist() == list(range(182))


# --------------------------------------------------------------------------------------------------------- in streams


@settings(deadline=None, max_examples=40)
@given(
    method=methods(),
    frames=st.integers(1, 9),
    seed=st.integers(0, 999),
    newlines=st.sampled_from(["none", "end", "rows"]),
)
def test_a_stream_keeps_what_the_whole_video_does(method, frames, seed, newlines):
    features = noise(frames, 6, 8, seed=seed)
    assert streamed(method, features, 2, newlines) == offline(method, features, 2, newlines)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1), (2, 2, 3)])
@pytest.mark.parametrize("memory", ["running", "window"])
def test_pushes_of_any_size_give_the_same(sizes, memory):
    method = STCPruner(keep=2, memory=memory, window=2)
    features, context, kept, first = noise(7, 6, 8), VideoContext(streaming=True), [], 0
    for size in sizes:
        left = method.llm_input(video(features[first : first + size]), context)
        kept += [first * 6 + place for place in positions(left, 6, "none")]
        first += size
    assert kept == offline(method, features)


@settings(deadline=None, max_examples=30)
@given(method=methods(), seed=st.integers(0, 999), cut=st.integers(1, 5))
def test_what_stays_of_a_step_does_not_depend_on_later_ones(method, seed, cut):
    features, others = noise(6, 4, 6, seed=seed), noise(6, 4, 6, seed=seed + 1000)
    changed = torch.cat([features[:cut], others[cut:]])
    one, other = offline(method, features), offline(method, changed)
    assert [place for place in one if place < cut * 4] == [place for place in other if place < cut * 4]


def test_a_new_memory_is_a_new_video():
    method, features = STCPruner(keep=2), noise(5, 6, 8)
    context = VideoContext(streaming=True)
    first = [positions(method.llm_input(video(frame[None]), context), 6, "none") for frame in features]
    again = [positions(method.llm_input(video(frame[None]), context), 6, "none") for frame in features]
    context.memory = {}
    anew = [positions(method.llm_input(video(frame[None]), context), 6, "none") for frame in features]
    assert first == anew != again


def test_going_back_to_a_copy_of_the_memory_undoes_a_step():
    method, features = STCPruner(keep=2, memory="window"), noise(4, 6, 8)
    for copied in (copy.copy, copy.deepcopy):
        context = VideoContext(streaming=True)
        method.llm_input(video(features[:2]), context)
        before = copied(context.memory)
        method.llm_input(video(features[3:]), context)
        assert (before["histories"][0].chunks, context.memory["histories"][0].chunks) == (2, 3)
        context.memory = before
        left = positions(method.llm_input(video(features[2:3]), context), 6, "none")
        assert [12 + place for place in left] == offline(method, features[:3])[4:]


@pytest.mark.parametrize("memory", ["running", "window"])
def test_what_is_remembered_does_not_grow(memory):
    method, context = STCPruner(keep=2, memory=memory, window=3), VideoContext(streaming=True)
    numbers = []
    for step in range(200):
        method.llm_input(video(noise(1, 4, 8, seed=step)), context)
        history = context.memory["histories"][0]
        vectors = [*history.recent, *([] if history.mean is None else [history.mean])]
        numbers.append(sum(vector.untyped_storage().nbytes() for vector in vectors))
    assert history.chunks == 200
    assert len(set(numbers[3:])) == 1
    assert numbers[-1] == (4 * 4 if memory == "running" else 3 * 8 * 4)


def test_the_running_mean_is_the_mean_of_all_chunks():
    history, means = History(), []
    for step in range(300):
        tokens = noise(5, 8, seed=step) + 3
        scores = score_chunk([tokens], history)
        history = scores.history
        means.append(tokens[:, scores.channels].double().mean(0))
    torch.testing.assert_close(history.mean.double(), torch.stack(means).mean(0), atol=1e-5, rtol=1e-5)


def test_a_stream_cannot_wait_for_later_frames():
    with pytest.raises(UnsupportedError, match=r"chunk_frames=2 waits for later frames.*use 1"):
        STCPruner(chunk_frames=2).llm_input(video(noise(1, 4, 6)), VideoContext(streaming=True))


# ------------------------------------------------------------------------------------------------- batches and inputs


@settings(deadline=None, max_examples=30)
@given(method=methods(), seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_videos_of_a_batch_have_memories_of_their_own(method, seed, sizes):
    videos = [video(noise(size, 6, 8, seed=seed + row), 2, "rows") for row, size in enumerate(sizes)]
    context = VideoContext()
    left = method.llm_input(together(videos), context)
    for row, one in enumerate(videos):
        alone = method.llm_input(one, VideoContext())
        assert torch.equal(left.source[row, left.valid[row]], alone.source[0, alone.valid[0]])
        assert torch.equal(
            left.features[row, left.valid[row]].nan_to_num(7), alone.features[0, alone.valid[0]].nan_to_num(7)
        )
    assert sorted(context.memory["histories"]) == list(range(len(sizes)))


def test_rows_are_those_that_came_and_newlines_stay():
    features = noise(3, 6, 8)
    tokens = video(features, 2, "rows")
    left = STCPruner(keep=2).llm_input(tokens, VideoContext())
    assert int(left.protected.sum()) == 3 * 2
    assert left.counts() == [6]
    for number, place in zip(left.item[0], left.source[0], strict=True):
        assert (
            torch.equal(left.features[0, (left.source[0] == place)], tokens.features[0, place][None])
            or left.protected[0, (left.source[0] == place)]
        )
        assert int(number) == int(place) // 8
    assert bool((left.source[0].diff() > 0).all())


def test_the_whole_budget_is_the_identity():
    tokens = video(noise(3, 6, 8), 2, "rows")
    for keep in (6, 64, 1.0):
        left = STCPruner(keep=keep).llm_input(tokens, VideoContext())
        assert torch.equal(left.source, tokens.source)


def test_an_image_is_a_frame_and_so_are_crops_together():
    features = noise(2, 12, 8)
    tokens = VisualTokens.from_features(features, grid=((1, 3, 4), None))
    left = STCPruner(keep=5).llm_input(tokens, VideoContext())
    assert left.counts() == [5, 5]
    assert left.kept()[0].tolist() == offline(STCPruner(keep=5), features[:1])


def test_frames_may_have_holes():
    features = noise(2, 6, 8)
    tokens = video(features)
    holed = tokens.where(torch.arange(12)[None] >= 4)  # two tokens of the first frame are left
    left = STCPruner(keep=3).llm_input(holed, VideoContext())
    assert left.kept()[0].tolist()[:2] == [4, 5]
    assert left.counts() == [5]
    emptied = tokens.where(torch.arange(12)[None] >= 6)
    assert STCPruner(keep=3).llm_input(emptied, VideoContext()).counts() == [3]


def test_scaling_a_token_moves_no_anchor_of_the_frame():
    scaled = noise(5, 8)
    scores = score_chunk([scaled], History(), channel_ratio=1.0)
    scaled = scaled * torch.tensor([1.0, 3.0, 0.5, 1.0, 7.0])[:, None]
    again = score_chunk([scaled], History(), channel_ratio=1.0)
    torch.testing.assert_close(scores.frame[0], again.frame[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores.memory[0], again.memory[0], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype):
    features = noise(3, 6, 8).to(dtype)
    assert offline(STCPruner(keep=2), features) == offline(STCPruner(keep=2), features.float())
    left = STCPruner(keep=2).llm_input(video(features), VideoContext())
    assert left.features.dtype == dtype


def test_gradients_reach_what_stays_and_nothing_else():
    features = noise(2, 6, 8).requires_grad_()
    left = STCPruner(keep=2).llm_input(video(features), VideoContext())
    left.features.sum().backward()
    kept = torch.zeros(12)
    kept[left.kept()[0]] = 1
    assert torch.equal(features.grad.flatten(0, 1), kept[:, None].expand(-1, 8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_is_an_error_that_leaves_the_memory_alone(bad):
    features, context = noise(2, 4, 6), VideoContext(streaming=True)
    STCPruner(keep=2).llm_input(video(features[:1]), context)
    before = dict(context.memory["histories"])
    features[1, 2, 0] = bad
    with pytest.raises(InputError, match="features contains NaN for item 0"):
        STCPruner(keep=2).llm_input(video(features[1:]), context)
    assert context.memory["histories"] == before


@pytest.mark.parametrize("memory", ["running", "window"])
def test_a_memory_of_another_width_is_refused(memory):
    history = score_chunk([noise(4, 6)], History(), memory=memory).history
    with pytest.raises(InputError, match="differ in width; start a new History"):
        score_chunk([noise(4, 10)], history, memory=memory)
    with pytest.raises(InputError, match="differ in width"):
        score_chunk([noise(4, 6), noise(4, 10)], History(), memory=memory)


def test_no_frame_and_empty_frames_are_refused():
    for frames in ([], [noise(0, 6)]):
        with pytest.raises(InputError, match="give at least one frame and token"):
            score_chunk(frames, History())


def test_a_zero_token_has_a_score():
    features = noise(1, 5, 6)
    features[0, 2] = 0
    for score in ("gaussian", "dual_anchor"):
        assert len(offline(STCPruner(keep=2, score=score), features)) == 2
