"""Which frames of videos a tower computes in full, and which of them the others refer to, also over several calls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """What one block computed of reference frames, one or several: float[..., T, C].

    Attributes:
        keys, values: projections, all heads side by side, before any rotary embedding.
        attention, mlp: what the two branches added to the residual stream.
    """

    keys: Tensor
    values: Tensor
    attention: Tensor
    mlp: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Reference:
        """The same with every tensor changed."""
        return Reference(change(self.keys), change(self.values), change(self.attention), change(self.mlp))

    @staticmethod
    def cat(parts: Sequence[Reference]) -> Reference:
        """References float[n, T, C] one after the other."""
        columns = zip(*((p.keys, p.values, p.attention, p.mlp) for p in parts), strict=True)
        return Reference(*(torch.cat(column) for column in columns))


@dataclass
class VideoState:
    """What the next frames of a video reuse: hand the same one to `Session.continuing` with every call of a stream.

    It changes when a call of the tower has ended, as a whole, and stays as it was when the call raises. `copy` before
    encoding a frame that is not to count.

    Attributes:
        frames: how many frames the video has had.
        grid: (rows, columns) of patches of the reference frame; None without one.
        blocks: the reference frame per tower block.
    """

    frames: int = 0
    grid: tuple[int, int] | None = None
    blocks: dict[int, Reference] = field(default_factory=dict)

    def copy(self) -> VideoState:
        """Another state that starts here. The tensors are shared; nothing ever writes to them."""
        return dataclasses.replace(self, blocks=dict(self.blocks))


@dataclass
class Video:
    """A video of a call.

    Attributes:
        frames: temporal steps in this call.
        grid: (rows, columns) of patches.
        state: the state that is carried over, None if none is.
    """

    frames: int
    grid: tuple[int, int]
    state: VideoState | None


@dataclass
class Group:
    """Frames of equal size in a call.

    Attributes:
        patches: T, CLS and registers included.
        first: number in the call of the first of these frames.
        frames: int[G], numbers in the call.
        rows: int[G, T], places of their patches in a packed sequence.
        full, selective: int[...] among the frames: computed in full, and in part.
        selective_frames: numbers in the call of those computed in part.
        source: int[selective]: the reference of each, an index into the full ones and behind them into `carried`.
        carried: states whose references are used.
        last: (state, index into the full ones) of references that are carried over.
        memory: what the method remembers during the call.
    """

    patches: int
    first: int
    frames: Tensor
    rows: Tensor
    full: Tensor
    selective: Tensor
    selective_frames: list[int]
    source: Tensor
    carried: list[VideoState]
    last: list[tuple[VideoState, int]]
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class Segments:
    """What attends to itself within each frame of a packed sequence.

    Attributes:
        lengths: the sequence's cumulative lengths.
        bounds: those of one frame, from 0 to T.
        of: int[T], the segment of each patch; None where the frame is one.
    """

    lengths: Tensor
    bounds: list[int]
    of: Tensor | None


@dataclass
class ReuseRun:
    """One call of a tower on frames of videos.

    Attributes:
        videos: in the order of the call.
        groups: their frames by size.
        starts: for each frame of the call the place of its first patch in a packed sequence.
        sizes: patches of every frame of the call.
        every: per size T, int[T], all patches of a frame.
        captured: what the projections and branches of the running block put out, while that is noted.
        made: per state (by identity) the references of this call, taken over when it has ended.
        segments: per group and identity of the cumulative lengths.
    """

    videos: list[Video]
    groups: list[Group]
    starts: list[int]
    sizes: list[int]
    every: dict[int, Tensor]
    captured: dict[str, Tensor] | None = None
    made: dict[int, dict[int, Reference]] = field(default_factory=dict)
    segments: dict[tuple[int, int], Segments] = field(default_factory=dict)

    @property
    def selective(self) -> bool:
        """Whether any frame is computed in part."""
        return any(group.selective_frames for group in self.groups)

    @property
    def stores(self) -> bool:
        """Whether any reference outlives the call."""
        return any(group.last for group in self.groups)

    def commit(self) -> None:
        """Move the states of all videos behind this call."""
        for group in self.groups:
            for state, _ in group.last:
                state.blocks = self.made.get(id(state), {})
        for video in self.videos:
            if video.state is not None:
                video.state.frames += video.frames
                video.state.grid = video.grid


def plan(
    videos: list[Video],
    prefix: int,
    references: Callable[[int], bool],
    count: Callable[[int], int],
    device: torch.device,
) -> ReuseRun:
    """Which frames of a call are computed in full, and what the others refer to.

    Args:
        videos: in the order of the call.
        prefix: tokens before the patches of every frame.
        references: see `Compressor.references`.
        count: see `Compressor.refresh_count`.
        device: of the tower.
    """
    sizes = [video.grid[0] * video.grid[1] + prefix for video in videos for _ in range(video.frames)]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    first = [0, *itertools.accumulate(video.frames for video in videos)][:-1]
    grids = dict.fromkeys(video.grid for video in videos)

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    groups = []
    for grid in grids:
        patches = grid[0] * grid[1] + prefix
        everything = count(patches) >= patches
        frames: list[int] = []
        full: list[int] = []
        selective: list[int] = []
        source: list[tuple[bool, int]] = []
        carried: list[VideoState] = []
        last: list[tuple[VideoState, int]] = []
        for video, begins in zip(videos, first, strict=True):
            if video.grid != grid:
                continue
            state, reference = video.state, None
            if state is not None and state.grid == grid and state.blocks:
                reference = (True, len(carried))
                carried.append(state)
            for number in range(video.frames):
                scheduled = reference is None or references(number + (0 if state is None else state.frames))
                if scheduled:
                    reference = (False, len(full))
                if scheduled or everything:
                    full.append(len(frames))
                else:
                    assert reference is not None
                    selective.append(len(frames))
                    source.append(reference)
                frames.append(begins + number)
            if state is not None and reference is not None and not reference[0]:
                last.append((state, reference[1]))
        groups.append(
            Group(
                patches=patches,
                first=frames[0],
                frames=whole(frames),
                rows=whole([starts[number] for number in frames])[:, None] + torch.arange(patches, device=device),
                full=whole(full),
                selective=whole(selective),
                selective_frames=[frames[place] for place in selective],
                source=whole([index + len(full) * old for old, index in source]),
                carried=carried,
                last=last,
            )
        )
    return ReuseRun(
        videos, groups, starts, sizes, {size: torch.arange(size, device=device) for size in dict.fromkeys(sizes)}
    )
