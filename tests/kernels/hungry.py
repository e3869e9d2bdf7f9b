"""Run by test_ahead.py in a process of its own: an operation with kernels that must not pass.

Prints JSON: what is wrong -> what is said of it.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType

import torch
import triton
import triton.language as tl

from mmtoken.errors import InputError
from mmtoken.kernels.ahead import compile_operation
from mmtoken.kernels.cases import Case, Cost, Operation


@triton.jit
def product_kernel(x, out, n, BLOCK: tl.constexpr, DEEP: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    deep = tl.arange(0, DEEP)
    left = tl.load(x + row[:, None] * DEEP + deep[None, :], mask=(row < n)[:, None], other=0.0)
    right = tl.load(x + deep[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    product = doubled(tl.dot(left, right))
    tl.store(out + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], product, mask=(row < n)[:, None])


@triton.jit
def doubled(x):
    return x * 2


@triton.jit
def idle_kernel(x):
    tl.store(x, 0.0)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=[])
@triton.jit
def tuned_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def launch(wrong: str, x: torch.Tensor) -> torch.Tensor:
    block, deep = (64, 256) if wrong == "shared" else (64, 64)
    out = torch.empty(x.shape[0], x.shape[1], block)
    grid = (1, 70000) if wrong == "grid" else (1,)
    options = {"maxnreg": 32} if wrong == "registers" else {}
    product_kernel[grid](x, out, x.shape[1], BLOCK=block, DEEP=deep, **options)
    assert not out.any()  # what was not run leaves zeros
    if wrong == "tuned":
        tuned_kernel[(1,)](out)
    if wrong != "idle":
        idle_kernel[(1,)](out)
    return out


def said(wrong: str) -> list[str]:
    case = Case("only", lambda generator, *, n, dtype, batch: {"x": torch.ones(batch, n, 256, dtype=dtype)})
    operation = Operation(
        "hungry", launch, lambda inputs: [(launch, (wrong, inputs["x"]))], (case,), lambda *_: Cost(0, 0)
    )
    try:
        return [fault for row in compile_operation(operation, 80, 64, 64) for fault in row.faults()]
    except InputError as error:
        return [str(error)]


module = sys.modules["mmtoken.kernels.hungry.triton"] = ModuleType("mmtoken.kernels.hungry.triton")
for name, kernel in (("product_kernel", product_kernel), ("doubled", doubled), ("idle_kernel", idle_kernel)):
    kernel.__module__ = module.__name__
    setattr(module, name, kernel)
json.dump({wrong: said(wrong) for wrong in sys.argv[1:]}, sys.stdout)
