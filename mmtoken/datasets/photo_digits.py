"""PhotoDigits: three real handwritten digits on crops of real photographs, with the question "read the number."

The digits are the 8 x 8 scans of the UCI test set in scikit-learn (`load_digits`; Alpaydin & Kaynak, 1998, CC BY 4.0),
the photographs ship inside scikit-learn and scikit-image (see `PHOTOGRAPHS`), so nothing is downloaded. Training and
test share neither a digit nor a photograph. Both packages come with `pip install mmtoken[train]`.

Every sample is a pure function of `(seed, index)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mmtoken.datasets.shapes_qa import IMAGE_SIZE, NUMBER_QUESTION, Box, Question, Sample, enclosing
from mmtoken.errors import InputError, MMTokenError

DIGIT_SIZE = 24
TRAIN_DIGITS = 1300
"""The first 1300 scans are for training, the remaining 497 for test. The scans are ordered by writer blocks, so a cut
by index is harder than a random one."""

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Photograph:
    """Where a photograph comes from and under which terms, as its package states it."""

    name: str
    package: Literal["scikit-image", "scikit-learn"]
    split: Split
    license: str
    source: str


PHOTOGRAPHS = (
    Photograph("china.jpg", "scikit-learn", "train", "CC BY 2.0", "danielbuechele, flickr.com, photo 6061409035"),
    Photograph("flower.jpg", "scikit-learn", "train", "CC BY 2.0", "vultilion, flickr.com, photo 6056698931"),
    Photograph("coffee", "scikit-image", "train", "CC0", "Rachel Michetti, courtesy of Pikolo Espresso Bar"),
    Photograph("rocket", "scikit-image", "train", "public domain", "SpaceX, DSCOVR launch"),
    Photograph("hubble_deep_field", "scikit-image", "train", "public domain", "NASA, Hubble"),
    Photograph("camera", "scikit-image", "train", "CC0", "Lav Varshney"),
    Photograph("brick", "scikit-image", "train", "CC0", "CC0Textures, Bricks25"),
    Photograph("grass", "scikit-image", "train", "CC0", "linolafett, DeviantArt, Grass 01"),
    Photograph("gravel", "scikit-image", "train", "CC0", "CC0Textures, Gravel04"),
    Photograph("clock", "scikit-image", "train", "public domain", "Stefan van der Walt"),
    Photograph("astronaut", "scikit-image", "test", "public domain", "NASA Great Images, Eileen Collins"),
    Photograph("chelsea", "scikit-image", "test", "CC0", "Stefan van der Walt"),
    Photograph("immunohistochemistry", "scikit-image", "test", "no known restrictions", "Human Protein Atlas slide"),
    Photograph("retina", "scikit-image", "test", "CC0", "Mikael Haggstrom, Wikimedia Commons"),
)


@dataclass(frozen=True)
class PhotoDigits(Sequence[Sample]):
    """`size` samples; each is a function of the seed, the index and the split alone.

    Attributes:
        seed: seeds of training, validation and test must differ.
        size: number of samples.
        split: "train" also turns, scales and shifts the digits a little; "test" shows them as they were scanned.
    """

    seed: int
    size: int
    split: Split = "test"

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise InputError(f"split={self.split!r}: use 'train' or 'test'.")
        if self.size < 0:
            raise InputError(f"size={self.size}: need size >= 0.")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng((self.seed, index))
        scans, labels = digits(self.split)
        photos = photographs(self.split)
        photo = photos[int(rng.integers(len(photos)))]
        top, left = (int(rng.integers(side - IMAGE_SIZE + 1)) for side in photo.shape[:2])
        # Darkened, so that the bright strokes stand out on any photograph.
        image = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].astype(np.float32) * 0.55
        if self.split == "train" and rng.random() < 0.5:
            image = image[:, ::-1].copy()
        picks = rng.integers(len(labels), size=3)
        x0 = int(rng.integers(IMAGE_SIZE - 3 * DIGIT_SIZE + 1))
        y0 = int(rng.integers(IMAGE_SIZE - DIGIT_SIZE + 1))
        boxes: list[Box] = []
        for k, pick in enumerate(picks):
            x = x0 + k * DIGIT_SIZE
            mask = _enlarge(scans[pick], rng if self.split == "train" else None)[..., None]
            area = image[y0 : y0 + DIGIT_SIZE, x : x + DIGIT_SIZE]
            image[y0 : y0 + DIGIT_SIZE, x : x + DIGIT_SIZE] = area * (1 - mask) + 250 * mask
            # The strokes fill the middle two thirds of a scan's width.
            boxes.append((x + 4, y0, x + DIGIT_SIZE - 4, y0 + DIGIT_SIZE))
        number = tuple(int(labels[p]) for p in picks)
        question = Question("number", NUMBER_QUESTION, "".join(map(str, number)), (enclosing(boxes),))
        return Sample(np.clip(image, 0, 255).astype(np.uint8), (question,), (), number, tuple(boxes))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(self.size))


def _enlarge(scan: NDArray[np.float32], rng: np.random.Generator | None) -> NDArray[np.float32]:
    """float32[8, 8] in 0..1 -> float32[24, 24], with a small random affine change where an `rng` is given."""
    angle, zoom_x, zoom_y, shear, dx, dy = 0.0, 1.0, 1.0, 0.0, 0.0, 0.0
    if rng is not None:
        angle, shear = rng.normal(0, 0.13), rng.normal(0, 0.13)
        zoom_x, zoom_y = rng.uniform(0.88, 1.12, 2)
        dx, dy = rng.uniform(-0.5, 0.5, 2)
    ratio = scan.shape[0] / DIGIT_SIZE
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_scan = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([ratio / zoom_x, ratio / zoom_y])
    middle = DIGIT_SIZE / 2
    offset = scan.shape[0] / 2 - to_scan @ np.array([middle, middle]) + np.array([dx, dy])
    coefficients = (*to_scan[0], offset[0], *to_scan[1], offset[1])
    large = PILImage.fromarray(scan).transform(
        (DIGIT_SIZE, DIGIT_SIZE), PILImage.Transform.AFFINE, coefficients, PILImage.Resampling.BILINEAR
    )
    return np.asarray(large, dtype=np.float32)


class MissingExtraError(MMTokenError):
    """A package of the `train` extra is not installed."""


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(f"PhotoDigits needs {package}, which is not installed; run: pip install mmtoken[train]")


@cache
def digits(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scans float32[n, 8, 8] in 0..1 and labels int64[n] of a split."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise _missing("scikit-learn") from error
    bunch = load_digits()
    part = slice(None, TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
    return (bunch.images[part] / 16).astype(np.float32), bunch.target[part].astype(np.int64)


@cache
def photographs(split: Split) -> tuple[NDArray[np.uint8], ...]:
    """The split's photographs, uint8[height, width, 3] each, in the order of `PHOTOGRAPHS`."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise _missing("scikit-learn") from error
    try:
        from skimage import data
    except ImportError as error:
        raise _missing("scikit-image") from error
    found = []
    for photo in PHOTOGRAPHS:
        if photo.split == split:
            load = getattr(data, photo.name) if photo.package == "scikit-image" else None
            pixels = np.asarray(load() if load else load_sample_image(photo.name))
            found.append(np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., :3])
    return tuple(found)
