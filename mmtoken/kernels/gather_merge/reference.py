"""`gather_merge` in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def gather_merge(
    features: Tensor, index: Tensor, source: Tensor, slot: Tensor, weight: Tensor, own: Tensor | None
) -> Tensor:
    """float[B, K, D]; see `mmtoken.kernels.gather_merge.gather_merge`."""
    return add_rows(features, *joined(index, source, slot, weight, own), index.shape[1])


def joined(
    index: Tensor, source: Tensor, slot: Tensor, weight: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(source int[B, K + E], slot int[B, K + E], weight float32[B, K + E]): kept rows as the first addends."""
    rows = torch.arange(index.shape[1], device=index.device)
    first = weight.new_ones(index.shape, dtype=torch.float32) if own is None else own.float()
    return (
        torch.cat([index, source], 1),
        torch.cat([rows.expand_as(index), slot], 1),
        torch.cat([first, weight.float()], 1),
    )


def add_rows(features: Tensor, source: Tensor, slot: Tensor, weight: Tensor, count: int) -> Tensor:
    """out[b, k] = sum over e with slot[b, e] = k of weight[b, e] * features[b, source[b, e]], in the order of e.

    Args:
        features: float[B, N, D].
        source, slot: int[B, E]; -1 in either: added nowhere.
        weight: float32[B, E].
        count: K.
    """
    batch, length, width = features.shape
    if not length:
        return features.sum(1, keepdim=True).expand(-1, count, -1)
    item = torch.arange(batch, device=features.device)[:, None]
    # What is added nowhere goes to a last bag of its own, with weight zero and from row 0.
    out = (slot < 0) | (source < 0)
    bag = torch.where(out, batch * count, slot + item * count).flatten()
    row = torch.where(out, 0, source + item * length).flatten()
    # In float64, the gradients of this are checked by differences.
    wide = features.double() if features.dtype == torch.float64 else features.float()
    share = torch.where(out, 0.0, weight).flatten().to(wide.dtype)
    bag, order = torch.sort(bag, stable=True)
    starts = torch.searchsorted(bag, torch.arange(batch * count + 1, device=bag.device))
    total = embedding_bag(row[order], wide.reshape(-1, width), starts, mode="sum", per_sample_weights=share[order])
    return total[: batch * count].view(batch, count, width).to(features.dtype)
