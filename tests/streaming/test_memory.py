"""What a stream holds: bounded after every push, untouched by questions, the same however frames come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmtoken
from mmtoken.compressors import DyCoke, ReKV, Sequential, STCCacher, STCPruner, VideoScan
from mmtoken.compressors.base import Compressor
from mmtoken.errors import InputError, MMTokenError
from mmtoken.streaming.stream import Stream
from tests.streaming.methods import Loudest, SecondOldest, Thins
from tests.streaming.offline import FAMILIES, FPS, answered, clip, parts, push_all

METHODS: dict[str, Compressor | None] = {
    "dense": None,
    "loudest": Loudest(keep=2),
    "thins": Thins(),
    "second": SecondOldest(),
    "videoscan": VideoScan(bank=4, extra_kv=1),
    "cacher": STCCacher(keep=0.5),
    "dycoke": DyCoke(),
    "pruner+cacher+rekv": Sequential([STCCacher(keep=0.5), STCPruner(keep=2, positions="keep"), ReKV(keep=2)]),
}


def held(live: Stream) -> list[Any]:
    """All tensors that a stream holds."""
    steps = [*live._memory.everything(), *(block.step for block in (live._store.blocks if live._store else []))]
    return [(step.number, step.start, *step.keys, *step.values, *step.places) for step in steps]


def same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def bound_for(model: Any, processor: Any, method: Compressor | None) -> int:
    """Three steps."""
    with mmtoken.stream(model, processor, method) as live:
        push_all(live, clip(2))
        return 3 * live.report.kv_tokens // len(live._memory.held)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_leave_the_memory_as_it_was(family: str, name: str) -> None:
    model, processor = parts(family)
    video, method = clip(11), METHODS[name]
    bound = bound_for(model, processor, method)
    with mmtoken.stream(model, processor, method, memory_tokens=bound) as quiet:
        push_all(quiet, video)
        expected, answer = held(quiet), answered(quiet, "What is shown?", 2)[1]
    with mmtoken.stream(model, processor, method, memory_tokens=bound) as asked:
        for number, frame in enumerate(video):
            asked.push(frame, number / FPS)
            assert asked.report.kv_tokens <= bound
            if number % 3 == 0:
                before = held(asked)
                first = answered(asked, "How many?", 2)[1]
                assert torch.equal(first, answered(asked, "How many?", 2)[1])
                same(held(asked), before)
        same(held(asked), expected)
        assert torch.equal(answered(asked, "What is shown?", 2)[1], answer)
        asked.reset()
        push_all(asked, video)
        same(held(asked), expected)


@pytest.mark.parametrize("name", METHODS)
def test_frames_that_are_refused_leave_no_trace(name: str) -> None:
    model, processor = parts("qwen2_5_vl")
    video, method = clip(7), METHODS[name]
    with mmtoken.stream(model, processor, method) as plain:
        push_all(plain, video)
        expected = held(plain)
    with mmtoken.stream(model, processor, method) as live:
        for number, frame in enumerate(video):
            wrong = [(frame[..., :2], 99.0), (frame / 255, 99.0), (frame, float("nan"))]
            wrong += [(frame[:-1], 99.0), (frame, -1.0)] if number else []
            for picture, t in wrong:
                with pytest.raises(InputError):
                    live.push(picture, t)
            live.push(torch.from_numpy(frame), number / FPS)
        same(held(live), expected)
        assert live.report.frames_seen == 7


def test_the_default_bound_is_thirty_two_times_the_first_step() -> None:
    model, processor = parts("llava_onevision")
    with mmtoken.stream(model, processor, Loudest(keep=3)) as live:
        assert live.memory_tokens is None
        push_all(live, clip(40))
        assert live.memory_tokens == 96 == live.report.kv_tokens
        assert (live.report.frames_held, live.report.frames_seen) == (32, 40)
        live.reset()
        assert live.memory_tokens is None and live.report.kv_tokens == 0
        live.push(clip(1)[0], 0.0)
        assert live.memory_tokens == 96


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_below_one_step_is_refused(family: str) -> None:
    model, processor = parts(family)
    with mmtoken.stream(model, processor, memory_tokens=3) as live:
        with pytest.raises(InputError, match=r"memory_tokens=3 is less than the \d+ positions.*give at least"):
            push_all(live, clip(2))
        assert live.report.kv_tokens == 0 and live.report.frames_held == 0


def test_bytes_are_those_of_what_is_held() -> None:
    model, processor = parts("llava_onevision")
    with mmtoken.stream(model, processor, memory_tokens=12) as live:
        push_all(live, clip(9))
        text = live._memory.init
        assert text is not None
        # 4 layers, 2 key heads of 16 numbers of 4 bytes, keys and values
        assert live.report.kv_bytes == (12 + text.length) * 4 * 2 * 16 * 4 * 2
        report = live.report
        assert (report.frames_held, report.stored_tokens, report.stored_bytes) == (3, 0, 0)
        assert report.fps > 0 and report.ttft_ms is None
        live.ask("What is shown?", max_new_tokens=1)
        assert live.report.ttft_ms is not None and live.report.ttft_ms > 0


def test_what_is_let_go_of_a_step_is_freed() -> None:
    model, processor = parts("llava_onevision")
    with mmtoken.stream(model, processor, Thins()) as live:
        push_all(live, clip(3))
        for step in live._memory.held:
            for tensor in (*step.keys, *step.values):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_the_store_is_bounded_and_loses_the_oldest() -> None:
    model, processor = parts("llava_onevision")
    with mmtoken.stream(model, processor, ReKV(keep=2), memory_tokens=8, store_tokens=12) as live:
        for number, frame in enumerate(clip(12)):
            live.push(frame, number)
            assert live.report.stored_tokens <= 12
        assert live._store is not None
        assert [block.step.number for block in live._store.blocks] == [7, 8, 9]
        assert live.report.stored_tokens == 12
        assert live.report.stored_bytes == 12 * 4 * 2 * 16 * 4 * 2
        live.reset()
        assert live.report.stored_tokens == 0


def test_evict_may_not_keep_too_much() -> None:
    class Stubborn(SecondOldest):
        def evict(self, held: Any, over: bool, ctx: Any) -> int | None:
            return None

    model, processor = parts("llava_onevision")
    with mmtoken.stream(model, processor, Stubborn(), memory_tokens=8) as live:
        push_all(live, clip(2))
        with pytest.raises(MMTokenError, match=r"Stubborn\.evict returned None for 3 steps, over=True"):
            live.push(clip(1)[0], 9.0)
        assert live.report.frames_held == 2


@pytest.mark.parametrize(
    "rows", [torch.tensor([1, 0]), torch.tensor([0, 4]), torch.tensor([-1]), torch.zeros(0).long(), torch.ones(2), [0]]
)
def test_retain_must_choose_rows(rows: Any) -> None:
    class Wrong(Thins):
        def retain(self, frame: Any, ctx: Any) -> Any:
            return rows

    model, processor = parts("llava_onevision")
    with mmtoken.stream(model, processor, Wrong()) as live, pytest.raises(MMTokenError, match=r"Wrong\.retain"):
        live.push(clip(1)[0], 0.0)


def test_half_steps_do_not_count_as_held() -> None:
    model, processor = parts("qwen2_5_vl")
    with mmtoken.stream(model, processor) as live:
        live.push(clip(1)[0], 0.0)
        assert (live.report.frames_seen, live.report.frames_held, live.report.kv_tokens) == (1, 0, 0)
        live.ask("What is shown?", max_new_tokens=1)
        assert live.report.kv_tokens == 0
