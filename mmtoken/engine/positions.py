"""Position ids of compressed prompts: what "renumber" means, and how generation prepares them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def renumber(position_ids: Tensor, dropped: Tensor, items: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Close the gaps that dropped tokens leave.

    One axis: a token moves down by the number of tokens dropped before it. Three axes (M-RoPE): the kept tokens of an
    run of an item move so that their bounding box starts where the run started, and what follows moves down by as much
    as the largest extent of the box shrank. An item is one run, except where text parts its frames (Qwen3-VL writes a
    time before each): a frame must not move in front of its own time.

    Args:
        position_ids: int[B, L] or int[3 or 4, B, L] (4: text positions first).
        dropped: bool[B, L], visual tokens that are gone (padding is not).
        items: (row, int[n] positions in the row) of every item, in prompt order.

    Returns:
        (new position ids of the same shape, meaningful where a token is left; int[B] shift of what follows the prompt).
    """
    rows = dropped.shape[0]
    gone = dropped.long()
    before = gone.cumsum(-1) - gone
    if position_ids.ndim == 2:
        return position_ids.expand(rows, -1) - before, gone.sum(-1)
    axes = position_ids.expand(-1, rows, -1).clone()
    shift = torch.zeros_like(axes[0])
    total = torch.zeros_like(shift[:, 0])
    for row, places in [(row, run) for row, item in items for run in runs(item)]:
        grid = axes[-3:, row, places]
        kept = grid[:, ~dropped[row, places]]
        start = grid.min()
        shrunk = int(grid.max() - start) + 1
        if kept.shape[1]:
            axes[-3:, row, places] = grid - kept.amin(-1, keepdim=True) + start
            shrunk -= int((kept.amax(-1) - kept.amin(-1)).max()) + 1
        shift[row, int(places[-1]) + 1 :] += shrunk
        total[row] += shrunk
    moved = axes - shift
    if axes.shape[0] == 4:
        moved[0] = axes[0] - before
    return moved, total


def runs(places: Tensor) -> Sequence[Tensor]:
    """Consecutive positions among int[n] ascending ones."""
    return places.tensor_split(((places.diff() != 1).nonzero()[:, 0] + 1).cpu())


def rotary_tables(decoder: Any, like: Tensor, positions: Tensor, kind: str) -> Any:
    """Rotary (cosine, sine) of a decoder.

    Args:
        decoder: the text model.
        like: a tensor of the wanted type and device.
        positions: int[B, n] or int[3, B, n].
        kind: of the layer; decoders whose layers rotate differently by kind are told.
    """
    told = (
        {"layer_type": kind} if "layer_type" in inspect.signature(type(decoder.rotary_emb).forward).parameters else {}
    )
    return decoder.rotary_emb(like, positions, **told)


def generation_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The position ids that `generate` would give the uncompressed prompt: int[B, L] or int[4, B, L].

    `generate` prepares them in a private method that families with three axes override; this is the one place that
    calls it.
    """
    ids = inputs["input_ids"]
    prepare: Any = model._prepare_position_ids_for_generation
    positions: Tensor = prepare(ids, dict(inputs))
    return positions
