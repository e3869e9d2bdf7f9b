"""Benchmarks: what is asked, how an answer is read and how it is scored, as pure functions without a model.

A benchmark never sees a compressor, and the runner never sees what a benchmark asks about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtoken.errors import MMTokenError, near_names

TEST_SEED = 2
"""Generator seed of the test split that belongs to training seed 0 (`mmtoken.datasets.vqa_mix.split_seed`)."""


@dataclass(frozen=True)
class Item:
    """One question about one picture: image uint8[H, W, 3], a question of some type, the expected answer."""

    image: NDArray[np.uint8]
    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Benchmark:
    """Pure functions around a list of items.

    Attributes:
        name: key in results.
        title: for pictures and tables.
        load: number of pictures -> items, the same ones every time.
        prompt: question -> chat messages (the picture goes to `{"type": "image"}`).
        parse: generated text -> answer.
        score: (parsed answer, expected answer) -> 1 or 0.
        max_new_tokens: enough for every expected answer and its end token.
    """

    name: str
    title: str
    load: Callable[[int], list[Item]]
    prompt: Callable[[str], list[dict[str, Any]]]
    parse: Callable[[str], str]
    score: Callable[[str, str], int]
    max_new_tokens: int


def ask(question: str) -> list[dict[str, Any]]:
    """One user turn: the picture, then the question as it stands."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def first_line(text: str) -> str:
    """The answer in a generated text: its first line that is not blank, lower case, without a closing full stop."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return " ".join(line.split()).lower().removesuffix(".").rstrip()


def exact_match(answer: str, expected: str) -> int:
    """1 where the strings are equal, else 0."""
    return int(answer == expected)


def begins_with(answer: str, expected: str) -> int:
    """1 where the answer begins with the expected one: a whole word, or digit by digit.

    A model that lost most of its picture may know the answer and still go on after it ("white orange"); exact match
    would measure whether it stops. The two are equal on answers of the whole model.
    """
    rest = answer[len(expected) :]
    return int(answer.startswith(expected) and (expected.isdigit() or not rest[:1].isalnum()))


def _shapes(pictures: int) -> list[Item]:
    from mmtoken.datasets.shapes_qa import ShapesQA

    return items_of(ShapesQA(seed=TEST_SEED, size=pictures))


def _digits(pictures: int) -> list[Item]:
    from mmtoken.datasets.photo_digits import PhotoDigits

    return items_of(PhotoDigits(seed=TEST_SEED, size=pictures, split="test"))


def _pages(pictures: int) -> list[Item]:
    from mmtoken.datasets.document_pages import DocumentPages

    return items_of(DocumentPages(seed=TEST_SEED, size=pictures))


def items_of(samples: Any) -> list[Item]:
    """Every question of a sequence of samples, in order."""
    return list(_items(samples))


def _items(samples: Any) -> Iterator[Item]:
    for index in range(len(samples)):
        sample = samples[index]
        for question in sample.questions:
            yield Item(sample.image, question.text, question.answer, question.type)


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        # The longest answers are three digits and the end token.
        Benchmark("shapes_qa", "Shapes and numbers", _shapes, ask, first_line, begins_with, 4),
        Benchmark("photo_digits", "Digits on photographs", _digits, ask, first_line, begins_with, 4),
        Benchmark("document_pages", "Document pages", _pages, ask, first_line, begins_with, 4),
    )
}


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        MMTokenError: there is none.
    """
    if name not in BENCHMARKS:
        raise MMTokenError(f"benchmark={name!r} is unknown{near_names(name, BENCHMARKS)}")
    return BENCHMARKS[name]
