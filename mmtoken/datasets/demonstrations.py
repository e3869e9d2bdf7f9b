"""What an expert would do on the table: the data that policies of `PickPlace` are trained on.

Behaviour cloning on an expert's own paths fails where the policy strays from them. Here states are drawn directly
instead: grippers anywhere and near things, open, carrying any item, closed on nothing, items that were let go in odd
places. Each state is labelled with the expert's action for each item with each base. A batch is a function of `(seed,
step)` alone, so a run that goes on from a checkpoint sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from mmtoken.datasets.tabletop import SIZE, SPREAD, TEMPLATES, Frame, Order, Scene, draw_scene, expert, render
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.errors import InputError

_SCATTER, _CLOSE = 5.0, 2.5
"""Standard deviations of grippers near things, px."""


@dataclass(frozen=True)
class Demonstration:
    """A picture with what the expert would do in it.

    Attributes:
        scene: what the picture shows.
        camera: shift of the picture, px to the right and down.
        image: uint8[64, 64, 3].
        orders: what is asked for, each item with each base.
        actions: float32[orders, 3], the expert's for each of them.
    """

    scene: Scene
    camera: tuple[int, int]
    image: Frame
    orders: tuple[Order, ...]
    actions: NDArray[np.float32]

    @property
    def instructions(self) -> tuple[str, ...]:
        """The orders in words."""
        return tuple(order.text(self.scene) for order in self.orders)


def draw_demonstration(rng: np.random.Generator, *, close: bool = False) -> Demonstration:
    """A state that is not on any path in particular, with its labels.

    Args:
        rng: chance.
        close: draw mostly grippers that are about to close on an item or to open above a base, with instructions that
            want it: 20 % of all labels, otherwise 2.5 %.
    """
    scene, item = _draw_state(rng, close)
    items = [item] * 4 + [i for i in range(len(scene.items)) if i != item] if close else range(len(scene.items))
    bases = range(len(scene.bases))
    pairs = [(i, k % 2) for k, i in enumerate(items)] if close else list(product(items, bases))
    orders = tuple(Order(i, base, int(rng.integers(len(TEMPLATES)))) for i, base in pairs)
    x, y = rng.integers(-SPREAD - 1, SPREAD + 2, 2).tolist()
    return Demonstration(
        scene,
        (x, y),
        render(scene, (x, y)),
        orders,
        np.stack([expert(scene, order) for order in orders]),
    )


def _draw_state(rng: np.random.Generator, close: bool) -> tuple[Scene, int]:
    """A scene, and the item that is held, or that the gripper may be near."""
    scene = draw_scene(rng)
    count, bases = len(scene.items), len(scene.bases)
    if rng.random() < 0.15:  # an item that was let go in an odd place
        spot = _somewhere(rng) if rng.random() < 0.5 else _near(rng, scene.bases[int(rng.integers(bases))].at, 3.0)
        scene = _put(scene, int(rng.integers(count)), spot)
    carrying = rng.random() < 0.5
    item, base = int(rng.integers(count)), int(rng.integers(bases))
    goal = scene.bases[base].at if carrying else scene.items[item].at
    if rng.random() < (0.3 if close else 0.5):
        gripper = _somewhere(rng)
    else:
        gripper = _near(rng, goal, _CLOSE if close else _SCATTER)
    if not carrying:
        return replace(scene, gripper=gripper, closed=bool(rng.random() < 0.12)), item
    return replace(_put(scene, item, gripper), gripper=gripper, closed=True, held=item), item


def _somewhere(rng: np.random.Generator) -> tuple[float, float]:
    x, y = rng.uniform(6, SIZE - 6, 2).tolist()
    return x, y


def _near(rng: np.random.Generator, spot: tuple[float, float], scatter: float) -> tuple[float, float]:
    x, y = np.clip(rng.normal(spot, scatter), 6, SIZE - 6).tolist()
    return x, y


def _put(scene: Scene, item: int, spot: tuple[float, float]) -> Scene:
    items = [replace(thing, at=spot) if i == item else thing for i, thing in enumerate(scene.items)]
    return replace(scene, items=tuple(items))


@dataclass(frozen=True)
class DemonstrationBatches(IterableDataset[list[Demonstration]]):
    """`batches[step]`: the demonstrations of a step; iterating starts at step `start` and does not end.

    Attributes:
        seed: of the generator, see `split_seed`.
        size: pictures per step.
        start: the first step.
        close_from: from this step on states are drawn `close`; None: never.
    """

    seed: int
    size: int = 48
    start: int = 0
    close_from: int | None = None

    def __getitem__(self, step: int) -> list[Demonstration]:
        rng = np.random.default_rng((self.seed, step))
        close = self.close_from is not None and step >= self.close_from
        return [draw_demonstration(rng, close=close) for _ in range(self.size)]

    def __iter__(self) -> Iterator[list[Demonstration]]:
        step = self.start
        while True:
            yield self[step]
            step += 1


class DemonstrationMix(L.LightningDataModule):
    """Demonstrations for training and validation.

    Args:
        seed: another seed gives other states, in training and validation.
        size: pictures per step; each has six instructions.
        validation_batches: batches of held-out states.
        close_from: step from which training sees mostly grippers that are about to close or open; None: never.
    """

    def __init__(
        self, seed: int = 0, size: int = 48, validation_batches: int = 8, close_from: int | None = None
    ) -> None:
        super().__init__()
        if size < 1 or validation_batches < 1:
            raise InputError(f"size={size}, validation_batches={validation_batches}: need at least 1 of each.")
        self.seed, self.size, self.validation_batches = seed, size, validation_batches
        self.close_from = close_from

    def train_dataloader(self) -> DataLoader[list[Demonstration]]:
        start = self.trainer.global_step if self.trainer is not None else 0
        batches = DemonstrationBatches(split_seed(self.seed, "train"), self.size, start, self.close_from)
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[list[Demonstration]]:
        held_out = DemonstrationBatches(split_seed(self.seed, "validation"), self.size)
        return DataLoader([held_out[step] for step in range(self.validation_batches)], batch_size=None)  # type: ignore[arg-type]
