"""What each decoder layer attends to while rows of a stream run through it, and where everything stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmtoken.streaming.framing import Rows
from mmtoken.streaming.memory import Cursor, Memory, Step
from mmtoken.streaming.passes import Passes, Seen, Tables, joined


class View:
    """What each layer attends to during a pass.

    Args:
        memory: knows where rows stand.
        passes: makes rotary tables.
        sequence: what is seen, the text before the video first; or what gives it for a layer and what enters it.
        ahead: where the next rows go in one pass over the whole stream.
        step: the rows that run, if they are a step.
        text: the rows that run, if they are a question.
    """

    def __init__(
        self,
        memory: Memory,
        passes: Passes,
        sequence: Sequence[Step] | Callable[[int, Tensor], Sequence[Step]],
        ahead: Cursor,
        *,
        step: Rows | None = None,
        text: Rows | None = None,
    ) -> None:
        self.memory, self.passes, self.sequence, self.ahead = memory, passes, sequence, ahead
        self.step, self.text = step, text
        self.text_at: dict[int, int] = {}
        """Per layer, where the question starts."""
        self._made: dict[Any, tuple[Tables | None, Tables, int]] = {}

    def __call__(self, layer: int, hidden: Tensor) -> Seen:
        now = self.sequence(layer, hidden) if callable(self.sequence) else self.sequence
        # Layers that hold the same rows share their rotary tables.
        key = tuple(id(one.places[layer]) for one in now)
        if key not in self._made:
            self._made[key] = self._tables(now, layer, hidden)
        held, tables, self.text_at[layer] = self._made[key]
        if held is None:
            return Seen(None, None, tables)
        keys = joined([one.keys[layer].to(hidden.device) for one in now])
        values = joined([one.values[layer].to(hidden.device) for one in now])
        return Seen(held.rotate(keys)[None], values[None], tables)

    def _tables(self, now: Sequence[Step], layer: int, hidden: Tensor) -> tuple[Tables | None, Tables, int]:
        positions, cursor = self.memory.place(now, layer, self.ahead)
        if self.step is not None:
            mine = self.memory.positions(self.step, self.memory.start(cursor, self.step))
        else:
            assert self.text is not None
            mine = self.text.relative + cursor.text
        held = None if positions is None else self.passes.tables(positions, hidden)
        return held, self.passes.tables(mine, hidden), cursor.text
