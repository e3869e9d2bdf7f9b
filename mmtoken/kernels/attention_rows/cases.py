"""Inputs of `attention_rows` for its test and its benchmark."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.kernels.cases import Case, Cost, Inputs, Operation


def _make(
    generator: torch.Generator,
    *,
    n: int,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    groups: int,
    width: int,
    rows: int = 0,
    mean: str = "none",
) -> Inputs:
    """Queries and keys; `rows` queries (0: n), the last ones."""
    query, key = (
        torch.randn(batch, h, size, width, generator=generator).to(dtype)
        for h, size in ((heads, rows or n), (groups, n))
    )
    return {"query": query, "key": key, "mean": mean}


def last_query(generator: torch.Generator, **size: Any) -> Inputs:
    """The last query, mean over heads: FastV, PyramidDrop, FlowCut in a decoder, what a decoding step looks at."""
    return _make(generator, rows=1, mean="heads", **size)


def window(generator: torch.Generator, *, n: int, rows: int, **size: Any) -> Inputs:
    """The last queries, causal, per head: SnapKV, TOVA."""
    rows = min(rows, n)
    return {**_make(generator, n=n, rows=rows, **size), "causal_offset": n - rows}


def received(generator: torch.Generator, **size: Any) -> Inputs:
    """All queries, mean over heads and queries: towers without CLS, PruMerge, VLA-Pruner."""
    return _make(generator, mean="queries", **size)


def causal(generator: torch.Generator, **size: Any) -> Inputs:
    """The same, causal, some queries not valid."""
    inputs = _make(generator, mean="queries", **size)
    batch, _, queries, _ = inputs["query"].shape
    return {**inputs, "causal_offset": 0, "valid": torch.rand(batch, queries, generator=generator) > 0.3}


def padded(generator: torch.Generator, *, n: int, batch: int, rows: int, **size: Any) -> Inputs:
    """Chosen queries, repeats among them, under a mask with rows that see nothing; mean over heads."""
    inputs = _make(generator, n=n, batch=batch, mean="heads", **size)
    mask = torch.rand(batch, n, n, generator=generator) > 0.4
    mask[:, ::3] = False
    index = torch.randint(0, n, (batch, rows), generator=generator)
    return {**inputs, "mask": mask, "index": index, "scale": 0.3}


def additive(generator: torch.Generator, *, n: int, batch: int, dtype: torch.dtype, **size: Any) -> Inputs:
    """An additive mask, the same for every row of the batch, of small numbers, lowest numbers and minus infinity."""
    inputs = _make(generator, n=n, batch=batch, dtype=dtype, mean="queries", **size)
    mask = torch.randn(1, n, n, generator=generator).to(dtype)
    mask[torch.rand(1, n, n, generator=generator) > 0.6] = torch.finfo(dtype).min
    mask[:, :, : n // 4] = -math.inf
    mask[:, ::5] = torch.finfo(dtype).min
    return {**inputs, "mask": mask}


def cost(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    """Queries asked, keys and masks read once, the output written; one product of queries and keys."""
    query, key, index, mask = (inputs.get(name) for name in ("query", "key", "index", "mask"))
    batch, heads, queries, width = query.shape  # type: ignore[union-attr]
    rows, length = queries if index is None else index.shape[1], key.shape[2]  # type: ignore[union-attr]
    moved = batch * heads * rows * width * query.element_size() + key.nbytes + sum(x.nbytes for x in outputs)  # type: ignore[union-attr]
    if mask is not None:
        moved += mask.shape[0] * min(mask.shape[1], rows) * length * mask.element_size()
    return Cost(moved, 2 * batch * heads * rows * length * width)


def naive(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    index: Tensor | None = None,
    mask: Tensor | None = None,
    causal_offset: int | None = None,
    valid: Tensor | None = None,
    mean: str = "none",
) -> Tensor:
    """The straightforward way: every row of every head at once."""
    _, heads, queries, width = query.shape
    scale = width**-0.5 if scale is None else scale
    scores = query.float() @ key.float().repeat_interleave(heads // key.shape[1], 1).transpose(-1, -2) * scale
    nothing = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        nothing = ~seen.any(-1, keepdim=True)
        if mask.dtype != torch.bool:
            scores = scores + mask.float().masked_fill(nothing, 0.0)[:, None]
        scores = scores.masked_fill(~(seen | nothing)[:, None], -torch.inf)
    if causal_offset is not None:
        place = torch.arange(key.shape[2], device=key.device)
        last = torch.arange(queries, device=key.device)[:, None] + causal_offset
        scores = scores.masked_fill(place > last, -torch.inf)
    rows = scores.softmax(-1)
    if nothing is not None:
        rows = rows.masked_fill(nothing[:, None], 0.0)
    if index is not None:
        rows = rows.gather(2, index[:, None, :, None].expand(-1, heads, -1, rows.shape[3]))
    if mean == "none":
        return rows
    rows = rows.mean(1)
    if mean == "heads":
        return rows
    if valid is None:
        return rows.mean(1)
    return (rows * valid[..., None]).sum(1) / valid.sum(-1, keepdim=True).clamp(min=1)


_SMALL = {"heads": 2, "groups": 1, "width": 8}
_QUERY_AND_KEY = ("query", "key")
_REAL = {
    "Qwen2-7B 28:4": {"heads": 28, "groups": 4, "width": 128},
    "Llama-7B 32:32": {"heads": 32, "groups": 32, "width": 128},
}
_TOWER = {"CLIP-L 16:16": {"heads": 16, "groups": 16, "width": 64}}


def _operators(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    from mmtoken.kernels.attention_rows import triton

    names = ("index", "mask", "valid", "scale", "causal_offset", "mean")
    rest = dict.fromkeys(names, None) | {"scale": inputs["query"].shape[-1] ** -0.5} | inputs
    return [(triton.operator, (inputs["query"], inputs["key"], *(rest[name] for name in names)))]


OPERATION = Operation(
    name="attention_rows",
    function=attention_rows,
    operators=_operators,
    cases=(
        Case("last-query", last_query, {"heads": 6, "groups": 2, "width": 20}, _QUERY_AND_KEY, _REAL),
        Case(
            "window",
            window,
            {"heads": 4, "groups": 2, "width": 16, "rows": 8},
            _QUERY_AND_KEY,
            {name: {**size, "rows": 32} for name, size in _REAL.items()},
        ),
        Case("received", received, _SMALL, _QUERY_AND_KEY, _TOWER),
        Case("causal", causal, _SMALL, _QUERY_AND_KEY, _REAL),
        Case("padded", padded, {**_SMALL, "rows": 5}, _QUERY_AND_KEY),
        Case("additive", additive, _SMALL, _QUERY_AND_KEY),
    ),
    cost=cost,
    naive=naive,
)
