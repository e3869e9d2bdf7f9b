"""Animated overlays of a stream: what enters the decoder of every frame, and what is held of the frames before."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmtoken.errors import InputError
from mmtoken.evaluation.overlay import View, draw
from mmtoken.streaming.report import WatchedStep

SIDE = 240
"""Pixels of a frame's longer side."""

_STRIP, _BAR, _MARGIN = 76, 40, 8
_PAPER, _INK, _HELD, _GONE, _NOW = "white", (40, 40, 40), (60, 110, 190), (205, 205, 205), (230, 140, 20)


@dataclass(frozen=True)
class Scene:
    """A frame of a stream, with what became of it.

    Attributes:
        frame: uint8[H, W, 3], the first of its step.
        step: what the stream did with it.
    """

    frame: np.ndarray[Any, Any]
    step: WatchedStep


def paint(scenes: Sequence[Scene]) -> list[Image.Image]:
    """A picture per scene: kept tokens bright and outlined; below a bar for every step so far, as high as what is held.

    Raises:
        InputError: there are no scenes.
    """
    if not scenes:
        raise InputError("scenes is empty; push frames and note `stream.last_step` after each.")
    highest = max(rows for scene in scenes for rows in scene.step.held.values())
    return [_picture(scene, highest, scenes[-1].step.number + 1) for scene in scenes]


def encode(pictures: Sequence[Image.Image], milliseconds: int = 500, last: int = 2500) -> bytes:
    """The pictures as an animated GIF that repeats; the last one stays longer."""
    palette = [picture.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for picture in pictures]
    times = [milliseconds] * (len(palette) - 1) + [last]
    buffer = io.BytesIO()
    palette[0].save(buffer, "GIF", save_all=True, append_images=palette[1:], duration=times, loop=0)
    return buffer.getvalue()


def _picture(scene: Scene, highest: int, steps: int) -> Image.Image:
    image, step = Image.fromarray(scene.frame), scene.step
    scale = SIDE / max(image.size)
    view = View((0.0, 0.0, 1.0, 1.0), *step.grid, frozenset(step.kept))
    shown = draw(image, [view]).resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    sheet = Image.new("RGB", (shown.width, shown.height + _STRIP), _PAPER)
    sheet.paste(shown, (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    total = step.grid[0] * step.grid[1]
    line = f"{step.time:.0f} s: {len(step.kept)} of {total} tokens enter, {sum(step.held.values())} held"
    top = shown.height + 6
    pen.text((_MARGIN, top), line, _INK, font)
    floor, wide = sheet.height - 6, (sheet.width - 2 * _MARGIN) / steps
    for number in range(step.number + 1):
        left = _MARGIN + number * wide
        right = max(left + 1, left + wide - 1)
        rows = step.held.get(number, 0)
        color = _GONE if not rows else _NOW if number == step.number else _HELD
        pen.rectangle((left, floor - max(2, _BAR * rows / highest), right, floor), color)
    return sheet
