"""PhotoDigits: deterministic, labelled right, training and test apart, and a clear error without its packages."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mmtoken.datasets import photo_digits
from mmtoken.datasets.photo_digits import PHOTOGRAPHS, PhotoDigits, digits, photographs
from mmtoken.errors import MMTokenError


def test_a_sample_depends_on_seed_index_and_split_alone() -> None:
    a, b = PhotoDigits(seed=3, size=5)[4], PhotoDigits(seed=3, size=5000)[4]
    assert np.array_equal(a.image, b.image) and a.number == b.number
    assert not np.array_equal(a.image, PhotoDigits(seed=4, size=5)[4].image)
    assert not np.array_equal(a.image, PhotoDigits(seed=3, size=5, split="train")[4].image)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_is_the_number_that_was_drawn(split: photo_digits.Split) -> None:
    for sample in PhotoDigits(seed=1, size=50, split=split):
        (question,) = sample.questions
        assert question.type == "number" and question.answer == "".join(map(str, sample.number))
        assert list(sample.digit_boxes) == sorted(sample.digit_boxes)
        for x0, y0, x1, y1 in sample.digit_boxes:
            assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
            # The strokes are the brightest thing there: photographs are darkened below 141.
            assert sample.image[y0:y1, x0:x1].min(axis=-1).max() > 190


def test_test_digits_look_like_their_labels() -> None:
    """The scan under each box is, among the test scans, one with the label that the sample gives."""
    scans, labels = digits("test")
    sample = PhotoDigits(seed=2, size=1)[0]
    for (x0, y0, x1, y1), digit in zip(sample.digit_boxes, sample.number, strict=True):
        seen = sample.image[y0:y1, x0 - 4 : x1 + 4].min(axis=-1).astype(float)
        enlarged = np.stack([np.asarray(photo_digits._enlarge(s, None)) for s in scans])
        likeness = [np.corrcoef(seen.ravel(), e.ravel())[0, 1] for e in enlarged]
        assert labels[int(np.argmax(likeness))] == digit


def test_training_and_test_share_neither_digits_nor_photographs() -> None:
    train, test = digits("train")[0], digits("test")[0]
    assert len(train) == 1300 and len(test) == 497
    assert not {s.tobytes() for s in train} & {s.tobytes() for s in test}
    names = {s: {p.name for p in PHOTOGRAPHS if p.split == s} for s in ("train", "test")}
    assert names["train"] and names["test"] and not names["train"] & names["test"]
    assert len(photographs("train")) == len(names["train"]) and len(photographs("test")) == len(names["test"])


def test_every_photograph_names_its_licence_and_source() -> None:
    assert all(p.license and p.source for p in PHOTOGRAPHS)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.cache_clear()
    photographs.cache_clear()
    with pytest.raises(MMTokenError, match=r"scikit-learn.*pip install mmtoken\[train\]"):
        PhotoDigits(seed=0, size=1)[0]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MMTokenError, match=r"scikit-image.*pip install mmtoken\[train\]"):
        photographs("test")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(MMTokenError, match="split='val'"):
        PhotoDigits(seed=0, size=1, split="val")  # type: ignore[arg-type]
