"""Cache layers whose length is logical: they count the tokens a layer has seen, not those it still stores.

Transformers derives default positions, slices of the prompt, mask sizes and crops from a cache's length. With logical
lengths all of that stays as in the uncompressed model, and masks always come in logical columns; the engine picks the
columns that a layer stores (`columns`). Transformers does the same for sliding windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from mmtoken.errors import UnsupportedError


class LogicalLayer:
    """What a compressed layer remembers besides keys and values.

    Attributes:
        dropped: tokens seen but not stored.
        slots: int[B, n] logical column of the first n stored entries, -1 for padding; later entries follow on without
            gaps. None when nothing was dropped.
        ragged: whether `slots` contains padding.
        group: which cut produced `slots`; layers of one group hold equal `slots`.
        shift: int[B], by how much later positions move down (positions="renumber"), or None.
        hidden: bool[B, G, n], which of the first n stored entries no later token sees, per head; None: all are seen.
        weight: float[B, 1 or G, n] added to the attention scores of the first n stored entries; None: nothing is.
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

    def stored(self) -> int:
        """Entries in the key/value tensors that are in use."""
        raise NotImplementedError

    def columns(self, new: int) -> Tensor | None:
        """int[B, stored + new] logical columns of the stored entries and of `new` ones to come; -1 is padding."""
        if self.slots is None:
            return None
        later = torch.arange(self.slots.shape[1], self.stored() + new, device=self.slots.device) + self.dropped
        return torch.cat([self.slots, later.expand(self.slots.shape[0], -1)], -1)

    def all_columns(self) -> Tensor:
        """int[B, stored] logical columns of the stored entries."""
        columns = self.columns(0)
        if columns is not None:
            return columns
        keys: Tensor = self.keys  # type: ignore[attr-defined]
        return torch.arange(self.stored(), device=keys.device).expand(len(keys), -1)

    def record(self, index: Tensor, valid: Tensor | None, seen: int, group: int, shift: Tensor | None) -> None:
        """Note that of the last `seen` tokens only those at `index` int[B, n] were stored, just now."""
        stored = self.stored()
        n = index.shape[1]
        if n == seen and self.slots is None and valid is None:
            return
        start = stored + self.dropped - n
        new = index + start if valid is None else (index + start).masked_fill(~valid, -1)
        self.slots = torch.cat([self.all_columns()[:, : stored - n], new], -1)
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

    def stored(self) -> int:
        return int(DynamicLayer.get_seq_length(self))

    def get_seq_length(self) -> int:
        stored = self.stored()
        return stored + self.dropped if stored else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        # transformers 5.17 passes the length to keep, later versions minus the number to remove.
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        if not remove or not self.is_initialized:
            return
        left = self.stored() - remove
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
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]

    def evict(self, keep: Tensor) -> None:
        """Let entries go for good, in each head others.

        Args:
            keep: bool[B, G, n] over all stored entries, in each row the same number per head. Shorter rows are padded
                in front.
        """
        assert self.keys is not None and self.values is not None
        columns = self.all_columns()[:, None].expand_as(keep)
        longest = int(keep.sum(-1).max())
        order = torch.argsort(keep.to(torch.uint8), dim=-1, stable=True)
        index = order[..., order.shape[-1] - longest :]
        valid = keep.gather(2, index)
        # One visible column stands for what the heads hold at a place; the lowest of them, so that the last columns are
        # a run without gaps only where every head holds all of it.
        self.slots = columns.gather(2, index).masked_fill(~valid, -1).amin(1)
        self.ragged = not bool(valid.all())
        self.dropped += keep.shape[2] - longest
        if self.weight is not None:
            self.weight = self.weight.expand(keep.shape).gather(2, index)
        index = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys = self.keys.gather(2, index)
        self.values = self.values.gather(2, index[..., :1].expand(-1, -1, -1, self.values.shape[-1]))

    def hide(self, keep: Tensor) -> None:
        """Hide entries from all later tokens instead; `keep` as in `evict`."""
        gone = ~keep
        if self.hidden is not None:
            before = self.hidden.shape[2]
            gone[:, :, :before] |= self.hidden
        self.hidden = gone

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


class LogicalStaticLayer(LogicalLayer, StaticLayer):
    """A pre-allocated layer with logical length; its mask stays `max_cache_len` wide."""

    def stored(self) -> int:
        return int(StaticLayer.get_seq_length(self))

    def get_seq_length(self) -> Any:
        length = StaticLayer.get_seq_length(self)
        return length + self.dropped if self.is_initialized else length

    def columns(self, new: int) -> Tensor | None:
        columns = super().columns(new)
        if columns is None:
            return None
        return torch.nn.functional.pad(columns, (0, self.max_cache_len - columns.shape[1]), value=-1)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))


_LOGICAL: dict[type, type[LogicalLayer]] = {DynamicLayer: LogicalDynamicLayer, StaticLayer: LogicalStaticLayer}


def make_logical(cache: Cache) -> None:
    """Replace the layers of `cache` by logical ones, in place; what they hold moves along.

    Raises:
        UnsupportedError: a layer class has no logical version (sliding windows, quantised or offloaded caches).
    """
    if getattr(cache, "offloading", False):
        raise UnsupportedError("past_key_values offloads its layers; compress with a DynamicCache or StaticCache.")
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LogicalLayer):
            continue
        if type(layer) not in _LOGICAL:
            raise UnsupportedError(
                f"past_key_values.layers[{number}] is a {type(layer).__name__}, which cannot be compressed; use a "
                "DynamicCache or StaticCache without sliding windows, quantisation or offloading."
            )
        kind = _LOGICAL[type(layer)]
        logical = kind.__new__(kind)
        logical.__dict__.update(layer.__dict__)
        cache.layers[number] = logical  # type: ignore[call-overload]
    # A DynamicCache made without a config adds layers when they are first used.
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = LogicalDynamicLayer


def check_decoder(config: Any) -> None:
    """Refuse a decoder whose own cache has layers without a logical version.

    Raises:
        UnsupportedError: it has; the message says which.
    """
    for number, layer in enumerate(new_cache(config).layers):
        if type(layer) not in _LOGICAL:
            raise UnsupportedError(
                f"decoder layer {number} caches in a {type(layer).__name__}, which cannot be compressed; only layers "
                "that attend to the whole sequence can (sliding_window=None)."
            )


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
