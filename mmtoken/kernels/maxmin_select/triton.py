"""Triton: one launch for each pick.

A launch reads every token that is left once and has a program for each block of tokens; a single program per item would
leave most of a device idle, and a loop inside one launch would need a barrier between programs that are not all
resident. What is the pick is found out by every program of the next launch for itself, from one number per block, so
that nothing is launched in between and the host never waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtoken.kernels.similarity_stats.triton import inverse_norm, similarity_stats


@triton.jit(do_not_specialize=["step", "steps", "n", "blocks"])
def maxmin_step_kernel(
    x,
    scale,
    nearest,
    best_in,
    index_in,
    best_out,
    index_out,
    counts,
    picks,
    step,
    steps,
    n,
    d,
    blocks,
    x_batch,
    x_row,
    x_col,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Find pick number `step`, and each block's distances after it with the farthest token for the next step."""
    block = tl.program_id(0) % blocks
    # int64: batch * n * d may pass 2^31.
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    every = tl.arange(0, BLOCKS)
    candidates = tl.load(best_in + batch * blocks + every, mask=every < blocks, other=float("-inf"))
    farthest, where = tl.max(candidates, axis=0, return_indices=True)  # blocks are in order: ties to the lower token
    pick = tl.load(index_in + batch * blocks + where)
    going = (step < tl.load(counts + batch)) & (farthest > float("-inf"))
    if block == 0:
        tl.store(picks + batch * steps + step, tl.where(going, pick, -1).to(tl.int64))
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    distance = tl.load(nearest + batch * n + row, mask=row < n, other=float("-inf"))
    distance = tl.where(going & (row != pick), distance, float("-inf"))
    # Tokens that cannot be picked any more are not read.
    left = distance > float("-inf")
    rows = x + batch * x_batch + row.to(tl.int64)[:, None] * x_row
    picked = x + batch * x_batch + pick.to(tl.int64) * x_row
    deep = tl.arange(0, BLOCK_D)
    product = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for start in range(0, d, BLOCK_D):
        part = start + deep
        ours = tl.load(rows + part[None, :] * x_col, mask=left[:, None] & (part < d)[None, :], other=0.0)
        theirs = tl.load(picked + part * x_col, mask=(part < d) & going, other=0.0)
        product += ours.to(tl.float32) * theirs.to(tl.float32)[None, :]
    scales = tl.load(scale + batch * n + row, mask=left, other=0.0) * tl.load(scale + batch * n + pick)
    similarity = tl.sum(product, axis=1) * scales
    distance = tl.where(left, tl.minimum(distance, 1 - similarity), float("-inf"))
    tl.store(nearest + batch * n + row, distance, mask=row < n)
    value, place = tl.max(distance, axis=0, return_indices=True)
    tl.store(best_out + batch * blocks + block, value)
    tl.store(index_out + batch * blocks + block, block * BLOCK_N + place)


def tokens_per_program(n: int) -> int:
    """So few that a device is full, so many that reading the blocks' candidates costs little: 16, or 32 of many."""
    if triton.knobs.runtime.interpret:
        return 128  # to interpret a program takes as long for few tokens as for many
    return 16 if n <= 16384 else 32


@torch.library.custom_op("mmtoken::maxmin_select", mutates_args=())
def maxmin_select(features: Tensor, steps: int, eligible: Tensor, counts: Tensor) -> Tensor:
    """Indices; see `mmtoken.kernels.maxmin_select.maxmin_select`."""
    batch, n, d = features.shape
    device = features.device
    if not batch or not n or not steps:
        return torch.full((batch, steps), -1, dtype=torch.long, device=device)
    isolation = (1 - nearest_neighbour(features, eligible)).masked_fill(~eligible, -torch.inf)
    rows = tokens_per_program(n)
    blocks = triton.cdiv(n, rows)
    # The first pick comes as the candidate of the first block.
    candidates = [torch.full((batch, blocks), -torch.inf, device=device) for _ in range(2)]
    indices = [torch.zeros(batch, blocks, dtype=torch.int32, device=device) for _ in range(2)]
    first = isolation.argmax(-1, keepdim=True)
    candidates[0][:, :1] = isolation.gather(1, first)
    indices[0][:, :1] = first.int()
    nearest = torch.where(eligible, torch.inf, -torch.inf).float().contiguous()
    scale = inverse_norm(features)
    counts = counts.contiguous()
    picks = torch.empty(batch, steps, dtype=torch.long, device=device)
    for step in range(steps):
        now, after = step % 2, (step + 1) % 2
        maxmin_step_kernel[(batch * blocks,)](
            features,
            scale,
            nearest,
            candidates[now],
            indices[now],
            candidates[after],
            indices[after],
            counts,
            picks,
            step,
            steps,
            n,
            d,
            blocks,
            *features.stride(),
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK_N=rows,
            BLOCK_D=min(256, triton.next_power_of_2(d)),
            num_warps=4,
        )
    return picks


def nearest_neighbour(features: Tensor, eligible: Tensor) -> Tensor:
    """float32[B, N]: similarity of each eligible token to the most similar other one; -inf without any.

    Two tokens that are each other's nearest neighbours get the same number, however products are rounded: of them the
    lower index must win.
    """
    value, index, _ = similarity_stats(features, None, eligible, eligible, 1.0)
    place = index.clamp(min=0)
    mutual = index.gather(1, place) == torch.arange(value.shape[1], device=value.device)
    return torch.where(mutual, torch.maximum(value, value.gather(1, place)), value)


@maxmin_select.register_fake
def _(features: Tensor, steps: int, eligible: Tensor, counts: Tensor) -> Tensor:
    return features.new_empty(len(features), steps, dtype=torch.long)
