"""DyCoke, stage 1: of three frames in four, keep only what changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmtoken.compressors.base import Budget, Compressor, Context, Parity, Positions
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, kept_count, refuse_nan


@dataclass(frozen=True)
class DyCoke(Compressor):
    """Temporal reduction of videos before the language model (stage 1; the decoding stage is not part of this).

    Frames go in groups of four. The first of a group stays whole. The second and the third are compared with it, and
    the fourth with the third, token by token at the same place; of each of these frames the tokens with the lowest
    cosine similarity stay. Nothing is averaged, in spite of the paper's name for it (temporal merging).

    `keep` is what a reduced frame keeps (the paper's merging ratio p is 1 - keep), so a video keeps
    (1 + 3 * keep) / 4 of its tokens where its frames come in fours: 0.475 by default. Images have one frame and pass
    unchanged, whatever `keep` is. References are earlier frames, so streams work, too: one frame is remembered.

    Differs from the official code, which loses the last of an odd number of frames, leaves the third frame of the last
    group whole and fails below five frames: variant="repo" does so too, and truncates counts, int(keep * N).

    Attributes:
        variant: "repo" for the frames and counts of the official code.
    """

    keep: int | float = 0.3
    positions: Positions = "keep"
    variant: Literal["paper", "repo"] = "paper"

    title: ClassVar[str] = "DyCoke"
    paper: ClassVar[str] = (
        "Tao et al., DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models, CVPR 2025, "
        "arXiv 2411.15024"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    budget: ClassVar[Budget] = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("paper", "repo"):
            raise MMTokenError(f"variant={self.variant!r} is unknown; use 'paper' or 'repo'.")

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        if ctx.streaming and self.variant == "repo":
            raise UnsupportedError(
                "variant='repo' treats the last frames of a video differently, and a stream has none; use 'paper'."
            )
        features = tokens.features.detach().float()
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        mask = tokens.valid.clone()
        # A new dictionary each time, and groups that never change: whoever keeps a copy of `memory` can go back.
        groups: dict[int, Group] = dict(ctx.memory.get("groups", {}))
        for row, (total, grid) in enumerate(zip(tokens.counts(), tokens.grid, strict=True)):
            if grid is None or (grid[0] == 1 and not ctx.streaming):
                continue
            if math.prod(grid) != total:
                raise InputError(
                    f"grid={grid} of item {row} has {math.prod(grid)} tokens but {total} came; DyCoke compares whole "
                    "frames: use it before methods that drop tokens."
                )
            places = tokens.eligible[row].nonzero()[:, 0]
            frames = features[row, places].view(grid[0], -1, features.shape[-1])
            if self.variant == "repo":
                index = changed_tokens(frames, self.keep, "repo")
            else:
                index, groups[row] = next_tokens(frames, self.keep, groups.get(row, Group()))
            mask[row, places] = False
            mask[row, places[index]] = True
        ctx.memory["groups"] = groups
        return tokens.where(mask)


@dataclass(frozen=True)
class Group:
    """The group of four frames in progress.

    Attributes:
        seen: frames of it that have been.
        reference: float[P, D], the frame that the next one is compared with; None where a group starts.
    """

    seen: int = 0
    reference: Tensor | None = None


def next_tokens(frames: Tensor, keep: int | float, group: Group) -> tuple[Tensor, Group]:
    """What stays of frames float[F, P, D] that follow those of `group`, as of `changed_tokens`, and the group after.

    Raises:
        InputError: the frames of a group differ in size.
    """
    if group.reference is not None and group.reference.shape != frames.shape[1:]:
        raise InputError(
            f"a frame has {frames.shape[1]} tokens of width {frames.shape[2]}, the one before it "
            f"{group.reference.shape[0]} of {group.reference.shape[1]}; give all frames of a stream the same size."
        )
    kept, places = [], frames.shape[1]
    for number, frame in enumerate(frames):
        kept.append(number * places + most_changed(frame, group.reference, kept_count(keep, places)))
        seen = (group.seen + 1) % 4
        # The second and third frame of a group are compared with its first, the fourth with the third.
        reference = None if seen == 0 else group.reference if seen == 2 else frame
        group = Group(seen, reference)
    # A copy: a view would keep the whole video in memory.
    return torch.cat(kept), Group(group.seen, None if group.reference is None else group.reference.clone())


def most_changed(frame: Tensor, reference: Tensor | None, count: int) -> Tensor:
    """int[K]: tokens of a frame float[P, D] by rising similarity to those of its reference; all without one."""
    if reference is None:
        return torch.arange(len(frame), device=frame.device)
    return cosine_similarity(frame.float(), reference.float(), dim=-1).argsort(stable=True)[:count]


def references(frames: int, variant: Literal["paper", "repo"] = "paper") -> list[int | None]:
    """For each frame that is not lost, the frame that it is compared with; None for those that stay whole.

    Raises:
        InputError: fewer frames than the official code can handle under variant="repo".
    """
    if variant == "paper":
        return [None if f % 4 == 0 else f - 2 if f % 4 == 2 else f - 1 for f in range(frames)]
    if frames < 5:
        raise InputError(f"frames={frames} is too few for variant='repo', which needs 5; use variant='paper'.")
    compared: list[int | None] = [f - 1 if f % 2 else None for f in range(frames - frames % 2)]
    for first in range(0, frames - 4, 4):
        compared[first + 2] = first
    return compared


def changed_tokens(frames: Tensor, keep: int | float, variant: Literal["paper", "repo"] = "paper") -> Tensor:
    """int[K]: indices (frame * P + place) of what stays, frame by frame; in a reduced frame by rising similarity.

    Args:
        frames: float[F, P, D], the tokens of a video.
        keep: share or number of tokens that a reduced frame keeps.
        variant: "repo" for the frames and counts of the official code.

    Raises:
        InputError: see `references`.
    """
    places = frames.shape[1]
    truncated = isinstance(keep, float) and variant == "repo"
    count = int(keep * places) if truncated else kept_count(keep, places)
    kept = []
    for number, reference in enumerate(references(len(frames), variant)):
        index = most_changed(frames[number], None if reference is None else frames[reference], count)
        kept.append(number * places + index)
    return torch.cat(kept)
