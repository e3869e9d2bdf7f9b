"""`frame_delta` in Triton: both frames are read once, and nothing as large as they are is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MEASURES = {"cosine": 0, "dot": 1, "l1": 2, "l2": 3}
EPS = 1e-8
"""Least norm, as of torch's cosine_similarity."""
BLOCK_C = 256
"""Most channels read at a time."""
TILE = 2048
"""Values read at a time from each frame."""


@triton.jit
def frame_delta_kernel(
    keys,
    anchor,
    out,
    patches,
    width,
    k_stride_f,
    k_stride_t,
    k_stride_c,
    a_stride_f,
    a_stride_t,
    a_stride_c,
    eps,
    MEASURE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_T patches of one frame per program."""
    tiles = tl.cdiv(patches, BLOCK_T)
    # F * T * C may pass 2^31.
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    keys += frame * k_stride_f + rows[:, None] * k_stride_t
    anchor += frame * a_stride_f + rows[:, None] * a_stride_t
    total = tl.zeros((BLOCK_T,), tl.float32)
    new_square = tl.zeros((BLOCK_T,), tl.float32)
    old_square = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, width, BLOCK_C):
        columns = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask = (rows < patches)[:, None] & (columns < width)[None, :]
        new = tl.load(keys + columns[None, :] * k_stride_c, mask=mask, other=0.0).to(tl.float32)
        old = tl.load(anchor + columns[None, :] * a_stride_c, mask=mask, other=0.0).to(tl.float32)
        if MEASURE == 2:
            total += tl.sum(tl.abs(new - old), 1)
        elif MEASURE == 3:
            total += tl.sum((new - old) * (new - old), 1)
        else:
            total += tl.sum(new * old, 1)
        if MEASURE == 0:
            new_square += tl.sum(new * new, 1)
            old_square += tl.sum(old * old, 1)
    if MEASURE == 0:
        total = total / tl.maximum(tl.sqrt(new_square), eps) / tl.maximum(tl.sqrt(old_square), eps)
    elif MEASURE == 2:
        total = -total
    elif MEASURE == 3:
        total = -tl.sqrt(total)
    tl.store(out + frame * patches + rows, total, mask=rows < patches)


@torch.library.custom_op("mmtoken::frame_delta", mutates_args=())
def frame_delta(keys: Tensor, anchor: Tensor, similarity: str) -> Tensor:
    """As `reference.frame_delta`."""
    frames, patches, width = keys.shape
    out = torch.empty(frames, patches, dtype=torch.float32, device=keys.device)
    if not out.numel():
        return out
    wide = min(BLOCK_C, triton.next_power_of_2(max(width, 1)))
    tall = min(64, TILE // wide)
    frame_delta_kernel[(frames * triton.cdiv(patches, tall),)](
        keys,
        anchor,
        out,
        patches,
        width,
        *keys.stride(),
        *anchor.stride(),
        EPS,
        MEASURE=MEASURES[similarity],
        BLOCK_T=tall,
        BLOCK_C=wide,
    )
    return out


@frame_delta.register_fake
def _(keys: Tensor, anchor: Tensor, similarity: str) -> Tensor:
    return torch.empty(keys.shape[:2], dtype=torch.float32, device=keys.device)
