"""A short stream, told: a generated clip is watched frame by frame in a bounded memory, then questions come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mmtoken.compressors import STCPruner
from mmtoken.compressors.base import Compressor
from mmtoken.datasets.moving_shapes import Clip, MovingShapes
from mmtoken.evaluation.film import Scene, encode, paint
from mmtoken.streaming.report import StreamReport
from mmtoken.streaming.stream import stream

SEED = 20261127
"""Of the clip that is shown; no sample of training or evaluation has it."""


@dataclass(frozen=True)
class Asked:
    """A question at the end of the stream: text, the right answer, and what the compressed and dense streams said."""

    question: str
    expected: str
    answer: str
    dense: str


@dataclass(frozen=True)
class StreamStory:
    """What the page shows of a stream.

    Attributes:
        compressor: what was attached.
        memory_tokens: the bound on held positions, of both streams.
        asked: the questions in order.
        film: an animated GIF.
        report, dense: measurements at the end, with the compressor and without.
        frames: how many were pushed.
    """

    compressor: Compressor
    memory_tokens: int
    asked: list[Asked]
    film: bytes
    report: StreamReport
    dense: StreamReport
    frames: int


def tell_stream(
    model: PreTrainedModel, processor: Any, *, frames: int = 32, keep: int = 4, memory_tokens: int = 128
) -> StreamStory:
    """Watch one clip with STC-Pruner, and once more without it under the same bound; some seconds of CPU time.

    Args:
        model, processor: tiny-llava-video.
        frames: of the clip.
        keep: tokens per frame.
        memory_tokens: the bound.
    """
    clip = MovingShapes(SEED, 1, (frames, frames), active=frames)[0]
    method = STCPruner(keep=keep)
    scenes, answers, report = _watch(model, processor, clip, method, memory_tokens)
    _, dense_answers, dense = _watch(model, processor, clip, None, memory_tokens)
    asked = [
        Asked(question.text, question.answer, answer, other)
        for question, answer, other in zip(clip.questions, answers, dense_answers, strict=True)
    ]
    return StreamStory(method, memory_tokens, asked, encode(paint(scenes)), report, dense, frames)


def _watch(
    model: PreTrainedModel, processor: Any, clip: Clip, method: Compressor | None, memory_tokens: int
) -> tuple[list[Scene], list[str], StreamReport]:
    scenes = []
    with stream(model, processor, method, memory_tokens=memory_tokens) as live:
        for frame, seconds in zip(clip.frames, clip.times, strict=True):
            live.push(frame, float(seconds))
            step = live.last_step
            assert step is not None
            scenes.append(Scene(frame, step))
        answers = [live.ask(question.text) for question in clip.questions]
        return scenes, answers, live.report
