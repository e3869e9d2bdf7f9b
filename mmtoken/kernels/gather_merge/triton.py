"""`gather_merge` in Triton: sums over the addends of an output row, sorted by row, so that no atomics are needed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtoken.kernels.gather_merge import reference

LIGHT = 8
"""Addends of a row that are read one at a time, all rows of the program together; the others BLOCK_E at a time."""
BLOCK_E = 8
BLOCK_D = 512
"""Most channels per program."""
TILE = 2048
"""Values that a program puts out, of as many rows as that makes."""


@triton.jit
def add_rows_kernel(
    x,
    source,
    weight,
    starts,
    out,
    length,
    width,
    addends,
    count,
    stride_b,
    stride_n,
    stride_d,
    LIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_K output rows and BLOCK_D channels per program: out[k] = sum of weight * x[source] over the row's addends.

    Addends are sorted by output row.
    """
    tiles = tl.cdiv(count, BLOCK_K)
    # B * K * D, B * E and B * N * D may pass 2^31.
    item = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    starts += item * (count + 1)
    source += item * addends
    weight += item * addends
    x += item * stride_b + columns[None, :].to(tl.int64) * stride_d
    begin = tl.load(starts + rows, mask=rows < count, other=0)
    end = tl.load(starts + rows + 1, mask=rows < count, other=0)

    most = tl.max(end - begin, 0)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for step in range(0, tl.minimum(most, LIGHT)):
        real = begin + step < end
        place = tl.load(source + begin + step, mask=real, other=-1).to(tl.int64)
        share = tl.load(weight + begin + step, mask=real, other=0.0)
        real = (place >= 0) & (place < length)
        values = tl.load(x + place[:, None] * stride_n, mask=real[:, None] & inside[None, :], other=0.0)
        total += share[:, None] * values.to(tl.float32)
    if most > LIGHT:
        for row in range(0, BLOCK_K):
            mine = tl.arange(0, BLOCK_K) == row
            first = tl.sum(tl.where(mine, begin, 0), 0) + LIGHT
            last = tl.sum(tl.where(mine, end, 0), 0)
            for tile in range(first, last, BLOCK_E):
                each = tile + tl.arange(0, BLOCK_E)
                place = tl.load(source + each, mask=each < last, other=-1).to(tl.int64)
                share = tl.load(weight + each, mask=each < last, other=0.0)
                real = (place >= 0) & (place < length)
                values = tl.load(x + place[:, None] * stride_n, mask=real[:, None] & inside[None, :], other=0.0)
                part = tl.sum(share[:, None] * values.to(tl.float32), 0)
                total += tl.where(mine[:, None], part[None, :], 0.0)
    target = out + (item * count + rows[:, None]) * width + columns[None, :]
    tl.store(target, total, mask=(rows < count)[:, None] & inside[None, :])


@triton.jit
def weight_gradient_kernel(
    x,
    gradient,
    source,
    slot,
    out,
    length,
    width,
    addends,
    count,
    x_stride_b,
    x_stride_n,
    x_stride_d,
    g_stride_b,
    g_stride_n,
    g_stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N addends of one item per program: out[e] = x[source] . gradient[slot]."""
    item = tl.program_id(1).to(tl.int64)
    each = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(source + item * addends + each, mask=each < addends, other=-1).to(tl.int64)
    slots = tl.load(slot + item * addends + each, mask=each < addends, other=-1).to(tl.int64)
    real = (rows >= 0) & (rows < length) & (slots >= 0) & (slots < count)
    x += item * x_stride_b
    gradient += item * g_stride_b
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, width, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = real[:, None] & (columns < width)[None, :]
        values = tl.load(x + rows[:, None] * x_stride_n + columns[None, :] * x_stride_d, mask=mask, other=0.0)
        came = tl.load(gradient + slots[:, None] * g_stride_n + columns[None, :] * g_stride_d, mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float32) * came.to(tl.float32), 1)
    tl.store(out + item * addends + each, total, mask=each < addends)


def blocks(width: int) -> tuple[int, int]:
    """(output rows, channels) per program."""
    channels = min(BLOCK_D, triton.next_power_of_2(max(width, 1)))
    return min(64, TILE // channels), channels


@torch.library.custom_op("mmtoken::gather_merge", mutates_args=())
def add_rows(features: Tensor, source: Tensor, slot: Tensor, weight: Tensor, count: int) -> Tensor:
    """As `reference.add_rows`."""
    batch, length, width = features.shape
    # The interpreter cuts digits off where a device rounds to bfloat16.
    kind = features.dtype if features.is_cuda else torch.float32
    out = torch.empty(batch, count, width, dtype=kind, device=features.device)
    if not out.numel():
        return out.to(features.dtype)
    ranked, order = torch.sort(torch.where((slot < 0) | (source < 0), count, slot), dim=1, stable=True)
    rows = torch.arange(count + 1, device=slot.device).expand(batch, -1).contiguous()
    tall, wide = blocks(width)
    add_rows_kernel[(batch * triton.cdiv(count, tall), triton.cdiv(width, wide))](
        features,
        source.gather(1, order),
        weight.gather(1, order),
        torch.searchsorted(ranked, rows),
        out,
        length,
        width,
        source.shape[1],
        count,
        *features.stride(),
        LIGHT=LIGHT,
        BLOCK_K=tall,
        BLOCK_E=BLOCK_E,
        BLOCK_D=wide,
    )
    return out.to(features.dtype)


@add_rows.register_fake
def _(features: Tensor, source: Tensor, slot: Tensor, weight: Tensor, count: int) -> Tensor:
    return features.new_empty(features.shape[0], count, features.shape[2])


@torch.library.custom_op("mmtoken::gather_merge_weight_gradient", mutates_args=())
def weight_gradient(features: Tensor, gradient: Tensor, source: Tensor, slot: Tensor) -> Tensor:
    """float32[B, E]: features[b, source[b, e]] . gradient[b, slot[b, e]], zero where one of both is -1."""
    batch, length, width = features.shape
    out = torch.empty(source.shape, dtype=torch.float32, device=features.device)
    if not out.numel():
        return out
    source, slot = source.contiguous(), slot.contiguous()
    tall, wide = blocks(width)
    weight_gradient_kernel[(triton.cdiv(source.shape[1], tall), batch)](
        features,
        gradient,
        source,
        slot,
        out,
        length,
        width,
        source.shape[1],
        gradient.shape[1],
        *features.stride(),
        *gradient.stride(),
        BLOCK_N=tall,
        BLOCK_D=wide,
    )
    return out


@weight_gradient.register_fake
def _(features: Tensor, gradient: Tensor, source: Tensor, slot: Tensor) -> Tensor:
    return torch.empty(source.shape, dtype=torch.float32, device=features.device)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, source, slot, weight, _ = inputs
    ctx.save_for_backward(features, source, slot, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features, source, slot, weight = ctx.saved_tensors
    to_features, _, _, to_weight, _ = ctx.needs_input_grad
    # The same sums with the roles of both ends exchanged.
    return (
        add_rows(
            gradient, torch.where(source < 0, -1, slot), torch.where(slot < 0, -1, source), weight, features.shape[1]
        )
        if to_features
        else None,
        None,
        None,
        weight_gradient(features, gradient, source, slot) if to_weight else None,
        None,
    )


add_rows.register_autograd(_backward, setup_context=_remember)


def gather_merge(
    features: Tensor, index: Tensor, source: Tensor, slot: Tensor, weight: Tensor, own: Tensor | None
) -> Tensor:
    """float[B, K, D]; see `mmtoken.kernels.gather_merge.gather_merge`."""
    merged: Tensor = add_rows(features, *reference.joined(index, source, slot, weight, own), index.shape[1])
    return merged
