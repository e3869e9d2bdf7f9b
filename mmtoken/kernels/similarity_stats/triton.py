"""Triton: tiles of products that are reduced to a row's statistics before the next tile is made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import normalize

EPS = 1e-12
"""Shortest vector that is scaled to length 1, as in `torch.nn.functional.normalize`."""
PROGRAMS = 264
"""Programs wanted: two for each multiprocessor of an H100. Few rows are split by columns until there are that many."""


# Variants of the kernel by numbers that make it no faster would only be compiled again.
@triton.jit(do_not_specialize=["n", "m", "row_blocks", "tiles", "splits", "tiles_per_split", "apart", "threshold"])
def similarity_stats_kernel(
    x,
    y,
    x_scale,
    y_scale,
    columns,
    best_out,
    index_out,
    count_out,
    n,
    m,
    d,
    row_blocks,
    tiles,
    splits,
    tiles_per_split,
    x_batch,
    x_row,
    x_col,
    y_batch,
    y_row,
    y_col,
    apart,
    threshold,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of rows against one split of the columns."""
    program = tl.program_id(0)
    split = program % splits
    block = (program // splits) % row_blocks
    # int64: batch * n * d may pass 2^31.
    batch = (program // splits // row_blocks).to(tl.int64)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    deep = tl.arange(0, BLOCK_D)
    x_rows = x + batch * x_batch + row.to(tl.int64)[:, None] * x_row
    scale = tl.load(x_scale + batch * n + row, mask=row < n, other=0.0)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    index = tl.full([BLOCK_N], -1, tl.int32)
    count = tl.full([BLOCK_N], 0, tl.int32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        column = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        y_rows = y + batch * y_batch + column.to(tl.int64)[:, None] * y_row
        product = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
        for start in range(0, d, BLOCK_D):
            where = start + deep
            left = tl.load(x_rows + where[None, :] * x_col, mask=(row < n)[:, None] & (where < d)[None, :], other=0.0)
            right = tl.load(
                y_rows + where[None, :] * y_col, mask=(column < m)[:, None] & (where < d)[None, :], other=0.0
            )
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, tl.trans(right), product, input_precision="tf32x3")
        # The two scales first: (i, j) and (j, i) are rounded alike.
        others = tl.load(y_scale + batch * m + column, mask=column < m, other=0.0)
        similarity = product * (scale[:, None] * others[None, :])
        # No token is compared with itself, unless rows and columns are of different tensors.
        seen = (column < m)[None, :] & (apart | (row[:, None] != column[None, :]))
        if MASKED:
            seen = seen & (tl.load(columns + batch * m + column, mask=column < m, other=0) != 0)[None, :]
        similarity = tl.where(seen, similarity, float("-inf"))
        count += tl.sum((similarity > threshold).to(tl.int32), axis=1)
        value, place = tl.max(similarity, axis=1, return_indices=True)
        index = tl.where(value > best, tile * BLOCK_M + place, index)
        best = tl.maximum(best, value)
    out = (batch * splits + split) * n + row
    tl.store(best_out + out, best, mask=row < n)
    tl.store(index_out + out, index, mask=row < n)
    tl.store(count_out + out, count, mask=row < n)


def blocks(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages by the dtype of the features."""
    if triton.knobs.runtime.interpret:  # which takes as long for a small block as for a large one
        return {"BLOCK_N": 256, "BLOCK_M": 128, "BLOCK_D": 32}
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}


def inverse_norm(features: Tensor) -> Tensor:
    """float32[B, N]: what scales each row to length 1."""
    scale: Tensor = 1 / torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32).clamp(min=EPS)
    return scale


@torch.library.custom_op("mmtoken::similarity_stats", mutates_args=())
def similarity_stats(
    features: Tensor, other: Tensor | None, rows: Tensor | None, columns: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(max, argmax, above); see `mmtoken.kernels.similarity_stats.similarity_stats`."""
    x, y = (_readable(part) for part in (features, features if other is None else other))
    batch, n, d = x.shape
    m = y.shape[1]
    meta = blocks(x.dtype)
    row_blocks, tiles = triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"])
    # At least two tiles for each split, so that what they leave behind is small beside what they read.
    splits = max(1, min(triton.cdiv(PROGRAMS, max(1, batch * row_blocks)), triton.cdiv(tiles, 2)))
    per_split = triton.cdiv(tiles, splits)
    best = torch.empty(batch, splits, n, dtype=torch.float32, device=x.device)
    index = torch.empty(batch, splits, n, dtype=torch.int32, device=x.device)
    count = torch.empty_like(index)
    if best.numel():
        x_scale = inverse_norm(x)
        similarity_stats_kernel[(batch * row_blocks * splits,)](
            x,
            y,
            x_scale,
            x_scale if other is None else inverse_norm(y),
            None if columns is None else columns.contiguous(),
            best,
            index,
            count,
            n,
            m,
            d,
            row_blocks,
            tiles,
            splits,
            per_split,
            *x.stride(),
            *y.stride(),
            other is not None,
            threshold if threshold < 1 else float("inf"),  # above 1 is rounding only
            MASKED=columns is not None,
            UPCAST=triton.knobs.runtime.interpret,  # the interpreter's products of bfloat16 are wrong
            **meta,
        )
    value = best.amax(1)
    # Of equal maxima the lowest index; rows that saw nothing have -1 in every split.
    place = index.long().masked_fill(best != value[:, None], m).amin(1)
    total = count.sum(1)
    if rows is not None:
        value = value.masked_fill(~rows, -torch.inf)
        place = place.masked_fill(~rows, -1)
        total = total.masked_fill(~rows, 0)
    return value, place, total


def _readable(features: Tensor) -> Tensor:
    return features if features.dtype in (torch.float32, torch.bfloat16, torch.float16) else features.float()


@similarity_stats.register_fake
def _(
    features: Tensor, other: Tensor | None, rows: Tensor | None, columns: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = features.shape[:2]
    return (
        features.new_empty(shape, dtype=torch.float32),
        features.new_empty(shape, dtype=torch.long),
        features.new_empty(shape, dtype=torch.long),
    )


def _keep(ctx, inputs, output) -> None:
    features, other, *_ = inputs
    best, index, _ = output
    ctx.save_for_backward(features, other, best, index)


def _backward(ctx, grad: Tensor, *_: Tensor | None):
    """d cos(x, y) / dx = (v - cos(x, y) u) / |x| for the unit vectors u, v of the one pair behind each maximum."""
    features, other, best, index = ctx.saved_tensors
    y = features if other is None else other
    if not y.numel():
        return torch.zeros_like(features), None if other is None else torch.zeros_like(other), None, None, None
    found = index >= 0
    pick = index.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
    cosine = torch.where(found, best, 0.0)[..., None]
    grad = torch.where(found, grad, 0.0)[..., None]
    unit = normalize(features.float(), dim=-1)
    y_scale = inverse_norm(y)[..., None]
    partner = y.gather(1, pick).float() * y_scale.gather(1, index.clamp(min=0)[..., None])
    to_x = grad * (partner - cosine * unit) * inverse_norm(features)[..., None]
    to_y = grad * (unit - cosine * partner) * y_scale.gather(1, index.clamp(min=0)[..., None])
    if other is None:
        return to_x.scatter_add(1, pick, to_y).to(features.dtype), None, None, None, None
    spread = torch.zeros_like(other, dtype=torch.float32).scatter_add(1, pick, to_y)
    return to_x.to(features.dtype), spread.to(other.dtype), None, None, None


similarity_stats.register_autograd(_backward, setup_context=_keep)
