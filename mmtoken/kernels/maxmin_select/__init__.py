"""Greedy max-min diversity: the subset in which the closest pair is as far apart as a greedy search can make it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl, choose
from mmtoken.kernels.maxmin_select import reference

NAME = "maxmin_select"


def maxmin_select(
    features: Tensor,
    steps: int,
    *,
    eligible: Tensor | None = None,
    counts: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Pick tokens one after the other, each as far as can be from all picked before (distance: 1 - cosine).

    The first pick is the token whose nearest neighbour is farthest. Only each token's distance to the nearest pick is
    held, and a few rows of distances: memory is linear in N. Indices have no gradient.

    Args:
        features: float[B, N, D]; those of eligible tokens finite. Products are added up in float32.
        steps: K, picks of a row at most.
        eligible: bool[B, N], tokens that may be picked and that distances are measured between; None: all.
        counts: int64[B], picks of each row where it stops before `steps`; None: all go on.
        impl: see `mmtoken.kernels.dispatch`.

    Returns:
        int64[B, steps], indices in the order of picking; -1 behind a row's count, and where no eligible token is left.
        No token is picked twice; of equally far ones the lower index comes first. A zero vector has distance 1 to
        everything.

    Raises:
        InputError: shapes do not fit, or `steps` is negative.

    Source: Alvar et al., DivPrune, CVPR 2025, arXiv 2503.02175, section 3 (there with the matrix of distances).
    """
    if features.ndim != 3:
        raise InputError(f"features has shape {tuple(features.shape)}; expected [items, tokens, width].")
    if steps < 0:
        raise InputError(f"steps={steps} is negative; give the number of tokens to pick.")
    if eligible is None:
        eligible = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if eligible.shape != features.shape[:2]:
        raise InputError(f"eligible has shape {tuple(eligible.shape)}; expected {tuple(features.shape[:2])}.")
    if counts is None:
        counts = torch.full(features.shape[:1], steps, device=features.device)
    if counts.shape != features.shape[:1]:
        raise InputError(f"counts has shape {tuple(counts.shape)}; expected ({len(features)},), one for each item.")
    features = features.detach()
    if choose(NAME, features, eligible, counts, impl=impl) == "torch":
        return reference.maxmin_select(features, steps, eligible, counts)
    from mmtoken.kernels.maxmin_select import triton

    picks: Tensor = triton.maxmin_select(features, steps, eligible, counts)
    return picks
