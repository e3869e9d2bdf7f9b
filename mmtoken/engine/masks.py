"""The masks that decoder layers get: those of the uncompressed model, with the rows and columns that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mmtoken.engine import attention, gather
from mmtoken.engine.cache import FULL, SLIDING, LogicalLayer, logical_layer
from mmtoken.engine.compat import CACHE
from mmtoken.engine.prefill import Cut, Prefill
from mmtoken.errors import UnsupportedError


def dense_masks(
    decoder: Any, kinds: list[str], embeds: Tensor, given: Any, cache: Any, positions: Tensor | None, past: int
) -> list[Tensor | None]:
    """The masks that the uncompressed model would use, one per layer; layers of one kind share one.

    Args:
        decoder: the text model.
        kinds: the kind of each layer, see `attention_kinds`.
        embeds: float[B, q, D]; only shape, dtype and device count.
        given: the caller's mask, two- or four-dimensional, a mask per kind, or None.
        cache: the cache, with logical layers.
        positions: position ids of this call; a packed sequence is recognised by them.
        past: tokens the cache had seen before.

    Returns:
        Each [B, 1, q, logical keys], or None where the attention does without (see `causal`).

    Raises:
        UnsupportedError: the caller's masks leave a kind out.
    """
    if positions is not None and positions.ndim == 3:
        # M-RoPE: the text positions come first, if they come at all.
        positions = positions[0] if positions.shape[0] == 4 else None
    given = attention.dense(given)
    found: dict[str, Tensor | None] = {}
    for kind in set(kinds):
        if isinstance(given, dict):
            if kind not in given:
                raise UnsupportedError(
                    f"attention_mask has entries for {sorted(given)}, but the model has layers of kind {kind!r}."
                )
            mask = attention.dense(given[kind])
        else:
            make: Any = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
            mask = make(
                config=decoder.config,
                inputs_embeds=embeds,
                attention_mask=given,
                **{CACHE: cache},
                position_ids=positions,
            )
        if isinstance(mask, Tensor) and mask.ndim == 4:
            # Masks of a layer that has forgotten its first entries begin at the window.
            gone = past + embeds.shape[1] - mask.shape[-1]
            mask = nn.functional.pad(mask, (gone, 0), value=gather.hidden_value(mask)) if gone > 0 else mask
        found[kind] = mask if isinstance(mask, Tensor) else None
    return [found[kind] for kind in kinds]


def causal(decoder: Any) -> bool:
    """Whether attention without a mask is causal; in prefix language models it sees everything."""
    return bool(getattr(decoder.layers[0].self_attn, "is_causal", True))


def prefill_mask(decoder: Any, call: Prefill, cut: Cut, number: int, hidden: Tensor) -> Tensor | None:
    """The mask of one decoder layer during a prefill: [B, 1, n, stored + n], int[B, n] of ones, or None.

    Args:
        decoder: the text model.
        call: the prefill.
        cut: what is left for this layer.
        number: of the layer.
        hidden: float[B, n, D], the shortened sequence.
    """
    stored, mask = logical_layer(call.cache, number), call.masks[number]
    if mask is not None:
        columns, past = _prefill_columns(call, cut, stored)
        mask = gather.mask_columns(gather.mask_rows(mask, cut.index), columns)
        return mask if cut.valid is None else gather.let_padding_see_itself(mask, cut.valid, past)
    if cut.valid is None:
        # A mask of ones says "one sequence per row": without cache and mask, transformers takes gaps in the position
        # ids for borders between packed sequences.
        return None if call.cache is not None else torch.ones_like(cut.index)
    if causal(decoder):
        padded = dense_masks(decoder, [FULL], hidden, cut.valid, None, None, 0)[0]
    else:
        padded = everything_real(decoder, cut.valid)
    if padded is None:
        return None
    if stored is not None:
        missing = stored.width(hidden.shape[1]) - padded.shape[-1]
        padded = nn.functional.pad(padded, (0, missing), value=gather.hidden_value(padded))
    return gather.let_padding_see_itself(padded, cut.valid, 0)


def _prefill_columns(call: Prefill, cut: Cut, stored: LogicalLayer | None) -> tuple[Tensor, int]:
    """int[B, k] logical columns of what the layer will hold, and how many of them precede this call."""
    index = cut.index + call.past
    if cut.valid is not None:
        index = index.masked_fill(~cut.valid, -1)
    if stored is None:
        return index, 0
    past = stored.stored()
    if past:
        index = torch.cat([stored.all_columns(), index], -1)
    return nn.functional.pad(index, (0, stored.width(cut.index.shape[1]) - index.shape[1]), value=-1), past


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
        mask = gather.mask_columns(mask, columns.expand(mask.shape[0] if len(columns) == 1 else -1, -1))
    elif columns is not None:
        mask = _as_mask(decoder, (columns >= 0)[:, None, None, :].expand(-1, -1, length, -1))
    return mask if stored.hidden is None else hide_per_head(decoder, stored.recent(stored.hidden, length), mask)


def _as_mask(decoder: Any, seen: Tensor) -> Tensor:
    """A mask of the kind that the decoder's attention takes, from bool[B, H, q, k]."""
    if decoder.config._attn_implementation != "eager":
        return seen
    dtype: torch.dtype = decoder.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def everything_real(decoder: Any, real: Tensor) -> Tensor:
    """A mask [B, 1, L, L] under which every token sees every real one, bool[B, L]."""
    return _as_mask(decoder, real[:, None, None, :].expand(-1, -1, real.shape[1], -1))


def hide_per_head(decoder: Any, gone: Tensor, mask: Tensor | None) -> Tensor:
    """A mask [B, 1, q, k] (None: one query that sees all) without hidden entries bool[B, G, k], per head."""
    gone = gone.repeat_interleave(decoder.config.num_attention_heads // gone.shape[1], 1)[:, :, None]
    if mask is None:
        return _as_mask(decoder, ~gone)  # a single query sees all that is left
    return mask.masked_fill(gone, gather.hidden_value(mask))


def like(given: Any, kinds: list[str], masks: Callable[[int], Tensor | None]) -> Any:
    """The masks for a decoder, in the form in which the caller handed its own in where that form can hold them.

    Args:
        given: the caller's mask.
        kinds: the kind of each layer.
        masks: gives the mask of a layer by its number.
    """
    if isinstance(given, dict) or len(set(kinds)) > 1:
        found = {kind: masks(kinds.index(kind)) for kind in set(kinds)}
        # Two-dimensional ones are for decoders that make masks of them; these go to the layers as they are.
        return {kind: mask if mask is not None and mask.ndim == 4 else None for kind, mask in found.items()}
    return masks(0)


def real_tokens(given: Any, everything: Tensor, past: int) -> Tensor:
    """bool[B, L]: which tokens of this call are not padding.

    Args:
        given: the caller's mask, a mask per kind of layer, or None.
        everything: bool[B, L], all True.
        past: tokens the cache had seen before.

    Raises:
        UnsupportedError: of masks per kind there is none for layers that attend to the whole sequence.
    """
    if isinstance(given, dict):
        if FULL not in given:
            raise UnsupportedError(
                f"attention_mask has entries for {sorted(given)} only, which do not tell padding from what lies before "
                "the window; pass a two-dimensional attention_mask."
            )
        given = given[FULL]
    given = attention.dense(given)
    rows, length = everything.shape
    if not isinstance(given, Tensor):
        return everything
    if given.ndim == 2:
        return given[:, -length:].bool()
    # generate() hands four-dimensional masks to compilable caches; the last query sees every real key.
    seen = given[:, 0, -1, past : past + length]
    return (seen if seen.dtype == torch.bool else seen == 0).expand(rows, -1)
