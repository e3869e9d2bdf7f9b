"""MovingShapes: generated clips with questions about what happened, the data that tiny-llava-video learns from.

A clip is a row of 96 x 96 frames, one per second. Objects of ShapesQA (8 colours x 6 shapes, 12 to 18 px) appear or
slide in, move steadily to the left, right, up or down, and are gone again before the clip ends; a number of one or two
digits stands in the first frames. The background is filmed by a camera that stands still, pans, or cuts to another
scene. So most answers lie in frames that are past when the question comes, and the same frame is never the whole
evidence: who came first, who left first, which way, how many in all.

Everything is a pure function of `(seed, index)`. Colours and shapes differ between the objects of a clip.

Chance, at the end of a clip of ten frames or more: colour, appeared and left 1/8, shape 1/6, direction and count 1/4,
number 1/100 for two digits. A model that sees the question alone does not get above these (see `majority_baselines`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mmtoken.datasets.shapes_qa import COLORS, DIGIT_GAP, IMAGE_SIZE, NUMBER_QUESTION, SHAPES, Box, glyph, sprite
from mmtoken.errors import InputError

QUESTION_TYPES = ("colour", "shape", "appeared", "left", "direction", "count", "number")
DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps in x and y; y grows downwards."""
CAMERA = ("static", "panning", "cut")
"""What the camera does from the frame before to this one; the first frame is a cut."""
MIN_FRAMES, MAX_FRAMES = 6, 64
MAX_OBJECTS = 4
MIN_SIZE, MAX_SIZE = 12, 18
MIN_STEP, MAX_STEP = 3.0, 14.0
"""Pixels an object moves per frame."""
MIN_PATH = 20.0
"""Pixels an object moves in all, at least: most of a pooled token of 24 px."""
LONGEST = 8
"""Frames an object is visible, at most; at least 3."""
BUSY = 24
"""Frames within which all objects of a longer clip come and go, in one clip of two."""

_CANVAS = 168
_SPRITE = tuple(tuple(sprite(s, n) > 0.5 for n in range(MAX_SIZE + 1)) for s in SHAPES)
_PALETTE = np.array(list(COLORS.values()), dtype=np.int16)

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class MovingObject:
    """One object: visible in the frames `start` to `end - 1` of the clip, a box for each of them.

    Boxes may reach over the edge of the picture where an object slides in or out.
    """

    color: str
    shape: str
    direction: str
    start: int
    end: int
    boxes: tuple[Box, ...]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def box(self, frame: int) -> Box | None:
        """Where it is in that frame, None where it is not."""
        return self.boxes[frame - self.start] if self.start <= frame < self.end else None


@dataclass(frozen=True)
class ClipQuestion:
    """A question asked when the first `seen` frames have been shown.

    Attributes:
        type: one of `QUESTION_TYPES`.
        text: the question.
        answer: the answer.
        seen: frames shown before it.
        age: frames since the evidence was last visible: 0 where it is in the newest frame. Where several objects
            count, the age of the oldest.
        evidence: (frame, box) pairs that hold the answer.
    """

    type: str
    text: str
    answer: str
    seen: int
    age: int
    evidence: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Clip:
    """A clip with its questions.

    Attributes:
        frames: uint8[F, 96, 96, 3].
        times: float64[F], seconds.
        camera: for each frame one of `CAMERA`.
        objects: in the order in which they appear.
        number: digits from left to right.
        number_box: where it stands.
        number_frames: it is visible in the frames before this one.
        questions: about the clip.
    """

    frames: Frames
    times: NDArray[np.float64]
    camera: tuple[str, ...]
    objects: tuple[MovingObject, ...]
    number: tuple[int, ...]
    number_box: Box
    number_frames: int
    questions: tuple[ClipQuestion, ...]


@dataclass(frozen=True)
class MovingShapes(Sequence[Clip]):
    """`size` clips; `MovingShapes(seed=0, size=100)[7]` is a function of the seed, the index and the settings alone.

    Attributes:
        seed: seeds of training, validation and test must differ.
        size: number of clips.
        frames: fewest and most frames of a clip, in 6..64.
        questions: questions per clip; None: one of each type that the clip can answer, asked at its end.
        anytime: how many of `questions` are asked at some earlier moment, about what was seen so far; a fraction.
        dropped: fraction of clips of which frames are missing at random, though never the evidence as a whole.
        active: frames at the start in which all objects come and go; None: wherever.
        mix: how often each type is asked, relative to the others.
    """

    seed: int
    size: int
    frames: tuple[int, int] = (16, 16)
    questions: int | None = None
    anytime: float = 0.0
    dropped: float = 0.0
    active: int | None = None
    mix: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(QUESTION_TYPES, 1.0))

    def __post_init__(self) -> None:
        least, most = self.frames
        if not MIN_FRAMES <= least <= most <= MAX_FRAMES:
            raise InputError(
                f"frames={self.frames}: need {MIN_FRAMES} <= fewest <= most <= {MAX_FRAMES}, as (fewest, most)."
            )
        if self.active is not None and self.active < MIN_FRAMES:
            raise InputError(f"active={self.active}: objects need at least {MIN_FRAMES} frames; give more, or None.")
        if self.size < 0 or (self.questions is not None and self.questions < 1):
            raise InputError(f"size={self.size}, questions={self.questions}: need size >= 0 and questions >= 1.")
        for name, value in (("anytime", self.anytime), ("dropped", self.dropped)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value}: give a fraction in 0..1.")
        unknown = sorted(set(self.mix) - set(QUESTION_TYPES))
        if unknown or min(self.mix.values(), default=0.0) < 0 or self.mix.get("number", 0.0) <= 0:
            raise InputError(
                f"mix={dict(self.mix)}: give weights >= 0 for some of {list(QUESTION_TYPES)}, and more than 0 for "
                "'number', the one type that every clip can answer."
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Clip:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng((self.seed, index))
        length = int(rng.integers(self.frames[0], self.frames[1] + 1))
        story = None
        if rng.random() < self.dropped:
            for _ in range(4):
                longer = length + int(rng.integers(1, length // 2 + 1))
                kept = np.sort(rng.permutation(longer)[:length])
                story = _thin(_story(rng, longer, self.active), kept)
                if story is not None:
                    break
        if story is None:
            story = _story(rng, length, self.active)
        frames, camera = _render(rng, story)
        clip = Clip(
            frames,
            story.times,
            camera,
            tuple(story.objects),
            story.number,
            story.number_box,
            story.number_frames,
            (),
        )
        return Clip(**{**vars(clip), "questions": self._ask(rng, clip)})

    def __iter__(self) -> Iterator[Clip]:
        return (self[i] for i in range(self.size))

    def _ask(self, rng: np.random.Generator, clip: Clip) -> tuple[ClipQuestion, ...]:
        length = len(clip.frames)
        if self.questions is None:
            every = (ask(rng, kind, clip, length) for kind in QUESTION_TYPES)
            return tuple(q for q in every if q is not None)
        kinds = list(self.mix)
        limits = np.cumsum([self.mix[k] for k in kinds])
        asked: list[ClipQuestion] = []
        tries = 0
        while len(asked) < self.questions:
            tries += 1
            seen = int(rng.integers(2, length + 1)) if rng.random() < self.anytime else length
            kind = kinds[int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))]
            question = ask(rng, kind, clip, seen)
            # The same question twice teaches nothing; repeats come only where a clip has run out of others.
            if question is not None and (question not in asked or tries > 8 * self.questions):
                asked.append(question)
        return tuple(asked)


def majority_baselines(clips: Sequence[Clip]) -> dict[str, float]:
    """Accuracy, per type, of giving the most frequent answer to each wording of a question.

    Names of colours, shapes and objects in the question count as one wording.
    """
    answers: dict[tuple[str, str], Counter[str]] = {}
    for clip in clips:
        for question in clip.questions:
            words = question.text.rstrip("?.").split()
            wording = " ".join("*" if w in COLORS or w in SHAPES else w for w in words)
            answers.setdefault((question.type, wording), Counter())[question.answer] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (kind, _), counts in answers.items():
        right[kind] += max(counts.values())
        total[kind] += counts.total()
    return {kind: right[kind] / total[kind] for kind in total}


@dataclass
class _Story:
    """A clip before it is drawn. `steps` float[T - 1, 2] is how the camera moves; cut: int[T] number of the scene."""

    times: NDArray[np.float64]
    objects: list[MovingObject]
    number: tuple[int, ...]
    number_box: Box
    number_frames: int
    offsets: NDArray[np.int64]
    scene: NDArray[np.int64]
    panning: NDArray[np.bool_]


def _story(rng: np.random.Generator, length: int, active: int | None) -> _Story:
    number = tuple(int(d) for d in rng.integers(0, 10, int(rng.integers(1, 3))))
    height, width = glyph(0).shape
    wide = len(number) * (width + DIGIT_GAP) - DIGIT_GAP
    x0, y0 = int(rng.integers(IMAGE_SIZE - wide + 1)), int(rng.integers(IMAGE_SIZE - height + 1))
    number_box = (x0, y0, x0 + wide, y0 + height)
    number_frames = int(rng.integers(1, 4 if length >= 10 else 3))
    objects = _cast(rng, length, active, number_box, number_frames)
    return _Story(
        np.arange(length, dtype=np.float64), objects, number, number_box, number_frames, *_camera(rng, length)
    )


def _camera(rng: np.random.Generator, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Top left corner of the picture in the scene int[T, 2], number of the scene int[T], whether it pans bool[T]."""
    offsets = np.zeros((length, 2), dtype=np.int64)
    scene = np.zeros(length, dtype=np.int64)
    panning = np.zeros(length, dtype=bool)
    room = _CANVAS - IMAGE_SIZE
    at, start, number = rng.integers(0, room + 1, 2), 0, 0
    while start < length:
        end = min(length, start + int(rng.integers(3, 10)))
        pans = rng.random() < 0.4
        step = np.zeros(2, dtype=np.int64)
        if pans:
            step[int(rng.integers(2))] = int(rng.integers(2, 7)) * (1 if rng.random() < 0.5 else -1)
        ahead = at + step * np.arange(0 if start == 0 else 1, end - start + (0 if start == 0 else 1))[:, None]
        # The camera turns round at the border of the scene.
        folded = np.abs(ahead) % (2 * room)
        offsets[start:end] = np.where(folded > room, 2 * room - folded, folded)
        scene[start:end] = number
        panning[start:end] = pans
        at = offsets[end - 1]
        if rng.random() < 0.4:
            number += 1
            at = rng.integers(0, room + 1, 2)
        start = end
    return offsets, scene, panning


def _cast(
    rng: np.random.Generator, length: int, active: int | None, number_box: Box, number_frames: int
) -> list[MovingObject]:
    """The objects of a clip, in the order in which they appear."""
    last = length - 1 if active is None else min(active, length) - 1
    first = 1
    if active is None and length > BUSY and rng.random() < 0.5:
        first = int(rng.integers(1, length - BUSY + 1))
        last = first + BUSY - 2
    span = last - first  # objects are visible in first..last - 1 only
    most = min(MAX_OBJECTS, max(1, span // 2))
    count = int(rng.integers(1, most + 1))
    starts, ends = _times(rng, count, first, last)
    colors = rng.permutation(len(COLORS))[:count]
    shapes = rng.permutation(len(SHAPES))[:count]
    objects: list[MovingObject] = []
    names = list(COLORS)
    tracks: list[tuple[int, int, NDArray[np.int64]]] = [
        (0, number_frames, np.tile(np.array(number_box, dtype=np.int64), (number_frames, 1)))
    ]
    for k in range(count):
        start, end = starts[k], ends[k]
        for _ in range(12):
            boxes, direction = _path(rng, end - start)
            if all(_apart(boxes, start, end, *track) for track in tracks):
                break
        tracks.append((start, end, boxes))
        listed = tuple(tuple(int(v) for v in box) for box in boxes)
        objects.append(MovingObject(names[colors[k]], SHAPES[shapes[k]], direction, start, end, listed))  # type: ignore[arg-type]
    return objects


def _times(rng: np.random.Generator, count: int, first: int, last: int) -> tuple[list[int], list[int]]:
    """First visible frame and first frame gone of each object, both distinct, sorted by the former.

    In half of the clips the first to appear is not the first to leave, as far as that comes up.
    """
    swapped = rng.random() < 0.5
    longest = min(LONGEST, last - first)
    found = None
    for _ in range(60):
        spans = rng.integers(3, longest + 1, count)
        if count > 1 and swapped:
            # All within reach of each other, or nothing overlaps.
            near = min(last, first + int(rng.integers(longest, 2 * longest + 1)))
            shift = int(rng.integers(0, last - near + 1))
        else:
            near, shift = last, 0
        starts = np.sort(shift + first + (rng.random(count) * (near - first - spans + 1)).astype(np.int64))
        ends = starts + spans
        if len(set(starts.tolist())) < count or len(set(ends.tolist())) < count or int(ends.max()) > last:
            continue
        found = starts.tolist(), ends.tolist()
        if count == 1 or (int(ends.argmin()) != 0) == swapped:
            break
    if found is None:  # one after the other, as close as they fit
        starts = first + np.arange(count)
        found = starts.tolist(), (starts + min(3, last - first - count + 1)).tolist()
    return found


def _path(rng: np.random.Generator, frames: int) -> tuple[NDArray[np.int64], str]:
    """Boxes int64[frames, 4] of a steady motion, and its direction."""
    size = int(rng.integers(MIN_SIZE, MAX_SIZE + 1))
    direction = list(DIRECTIONS)[int(rng.integers(4))]
    # Half of the object is outside where it slides in or out.
    slides_in, slides_out = rng.random() < 0.3, rng.random() < 0.3
    low = -(size // 2) if slides_in else 0
    high = IMAGE_SIZE - size + (size // 2 if slides_out else 0)
    steps = max(1, frames - 1)
    most = min(MAX_STEP, (high - low) / steps)
    step = rng.uniform(min(most, max(MIN_STEP, MIN_PATH / steps)), most)
    travel = step * steps
    if slides_in and slides_out and (high - low) / steps <= MAX_STEP:
        travel = float(high - low)
        start = float(low)
    elif slides_in:
        start = float(low)
        high = IMAGE_SIZE - size
    elif slides_out:
        start = high - travel
    else:
        start = rng.uniform(low, high - travel)
    along = np.rint(start + travel * np.arange(frames) / steps).astype(np.int64)
    dx, dy = DIRECTIONS[direction]
    if dx + dy < 0:  # mirrored
        along = IMAGE_SIZE - size - along
    across = np.full(frames, int(rng.integers(0, IMAGE_SIZE - size + 1)), dtype=np.int64)
    x, y = (along, across) if dx else (across, along)
    return np.stack([x, y, x + size, y + size], axis=1), direction


def _apart(
    boxes: NDArray[np.int64], start: int, end: int, other_start: int, other_end: int, others: NDArray[np.int64]
) -> bool:
    """Whether two tracks never touch."""
    low, high = max(start, other_start), min(end, other_end)
    if low >= high:
        return True
    a, b = boxes[low - start : high - start], others[low - other_start : high - other_start]
    touch = (a[:, 0] < b[:, 2]) & (b[:, 0] < a[:, 2]) & (a[:, 1] < b[:, 3]) & (b[:, 1] < a[:, 3])
    return not bool(touch.any())


def _thin(story: _Story, kept: NDArray[np.int64]) -> _Story | None:
    """The story with the frames `kept` only, or None where evidence would be lost or two events would coincide."""
    objects = []
    for o in story.objects:
        start, end = (int(v) for v in np.searchsorted(kept, (o.start, o.end)))
        if end - start < 2 or start < 1 or end > len(kept) - 1:
            return None
        boxes = tuple(o.boxes[int(f) - o.start] for f in kept[start:end])
        objects.append(MovingObject(o.color, o.shape, o.direction, start, end, boxes))
    number_frames = int(np.searchsorted(kept, story.number_frames))
    starts, ends = {o.start for o in objects}, {o.end for o in objects}
    if number_frames < 1 or len(starts) < len(objects) or len(ends) < len(objects):
        return None
    return _Story(
        story.times[kept],
        objects,
        story.number,
        story.number_box,
        number_frames,
        story.offsets[kept],
        story.scene[kept],
        story.panning[kept],
    )


@cache
def _noise() -> NDArray[np.int16]:
    """A stock of normal noise, standard deviation 6; pictures take pieces of it, which is faster than drawing it."""
    return np.rint(np.random.default_rng(960).standard_normal(1 << 19) * 6).astype(np.int16)


@cache
def _faint() -> NDArray[np.int16]:
    """The same with standard deviation 2: what differs between two frames of a camera at rest."""
    return np.rint(np.random.default_rng(961).standard_normal(1 << 19) * 2).astype(np.int16)


@cache
def _spread() -> NDArray[np.float32]:
    """float32[168, 7]: linear interpolation from 7 points to the side of a scene."""
    at = np.linspace(0, 6, _CANVAS)
    weights: NDArray[np.float32] = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(7))).astype(np.float32)
    return weights


def _scene(rng: np.random.Generator) -> NDArray[np.int16]:
    """A background larger than the picture, int16[168, 168, 3]: a gradient, soft patches, and noise."""
    axis = np.linspace(-1, 1, 7, dtype=np.float32)
    slopes = rng.uniform(-30, 30, 2).astype(np.float32)
    grid = rng.uniform(50, 110, 3).astype(np.float32) + (axis * slopes[0])[None, :, None]
    grid = grid + (axis * slopes[1])[:, None, None]
    grid = grid + rng.uniform(-16, 16, (7, 7, 1)).astype(np.float32) + rng.uniform(-5, 5, (7, 7, 3)).astype(np.float32)
    spread = _spread()
    rows = (spread @ grid.reshape(7, 21)).reshape(_CANVAS, 7, 3)
    canvas: NDArray[np.int16] = np.rint(np.matmul(spread, rows)).astype(np.int16)
    begin = int(rng.integers((1 << 19) - _CANVAS * _CANVAS))
    canvas += _noise()[begin : begin + _CANVAS * _CANVAS].reshape(_CANVAS, _CANVAS, 1)
    return canvas


def _render(rng: np.random.Generator, story: _Story) -> tuple[Frames, tuple[str, ...]]:
    length = len(story.times)
    out = np.empty((length, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int16)
    scenes = {int(s): _scene(rng) for s in np.unique(story.scene)}
    shades = rng.integers(-15, 16, len(story.objects)).astype(np.int16)
    brightness = int(rng.integers(225, 256))
    starts = rng.integers((1 << 19) - IMAGE_SIZE * IMAGE_SIZE, size=length)
    faint = _faint()
    for t in range(length):
        x, y = story.offsets[t]
        frame = out[t]
        frame[:] = scenes[int(story.scene[t])][y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
    for o, shade in zip(story.objects, shades, strict=True):
        color = _PALETTE[list(COLORS).index(o.color)] + shade
        for t, box in enumerate(o.boxes, start=o.start):
            _paint(out[t], box, _SPRITE[SHAPES.index(o.shape)][box[2] - box[0]], color)
    x0, y0, _, y1 = story.number_box
    for k, digit in enumerate(story.number):
        mask = glyph(digit) > 0.5
        left = x0 + k * (mask.shape[1] + DIGIT_GAP)
        for t in range(story.number_frames):
            out[t, y0:y1, left : left + mask.shape[1]][mask] = brightness
    for t in range(length):
        out[t] += faint[starts[t] : starts[t] + IMAGE_SIZE * IMAGE_SIZE].reshape(IMAGE_SIZE, IMAGE_SIZE, 1)
    np.clip(out, 0, 255, out=out)
    moved = np.zeros(length, dtype=bool)
    moved[1:] = (story.offsets[1:] != story.offsets[:-1]).any(axis=1)
    cut = np.ones(length, dtype=bool)
    cut[1:] = story.scene[1:] != story.scene[:-1]
    camera = tuple("cut" if c else "panning" if m else "static" for c, m in zip(cut, moved, strict=True))
    return out.astype(np.uint8), camera


def _paint(frame: NDArray[np.int16], box: Box, mask: NDArray[np.bool_], color: NDArray[np.int16]) -> None:
    x0, y0, x1, y1 = box
    left, top = max(0, -x0), max(0, -y0)
    inside = mask[top : mask.shape[0] - max(0, y1 - IMAGE_SIZE), left : mask.shape[1] - max(0, x1 - IMAGE_SIZE)]
    frame[y0 + top : min(y1, IMAGE_SIZE), x0 + left : min(x1, IMAGE_SIZE)][inside] = color


def ask(rng: np.random.Generator, type: str, clip: Clip, seen: int) -> ClipQuestion | None:
    """A question of the type after `seen` frames, about what was visible in them; None where there is none to ask."""
    return _ASK[type](rng, clip, seen)


def _evidence(o: MovingObject, seen: int) -> tuple[tuple[int, Box], ...]:
    return tuple((t, box) for t, box in enumerate(o.boxes, start=o.start) if t < seen)


def _question(
    type: str, text: str, answer: str, seen: int, about: Sequence[MovingObject], more: Sequence[MovingObject] = ()
) -> ClipQuestion:
    """`about`: the objects whose age counts; `more`: others that hold evidence, too."""
    age = max(seen - 1 - min(o.end - 1, seen - 1) for o in about)
    evidence = sorted({e for o in (*about, *more) for e in _evidence(o, seen)})
    return ClipQuestion(type, text, answer, seen, age, tuple(evidence))


def _shown(clip: Clip, seen: int, least: int = 1) -> list[MovingObject]:
    """Objects visible in at least `least` of the first `seen` frames."""
    return [o for o in clip.objects if min(o.end, seen) - o.start >= least]


def _colour(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    shown = _shown(clip, seen)
    if not shown:
        return None
    o = shown[int(rng.integers(len(shown)))]
    return _question("colour", f"what color was the {o.shape}?", o.color, seen, [o])


def _shape(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    shown = _shown(clip, seen)
    if not shown:
        return None
    o = shown[int(rng.integers(len(shown)))]
    return _question("shape", f"what shape was the {o.color} object?", o.shape, seen, [o])


def _appeared(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    shown = _shown(clip, seen)
    if len(shown) < 2:
        return None
    word = ("first", "last")[int(rng.integers(2))]
    o = shown[0] if word == "first" else shown[-1]
    return _question("appeared", f"which color appeared {word}?", o.color, seen, [o], shown)


def _left(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    shown = _shown(clip, seen)
    gone = sorted((o for o in shown if o.end < seen), key=lambda o: o.end)
    if len(shown) < 2 or not gone:
        return None
    word = ("first", "last")[int(rng.integers(2))]
    o = gone[0] if word == "first" else gone[-1]
    return _question("left", f"which color left {word}?", o.color, seen, [o], shown)


def _direction(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    # Two frames show a step, but of few pixels: asked where the path is over, or at least three frames long.
    shown = [o for o in _shown(clip, seen, 2) if o.end <= seen or seen - o.start >= 3]
    if not shown:
        return None
    o = shown[int(rng.integers(len(shown)))]
    return _question("direction", f"which way did the {o.name} move?", o.direction, seen, [o])


def _count(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    shown = _shown(clip, seen)
    if not shown:
        return None
    return _question("count", "how many objects were there?", str(len(shown)), seen, shown)


def _number(rng: np.random.Generator, clip: Clip, seen: int) -> ClipQuestion | None:
    last = min(clip.number_frames, seen)
    evidence = tuple((t, clip.number_box) for t in range(last))
    answer = "".join(map(str, clip.number))
    return ClipQuestion("number", NUMBER_QUESTION, answer, seen, seen - last, evidence)


_ASK: Mapping[str, Callable[[np.random.Generator, Clip, int], ClipQuestion | None]] = {
    "colour": _colour,
    "shape": _shape,
    "appeared": _appeared,
    "left": _left,
    "direction": _direction,
    "count": _count,
    "number": _number,
}
