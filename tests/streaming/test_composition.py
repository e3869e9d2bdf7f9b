"""STC-Cacher, STC-Pruner, VideoScan's carriers and ReKV's retrieval in one stream, each doing what it does alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import mmtoken
from mmtoken.compressors import Compressor, ReKV, Sequential, STCCacher, STCPruner, VideoScan
from mmtoken.streaming.framing import Rows
from mmtoken.streaming.stream import Stream
from tests.streaming.offline import FAMILIES, clip, parts, push_all

KEEP, BANK, FRAMES = 3, 3, 10


def watch(family: str, *methods: Compressor) -> tuple[Stream, list[Rows]]:
    """A stream of these methods after `FRAMES` frames, and the rows of its steps."""
    model, processor = parts(family)
    live = mmtoken.stream(model, processor, Sequential(methods))
    steps: list[Rows] = []
    encode = live._framing.encode

    @functools.wraps(encode)
    def noting(*args: Any) -> Rows:
        steps.append(encode(*args))
        return steps[-1]

    live._framing.encode = noting  # type: ignore[method-assign]
    push_all(live, clip(FRAMES))
    return live, steps


def two(positions: Any) -> tuple[Compressor, ...]:
    return STCCacher(keep=0.5, positions=positions), STCPruner(keep=KEEP, positions=positions)


def four(positions: Any) -> tuple[Compressor, ...]:
    carriers = VideoScan(extra_kv=1, bank=BANK, carrier="visual", positions=positions)
    return *two(positions), carriers, ReKV(keep=2, positions=positions)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_four_in_one_stream(family: str, positions: str) -> None:
    live, pruned = watch(family, *two(positions))
    live.close()
    live, steps = watch(family, *four(positions))
    with live:
        assert len(steps) == len(pruned) == FRAMES // live._framing.frames
        for before, after in zip(pruned, steps, strict=True):
            # What the first two leave, and one carrier behind everything: the mean of the tokens that were left.
            assert len(after) == len(before) + 1
            assert torch.equal(after.embeddings[:-1], before.embeddings)
            tokens = before.embeddings if before.visual is None else before.embeddings[before.visual]
            if family == "llava_video":
                tokens = tokens[~(tokens == live.model.base_model.image_newline).all(-1)]
            torch.testing.assert_close(after.embeddings[-1], tokens.mean(0))
            assert torch.equal(after.relative[:, :-1], before.relative)
            assert bool((after.relative[:, -1] >= after.relative[:, :-1].amax(1)).all())
            assert after.extent == before.extent + 1
            assert [len(layer) for layer in after.deepstack] == [len(layer) for layer in before.deepstack]
        held, report = live._memory.held, live.report
        assert len(held) == BANK - 1 and report.kv_tokens == 2 * (BANK - 1)  # a carrier and a row that it looked at
        assert report.stored_tokens == 2 * (len(steps) - len(held))
        before_question = [key.clone() for step in held for key in step.keys]
        assert isinstance(live.ask("What happens?", max_new_tokens=2), str)
        assert _same(before_question, [key for step in live._memory.held for key in step.keys])


def _same(some: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, other, strict=True))
