"""Methods with a state per video: real streams leave of every step what `generate()` leaves of the whole video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import mmtoken
from mmtoken.compressors import Context, DyCoke, STCPruner
from mmtoken.tokens import VisualTokens
from tests.streaming.offline import FAMILIES, clip, inputs, parts, push_all

METHODS: dict[str, Any] = {
    "stcpruner": (STCPruner, {"keep": 2}),
    "stcpruner-keep": (STCPruner, {"keep": 3, "positions": "keep"}),
    "stcpruner-dual": (STCPruner, {"keep": 0.5, "score": "dual_anchor", "memory": "window", "window": 2}),
    "dycoke": (DyCoke, {"keep": 1}),
}


def watched(kind: type[Any], settings: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    """The method, and where it notes what it leaves: per call, `source` of an item's tokens."""

    @dataclass(frozen=True)
    class Watched(kind):  # type: ignore[misc]
        seen: list[list[int]] = field(default_factory=list, compare=False)

        def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
            left = super().llm_input(tokens, ctx)
            self.seen.append(left.kept()[0].tolist())
            return left

    method = Watched(**settings)
    return method, method.seen


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_leaves_what_generate_does(family: str, name: str) -> None:
    model, processor = parts(family)
    video = clip(6)  # longer ones are resized otherwise than their steps are (Qwen3-VL)
    method, offline = watched(*METHODS[name])
    made = inputs(processor, video, "What happens?")
    with torch.no_grad(), mmtoken.compress(model, method):
        model(**made)
    (whole,) = offline
    method, steps = watched(*METHODS[name])
    with mmtoken.stream(model, processor, method, memory_tokens=10_000) as live:
        push_all(live, video[:2])
        live.ask("And now?")
        push_all(live, video[2:], 2)
        first = list(steps)
        live.reset()
        steps.clear()
        push_all(live, video)
        assert steps == first
    tokens = int((made["input_ids"] == model.config.video_token_id).sum())
    length = tokens // len(first)  # a newline at the end of the video is the remainder
    assert [number * length + place for number, step in enumerate(first) for place in step] == whole


@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_a_question_on_a_frame_without_its_pair_changes_nothing(family: str) -> None:
    model, processor = parts(family)
    video = clip(7)
    kept = []
    for asked in (False, True):
        method, steps = watched(STCPruner, {"keep": 2})
        with mmtoken.stream(model, processor, method, memory_tokens=10_000) as live:
            for number, frame in enumerate(video):
                live.push(frame, number / 2)
                if asked:
                    before = len(steps)
                    live.ask("And now?")
                    assert len(steps) - before == 1 - number % 2  # encoded for the question alone
                    del steps[before:]
        kept.append(list(steps))
    assert kept[0] == kept[1]
