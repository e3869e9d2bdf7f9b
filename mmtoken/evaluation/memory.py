"""Peak memory of a run, on devices with and without an allocator that keeps count."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LivePeak(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active and still alive.

    Scratch buffers inside a single operator are not seen; views count once. Weights and inputs existed before, so they
    are not counted: `peak` is what a run needs on top of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor) and _storage(value) not in given:
                self._follow(value)
        return result

    def _follow(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(value: Tensor) -> int:
    address: int = value.untyped_storage()._cdata
    return address


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once during `run()`, beyond what was there before (CUDA: of the allocator)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = LivePeak()
    with counter:
        run()
    return counter.peak
