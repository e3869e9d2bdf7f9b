"""ShapesQA: generated scenes with grounded questions, the data the tiny zoo models learn from.

A scene is a 96 x 96 picture: a noisy grey-ish gradient, up to six coloured shapes (8 colours x 6 shapes), each inside
its own cell of a 4 x 4 grid, and a three-digit number drawn with a 5 x 7 font. Eight types of question are asked about
it; every answer follows from the boxes, and every question carries the boxes that hold its evidence.

Everything is a pure function of `(seed, index)`: no file, no download, no state, so any sample of any run can be
generated again. The task family follows CLEVR (Johnson et al., 2017) and the adversarial negatives of POPE
(Li et al., 2023); the pictures and code are new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mmtoken.errors import InputError

IMAGE_SIZE = 96
CELL = 24
GRID = IMAGE_SIZE // CELL

COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles"} | {
    "cross": "crosses",
    "diamond": "diamonds",
    "ring": "rings",
}
RELATIONS = ("left of", "right of", "above", "below")
SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost")
QUESTION_TYPES = ("colour", "shape", "existence", "counting", "relation", "beside", "superlative", "number")

NUMBER_QUESTION = "read the number."
DIGIT_SCALE = 2
DIGIT_GAP = 2
MIN_OBJECT, MAX_OBJECT = 12, 16
# Two objects closer than this along the asked axis are never compared: the answer would hang on a pixel or two.
RELATION_MARGIN = 10.0
SUPERLATIVE_MARGIN = 6.0

_GLYPHS = (
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100010001000100011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
)

T = TypeVar("T")
Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x1 and y1 are outside."""


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape."""

    color: str
    shape: str
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        """x, y in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def row(self) -> int:
        """Row of the 4 x 4 grid; an object never leaves its cell."""
        return self.box[1] // CELL

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """One question with its answer, its type (one of `QUESTION_TYPES`) and the boxes that hold the evidence."""

    type: str
    text: str
    answer: str
    evidence: tuple[Box, ...]


@dataclass(frozen=True)
class Sample:
    """One picture with its questions.

    `image` is uint8[96, 96, 3]. `number` and `digit_boxes` run from left to right.
    """

    image: Image
    questions: tuple[Question, ...]
    objects: tuple[SceneObject, ...] = ()
    number: tuple[int, ...] = ()
    digit_boxes: tuple[Box, ...] = ()

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Boxes of everything drawn on the background: objects, then the number as one box."""
        return tuple(o.box for o in self.objects) + ((enclosing(self.digit_boxes),) if self.digit_boxes else ())


@dataclass(frozen=True)
class ShapesQA(Sequence[Sample]):
    """`size` scenes; `ShapesQA(seed=0, size=100)[7]` is a function of the seed, the index and the settings alone.

    Attributes:
        seed: seeds of training, validation and test must differ.
        size: number of scenes.
        questions: questions asked about each scene.
        min_objects: fewest shapes in a scene.
        max_objects: most shapes in a scene.
        mix: how often each question type is asked, relative to the others; types that a scene cannot answer are
            skipped.
    """

    seed: int
    size: int
    questions: int = 8
    min_objects: int = 3
    max_objects: int = 6
    mix: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(QUESTION_TYPES, 1.0))

    def __post_init__(self) -> None:
        unknown = sorted(set(self.mix) - set(QUESTION_TYPES))
        if unknown:
            raise InputError(f"mix: unknown question types {unknown}; use some of {list(QUESTION_TYPES)}.")
        if min(self.mix.values(), default=0.0) < 0 or self.mix.get("number", 0.0) <= 0:
            raise InputError(
                f"mix: got {dict(self.mix)}; give weights >= 0 and more than 0 to 'number', "
                "the one type that every scene can answer."
            )
        most = GRID * GRID - 2
        if not 1 <= self.min_objects <= self.max_objects <= most:
            raise InputError(
                f"min_objects={self.min_objects}, max_objects={self.max_objects}: "
                f"need 1 <= min_objects <= max_objects <= {most}."
            )
        if self.size < 0 or self.questions < 1:
            raise InputError(f"size={self.size}, questions={self.questions}: need size >= 0 and questions >= 1.")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng((self.seed, index))
        scene = draw_scene(rng, self.min_objects, self.max_objects)
        types = list(self.mix)
        weights = np.array([self.mix[t] for t in types], dtype=np.float64)
        weights /= weights.sum()
        asked: list[Question] = []
        tries = 0
        while len(asked) < self.questions:
            question = ask(rng, types[int(rng.choice(len(types), p=weights))], scene)
            tries += 1
            # The same question twice teaches nothing; repeats come only where a scene has run out of others.
            if question is not None and (question not in asked or tries > 8 * self.questions):
                asked.append(question)
        return Sample(scene.image, tuple(asked), scene.objects, scene.number, scene.digit_boxes)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(self.size))


def enclosing(boxes: Sequence[Box]) -> Box:
    """Smallest box around all of `boxes`."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def majority_baselines(samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy, per question type, of always giving the type's most frequent answer."""
    answers: dict[str, Counter[str]] = {}
    for sample in samples:
        for question in sample.questions:
            answers.setdefault(question.type, Counter())[question.answer] += 1
    return {t: max(c.values()) / c.total() for t, c in answers.items()}


@cache
def sprite(shape: str, size: int) -> NDArray[np.float32]:
    """Mask of a shape, float32[size, size], 1 inside."""
    y, x = np.mgrid[0:size, 0:size]
    dx, dy = ((v - (size - 1) / 2) / (size / 2) for v in (x, y))
    radius = np.hypot(dx, dy)
    masks = {
        "circle": radius <= 1,
        "square": (np.abs(dx) <= 0.88) & (np.abs(dy) <= 0.88),
        "triangle": np.abs(dx) <= (dy + 1) / 2,
        "cross": (np.abs(dx) <= 0.33) | (np.abs(dy) <= 0.33),
        "diamond": np.abs(dx) + np.abs(dy) <= 1,
        "ring": (radius <= 1) & (radius >= 0.55),
    }
    return np.asarray(masks[shape], dtype=np.float32)


@cache
def glyph(digit: int) -> NDArray[np.float32]:
    """Mask of a digit, float32[7 * scale, 5 * scale]."""
    bits = np.array([int(c) for c in _GLYPHS[digit]], dtype=np.float32).reshape(7, 5)
    return np.kron(bits, np.ones((DIGIT_SCALE, DIGIT_SCALE), dtype=np.float32))


def draw_scene(rng: np.random.Generator, min_objects: int, max_objects: int) -> Sample:
    """A scene without questions."""
    axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-25, 25, 2).astype(np.float32)
    image = rng.uniform(50, 110, 3).astype(np.float32) + (axis * slope_x)[None, :, None]
    image = image + (axis * slope_y)[:, None, None]
    image = image + rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) * 6

    # The number takes two neighbouring cells.
    row, column = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
    taken = {(row, column), (row, column + 1)}
    height, width = glyph(0).shape
    step = width + DIGIT_GAP
    x0 = column * CELL + int(rng.integers(2 * CELL - 3 * step + DIGIT_GAP + 1))
    y0 = row * CELL + int(rng.integers(CELL - height + 1))
    number = tuple(int(d) for d in rng.integers(0, 10, 3))
    brightness = float(rng.uniform(225, 255))
    digit_boxes: list[Box] = []
    for k, digit in enumerate(number):
        box = (x0 + k * step, y0, x0 + k * step + width, y0 + height)
        _paint(image, box, glyph(digit), np.full(3, brightness, dtype=np.float32))
        digit_boxes.append(box)

    cells = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in taken]
    count = int(rng.integers(min_objects, max_objects + 1))
    kinds = rng.permutation(len(COLORS) * len(SHAPES))[:count]  # no two objects alike, so names are unambiguous
    objects: list[SceneObject] = []
    for kind, cell in zip(kinds, rng.permutation(len(cells))[:count], strict=True):
        row, column = cells[int(cell)]
        color, shape = list(COLORS)[int(kind) // len(SHAPES)], SHAPES[int(kind) % len(SHAPES)]
        size = int(rng.integers(MIN_OBJECT, MAX_OBJECT + 1))
        x0 = column * CELL + int(rng.integers(CELL - size + 1))
        y0 = row * CELL + int(rng.integers(CELL - size + 1))
        box = (x0, y0, x0 + size, y0 + size)
        shade = np.array(COLORS[color], dtype=np.float32) + np.float32(rng.uniform(-15, 15))
        _paint(image, box, sprite(shape, size), shade)
        objects.append(SceneObject(color, shape, box))
    return Sample(np.clip(image, 0, 255).astype(np.uint8), (), tuple(objects), number, tuple(digit_boxes))


def _paint(image: NDArray[np.float32], box: Box, mask: NDArray[np.float32], color: NDArray[np.float32]) -> None:
    x0, y0, x1, y1 = box
    area = image[y0:y1, x0:x1]
    image[y0:y1, x0:x1] = area * (1 - mask[..., None]) + color * mask[..., None]


def ask(rng: np.random.Generator, type: str, scene: Sample) -> Question | None:
    """A question of the type about the scene, or None where the scene cannot answer one."""
    return _ASK[type](rng, scene)


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _colour(rng: np.random.Generator, scene: Sample) -> Question | None:
    shapes = Counter(o.shape for o in scene.objects)
    alone = [o for o in scene.objects if shapes[o.shape] == 1]
    if not alone:
        return None
    o = _pick(rng, alone)
    return Question("colour", f"what color is the {o.shape}?", o.color, (o.box,))


def _shape(rng: np.random.Generator, scene: Sample) -> Question | None:
    colors = Counter(o.color for o in scene.objects)
    alone = [o for o in scene.objects if colors[o.color] == 1]
    if not alone:
        return None
    o = _pick(rng, alone)
    return Question("shape", f"what shape is the {o.color} object?", o.shape, (o.box,))


def _existence(rng: np.random.Generator, scene: Sample) -> Question | None:
    if rng.random() < 0.5:
        o = _pick(rng, scene.objects)
        return Question("existence", f"is there a {o.name}?", "yes", (o.box,))
    present = {o.name for o in scene.objects}
    # A colour and a shape that both occur, but not together, cannot be refused without binding the two.
    crossed = sorted({f"{a.color} {b.shape}" for a in scene.objects for b in scene.objects} - present)
    absent = sorted({f"{c} {s}" for c in COLORS for s in SHAPES} - present)
    name = _pick(rng, crossed) if crossed and rng.random() < 0.7 else _pick(rng, absent)
    return Question("existence", f"is there a {name}?", "no", tuple(o.box for o in scene.objects))


def _counting(rng: np.random.Generator, scene: Sample) -> Question | None:
    kind, boxes = int(rng.integers(3)), tuple(o.box for o in scene.objects)
    if kind == 0:
        return Question("counting", "how many objects are there?", str(len(scene.objects)), boxes)
    present = rng.random() < 0.8
    if kind == 1:
        shape = _pick(rng, scene.objects).shape if present else _pick(rng, SHAPES)
        count = sum(o.shape == shape for o in scene.objects)
        return Question("counting", f"how many {PLURALS[shape]} are there?", str(count), boxes)
    color = _pick(rng, scene.objects).color if present else _pick(rng, list(COLORS))
    count = sum(o.color == color for o in scene.objects)
    return Question("counting", f"how many {color} objects are there?", str(count), boxes)


def _relation(rng: np.random.Generator, scene: Sample) -> Question | None:
    if len(scene.objects) < 2:
        return None
    i, j = rng.permutation(len(scene.objects))[:2]
    a, b, relation = scene.objects[i], scene.objects[j], _pick(rng, RELATIONS)
    axis = 0 if relation in ("left of", "right of") else 1
    ahead = b.center[axis] - a.center[axis]  # > 0: a is further left, or higher
    if abs(ahead) < RELATION_MARGIN:
        return None
    answer = "yes" if (ahead > 0) == (relation in ("left of", "above")) else "no"
    return Question("relation", f"is the {a.name} {relation} the {b.name}?", answer, (a.box, b.box))


def _beside(rng: np.random.Generator, scene: Sample) -> Question | None:
    """Beside means: the only other object in the same row of the grid."""
    rows = Counter(o.row for o in scene.objects)
    pairs = [o for o in scene.objects if rows[o.row] == 2]
    if not pairs:
        return None
    o = _pick(rng, pairs)
    other = next(p for p in scene.objects if p.row == o.row and p is not o)
    text = f"what color is the object beside the {o.name}?"
    return Question("beside", text, other.color, (o.box, other.box))


def _superlative(rng: np.random.Generator, scene: Sample) -> Question | None:
    if len(scene.objects) < 2:
        return None
    word = _pick(rng, SUPERLATIVES)
    axis = 0 if word in ("leftmost", "rightmost") else 1
    sign = 1 if word in ("leftmost", "topmost") else -1
    first, second, *_ = sorted(scene.objects, key=lambda o: sign * o.center[axis])
    if abs(first.center[axis] - second.center[axis]) < SUPERLATIVE_MARGIN:
        return None
    text = f"what color is the {word} object?"
    return Question("superlative", text, first.color, tuple(o.box for o in scene.objects))


def _number(rng: np.random.Generator, scene: Sample) -> Question | None:
    return Question("number", NUMBER_QUESTION, "".join(map(str, scene.number)), (enclosing(scene.digit_boxes),))


_ASK = {
    "colour": _colour,
    "shape": _shape,
    "existence": _existence,
    "counting": _counting,
    "relation": _relation,
    "beside": _beside,
    "superlative": _superlative,
    "number": _number,
}
