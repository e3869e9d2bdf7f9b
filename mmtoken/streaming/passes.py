"""Runs rows through the decoder's layers, each layer over its own held keys and values.

The layers are called one by one, because in a stream they may hold different rows and stand at different positions,
for which the decoder's own forward has no room. Keys are kept as they are before the rotary embedding, which a hook
on the module that puts them out reads to the bit.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmtoken.engine import attention
from mmtoken.engine.cache import SLIDING, attention_kinds
from mmtoken.engine.compat import CACHE
from mmtoken.engine.eviction import query_module
from mmtoken.errors import UnsupportedError
from mmtoken.streaming.framing import Rows

_MOVING_ROTARY = ("dynamic", "longrope")


@dataclass(frozen=True)
class Tables:
    """Rotary tables of some positions.

    Attributes:
        cosine, sine: float[n, d].
        given: what the decoder's layers are handed.
    """

    cosine: Tensor
    sine: Tensor
    given: tuple[Tensor, Tensor]

    def rotate(self, states: Tensor) -> Tensor:
        """Apply the rotary embedding to float[..., n, d]."""
        width = self.cosine.shape[-1]
        turned, rest = states[..., :width], states[..., width:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * self.cosine + torch.cat([-second, first], dim=-1) * self.sine
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


@dataclass(frozen=True)
class Seen:
    """What a layer attends to besides the rows that run.

    Attributes:
        keys, values: float[1, G, m, d], keys rotated; None: nothing.
        tables: of the rows that run.
    """

    keys: Tensor | None
    values: Tensor | None
    tables: Tables

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


@dataclass
class LayerCache:
    """What the layers' attention takes for a cache.

    Attributes:
        grows: whether later calls see what earlier ones stored.
        seen: what the running layer attends to.
        keys, values: per layer float[1, G, n, d], of the rows that ran, keys rotated; with `grows` everything.
    """

    grows: bool = False
    seen: Seen | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention of a layer."""
        assert self.seen is not None
        everything = (keys, values)
        if self.seen.keys is not None and self.seen.values is not None:
            everything = (torch.cat([self.seen.keys, keys], 2), torch.cat([self.seen.values, values], 2))
        self.keys[layer], self.values[layer] = everything if self.grows else (keys, values)
        return everything


@dataclass
class _Noted:
    """Keys (and queries) before the rotary embedding, per layer float[n, heads, d]."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)


class _Thread(threading.local):
    noted: _Noted | None = None


@dataclass(frozen=True)
class Ran:
    """What a pass leaves behind.

    Attributes:
        hidden: float[1, n, D], behind the last layer, before the last norm.
        keys: per layer float[G, n, d], before the rotary embedding.
        values: per layer float[G, n, d].
        queries: per layer float[H, n, d], before the rotary embedding; empty unless asked for.
        tables: per layer.
    """

    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    tables: list[Tables]


class Passes:
    """The decoder of a model, run layer by layer.

    Args:
        decoder: the text model.

    Raises:
        UnsupportedError: its attention or rotary embedding cannot be used in a stream.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.layers: list[Any] = list(decoder.layers)
        config = decoder.config
        implementation = config._attn_implementation
        if implementation not in ("sdpa", "eager", attention.TAPPED_SDPA):
            raise UnsupportedError(
                f"attn_implementation={implementation!r} is not supported; load the model with 'sdpa' or 'eager'."
            )
        self.eager = implementation == "eager"
        if SLIDING in attention_kinds(config):
            raise UnsupportedError(
                "This decoder has layers with a sliding window, which forget what a stream may want to see again; a "
                "stream needs layers that attend to the whole sequence (sliding_window=None)."
            )
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in _MOVING_ROTARY:
            raise UnsupportedError(
                f"rope_type={kind!r} changes with the length of the input, so held keys cannot be placed anew; a "
                "stream needs a rotary embedding that does not ('default', 'linear', 'yarn')."
            )
        self._checked = False
        self._thread = _Thread()
        self._undo = ExitStack()
        for number, layer in enumerate(self.layers):
            queries, keys = query_module(layer.self_attn, number), _key_module(layer.self_attn, number)
            for module, name in ((queries, "queries"), (keys, "keys")):
                handle = module.register_forward_hook(functools.partial(self._note, number, name, layer.self_attn))
                self._undo.callback(handle.remove)

    def close(self) -> None:
        """Take the hooks away; safe to repeat."""
        self._undo.close()

    def _note(
        self, number: int, name: str, owner: Any, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        noted = self._thread.noted
        if noted is not None:
            heads = output.detach()
            getattr(noted, name)[number] = heads.reshape(heads.shape[1], -1, owner.head_dim).transpose(0, 1)

    # --- rotary -------------------------------------------------------------------------------------------------------

    def tables(self, positions: Tensor, like: Tensor) -> Tables:
        """Rotary tables of int[A, n] in the type of `like`."""
        axes = positions if len(positions) == 1 else positions[:, None]
        cosine, sine = self.decoder.rotary_emb(like, axes)
        return Tables(self._joined(cosine), self._joined(sine), (cosine, sine))

    def _joined(self, table: Tensor) -> Tensor:
        """float[n, d]; transformers 5.17 leaves the three axes of M-RoPE apart until a layer joins them."""
        if table.ndim == 3:
            return table[0]
        sections = [int(width) for width in self.decoder.config.rope_parameters["mrope_section"]] * 2
        return torch.cat([part[i % 3, 0] for i, part in enumerate(table.split(sections, dim=-1))], -1)

    def _check_rotary(self, raw: Tensor, rotated: Tensor, tables: Tables) -> None:
        """Refuse a decoder whose layers rotate in another way."""
        self._checked = True
        if not torch.allclose(tables.rotate(raw).float(), rotated.float(), rtol=1e-2, atol=1e-2):
            raise UnsupportedError(
                f"{type(self.decoder).__name__} applies a rotary embedding of another form, so held keys cannot be "
                "placed anew in a stream."
            )

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, rows: Rows, seen: Callable[[int, Tensor], Seen], cache: LayerCache, *, queries: bool = False) -> Ran:
        """Run rows through all layers.

        Args:
            rows: n of them.
            seen: what a layer attends to besides; called with its number and float[1, n, D] that enters it.
            cache: where keys and values go.
            queries: whether to note queries, too.
        """
        before, noted = self._thread.noted, _Noted()
        hidden, masks, tables = rows.embeddings[None], {}, []
        try:
            for number, layer in enumerate(self.layers):
                self._thread.noted = None
                cache.seen = now = seen(number, hidden)
                tables.append(now.tables)
                if now.length not in masks:
                    masks[now.length] = self.mask(len(rows), now.length, hidden)
                self._thread.noted = noted
                output = layer(
                    hidden,
                    attention_mask=masks[now.length],
                    position_ids=None,
                    position_embeddings=now.tables.given,
                    use_cache=True,
                    **{CACHE: cache},
                )
                hidden = output if isinstance(output, Tensor) else output[0]
                if not self._checked:
                    self._check_rotary(noted.keys[number], cache.keys[number][0][:, -len(rows) :], now.tables)
                if not queries:
                    noted.queries.clear()
                if number < len(rows.deepstack) and rows.visual is not None:
                    hidden = hidden.index_add(1, rows.visual, rows.deepstack[number][None].to(hidden.dtype))
        finally:
            self._thread.noted, cache.seen = before, None
        depth = range(len(self.layers))
        values = [] if cache.grows else [cache.values[number][0].detach() for number in depth]
        return Ran(
            hidden=hidden,
            keys=[noted.keys[number] for number in depth],
            values=values,
            queries=[noted.queries[number] for number in depth] if queries else [],
            tables=tables,
        )

    def mask(self, new: int, past: int, like: Tensor) -> Tensor | None:
        """[1, 1, new, past + new]: everything before, and among themselves what came before; None for a single row."""
        if new == 1:
            return None
        allowed = torch.ones(new, past + new, dtype=torch.bool, device=like.device).tril(past)[None, None]
        if not self.eager:
            return allowed
        return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)

    def queries(self, number: int, hidden: Tensor) -> Tensor:
        """float[H, n, d]: queries of a layer before the rotary embedding, for float[1, n, D] that enters it."""
        layer = self.layers[number]
        module, normed = layer.self_attn, layer.input_layernorm(hidden)
        queries: Tensor = module.q_proj(normed).view(hidden.shape[1], -1, module.head_dim)
        if "q_norm" in module._modules:
            queries = module.q_norm(queries)
        return queries.transpose(0, 1)

    def scaling(self, number: int) -> float:
        """Factor on the dot products of a layer."""
        module = self.layers[number].self_attn
        return float(getattr(module, "scaling", module.head_dim**-0.5))


def _key_module(module: Any, number: int) -> nn.Module:
    """The module of an attention layer whose output are the keys before the rotary embedding."""
    found: dict[str, nn.Module] = module._modules
    last = found.get("k_norm", found.get("k_proj"))
    if last is None:
        raise UnsupportedError(
            f"decoder layer {number} has neither k_norm nor k_proj ({type(module).__name__}), so its keys cannot be "
            "read before the rotary embedding, as a stream does."
        )
    return last


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Several float[G, k, d] after one another."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
