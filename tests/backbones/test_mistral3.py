"""Mistral 3: rows of an image as the prompt shows them, and marks that stay."""

from __future__ import annotations

import pytest
import torch

from mmtoken import compress, compress_inputs
from mmtoken.backbones.registry import adapt
from mmtoken.compressors import DivPrune, RegionMask
from tests.backbones.tiny_models import build, inputs, special_ids
from tests.engine.test_inputs import needs_features

IDS = special_ids("mistral3")
IMAGE, BREAK, END = IDS["[IMG]"], IDS["[IMG_BREAK]"], IDS["[IMG_END]"]


@pytest.mark.parametrize("case", ["ragged", "padded_ragged", "multi_image"])
@torch.no_grad()
def test_a_mark_follows_every_row_of_the_grid(case: str) -> None:
    model = build("mistral3")
    batch = inputs(model, "mistral3", "image", case)
    with compress(model, DivPrune(keep=1.0)) as session:
        model(**batch)
    report = session.report
    assert report.tokens is not None
    for row, places, grid in zip(report.item_rows, report.places, report.tokens.grid, strict=True):
        assert grid is not None
        frames, lines, columns = grid
        assert frames == 1 and len(places) == lines * columns
        marks = [int(batch["input_ids"][row, place + 1]) for place in places[columns - 1 :: columns]]
        assert marks == [BREAK] * (lines - 1) + [END]
        assert (batch["input_ids"][row, places] == IMAGE).all()


@needs_features
def test_of_a_region_the_marks_stay_behind_shorter_rows() -> None:
    model = build("mistral3")
    batch = inputs(model, "mistral3", "image", "ragged")  # 3 x 2 and 4 x 4 tokens
    short = compress_inputs(model, RegionMask(boxes=((0.0, 0.0, 0.5, 1.0),)), batch)
    for ids, lines, columns in zip(short["input_ids"], (3, 4), (1, 2), strict=True):
        line = [IMAGE] * columns + [BREAK]
        want = [*(line * lines)[:-1], END]
        start = ids.tolist().index(IMAGE)
        assert ids[start : start + len(want)].tolist() == want
        assert int((ids == IMAGE).sum()) == lines * columns


def test_pixels_of_an_image_are_those_before_the_padding() -> None:
    model = build("mistral3")
    batch = inputs(model, "mistral3", "image", "ragged")
    backbone, call = adapt(model), {name: batch[name] for name in ("pixel_values", "image_sizes")}
    found = backbone.item_pixels("image", call)
    assert [tuple(picture.shape) for picture in found] == [(3, 84, 56), (3, 112, 112)]
    assert all(
        torch.equal(a, b[:, : a.shape[1], : a.shape[2]]) for a, b in zip(found, call["pixel_values"], strict=True)
    )
    assert not call["pixel_values"][0, :, 84:].any()
