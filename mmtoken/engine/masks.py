"""The masks that decoder layers get: those of the uncompressed model, with the rows and columns that are left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from mmtoken.engine import attention, gather
from mmtoken.engine.cache import LogicalLayer, logical_layer
from mmtoken.engine.compat import CACHE
from mmtoken.engine.prefill import Cut, Prefill
from mmtoken.errors import UnsupportedError


def dense_mask(decoder: Any, embeds: Tensor, given: Any, cache: Any, positions: Tensor | None) -> Tensor | None:
    """The mask that the uncompressed model would use: [B, 1, q, logical keys], or None where it is plainly causal.

    Args:
        decoder: the text model.
        embeds: float[B, q, D]; only shape, dtype and device count.
        given: the caller's mask, two- or four-dimensional, or None.
        cache: the cache, with logical layers.
        positions: position ids of this call; a packed sequence is recognised by them.
    """
    if positions is not None and positions.ndim == 3:
        # M-RoPE: the text positions come first, if they come at all.
        positions = positions[0] if positions.shape[0] == 4 else None
    mask: Any = create_causal_mask(
        config=decoder.config,
        inputs_embeds=embeds,
        attention_mask=given,
        **{CACHE: cache},
        position_ids=positions,
    )
    return mask if isinstance(mask, Tensor) else None


def prefill_mask(decoder: Any, call: Prefill, cut: Cut, layer: int, hidden: Tensor) -> Tensor | None:
    """The mask of one decoder layer during a prefill: [B, 1, n, stored + n], int[B, n] of ones, or None.

    Args:
        decoder: the text model.
        call: the prefill.
        cut: what is left for this layer.
        layer: its number.
        hidden: float[B, n, D], the shortened sequence.
    """
    stored = logical_layer(call.cache, layer)
    if call.mask is not None:
        columns, past = _prefill_columns(call, cut, stored)
        mask = gather.mask_columns(gather.mask_rows(call.mask, cut.index), columns)
        return mask if cut.valid is None else gather.let_padding_see_itself(mask, cut.valid, past)
    if cut.valid is None:
        # A mask of ones says "one sequence per row": without cache and mask, transformers takes gaps in the position
        # ids for borders between packed sequences.
        return None if call.cache is not None else torch.ones_like(cut.index)
    padded = dense_mask(decoder, hidden, cut.valid, None, None)
    if padded is None:
        return None
    capacity = _capacity(stored)
    if capacity is not None:
        padded = nn.functional.pad(padded, (0, capacity - padded.shape[-1]), value=gather.hidden_value(padded))
    return gather.let_padding_see_itself(padded, cut.valid, 0)


def _capacity(stored: LogicalLayer | None) -> int | None:
    """Width of the mask of a pre-allocated layer."""
    capacity = getattr(stored, "max_cache_len", None)
    return capacity if isinstance(capacity, int) else None


def _prefill_columns(call: Prefill, cut: Cut, stored: LogicalLayer | None) -> tuple[Tensor, int]:
    """int[B, k] logical columns of what the layer will hold, and how many of them precede this call."""
    index = cut.index + call.past
    if cut.valid is not None:
        index = index.masked_fill(~cut.valid, -1)
    if stored is None:
        return index, 0
    past = stored.stored()
    before = stored.columns(0)
    if before is None:
        before = torch.arange(past, device=index.device).expand(index.shape[0], -1)
    columns = torch.cat([before[:, :past], index], -1)
    capacity = _capacity(stored)
    if capacity is not None:
        columns = nn.functional.pad(columns, (0, capacity - columns.shape[1]), value=-1)
    return columns, past


def decode_mask(decoder: Any, stored: LogicalLayer, mask: Tensor | None, length: int) -> Tensor | None:
    """The logical mask with the columns that a layer stores.

    Args:
        decoder: the text model.
        stored: the layer of the cache, before this call's keys are added.
        mask: [B, 1, q, logical keys] or None.
        length: q.
    """
    columns = stored.columns(length) if (mask is not None or stored.ragged) else None
    if columns is not None and mask is not None:
        mask = gather.mask_columns(mask, columns)
    elif columns is not None:
        mask = _as_mask(decoder, (columns >= 0)[:, None, None, :].expand(-1, -1, length, -1))
    return mask if stored.hidden is None else hide_per_head(decoder, stored.hidden, stored.stored() + length, mask)


def _as_mask(decoder: Any, seen: Tensor) -> Tensor:
    """A mask of the kind that the decoder's attention takes, from bool[B, H, q, k]."""
    if decoder.config._attn_implementation != "eager":
        return seen
    dtype: torch.dtype = decoder.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def hide_per_head(decoder: Any, hidden: Tensor, length: int, mask: Tensor | None) -> Tensor:
    """A mask [B, 1, q, length] (None: one query that sees all) without hidden entries bool[B, G, n], per head."""
    gone = nn.functional.pad(hidden, (0, length - hidden.shape[2]), value=False)
    gone = gone.repeat_interleave(decoder.config.num_attention_heads // gone.shape[1], 1)[:, :, None]
    if mask is None:
        return _as_mask(decoder, ~gone)  # a single query sees all that is left
    return mask.masked_fill(gone, gather.hidden_value(mask))


def full_attention(given: Any) -> Any:
    """The mask of full-attention layers, where the caller hands in one per layer type; never a `BlockMask`.

    Raises:
        UnsupportedError: the model has layers of other types.
    """
    if not isinstance(given, dict):
        return attention.dense(given)
    if set(given) != {"full_attention"}:
        raise UnsupportedError(
            f"attention_mask has entries for {sorted(given)}; only models whose layers all attend fully can be "
            "compressed."
        )
    return attention.dense(given["full_attention"])


def like(given: Any, mask: Tensor | None) -> Any:
    """`mask` in the form in which the caller handed its mask in."""
    return {"full_attention": mask} if isinstance(given, dict) else mask


def real_tokens(given: Any, everything: Tensor, past: int) -> Tensor:
    """bool[B, L]: which tokens of this call are not padding.

    Args:
        given: the caller's mask or None.
        everything: bool[B, L], all True.
        past: tokens the cache had seen before.
    """
    rows, length = everything.shape
    if not isinstance(given, Tensor):
        return everything
    if given.ndim == 2:
        return given[:, -length:].bool()
    # generate() hands four-dimensional masks to compilable caches; the last query sees every real key.
    seen = given[:, 0, -1, past : past + length]
    return (seen if seen.dtype == torch.bool else seen == 0).expand(rows, -1)
