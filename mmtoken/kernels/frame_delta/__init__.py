"""How much the patches of a frame differ from those of a reference frame at the same place."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl, choose
from mmtoken.kernels.frame_delta import reference

Similarity = Literal["cosine", "dot", "l1", "l2"]


def frame_delta(keys: Tensor, anchor: Tensor, similarity: Similarity = "cosine", *, impl: Impl = "auto") -> Tensor:
    """float32[F, T]: how similar each key is to the one at the same place of the reference frame.

    The score that STC-Cacher (arXiv 2512.00891) chooses patches by: the lower, the more a patch has changed, whichever
    measure is taken. Computed in float32; no gradient reaches the inputs, since the score chooses and nothing else.

    Args:
        keys: float[F, T, C].
        anchor: float[F, T, C], keys of the reference frame; it may be expanded along the frames.
        similarity: "cosine" (norms of at least 1e-8), "dot", or the negative distance "l1" or "l2".
        impl: see `mmtoken.kernels.dispatch`.

    Raises:
        InputError: shapes do not fit, or the measure is unknown.
    """
    if keys.ndim != 3 or keys.shape != anchor.shape:
        raise InputError(
            f"keys and anchor have shapes {list(keys.shape)} and {list(anchor.shape)}; expected both "
            "[frames, patches, width]."
        )
    if similarity not in get_args(Similarity):
        raise InputError(f"similarity={similarity!r} is unknown; use 'cosine', 'dot', 'l1' or 'l2'.")
    keys, anchor = keys.detach(), anchor.detach()
    if choose("frame_delta", keys, anchor, impl=impl) == "torch":
        return reference.frame_delta(keys, anchor, similarity)
    from mmtoken.kernels.frame_delta import triton

    scores: Tensor = triton.frame_delta(keys, anchor, similarity)
    return scores
