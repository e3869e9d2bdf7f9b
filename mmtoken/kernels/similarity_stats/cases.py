"""Inputs of `similarity_stats`: among themselves, against others, with masks, and with ties everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from mmtoken.kernels.cases import Case, Cost, Inputs, Operation
from mmtoken.kernels.similarity_stats import NAME, SimilarityStats, similarity_stats


def _among(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int) -> Inputs:
    return {"features": torch.randn(batch, n, width, generator=generator).to(dtype)}


def _bipartite(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int) -> Inputs:
    """Even tokens against odd ones, as views of one tensor; of a single token there is no odd one."""
    tokens = torch.randn(batch, n, width, generator=generator).to(dtype)
    return {"features": tokens[:, ::2], "other": tokens[:, 1::2]}


def _masked(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int) -> Inputs:
    """Ragged rows; only the first item has tokens at all where there are two, and a threshold."""
    inputs = _signs(generator, n=n, dtype=dtype, batch=batch, width=width)
    valid = torch.rand(batch, n, generator=generator) < 0.7
    valid[1:] = False
    columns = torch.rand(batch, n, generator=generator) < 0.5
    return {**inputs, "rows": valid, "columns": valid & columns}


def _signs(generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int) -> Inputs:
    """Entries of -1 and 1: with a power of 4 as width every similarity is exact, and most are equal to others."""
    signs = torch.randint(0, 2, (batch, n, width), generator=generator) * 2 - 1
    return {"features": signs.to(dtype), "threshold": 0.3}


def _cost(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    features, other = inputs["features"], inputs.get("other")
    columns = features if other is None else other
    read = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    written = sum(x.numel() * x.element_size() for x in outputs)
    return Cost(read + written, 2 * features.numel() * columns.shape[1])


def naive(
    features: Tensor,
    other: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    threshold: float = 1.0,
) -> SimilarityStats:
    """The whole matrix of similarities at once."""
    unit = normalize(features.float(), dim=-1)
    against = unit if other is None else normalize(other.float(), dim=-1)
    similarity = unit @ against.transpose(1, 2)
    if other is None:
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    if columns is not None:
        similarity = similarity.masked_fill(~columns[:, None], -torch.inf)
    if rows is not None:
        similarity = similarity.masked_fill(~rows[..., None], -torch.inf)
    if not similarity.shape[2]:
        similarity = pad(similarity, (0, 1), value=-torch.inf)  # a maximum needs something
    best, index = similarity.max(-1)
    count = (similarity > threshold).sum(-1) if threshold < 1 else torch.zeros_like(index)
    return SimilarityStats(best, index.masked_fill(best == -torch.inf, -1), count)


def _operators(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    from mmtoken.kernels.similarity_stats import triton

    names: Sequence[str] = ("features", "other", "rows", "columns")
    return [(triton.similarity_stats, (*(inputs.get(name) for name in names), inputs.get("threshold", 1.0)))]


KEYS = {"CLIP-L keys": {"width": 1024}, "7B embeddings": {"width": 4096}}

OPERATION = Operation(
    name=NAME,
    function=similarity_stats,
    operators=_operators,
    cases=(
        Case("among", _among, {"width": 24}, ("features",), KEYS),
        Case("bipartite", _bipartite, {"width": 24}, ("features", "other"), {"head mean of CLIP-L": {"width": 64}}),
        Case("masked", _masked, {"width": 16}, ("features",)),
        Case("signs", _signs, {"width": 16}, (), {"CLIP-L keys": {"width": 1024}}),
    ),
    cost=_cost,
    naive=naive,
)
