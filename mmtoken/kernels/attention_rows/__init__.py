"""Rows of attention: what a few queries look at, or what every key receives, without the square of attention.

With P[b, h, r, n] the softmax over n of scale * q[b, h, index[b, r]] . k[b, group of h, n], over the keys that the
query may see, the operation returns P itself, its mean over heads, or its mean over heads and queries.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.attention_rows import reference
from mmtoken.kernels.dispatch import Impl, choose

Mean = Literal["none", "heads", "queries"]
"""What is averaged: nothing, the heads, or heads and queries."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    index: Tensor | None = None,
    mask: Tensor | None = None,
    causal_offset: int | None = None,
    valid: Tensor | None = None,
    mean: Mean = "none",
    impl: Impl = "auto",
) -> Tensor:
    """Attention of some queries to all keys.

    Memory beside the output is linear in the keys, whatever the number of queries. Gradients flow to query and key;
    the backward pass forms the rows again, some at a time, in plain torch for both implementations.

    Args:
        query: float[B, H, q, d], rotated where the model rotates.
        key: float[B, G, N, d], G dividing H: heads h * H / G .. share group h.
        scale: factor on the dot products; None: d ** -0.5.
        index: int[B, R], which queries of each row, repeats allowed; None: all, R = q.
        mask: bool[B or 1, q or 1, N], True where a query sees a key, or float, added to the scaled products; entries
            below half the lowest number of its type hide the key. No gradient flows to it. None: every key.
        causal_offset: query i (its place among q) sees no key after `causal_offset + i`; None: not causal.
        valid: bool[B, R], the queries that count in the mean over queries, the others may hold NaN; None: all.
        mean: "none", "heads" or "queries" (over heads and over the queries that count).
        impl: see `mmtoken.kernels.dispatch`.

    Returns:
        float32[B, H, R, N], [B, R, N] or [B, N]. A query that sees no key has a row of zeros, and counts in the mean
        over queries if it is valid; the mean over no query is zero.

    Raises:
        InputError: shapes do not fit together, or `mean` is unknown.
        UnsupportedError: `impl="triton"` cannot run here.
    """
    if mean not in get_args(Mean):
        raise InputError(f"mean={mean!r} is unknown; use one of {', '.join(map(repr, get_args(Mean)))}.")
    _fit(query, key, index, mask, valid)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, index, mask, valid, scale, causal_offset, mean)
    if choose("attention_rows", query, key, index, mask, valid, impl=impl) == "torch":
        return reference.attention_rows(*arguments)
    from mmtoken.kernels.attention_rows import triton as kernels

    return kernels.attention_rows(*arguments)


def _fit(query: Tensor, key: Tensor, index: Tensor | None, mask: Tensor | None, valid: Tensor | None) -> None:
    """Refuse shapes that do not belong together."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}"
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise InputError(f"{shapes}: they must be [B, H, q, d] and [B, G, N, d] with the same B and d.")
    batch, heads, queries, _ = query.shape
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise InputError(f"{shapes}: the {heads} heads must be a multiple of the {key.shape[1]} key/value heads.")
    if index is not None and (index.ndim != 2 or index.shape[0] != batch):
        raise InputError(f"index {list(index.shape)} must be [B, R] with B = {batch}.")
    rows = queries if index is None else index.shape[1]
    if valid is not None and tuple(valid.shape) != (batch, rows):
        raise InputError(f"valid {list(valid.shape)} must be [B, R] = [{batch}, {rows}].")
    if mask is not None and (
        mask.ndim != 3
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, queries)
        or mask.shape[2] != key.shape[2]
    ):
        raise InputError(
            f"mask {list(mask.shape)} must be [B or 1, q or 1, N] with B = {batch}, q = {queries}, N = {key.shape[2]}."
        )
