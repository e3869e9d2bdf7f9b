"""The specification in plain torch: a running minimum of distances; on a CPU a few rows of them are made ahead."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmtoken.kernels.similarity_stats.reference import products, scan

AHEAD = 32
"""Rows of distances that are made at once."""
WHOLE = 1024
"""Of at most so many tokens all distances are made at once: 4 MiB, whatever N is."""


def maxmin_select(features: Tensor, steps: int, eligible: Tensor, counts: Tensor) -> Tensor:
    """See `mmtoken.kernels.maxmin_select.maxmin_select`; every argument is given."""
    if not features.shape[0] or not features.shape[1] or not steps:
        return features.new_full((len(features), steps), -1, dtype=torch.long)
    unit = normalize(features.float(), dim=-1).masked_fill_(~eligible[..., None], 0)
    counts = torch.minimum(counts, eligible.sum(-1)).clamp(max=steps)
    # A device would wait for the host in every step, and torch.compile cannot know what has been made.
    if unit.device.type != "cpu" or torch.compiler.is_compiling():
        picks = one_by_one(unit, eligible, steps)
        return picks.masked_fill(torch.arange(steps, device=unit.device) >= counts[:, None], -1)
    picks = torch.full((len(unit), steps), -1)
    for row, count in enumerate(counts.tolist()):
        if count:
            picks[row, :count] = in_blocks(unit[row], eligible[row], count)
    return picks


def one_by_one(unit: Tensor, eligible: Tensor, steps: int) -> Tensor:
    """int64[B, steps]: the picks from unit vectors float32[B, N, D] and bool[B, N]; no number where none is left."""
    row = torch.arange(len(unit), device=unit.device)
    # An ineligible token must lose against every other one, also against those without any neighbour.
    isolation = 1 - scan(unit, None, columns=eligible).max
    best = isolation.masked_fill(~eligible, -torch.inf).argmax(-1)
    nearest = torch.full_like(isolation, torch.inf).masked_fill(~eligible, -torch.inf)
    order = [best]
    for _ in range(steps - 1):
        distance = 1 - (unit @ unit[row, best][..., None])[..., 0]
        nearest = torch.minimum(nearest, distance)
        nearest[row, best] = -torch.inf
        best = nearest.argmax(-1)
        order.append(best)
    return torch.stack(order, 1)


def in_blocks(unit: Tensor, eligible: Tensor, steps: int) -> Tensor:
    """int64[steps]: the same for one item, from unit vectors float32[N, D], of which as many are eligible.

    The tokens that are farthest now are likely to be picked soon. Their distances to all others come from one matrix
    product, which takes a fifth of the time of as many matrix-vector products.
    """
    made, place = unit[:0], dict[int, int]()
    if len(unit) <= WHOLE:
        made, place = _all_distances(unit), {token: token for token in range(len(unit))}
        isolation = made.clone().fill_diagonal_(torch.inf).masked_fill_(~eligible, torch.inf).amin(-1)
    else:
        isolation = 1 - scan(unit[None], None, columns=eligible[None]).max[0]
    nearest = torch.full_like(isolation, torch.inf).masked_fill_(~eligible, -torch.inf)
    best = int(isolation.masked_fill(~eligible, -torch.inf).argmax())
    order = [best]
    for step in range(1, steps):
        if best not in place:
            # After a few picks only: before the first one all are equally far.
            likely = nearest.topk(min(AHEAD, 2 * step - 1, len(unit))).indices.tolist()
            likely = [best, *(token for token in likely if token != best)]
            made, place = 1 - unit[likely] @ unit.T, {token: number for number, token in enumerate(likely)}
        torch.minimum(nearest, made[place[best]], out=nearest)
        nearest[best] = -torch.inf
        best = int(nearest.argmax())
        order.append(best)
    return torch.tensor(order)


def _all_distances(unit: Tensor) -> Tensor:
    """float32[N, N] from unit vectors float32[N, D]."""
    made = unit.new_empty(len(unit), len(unit))
    for tile, mine, others in products(unit[None]):
        torch.sub(1, tile[0], out=made[mine, others])
        if mine != others:
            torch.sub(1, tile[0].T, out=made[others, mine])
    return made
