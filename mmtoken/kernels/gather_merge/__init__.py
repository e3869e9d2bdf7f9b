"""Rows that are kept, and weighted sums of others added to them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl, choose
from mmtoken.kernels.gather_merge import reference


def gather_merge(
    features: Tensor,
    index: Tensor,
    slot: Tensor,
    weight: Tensor,
    source: Tensor | None = None,
    own: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Kept rows with weighted sums of others added to them.

    out[b, k] = own[b, k] * features[b, index[b, k]] + sum over {e: slot[b, e] = k} of
    weight[b, e] * features[b, source[b, e]].

    What token merging comes down to once it is known which token goes where: size-weighted means (ToMe), means of
    members (VisionZip), attention-weighted means (TokenCorr), weighted neighbours, which may overlap and be kept rows
    themselves (PruMerge), clusters around centres and one sum (TCA), sums by score (TRIPS, BUS). A mean is a sum whose
    weights were divided by their sum.

    Every output row is summed up in float32, its own row first, then the others in the order of e, and rounded once;
    the same inputs give the same bits. For that, addends are sorted by output row (in gradients: by input row), and
    nothing is added atomically. Rows that nothing refers to are not read, whatever they hold. Differentiable in
    features, weight and own.

    Args:
        features: float[B, N, D].
        index: int64[B, K], the row that each output row starts from; -1: none.
        slot: int64[B, E], the output row that something is added to; -1: none (padding, tokens that are lost).
        weight: float[B, E].
        source: int64[B, E], the row that is added, as often as wanted; None: row e, so that E is N.
        own: float[B, K], weight of the rows of `index`; None: 1, so that a row to which nothing is added stays the same
            to the bit.
        impl: see `mmtoken.kernels.dispatch`.

    Returns:
        float[B, K, D] of the type of features; zeros where nothing is added up.

    Raises:
        InputError: shapes do not fit, or (on the CPU, outside torch.compile) an index lies outside its range; kernels
            take such for -1.
    """
    if features.ndim != 3:
        raise InputError(f"features has shape {tuple(features.shape)}; expected [items, rows, width].")
    batch, length = features.shape[:2]
    if source is None:
        source = torch.arange(length, device=slot.device).expand(batch, -1)
    for name, value, shape in (
        ("index", index, (batch, *index.shape[1:2])),
        ("source", source, (batch, *source.shape[1:2])),
        ("slot", slot, tuple(source.shape)),
        ("weight", weight, tuple(source.shape)),
        ("own", own, tuple(index.shape)),
    ):
        if value is not None and (value.ndim != 2 or tuple(value.shape) != shape):
            raise InputError(f"{name} has shape {list(value.shape)}; expected {list(shape)}.")
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        _refuse_outside("index", index, length)
        _refuse_outside("slot", slot, index.shape[1])
        _refuse_outside("source", source, length)
    if choose("gather_merge", features, index, slot, weight, own, impl=impl) == "torch":
        return reference.gather_merge(features, index, source, slot, weight, own)
    from mmtoken.kernels.gather_merge import triton

    return triton.gather_merge(features, index, source, slot, weight, own)


def _refuse_outside(name: str, index: Tensor, end: int) -> None:
    if not index.numel():
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < -1 or high >= end:
        raise InputError(f"{name} holds {low if low < -1 else high}; expected -1 (none) or 0 to {end - 1}.")
