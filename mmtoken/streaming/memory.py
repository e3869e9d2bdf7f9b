"""What a stream holds: keys before the rotary embedding and values per step, bounded, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmtoken.compressors.base import HeldFrame
from mmtoken.streaming.framing import Rows

StreamPositions = Literal["contiguous", "true", "repo"]
"""Where held rows stand for the rotary embedding.

"contiguous": one after the other, anew at every step, so that gaps of what has left close and positions stay bounded.
With M-RoPE a step keeps its box, and boxes follow each other as they did; of the time axis only the gaps close.
"true": where they stood when they came, as in one pass over the whole stream.
"repo": as VideoScan's code places them: a step starts behind as many rows as are held, and what is written stays.
"""


@dataclass(frozen=True)
class Step:
    """A step, or the text before the video, as the memory holds it.

    Attributes:
        number: 0, 1, ... in the stream; -1 for the text.
        time: seconds of its first frame.
        frames: how many frames it is made of.
        keys: per layer float[G, k, d], before the rotary embedding.
        values: per layer float[G, k, d].
        places: per layer int[k], which rows of the step are held.
        relative, extent, advance, stamp: those of its `Rows`.
        start: per axis, where it started when it came.
        lead: by how much its time was ahead of where the step before it ended.
        embedding: float[D], its last row as it entered the decoder.
    """

    number: int
    time: float
    frames: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    places: Sequence[Tensor]
    relative: Tensor
    extent: int
    advance: tuple[int, ...]
    start: tuple[int, ...]
    lead: int
    stamp: int
    embedding: Tensor

    @property
    def length(self) -> int:
        """Rows held, in the layer that holds the most."""
        return max(len(places) for places in self.places)

    @property
    def bytes(self) -> int:
        return sum(
            t.numel() * t.element_size()
            for key, value in zip(self.keys, self.values, strict=True)
            for t in (key, value)
        )

    def frame(self) -> HeldFrame:
        """What a compressor is shown of it."""
        return HeldFrame(self.number, self.time, self.length, self.embedding)

    def moved(self, device: torch.device | str) -> Step:
        """The same with keys and values on another device."""
        keys, values = ([t.to(device) for t in tensors] for tensors in (self.keys, self.values))
        return Step(**{**self.__dict__, "keys": keys, "values": values})


@dataclass(frozen=True)
class Cursor:
    """Where the next rows go.

    Attributes:
        step: per axis, where a step starts.
        text: where text starts.
        first: whether no step came yet, so that time has not begun.
    """

    step: tuple[int, ...]
    text: int
    first: bool = True

    def lead(self, ahead: int) -> tuple[int, ...]:
        """Where a step starts whose time is `ahead` of the end of the step before it."""
        return self.step if self.first else (self.step[0] + ahead, *self.step[1:])

    def behind(self, start: tuple[int, ...], extent: int, advance: tuple[int, ...]) -> Cursor:
        """After rows that started at `start`."""
        return Cursor(tuple(a + b for a, b in zip(start, advance, strict=True)), start[-1] + extent, first=False)

    def text_ends(self, length: int) -> Cursor:
        """After the text before the video."""
        return Cursor((length,) * len(self.step), length)


class Memory:
    """The steps that a stream holds.

    Args:
        axes: of the position ids.
        policy: where held rows stand.
    """

    def __init__(self, axes: int, policy: StreamPositions) -> None:
        self.axes, self.policy = axes, policy
        self.init: Step | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the steps; the text before the video stays."""
        self.held: list[Step] = []
        self.limit: int | None = None
        self.steps = 0
        self.stamp = 0
        self.cursor = Cursor((0,) * self.axes, 0).text_ends(0 if self.init is None else self.init.extent)

    # --- sizes --------------------------------------------------------------------------------------------------------

    def tokens(self) -> int:
        """Rows of steps held, in the layer that holds the most."""
        return longest(self.held)

    def bytes(self) -> int:
        return sum(step.bytes for step in self.everything())

    def everything(self) -> list[Step]:
        """The text before the video and all steps held, oldest first."""
        return [*([] if self.init is None else [self.init]), *self.held]

    # --- positions ----------------------------------------------------------------------------------------------------

    def lead(self, rows: Rows) -> int:
        """By how much the time of a step that comes now is ahead."""
        return rows.stamp - self.stamp if self.steps else 0

    def place(self, sequence: Sequence[Step], layer: int, ahead: Cursor) -> tuple[Tensor | None, Cursor]:
        """Positions of what a layer sees, and where the next rows go.

        Args:
            sequence: the text before the video first, then steps in order.
            layer: decoder layer.
            ahead: where the next rows go in one pass over the whole stream.

        Returns:
            (int[A, n], None if nothing is seen; the cursor behind it).
        """
        if not sequence:
            return None, ahead if self.policy == "true" else Cursor((0,) * self.axes, 0)
        if self.policy == "contiguous" and self.axes == 1:
            total = sum(len(step.places[layer]) for step in sequence)
            return torch.arange(total, device=sequence[0].relative.device)[None], Cursor((total,), total, first=False)
        at, cursor = [], Cursor((0,) * self.axes, 0)
        for step in sequence:
            start = step.start
            if self.policy == "contiguous" and step.number >= 0:
                start = cursor.lead(step.lead)
                cursor = cursor.behind(start, step.extent, step.advance)
            elif self.policy == "contiguous":
                cursor = cursor.text_ends(step.extent)
            at.append(step.relative[:, step.places[layer]] + _column(start, step.relative))
        if self.policy == "true":
            cursor = ahead
        elif self.policy == "repo":
            rows = longest(sequence)
            cursor = Cursor((rows,) * self.axes, rows)
        return torch.cat(at, 1), cursor

    def start(self, cursor: Cursor, rows: Rows) -> tuple[int, ...]:
        """Per axis, where a step starts that comes now, behind what `cursor` stands for."""
        return cursor.step if self.policy == "repo" else cursor.lead(self.lead(rows))

    def positions(self, rows: Rows, start: tuple[int, ...]) -> Tensor:
        """int[A, n]: of rows that start there."""
        if self.policy == "contiguous" and self.axes == 1:
            return torch.arange(len(rows), device=rows.relative.device)[None] + start[0]
        return rows.relative + _column(start, rows.relative)

    def written(self, rows: Rows) -> tuple[int, ...]:
        """Per axis, where a step that comes now stays for the policies that do not place it anew."""
        if self.policy == "repo":
            return (longest(self.everything()),) * self.axes
        return self.cursor.lead(self.lead(rows))

    # --- change -------------------------------------------------------------------------------------------------------

    def hold(self, step: Step, leave: Callable[[list[Step]], list[Step]]) -> list[Step]:
        """Add a step and let others leave.

        Args:
            step: the newest one.
            leave: takes all steps, returns those that stay.

        Returns:
            Those that left, oldest first.
        """
        stay = leave([*self.held, step])
        kept = {id(one) for one in stay}
        left = [one for one in [*self.held, step] if id(one) not in kept]
        self.cursor = self.after(step)
        self.held, self.stamp = stay, step.stamp
        self.steps += 1
        return left

    def after(self, step: Step) -> Cursor:
        """Where the next rows go behind a step that comes now, in one pass over the whole stream."""
        return self.cursor.behind(self.cursor.lead(step.lead), step.extent, step.advance)


def longest(steps: Sequence[Step]) -> int:
    """Rows of steps, in the layer that holds the most of them."""
    if not steps:
        return 0
    return max(sum(len(step.places[layer]) for step in steps) for layer in range(len(steps[0].places)))


def _column(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
