"""Which visual tokens are crops, which a thumbnail: against what the prompts and pictures were made of."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

from mmtoken import VisualTokens, compress
from mmtoken.backbones.anyres import best_resolution
from mmtoken.backbones.registry import adapt
from mmtoken.compressors import Context, Random
from mmtoken.engine.inputs import compress_inputs
from tests.backbones.tiny_models import NEXT, build, inputs, special_ids

SEEN: list[tuple[list[list[int]], list[bool] | None]] = []


@dataclass(frozen=True)
class Watch(Random):
    """Notes how tokens are numbered when they reach the decoder."""

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        numbers = [item[valid].tolist() for item, valid in zip(tokens.item, tokens.valid, strict=True)]
        SEEN.append((numbers, ctx.cropped))
        return tokens


@torch.no_grad()
def seen(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[bool] | None]:
    """Numbers of the tokens of every item, and whether it is cut; the same in a call, in beams and ahead of a call."""
    SEEN.clear()
    with compress(model, Watch(keep=1.0)):
        model(**batch)
        model.generate(**batch, num_beams=2, max_new_tokens=1)
    compress_inputs(model, Watch(keep=1.0), batch)
    call, beams, ahead = SEEN
    assert call == ahead
    rows = len(batch["input_ids"])
    if len(call[0]) == rows:  # one item per row; beams repeat rows
        assert beams[0] == [numbers for numbers in call[0] for _ in range(2)]
    assert len(beams[0]) == 2 * len(call[0])
    return call


BASE = [0] * 9
# Rows of 3 x 3 patches side by side, with a newline behind each. The picture of four crops fills the four rows of
# patches in the middle of six.
ONE = ([1] * 3 + [1]) * 3
TWO = ([1] * 3 + [2] * 3 + [2]) * 3
FOUR = ([1] * 3 + [2] * 3 + [2]) * 2 + ([3] * 3 + [4] * 3 + [4]) * 2


def next_image(rows: int, *bands: tuple[int, int]) -> list[int]:
    """A thumbnail of 4 x 4 patches; then `rows` rows per band of two crops side by side, with a newline behind each."""
    return [0] * 16 + [crop for left, right in bands for _ in range(rows) for crop in [left] * 4 + [right] * 5]


# Two crops of which the middle rows are left, two whole ones, and four that share six rows.
LOW, WIDE, HIGH = next_image(2, (1, 2)), next_image(4, (1, 2)), next_image(3, (1, 2), (3, 4))
NEXT_NUMBERS = {
    "single": [WIDE],
    "padded_ragged": [HIGH, LOW, WIDE],
    "multi_image": [LOW, WIDE, WIDE],
}


@pytest.mark.parametrize("family", NEXT)
@pytest.mark.parametrize("case", NEXT_NUMBERS)
def test_next_numbers_crops_of_every_picture_as_they_are_put_together(family, case):
    model = build(family)
    found, cropped = seen(model, inputs(model, family, "image", case))
    assert found == NEXT_NUMBERS[case] and cropped == [True] * len(found)


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        ("single", [BASE + TWO]),
        ("ragged", [BASE + ONE, BASE + FOUR]),
        ("padded_ragged", [BASE + FOUR, BASE + ONE, BASE + TWO]),
    ],
)
def test_onevision_numbers_crops_as_they_are_put_together(case, numbers):
    model = build("llava_onevision")
    found, cropped = seen(model, inputs(model, "llava_onevision", "image", case))
    assert found == numbers and cropped == [True] * len(numbers)


def test_onevision_does_not_cut_several_pictures_of_a_prompt():
    model = build("llava_onevision")
    found, cropped = seen(model, inputs(model, "llava_onevision", "image", "multi_image"))
    assert found == [[0] * 10, [0] * 10, BASE + TWO] and cropped == [False, False, True]


def test_onevision_counts_crops_row_by_row():
    model = build("llava_onevision")
    model.config.image_grid_pinpoints = [[126, 84]]
    call = {"pixel_values": torch.zeros(1, 7, 3, 42, 42), "image_sizes": torch.tensor([[126, 84]])}
    layout = adapt(model).layout("image", call, 7)
    assert layout.crops[9:].view(9, 7)[::3, ::3].tolist() == [[1, 2, 2], [3, 4, 4], [5, 6, 6]]


def test_onevision_crops_that_the_model_scales_down_keep_their_numbers():
    """3 x 3 crops of 3 x 3 patches, scaled to at most 2 tiles' worth of patches: 9 x 9 become 4 x 4."""
    model = build("llava_onevision")
    model.config.image_grid_pinpoints = [[126, 126]]
    model.config.vision_aspect_ratio = "anyres_max_2"
    call = {"pixel_values": torch.zeros(1, 10, 3, 42, 42), "image_sizes": torch.tensor([[126, 126]])}
    layout = adapt(model).layout("image", call, 10)
    grid = layout.crops[9:].view(4, 5)[:, :4]
    assert layout.counts == [29] and layout.protected[9:].view(4, 5)[:, 4].all()
    expected = [[3 * row + column + 1 for column in (0, 1, 1, 2)] for row in (0, 1, 1, 2)]
    assert grid.tolist() == expected


def test_the_grid_of_crops_is_the_one_that_upstream_chooses() -> None:
    """Candidates tie on the usable area of small pictures: the one that wastes least is taken, then the first."""
    candidates = [[112, 112], [168, 56], [56, 112], [112, 56], [56, 168]]
    assert best_resolution([56, 56], candidates, 56) == (1, 2)
    chosen = set()
    for size in itertools.product((20, 40, 56, 90, 130, 200), repeat=2):
        found = best_resolution(list(size), candidates, 56)
        assert list(found) == [side // 56 for side in select_best_resolution(size, candidates)]
        chosen.add(found)
    assert len(chosen) == 5


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@pytest.mark.parametrize(
    ("case", "items"),
    [
        ("single", [(1, True), (2, True), (0, True)]),
        ("multi_image", [(1, True), (2, True), (0, True)] * 3),
        # 2 x 2 crops, a picture that is not split, and one above another.
        (
            "padded_ragged",
            [(1, True), (2, True), (3, True), (4, True), (0, True), (0, False), (1, True), (2, True), (0, True)],
        ),
        ("text_row", [(1, True), (2, True), (0, True)]),
    ],
)
def test_idefics_tells_crops_by_the_marks_in_the_prompt(family, case, items):
    model = build(family)
    batch = inputs(model, family, "image", case)
    found, cropped = seen(model, batch)
    tokens = len(found[0])
    assert found == [[number] * tokens for number, _ in items] and cropped == [cut for _, cut in items]


def test_idefics_pictures_that_are_not_split_are_not_the_crops_of_one():
    """Three pictures of one tile each have the same pixels as one picture of two crops and its thumbnail."""
    model = build("idefics3")
    batch = inputs(model, "idefics3", "image", "single")
    ids, marks = batch["input_ids"].clone(), special_ids("idefics3")
    for name in ("<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>"):
        ids[ids == marks[name]] = marks["<global-img>"]
    found, cropped = seen(model, {**batch, "input_ids": ids})
    assert {n for numbers in found for n in numbers} == {0} and cropped == [False] * 3


def test_idefics_prompts_without_marks_or_ids_hold_pictures_that_are_not_cut():
    model = build("idefics3")
    backbone = adapt(model)
    image = backbone.placeholder_ids("image")
    places = [torch.arange(2, 6), torch.arange(6, 10)]
    assert backbone.prompt_crops(torch.tensor([5, 6, *[image] * 8]), places) == [(0, False)] * 2
    assert backbone.prompt_crops(torch.full((10,), image), [torch.arange(4), torch.arange(4, 8)]) == [(0, False)] * 2
    assert adapt(build("llava")).prompt_crops(torch.zeros(3), places) is None


@pytest.mark.parametrize(
    ("case", "items"),
    [
        ("single", [(1, True), (2, True), (0, True)]),
        ("ragged", [(0, False), *((n, True) for n in (1, 2, 3, 4, 0))]),
        ("multi_image", [(0, False), *((n, True) for n in (1, 2, 0, 1, 2, 0))]),
        ("text_row", [(1, True), (2, True), (0, True)]),
    ],
)
def test_internvl_tells_crops_by_what_follows_without_a_token_between(case, items):
    model = build("internvl")
    found, cropped = seen(model, inputs(model, "internvl", "image", case))
    assert found == [[number] * 16 for number, _ in items] and cropped == [cut for _, cut in items]


def test_other_families_have_no_crops():
    for family in ("llava", "qwen2_5_vl"):
        model = build(family)
        found, cropped = seen(model, inputs(model, family, "image", "single"))
        assert {n for numbers in found for n in numbers} == {0} and cropped in (None, [False])
