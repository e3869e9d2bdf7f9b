"""Budgets per crop: what every crop keeps, where it stands, and the whole model in which the rest is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmtoken
from mmtoken import MMTokenError, compress
from mmtoken.compressors import (
    Compressor,
    Context,
    DivPrune,
    FastV,
    PyramidDrop,
    Random,
    RegionMask,
    SnapKV,
    UniformGrid,
    VisionZip,
)
from mmtoken.engine.crops import _part_grid
from mmtoken.engine.inputs import compress_inputs
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.test_crops import BASE, FOUR, NEXT_NUMBERS, ONE, TWO
from tests.contract.matrix import Cell, assert_close, batch, dense, dense_logits, keeps, logits, protected, tiny
from tests.contract.reference import recording
from tests.contract.test_merging import projected
from tests.contract.test_selections import attention_of_the_last_token, best

NEXT, ONEVISION = ("llava_next", "image"), ("llava_onevision", "image")
NUMBERS: dict[tuple[Cell, str], list[list[int]]] = {
    (NEXT, "padded_ragged"): NEXT_NUMBERS["padded_ragged"],
    (NEXT, "multi_image"): NEXT_NUMBERS["multi_image"],
    (ONEVISION, "padded_ragged"): [BASE + FOUR, BASE + ONE, BASE + TWO],
    # Two pictures in a prompt are not cut.
    (ONEVISION, "multi_image"): [[0] * 10, [0] * 10, BASE + TWO],
}
CASES = pytest.mark.parametrize(("cell", "case"), NUMBERS, ids=lambda value: "-".join(value) if value else value)


def parts(cell: Cell, case: str) -> list[tuple[int, list[int], list[int]]]:
    """Of every thumbnail and crop: prompt row, places of its tokens, and those that are no newline."""
    ids, separators = batch(cell, case)["input_ids"], protected(cell, case)
    places = (ids == tiny(cell[0]).config.image_token_id).nonzero().tolist()
    found = []
    for numbers in NUMBERS[cell, case]:
        mine, places = places[: len(numbers)], places[len(numbers) :]
        for number in range(max(numbers) + 1):
            where = [place for (_, place), other in zip(mine, numbers, strict=True) if other == number]
            row = mine[0][0]
            found.append((row, where, [place for place in where if not separators[row, place]]))
    assert not places
    return found


def run(cell: Cell, case: str, method: Compressor, attn: str = "sdpa") -> Any:
    with compress(tiny(cell[0], attn), method, per="crop") as session:
        logits(tiny(cell[0], attn), batch(cell, case))
    return session.report


def kept_places(report: Any) -> list[list[int]]:
    return [places[kept].tolist() for places, kept in zip(report.places, report.kept, strict=True)]


METHODS: dict[str, tuple[Compressor, int]] = {
    "divprune": (DivPrune(keep=3), 3),
    "random": (Random(keep=2), 2),
    "uniformgrid": (UniformGrid(keep=2), 2),
    "fastv": (FastV(keep=3, layer=2), 3),
    "pyramiddrop": (PyramidDrop(keep=2), 2),
    "snapkv": (SnapKV(keep=2, window=4, kernel=3), 2),
}


@CASES
@pytest.mark.parametrize("name", METHODS)
def test_every_crop_has_the_budget(name: str, cell: Cell, case: str) -> None:
    method, count = METHODS[name]
    report, wanted = run(cell, case, method), parts(cell, case)
    assert report.item_rows == [row for row, _, _ in wanted]
    assert [places.tolist() for places in report.places] == [places for _, places, _ in wanted]
    assert report.tokens_in == [len(eligible) for _, _, eligible in wanted]
    if name == "snapkv":  # per head, so that more is left in one or the other
        assert all(len(left) == count for item in report.sites[-1].heads for left in item)
    else:
        assert report.tokens_out == [count] * len(wanted)


@CASES
def test_a_fraction_is_one_of_the_crop(cell: Cell, case: str) -> None:
    report = run(cell, case, DivPrune(keep=0.3))
    assert report.tokens_out == [int(0.3 * len(eligible) + 0.5) for _, _, eligible in parts(cell, case)]


@CASES
def test_a_crop_is_pruned_as_a_picture_of_its_own(cell: Cell, case: str) -> None:
    method, embeds = DivPrune(keep=3), projected(cell, case)
    wanted = []
    for row, _, eligible in parts(cell, case):
        alone = method.llm_input(VisualTokens.from_features(embeds[row, eligible][None]), Context())
        wanted.append([eligible[i] for i in alone.source[0].tolist()])
    assert kept_places(run(cell, case, method)) == wanted


def test_crops_of_one_shape_draw_for_themselves() -> None:
    report = run(NEXT, "padded_ragged", Random(keep=3))
    # The first and the third crop of the first picture: 3 rows of 4 patches, without newlines.
    one, other = report.kept[1].tolist(), report.kept[3].tolist()
    assert report.tokens_in[1] == report.tokens_in[3] == 12 and one != other


@CASES
def test_attention_is_compared_within_a_crop(cell: Cell, case: str) -> None:
    scores = attention_of_the_last_token(cell, case, 1, 1, {})
    wanted = [
        best({place: float(scores[row, place]) for place in eligible}, 3).kept for row, _, eligible in parts(cell, case)
    ]
    assert [sorted(left) for left in kept_places(run(cell, case, FastV(keep=3, layer=2)))] == wanted


def test_attention_of_the_tower_is_compared_within_a_crop() -> None:
    """VisionZip without contextual tokens: the tokens that CLS of the crop's own tile looks at most."""
    cell, case, model = NEXT, "padded_ragged", tiny("llava_next", "eager")
    tower = model.base_model.vision_tower
    seen: list[Tensor] = []
    handle = tower.encoder.layers[-2].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    logits(model, batch(cell, case))
    handle.remove()
    tiles = seen[0][:, :, 0, 1:].sum(1).view(-1, 4, 4)
    # (thumbnail or crop, the rows of its patches that hold no padding)
    rows = [slice(0, 4), slice(1, 4), slice(1, 4), slice(0, 3), slice(0, 3), slice(0, 4), *[slice(1, 3)] * 2]
    rows += [slice(0, 4)] * 3
    # Crops 1 and 2 of the second picture hold both their padding above and below.
    wanted = []
    for tile, inside, (_, _, eligible) in zip(tiles, rows, parts(cell, case), strict=True):
        scores = tile[inside].flatten().tolist()
        wanted.append(best(dict(zip(eligible, scores, strict=True)), 3).kept)
    assert [sorted(left) for left in kept_places(run(cell, case, VisionZip(keep=3, contextual=0), "eager"))] == wanted


@CASES
@pytest.mark.parametrize("name", [name for name in METHODS if name != "snapkv"])  # it hides keys per head
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_the_answer_is_that_of_the_masked_model(name: str, cell: Cell, case: str, mode: str) -> None:
    model, inputs, how = tiny(cell[0]), batch(cell, case), {"num_beams": 2} if mode == "beams" else {}
    with compress(model, METHODS[name][0], per="crop") as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=4, **how)
    keep = keeps(session.report, cell, case)
    assert not bool(keep[3].all())
    with oracle.masked_keys(model, keep):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=4, **how)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)


@CASES
@pytest.mark.parametrize("per", ["item", "crop"])
def test_tokens_stand_where_the_uncompressed_model_places_them(cell: Cell, case: str, per: str) -> None:
    model, inputs = tiny(cell[0]), batch(cell, case)
    with recording(model) as calls:
        oracle.generate_with_logits(model, inputs, max_new_tokens=1)
    with compress(model, DivPrune(keep=3), per=per) as session, recording(model) as short:
        oracle.generate_with_logits(model, inputs, max_new_tokens=1)
    left = keeps(session.report, cell, case)[0] & inputs["attention_mask"].bool()
    for row, keep in enumerate(left):
        places = calls[0]["position_ids"][row, keep]
        assert torch.equal(short[0]["position_ids"][row, -len(places) :], places)
        newlines = protected(cell, case)[row]
        assert bool(left[row, newlines].all())


@CASES
@pytest.mark.parametrize("method", [DivPrune(keep=1.0), FastV(keep=1.0, layer=2)], ids=["divprune", "fastv"])
def test_keeping_everything_is_the_plain_model_to_the_bit(method: Compressor, cell: Cell, case: str) -> None:
    model, inputs = tiny(cell[0]), batch(cell, case)
    with compress(model, method, per="crop"):
        assert torch.equal(logits(model, inputs), dense_logits(cell, case))
        assert torch.equal(
            oracle.generate_with_logits(model, inputs, max_new_tokens=4).logits, dense(cell, case).logits
        )


@pytest.mark.skipif(not oracle.ENCODES_APART, reason="this version of transformers takes no encoded images")
@CASES
def test_short_inputs_hold_the_same_tokens(cell: Cell, case: str) -> None:
    model, inputs, method = tiny(cell[0]), batch(cell, case), DivPrune(keep=3)
    with compress(model, method, per="crop"):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    short = compress_inputs(model, method, inputs, per="crop")
    got = oracle.generate_with_logits(model, short, max_new_tokens=4)
    assert torch.equal(got.sequences[:, -4:], want.sequences[:, -4:])
    assert_close(got.logits, want.logits)


def test_a_crop_is_a_grid_on_which_boxes_can_be_placed() -> None:
    """The upper left quarter of every crop; of whole pictures, boxes of crops side by side cannot be placed."""
    cell, case = NEXT, "padded_ragged"
    method = RegionMask(boxes=((0.0, 0.0, 0.5, 0.5),))
    with compress(tiny(cell[0]), method), pytest.raises(MMTokenError, match="do not fill one grid"):
        logits(tiny(cell[0]), batch(cell, case))
    wanted = []
    for _, _, eligible in parts(cell, case):
        columns, rows = 4, len(eligible) // 4
        hidden = [y * columns + x for y in range(rows) for x in range(columns) if 2 * y < rows and x < 2]
        wanted.append([place for i, place in enumerate(eligible) if i not in hidden])
    assert kept_places(run(cell, case, method)) == wanted


def test_rows_of_a_crop_are_runs_of_tokens_and_those_of_a_thumbnail_fill_a_square() -> None:
    rows = torch.cat([torch.arange(first, first + 2) for first in (16, 21, 26, 31)])
    assert _part_grid(rows, 1) == (1, 4, 2)
    assert _part_grid(torch.arange(16, 20), 1) == (1, 1, 4) and _part_grid(torch.arange(4), 0) == (1, 2, 2)
    assert _part_grid(rows[:-1], 1) is None and _part_grid(rows[:0], 1) is None


@pytest.mark.parametrize(
    "cell",
    [("llava", "image"), ("qwen3_vl", "image"), ("smolvlm", "image"), ("llava_next_video", "video")],
    ids="-".join,
)
def test_items_that_hold_no_crops_stay_as_they_are(cell: Cell) -> None:
    model, inputs = tiny(cell[0]), batch(cell, "padded_ragged")
    reports = []
    for per in ("item", "crop"):
        with compress(model, DivPrune(keep=3), per=per) as session:
            logits(model, inputs)
        reports.append(session.report)
    assert kept_places(reports[0]) == kept_places(reports[1])
    assert reports[0].tokens.grid == reports[1].tokens.grid


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(MMTokenError, match="per='page' is unknown; use 'item' or 'crop'"):
        mmtoken.attach(tiny("llava"), DivPrune(), per="page")  # type: ignore[arg-type]
    assert oracle.hook_count(tiny("llava")) == 0
