"""What the objectives of the tiny zoo models share: the schedule, clipping and the clock."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from mmtoken.errors import CheckpointError


def cosine(step: int, done: float, warmup_steps: int) -> float:
    """Factor on the peak rate: linear warm-up by steps, times a cosine from 1 to .02 over `done` in 0..1."""
    falling = 0.5 * (1 + math.cos(math.pi * done))
    return min(1.0, (step + 1) / max(1, warmup_steps)) * (0.02 + 0.98 * falling)


class Objective(L.LightningModule):
    """A Lightning module with AdamW, linear warm-up, a cosine down to 2 % of the peak, and CPU time in its checkpoints.

    Args:
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: of matrices; vectors have none.
        beta2: second AdamW coefficient.
    """

    def __init__(self, learning_rate: float, warmup_steps: int, weight_decay: float, beta2: float) -> None:
        super().__init__()
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.weight_decay, self.beta2 = weight_decay, beta2
        self.cpu_seconds = 0.0
        self._clock: float | None = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, self.beta2), fused=True)
        total = int(self.trainer.estimated_stepping_batches)

        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine(step, min(1.0, step / total), self.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for fused optimizers under mixed precision, because of gradient scaling; bfloat16
        # needs none.
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    # CPU time is carried through checkpoints, so that a resumed run reports what it cost in all.

    def cpu_minutes(self) -> float:
        """CPU minutes of this process and of those it goes on from."""
        now = time.process_time()
        if self._clock is not None:
            self.cpu_seconds += now - self._clock
        self._clock = now
        return self.cpu_seconds / 60

    def on_fit_start(self) -> None:
        self._clock = time.process_time()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.cpu_minutes()
        checkpoint["cpu_seconds"] = self.cpu_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "cpu_seconds" not in checkpoint:
            raise CheckpointError(
                f"ckpt_path holds no state of {type(self).__name__}; give the last.ckpt of a run of its recipe."
            )
        self.cpu_seconds = float(checkpoint["cpu_seconds"])
