"""Steps that have left the memory of a stream, in bounded main memory, for methods that bring some back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtoken.streaming.memory import Step


@dataclass(frozen=True)
class Block:
    """A step that may come back.

    Attributes:
        step: keys and values lie in main memory if it is stored, on the model's device if it is held.
        means: float[L, G, d], mean key per layer before the rotary embedding, on the model's device.
    """

    step: Step
    means: Tensor


def block(step: Step) -> Block:
    """A step with the means of its keys."""
    return Block(step, torch.stack([keys.float().mean(1) for keys in step.keys]))


class Store:
    """Steps that have left, oldest first; above the limit the oldest goes for good.

    Args:
        limit: most rows, in the layer that holds the most of them.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.blocks: deque[Block] = deque()
        self.tokens = 0
        self.bytes = 0

    def add(self, step: Step) -> None:
        """Put a step in."""
        made = Block(step.moved("cpu"), block(step).means)
        self.blocks.append(made)
        self.tokens += step.length
        self.bytes += step.bytes
        while self.tokens > self.limit:
            gone = self.blocks.popleft().step
            self.tokens -= gone.length
            self.bytes -= gone.bytes
