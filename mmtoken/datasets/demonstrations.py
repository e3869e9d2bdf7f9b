"""What an expert would do on the table: the data that policies of `PickPlace` are trained on.

Behaviour cloning on an expert's own paths fails where the policy strays from them. Here states are drawn directly
instead: grippers anywhere and near things, open, carrying any item, closed on nothing, items that were let go in odd
places. Each state is labelled with the expert's action for six instructions. A batch is a function of `(seed,
step)` alone, so a run that goes on from a checkpoint sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from mmtoken.datasets.tabletop import SIZE, SPREAD, TEMPLATES, Frame, Order, Scene, draw_scene, expert, render
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.errors import InputError

_SCATTER = (0.0, 0.0, 0.0, 6.0, 6.0, 6.0, 2.5, 2.5, 2.5, 2.5)
"""Standard deviations of grippers near things, px, each as often as the others; 0: anywhere. The smallest are where the
grip is decided: along a path that is one step in six, among states drawn evenly one in a hundred."""


@dataclass(frozen=True)
class Demonstration:
    """A picture with what the expert would do in it.

    Attributes:
        scene: what the picture shows.
        camera: shift of the picture, px to the right and down.
        image: uint8[64, 64, 3].
        orders: six things that might be asked for.
        actions: float32[6, 3], the expert's for each of them.
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


def draw_demonstration(rng: np.random.Generator) -> Demonstration:
    """A state that is not on any path in particular, with its labels."""
    scene = _draw_state(rng)
    orders = tuple(Order(item, base, int(rng.integers(len(TEMPLATES)))) for item, base in _draw_pairs(rng, scene))
    x, y = rng.integers(-SPREAD - 1, SPREAD + 2, 2).tolist()
    return Demonstration(
        scene,
        (x, y),
        render(scene, (x, y)),
        orders,
        np.stack([expert(scene, order) for order in orders]),
    )


def _draw_state(rng: np.random.Generator) -> Scene:
    scene = draw_scene(rng)
    count, bases = len(scene.items), len(scene.bases)
    if rng.random() < 0.15:  # an item that was let go in an odd place
        spot = _somewhere(rng) if rng.random() < 0.5 else _near(rng, scene.bases[int(rng.integers(bases))].at, 3.0)
        scene = _put(scene, int(rng.integers(count)), spot)
    carrying = rng.random() < 0.5
    things = scene.bases if carrying else scene.items
    scatter = rng.choice(_SCATTER)
    gripper = _near(rng, things[int(rng.integers(len(things)))].at, scatter) if scatter else _somewhere(rng)
    if not carrying:
        return replace(scene, gripper=gripper, closed=bool(rng.random() < 0.12))
    held = int(rng.integers(count))
    return replace(_put(scene, held, gripper), gripper=gripper, closed=True, held=held)


def _draw_pairs(rng: np.random.Generator, scene: Scene) -> list[tuple[int, int]]:
    """Six (item, base): each with each; or, while an item is carried, that one four times and each other one once."""
    items, bases = range(len(scene.items)), range(len(scene.bases))
    if scene.held is None:
        return [(item, base) for item in items for base in bases]
    others = [(item, int(rng.choice(bases))) for item in items if item != scene.held]
    return [*((scene.held, base) for base in bases for _ in range(2)), *others]


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
    """

    seed: int
    size: int = 48
    start: int = 0

    def __getitem__(self, step: int) -> list[Demonstration]:
        rng = np.random.default_rng((self.seed, step))
        return [draw_demonstration(rng) for _ in range(self.size)]

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
    """

    def __init__(self, seed: int = 0, size: int = 48, validation_batches: int = 8) -> None:
        super().__init__()
        if size < 1 or validation_batches < 1:
            raise InputError(f"size={size}, validation_batches={validation_batches}: need at least 1 of each.")
        self.seed, self.size, self.validation_batches = seed, size, validation_batches

    def train_dataloader(self) -> DataLoader[list[Demonstration]]:
        start = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(DemonstrationBatches(split_seed(self.seed, "train"), self.size, start), batch_size=None)

    def val_dataloader(self) -> DataLoader[list[Demonstration]]:
        held_out = DemonstrationBatches(split_seed(self.seed, "validation"), self.size)
        batches = [held_out[step] for step in range(self.validation_batches)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
