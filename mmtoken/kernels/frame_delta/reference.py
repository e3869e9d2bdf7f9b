"""`frame_delta` in plain torch: the specification."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import cosine_similarity


def frame_delta(keys: Tensor, anchor: Tensor, similarity: str) -> Tensor:
    """float32[F, T]; see `mmtoken.kernels.frame_delta.frame_delta`."""
    new, old = keys.float(), anchor.float()
    scores: Tensor
    if similarity == "cosine":
        scores = cosine_similarity(new, old, dim=-1)
    elif similarity == "dot":
        scores = vecdot(new, old)
    else:
        scores = -vector_norm(new - old, 1 if similarity == "l1" else 2, dim=-1)
    return scores
