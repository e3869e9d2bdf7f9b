"""The cache site: decoding without evicted entries is decoding with their keys hidden per head, and nothing else.

The reference is the unmodified model whose decode steps cannot see, per layer and key/value head, the keys that the
method let go (`oracle.masked_keys`, `decode_only`). What was let go is taken from the method itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from mmtoken import compress
from mmtoken.compressors.base import CacheEntry, Compressor, Context, Positions
from mmtoken.tokens import kept_count
from tests import oracle
from tests.backbones.tiny_models import CELLS
from tests.contract.matrix import Cell, assert_close, batch, dense, tiny

LLAVA = ("llava", "image")
cells = pytest.mark.parametrize("cell", CELLS, ids="-".join)


@dataclass(frozen=True)
class Hashed(Compressor):
    """Per head, the entries whose keys have the largest value in one feature: content only, and heads disagree."""

    keep: int | float = 0.5
    positions: Positions = "keep"
    everything: bool = False
    chosen: ClassVar[list[tuple[int, CacheEntry, Tensor]]] = []

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        score = entry.keys[..., layer].float()
        stay = entry.valid[:, None].expand(score.shape[:3]).clone()
        ordinal = 0
        for row in range(len(score)):
            items = entry.item[row].unique().tolist() if not self.everything else [None]
            for item in items:
                if item == -1:
                    continue
                mine = entry.valid[row] if item is None else entry.item[row] == item
                total = int(mine.sum()) if item is None else ctx.original_counts[ordinal]
                steps = 1 if item is None else ctx.steps[ordinal]
                ordinal += 1
                places = mine.nonzero()[:, 0]
                for head in range(score.shape[1]):
                    order = score[row, head, places].argsort(descending=True, stable=True)
                    stay[row, head, places[order[kept_count(self.keep, total, steps) :]]] = False
        self.chosen.append((layer, entry, stay))
        return stay


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    Hashed.chosen.clear()
    yield
    Hashed.chosen.clear()


def kept_per_head(length: int) -> dict[int, Tensor]:
    """bool[B, G, L] per layer, from what the method chose at its last call for each layer."""
    masks = {}
    for layer, entry, stay in Hashed.chosen:
        keep = torch.ones(*stay.shape[:2], length, dtype=torch.bool)
        keep[:, :, : stay.shape[2]] = stay | ~entry.valid[:, None]
        masks[layer] = keep
    return masks


@cells
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "left_padded", "padded_ragged", "multi_image", "text_row"])
def test_decoding_without_entries_is_decoding_with_their_keys_hidden_per_head(cell: Cell, case: str, attn: str) -> None:
    model, inputs = tiny(cell[0], attn), batch(cell, case)
    with compress(model, Hashed(keep=0.4)) as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    masks = kept_per_head(inputs["input_ids"].shape[1])
    assert sorted(masks) == [0, 1, 2, 3]
    assert any(bool((mask[:, 0] != mask[:, 1]).any()) for mask in masks.values())
    with oracle.masked_keys(model, masks, decode_only=True):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=5)
    assert_close(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)
    # the prompt itself is untouched: its logits are those of the uncompressed model to the bit
    assert torch.equal(got.logits[:, 0], dense(cell, case, attn).logits[:, 0])
    assert session.report.tokens_out == session.report.tokens_in
    assert [site.site for site in session.report.sites] == ["cache"] * 4
