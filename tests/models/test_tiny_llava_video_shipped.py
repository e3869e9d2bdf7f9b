"""The shipped checkpoint answers as its card says, by `generate` and in a stream."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import LlavaOnevisionForConditionalGeneration

from mmtoken import load
from mmtoken.cli.bench import _benchmarks
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.video import Setting, Towers, answer_offline, answer_streaming, held_out


def test_the_shipped_checkpoint_answers_most_types() -> None:
    model, processor = load("tiny-llava-video")
    assert isinstance(model, LlavaOnevisionForConditionalGeneration)
    assert not model.training
    clips = held_out(20, 16)
    towers = Towers(model)
    towers.compute(clips)
    found = answer_offline(model, processor, clips, towers, None)
    kinds = [q.type for clip in clips for q in clip.questions]
    asked = Counter(kinds)
    right = Counter(kind for kind, mark in zip(kinds, found["correct"], strict=True) if mark)
    good = [kind for kind in asked if right[kind] >= 0.85 * asked[kind]]
    assert len(good) >= 4, right
    assert min(asked.values()) >= 10
    assert found["tokens"] == 256


def test_a_stream_that_holds_everything_answers_alike() -> None:
    model, processor = load("tiny-llava-video")
    clips = held_out(2, 16)
    towers = Towers(model)
    towers.compute(clips)
    whole = answer_offline(model, processor, clips, towers, None)["correct"]
    live = answer_streaming(model, processor, clips, Setting("all", memory=512))
    assert live["correct"] == whole
    assert live["kv_tokens"] == 256
    forgetful = answer_streaming(model, processor, clips, Setting("little", memory=32))
    assert forgetful["frames_held"] == 2
    assert sum(forgetful["correct"]) < sum(whole)


def test_bench_names_the_module_that_asks_about_videos() -> None:
    with pytest.raises(MMTokenError, match=r"mmtoken\.evaluation\.video"):
        _benchmarks("tiny-llava-video")
