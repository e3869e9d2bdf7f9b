"""What a decoder layer computed during a prefill, and the rows of attention that methods read from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmtoken.compressors.base import States
from mmtoken.engine import attention
from mmtoken.engine.prefill import Cut, Prefill


@dataclass
class LayerStates:
    """Queries, keys and values of one decoder layer, detached; the square of attention is never formed.

    Attributes:
        query: float[B, H, n, d], rotated, of the current sequence.
        key, value: float[B, G, k, d], stored entries first; entries beyond past + n are unused buffer.
        mask: what the layer was given.
        scaling: factor on the dot products.
        past: stored entries before this call.
        cut: the current sequence.
        tables: rotary (cosine, sine), each float[B or 1, n, d], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    past: int
    cut: Cut
    tables: tuple[Tensor, Tensor] | None

    def row_attention(self, index: Tensor, valid: Tensor | None = None, row: int | None = None) -> Tensor:
        """float32[B, k]: mean over heads and over the queries `index` int[B, R] of which `valid` bool[B, R] count.

        Args:
            index: rows of the current sequence.
            valid: which of them count; None: all.
            row: only this row of the batch; index and valid then have one row.
        """
        return attention.attention_of(*self._of(row), self.scaling, index, self.past, mean="queries", valid=valid)

    def head_attention(self, index: Tensor, row: int) -> Tensor:
        """float32[H, R, k] of one row of the batch: attention of the queries int[R]."""
        return attention.attention_of(*self._of(row), self.scaling, index[None], self.past)[0]

    def _of(self, row: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if row is None:
            return self.query, self.key, self.mask
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[row : row + 1]
        return self.query[row : row + 1], self.key[row : row + 1], mask

    def pick(self, rows: Tensor, places: Tensor) -> States:
        """States of tokens.

        Args:
            rows: int[I], row of the batch of each item.
            places: int[I, N], places of its tokens in the call; all must be left in the layer's sequence.
        """
        rank = self.cut.rank[rows[:, None], places]

        def at(states: Tensor, offset: int) -> Tensor:
            return states.transpose(1, 2)[rows[:, None], rank + offset].transpose(1, 2)

        cosine = sine = self.query.new_zeros(*rank.shape, 0)
        if self.tables is not None:
            batch = len(self.query)
            cosine, sine = (table.expand(batch, -1, -1)[rows[:, None], rank] for table in self.tables)
        return States(at(self.query, 0), at(self.key, self.past), at(self.value, self.past), cosine, sine)


def text_places(call: Prefill) -> tuple[Tensor, Tensor, Tensor]:
    """Of each item's row: (int[I, T] places of text tokens, bool[I, T] which are real, bool[I, T] after the item)."""
    text = call.said & ~call.visual
    rows = call.items.row_index
    order = torch.argsort((~text).to(torch.uint8), dim=-1, stable=True)
    counts = text.sum(-1)
    longest = int(counts.max())
    valid = torch.arange(longest, device=text.device) < counts[:, None]
    places = order[:, :longest][rows]
    last = call.items.places.masked_fill(~call.items.valid, -1).amax(-1)
    return places, valid[rows], valid[rows] & (places > last[:, None])
