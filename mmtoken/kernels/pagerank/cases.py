"""Inputs of `pagerank`: whole graphs, and items with tokens that are not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtoken.kernels.cases import Case, Cost, Inputs, Operation
from mmtoken.kernels.pagerank import NAME, pagerank


def _whole(
    generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, heads: int, width: int, rounds: int
) -> Inputs:
    """Equal weights at first; attention with peaks, so that ranks differ."""
    query, key = (torch.randn(batch, heads, n, width, generator=generator).to(dtype) for _ in range(2))
    seen = torch.ones(batch, n, dtype=torch.bool)
    return {"query": 2 * query, "key": key, "seen": seen, "start": seen / n, "rounds": rounds}


def _ragged(generator: torch.Generator, *, n: int, **size: Any) -> Inputs:
    """NaN where nothing is seen, as in all of the second item; other weights, and a change too small to go on."""
    inputs = _whole(generator, n=n, **size)
    batch = len(inputs["seen"])
    seen = torch.rand(batch, n, generator=generator) < 0.7
    seen[1:] = False
    for name in ("query", "key"):
        inputs[name] = inputs[name].masked_fill(~seen[:, None, :, None], torch.nan)
    start = torch.rand(batch, n, generator=generator) * seen
    start = start / start.sum(-1, keepdim=True).clamp(min=1)
    return {**inputs, "seen": seen, "start": start, "tolerance": 0.1 / n, "scale": 0.5}


def naive(
    query: Tensor,
    key: Tensor,
    seen: Tensor,
    start: Tensor,
    rounds: int,
    *,
    tolerance: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The straightforward way: attention of every head at once, once."""
    heads, width = query.shape[1], query.shape[3]
    query, key = (x.float().masked_fill(~seen[:, None, :, None], 0.0) for x in (query, key))
    weight = query @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    weight = weight.masked_fill(~seen[:, None, None], torch.finfo(weight.dtype).min).softmax(-1)
    scores, moving = start[:, None].repeat(1, heads, 1), seen.any(-1)
    for _ in range(rounds):
        voted = (scores[:, :, None] @ weight)[:, :, 0]
        moved = (voted - scores).abs().sum((1, 2)) / (heads * seen.sum(-1).clamp(min=1))
        scores = torch.where(moving[:, None, None], voted, scores)
        moving = moving & (moved >= tolerance)
        if not bool(moving.any()):
            break
    return scores


def cost(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    """Inputs read once, scores written once; the products once, and a product of scores and attention in each round."""
    query, key, (scores,) = inputs["query"], inputs["key"], outputs
    pairs = scores.numel() * query.shape[2]
    return Cost(query.nbytes + key.nbytes + scores.nbytes, 2 * pairs * (query.shape[3] + inputs["rounds"]))


def _operators(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    from mmtoken.kernels.pagerank import triton

    scale = inputs.get("scale", inputs["query"].shape[-1] ** -0.5)
    given = [inputs[name] for name in ("query", "key", "seen", "start", "rounds")]
    return [(triton.operator, (*given, scale, inputs.get("tolerance", 0.0)))]


_SMALL = {"heads": 2, "width": 8, "rounds": 2}

OPERATION = Operation(
    name=NAME,
    function=pagerank,
    operators=_operators,
    cases=(
        Case("whole", _whole, _SMALL, (), {"CLIP-L, 6 rounds": {"heads": 16, "width": 64, "rounds": 6}}),
        Case("ragged", _ragged, {**_SMALL, "width": 20, "rounds": 3}),
    ),
    cost=cost,
    atol=1e-6,
    naive=naive,
)
