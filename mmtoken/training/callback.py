"""A compressor during training with Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained
from mmtoken.engine.session import Session, attach
from mmtoken.errors import UnsupportedError


class CompressionCallback(TrainerCallback):
    """Attaches a compressor when training begins and takes it away when training ends.

    Evaluation in the course of training sees the compressed model; before and after, use `mmtoken.compress`. A
    checkpoint is the plain model. After an exception in the training loop call `detach()`.

    Learned parts are trained if the optimizer holds them, which Trainer's own does not:
    `Trainer(..., optimizers=(torch.optim.AdamW([*model.parameters(), *trained.parameters()]), None))`. Trainer clips
    and saves what belongs to the model only; save learned parts with `mmtoken.save` while they are attached.

    Args:
        compressor: whatever `mmtoken.attach` takes.

    Attributes:
        session: the session, None before training; its reports stay readable afterwards.
    """

    def __init__(self, compressor: Compressor | Trained | str | dict[str, Any]) -> None:
        self.compressor = resolve(compressor)
        self.session: Session | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to Trainer's model.

        Raises:
            UnsupportedError: the backbone cannot host the compressor, or its learned parts would not be trained.
        """
        model: nn.Module = kwargs["model"]
        if isinstance(self.compressor, Trained):
            _check_learned(self.compressor, kwargs["optimizer"], args.world_size)
        self.session = attach(model, self.compressor)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the compressor away."""
        self.detach()

    def detach(self) -> None:
        """Take the compressor away; safe to repeat."""
        if self.session is not None:
            self.session.detach()


def _check_learned(trained: Trained, optimizer: Any, processes: int) -> None:
    learned = [p for p in trained.parameters() if p.requires_grad]
    name = type(trained.compressor).__name__
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for p in learned):
        raise UnsupportedError(
            f"the optimizer does not hold the learned parts of {name}, so they would stay as they are; give Trainer "
            "optimizers=(torch.optim.AdamW([*model.parameters(), *trained.parameters()]), None), or freeze them."
        )
    if learned and processes > 1:
        raise UnsupportedError(
            f"{processes} processes: Trainer averages gradients of the model only, so the learned parts of {name} "
            "would differ between them; train in one process, or with Lightning."
        )
