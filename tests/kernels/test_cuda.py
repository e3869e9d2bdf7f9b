"""On a GPU: every operation at sizes of real models. Nothing here has run where there was none."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from mmtoken.cli.main import main
from mmtoken.kernels.agreement import disagreement
from mmtoken.kernels.cases import Case, Operation, changed, made, operations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [
    pytest.param(op, case, size, n, id=f"{op.name}-{case.name}-{size}-{n}")
    for op in operations().values()
    for case in op.cases
    for size in case.real
    for n in (576, 2880, 8192)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("operation", "case", "size", "n"), SHAPES)
def test_values_and_gradients_at_real_sizes(
    operation: Operation, case: Case, size: str, n: int, dtype: torch.dtype
) -> None:
    inputs = changed(made(case, n, dtype, size=size), lambda x: x.to("cuda"))
    call = partial(operation.function, impl="triton")
    # Gradients of the reference need the memory of its forward pass.
    said = disagreement(operation, case, inputs, call, gradients=n <= 2880, near_ties=1e-3)
    assert said is None


@pytest.mark.parametrize(("operation", "case", "size", "n"), SHAPES)
def test_results_repeat_bit_by_bit(operation: Operation, case: Case, size: str, n: int) -> None:
    inputs = changed(made(case, n, torch.bfloat16, size=size), lambda x: x.to("cuda"))
    first, second = (operation.function(**inputs, impl="triton") for _ in range(2))
    for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (first, second)), strict=True):
        assert torch.equal(one, other)


def test_the_benchmark_runs_on_the_device(tmp_path: Path) -> None:
    assert main(["bench", "ops", "--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
