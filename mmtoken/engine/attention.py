"""Reads single rows of attention out of a running decoder, without ever forming the square matrix.

Transformers looks attention functions up by name at every call. One registered name wraps `sdpa`: it hands the rotated
queries and keys to whoever listens in this thread and then calls the very same function, so outputs do not change by
a bit. A model is switched to the name by a private copy of its text config.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmtoken.kernels.attention_rows import Mean, attention_rows

TAPPED_SDPA = "mmtoken_sdpa"

Listener = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float], bool]
"""Called with (attention module, queries [B, H, q, d], keys and values [B, G, k, d], mask (None: causal), scaling);
True skips the attention itself."""

_listening = threading.local()


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    listener: Listener | None = getattr(_listening, "listener", None)
    if listener is not None:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask
        if mask is None and not getattr(module, "is_causal", True):
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        if listener(module, query, key, value, mask, scaling):
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return output


def register() -> None:
    """Add the tapped name to transformers' registries of attention and mask functions; safe to repeat.

    Without the mask entry transformers would silently build no mask at all.
    """
    if TAPPED_SDPA not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(TAPPED_SDPA, _tapped_sdpa)
        ALL_MASK_ATTENTION_FUNCTIONS.register(TAPPED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def listen(listener: Listener | None) -> None:
    """Let `listener` see every tapped attention call of this thread from now on; None: nobody."""
    _listening.listener = listener


def listener() -> Listener | None:
    """Who listens in this thread."""
    found: Listener | None = getattr(_listening, "listener", None)
    return found


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """The same inside a with statement; whoever listened before listens again afterwards."""
    before = getattr(_listening, "listener", None)
    listen(listener)
    try:
        yield
    finally:
        listen(before)


class PrivateConfig:
    """Gives a decoder a config of its own, so that switching its attention touches no other model."""

    def __init__(self, decoder: nn.Module) -> None:
        self.original: Any = decoder.config
        self.config: Any = copy.copy(self.original)
        self.holders = [m for m in decoder.modules() if m.__dict__.get("config") is self.original]
        for module in self.holders:
            module.config = self.config

    def restore(self) -> None:
        for module in self.holders:
            module.config = self.original


class _Nothing(nn.Module):
    """Stands in for a projection whose result nobody reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, states: Tensor) -> Tensor:
        return states.new_zeros(1).expand(*states.shape[:-1], self.width)


def tapped_copy(module: Any, *, values: bool = True) -> Any:
    """A shallow copy of an attention module that uses the tapped attention, whatever the model uses.

    The module itself and its config stay as they are: other threads may be running it.

    Args:
        module: the attention of a decoder layer.
        values: False leaves out the projections of values and of the output, where the listener skips the attention
            and reads queries and keys only.
    """
    tapped = copy.copy(module)
    tapped.config = copy.copy(module.config)
    tapped.config._attn_implementation = TAPPED_SDPA
    left_out = ("o_proj",) if values else ("v_proj", "o_proj")
    tapped._modules = dict(module._modules)
    for name in left_out:
        if isinstance(module._modules.get(name), nn.Linear):
            tapped._modules[name] = _Nothing(module._modules[name].out_features)
    return tapped


@torch.no_grad()
def attention_of(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    index: Tensor,
    past: int,
    *,
    mean: Mean = "none",
    valid: Tensor | None = None,
) -> Tensor:
    """Attention of some queries of each row of a decoder layer.

    Args:
        query: float[B, H, q, d], rotated.
        key: float[B, G, k, d], rotated, G dividing H; entries beyond past + q are unused buffer.
        mask: bool or additive [B or 1, 1, q, k or more], or None for causal attention.
        scaling: factor on the dot products.
        index: int[B, R], which queries of each row.
        past: keys that precede the first query.
        mean: "none", "heads" or "queries" (over heads and queries).
        valid: bool[B, R], the queries that count in the mean over queries; None: all.

    Returns:
        float32[B, H, R, k], [B, R, k] or [B, k]; zeros of queries that see nothing. Nothing is recorded for gradients:
        checkpointing runs the layer again without a listener and compares what was recorded.
    """
    return attention_rows(
        query,
        key,
        scale=scaling,
        index=index,
        mask=None if mask is None else mask[:, 0, :, : key.shape[2]],
        causal_offset=past if mask is None else None,
        valid=valid,
        mean=mean,
    )
