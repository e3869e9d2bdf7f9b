"""Pictures of what a compressor kept: kept patches bright and outlined, the rest dimmed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance

from mmtoken.engine.report import Report
from mmtoken.errors import InputError, UnsupportedError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of a picture's width and height."""

Picture = Image.Image | Sequence[Image.Image]
"""An image, or the frames of a video."""

_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_OUTLINE = (255, 214, 64)
_MINIMUM, _MAXIMUM = 384, 1024


@dataclass(frozen=True)
class View:
    """A rectangle of a picture that one grid of visual tokens covers.

    Attributes:
        box: the rectangle; it may reach beyond the picture where the processor pads.
        rows, columns: of the grid.
        kept: raster indices of the tokens that are left.
    """

    box: Box
    rows: int
    columns: int
    kept: frozenset[int]


def draw(picture: Image.Image, views: Sequence[View]) -> Image.Image:
    """The picture with kept tokens bright and outlined. What no view covers, the model does not see: nearly black.

    Small pictures are enlarged and large ones reduced, to 384 to 1024 pixels along the longer side.
    """
    longest = max(picture.size)
    scale = min(max(longest, _MINIMUM), _MAXIMUM) / longest
    width, height = (max(1, round(side * scale)) for side in picture.size)
    bright = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    grey = ImageEnhance.Color(bright).enhance(0.25)
    result = ImageEnhance.Brightness(grey).enhance(0.1)
    dimmed = ImageEnhance.Brightness(grey).enhance(0.35)
    cells: list[tuple[int, int, int, int]] = []
    for view in views:
        left, top, right, bottom = view.box
        across = [round((left + (right - left) * i / view.columns) * width) for i in range(view.columns + 1)]
        down = [round((top + (bottom - top) * i / view.rows) * height) for i in range(view.rows + 1)]
        _paste(result, dimmed, (across[0], down[0], across[-1], down[-1]))
        for index in sorted(view.kept):
            row, column = divmod(index, view.columns)
            cells.append((across[column], down[row], across[column + 1], down[row + 1]))
    for cell in cells:
        _paste(result, bright, cell)
    pen = ImageDraw.Draw(result)
    for left_, top_, right_, bottom_ in cells:
        if right_ - left_ >= 3 and bottom_ - top_ >= 3:
            pen.rectangle((left_, top_, right_ - 1, bottom_ - 1), outline=_OUTLINE)
    return result


def _paste(onto: Image.Image, source: Image.Image, cell: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = cell
    inside = max(left, 0), max(top, 0), min(right, onto.width), min(bottom, onto.height)
    if inside[0] < inside[2] and inside[1] < inside[3]:
        onto.paste(source.crop(inside), inside[:2])


def side_by_side(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """One picture from several, in a row, on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def overlays(report: Report, pictures: Sequence[Picture], processor: Any) -> list[Image.Image]:
    """One overlay per picture of the last prefill.

    Images that the model sees twice (whole, and in tiles) give two panels side by side; videos give one per temporal
    step. Merged tokens are drawn where their representative lies.

    Args:
        report: `session.report` of a call with these pictures.
        pictures: what went into the processor, in prompt order; a video is a sequence of its frames.
        processor: the model's processor; it knows how pictures are cropped and tiled.

    Raises:
        InputError: the report's items do not fit the pictures.
        UnsupportedError: the tokens of an item lie on no grid that is known.
    """
    tiles = _tiles(pictures, processor, len(report.tokens_in))
    expected = sum(math.prod(grid) + 1 if grid else 1 for grid in tiles)
    if len(report.tokens_in) != expected:
        raise InputError(
            f"pictures are {len(pictures)}, which make {expected} items, but the report has {len(report.tokens_in)}; "
            "give the pictures of the call that was reported last, in prompt order (without beams)."
        )
    grids = _grids(report)
    results, item = [], 0
    for picture, tiling in zip(pictures, tiles, strict=True):
        if not isinstance(picture, Image.Image):
            results.append(_film(picture, grids[item], report, item))
            item += 1
        elif tiling:
            results.append(_tiled(picture, tiling, grids, report, item))
            item += math.prod(tiling) + 1
        else:
            results.append(_image(picture, _crop_box(picture, processor), grids[item], report, item))
            item += 1
    return results


Shape = tuple[int, int, int]
"""(frames, rows, columns)."""


def _grids(report: Report) -> list[list[Shape]]:
    """Per item the grids that its tokens fill one after the other, separators left out."""
    tokens = report.tokens
    if tokens is None:
        raise InputError("report has no tokens; overlays are drawn from the report of a whole model's prefill.")
    shapes: list[list[Shape]] = []
    for item, total in enumerate(report.tokens_in):
        grid = tokens.grid[item]
        if grid is not None and math.prod(grid) == total:
            shapes.append([grid])
            continue
        # Any-resolution: a square view of the whole image, then rows that each end in a newline token.
        ends = _separators(report, item)
        columns = ends[1] - ends[0] - 1 if len(ends) > 1 else 0
        side = math.isqrt(max(0, ends[0] - columns)) if columns else 0
        if not columns or side * side + len(ends) * columns != total or _gaps(ends) != {columns + 1}:
            raise UnsupportedError(f"tokens of item {item} lie on no grid that is known, so they cannot be drawn.")
        shapes.append([(1, side, side), (1, len(ends), columns)])
    return shapes


def _gaps(ends: list[int]) -> set[int]:
    return {b - a for a, b in itertools.pairwise(ends)}


def _separators(report: Report, item: int) -> list[int]:
    """Original indices of an item's separators, ascending."""
    tokens = report.tokens
    assert tokens is not None
    flags = tokens.valid[item] & tokens.protected[item]
    return sorted(int(source) for source in tokens.source[item][flags].tolist())


def _kept(report: Report, item: int) -> list[int]:
    """Raster indices of an item's kept tokens, separators not counted."""
    separators = _separators(report, item)
    return [index - sum(s < index for s in separators) for index in map(int, report.kept[item].tolist())]


def _view(kept: Sequence[int], shape: Shape, start: int, box: Box) -> View:
    """The view of the frame whose tokens begin at raster index `start`."""
    _, rows, columns = shape
    inside = frozenset(index - start for index in kept if start <= index < start + rows * columns)
    return View(box, rows, columns, inside)


def _image(picture: Image.Image, box: Box, shapes: list[Shape], report: Report, item: int) -> Image.Image:
    kept, start, panels = _kept(report, item), 0, []
    for shape in shapes:
        panels.append(draw(picture, [_view(kept, shape, start, box)]))
        start += math.prod(shape)
    return side_by_side(panels)


def _film(frames: Sequence[Image.Image], shapes: list[Shape], report: Report, item: int) -> Image.Image:
    """A panel per temporal step, each with the first of the frames that the step holds."""
    shape, kept = shapes[0], _kept(report, item)
    area = shape[1] * shape[2]
    return side_by_side(
        [
            draw(frames[step * len(frames) // shape[0]], [_view(kept, shape, step * area, _WHOLE)])
            for step in range(shape[0])
        ]
    )


def _tiled(
    picture: Image.Image, tiling: tuple[int, int], grids: list[list[Shape]], report: Report, item: int
) -> Image.Image:
    """A panel of the tiles, and one of the whole image that comes after them."""
    rows, columns = tiling
    views = []
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        views.append(_view(_kept(report, item + number), grids[item + number][0], 0, box))
    whole = item + rows * columns
    return side_by_side(
        [draw(picture, views), draw(picture, [_view(_kept(report, whole), grids[whole][0], 0, _WHOLE)])]
    )


def _tiles(pictures: Sequence[Picture], processor: Any, items: int) -> list[tuple[int, int] | None]:
    """(rows, columns) of the tiles that an image is cut into, each an item of its own; None where it is not cut."""
    settings = processor.image_processor.to_dict()
    if not pictures or not settings.get("do_image_splitting") or items == len(pictures):
        return [None] * len(pictures)
    nested = [[picture] for picture in pictures]
    cut = processor.image_processor(nested, return_row_col_info=True)
    shapes = [(int(rows[0]), int(columns[0])) for rows, columns in zip(cut["rows"], cut["cols"], strict=True)]
    return [shape if math.prod(shape) else None for shape in shapes]


def _crop_box(picture: Image.Image, processor: Any) -> Box:
    """The part of an image that the processor leaves: all of it, or the middle (CLIP)."""
    settings = processor.image_processor.to_dict()
    if not settings.get("do_center_crop"):
        return _WHOLE
    width, height = picture.size
    square = max(width, height)
    # LLaVA's own image processor can pad to a square before it crops.
    padded_width, padded_height = (square, square) if settings.get("do_pad") else (width, height)
    shortest = (settings.get("size") or {}).get("shortest_edge")
    scale = shortest / min(padded_width, padded_height) if settings.get("do_resize") and shortest else 1.0
    crop = settings["crop_size"]
    reach_x, reach_y = crop["width"] / scale / width / 2, crop["height"] / scale / height / 2
    return 0.5 - reach_x, 0.5 - reach_y, 0.5 + reach_x, 0.5 + reach_y
