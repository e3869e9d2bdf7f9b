"""Which implementation of an operation runs: plain torch or Triton."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from mmtoken.errors import InputError, UnsupportedError

Impl = Literal["auto", "torch", "triton"]
"""auto: Triton where every tensor is on a CUDA device and the package is there, else torch."""

_TRITON = importlib.util.find_spec("triton") is not None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.forced: Impl = "auto"
        self.ran: Counter[tuple[str, str]] = Counter()


_thread = _Thread()


def _known(impl: str) -> None:
    if impl not in get_args(Impl):
        raise InputError(f"impl={impl!r} is no implementation; use one of {', '.join(map(repr, get_args(Impl)))}.")


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Every operation of this thread that is called with `impl="auto"` uses `impl` inside the with statement."""
    _known(impl)
    before, _thread.forced = _thread.forced, impl
    try:
        yield
    finally:
        _thread.forced = before


def default_impl(cuda: bool) -> str:
    """What `impl="auto"` means for tensors on a CUDA device, or elsewhere."""
    return "triton" if cuda and _TRITON else "torch"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _decide(impl: str, cuda: bool) -> str:
    """What runs, as far as the thread, the environment and the package decide; torch.compile fixes it when tracing."""
    _known(impl)
    if impl == "auto":
        impl = _thread.forced
    if impl == "auto":
        return default_impl(cuda)
    if impl == "torch":
        return impl
    if not _TRITON:
        raise UnsupportedError("impl='triton', but the package triton is not installed; use impl='torch' or 'auto'.")
    if not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedError(
            "impl='triton' was asked for tensors that are not on a CUDA device; move them there, use impl='torch' or "
            "'auto', or set TRITON_INTERPRET=1 before starting Python to interpret kernels on the CPU (slow)."
        )
    return impl


def choose(operation: str, *tensors: Tensor | None, impl: Impl = "auto") -> str:
    """Decide which implementation of an operation runs, and count it.

    Args:
        operation: its name, "attention_rows".
        tensors: every tensor that it reads; None where an optional one is missing.
        impl: what the caller asked for; "auto" is decided by `using`, else by device and package.

    Returns:
        "torch" or "triton". Nothing is counted while torch.compile traces.

    Raises:
        InputError: `impl` is none of the known ones.
        UnsupportedError: Triton was asked for and cannot run here.
    """
    decided: str = _decide(impl, all(tensor.is_cuda for tensor in tensors if tensor is not None))
    if not torch.compiler.is_compiling():
        _thread.ran[operation, decided] += 1
    return decided


def can_run(impl: Impl, device: torch.device) -> bool:
    """Whether `impl` would run for tensors on `device`."""
    try:
        _decide(impl, device.type == "cuda")
    except UnsupportedError:
        return False
    return True


def ran() -> Counter[tuple[str, str]]:
    """How often each (operation, implementation) ran in this thread so far; a copy."""
    return Counter(_thread.ran)


def ran_since(before: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """Operation to implementation, of what ran in this thread after `before = ran()`; both as "torch+triton"."""
    found: dict[str, str] = {}
    for operation, impl in sorted(ran() - Counter(before)):
        found[operation] = f"{found[operation]}+{impl}" if operation in found else impl
    return found
