"""From demonstrations to tensors: several instructions about one picture in one sequence, and labels of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmtoken.datasets.demonstrations import Demonstration
from mmtoken.datasets.tabletop import BASE_SHAPES, BASE_SIZE, COLORS, ITEM_SHAPES, ITEM_SIZE, SIZE, Point, goal
from mmtoken.models.tiny_openvla.processor import (
    BINS,
    MEAN,
    PAD_ID,
    PATCH_SIZE,
    PROMPT,
    STD,
    VISUAL_TOKENS,
    action_ids,
    build_tokenizer,
)
from mmtoken.training import packing
from mmtoken.training.packing import Encoded, Packed

_BEFORE, _AFTER = PROMPT.split("{instruction}")
_SIDE = SIZE // PATCH_SIZE
_COLORS = list(COLORS)
PATCH_CLASSES = (1 + len(COLORS), 1 + len(ITEM_SHAPES), 1 + len(COLORS), 1 + len(BASE_SHAPES), 4)
"""Per patch: colour and shape of an item, colour and shape of a base, state of the gripper; class 0: none."""
_GRIPPER_SIZE = 15

_tokenizer = cache(build_tokenizer)


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


def common_ids() -> tuple[int, ...]:
    """Token ids of the prompt between the picture and the instruction."""
    return _ids(_BEFORE)


@dataclass(frozen=True)
class ActionBatch:
    """B pictures with Q instructions each.

    Attributes:
        pixels: float[B, 3, 64, 64], normalised.
        packed: the instructions and their actions; the prefix is BOS, the picture and `common_ids`.
        actions: float[labels], the expert's numbers in the order of the labelled positions.
        classes: int64[5, B, 64], see `PATCH_CLASSES`.
        places: float[B, 64, 6], where in the picture the item, the base and the gripper on a patch have their centres,
            -1 to 1 from edge to edge; only where the class says that there is one.
        readers: int64[B, Q, 3], text positions of the item's colour, of the base's and of the last prompt token.
        points: float[B, Q, 4, 2], what `Pointers` read there: centres of the item, the base, the goal and the gripper
            in the picture, in patches.
    """

    pixels: Tensor
    packed: Packed
    actions: Tensor
    classes: Tensor
    places: Tensor
    readers: Tensor
    points: Tensor

    def to(self, device: torch.device) -> ActionBatch:
        parts = vars(self)
        return ActionBatch(**{name: part.to(device) for name, part in parts.items()})


def encode(instruction: str, action: NDArray[np.float32]) -> Encoded:
    """An instruction, what follows it in the prompt, and the action's tokens."""
    text = (*_ids(instruction.lower()), *_ids(_AFTER))
    return Encoded((*text, *action_ids(action)), len(text), 0)


def pack(demonstrations: Sequence[Demonstration]) -> ActionBatch:
    """Pictures, packed instructions and patch labels of demonstrations."""
    rows = [[encode(t, a) for t, a in zip(d.instructions, d.actions, strict=True)] for d in demonstrations]
    classes, places = patch_labels(demonstrations)
    readers, points = pointing(demonstrations, rows)
    return ActionBatch(
        pixels(np.stack([d.image for d in demonstrations])),
        packing.pack(rows, 1 + VISUAL_TOKENS + len(common_ids()), PAD_ID),
        torch.from_numpy(np.concatenate([d.actions.reshape(-1) for d in demonstrations])),
        classes,
        places,
        readers,
        points,
    )


def pointing(demonstrations: Sequence[Demonstration], rows: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor]:
    """`readers` and `points` of an `ActionBatch`."""
    items, bases = ({_ids(shape)[0] for shape in shapes} for shapes in (ITEM_SHAPES, BASE_SHAPES))
    readers, points = [], []
    for d, row in zip(demonstrations, rows, strict=True):
        start = 0
        for order, one in zip(d.orders, row, strict=True):
            item, base = (next(i for i, token in enumerate(one.ids) if token in wanted) for wanted in (items, bases))
            readers.append((start + item - 1, start + base - 1, start + one.prompt - 1))
            start += len(one.ids) - 1
            scene = d.scene
            points.append([scene.items[order.item].at, scene.bases[order.base].at, goal(scene, order), scene.gripper])
    shape = (len(rows), len(rows[0]))
    shifts = torch.tensor([d.camera for d in demonstrations])[:, None, None]
    where = (torch.tensor(points).view(*shape, 4, 2) + shifts) / PATCH_SIZE
    return torch.tensor(readers).view(*shape, 3), where


def around(points: Tensor, width: float = 0.5) -> Tensor:
    """Weights of the patches, float[..., 64], a Gaussian around each of the points float[..., 2]; all in patches."""
    side = SIZE // PATCH_SIZE
    steps = torch.arange(side, device=points.device) + 0.5
    centres = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(-1, 2)
    return torch.softmax((points[..., None, :] - centres).square().sum(-1) / (-2 * width**2), -1)


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Images uint8[B, 64, 64, 3] as the processor normalises them, float[B, 3, 64, 64]."""
    return ((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()


def soft_targets(actions: Tensor, width: float) -> Tensor:
    """Probabilities of the bins, float[n, 255], falling off as a Gaussian around each number.

    Args:
        actions: float[n] in [-1, 1].
        width: standard deviation in bins.
    """
    edges = torch.linspace(-1, 1, BINS + 1, device=actions.device)
    centres = (edges[1:] + edges[:-1]) / 2
    distance = (centres - actions.clamp(float(centres[0]), float(centres[-1]))[:, None]) * (BINS / 2)
    return torch.softmax(-0.5 * (distance / width) ** 2, dim=1)


_CENTRES: NDArray[np.float64] = (np.arange(_SIDE, dtype=np.float64) + 0.5) * PATCH_SIZE


def patch_labels(demonstrations: Sequence[Demonstration], least: float = 0.2) -> tuple[Tensor, Tensor]:
    """Classes int64[5, B, 64] and places float[B, 64, 6] of `ActionBatch`.

    A patch shows what covers most of it, if that is at least the fraction `least`.
    """
    batch = len(demonstrations)
    classes = np.zeros((len(PATCH_CLASSES), batch, _SIDE, _SIDE), dtype=np.int64)
    places = np.zeros((batch, _SIDE, _SIDE, 6), dtype=np.float32)
    for b, demonstration in enumerate(demonstrations):
        scene = demonstration.scene
        order = sorted(range(len(scene.items)), key=lambda i: i == scene.held)
        items = [
            (t.at, (_COLORS.index(t.color) + 1, ITEM_SHAPES.index(t.shape) + 1))
            for t in (scene.items[i] for i in order)
        ]
        bases = [(t.at, (_COLORS.index(t.color) + 1, BASE_SHAPES.index(t.shape) + 1)) for t in scene.bases]
        state = 1 if not scene.closed else 3 if scene.held is None else 2
        groups = (
            (items, ITEM_SIZE, slice(0, 2), slice(0, 2)),
            (bases, BASE_SIZE, slice(2, 4), slice(2, 4)),
            ([(scene.gripper, (state,))], _GRIPPER_SIZE, slice(4, 5), slice(4, 6)),
        )
        for things, size, rows, columns in groups:
            best = np.full((_SIDE, _SIDE), least)
            for at, labels in things:
                x, y = at[0] + demonstration.camera[0], at[1] + demonstration.camera[1]
                share = _share((x, y), size)
                wins = share >= best
                best = np.where(wins, share, best)
                classes[rows, b, wins] = np.array(labels)[:, None]
                places[b, wins, columns] = np.array((x, y)) / (SIZE / 2) - 1
    return (
        torch.from_numpy(classes.reshape(len(PATCH_CLASSES), batch, VISUAL_TOKENS)),
        torch.from_numpy(places.reshape(batch, VISUAL_TOKENS, 6)),
    )


def _share(at: Point, size: int) -> NDArray[np.float64]:
    """Fraction of each patch, float[8, 8], under a square of that size."""
    columns, rows = (
        np.clip(np.minimum(c + size / 2, _CENTRES + 4) - np.maximum(c - size / 2, _CENTRES - 4), 0, None) / PATCH_SIZE
        for c in at
    )
    return np.asarray(np.outer(rows, columns), dtype=np.float64)
