"""Merged tokens count as often as what they stand for: log(size) on their columns of every decoder layer's attention.

A token of size s then weighs as much as s copies of its key and value would (RESTORE). Sizes are those that methods
leave on `VisualTokens`; nothing changes as long as all of them are 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmtoken.engine import gather
from mmtoken.engine.cache import LogicalLayer, logical_layer
from mmtoken.engine.masks import causal
from mmtoken.engine.prefill import Prefill


def note_sizes(call: Prefill) -> None:
    """Take over the sizes of the tokens that are left, float[B, L] of log(size), into the call."""
    tokens, rows = call.tokens, call.items.row_index[:, None]
    where = tokens.valid & (tokens.size != 1)
    if not bool(where.any()):
        return
    places = call.places(tokens)
    call.weight = torch.zeros(call.real.shape, device=call.real.device)
    call.weight[rows.expand_as(places)[where], places[where]] = tokens.size[where].float().log()


def enter_layer(decoder: Any, call: Prefill, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments during the prefill, with the weights of the tokens that it sees."""
    stored = logical_layer(call.cache, number)
    before = None if stored is None else stored.weight
    if call.weight is None and before is None:
        return kwargs
    length = call.cut.index.shape[1]
    mine = _of_cut(call, number)
    call.layer_weight[number] = mine
    earlier = mine[..., :0] if stored is None else stored.recent(mine[..., :0] if before is None else before, 0)
    weight = torch.cat([earlier, mine.expand(-1, earlier.shape[1], -1)], -1)
    mask = add_weight(decoder, kwargs.get("attention_mask"), weight, length, call.embeds.dtype)
    return {**kwargs, "attention_mask": mask}


def record(call: Prefill, number: int, stored: LogicalLayer) -> None:
    """Note the weights of the entries that a layer has just stored."""
    mine = call.layer_weight.get(number)
    if mine is None:
        return
    past = stored.appended() - mine.shape[-1]
    before = _widen(mine[..., :0] if stored.weight is None else stored.weight, past)
    stored.weight = torch.cat([before, mine.expand(-1, before.shape[1], -1)], -1)


def decode_mask(decoder: Any, stored: LogicalLayer, mask: Tensor | None, length: int, dtype: torch.dtype) -> Any:
    """The mask of a decoding step [B, H, q, k] with the weights of stored entries."""
    if stored.weight is None:
        return mask
    weight = stored.recent(stored.weight, length)
    weight = weight if mask is None else _widen(weight, mask.shape[-1])
    return add_weight(decoder, mask, weight, length, dtype)


def add_weight(decoder: Any, mask: Tensor | None, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """An additive mask float[B, 1 or H, q, k].

    Args:
        decoder: the text model.
        mask: bool or additive [B or 1, 1 or H, q, k], or None where the attention does without.
        weight: float[B, 1 or G, k], what is added to every query's scores.
        length: q.
        dtype: of the mask.
    """
    width = weight.shape[-1]
    lowest = torch.finfo(dtype).min
    if mask is None:
        own = torch.arange(width - length, width, device=weight.device)[:, None]
        mask = (torch.arange(width, device=weight.device) <= own)[None, None]
        mask = mask if causal(decoder) else torch.ones_like(mask)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    if weight.shape[1] > 1:
        weight = weight.repeat_interleave(decoder.config.num_attention_heads // weight.shape[1], 1)
    # A hidden key stays hidden, however large it is.
    return torch.where(mask <= lowest / 2, mask, mask + weight[:, :, None].to(dtype))


def _of_cut(call: Prefill, number: int) -> Tensor:
    """float[B, 1, n]: weights of the current sequence; 0 on padding."""
    weight = torch.zeros(call.real.shape, device=call.real.device) if call.weight is None else call.weight
    return gather.last(weight, call.cut.index).masked_fill(~call.cut.valid_mask(), 0.0)[:, None]


def _widen(weight: Tensor, width: int) -> Tensor:
    return nn.functional.pad(weight, (0, width - weight.shape[-1]))
