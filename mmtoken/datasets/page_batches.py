"""Pages for training and validation of tiny-document.

Batches are lists of pages and a function of `(seed, step)` alone. There is no shuffling and no epoch, so a run resumed
at step k sees exactly the batches the uninterrupted run would have seen, and no page ever repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from mmtoken.datasets.document_pages import DocumentPages, Page
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.errors import InputError

# Far more than any run draws: the stream is open-ended, but pages are addressed by index.
_ENDLESS = 2**40


@dataclass(frozen=True)
class _Stream(IterableDataset[list[Page]]):
    """Batches from step `start` on, without end."""

    pages: DocumentPages
    batch: int
    start: int

    def __iter__(self) -> Iterator[list[Page]]:
        step = self.start
        while True:
            yield [self.pages[i] for i in range(step * self.batch, (step + 1) * self.batch)]
            step += 1


class PageBatches(L.LightningDataModule):
    """Generated pages for training and validation.

    Args:
        seed: another seed gives other pages, in training and validation.
        batch: pages per step.
        questions: questions per page.
        mix: how often each question type is asked in training; None: the default of `DocumentPages`.
        validation_pages: held-out pages, with the default mix.
    """

    def __init__(
        self,
        seed: int = 0,
        batch: int = 8,
        questions: int = 8,
        mix: dict[str, float] | None = None,
        validation_pages: int = 160,
    ) -> None:
        super().__init__()
        if batch < 1 or validation_pages < 1:
            raise InputError(f"batch={batch}, validation_pages={validation_pages}: give at least 1 of both.")
        train, self.batch = split_seed(seed, "train"), batch
        self.train_pages = DocumentPages(train, _ENDLESS, questions, **({} if mix is None else {"mix": mix}))
        self.validation_pages = DocumentPages(split_seed(seed, "validation"), validation_pages)

    def train_dataloader(self) -> DataLoader[list[Page]]:
        start = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(_Stream(self.train_pages, self.batch, start), batch_size=None)

    def val_dataloader(self) -> DataLoader[list[Page]]:
        pages = list(self.validation_pages)
        batches = [pages[i : i + 32] for i in range(0, len(pages), 32)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
