"""A table from above, with a gripper: what can be moved, how it looks, and what an expert would do.

The table is 64 x 64 pixels. Three items (a colour and a shape, 9 px) lie between two bases (a colour and a shape,
15 px); an instruction names an item and a base: "put the red ring on the blue plate". All five colours differ, shapes
may repeat, so one word of a name decides: no conjunction of colour and shape has to be understood.

An action is (dx, dy, grip) in [-1, 1]: the gripper moves by up to `STEP` px along each axis, then closes (grip > 0) or
opens. A gripper that was open and closes takes the nearest item within `REACH`; it carries it until it opens.

Everything here is a value or a function of values; chance comes from a generator that is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64
"""Side of the picture and of the table, px."""
STEP = 5.0
"""Furthest way of the gripper along one axis in a step, px."""
REACH = 6.0
"""An item is taken from no further than this, and it lies on a base no further than this from its centre, px."""
NEAR = 3.0
"""The expert takes and lets go from no further than this along either axis, px."""
GAIN = 0.6
"""Share of the way that the expert goes in a step, where `STEP` allows it: it slows down in good time, so that being
unsure of a pixel does not turn full speed ahead into full speed back."""
ACTIONS = ("dx", "dy", "grip")

COLORS = {
    "red": (225, 45, 45),
    "green": (45, 185, 65),
    "blue": (55, 90, 240),
    "yellow": (240, 215, 50),
    "magenta": (225, 60, 225),
    "cyan": (60, 215, 225),
}
ITEM_SHAPES = ("block", "cross", "ring")
BASE_SHAPES = ("plate", "tray")
ITEM_SIZE, BASE_SIZE = 9, 15
SPREAD = 3
"""The drift of the camera reaches so far, px; the jitter adds a pixel."""

TEMPLATES = (
    "put the {item} on the {base}",
    "put {item} on {base}",
    "move the {item} over to the {base}",
)

_EDGE = {ITEM_SIZE: 9.0, BASE_SIZE: 12.0}
_APART = {ITEM_SIZE: 13.0, BASE_SIZE: 17.0}
_GRIPPER_RANGE = (6.0, SIZE - 6.0)
_FINGER = (3, 11)
_FINGER_OFFSETS = {"open": 9, "holding": 6, "closed": 2}

Frame = NDArray[np.uint8]
Point = tuple[float, float]
"""x to the right, y down, px."""


@dataclass(frozen=True)
class Thing:
    """An item or a base with its centre."""

    color: str
    shape: str
    at: Point

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """All that there is.

    Attributes:
        items: what can be taken.
        bases: where it can be put.
        gripper: its centre.
        closed: whether its fingers are.
        held: index of the item between them, or None.
        shade: grey level of the table.
    """

    items: tuple[Thing, ...]
    bases: tuple[Thing, ...]
    gripper: Point
    closed: bool = False
    held: int | None = None
    shade: int = 80


@dataclass(frozen=True)
class Order:
    """What is asked for: indices of the item and of the base, and of the template that says it."""

    item: int
    base: int
    template: int = 0

    def text(self, scene: Scene) -> str:
        """The instruction in words."""
        names = {"item": scene.items[self.item].name, "base": scene.bases[self.base].name}
        return TEMPLATES[self.template].format(**names)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene with an open gripper somewhere. All things have colours of their own."""
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    item_names = [(colors[i], ITEM_SHAPES[rng.integers(len(ITEM_SHAPES))]) for i in range(3)]
    base_names = [(colors[i], BASE_SHAPES[rng.integers(len(BASE_SHAPES))]) for i in (3, 4)]
    sizes = [BASE_SIZE] * len(base_names) + [ITEM_SIZE] * len(item_names)
    spots = _spots(rng, sizes)
    things = [Thing(*name, at) for name, at in zip(base_names + item_names, spots, strict=True)]
    gripper = (float(rng.uniform(*_GRIPPER_RANGE)), float(rng.uniform(*_GRIPPER_RANGE)))
    bases, items = things[: len(base_names)], things[len(base_names) :]
    return Scene(tuple(items), tuple(bases), gripper, shade=int(rng.integers(60, 100)))


def draw_order(rng: np.random.Generator, scene: Scene) -> Order:
    """An instruction about that scene."""
    return Order(
        int(rng.integers(len(scene.items))), int(rng.integers(len(scene.bases))), int(rng.integers(len(TEMPLATES)))
    )


def _spots(rng: np.random.Generator, sizes: Sequence[int]) -> list[Point]:
    """Centres far enough from each other and from the edges."""
    while True:
        spots: list[Point] = []
        for i, size in enumerate(sizes):
            for x, y in rng.uniform(_EDGE[size], SIZE - _EDGE[size], (12, 2)).tolist():
                near = (
                    (x - a) ** 2 + (y - b) ** 2 < max(_APART[size], _APART[s]) ** 2
                    for (a, b), s in zip(spots, sizes, strict=False)
                )
                if not any(near):
                    spots.append((x, y))
                    break
            if len(spots) <= i:
                break
        else:
            return spots


def move(scene: Scene, action: Sequence[float] | NDArray[np.floating]) -> Scene:
    """The scene after an action, see the head of this file.

    Args:
        scene: before it.
        action: three numbers in [-1, 1].
    """
    dx, dy, grip = (float(v) for v in action)
    low, high = _GRIPPER_RANGE
    x, y = (min(max(a + STEP * d, low), high) for a, d in zip(scene.gripper, (dx, dy), strict=True))
    items, held = scene.items, scene.held
    if held is not None:
        items = tuple(replace(item, at=(x, y)) if i == held else item for i, item in enumerate(items))
    if grip <= 0:
        held = None
    elif not scene.closed:
        distances = [_distance(item.at, (x, y)) for item in items]
        nearest = int(np.argmin(distances))
        if distances[nearest] <= REACH:
            held = nearest
            items = tuple(replace(item, at=(x, y)) if i == held else item for i, item in enumerate(items))
    return replace(scene, items=items, gripper=(x, y), closed=grip > 0, held=held)


def placed(scene: Scene, order: Order) -> bool:
    """Whether the named item lies on the named base, let go."""
    near = _distance(scene.items[order.item].at, scene.bases[order.base].at) <= REACH
    return near and scene.held != order.item


def goal(scene: Scene, order: Order) -> Point:
    """Where the gripper has to go next: to the named base with the named item, to the item without it."""
    return scene.bases[order.base].at if scene.held == order.item else scene.items[order.item].at


def expert(scene: Scene, order: Order) -> NDArray[np.float32]:
    """The action float32[3] of an expert: straight to where the gripper has to be, along both axes at once.

    It opens a gripper that is closed on nothing or on another item, goes to the named item, closes, goes to the named
    base and opens; near its goal it slows down, see `GAIN`.
    """
    carrying = scene.held == order.item
    way = np.array(goal(scene, order)) - np.array(scene.gripper)
    near = bool(np.abs(way).max() <= NEAR)
    if carrying:
        closed = not near
    else:
        closed = near and not scene.closed
    return np.append(np.clip(GAIN * way / STEP, -1, 1), 1.0 if closed else -1.0).astype(np.float32)


def _distance(a: Point, b: Point) -> float:
    return float(np.hypot(a[0] - b[0], a[1] - b[1]))


# Pictures


@cache
def _sprite(shape: str, color: tuple[int, int, int]) -> Image.Image:
    """A thing as an RGBA picture."""
    size = BASE_SIZE if shape in BASE_SHAPES else ITEM_SIZE
    picture = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(picture)
    box, last = (0, 0, size - 1, size - 1), size - 1
    pale = tuple(40 + c // 3 for c in color)
    if shape == "plate":
        pen.ellipse(box, fill=pale, outline=color, width=2)
    elif shape == "tray":
        pen.rectangle(box, fill=pale, outline=color, width=2)
    elif shape == "block":
        pen.rectangle(box, fill=color, outline=(0, 0, 0))
    elif shape == "ring":
        pen.ellipse(box, fill=color)
        pen.ellipse((3, 3, last - 3, last - 3), fill=(0, 0, 0))
    else:
        third = size // 3
        pen.rectangle((third, 0, last - third, last), fill=color)
        pen.rectangle((0, third, last, last - third), fill=color)
    return picture


@cache
def _fingers(state: str) -> Image.Image:
    """The gripper as an RGBA picture: two white bars, joined at the top."""
    width, height = _FINGER
    offset = _FINGER_OFFSETS[state]
    picture = Image.new("RGBA", (2 * offset + width, height + 3))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, picture.width - 1, 1), fill=(200, 200, 200))
    for x in (0, 2 * offset):
        pen.rectangle((x, 0, x + width - 1, picture.height - 1), fill=(255, 255, 255))
    return picture


def _grip_state(scene: Scene) -> str:
    if scene.held is not None:
        return "holding"
    return "closed" if scene.closed else "open"


def render(scene: Scene, camera: tuple[int, int] = (0, 0)) -> Frame:
    """What a camera above the table sees, uint8[64, 64, 3].

    Args:
        scene: to draw.
        camera: whole pixels by which everything appears shifted, to the right and down.
    """
    picture = Image.new("RGB", (SIZE, SIZE), (scene.shade,) * 3)
    lying = [thing for i, thing in enumerate(scene.items) if i != scene.held]
    held = [] if scene.held is None else [scene.items[scene.held]]
    for thing in (*scene.bases, *lying, *held):
        _paste(picture, _sprite(thing.shape, COLORS[thing.color]), thing.at, camera)
    _paste(picture, _fingers(_grip_state(scene)), scene.gripper, camera)
    return np.asarray(picture).copy()


def _paste(picture: Image.Image, sprite: Image.Image, at: Point, camera: tuple[int, int]) -> None:
    # Not round(), which goes to even numbers: a camera that shifts by one pixel has to shift everything by one.
    x = math.floor(at[0] + camera[0] - sprite.width / 2 + 0.5)
    y = math.floor(at[1] + camera[1] - sprite.height / 2 + 0.5)
    picture.paste(sprite, (x, y), sprite)


@dataclass(frozen=True)
class Camera:
    """A camera that drifts along a slow ellipse and jitters by a pixel.

    Attributes:
        phase: of the drift along x and y, rad.
        speed: of the drift along x and y, rad per step.
    """

    phase: tuple[float, float]
    speed: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Camera:
        phase, speed = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.1, 0.25, 2)
        return cls((float(phase[0]), float(phase[1])), (float(speed[0]), float(speed[1])))

    def shift(self, step: int, rng: np.random.Generator) -> tuple[int, int]:
        """Where it stands at a step, in whole pixels to the right and down."""
        jitter = rng.integers(-1, 2, 2)
        x, y = (
            round(SPREAD * float(np.sin(p + s * step))) + int(j)
            for p, s, j in zip(self.phase, self.speed, jitter, strict=True)
        )
        return x, y
