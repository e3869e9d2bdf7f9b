"""What an operation declares about itself for the generic test and the generic benchmark.

`mmtoken/kernels/<operation>/cases.py` holds one `OPERATION`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""Keyword arguments of the operation's public function, `impl` left out."""


class Cost(NamedTuple):
    """What one call must move and compute at least: each input read once, each output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """Inputs of one kind.

    Attributes:
        name: what is special about it, "padded".
        make: called with a CPU generator and the keywords n (tokens), dtype (of floating inputs), batch (0 too) and
            those of `size`; gives CPU tensors. The benchmark moves them. Inputs of which the result is an index must
            have no near-ties.
        size: further sizes of `make` in the tests, small: kernels are interpreted. {"heads": 4, "width": 16}
        differentiable: names of the inputs that gradients are compared for.
        real: further sizes in the benchmark, from real models, by a name: {"Qwen2-7B": {"heads": 28, ...}}; empty: not
            timed.
    """

    name: str
    make: Callable[..., Inputs]
    size: Mapping[str, int] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    real: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """One operation of mmtoken/kernels.

    Attributes:
        name: of its folder and of the custom operator.
        function: the public one; takes `impl`. Returns a tensor or a tuple of tensors; integer and bool outputs must
            agree exactly, floating ones under the two-reference rule.
        operators: the custom operators of its Triton module that one call of the function runs, each with its
            arguments, for torch.library.opcheck. A function, since that module is imported only where it is used.
        cases: at least one; every one is tested at all sizes.
        cost: of one call, from its inputs and outputs.
        atol: of the two-reference rule, absolute.
        sizes: numbers of tokens in the tests.
        naive: a straightforward version of the function without tiles, for the benchmark's comparison of time and
            memory on the CPU; None: the reference is straightforward.
    """

    name: str
    function: Callable[..., Any]
    operators: Callable[[Inputs], list[tuple[Any, tuple[Any, ...]]]]
    cases: tuple[Case, ...]
    cost: Callable[[Inputs, tuple[Tensor, ...]], Cost]
    atol: float = 1e-5
    sizes: tuple[int, ...] = (1, 63, 577, 1000)
    naive: Callable[..., Any] | None = None


def operation_names() -> list[str]:
    """Every operation of mmtoken/kernels, by its folder."""
    folder = Path(__file__).parent
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if module.ispkg)


def operations() -> dict[str, Operation]:
    """Every operation of mmtoken/kernels by name; reads their folders' `cases`."""
    return {name: importlib.import_module(f"mmtoken.kernels.{name}.cases").OPERATION for name in operation_names()}


def made(case: Case, n: int, dtype: torch.dtype, batch: int = 1, *, seed: int = 0, size: str | None = None) -> Inputs:
    """Inputs of a case on the CPU.

    Args:
        case: of an operation.
        n: tokens.
        dtype: of floating inputs.
        batch: rows; 0 is allowed.
        seed: of the generator.
        size: a name of `case.real`; None: the tests' small sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    return case.make(generator, n=n, dtype=dtype, batch=batch, **(case.size if size is None else case.real[size]))


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor], names: tuple[str, ...] | None = None) -> Inputs:
    """The inputs with `change` applied to every tensor, or to those of `names`."""
    return {
        name: change(value) if isinstance(value, Tensor) and (names is None or name in names) else value
        for name, value in inputs.items()
    }
