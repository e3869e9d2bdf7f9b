"""Notes the class token of a tower after every block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mmtoken.backbones.registry import adapt
from mmtoken.errors import UnsupportedError


@contextmanager
def class_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list that each call of the tower in this thread appends to: float[tiles, D], CLS after every block.

    Raises:
        UnsupportedError: the model has no tower, or that has no CLS.
    """
    tower = adapt(model).tower()
    if tower is None or not tower.prefix:
        raise UnsupportedError(f"{type(model).__name__} has no tower with a class token.")
    owner, noted = threading.get_ident(), list[Tensor]()

    def note(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == owner:
            hidden: Tensor = output if isinstance(output, Tensor) else output[0]
            noted.append(hidden[:, 0].detach())

    with ExitStack() as undo:
        for block in tower.blocks:
            undo.callback(block.register_forward_hook(note).remove)
        yield noted
