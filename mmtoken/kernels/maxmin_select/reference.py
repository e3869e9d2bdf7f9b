"""The specification in plain torch: a running minimum of distances; on a CPU a few rows of them are made ahead."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.kernels.similarity_stats.reference import scan

AHEAD = 32
"""Rows of distances that are made at once."""


def maxmin_select(features: Tensor, steps: int, eligible: Tensor, counts: Tensor) -> Tensor:
    """See `mmtoken.kernels.maxmin_select.maxmin_select`; every argument is given."""
    if not features.shape[0] or not features.shape[1] or not steps:
        return features.new_full((len(features), steps), -1, dtype=torch.long)
    unit = normalize(features.float(), dim=-1).masked_fill_(~eligible[..., None], 0)
    isolation = 1 - scan(unit, None, columns=eligible).max
    # An ineligible token must lose against every other one, also against those without any neighbour.
    isolation = isolation.masked_fill(~eligible, -torch.inf)
    # A device would wait for the host in every step, and torch.compile cannot know what has been made.
    ahead = unit.device.type == "cpu" and not torch.compiler.is_compiling()
    counts = torch.minimum(counts, eligible.sum(-1))
    if ahead:
        picks = torch.full((len(unit), steps), -1)
        for row, count in enumerate(counts.clamp(max=steps).tolist()):
            picks[row, :count] = in_blocks(unit[row], isolation[row], count)
        return picks
    picks = one_by_one(unit, isolation, steps)
    return picks.masked_fill(torch.arange(steps, device=unit.device) >= counts[:, None], -1)


def one_by_one(unit: Tensor, isolation: Tensor, steps: int) -> Tensor:
    """int64[B, steps]: the picks from unit vectors float32[B, N, D]; `isolation` float32[B, N], -inf: never pick."""
    row = torch.arange(len(unit), device=unit.device)
    best = isolation.argmax(-1)
    nearest = torch.where(isolation == -torch.inf, isolation, torch.inf)
    order = [best]
    for _ in range(steps - 1):
        distance = 1 - (unit @ unit[row, best][..., None])[..., 0]
        nearest = torch.minimum(nearest, distance)
        nearest[row, best] = -torch.inf
        best = nearest.argmax(-1)
        order.append(best)
    return torch.stack(order, 1)


def in_blocks(unit: Tensor, isolation: Tensor, steps: int) -> Tensor:
    """int64[steps]: the same for one item, from unit vectors float32[N, D].

    The tokens that are farthest now are likely to be picked soon. Their distances to all others come from one matrix
    product, which takes a fifth of the time of as many matrix-vector products.
    """
    order = torch.full((steps,), -1)
    if not steps:
        return order
    best = int(isolation.argmax())
    nearest = torch.where(isolation == -torch.inf, isolation, torch.inf)
    made: dict[int, Tensor] = {}
    order[0] = best
    for step in range(1, steps):
        if best not in made:
            # Before the first step they are all alike.
            likely = nearest.topk(min(AHEAD, len(unit), 2 * step - 1)).indices.tolist()
            likely = [best, *(token for token in likely if token != best)]
            made = dict(zip(likely, 1 - unit[likely] @ unit.T, strict=True))
        torch.minimum(nearest, made[best], out=nearest)
        nearest[best] = -torch.inf
        best = int(nearest.argmax())
        order[step] = best
    return order
