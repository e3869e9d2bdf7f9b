"""DocumentPages: generated pages of fields, tables, figures, running text and blank regions, with questions about them.

A page is a grid of 3 x 2 (portrait) or 2 x 3 (landscape) regions of 48 x 48 pixels. Every region holds one block and no
block leaves its region, so that cutting the page along the regions cuts no character in two:

- fields: one or two labels with a number of three digits under each ("TOTAL" over "472");
- table: 3 x 3 ruled cells with one digit or letter each;
- figure: three or four coloured bars of different heights;
- text: lines of small letters that nobody asks about;
- blank: paper.

Characters come from the font inside Pillow, in several sizes and three weights. Every answer follows from what was
drawn, and every question carries the boxes that hold its evidence. Everything is a pure function of `(seed, index)`
and of Pillow's font renderer. The task family follows document question answering (Mathew et al., DocVQA, 2021); pages
and code are new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mmtoken.datasets.shapes_qa import Box, Image, Question, enclosing
from mmtoken.errors import InputError

REGION = 48
"""Side of a region in pixels."""
LONG, SHORT = 3, 2
REGIONS = LONG * SHORT
PAGE_SIZE = LONG * REGION
"""Longer side of a page in pixels."""

KINDS = ("blank", "fields", "table", "figure", "text")
LABELS = ("total", "date", "tax", "code", "unit", "page", "ref", "item")
CELLS = "0123456789bcehklprtx"
BARS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 50, 50),
    "green": (50, 150, 70),
    "blue": (60, 90, 200),
    "orange": (235, 150, 40),
}
QUESTION_TYPES = ("field", "cell", "bar", "presence")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
WEIGHTS = ("plain", "bold", "wide")
TABLE_SIDE = 3
_CELL = REGION // TABLE_SIDE
_FILLER = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Character:
    """A drawn character that can be asked for, and its box."""

    text: str
    box: Box


@dataclass(frozen=True)
class Region:
    """One region of a page.

    Attributes:
        kind: one of `KINDS`.
        box: where it lies on the page.
        characters: characters of labels, values and cells, not of running text.
        text: boxes of the lines of running text.
        bars: colour and box of the bars of a figure, from left to right.
        fields: label, value, and the box around both.
        cells: text of the cells of a table, row by row.
    """

    kind: str
    box: Box
    characters: tuple[Character, ...] = ()
    text: tuple[Box, ...] = ()
    bars: tuple[tuple[str, Box], ...] = ()
    fields: tuple[tuple[str, str, Box], ...] = ()
    cells: str = ""


@dataclass(frozen=True)
class Page:
    """One page with its questions: `image` uint8[rows * 48, columns * 48, 3], regions row by row."""

    image: Image
    rows: int
    columns: int
    regions: tuple[Region, ...]
    questions: tuple[Question, ...] = ()

    def ink(self) -> NDArray[np.float64]:
        """Share of dark or coloured pixels in each region, float[regions]: pixels more than 40 below the paper."""
        darkest = self.image.min(-1).astype(np.int64)
        paper = np.median(darkest)
        shares = [np.mean(darkest[y0:y1, x0:x1] < paper - 40) for x0, y0, x1, y1 in (r.box for r in self.regions)]
        return np.asarray(shares, dtype=np.float64)


@dataclass(frozen=True)
class DocumentPages(Sequence[Page]):
    """`size` pages; `DocumentPages(seed=0, size=100)[7]` is a function of the seed, the index and the settings alone.

    Attributes:
        seed: seeds of training, validation and test must differ.
        size: number of pages.
        questions: questions asked about each page.
        mix: how often each question type is asked, relative to the others; types that a page cannot answer are skipped.
    """

    seed: int
    size: int
    questions: int = 8
    mix: Mapping[str, float] = field(default_factory=lambda: {"field": 3.0, "cell": 3.0, "bar": 1.0, "presence": 1.0})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.mix) - set(QUESTION_TYPES))
        if unknown:
            raise InputError(f"mix: unknown question types {unknown}; use some of {list(QUESTION_TYPES)}.")
        if min(self.mix.values(), default=0.0) < 0 or self.mix.get("field", 0.0) <= 0:
            raise InputError(
                f"mix: got {dict(self.mix)}; give weights >= 0 and more than 0 to 'field', the one type that every "
                "page can answer."
            )
        if self.size < 0 or self.questions < 1:
            raise InputError(f"size={self.size}, questions={self.questions}: need size >= 0 and questions >= 1.")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Page:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng((self.seed, index))
        page = draw_page(rng)
        types = list(self.mix)
        weights = np.array([self.mix[t] for t in types], dtype=np.float64)
        weights /= weights.sum()
        asked: list[Question] = []
        tries = 0
        while len(asked) < self.questions:
            question = ask(rng, types[int(rng.choice(len(types), p=weights))], page)
            tries += 1
            # The same question twice teaches nothing; repeats come only where a page has run out of others.
            if question is not None and (question not in asked or tries > 8 * self.questions):
                asked.append(question)
        return Page(page.image, page.rows, page.columns, page.regions, tuple(asked))

    def __iter__(self) -> Iterator[Page]:
        return (self[i] for i in range(self.size))


@cache
def glyph(character: str, size: int, weight: str) -> NDArray[np.float32]:
    """Coverage of a capital letter or digit, float32[height, width], cropped to its ink.

    Args:
        character: a letter or digit.
        size: font size in pixels; capitals are about 0.7 of it high.
        weight: one of `WEIGHTS`; bold is one pixel thicker, wide is a fifth wider.
    """
    font = ImageFont.load_default(size)
    canvas = PILImage.new("L", (3 * size, 2 * size), 0)
    pen = ImageDraw.Draw(canvas)
    pen.text((size, size // 4), character.upper(), font=font, fill=255)
    if weight == "wide":
        canvas = canvas.resize((round(3.6 * size), 2 * size), PILImage.Resampling.BILINEAR)
    mask: NDArray[np.float32] = np.asarray(canvas, dtype=np.float32) / np.float32(255)
    if weight == "bold":
        shifted = np.pad(mask, ((0, 0), (1, 0)))[:, :-1] * np.float32(0.8)
        mask = np.maximum(mask, shifted).astype(np.float32)
    rows, columns = np.flatnonzero(mask.max(1) > 0.1), np.flatnonzero(mask.max(0) > 0.1)
    cropped: NDArray[np.float32] = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cropped


def draw_page(rng: np.random.Generator) -> Page:
    """A page without questions."""
    rows, columns = (LONG, SHORT) if rng.random() < 0.5 else (SHORT, LONG)
    paper = rng.uniform(225, 250)
    ink = np.zeros((rows * REGION, columns * REGION), dtype=np.float32)
    colour = np.zeros((*ink.shape, 3), dtype=np.float32)
    colour += rng.uniform(10, 70)
    kinds = _kinds(rng)
    labels = [LABELS[i] for i in rng.permutation(len(LABELS))]
    regions = []
    for i, kind in enumerate(kinds):
        x, y = i % columns * REGION, i // columns * REGION
        regions.append(_DRAW[kind](rng, _Canvas(ink, colour, x, y), labels))
    drawn = paper * (1 - ink[..., None]) + colour * ink[..., None]
    noisy = drawn + rng.standard_normal((*ink.shape, 1), dtype=np.float32) * 2
    return Page(np.clip(noisy, 0, 255).astype(np.uint8), rows, columns, tuple(regions))


def _kinds(rng: np.random.Generator) -> list[str]:
    kinds = ["fields"]
    if rng.random() < 0.5:
        kinds.append("fields")
    if rng.random() < 0.85:
        kinds.append("table")
    if rng.random() < 0.6:
        kinds.append("figure")
    while len(kinds) < REGIONS:
        kinds.append("blank" if rng.random() < 0.55 else "text")
    return [kinds[i] for i in rng.permutation(REGIONS)]


@dataclass(frozen=True)
class _Canvas:
    """Ink float32[H, W] and colour float32[H, W, 3] of the page, and the corner of the region that is drawn."""

    ink: NDArray[np.float32]
    colour: NDArray[np.float32]
    x: int
    y: int

    @property
    def box(self) -> Box:
        return (self.x, self.y, self.x + REGION, self.y + REGION)

    def stamp(self, mask: NDArray[np.float32], x: int, y: int) -> Box:
        """Put a mask at (x, y) of the region; returns its box on the page."""
        height, width = mask.shape
        x0, y0 = self.x + x, self.y + y
        area = self.ink[y0 : y0 + height, x0 : x0 + width]
        np.maximum(area, mask, out=area)
        return (x0, y0, x0 + width, y0 + height)

    def fill(self, x: int, y: int, width: int, height: int, colour: tuple[int, int, int] | None = None) -> Box:
        box = self.stamp(np.ones((height, width), dtype=np.float32), x, y)
        if colour is not None:
            self.colour[box[1] : box[3], box[0] : box[2]] = colour
        return box


def _word(
    rng: np.random.Generator, canvas: _Canvas, text: str, size: int, weight: str, top: int, height: int
) -> list[Character]:
    """Write `text` on a line of the region: left edge at random, letters on a common base line."""
    masks = [glyph(c, size, weight) for c in text]
    width = sum(m.shape[1] for m in masks) + len(masks) - 1
    x = 2 + int(rng.integers(max(1, REGION - 3 - width)))
    tallest = max(len(m) for m in masks)
    y = top + int(rng.integers(max(1, height - tallest + 1)))
    written = []
    for character, mask in zip(text, masks, strict=True):
        written.append(Character(character, canvas.stamp(mask, x, y + tallest - len(mask))))
        x += mask.shape[1] + 1
    return written


def _blank(rng: np.random.Generator, canvas: _Canvas, labels: list[str]) -> Region:
    return Region("blank", canvas.box)


def _fields(rng: np.random.Generator, canvas: _Canvas, labels: list[str]) -> Region:
    slots = [int(s) for s in rng.permutation(2)[: int(rng.integers(1, 3))]]
    weight = WEIGHTS[int(rng.integers(len(WEIGHTS)))]
    characters: list[Character] = []
    fields = []
    for slot in sorted(slots):
        label = labels.pop()
        value = "".join(str(d) for d in rng.integers(0, 10, 3))
        head = _word(rng, canvas, label, 11, "plain", slot * 24 + 1, 9)
        body = _word(rng, canvas, value, int(rng.integers(14, 16)), weight, slot * 24 + 11, 12)
        characters += head + body
        fields.append((label, value, enclosing([c.box for c in head + body])))
    return Region("fields", canvas.box, tuple(characters), fields=tuple(fields))


def _table(rng: np.random.Generator, canvas: _Canvas, labels: list[str]) -> Region:
    weight = WEIGHTS[int(rng.integers(len(WEIGHTS)))]
    cells = "".join(CELLS[int(i)] for i in rng.integers(0, len(CELLS), TABLE_SIDE**2))
    for line in range(TABLE_SIDE + 1):
        at = min(line * _CELL, REGION - 1)
        canvas.fill(0, at, REGION, 1)
        canvas.fill(at, 0, 1, REGION)
    characters = []
    for i, text in enumerate(cells):
        mask = glyph(text, int(rng.integers(14, 16)), weight)
        room_y, room_x = (_CELL - 2 - side for side in mask.shape)
        x = i % TABLE_SIDE * _CELL + 2 + int(rng.integers(max(1, room_x)))
        y = i // TABLE_SIDE * _CELL + 2 + int(rng.integers(max(1, room_y)))
        characters.append(Character(text, canvas.stamp(mask, x, y)))
    return Region("table", canvas.box, tuple(characters), cells=cells)


def _figure(rng: np.random.Generator, canvas: _Canvas, labels: list[str]) -> Region:
    count = int(rng.integers(3, 5))
    names = [list(BARS)[i] for i in rng.permutation(len(BARS))[:count]]
    # Heights differ by at least 5 px, so that no answer hangs on a pixel or two.
    heights = 8 + 5 * rng.permutation(8)[:count] + rng.integers(0, 2)
    pitch = (REGION - 6) // count
    canvas.fill(2, 2, 1, REGION - 4)
    canvas.fill(2, REGION - 3, REGION - 4, 1)
    bars = []
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        top = REGION - 3 - int(min(height, REGION - 5))
        box = canvas.fill(5 + i * pitch, top, pitch - 3, REGION - 3 - top, BARS[name])
        bars.append((name, box))
    return Region("figure", canvas.box, bars=tuple(bars))


def _text(rng: np.random.Generator, canvas: _Canvas, labels: list[str]) -> Region:
    lines = int(rng.integers(1, 7))
    start = int(rng.integers(0, 7 - lines))
    boxes = []
    for line in range(start, start + lines):
        x, y = 2, 1 + 8 * line
        end = REGION - 2 if line < start + lines - 1 else int(rng.integers(16, REGION - 1))
        # More letters than a line can hold, the narrowest ones included.
        for letter, gap in zip(rng.integers(0, len(_FILLER), REGION), rng.random(REGION) < 0.2, strict=True):
            mask = glyph(_FILLER[letter], 8, "plain")
            if x + mask.shape[1] > end:
                break
            _, _, right, bottom = canvas.stamp(mask, x, y)
            x += mask.shape[1] + (4 if gap else 1)
        boxes.append((canvas.x + 2, canvas.y + y, right, bottom))
    return Region("text", canvas.box, text=tuple(boxes))


_DRAW = {"blank": _blank, "fields": _fields, "table": _table, "figure": _figure, "text": _text}


def ask(rng: np.random.Generator, type: str, page: Page) -> Question | None:
    """A question of the type about the page, or None where the page cannot answer one."""
    return _ASK[type](rng, page)


def _field(rng: np.random.Generator, page: Page) -> Question | None:
    fields = [f for region in page.regions for f in region.fields]
    label, value, box = fields[int(rng.integers(len(fields)))]
    return Question("field", f"what is the {label}?", value, (box,))


def _cell(rng: np.random.Generator, page: Page) -> Question | None:
    table = next((r for r in page.regions if r.kind == "table"), None)
    if table is None:
        return None
    i = int(rng.integers(TABLE_SIDE**2))
    text = f"what is in row {i // TABLE_SIDE + 1} column {i % TABLE_SIDE + 1}?"
    return Question("cell", text, table.cells[i], (table.box,))


def _bar(rng: np.random.Generator, page: Page) -> Question | None:
    figure = next((r for r in page.regions if r.kind == "figure"), None)
    if figure is None:
        return None
    word = ("highest", "lowest")[int(rng.integers(2))]
    ordered = sorted(figure.bars, key=lambda bar: bar[1][1])
    name = ordered[0 if word == "highest" else -1][0]
    return Question("bar", f"what color is the {word} bar?", name, tuple(box for _, box in figure.bars))


def _presence(rng: np.random.Generator, page: Page) -> Question | None:
    kind = int(rng.integers(3))
    if kind < 2:
        name = ("table", "figure")[kind]
        found = [r.box for r in page.regions if r.kind == name]
    else:
        present = {label: box for region in page.regions for label, _, box in region.fields}
        absent = [label for label in LABELS if label not in present]
        pool = sorted(present) if rng.random() < 0.5 else absent
        name = pool[int(rng.integers(len(pool)))]
        found = [present[name]] if name in present else []
    evidence = tuple(found) or tuple(r.box for r in page.regions)
    return Question("presence", f"is there a {name}?", "yes" if found else "no", evidence)


_ASK = {"field": _field, "cell": _cell, "bar": _bar, "presence": _presence}
