"""Inputs of `maxmin_select`: whole items, ragged ones, and ties everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.kernels.cases import Case, Cost, Inputs, Operation
from mmtoken.kernels.maxmin_select import NAME, maxmin_select


def _whole(
    generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int, steps: int | None = None
) -> Inputs:
    """`steps` picks; None: a tenth of the tokens, as DivPrune keeps them."""
    features = torch.randn(batch, n, width, generator=generator).to(dtype)
    return {"features": features, "steps": max(1, n // 10) if steps is None else steps}


def _ragged(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int, steps: int) -> Inputs:
    """Items of different length and budget, the second without any token; of a few tokens fewer than are asked for."""
    features = torch.randn(batch, n, width, generator=generator).to(dtype)
    eligible = torch.rand(batch, n, generator=generator) < 0.7
    eligible[1:] = False
    features[~eligible] = torch.nan
    counts = torch.tensor([steps - 1, steps])[:batch]
    return {"features": features, "steps": steps, "eligible": eligible, "counts": counts}


def _signs(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int, steps: int) -> Inputs:
    """Entries of -1 and 1: with a power of 4 as width every distance is exact, and most are equal to others."""
    signs = torch.randint(0, 2, (batch, n, width), generator=generator) * 2 - 1
    return {"features": signs.to(dtype), "steps": steps}


def _cost(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    """What has to be read again for every pick is read from memory, as long as it does not fit into a cache."""
    features, (picks,) = inputs["features"], outputs
    _, n, width = features.shape
    read = features.numel() * features.element_size() * max(1, inputs["steps"])
    return Cost(read + picks.numel() * 8, 2 * features.numel() * n + 2 * picks.numel() * n * width)


def naive(features: Tensor, steps: int, *, eligible: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """The whole matrix of distances at once."""
    if eligible is None:
        eligible = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    unit = normalize(features.float(), dim=-1).masked_fill_(~eligible[..., None], 0)
    distance = 1 - unit @ unit.transpose(1, 2)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    alone = distance.masked_fill(~eligible[:, None], torch.inf).amin(-1).masked_fill(~eligible, -torch.inf)
    row = torch.arange(len(features), device=features.device)
    nearest = torch.where(eligible, torch.inf, -torch.inf)
    best = alone.argmax(-1)
    order = [best]
    for _ in range(steps - 1):
        torch.minimum(nearest, distance[row, best], out=nearest)
        nearest[row, best] = -torch.inf
        best = nearest.argmax(-1)
        order.append(best)
    limit = eligible.sum(-1) if counts is None else torch.minimum(counts, eligible.sum(-1))
    picks = torch.stack(order[:steps], 1)
    return picks.masked_fill(torch.arange(steps, device=features.device) >= limit[:, None], -1)


def _operators(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    from mmtoken.kernels.maxmin_select import triton

    features = inputs["features"]
    eligible = inputs.get("eligible", torch.ones(features.shape[:2], dtype=torch.bool, device=features.device))
    counts = inputs.get("counts", torch.full(features.shape[:1], inputs["steps"], device=features.device))
    return [(triton.maxmin_select, (features, inputs["steps"], eligible, counts))]


OPERATION = Operation(
    name=NAME,
    function=maxmin_select,
    operators=_operators,
    cases=(
        Case("whole", _whole, {"width": 24, "steps": 9}, (), {"7B embeddings": {"width": 4096}}),
        Case("ragged", _ragged, {"width": 24, "steps": 5}),
        Case("signs", _signs, {"width": 16, "steps": 7}),
    ),
    cost=_cost,
    naive=naive,
)
