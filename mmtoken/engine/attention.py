"""Reads single rows of attention out of a running decoder, without ever forming the square matrix.

Transformers looks attention functions up by name at every call. A registered name wraps `sdpa`, another one
`flex_attention`: it hands the rotated queries and keys to whoever listens in this thread and then calls the very same
function, so outputs do not change by a bit. A model is switched to the name by a private copy of its text config.

Under either name masks are those of sdpa, dense or None; what flex takes instead is made of them at the last moment.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmtoken.errors import UnsupportedError
from mmtoken.kernels.attention_rows import Mean, attention_rows

TAPPED_SDPA = "mmtoken_sdpa"
TAPPED_FLEX = "mmtoken_flex_attention"

Listener = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float], bool]
"""Called with (attention module, queries [B, H, q, d], keys and values [B, G, k, d], mask (None: causal), scaling);
True skips the attention itself."""

_listening = threading.local()


def _skipped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> bool:
    """Let the listener hear of a call; whether it wants no attention."""
    listener: Listener | None = getattr(_listening, "listener", None)
    if listener is None:
        return False
    mask = _explicit(module, query, key, mask)
    return listener(module, query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _explicit(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Any:
    """The mask of a call, ones where there is none and the attention is not causal (prefix language models)."""
    if mask is None and not getattr(module, "is_causal", True):
        return torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return mask


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if _skipped(module, query, key, value, attention_mask, kwargs.get("scaling")):
        return _nothing(query, value)
    output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return output


def _tapped_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if _skipped(module, query, key, value, attention_mask, kwargs.get("scaling")):
        return _nothing(query, value)
    attention_mask = _explicit(module, query, key, attention_mask)
    block_mask = _block_mask(attention_mask, query.shape[2], key.shape[2], query.device)
    output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["flex_attention"](
        module, query, key, value, block_mask, **kwargs
    )
    return output


def _block_mask(mask: Tensor | BlockMask | None, queries: int, keys: int, device: torch.device) -> BlockMask:
    """What flex attention takes instead of a mask of sdpa; None means causal there and "sees all" here.

    Args:
        mask: bool[B or 1, H or 1, q, k]; None: causal attention of as many queries as keys, or one query that sees
            all.
        queries, keys: q and k.
        device: where the attention runs.
    """
    if isinstance(mask, BlockMask):
        return mask
    if mask is not None and mask.dtype != torch.bool:
        raise UnsupportedError(
            f"attention_mask is {mask.dtype}, and under attn_implementation='flex_attention' a compressed model adds "
            "nothing to scores; give a bool mask, or load the model with 'sdpa' or 'eager'."
        )
    # The layers of a call share their masks; an entry holds its mask, so that its id is not used again.
    memo: dict[tuple[int, int, int], tuple[Tensor | None, BlockMask]] = _listening.__dict__.setdefault("blocks", {})
    entry = (id(mask), queries, keys)
    if entry not in memo:
        rows, heads = (None, None) if mask is None else (mask.shape[0], mask.shape[1] if mask.shape[1] > 1 else None)
        seen = (_all if queries == 1 else _causal) if mask is None else _given(mask if heads else mask[:, 0])
        memo[entry] = (mask, create_block_mask(seen, rows, heads, queries, keys, device))
    return memo[entry][1]


# What a `BlockMask` is made of: whether a query sees a key, for indices of any shape.


def _all(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key >= 0


def _causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _given(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same from bool[B, q, k] or bool[B, H, q, k]."""
    if mask.ndim == 3:
        return lambda row, head, query, key: mask[row, query, key]
    return lambda row, head, query, key: mask[row, head, query, key]


def dense(mask: Any) -> Any:
    """The mask bool[B, H, q, k] that a `BlockMask` stands for; anything else as it is."""
    if not isinstance(mask, BlockMask):
        return mask
    rows, heads, queries, keys = mask.shape
    return create_mask(mask.mask_mod, rows, heads, queries, keys, mask.kv_num_blocks.device)


def register() -> None:
    """Add the tapped names to transformers' registries of attention and mask functions; safe to repeat.

    Without the mask entries transformers would silently build no mask at all.
    """
    for name, function in ((TAPPED_SDPA, _tapped_sdpa), (TAPPED_FLEX, _tapped_flex)):
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, function)
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def tap(decoder: Any, undo: ExitStack) -> None:
    """Switch a decoder to the tapped name of its attention until `undo` closes.

    Eager attention is no function of its own and stays as it is.
    """
    register()
    tapped = {"sdpa": TAPPED_SDPA, "flex_attention": TAPPED_FLEX}.get(decoder.config._attn_implementation)
    if tapped is not None:
        private = PrivateConfig(decoder)
        undo.callback(private.restore)
        private.config._attn_implementation = tapped


def listen(listener: Listener | None) -> None:
    """Let `listener` see every tapped attention call of this thread from now on; None: nobody."""
    _listening.listener = listener
    if listener is None:
        _listening.__dict__.pop("blocks", None)


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
    # accelerate moves weights in a forward of the instance, which would run the module itself; what holds the weights
    # moves them as well.
    tapped.__dict__.pop("forward", None)
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
