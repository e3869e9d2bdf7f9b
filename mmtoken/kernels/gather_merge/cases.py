"""Made-up inputs of `gather_merge`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtoken.kernels.cases import Case, Cost, Inputs, Operation
from mmtoken.kernels.gather_merge import gather_merge

KEPT = 4
"""One row of this many is kept."""


def _kept(generator: torch.Generator, n: int, batch: int) -> Tensor:
    """int[B, K]: rows in ascending order."""
    order = torch.rand(batch, n, generator=generator).argsort(-1)
    return order[:, : max(1, n // KEPT)].sort(-1).values


def _features(generator: torch.Generator, n: int, dtype: torch.dtype, batch: int, width: int) -> Tensor:
    return torch.randn(batch, n, width, generator=generator).to(dtype)


def clusters(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int) -> Inputs:
    """Every dropped row goes to one that is kept (ToMe, VisionZip, TokenCorr).

    Items are ragged: in each some kept rows and slots are -1, in the last of several all of them.
    """
    index = _kept(generator, n, batch)
    kept = index.shape[1]
    slot = torch.randint(0, kept, (batch, n), generator=generator).scatter(1, index, -1)
    real = kept - kept // 5
    index[:, real:] = -1
    slot[slot >= real] = -1
    if batch > 1:
        index[-1] = slot[-1] = -1
    return {
        "features": _features(generator, n, dtype, batch, width),
        "index": index,
        "slot": slot,
        "weight": torch.rand(batch, n, generator=generator).to(dtype),
        "own": torch.rand(batch, kept, generator=generator).to(dtype),
    }


def one_sum(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int) -> Inputs:
    """Kept rows stay as they are, and one more is the sum of all others (TCA, TRIPS, BUS, PruMerge)."""
    index = _kept(generator, n, batch)
    slot = torch.full((batch, n), index.shape[1]).scatter(1, index, -1)
    return {
        "features": _features(generator, n, dtype, batch, width),
        "index": torch.cat([index, torch.full((batch, 1), -1)], 1),
        "slot": slot,
        "weight": torch.rand(batch, n, generator=generator) / n,
    }


def neighbours(
    generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int, count: int = 32
) -> Inputs:
    """To every kept row its neighbours are added, which may be kept as well and have several such (PruMerge)."""
    index = _kept(generator, n, batch)
    kept = index.shape[1]
    return {
        "features": _features(generator, n, dtype, batch, width),
        "index": index,
        "slot": torch.arange(kept).repeat_interleave(count).expand(batch, -1).clone(),
        "weight": torch.rand(batch, kept * count, generator=generator) / count,
        "source": torch.randint(0, n, (batch, kept * count), generator=generator),
    }


def with_one_hot_matrix(
    features: Tensor,
    index: Tensor,
    slot: Tensor,
    weight: Tensor,
    source: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """The straightforward version: a K x N matrix of weights, times the features."""
    batch, length = features.shape[:2]
    count = index.shape[1]
    source = torch.arange(length, device=slot.device).expand(batch, -1) if source is None else source
    own = torch.ones(index.shape, device=weight.device) if own is None else own
    item = torch.arange(batch, device=slot.device)[:, None]
    matrix = torch.zeros(batch, count, length, device=features.device)
    rows = torch.arange(count, device=slot.device).expand(batch, -1)
    for into, of, share in ((rows, index, own), (slot, source, weight)):
        where = (into >= 0) & (of >= 0)
        place = (item.expand_as(into)[where], into[where], of[where])
        matrix = matrix.index_put(place, share.float()[where], accumulate=True)
    return (matrix @ features.float()).to(features.dtype)


def cost(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    """Rows that are referred to are read once, addends and outputs as well."""
    features, slot, index = inputs["features"], inputs["slot"], inputs["index"]
    added = slot if inputs.get("source") is None else inputs["source"].where(slot >= 0, -1)
    rows = torch.arange(slot.shape[1], device=slot.device).expand_as(slot) if added is slot else added
    read = sum(
        len(torch.cat([mine[mine >= 0], row[part >= 0]]).unique())
        for mine, row, part in zip(index, rows, slot, strict=True)
    )
    width = features.shape[-1]
    small = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor) and x is not features)
    moved = (read * width + outputs[0].numel()) * features.element_size() + small
    return Cost(moved, 2 * width * int((slot >= 0).sum() + (index >= 0).sum()))


def operators(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    from mmtoken.kernels.gather_merge import reference, triton

    index, slot = inputs["index"], inputs["slot"]
    source = inputs.get("source")
    source = torch.arange(slot.shape[1], device=slot.device).expand_as(slot) if source is None else source
    addends = reference.joined(index, source, slot, inputs["weight"].detach(), None)
    features = inputs["features"]
    gradient = torch.ones(*index.shape, features.shape[-1], dtype=features.dtype, device=features.device)
    return [
        (triton.add_rows, (features, *addends, index.shape[1])),
        (triton.weight_gradient, (features.detach(), gradient, *addends[:2])),
    ]


_WIDTHS = {"CLIP ViT-L/14": {"width": 1024}, "LLaMA-7B": {"width": 4096}}

OPERATION = Operation(
    name="gather_merge",
    function=gather_merge,
    operators=operators,
    cases=(
        Case("clusters", clusters, {"width": 24}, ("features", "weight", "own"), _WIDTHS),
        Case("one-sum", one_sum, {"width": 5}, ("features", "weight"), _WIDTHS),
        Case("neighbours", neighbours, {"width": 16, "count": 3}, ("features", "weight"), _WIDTHS),
    ),
    cost=cost,
    naive=with_one_hot_matrix,
)
