"""Made-up inputs of `frame_delta`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmtoken.kernels.cases import Case, Cost, Inputs, Operation
from mmtoken.kernels.frame_delta import Similarity, frame_delta


def frames(
    generator: torch.Generator, *, n: int, dtype: torch.dtype, batch: int, width: int, similarity: Similarity
) -> Inputs:
    """Frames of a video that change by and by; the last patch is zero in both, the one before has not changed."""
    # Sums over the width are of the order of 1.
    anchor = torch.randn(batch, n, width, generator=generator) / width
    anchor[:, -1] = 0.0
    change = torch.rand(batch, n, 1, generator=generator)
    keys = anchor + change * torch.randn(batch, n, width, generator=generator) / width
    keys[:, -2:] = anchor[:, -2:]
    return {"keys": keys.to(dtype), "anchor": anchor.to(dtype), "similarity": similarity}


def in_single_steps(keys: Tensor, anchor: Tensor, similarity: Similarity) -> Tensor:
    """The straightforward version: each formula as it is written."""
    new, old = keys.float(), anchor.float()
    if similarity == "cosine":
        return (new * old).sum(-1) / (new.square().sum(-1).sqrt() * old.square().sum(-1).sqrt()).clamp(min=1e-8)
    if similarity == "dot":
        return (new * old).sum(-1)
    return -((new - old).abs().sum(-1) if similarity == "l1" else (new - old).square().sum(-1).sqrt())


def cost(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    keys = inputs["keys"]
    steps = {"cosine": 6, "dot": 2, "l1": 3, "l2": 3}[inputs["similarity"]]
    return Cost(
        2 * keys.numel() * keys.element_size() + outputs[0].numel() * outputs[0].element_size(), steps * keys.numel()
    )


def operators(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    from mmtoken.kernels.frame_delta import triton

    return [(triton.frame_delta, (inputs["keys"], inputs["anchor"], inputs["similarity"]))]


OPERATION = Operation(
    name="frame_delta",
    function=frame_delta,
    operators=operators,
    cases=(
        Case(
            "cosine",
            partial(frames, similarity="cosine"),
            {"width": 24},
            real={"SigLIP-SO400M": {"width": 1152}, "CLIP ViT-L/14": {"width": 1024}},
        ),
        Case("dot", partial(frames, similarity="dot"), {"width": 16}),
        Case("l1", partial(frames, similarity="l1"), {"width": 300}),
        Case("l2", partial(frames, similarity="l2"), {"width": 7}),
    ),
    cost=cost,
    naive=in_single_steps,
)
