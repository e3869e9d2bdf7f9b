"""The training mix of tiny-llava-video: MovingShapes in batches of one clip length each.

The batch of a step is a function of `(seed, step)` alone: all its clips have the same number of frames, most often 6 to
24 and sometimes up to 64, and as many clips as make up about the same number of frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from mmtoken.datasets.moving_shapes import MAX_FRAMES, MIN_FRAMES, Clip, MovingShapes
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.errors import InputError

_ENDLESS = 2**50
_ROOM = 2**12
"""Indices set aside for a step; no batch is larger."""


@dataclass(frozen=True)
class ClipBatches:
    """`ClipBatches(...)[step]`: the clips of a step.

    Attributes:
        seed: of the generator, see `split_seed`.
        frames: frames per step, over all clips.
        questions: questions per clip.
        shortest, longest: frames of the usual clips.
        far: fraction of steps with longer clips, up to 64 frames.
        anytime: fraction of questions asked before the end.
        dropped: fraction of clips of which frames are missing.
        ramp: steps over which clips grow from at most 10 frames to `longest`; longer ones come after them.
    """

    seed: int
    frames: int = 1024
    questions: int = 10
    shortest: int = MIN_FRAMES
    longest: int = 24
    far: float = 0.12
    anytime: float = 0.5
    dropped: float = 0.25
    ramp: int = 300

    def __post_init__(self) -> None:
        if not 1 <= self.frames // MIN_FRAMES <= _ROOM:
            raise InputError(f"frames={self.frames}: a step has room for {MIN_FRAMES} to {MIN_FRAMES * _ROOM} frames.")

    def length(self, step: int) -> int:
        """Frames of the clips of that step."""
        rng = np.random.default_rng((self.seed, step, 1))
        if rng.random() < self.far and self.longest < MAX_FRAMES and step >= self.ramp:
            return int(rng.integers(self.longest + 1, MAX_FRAMES + 1))
        start = min(10, self.longest)
        longest = start + (self.longest - start) * min(1.0, step / max(1, self.ramp))
        return int(rng.integers(self.shortest, max(self.shortest, int(longest)) + 1))

    def __getitem__(self, step: int) -> list[Clip]:
        length = self.length(step)
        source = MovingShapes(
            self.seed,
            _ENDLESS,
            (length, length),
            self.questions,
            anytime=self.anytime,
            dropped=self.dropped,
            # In half of the long batches all that happens is over after 16 frames: the answers are far back.
            active=16 if length > self.longest and step % 2 else None,
            mix={
                "colour": 0.6,
                "shape": 0.6,
                "appeared": 1.5,
                "left": 1.5,
                "direction": 1.3,
                "count": 1.2,
                "number": 0.8,
            },
        )
        return [source[step * _ROOM + i] for i in range(max(1, self.frames // length))]


@dataclass(frozen=True)
class _Stream(IterableDataset[tuple[int, list[Clip]]]):
    batches: ClipBatches
    start: int

    def __iter__(self) -> Iterator[tuple[int, list[Clip]]]:
        step = self.start
        while True:
            yield step, self.batches[step]
            step += 1


class ClipMix(L.LightningDataModule):
    """Clips for training and validation: (step, clips) pairs.

    Args:
        seed: another seed gives other clips, in training and validation.
        frames: frames per step.
        questions: questions per training clip.
        validation_clips: held-out clips of 16 frames, one question of each type at their end.
    """

    def __init__(self, seed: int = 0, frames: int = 1024, questions: int = 10, validation_clips: int = 256) -> None:
        super().__init__()
        self.train = ClipBatches(split_seed(seed, "train"), frames, questions)
        self.validation = MovingShapes(split_seed(seed, "validation"), validation_clips)

    def train_dataloader(self) -> DataLoader[tuple[int, list[Clip]]]:
        start = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(_Stream(self.train, start), batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[int, list[Clip]]]:
        clips = list(self.validation)
        groups = [(-1, clips[i : i + 32]) for i in range(0, len(clips), 32)]
        return DataLoader(groups, batch_size=None)  # type: ignore[arg-type]
