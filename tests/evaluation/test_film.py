"""Films of streams say what the stream did."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import mmtoken
from mmtoken.compressors import DivPrune
from mmtoken.datasets.moving_shapes import MovingShapes
from mmtoken.errors import InputError
from mmtoken.evaluation.film import SIDE, Scene, encode, paint
from mmtoken.streaming.report import WatchedStep


def step(number: int, kept: tuple[int, ...], held: dict[int, int]) -> WatchedStep:
    return WatchedStep(number, float(number), (2, 2), kept, held)


def test_kept_tokens_are_bright_and_what_has_left_is_grey() -> None:
    white = np.full((40, 40, 3), 255, np.uint8)
    scenes = [Scene(white, step(0, (0,), {0: 1})), Scene(white, step(1, (3,), {1: 1}))]
    first, second = paint(scenes)
    quarter = SIDE // 4
    assert first.getpixel((quarter, quarter)) == (255, 255, 255)
    assert max(first.getpixel((3 * quarter, 3 * quarter))) < 128
    assert second.getpixel((3 * quarter, 3 * quarter)) == (255, 255, 255)
    bars = [second.getpixel((x, second.height - 7)) for x in (quarter, 3 * quarter)]
    assert len(set(bars[0])) == 1 and len(set(bars[1])) > 1  # grey: gone; coloured: held


def test_a_film_has_a_picture_per_scene() -> None:
    rng = np.random.default_rng(0)
    scenes = [Scene(rng.integers(0, 255, (24, 32, 3), np.uint8), step(n, (n,), {n: 1})) for n in range(3)]
    with Image.open(io.BytesIO(encode(paint(scenes)))) as film:
        assert film.n_frames == 3 and film.info["loop"] == 0


def test_no_scenes_are_refused() -> None:
    with pytest.raises(InputError, match="scenes is empty"):
        paint([])


def test_a_stream_tells_what_became_of_its_last_step() -> None:
    model, processor = mmtoken.load("tiny-llava-video")
    clip = MovingShapes(3, 1, (6, 6))[0]
    with mmtoken.stream(model, processor, DivPrune(keep=3), memory_tokens=6) as live:
        assert live.last_step is None
        for frame, seconds in zip(clip.frames, clip.times, strict=True):
            live.push(frame, float(seconds))
        last = live.last_step
        assert last is not None
        assert (last.number, last.time, last.grid, last.held) == (5, float(clip.times[-1]), (4, 4), {4: 3, 5: 3})
        assert len(last.kept) == 3 and set(last.kept) <= set(range(16)) and sorted(last.kept) == list(last.kept)
        live.ask("how many objects were there?")
        assert live.last_step == last
        live.reset()
        assert live.last_step is None
    with mmtoken.stream(model, processor) as dense:
        dense.push(clip.frames[0], 0.0)
        assert dense.last_step is not None and dense.last_step.kept == tuple(range(16))
