"""When an implementation of an operation agrees with its torch reference.

Two-reference rule: |found(dtype) - torch(float32)| <= 2 |torch(dtype) - torch(float32)| + atol, for the largest error
of each tensor, where the float32 reference reads the same rounded inputs. Integer and bool outputs agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmtoken.kernels.cases import Case, Inputs, Operation, changed

ATOL_OF_GRADIENTS = 10.0
"""Times `atol`: gradients sum over more terms."""

Call = Callable[..., Any]
"""Takes an operation's inputs as keywords; returns a tensor or a tuple of tensors."""


def disagreement(
    operation: Operation, case: Case, inputs: Inputs, call: Call, *, gradients: bool = True, near_ties: float = 0.0
) -> str | None:
    """What tells `call` apart from the torch reference; None if it agrees.

    Args:
        operation, case: whose inputs these are.
        inputs: on any device.
        call: the implementation.
        gradients: compare them too, for the inputs that the case names.
        near_ties: share of an integer output that may differ, where inputs are so many that some ties are near.
    """
    exact_inputs = changed(inputs, lambda x: x.float() if x.is_floating_point() else x)
    reference = partial(operation.function, impl="torch")
    differentiable = case.differentiable if gradients else ()
    found, count = values_and_gradients(call, inputs, differentiable)
    same, _ = values_and_gradients(reference, inputs, differentiable)
    exact, _ = values_and_gradients(reference, exact_inputs, differentiable)
    return two_references(found, same, exact, count, operation.atol, near_ties)


def values_and_gradients(call: Call, inputs: Inputs, differentiable: Sequence[str]) -> tuple[list[Tensor], int]:
    """(outputs, then gradients of the inputs named for the same upstream gradients; number of outputs)."""
    inputs = changed(
        inputs, lambda x: x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), tuple(differentiable)
    )
    found = call(**inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    result = [x.detach() for x in outputs]
    if differentiable:
        floating = [x for x in outputs if x.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator).to(x) for x in floating]
        torch.autograd.backward(floating, upstream)
        result += [inputs[name].grad for name in differentiable]
    return result, len(outputs)


def two_references(
    found: Sequence[Tensor | None],
    same: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    outputs: int,
    atol: float,
    near_ties: float = 0.0,
) -> str | None:
    """The rule of this file for tensors in order, the first `outputs` of which are outputs, the others gradients."""
    if not len(found) == len(same) == len(exact):
        return f"{len(found)} tensors instead of {len(same)}"
    for number, (ours, low, high) in enumerate(zip(found, same, exact, strict=True)):
        what = f"output {number}" if number < outputs else f"gradient {number - outputs}"
        if ours is None or low is None or high is None:
            return f"{what} is missing"
        if ours.shape != high.shape or ours.dtype != low.dtype:
            return f"{what} is {ours.dtype} {tuple(ours.shape)} instead of {low.dtype} {tuple(high.shape)}"
        if not ours.is_floating_point():
            wrong = int((ours != high).sum())
            if wrong > near_ties * ours.numel():
                return f"{what} differs in {wrong} of {ours.numel()} places"
            continue
        if ours.isnan().any():
            return f"{what} holds NaN"
        finite = high.isfinite()
        if not torch.equal(ours[~finite].float(), high[~finite].float()):
            return f"{what} is not infinite where the reference is"
        error, allowed = ((x.float() - high.float()).abs()[finite] for x in (ours, low))
        if not error.numel():
            continue
        # Of the largest error of a tensor: element by element the reference is exact by chance.
        limit = 2 * float(allowed.max()) + atol * (1.0 if number < outputs else ATOL_OF_GRADIENTS)
        if float(error.max()) > limit:
            return f"{what} is {float(error.max()):.3g} off, more than {limit:.3g}"
    return None
