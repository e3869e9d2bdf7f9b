"""Records what generated tokens looked at, call by call, for methods that learn from earlier calls of an episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmtoken.compressors.base import Recording
from mmtoken.engine.prefill import Prefill
from mmtoken.engine.states import LayerStates


@dataclass
class EpisodeState:
    """Where an episode (or several in lockstep, one item each) stands between two calls; see `Session.resuming`.

    Attributes:
        calls: float32[I, N] of each call remembered, oldest first; empty when an episode begins.
    """

    calls: list[Tensor] = field(default_factory=list)


class Recorder:
    """Attention of generated tokens to the visual tokens of their prompt, of one thread.

    The first generated token comes from the prompt's last row, each later one from a decoding step. A call counts once
    it has generated as many tokens as are wanted; dropped visual tokens receive nothing. Where the prompt ends with
    action queries, what they look at on average is recorded instead, and the call counts at once.

    Attributes:
        calls: float32[I, N] of each finished call, oldest first.
    """

    def __init__(self, recording: Recording, calls: Sequence[Tensor] = ()) -> None:
        self.recording = recording
        self.calls = list(calls)
        self._steps: list[Tensor] = []
        self._wanted = recording.tokens
        self._rows = self._columns = torch.zeros(0, dtype=torch.long)
        self._valid = torch.zeros(0, 0, dtype=torch.bool)

    def begin(self, call: Prefill) -> None:
        """A new prompt: what the call before recorded becomes part of the history."""
        self.finish()
        self._wanted = 1 if call.queries else self.recording.tokens
        self._rows, self._valid = call.items.row_index, call.items.valid
        self._columns = call.items.places + call.past

    def finish(self) -> None:
        """Close the call in progress."""
        if len(self._steps) >= self._wanted:
            self.calls.append(torch.stack(self._steps[-self._wanted :]).mean(0))
            del self.calls[: -self.recording.calls]
        self._steps = []

    def reset(self) -> None:
        """Forget every call: a new episode begins."""
        self.calls, self._steps = [], []

    def note_prompt(self, number: int, call: Prefill, states: LayerStates) -> None:
        """The prompt's last row, or its action queries, in a recorded layer."""
        received = states.row_attention(call.query_rows() if call.queries else call.last_row()[:, None])
        left = torch.zeros_like(call.real).scatter(1, states.cut.index, states.cut.valid_mask())
        rows, places = call.items.row_index[:, None], call.items.places
        values = received[rows, states.past + states.cut.rank[rows, places]]
        self._add(number, values.masked_fill(~(left[rows, places] & call.items.valid), 0.0))

    def note_step(self, number: int, received: Tensor, columns: Tensor) -> None:
        """The newest token's attention float32[B, k] to the first n keys that a layer gave it, at columns int[B, n]."""
        beyond = int(max(columns.max(), self._columns.max())) + 1
        logical = received.new_zeros(len(received), beyond + 1)
        logical.scatter_(1, columns.masked_fill(columns < 0, beyond), received[:, : columns.shape[1]])
        logical[:, beyond] = 0.0
        values = logical[self._rows[:, None], self._columns]
        self._add(number, values.masked_fill(~self._valid, 0.0))

    def _add(self, number: int, values: Tensor) -> None:
        layers = self.recording.layers
        share = values / len(layers)
        if number == layers[0]:
            self._steps.append(share)
            # More steps than are wanted would only fill memory.
            del self._steps[: -max(self.recording.tokens, 1)]
        elif self._steps:
            self._steps[-1] = self._steps[-1] + share
