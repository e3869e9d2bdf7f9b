"""Region masks: which cells boxes touch, what becomes of their tokens, and what leaks through the blocks before."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken import MMTokenError, compress
from mmtoken.compressors import Context, RegionMask
from mmtoken.compressors.regionmask import cells_of, pool_cells, removal_rates
from mmtoken.errors import InputError, KeepError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import build, inputs

BOX = (0.25, 0.5, 0.5, 0.75)
"""On a grid of 4 x 4, the second cell of the third row, exactly."""


@st.composite
def boxes(draw: st.DrawFn) -> list[tuple[float, float, float, float]]:
    """Up to three boxes whose sides are multiples of 1/48: on cell edges of many grids, and between them."""
    found = []
    for _ in range(draw(st.integers(0, 3))):
        (left, right), (top, bottom) = (
            sorted(draw(st.lists(st.integers(0, 48), min_size=2, max_size=2, unique=True))) for _ in "xy"
        )
        found.append((left / 48, top / 48, right / 48, bottom / 48))
    return found


sides = st.integers(1, 12)


def exact(value: float) -> Fraction:
    return Fraction(round(value * 48), 48)


def touched(found, rows: int, columns: int, dilation: int) -> set[tuple[int, int]]:
    """Cells with an area in common with a box, in whole fractions; then those near enough to such a cell."""
    first = {
        (r, c)
        for (left, top, right, bottom), r, c in itertools.product(found, range(rows), range(columns))
        if exact(left) < Fraction(c + 1, columns)
        and exact(right) > Fraction(c, columns)
        and exact(top) < Fraction(r + 1, rows)
        and exact(bottom) > Fraction(r, rows)
    }
    return {
        (r, c)
        for r, c in itertools.product(range(rows), range(columns))
        if any(abs(r - y) <= dilation and abs(c - x) <= dilation for y, x in first)
    }


def cells(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {(r, c) for r, c in mask.nonzero().tolist()}


# --------------------------------------------------------------------------------------------------------------- cells


@settings(deadline=None, max_examples=150)
@given(found=boxes(), rows=sides, columns=sides, dilation=st.integers(0, 3))
def test_cells_are_those_with_an_area_in_common_and_their_neighbours(found, rows, columns, dilation):
    assert cells(cells_of(found, rows, columns, dilation)) == touched(found, rows, columns, dilation)


def test_cells_worked_out_by_hand():
    assert cells(cells_of([BOX], 4, 4)) == {(2, 1)}
    assert cells(cells_of([BOX], 4, 4, dilation=1)) == {(r, c) for r in (1, 2, 3) for c in (0, 1, 2)}
    assert cells(cells_of([BOX], 2, 2)) == {(1, 0)}
    assert cells(cells_of([(0.2, 0.0, 0.3, 0.1)], 1, 4)) == {(0, 0), (0, 1)}
    assert cells(cells_of([(0.0, 0.0, 1.0, 1.0)], 2, 3)) == set(itertools.product(range(2), range(3)))
    # A box far smaller than a cell masks the cell.
    assert cells(cells_of([(0.5, 0.5, 0.5 + 1e-12, 0.5 + 1e-12)], 2, 2)) == {(1, 1)}


@settings(deadline=None, max_examples=60)
@given(found=boxes(), more=boxes(), rows=sides, columns=sides, dilation=st.integers(0, 3))
def test_masks_grow_with_dilation_and_under_union(found, more, rows, columns, dilation):
    mask = cells_of(found, rows, columns, dilation)
    assert bool((cells_of(found, rows, columns, dilation + 1) | ~mask).all())
    both = cells_of(found + more, rows, columns, dilation)
    assert torch.equal(both, mask | cells_of(more, rows, columns, dilation))


@settings(deadline=None, max_examples=60)
@given(found=boxes(), rows=st.integers(1, 6), columns=st.integers(1, 6), stride=st.integers(1, 4))
def test_the_mask_of_a_coarser_grid_marks_every_cell_with_a_masked_child(found, rows, columns, stride):
    fine = cells_of(found, rows * stride, columns * stride)
    children = fine.view(rows, stride, columns, stride).permute(0, 2, 1, 3).flatten(2).any(-1)
    assert torch.equal(pool_cells(fine, stride), children)
    assert torch.equal(cells_of(found, rows, columns), children)


def test_pooling_a_grid_that_does_not_divide_keeps_its_last_cells():
    fine = torch.zeros(3, 5, dtype=torch.bool)
    fine[2, 4] = True
    assert cells(pool_cells(fine, 2)) == {(1, 2)}


# -------------------------------------------------------------------------------------------------------------- tokens


def image(rows: int = 4, columns: int = 4, *, frames: int = 1, items: int = 1) -> VisualTokens:
    features = torch.randn(items, frames * rows * columns, 3, generator=torch.Generator().manual_seed(0))
    return VisualTokens.from_features(features, grid=((frames, rows, columns),) * items)


def act(method: RegionMask, tokens: VisualTokens) -> VisualTokens:
    return method.llm_input(tokens, Context())


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_dropping_takes_the_tokens_away(mode):
    tokens = image()
    left = act(RegionMask(boxes=(BOX,), dilation=1, mode=mode), tokens)
    assert left.kept()[0].tolist() == [0, 1, 2, 3, 7, 11, 15]
    assert torch.equal(left.features[0], tokens.features[0, left.kept()[0]])


def test_filling_leaves_the_others_as_they_are():
    tokens = image()
    inside = torch.zeros(16, dtype=torch.bool)
    inside[9] = True
    for mode, value in (("zero", torch.zeros(3)), ("mean", tokens.features[0, ~inside].mean(0))):
        left = act(RegionMask(boxes=(BOX,), mode=mode), tokens)
        assert left.counts() == [16]
        assert torch.equal(left.features[0, ~inside], tokens.features[0, ~inside])
        torch.testing.assert_close(left.features[0, 9], value, rtol=0, atol=1e-6)
        tokens.features[0, 9] = torch.nan  # nothing of what is hidden is read
        again = act(RegionMask(boxes=(BOX,), mode=mode), tokens)
        assert torch.equal(again.features, left.features)
        tokens = image()


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_filling_everything_leaves_zeros(mode):
    left = act(RegionMask(boxes=((0.0, 0.0, 1.0, 1.0),), mode=mode), image())
    assert left.counts() == [16] and not left.features.any()


@pytest.mark.parametrize("mode", ["zero", "mean", "drop", "mask"])
def test_without_boxes_nothing_changes(mode):
    tokens = image(items=2)
    for given_boxes in ((), ((), ())):
        left = act(RegionMask(boxes=given_boxes, mode=mode, dilation=2), tokens)
        assert torch.equal(left.features, tokens.features) and left.counts() == [16, 16]


def test_boxes_per_item_and_for_all():
    tokens = image(items=2)
    corner = (0.0, 0.0, 0.25, 0.25)
    left = act(RegionMask(boxes=((BOX, corner), ())), tokens)
    assert left.kept()[0].tolist() == [*range(1, 9), *range(10, 16)] and left.counts()[1] == 16
    both = act(RegionMask(boxes=(BOX, corner)), tokens)
    assert [kept.tolist() for kept in both.kept()] == [left.kept()[0].tolist()] * 2
    with pytest.raises(InputError, match="boxes has lists for 3 items but there are 2"):
        act(RegionMask(boxes=((BOX,), (), ())), tokens)


def test_every_frame_of_a_video_is_masked_and_separators_stay():
    left = act(RegionMask(boxes=((0.5, 0.0, 1.0, 1.0),)), image(1, 2, frames=3))
    assert left.kept()[0].tolist() == [0, 2, 4]
    tokens = image(2, 2)
    features = torch.cat([tokens.features, torch.full((1, 1, 3), torch.nan)], 1)
    protected = torch.arange(5)[None] == 4
    with_newline = VisualTokens.from_features(features, protected=protected, grid=tokens.grid)
    left = act(RegionMask(boxes=((0.0, 0.0, 1.0, 0.5),), mode="mean"), with_newline)
    torch.testing.assert_close(left.features[0, :2], tokens.features[0, 2:].mean(0).expand(2, -1))
    assert bool(left.features[0, 4].isnan().all())


def test_tokens_in_another_order_than_the_raster_are_found_by_their_position():
    tokens = image()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))[None]
    left = act(RegionMask(boxes=(BOX,), dilation=1), tokens.take(order))
    assert sorted(left.kept()[0].tolist()) == [0, 1, 2, 3, 7, 11, 15]


def test_tokens_on_no_grid_are_refused():
    tokens = image()
    nowhere = VisualTokens.from_features(tokens.features)
    for some in (nowhere, tokens.where(torch.arange(16)[None] != 3)):
        with pytest.raises(InputError, match="boxes cannot be placed"):
            act(RegionMask(boxes=(BOX,)), some)
    assert act(RegionMask(boxes=((),)), nowhere).counts() == [16]


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "bad",
    [
        "box",
        3,
        None,
        (0.1, 0.2, 0.3, 0.4),
        ((0.1, 0.2, 0.3),),
        ((0.5, 0.2, 0.5, 0.4),),
        ((0.5, 0.6, 0.9, 0.4),),
        ((0.0, 0.0, 1.5, 0.4),),
        ((-0.1, 0.0, 0.5, 0.4),),
        ((0.0, 0.0, float("nan"), 0.4),),
        ((True, 0.0, 0.5, 0.5),),
        (("a", 0.0, 0.5, 0.5),),
        (BOX, (BOX,)),
        ((BOX, "x"),),
    ],
    ids=repr,
)
def test_bad_boxes_are_errors_that_say_how_to_give_them(bad):
    with pytest.raises(MMTokenError, match=r"boxes=.*give"):
        RegionMask(boxes=bad)


@pytest.mark.parametrize("keep", [0.5, 1, 64, 0.999])
def test_there_is_no_budget(keep):
    with pytest.raises(KeepError, match=f"keep={keep}.*use keep=1.0"):
        RegionMask(keep=keep)


@pytest.mark.parametrize("found", [(), (BOX,), (BOX, BOX), ((BOX,), ()), ((BOX, BOX), (BOX,))])
def test_boxes_survive_json(found):
    method = RegionMask(boxes=found, dilation=1, mode="zero", site="patches")
    again = RegionMask(**json.loads(json.dumps(method.to_dict()))["init_args"])
    assert again == method and hash(again) == hash(method)


def test_a_setting_acts_at_one_site():
    assert RegionMask().sites == {"llm_input"} and RegionMask(site="patches").sites == {"vision_layer"}
    assert RegionMask.sites == {"llm_input", "vision_layer"}
    tokens = image()
    method = RegionMask(boxes=(BOX,), site="patches")
    assert [method.vision_layer(tokens, layer, Context()).counts() for layer in (1, 2, 3)] == [[15], [16], [16]]


# ---------------------------------------------------------------------------------------------------------------- leak

SITES_AND_BLOCKS = [("patches", 1), ("llm_input", 3)]
"""A site, and the blocks of tiny LLaVA's tower that have mixed tokens before it."""


@torch.no_grad()
def answers(family: str, method: RegionMask, blocks: int, change: float) -> torch.Tensor:
    """Logits of the prompt's last token, with pixels under the box changed, the first `blocks` blocks not mixing."""
    model = build(family)
    tower = model.base_model.vision_tower.encoder.layers if family == "llava" else model.base_model.visual.blocks
    for block in tower[:blocks]:
        output = block.self_attn.out_proj if family == "llava" else block.attn.proj
        output.weight.zero_()
    batch = dict(inputs(model, family, case="single"))
    if family == "llava":
        pixels = batch["pixel_values"].clone()
        pixels[:, :, 28:42, 14:28] += change  # the third row of patches, the second column: BOX
        batch["pixel_values"] = pixels
    else:
        patches = batch["pixel_values"].clone()
        # 8 x 12 patches are 4 x 6 units of 2 x 2, which follow each other in memory: the first one is the corner.
        patches[:4] += change
        batch["pixel_values"] = patches
    with compress(model, method) as session:
        logits = model(**oracle.clone(batch)).logits[:, -1]
    assert session.report.tokens_in == [16 if family == "llava" else 24]
    return logits


@pytest.mark.parametrize("mode", ["zero", "mean", "drop", "mask"])
@pytest.mark.parametrize(("site", "mixing"), SITES_AND_BLOCKS)
def test_what_is_under_a_box_leaks_through_the_blocks_that_mixed_before_the_mask(site, mixing, mode):
    method = RegionMask(boxes=(BOX,), mode=mode, site=site)
    for blocks in sorted({0, mixing - 1, mixing}):
        plain, changed = (answers("llava", method, blocks, change) for change in (0.0, 1.0))
        assert torch.equal(plain, changed) == (blocks == mixing), blocks
    # The pixels matter where nothing is masked, mixed or not.
    nothing = RegionMask(mode=mode, site=site)
    assert not torch.equal(answers("llava", nothing, mixing, 0.0), answers("llava", nothing, mixing, 1.0))


def test_filling_does_not_stop_features_that_a_model_adds_in_deeper_layers():
    corner = (0.0, 0.0, 1 / 6, 1 / 4)
    for mode, leaks in (("drop", False), ("mask", False), ("zero", True)):
        method = RegionMask(boxes=(corner,), mode=mode)
        plain, changed = (answers("qwen3_vl", method, 4, change) for change in (0.0, 1.0))
        assert torch.equal(plain, changed) != leaks, mode


# --------------------------------------------------------------------------------------------------------------- rates


def test_the_published_rates_are_means_over_categories():
    gone = {key: [1, 1, 1] for key in ("name", "birth date", "address")}
    left = {key: [0, 0] for key in ("ssn", "record", "mail", "account")}
    rates, mean = removal_rates({**gone, **left})
    assert mean == pytest.approx(3 / 7) and round(100 * mean, 1) == 42.9
    assert rates["name"] == 1.0 and rates["ssn"] == 0.0
    rates, mean = removal_rates({**gone, **{key: [1, 1, 1, 1, 0] for key in left}})
    assert mean == pytest.approx(3 / 7 + 0.8 * 4 / 7) and round(100 * mean, 2) == 88.57


def test_categories_weigh_the_same_however_many_entries_they_have():
    assert removal_rates({"a": [True] * 9, "b": [False]})[1] == 0.5


@pytest.mark.parametrize("removed", [{}, {"a": []}, {"a": [1], "b": []}])
def test_rates_of_nothing_are_an_error(removed):
    with pytest.raises(InputError, match="nothing to average"):
        removal_rates(removed)
