"""What a stream refuses: frames, times, compressors, and answers of compressors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtoken.compressors.base import Compressor
from mmtoken.errors import InputError, MMTokenError, UnsupportedError

_REFUSED = {
    "frames": "it leaves whole frames out of a video that it sees as a whole, and a stream hands it one step at a time",
    "llm_layer": "it cuts between decoder layers of a prompt that ends with the question, and steps come without one",
    "cache": "it thins the cache of a prompt out once, and a stream holds and drops rows with every step; use the "
    "sites retain and evict",
}


def check_frame(frame: Any, before: tuple[int, ...] | None) -> Tensor:
    """uint8[H, W, 3]: a copy of a frame, for cameras hand the same buffer out again.

    Args:
        frame: a NumPy array or a tensor.
        before: shape of the frames before, None for the first one.

    Raises:
        InputError: it is no such frame.
    """
    if not isinstance(frame, np.ndarray | Tensor):
        raise InputError(
            f"frame is a {type(frame).__name__}; give uint8[H, W, 3] as a NumPy array or a tensor (of a PIL image: "
            "numpy.asarray(image.convert('RGB')))."
        )
    if frame.dtype not in (np.uint8, torch.uint8):
        raise InputError(f"frame has dtype {frame.dtype}; give uint8, brightness from 0 to 255.")
    shape = tuple(frame.shape)
    if len(shape) != 3 or shape[2] != 3:
        raise InputError(f"frame has shape {shape}; give (height, width, 3), red, green, blue last.")
    if not shape[0] or not shape[1]:
        raise InputError(f"frame has shape {shape}, so it has no pixels; give at least one row and one column.")
    if before is not None and shape != before:
        raise InputError(
            f"frame has shape {shape}, but the frames before have {before}; resize it, or begin another stream with "
            "reset()."
        )
    return torch.tensor(frame) if isinstance(frame, np.ndarray) else frame.detach().cpu().clone()


def check_time(t: Any, before: float | None) -> float:
    """Seconds of a frame.

    Args:
        t: as handed in.
        before: seconds of the frame before, None for the first one.

    Raises:
        InputError: it is no number, not finite, or not later.
    """
    if isinstance(t, bool) or not isinstance(t, int | float | np.floating | np.integer):
        raise InputError(f"t={t!r} is a {type(t).__name__}; give the frame's time in seconds as a number.")
    if not math.isfinite(t):
        raise InputError(f"t={t!r} is not finite; give the frame's time in seconds.")
    if before is not None and t <= before:
        raise InputError(
            f"t={t!r} is not later than the frame before (t={before!r}); times must rise, or begin another stream with "
            "reset()."
        )
    return float(t)


def check_streams(method: Compressor) -> None:
    """Do nothing if a compressor can work in a stream.

    Raises:
        UnsupportedError: it cannot; the message says why.
    """
    for part in _leaves(method):
        name = type(part).__name__
        if not part.causal:
            raise UnsupportedError(
                f"{name} looks at later frames (causal=False), and in a stream they have not come yet."
            )
        if not part.query_agnostic and part.sites != {"retrieve"}:
            raise UnsupportedError(
                f"{name} reads the question (query_agnostic=False), and in a stream frames come before any question."
            )
        for site in sorted(part.sites & set(_REFUSED)):
            raise UnsupportedError(f"{name} acts at {site}: {_REFUSED[site]}.")
    if method.calibrates():
        raise UnsupportedError(f"{type(method).__name__} weighs merged tokens (calibrate=True), which streams do not.")


def _leaves(method: Compressor) -> list[Compressor]:
    parts = getattr(method, "chain", None)
    return [method] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


def check_ascending(chosen: Any, count: int, name: str, *, least: int) -> Tensor:
    """int[K]: a choice among `count` things.

    Raises:
        MMTokenError: it is no such tensor, not ascending, out of range, or shorter than `least`.
    """
    if not isinstance(chosen, Tensor) or chosen.ndim != 1 or chosen.dtype not in (torch.int64, torch.int32):
        found = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else repr(chosen)
        raise MMTokenError(f"{name} returned {found}; give int[K].")
    if len(chosen) < least:
        raise MMTokenError(f"{name} chose nothing; at least {least} must stay.")
    if len(chosen) and (int(chosen[0]) < 0 or int(chosen[-1]) >= count or bool((chosen.diff() <= 0).any())):
        raise MMTokenError(f"{name} returned {chosen.tolist()}; give ascending places below {count}.")
    return chosen.long()
