"""How many tokens each frame of a video gets, and the ways to give a frame that many (QuoTA, section 3)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from mmtoken.errors import InputError, MMTokenError
from mmtoken.kernels.gather_merge import gather_merge

Assigner = Literal["bilinear", "adaptive_pool", "linspace", "merge", "merge_rows_cols"]
"""How a frame comes to its number of tokens; the official code calls them v1 to v5."""

ON_GRID: tuple[Assigner, ...] = ("bilinear", "adaptive_pool", "merge_rows_cols")
"""Those that leave a grid of rows and columns; the others leave a list of tokens."""

_ROUNDING = 1e-6
"""A share of the budget that is a whole number but for rounding counts as that number."""


# ------------------------------------------------------------------------------------------------------------- sampling


def sampled_count(seconds: float, base: int = 96, alpha: float = 64) -> int:
    """T, how many frames to take of a video that lasts so long: base + int(alpha * hours).

    There is no upper end: 5400 s give 192 frames with the paper's numbers.

    Raises:
        InputError: the video's length is negative or no number.
    """
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"seconds={seconds!r} is no length of a video; give a finite number of at least 0.")
    return base + int(alpha * seconds / 3600)


def sampled_frames(total: int, count: int) -> Tensor:
    """int[count]: evenly spaced frames of a video of `total`, from the first to the last, cut to whole numbers.

    A video with fewer frames than `count` gives some of them more than once.

    Raises:
        InputError: a number is below 1.
    """
    if total < 1 or count < 1:
        raise InputError(f"total={total} frames and count={count}: both must be at least 1.")
    # numpy and torch round differently where an index is a whole number; the official code uses numpy.
    return torch.from_numpy(np.linspace(0, total - 1, count).astype(np.int64))


# --------------------------------------------------------------------------------------------------------------- budget


def frame_shares(scores: Tensor, power: float = 2.0) -> Tensor:
    """float64[T]: each frame's share of the budget, scores ** power / their sum.

    The official code squares 100 times the score; the factor cancels. If all scores are 0 every frame gets the same
    (the official code divides by zero).

    Args:
        scores: float[T], at least 0; only their ratios matter.
        power: how much stronger high scores count.

    Raises:
        InputError: there is no frame, or a score is NaN, infinite or negative.
    """
    values = scores.detach().double().cpu()
    if values.ndim != 1 or not len(values):
        raise InputError(f"scores has shape {tuple(values.shape)}; give one number per frame, at least one.")
    for number, value in enumerate(values.tolist()):
        if not math.isfinite(value) or value < 0:
            raise InputError(
                f"scores[{number}]={value!r}: a frame's score must be finite and at least 0; fix the scorer."
            )
    most = float(values.max())
    if most == 0:
        return torch.full_like(values, 1 / len(values))
    values = (values / most) ** power  # the largest is 1, so that small scores do not all underflow
    return values / math.fsum(values.tolist())


def capped_shares(shares: Tensor, most: float) -> Tensor:
    """float64[T]: no share above `most`; what is cut off goes to the others once, in their order.

    A frame below the cap gets excess * w / sum, where the sum is that of all shares right after capping. If that lifts
    it over the cap it is cut again, and what is cut off adds to the excess of the frames after it. What is left at the
    end is lost, so that the shares may add up to less than 1.

    Args:
        shares: float[T].
        most: the cap.
    """
    values = shares.double().tolist()
    capped = [min(value, most) for value in values]
    total = math.fsum(capped)
    excess = math.fsum(value - most for value in values if value > most)
    for number, value in enumerate(values):
        if value >= most or total == 0:
            continue
        grown = value + excess * value / total
        if grown > most:
            excess += grown - most
        capped[number] = min(grown, most)
    return torch.tensor(capped, dtype=torch.float64)


def frame_budgets(shares: Tensor, budget: int) -> list[int]:
    """n_t: whole tokens per frame, floor(budget * share); they add up to `budget` at most.

    A frame may get none, and is left out. If all get none, the frames with the largest shares get one each, up to the
    budget (the official code would leave nothing).

    Args:
        shares: float[T], adding up to at most 1.
        budget: N_t, at least 1.
    """
    counts = [int(budget * share + _ROUNDING) for share in shares.tolist()]
    if not any(counts):
        order = sorted(range(len(counts)), key=lambda number: (-float(shares[number]), number))
        for number in order[:budget]:
            counts[number] = 1
    return counts


def frame_grid(tokens: int) -> tuple[int, int]:
    """(h, w): the nearly square grid of at most so many tokens; h is w or w + 1."""
    side = math.isqrt(tokens)
    return (side + 1 if side * (side + 1) <= tokens else side), side


# ------------------------------------------------------------------------------------------------------------ assigners


def assign_tokens(frame: Tensor, tokens: int, assigner: Assigner = "bilinear") -> Tensor:
    """A frame at its budget: float[h, w, D] for assigners in `ON_GRID`, float[n, D] for the others.

    "bilinear" resizes to `frame_grid(tokens)` (half-pixel centres, no smoothing) and may enlarge. "adaptive_pool"
    averages into the same grid. "linspace" takes every so many-th token in reading order. "merge" merges the most
    similar pairs until at most `tokens` are left, see `merged`. "merge_rows_cols" does so along each row, then along
    each column, until the grid is reached. The last three cannot enlarge: they leave all tokens of a frame that has
    fewer.

    A budget of exactly the frame's own number of tokens leaves its grid as it is, whatever its shape.

    Args:
        frame: float[H, W, D].
        tokens: at least 1.
        assigner: one of the above.

    Raises:
        MMTokenError: the assigner is unknown.
        InputError: tokens is below 1.
    """
    if assigner not in get_args(Assigner):
        raise MMTokenError(f"assigner={assigner!r} is unknown; use one of {', '.join(get_args(Assigner))}.")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: a frame without tokens is left out; give at least 1.")
    rows, columns, width = frame.shape
    if assigner == "linspace":
        return frame.reshape(-1, width)[linspace_places(rows * columns, tokens).to(frame.device)]
    if assigner == "merge":
        return merged(frame.reshape(1, -1, width), tokens)[0]
    height, breadth = (rows, columns) if tokens == rows * columns else frame_grid(tokens)
    if assigner == "merge_rows_cols":
        narrow = merged(frame, breadth)
        return merged(narrow.transpose(0, 1), height).transpose(0, 1)
    channels = frame.permute(2, 0, 1)[None]
    if assigner == "bilinear":
        resized = interpolate(channels, size=(height, breadth), mode="bilinear")
    else:
        resized = adaptive_avg_pool2d(channels, (height, breadth))
    return resized[0].permute(1, 2, 0)


def linspace_places(total: int, tokens: int) -> Tensor:
    """int[min(tokens, total)]: evenly spaced places, from the first to the last, in float32 cut to whole numbers."""
    return torch.linspace(0, total - 1, min(tokens, total)).long()


def merged(features: Tensor, tokens: int) -> Tensor:
    """float[B, min(N, tokens), D]: each row after rounds of merging its most similar pairs.

    In a round the tokens at even places look for the most similar (cosine) one at odd places, and the best-matched of
    the former, at most half of all tokens, are averaged into theirs. Every token counts as one in every round, so that
    one which is an average already weighs no more. A round puts what was not merged first, by falling similarity, and
    the tokens of odd places after it: reading order is lost.

    Args:
        features: float[B, N, D].
        tokens: at least 1.
    """
    while features.shape[1] > tokens:
        count = features.shape[1]
        merging = min(count // 2, count - tokens)
        scored = normalize(features.detach().float(), dim=-1, eps=torch.finfo(torch.float32).tiny)
        best, partner = (scored[:, ::2] @ scored[:, 1::2].transpose(1, 2)).max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        gone, left = order[:, :merging], order[:, merging:]
        target = left.shape[1] + partner.gather(1, gone)
        places = torch.arange(1, count, 2, device=left.device).expand(len(left), -1)
        index = torch.cat([left * 2, places], 1)
        members = torch.ones(index.shape, device=left.device)
        members = members.scatter_add(1, target, torch.ones_like(target, dtype=torch.float32))
        features = gather_merge(features, index, target, 1 / members.gather(1, target), gone * 2, 1 / members)
    return features
