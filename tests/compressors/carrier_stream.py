"""The plainest stream of VideoScan: a Hugging Face decoder fed frame by frame, with its own cache cut after each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from mmtoken.compressors import Context, VideoScan
from mmtoken.compressors.base import HeldFrame, StreamFrame
from mmtoken.engine.compat import CACHE
from mmtoken.tokens import VisualTokens

Policy = Literal["contiguous", "true", "repo"]


def bank_positions(policy: Policy, system: int, written: Tensor, seen: int) -> tuple[Tensor, int]:
    """Rotary positions of the rows that a bank holds, and of the first token that is fed next.

    Args:
        policy: "contiguous": held rows count from the system prompt on, whatever left between them, and their keys are
            rotated anew; "true": every token keeps its place among all tokens ever fed; "repo": as the official code
            has it: what comes next counts from the number of held rows, and what was written keeps its angle, so that
            a carrier stands a whole frame ahead of where the next frame begins.
        system: tokens before the video.
        written: int[R], the position that each held row (system prompt left out) had when it was fed.
        seen: tokens fed so far, system prompt included.
    """
    following = system + len(written)
    if policy == "contiguous":
        return torch.arange(system, following, device=written.device), following
    if policy == "true":
        return written, seen
    if policy == "repo":
        return written, following
    raise ValueError(policy)


class StepContext(Context):
    """A context inside a stream."""

    streaming = True

    def __init__(self, tokens: VisualTokens | None = None) -> None:
        self.memory: dict[str, Any] = {}
        self.encoded_counts = [] if tokens is None else tokens.counts()


@dataclass
class Step:
    """What happened in one step: embeddings fed, their positions, and the index of the frame that left (-1: none)."""

    fed: Tensor
    positions: Tensor
    dropped: int


@dataclass
class CarrierStream:
    """Frames through a decoder with eager attention; keys stay as they were rotated when they were fed.

    Attributes:
        decoder: a text model (`Qwen2Model`), eager attention.
        method: what is held, and what leaves.
        system: float[s, D], embeddings of the text before the video.
        policy: "repo" or "true", see `bank_positions`.
    """

    decoder: Any
    method: VideoScan
    system: Tensor
    policy: Policy = "repo"
    cache: DynamicCache = field(default_factory=DynamicCache)
    held: list[HeldFrame] = field(default_factory=list)
    written: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    seen: int = 0

    def push(self, tokens: VisualTokens, query: Tensor | None = None, *, evict: bool = True) -> Step:
        """Feed a frame, and a query float[q, D] behind it that nothing is held of; `evict` False: nothing leaves."""
        frame = self.method.llm_input(tokens, StepContext(tokens)).features[0]
        block = torch.cat([self.system, frame]) if not self.seen else frame
        fed = block if query is None else torch.cat([block, query])
        _, first = bank_positions(self.policy, len(self.system), self.written, self.seen)
        first = first if self.seen else 0
        positions = torch.arange(first, first + len(fed))
        past = self.cache.get_seq_length()
        output = self.decoder(
            inputs_embeds=fed[None], position_ids=positions[None], **{CACHE: self.cache}, output_attentions=True
        )
        here = slice(past + len(block) - len(frame), past + len(block))

        def attention(layer: int, row: int) -> Tensor:
            rows = output.attentions[layer][0][:, len(block) - len(frame) : len(block), here]
            return rows.float().mean(0)[row]

        layers = self.cache.layers
        step = StreamFrame(
            number=len(self.held),
            time=0.0,
            embeddings=frame,
            keys=[layer.keys[0, :, here] for layer in layers],
            values=[layer.values[0, :, here] for layer in layers],
            attention=attention,
        )
        kept = self.method.retain(step, StepContext())
        rows = [kept] * len(layers) if isinstance(kept, Tensor) else list(kept)
        for layer, some in zip(layers, rows, strict=True):
            index = torch.cat([torch.arange(here.start), here.start + some])
            layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
        self.written = torch.cat([self.written, positions[len(block) - len(frame) :][rows[0]]])
        self.seen += len(block)
        self.held.append(HeldFrame(number=self.seen, time=0.0, rows=len(rows[0]), embedding=frame[-1]))
        left = self.method.evict(self.held, False, StepContext()) if evict and len(self.held) > 1 else None
        if left is not None:
            self._drop(left)
        return Step(fed, positions, -1 if left is None else left)

    def _drop(self, number: int) -> None:
        rows = [frame.rows for frame in self.held]
        first = sum(rows[:number])
        keep = torch.tensor([i for i in range(sum(rows)) if not first <= i < first + rows[number]], dtype=torch.long)
        columns = torch.cat([torch.arange(len(self.system)), len(self.system) + keep])
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, columns], layer.values[:, :, columns]
        self.written = self.written[keep]
        del self.held[number]

    def ask(self, text: Tensor) -> Tensor:
        """float[q, D], the hidden states of a text float[q, D] behind what is held; the stream stays as it was."""
        copy = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            copy.update(layer.keys, layer.values, number)
        _, first = bank_positions(self.policy, len(self.system), self.written, self.seen)
        positions = torch.arange(first, first + len(text))
        states: Tensor = self.decoder(
            inputs_embeds=text[None], position_ids=positions[None], **{CACHE: copy}
        ).last_hidden_state[0]
        return states
