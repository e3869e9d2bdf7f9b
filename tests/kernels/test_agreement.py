"""What counts as agreement: the two-reference rule, by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken.kernels.agreement import disagreement, two_references, values_and_gradients
from mmtoken.kernels.cases import Case, Cost, Operation

ONE = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("found", "same", "exact", "said"),
    [
        (ONE, ONE, ONE, None),
        (ONE + 1.9e-2, ONE - 1e-2, ONE, None),  # twice the error of the reference in the dtype
        (ONE + 2.1e-2, ONE - 1e-2, ONE, "output 0 is 0.021 off, more than 0.02"),
        (ONE + 5e-6, ONE, ONE, None),
        (ONE + 2e-5, ONE, ONE, "output 0 is 2e-05 off, more than 1e-05"),
        (ONE * torch.nan, ONE, ONE, "output 0 holds NaN"),
        (torch.tensor([1.0, -torch.inf]), ONE, ONE, "output 0 is inf off"),
        (ONE, torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, -torch.inf]), "not infinite where"),
        (ONE[:1], ONE, ONE, "instead of torch.float32 (2,)"),
        (ONE.half(), ONE, ONE, "output 0 is torch.float16"),
        (ONE.long(), ONE.long(), ONE.long(), None),
        (ONE.long() + 1, ONE.long(), ONE.long(), "output 0 differs in 2 of 2 places"),
        (None, ONE, ONE, "output 0 is missing"),
        (ONE[:0], ONE[:0], ONE[:0], None),
    ],
)
def test_the_rule(found: Tensor | None, same: Tensor, exact: Tensor, said: str | None) -> None:
    result = two_references([found], [same], [exact], 1, 1e-5)
    assert result is None if said is None else said in str(result)


def test_some_integers_may_differ_where_near_ties_are_expected() -> None:
    index = torch.arange(1000)
    wrong = index.clone()
    wrong[7] = 0
    for share, agrees in ((1e-3, True), (0.9e-3, False)):
        assert (two_references([wrong], [index], [index], 1, 0.0, share) is None) == agrees


def test_gradients_have_ten_times_the_tolerance_and_are_named() -> None:
    near, far = ONE + 5e-5, ONE + 2e-4
    assert two_references([ONE, near], [ONE, ONE], [ONE, ONE], 1, 1e-5) is None
    assert str(two_references([ONE, far], [ONE, ONE], [ONE, ONE], 1, 1e-5)).startswith("gradient 0 is 0.0002 off")


def scaled(x: Tensor, *, impl: str = "torch", by: float = 2.0) -> Any:
    return x * by, x.argmax(-1)


OPERATION = Operation("scaled", scaled, lambda inputs: [], (), lambda *_: Cost(0, 0))
CASE = Case("plain", lambda generator, *, n, dtype, batch: {"x": torch.zeros(batch, n)}, differentiable=("x",))


def test_values_gradients_and_the_number_of_outputs() -> None:
    (values, index, gradient), outputs = values_and_gradients(scaled, {"x": ONE}, ("x",))
    assert outputs == 2 and torch.equal(values, 2 * ONE) and index == 1
    again = torch.randn(2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gradient, 2 * again)
    assert not ONE.requires_grad
    assert len(values_and_gradients(scaled, {"x": ONE}, ())[0]) == 2


def test_an_implementation_is_held_against_the_reference() -> None:
    inputs = {"x": ONE}
    assert disagreement(OPERATION, CASE, inputs, scaled) is None
    assert str(disagreement(OPERATION, CASE, inputs, partial(scaled, by=2.1))).startswith("output 0 is 0.2 off")

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 3

    def gradient_off(x: Tensor) -> Any:
        return Wrong.apply(x), x.argmax(-1)

    assert str(disagreement(OPERATION, CASE, inputs, gradient_off)).startswith("gradient 0")
    assert disagreement(OPERATION, CASE, inputs, gradient_off, gradients=False) is None
