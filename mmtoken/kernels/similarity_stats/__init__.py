"""Cosine similarities in tiles: per row the largest one, where it is, and how many are above a threshold."""

from __future__ import annotations

from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl, choose
from mmtoken.kernels.similarity_stats import reference
from mmtoken.kernels.similarity_stats.reference import SimilarityStats as SimilarityStats

NAME = "similarity_stats"


def similarity_stats(
    features: Tensor,
    other: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    threshold: float = 1.0,
    impl: Impl = "auto",
) -> SimilarityStats:
    """Compare each token with the others, without the matrix of similarities: memory is linear in N and M.

    The two sides of a bipartite matching (ToMe) are two tensors, which may be views (`keys[:, ::2]`, `keys[:, 1::2]`);
    any other split of one set of tokens is a mask of rows and one of columns.

    Args:
        features: float[B, N, D], of which the rows are; finite. Products are added up in float32.
        other: float[B, M, D], of which the columns are; None: `features` again, no token being compared with itself.
        rows: bool[B, N], those that are asked for; None: all. The others have max -inf, argmax -1 and above 0, as
            have rows without any column.
        columns: bool[B, M], those that are compared with; None: all.
        threshold: similarities above it are counted. Of 1, the default, none is: what is above is rounding.
        impl: see `mmtoken.kernels.dispatch`.

    Returns:
        `SimilarityStats`. Of equal similarities the lower index wins. A zero vector has similarity 0 to everything.
        Gradients flow through the maximum, into the row's token and into the one at its argmax.

    Raises:
        InputError: shapes do not fit.
    """
    if features.ndim != 3:
        raise InputError(f"features has shape {tuple(features.shape)}; expected [items, tokens, width].")
    batch, length, width = features.shape
    if other is not None and (other.ndim != 3 or other.shape[0] != batch or other.shape[2] != width):
        raise InputError(f"other has shape {tuple(other.shape)}; expected [{batch}, tokens, {width}] as features has.")
    against = length if other is None else other.shape[1]
    for name, mask, count in (("rows", rows, length), ("columns", columns, against)):
        if mask is not None and mask.shape != (batch, count):
            raise InputError(f"{name} has shape {tuple(mask.shape)}; expected [{batch}, {count}].")
    if choose(NAME, features, other, rows, columns, impl=impl) == "torch":
        return reference.similarity_stats(features, other, rows=rows, columns=columns, threshold=threshold)
    from mmtoken.kernels.similarity_stats import triton

    return SimilarityStats(*triton.similarity_stats(features, other, rows, columns, float(threshold)))
