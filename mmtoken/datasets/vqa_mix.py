"""The training mix of the tiny zoo models: ShapesQA scenes with some PhotoDigits in every batch.

Batches are lists of samples and a function of `(seed, step)` alone. There is no shuffling and no epoch, so a run
resumed at step k sees exactly the batches the uninterrupted run would have seen, and no scene ever repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import lightning as L
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mmtoken.datasets.photo_digits import PhotoDigits
from mmtoken.datasets.shapes_qa import QUESTION_TYPES, Sample, ShapesQA
from mmtoken.errors import InputError

# Far more than any run draws: the streams are open-ended, but samples are addressed by index.
_ENDLESS = 2**40
# Training, validation and test draw from disjoint seeds; held-out photographs and digits are other files altogether.
_SEEDS = {"train": 0, "validation": 1, "test": 2}


def split_seed(seed: int, split: str) -> int:
    """The generator seed of a split; no two of (seed, split) share one."""
    return 3 * seed + _SEEDS[split]


@dataclass(frozen=True)
class Batch:
    """Samples of one step. Scenes carry several questions, photographs one; they are packed separately."""

    scenes: list[Sample]
    photos: list[Sample]


@dataclass(frozen=True)
class Stage:
    """What training scenes look like from step `start` on.

    Attributes:
        start: first step of the stage; the first stage starts at 0.
        min_objects: fewest shapes in a scene; easy scenes help skills to start.
        max_objects: most shapes in a scene.
        mix: relative frequency of the question types; those left out are not asked.
    """

    start: int = 0
    min_objects: int = 1
    max_objects: int = 6
    mix: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUESTION_TYPES, 1.0))


@dataclass(frozen=True)
class TrainBatches(IterableDataset[Batch]):
    """Batches from step `start` on, without end. `scenes` holds the first step and the scenes of every stage."""

    scenes: tuple[tuple[int, ShapesQA], ...]
    photos: PhotoDigits
    scene_batch: int
    photo_batch: int
    start: int = 0

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            scenes = [source for first, source in self.scenes if first <= step][-1]
            yield Batch(_slice(scenes, step, self.scene_batch), _slice(self.photos, step, self.photo_batch))
            step += 1


@dataclass(frozen=True)
class ValidationBatches(Dataset[Batch]):
    """Held-out scenes first, then held-out photographs, `size` of either at a time."""

    scenes: list[Sample]
    photos: list[Sample]
    size: int = 32

    def __len__(self) -> int:
        return -(-len(self.scenes) // self.size) + -(-len(self.photos) // self.size)

    def __getitem__(self, index: int) -> Batch:
        groups = -(-len(self.scenes) // self.size)
        if index < groups:
            return Batch(self.scenes[index * self.size : (index + 1) * self.size], [])
        start = (index - groups) * self.size
        return Batch([], self.photos[start : start + self.size])


def _slice(source: ShapesQA | PhotoDigits, step: int, size: int) -> list[Sample]:
    return [source[i] for i in range(step * size, (step + 1) * size)]


class VQAMix(L.LightningDataModule):
    """Scenes and photographs for training and validation.

    Args:
        seed: another seed gives other scenes, crops and digits, in training and validation.
        scene_batch: scenes per step.
        photo_batch: photographs with digits per step.
        questions: questions per scene.
        stages: what training scenes and questions are like, and from which step on.
        validation_scenes: held-out scenes (3 to 6 shapes, 8 questions each, all types equally often).
        validation_photos: held-out photographs with digits.
    """

    def __init__(
        self,
        seed: int = 0,
        scene_batch: int = 16,
        photo_batch: int = 8,
        questions: int = 8,
        stages: list[Stage] | None = None,
        validation_scenes: int = 160,
        validation_photos: int = 192,
    ) -> None:
        super().__init__()
        for name, count in (("scene_batch", scene_batch), ("photo_batch", photo_batch)):
            if count < 0 or scene_batch + photo_batch == 0:
                raise InputError(f"{name}={count}: a step needs pictures; give at least 0, and not 0 for both batches.")
        self.scene_batch, self.photo_batch = scene_batch, photo_batch
        plan = stages or [Stage()]
        starts = [stage.start for stage in plan]
        if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise InputError(f"stages: they start at {starts}; the first has to start at 0, each later one after it.")
        train, validation = split_seed(seed, "train"), split_seed(seed, "validation")
        self.train_scenes = tuple(
            (s.start, ShapesQA(train, _ENDLESS, questions, s.min_objects, s.max_objects, s.mix)) for s in plan
        )
        self.train_photos = PhotoDigits(train, _ENDLESS, "train")
        self.validation_scenes = ShapesQA(validation, validation_scenes)
        self.validation_photos = PhotoDigits(validation, validation_photos, "test")

    def train_dataloader(self) -> DataLoader[Batch]:
        start = self.trainer.global_step if self.trainer is not None else 0
        batches = TrainBatches(self.train_scenes, self.train_photos, self.scene_batch, self.photo_batch, start)
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        batches = ValidationBatches(list(self.validation_scenes), list(self.validation_photos))
        return DataLoader(batches, batch_size=None)
