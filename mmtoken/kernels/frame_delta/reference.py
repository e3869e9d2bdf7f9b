"""`frame_delta` in plain torch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 320
"""Most keys compared at a time: what is in between stays in a processor's cache, and is no copy of both frames."""
EPS = 1e-8


def frame_delta(keys: Tensor, anchor: Tensor, similarity: str) -> Tensor:
    """float32[F, T]; see `mmtoken.kernels.frame_delta.frame_delta`."""
    frames, patches = keys.shape[:2]
    # Parts of one size, so that each takes the memory that the one before has left.
    number = max(1, min(patches, math.ceil(frames * patches / ROWS)))
    parts = zip(keys.tensor_split(number, 1), anchor.tensor_split(number, 1), strict=True)
    return torch.cat([_compared(new.float(), old.float(), similarity) for new, old in parts], 1)


def _compared(new: Tensor, old: Tensor, similarity: str) -> Tensor:
    if similarity in ("cosine", "dot"):
        product: Tensor = (new * old).sum(-1)
        if similarity == "dot":
            return product
        cosine: Tensor = product / new.norm(dim=-1).clamp(min=EPS) / old.norm(dim=-1).clamp(min=EPS)
        return cosine
    difference: Tensor = new - old
    distance: Tensor = difference.abs().sum(-1) if similarity == "l1" else difference.norm(dim=-1)
    return -distance
