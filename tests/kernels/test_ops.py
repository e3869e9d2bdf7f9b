"""Every operation: Triton against the torch reference, which every operation's own test holds against plain loops.

The two-reference rule and what is compared are those of `mmtoken.kernels.agreement`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken.kernels.agreement import disagreement, values_and_gradients
from mmtoken.kernels.cases import Case, Inputs, Operation, changed, made, operations
from mmtoken.kernels.dispatch import Impl, ran, ran_since, using

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = [pytest.param(op, id=name) for name, op in operations().items()]
CASES = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in operations().values() for case in op.cases]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def outputs(operation: Operation, inputs: Inputs, impl: Impl) -> tuple[Tensor, ...]:
    """Outputs as a tuple; asserts that `impl` made them."""
    before = ran()
    found = operation.function(**inputs, impl=impl)
    assert ran_since(before) == {operation.name: impl}
    return (found,) if isinstance(found, Tensor) else tuple(found)


def compare(operation: Operation, case: Case, inputs: Inputs) -> None:
    inputs = changed(inputs, lambda x: x.to(DEVICE))

    def call(**inputs: Any) -> tuple[Tensor, ...]:
        return outputs(operation, inputs, "triton")

    assert disagreement(operation, case, inputs, call) is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_values_and_gradients(operation: Operation, case: Case, dtype: torch.dtype, poisoned: None) -> None:
    """At odd sizes, the largest in float32 only, with NaN in all memory that kernels are to fill."""
    for n in operation.sizes if dtype == torch.float32 else operation.sizes[:2]:
        compare(operation, case, made(case, n, dtype, batch=2 if n < 100 else 1))


def strided(x: Tensor) -> Tensor:
    """The same values, none next to the other in memory."""
    spread = x.new_zeros(*x.shape[::-1], 2)
    spread[..., 0] = x.permute(*range(x.ndim)[::-1])
    return spread[..., 0].permute(*range(x.ndim)[::-1])


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_inputs_need_not_be_contiguous(operation: Operation, case: Case, poisoned: None) -> None:
    inputs = made(case, 33, torch.float32, batch=2)
    apart = changed(inputs, strided)
    assert not any(x.is_contiguous() for x in apart.values() if isinstance(x, Tensor) and x.numel() > 1)
    compare(operation, case, apart)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_an_empty_batch_gives_empty_outputs(operation: Operation, case: Case, impl: Impl) -> None:
    inputs = changed(made(case, 33, torch.float32, batch=0), lambda x: x.to(DEVICE))
    full = outputs(operation, changed(made(case, 33, torch.float32, batch=1), lambda x: x.to(DEVICE)), impl)
    for empty, one in zip(outputs(operation, inputs, impl), full, strict=True):
        assert empty.dtype == one.dtype and empty.shape == (0, *one.shape[1:])
    values_and_gradients(partial(operation.function, impl=impl), inputs, case.differentiable)


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation: Operation, which: int) -> None:
    """On the first and the last case: it takes seconds. The last in another type than that of scores."""
    case, dtype = operation.cases[which], torch.bfloat16 if which else torch.float32
    inputs = changed(made(case, 9, dtype), lambda x: x.to(DEVICE))
    inputs = changed(inputs, lambda x: x.requires_grad_(), case.differentiable)
    operators = operation.operators(inputs)
    assert operators
    for operator, arguments in operators:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_as_one_graph(operation: Operation, impl: Impl) -> None:
    case = operation.cases[0]
    inputs = changed(made(case, 33, torch.float32), lambda x: x.to(DEVICE))
    wanted = operation.function(**inputs, impl=impl)

    def call(**kwargs: Any) -> Any:
        return operation.function(**kwargs, impl=impl)

    torch.compiler.reset()  # graphs of other tests count towards the limit of recompilations
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_follows_device_and_using(operation: Operation) -> None:
    inputs = changed(made(operation.cases[0], 5, torch.float32), lambda x: x.to(DEVICE))
    for forced, wanted in (
        ("auto", "triton" if DEVICE == "cuda" else "torch"),
        ("torch", "torch"),
        ("triton", "triton"),
    ):
        before = ran()
        with using(forced):  # type: ignore[arg-type]
            operation.function(**inputs)
        assert ran_since(before) == {operation.name: wanted}
