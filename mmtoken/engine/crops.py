"""Which visual tokens are crops of a picture, and crops as items with budgets of their own."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from mmtoken.backbones.base import Backbone
from mmtoken.engine.positions import runs
from mmtoken.engine.prefill import Items
from mmtoken.tokens import Grid

Per = Literal["item", "crop"]
"""What `keep` counts by: an image or video as it lies in the prompt, or the thumbnail and every crop of an image that
is cut by themselves. Both are the same for images that are not cut, and where the crops of a picture lie one after the
other in the prompt (Idefics3, SmolVLM)."""


def number_crops(items: Items, backbone: Backbone, ids: Tensor | None) -> None:
    """Note which items are crops, for families whose crops are items of their own.

    Args:
        items: changed in place.
        backbone: knows the marks in a prompt.
        ids: int[B, L] of the prompt; without them every item counts as a picture of its own.
    """
    if ids is None or items.crops is None:
        return
    for row in sorted(set(items.rows)):
        mine = [i for i, other in enumerate(items.rows) if other == row]
        found = backbone.prompt_crops(ids[row], [items.places[i][items.valid[i]] for i in mine])
        for i, (number, cropped) in zip(mine, found or (), strict=found is not None):
            items.crops[i] = number
            items.cropped[i] = cropped


def split_crops(items: Items) -> Items:
    """The same with the thumbnail and every crop of a picture as items of their own, in prompt order.

    Rows of a crop are the runs of its tokens: the next crop, or a newline, parts them.
    """
    if items.crops is None:
        return items
    owner: list[int] = []
    numbers: list[int] = []
    parts: list[Tensor] = []
    for item, (valid, crops) in enumerate(zip(items.valid, items.crops, strict=True)):
        for number in crops[valid].unique().tolist():
            owner.append(item)
            numbers.append(number)
            parts.append((valid & (crops == number)).nonzero()[:, 0])
    index = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts], device=index.device)
    valid = torch.arange(index.shape[1], device=index.device) < lengths[:, None]
    of = torch.tensor(owner, device=index.device)[:, None]

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[of, index]

    grids = [
        items.grids[item] or _part_grid(part[~items.protected[item, part]], number)
        for item, number, part in zip(owner, numbers, parts, strict=True)
    ]
    tower, frames, seeds = items.tower, items.frames, items.seeds
    return Items(
        rows=[items.rows[item] for item in owner],
        places=items.places[of, index],
        valid=valid,
        protected=items.protected[of, index] & valid,
        grids=tuple(grids),
        mass=pick(items.mass),
        size=pick(items.size),
        tower=None if tower is None else functools.cache(lambda *fact: tower(*fact)[of, index]),
        cls=None if items.cls is None else items.cls[of[:, 0]],
        seeds=None if seeds is None else [seeds[item] ^ number for item, number in zip(owner, numbers, strict=True)],
        frames=None if frames is None else lambda part, name: frames(owner[part], name),
        known=items.known,
        crops=items.crops[of, index],
        cropped=[items.cropped[item] for item in owner],
    )


def _part_grid(part: Tensor, number: int) -> Grid | None:
    """The grid of a thumbnail (number 0), which is square, or of a crop, int[n] indices of its tokens in the item."""
    count = len(part)
    if not count:
        return None
    rows = math.isqrt(count) if number == 0 else len(runs(part))
    return (1, rows, count // rows) if count % rows == 0 else None
