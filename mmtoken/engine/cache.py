"""Cache layers whose length is logical: they count the tokens a layer has seen, not those it still stores.

Transformers derives default positions, slices of the prompt, mask sizes and crops from a cache's length. With logical
lengths all of that stays as in the uncompressed model, and masks always come in logical columns; the engine picks the
columns that a layer stores (`columns`). Transformers does the same for sliding windows.

A layer with a sliding window forgets all but the newest window - 1 entries. What is left of a compressed prompt lies
closer together in the layer than in the prompt, so these always hold all that the window of the uncompressed model
shows; the mask in logical columns hides the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from mmtoken.errors import UnsupportedError


class LogicalLayer:
    """What a compressed layer remembers besides keys and values.

    Attributes:
        dropped: tokens seen but not stored.
        slots: int[B, n] logical column of the first n entries ever stored, -1 for padding; later entries follow on
            without gaps. None when nothing was dropped.
        ragged: whether `slots` contains padding.
        group: which cut produced `slots`; layers of one group hold equal `slots`.
        shift: int[B], by how much later positions move down (positions="renumber"), or None.
        hidden: bool[B, G, n], which of the first n entries no later token sees, per head; None: all are seen.
        weight: float[B, 1 or G, n] added to the attention scores of the first n entries; None: nothing is.
        settled: tokens seen when entries were last chosen among; all of them had a say, so none is taken back.
    """

    dropped: int = 0
    slots: Tensor | None = None
    ragged: bool = False
    group: int = 0
    shift: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    settled: int = 0

    def appended(self) -> int:
        """Entries ever stored, also those that a sliding window has forgotten since."""
        raise NotImplementedError

    def stored(self, before: int = 0) -> int:
        """Entries that the next token's attention gets, or that it got `before` entries ago."""
        return self.appended() - before

    def width(self, new: int) -> int:
        """How many keys attention gets when `new` ones are added."""
        return self.stored() + new

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values float[B, G, stored, d]."""
        raise NotImplementedError

    def columns(self, new: int) -> Tensor | None:
        """int[B or 1, width] logical columns of the stored entries and of `new` ones to come; -1 is padding.

        None where these are 0, 1, 2, ...
        """
        if self.slots is None and self.stored() == self.appended():
            return None
        columns = self._every_column(new)[:, self.appended() - self.stored() :]
        return F.pad(columns, (0, self.width(new) - columns.shape[1]), value=-1)

    def all_columns(self, newest: int = 0) -> Tensor:
        """int[B, n] logical columns of the stored entries; of those that attention got with the `newest` entries."""
        keys: Tensor = self.keys  # type: ignore[attr-defined]
        first = self.appended() - newest - self.stored(before=newest)
        return self._every_column(0)[:, first:].expand(len(keys), -1)

    def recent(self, values: Tensor, new: int) -> Tensor:
        """Of `values` [B, G, n] of the first n entries those of the stored ones; 0 for `new` ones to come."""
        padded = F.pad(values, (0, self.appended() + new - values.shape[2]))
        return padded[..., self.appended() - self.stored() :]

    def _every_column(self, new: int) -> Tensor:
        """int[B or 1, appended + new] logical columns of everything ever stored and of `new` entries to come."""
        keys: Tensor = self.keys  # type: ignore[attr-defined]
        known = torch.empty(1, 0, dtype=torch.long, device=keys.device) if self.slots is None else self.slots
        later = torch.arange(known.shape[1], self.appended() + new, device=keys.device) + self.dropped
        return torch.cat([known, later.expand(known.shape[0], -1)], -1)

    def record(self, index: Tensor, valid: Tensor | None, seen: int, group: int, shift: Tensor | None) -> None:
        """Note that of the last `seen` tokens only those at `index` int[B, n] were stored, just now."""
        n = index.shape[1]
        if n == seen and self.slots is None and valid is None:
            return
        before = self.appended() - n
        new = index + before + self.dropped
        if valid is not None:
            new = new.masked_fill(~valid, -1)
        self.slots = torch.cat([self._every_column(0)[:, :before].expand(len(new), -1), new], -1)
        self.ragged = self.ragged or valid is not None
        self.dropped += seen - n
        self.group = group
        if shift is not None:
            self.shift = shift if self.shift is None else self.shift + shift

    def _map_rows(self, change: Any) -> None:
        self.slots = None if self.slots is None else change(self.slots)
        self.shift = None if self.shift is None else change(self.shift)
        self.hidden = None if self.hidden is None else change(self.hidden)
        self.weight = None if self.weight is None else change(self.weight)

    def _forget(self) -> None:
        self.dropped, self.slots, self.ragged, self.group, self.shift = 0, None, False, 0, None
        self.hidden, self.weight, self.settled = None, None, 0


class LogicalDynamicLayer(LogicalLayer, DynamicLayer):
    """A growing layer with logical length."""

    def appended(self) -> int:
        return int(DynamicLayer.get_seq_length(self))

    def held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        appended = self.appended()
        return appended + self.dropped if appended else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        remove = self._to_remove(tokens_to_remove)
        if remove and self.is_initialized:
            self._take_back(remove)

    def _to_remove(self, tokens_to_remove: int) -> int:
        # transformers 5.17 passes the length to keep, later versions minus the number to remove.
        return -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)

    def _take_back(self, remove: int) -> None:
        left = self.appended() - remove
        if self.get_seq_length() - remove < self.settled:
            raise UnsupportedError(
                f"crop takes back {remove} tokens, some of which chose what stays in the cache; speculative decoding "
                "feeds guesses together with the prompt: switch it off, or use a method that acts before the cache."
            )
        if self.slots is not None and left < self.slots.shape[1]:
            # Assisted decoding feeds candidates together with the prompt and takes rejected ones back.
            tail = self.slots[:, left:]
            start = self.get_seq_length() - remove
            if not bool((tail == torch.arange(start, start + tail.shape[1], device=tail.device)).all()):
                raise UnsupportedError(f"crop removes {remove} tokens and reaches into compressed ones; start anew.")
            self.slots = self.slots[:, :left]
        if self.weight is not None:
            self.weight = self.weight[..., :left]
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]

    def evict(self, keep: Tensor) -> None:
        """Let entries go for good, in each head others.

        Args:
            keep: bool[B, G, n] over all stored entries, in each row the same number per head. Shorter rows are padded
                in front.
        """
        keys, values = self.held()
        columns = self.all_columns()[:, None].expand_as(keep)
        longest = int(keep.sum(-1).max())
        order = torch.argsort(keep.to(torch.uint8), dim=-1, stable=True)
        index = order[..., order.shape[-1] - longest :]
        valid = keep.gather(2, index)
        if self.weight is not None:
            self.weight = self.recent(self.weight, 0).expand(keep.shape).gather(2, index)
        # One visible column stands for what the heads hold at a place; the lowest of them, so that the last columns are
        # a run without gaps only where every head holds all of it.
        self.slots = columns.gather(2, index).masked_fill(~valid, -1).amin(1)
        self.ragged = not bool(valid.all())
        self.dropped += self.appended() - longest
        index = index[..., None].expand(-1, -1, -1, keys.shape[-1])
        self.keys = keys.gather(2, index)
        self.values = values.gather(2, index[..., :1].expand(-1, -1, -1, values.shape[-1]))

    def hide(self, keep: Tensor) -> None:
        """Hide entries from all later tokens instead; `keep` as in `evict`."""
        gone = ~keep
        if self.hidden is not None:
            gone |= self.recent(self.hidden, 0)
        self.hidden = F.pad(gone, (self.appended() - self.stored(), 0))

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])


class LogicalSlidingLayer(LogicalDynamicLayer, DynamicSlidingWindowLayer):
    """A layer with a sliding window and logical length.

    While nothing was dropped its masks are those of transformers, which begin at the window's first column; see
    `masks.dense_masks`. After `evict` the heads share one column per place, the lowest, so that a head may lose sight
    of an entry a few tokens before the window has passed it.
    """

    def appended(self) -> int:
        return int(DynamicSlidingWindowLayer.get_seq_length(self))

    def stored(self, before: int = 0) -> int:
        return min(self.appended() - before, self.sliding_window - 1)

    def held(self) -> tuple[Tensor, Tensor]:
        keys, values = super().held()
        # Assisted decoding lets a layer keep more than its window until `crop` tells what stays.
        first = keys.shape[2] - self.stored()
        return keys[:, :, first:], values[:, :, first:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.slots is None:
            return DynamicSlidingWindowLayer.get_mask_sizes(self, query_length)
        return super().get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.keys, self.values = self.held()

    def _take_back(self, remove: int) -> None:
        if self.appended() >= self.sliding_window and not getattr(self, "record_past", False):
            raise UnsupportedError(
                f"crop takes back {remove} tokens of a layer whose window of {self.sliding_window} tokens is full, "
                "which has forgotten what came before them; switch speculative decoding off."
            )
        super()._take_back(remove)
        self.cumulative_length -= remove

    def evict(self, keep: Tensor) -> None:
        super().evict(keep)
        self.cumulative_length = self.slots.shape[1]  # type: ignore[union-attr]


class LogicalStaticLayer(LogicalLayer, StaticLayer):
    """A pre-allocated layer with logical length; its mask stays `max_cache_len` wide."""

    def appended(self) -> int:
        return int(StaticLayer.get_seq_length(self))

    def width(self, new: int) -> int:
        return self.max_cache_len

    def held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.stored()], self.values[:, :, : self.stored()]

    def get_seq_length(self) -> Any:
        length = StaticLayer.get_seq_length(self)
        return length + self.dropped if self.is_initialized else length

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))


class LogicalStaticSlidingLayer(LogicalStaticLayer, StaticSlidingWindowLayer):
    """A pre-allocated layer with a sliding window and logical length; see `LogicalSlidingLayer`."""

    def appended(self) -> int:
        return int(StaticSlidingWindowLayer.get_seq_length(self))

    def stored(self, before: int = 0) -> int:
        return min(self.appended() - before, self.max_cache_len - 1)

    def width(self, new: int) -> int:
        # What does not fit is handed to attention whole, and trimmed afterwards.
        return max(self.max_cache_len, self.stored() + new)

    def held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        # A full buffer holds one entry that the next token pushes out.
        first = int(self.appended() >= self.max_cache_len)
        last = first + self.stored()
        return self.keys[:, :, first:last], self.values[:, :, first:last]

    def get_seq_length(self) -> int:
        return self.appended() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.slots is None:
            return StaticSlidingWindowLayer.get_mask_sizes(self, query_length)
        return max(self.get_seq_length() + query_length, self.max_cache_len), 0


_LOGICAL: dict[type, type[LogicalLayer]] = {
    DynamicLayer: LogicalDynamicLayer,
    DynamicSlidingWindowLayer: LogicalSlidingLayer,
    StaticLayer: LogicalStaticLayer,
    StaticSlidingWindowLayer: LogicalStaticSlidingLayer,
}


def make_logical(cache: Cache) -> None:
    """Replace the layers of `cache` by logical ones, in place; what they hold moves along.

    Raises:
        UnsupportedError: a layer class has no logical version (quantised or offloaded caches).
    """
    if getattr(cache, "offloading", False):
        raise UnsupportedError("past_key_values offloads its layers; compress with a DynamicCache or StaticCache.")
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LogicalLayer):
            continue
        if type(layer) not in _LOGICAL:
            raise UnsupportedError(
                f"past_key_values.layers[{number}] is a {type(layer).__name__}, which cannot be compressed; use a "
                "DynamicCache or StaticCache without quantisation or offloading."
            )
        kind = _LOGICAL[type(layer)]
        logical = kind.__new__(kind)
        logical.__dict__.update(layer.__dict__)
        cache.layers[number] = logical  # type: ignore[call-overload]
    # A DynamicCache made without a config adds layers when they are first used.
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = LogicalDynamicLayer


FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of decoder layers, by the names that transformers gives them."""


def attention_kinds(config: Any) -> list[str]:
    """The kind of every layer of a decoder, `FULL` or `SLIDING`.

    Raises:
        UnsupportedError: its own cache has layers without a logical version; the message says which.
    """
    kinds = []
    declared = getattr(config, "layer_types", None)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    for number, layer in enumerate(new_cache(config).layers):
        kind = SLIDING if isinstance(layer, DynamicSlidingWindowLayer) else FULL
        if type(layer) not in _LOGICAL or (chunked if declared is None else declared[number] != kind):
            raise UnsupportedError(
                f"decoder layer {number} caches in a {type(layer).__name__}, which cannot be compressed; only layers "
                "that attend to the whole sequence or to a sliding window can."
            )
        kinds.append(kind)
    return kinds


def logical_layer(cache: object, number: int) -> LogicalLayer | None:
    """Layer `number` of a compressed cache, None for any other cache."""
    if not isinstance(cache, Cache) or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    return layer if isinstance(layer, LogicalLayer) else None


def new_cache(config: Any) -> DynamicCache:
    """The cache that a decoder makes for itself when none is handed in."""
    return DynamicCache(config=config)


def cache_bytes(cache: object) -> int:
    """Bytes of the keys and values in use."""
    layers: list[Any] = cache.layers if isinstance(cache, Cache) else []
    total = 0
    for layer in layers:
        if isinstance(layer, LogicalLayer) and layer.stored():
            for tensor in (layer.keys, layer.values):  # type: ignore[attr-defined]
                total += tensor.numel() // tensor.shape[-2] * layer.stored() * tensor.element_size()
    return total
