"""The cache site: right after a decoder layer's attention in the prefill, entries leave that layer's keys and values.

The prefill itself is untouched, to the bit. Different heads may lose different entries; each row loses the same number
in every head, so that a layer stays one tensor. Padding leaves together with the first entry of the call that is
evicted, and comes back only where a row keeps fewer entries than another one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtoken.compressors.base import CacheEntry
from mmtoken.engine import attention, calibration, masks
from mmtoken.engine.cache import LogicalDynamicLayer, LogicalLayer, attention_kinds, logical_layer
from mmtoken.engine.compat import CACHE
from mmtoken.engine.context import CallContext
from mmtoken.engine.positions import rotary_tables
from mmtoken.engine.prefill import Prefill
from mmtoken.engine.report import SiteReport
from mmtoken.errors import MMTokenError, UnsupportedError

if TYPE_CHECKING:
    from mmtoken.engine.session import Session


class _Seen(threading.local):
    """What the attention in progress has shown.

    Attributes:
        outer: who listened before.
        query: float[B, H, n, d], rotated.
        unrotated: before the rotary embedding, as the module put it out; see `per_head`.
        scaling: factor on the dot products.
    """

    outer: attention.Listener | None = None
    query: Tensor | None = None
    unrotated: Tensor | None = None
    scaling: float = 1.0

    def forget(self) -> None:
        self.outer = self.query = self.unrotated = None


class Eviction:
    """Sets the hooks that let a compressor act on the cache of one decoder."""

    def __init__(self, session: Session, decoder: Any, context: Callable[[Prefill, Tensor], CallContext]) -> None:
        self.session = session
        self.decoder = decoder
        self.context = context
        self.acts = "cache" in session.compressor.sites
        self.seen = _Seen()
        self.kinds = attention_kinds(decoder.config)

    def install(self, undo: ExitStack) -> None:
        """Set everything; `undo` takes it away."""
        if not self.acts:
            return
        attention.tap(self.decoder, undo)
        for number, layer in enumerate(self.decoder.layers):
            module = layer.self_attn
            last = query_module(module, number)
            for handle in (
                module.register_forward_pre_hook(functools.partial(self._before, number)),
                last.register_forward_hook(self._note_unrotated),
                module.register_forward_hook(functools.partial(self._after, number), with_kwargs=True),
            ):
                undo.callback(handle.remove)

    def check_cache(self, cache: Any) -> None:
        """Refuse a call whose cache cannot lose entries.

        Raises:
            UnsupportedError: there is no cache, or its layers cannot shrink.
        """
        if not self.acts:
            return
        name = type(self.session.compressor).__name__
        if cache is None:
            if self.decoder.training and self.session.compressor.sites != {"cache"}:
                return  # nothing is decoded after a training step
            raise UnsupportedError(
                f"use_cache=False: {name} takes entries out of the cache, and this call has none; leave use_cache=True."
            )
        for number, layer in enumerate(cache.layers):
            if not isinstance(layer, LogicalDynamicLayer):
                raise UnsupportedError(
                    f"past_key_values.layers[{number}] is allocated in advance and cannot shrink, so {name} would save "
                    "nothing; use a DynamicCache."
                )

    def hide_earlier(self, call: Prefill, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments without what was hidden in an earlier turn (mode="mask")."""
        stored = logical_layer(call.cache, number)
        if stored is None or stored.hidden is None:
            return kwargs
        mask = kwargs.get("attention_mask")
        gone = stored.recent(stored.hidden, call.cut.index.shape[1])
        return {**kwargs, "attention_mask": masks.hide_per_head(self.decoder, gone, mask)}

    def _before(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.session.thread.prefill is None or not self._own(number, module):
            return
        self.seen.forget()
        self.seen.outer = attention.listener()
        attention.listen(self._listen)

    def _own(self, number: int, module: nn.Module) -> bool:
        """Whether this is the layer's module, not a copy of it that computes scores (copies share hooks)."""
        return self.decoder.layers[number].self_attn is module

    def _listen(self, module: nn.Module, query: Tensor, key: Tensor, *rest: Any) -> bool:
        self.seen.query, self.seen.scaling = query.detach(), rest[-1]
        return self.seen.outer is not None and self.seen.outer(module, query, key, *rest)

    def _note_unrotated(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.session.thread.prefill is not None:
            self.seen.unrotated = output.detach()

    def _after(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        call = self.session.thread.prefill
        if call is None or not self._own(number, module):
            return
        attention.listen(self.seen.outer)
        stored = logical_layer(call.cache, number)
        if stored is not None:
            if self.seen.query is None:
                self._ask_again(module, args, kwargs)
            self._act(call, number, stored, args[0] if args else kwargs["hidden_states"])
        self.seen.forget()

    def _ask_again(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Eager attention cannot be listened to: project the queries once more."""

        def listener(module: nn.Module, query: Tensor, key: Tensor, *rest: Any) -> bool:
            self.seen.query, self.seen.scaling = query, rest[-1]
            return True

        with torch.no_grad(), attention.listening(listener):
            attention.tapped_copy(module, values=False)(*args, **{**kwargs, CACHE: None})

    @torch.no_grad()
    def _act(self, call: Prefill, number: int, stored: LogicalLayer, hidden: Tensor) -> None:
        assert isinstance(stored, LogicalDynamicLayer) and call.base is not None
        session, cut = self.session, call.layer_cut.get(number, call.base)
        stored.record(cut.index, cut.valid, call.length, cut.group, cut.shift)
        calibration.record(call, number, stored)
        call.recorded.add(number)
        columns = stored.all_columns()
        entry, index = self._entry(call, number, stored, columns)
        context = self.context(call, hidden)
        context.learned = session.parts(hidden.device)
        started = session.clock()
        keep = session.compressor.cache(entry, number, context)
        seconds = session.clock() - started
        keep = check_choice(keep, entry, type(session.compressor).__name__)
        session.note(_report(call, number, entry, index, keep, seconds))
        # Each layer loses entries of its own, so no two share a mask; cuts have the lower numbers.
        stored.group = len(self.decoder.layers) + 1 + number
        stored.settled = stored.get_seq_length()
        if bool((keep == entry.valid[:, None]).all()):
            return
        if session.mode == "mask":
            stored.hide(keep)
        else:
            stored.evict(keep)

    def _entry(
        self, call: Prefill, number: int, stored: LogicalDynamicLayer, columns: Tensor
    ) -> tuple[CacheEntry, Tensor]:
        """What the compressor gets, and int[B, n] which token of its item each entry is (-1: none that may go)."""
        keys, values = stored.held()
        query, unrotated = self.seen.query, self.seen.unrotated
        assert query is not None and unrotated is not None
        rows = len(query)
        unrotated = per_head(unrotated, query)
        seen = columns >= 0
        mask = call.masks[number]
        if mask is not None:
            visible = mask.expand(rows, -1, -1, -1)[torch.arange(rows, device=columns.device), 0, call.last_token]
            visible = visible if visible.dtype == torch.bool else visible == 0
            seen = seen & visible.gather(1, columns.clamp(min=0))
        item, index = self._items(call)

        def at_columns(values: Tensor) -> Tensor:
            padded = nn.functional.pad(values, (call.past, 0), value=-1)
            return padded.gather(1, columns.clamp(min=0)).masked_fill(~seen, -1)

        entry = CacheEntry(
            keys=keys.detach(),
            values=values.detach(),
            queries=query,
            unrotated=unrotated,
            valid=seen,
            item=at_columns(item),
            length=_next_position(call, stored),
            scaling=self.seen.scaling,
            rotary=functools.partial(_rotary, self.decoder, call, self.kinds[number], unrotated, query),
        )
        return entry, at_columns(index)

    @staticmethod
    def _items(call: Prefill) -> tuple[Tensor, Tensor]:
        """int[B, L]: number of the item within its row, and place within the item; -1 for what may not be dropped."""
        items, tokens = call.items, call.tokens
        item = torch.full(call.real.shape, -1, device=call.real.device)
        index = item.clone()
        ordinal = 0
        for number, row in enumerate(items.rows):
            ordinal = ordinal + 1 if number and items.rows[number - 1] == row else 0
            source = tokens.source[number][tokens.eligible[number]]
            places = items.places[number][source]
            item[row, places], index[row, places] = ordinal, source
        return item, index


def query_module(module: Any, number: int) -> nn.Module:
    """The module of an attention layer whose output are the queries before the rotary embedding.

    Raises:
        UnsupportedError: it has none.
    """
    found: dict[str, nn.Module] = module._modules
    last = found.get("q_norm", found.get("q_proj"))
    if last is None:
        raise UnsupportedError(
            f"decoder layer {number} has neither q_norm nor q_proj ({type(module).__name__}), so its queries cannot be "
            "read; use a method that acts before or between the layers."
        )
    return last


def per_head(unrotated: Tensor, query: Tensor) -> Tensor:
    """float[B, H, n, d]: the queries that a module put out before the rotary embedding.

    Some models normalise queries before they bring heads to the front (Qwen3), others afterwards (Gemma 3).

    Args:
        unrotated: float[B, n, H * d], float[B, n, H, d] or float[B, H, n, d].
        query: float[B, H, n, d], rotated.
    """
    rows, heads, length, width = query.shape
    by_place = unrotated.reshape(rows, length, heads, width).transpose(1, 2)
    if unrotated.shape != query.shape:
        return by_place
    if heads != length:
        return unrotated
    # As many heads as tokens: shapes do not tell. Rotation leaves the length of every query as it was.
    lengths = query.float().norm(dim=-1)
    off = [float((reading.float().norm(dim=-1) - lengths).abs().max()) for reading in (by_place, unrotated)]
    return by_place if off[0] <= off[1] else unrotated


def check_choice(keep: Tensor, entry: CacheEntry, name: str) -> Tensor:
    """bool[B, G, n]: the choice without padding.

    Raises:
        MMTokenError: its shape or type is wrong, or heads of a row keep different numbers of entries.
    """
    rows, groups, length = entry.keys.shape[:3]
    if keep.dtype != torch.bool or keep.shape != (rows, groups, length):
        raise MMTokenError(
            f"{name}.cache returned {keep.dtype} of shape {tuple(keep.shape)}; expected bool{[rows, groups, length]}."
        )
    keep = keep & entry.valid[:, None]
    counts = keep.sum(-1)
    if bool((counts != counts[:, :1]).any()):
        raise MMTokenError(f"{name}.cache keeps {counts.tolist()} entries per row and head; heads must keep the same.")
    return keep


def _next_position(call: Prefill, stored: LogicalLayer) -> Tensor:
    """int[B]: position id of the token that follows the prompt; of several axes the rotary embedding's."""
    positions = call.position_ids
    axes = positions[-3:] if positions.ndim == 3 else positions[None]
    rows = call.real.shape[0]
    last = axes.expand(-1, rows, -1).gather(2, call.last_token[None, :, None].expand(len(axes), -1, -1))
    length = last[..., 0].amax(0) + 1
    return length if stored.shift is None else length - stored.shift


def _rotary(
    decoder: Any, call: Prefill, kind: str, unrotated: Tensor, query: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """See `CacheEntry.rotary`. Only methods that ask pay for the comparison of the queries before and after."""
    axes = positions.expand(3, *positions.shape) if call.position_ids.ndim == 3 else positions
    cosine, sine = rotary_tables(decoder, call.embeds, axes, kind)
    if torch.equal(unrotated, query):  # some decoders rotate in layers with a sliding window only (Cohere 2)
        cosine, sine = torch.ones_like(cosine), torch.zeros_like(sine)
    # Text has the same position on every axis.
    return (cosine[0], sine[0]) if cosine.ndim == 4 else (cosine, sine)


def _report(call: Prefill, number: int, entry: CacheEntry, index: Tensor, keep: Tensor, seconds: float) -> SiteReport:
    tokens_in, tokens_out, kept, heads = [], [], [], []
    ordinal = 0
    for item, row in enumerate(call.items.rows):
        ordinal = ordinal + 1 if item and call.items.rows[item - 1] == row else 0
        mine = entry.item[row] == ordinal
        left, places = keep[row][:, mine], index[row, mine]
        tokens_in.append(len(places))
        kept.append(places[left.any(0)])
        heads.append([places[head] for head in left])
        tokens_out.append(max((len(head) for head in heads[-1]), default=0))
    return SiteReport("cache", number, tokens_in, tokens_out, kept, seconds, heads=heads)
