"""The controls: spread evenly, drawn by content, made smaller."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtoken import compress
from mmtoken.compressors import Downscale, Random, UniformGrid
from mmtoken.compressors.controls import fit, lattice, spread
from mmtoken.errors import InputError
from mmtoken.tokens import VisualTokens, kept_count
from tests.backbones import tiny_models
from tests.compressors.batches import act, make


def on_grid(*grids: tuple[int, int, int], width: int = 3, seed: int = 0) -> tuple[VisualTokens, object]:
    """Tokens of items on these grids, and a context."""
    sizes = [math.prod(grid) for grid in grids]
    tokens, context = make(sizes, seed, width=width)
    return VisualTokens.from_features(tokens.features, valid=tokens.valid, grid=grids), context


# -------------------------------------------------------------------------------------------------------------- Random


def test_the_same_content_loses_the_same_tokens_and_other_content_others():
    tokens, context = make([40, 40, 40])
    context.seeds = [7, 8, 7]
    kept = [row.tolist() for row in act(Random(keep=0.5), tokens, context).kept()]
    assert kept[0] == kept[2] != kept[1]


def test_another_seed_is_another_draw():
    tokens, context = make([40])
    draws = {tuple(act(Random(keep=0.5, seed=seed), tokens, context).kept()[0].tolist()) for seed in range(20)}
    assert len(draws) == 20


def test_every_token_has_the_same_chance():
    tokens, context = make([20] * 2000)
    context.seeds = list(range(2000))
    times = torch.zeros(20)
    for kept in act(Random(keep=5), tokens, context).kept():
        times[kept] += 1
    # 500 expected, standard deviation 19.
    assert bool(((times - 500).abs() < 100).all())


def test_the_global_generator_is_neither_read_nor_moved():
    tokens, context = make([40])
    torch.manual_seed(0)
    first = act(Random(keep=0.5), tokens, context).source
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(act(Random(keep=0.5), tokens, context).source, first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture(scope="module")
def llava():
    return tiny_models.build("llava")


@torch.no_grad()
def test_an_image_loses_the_same_tokens_alone_in_a_batch_and_on_every_beam(llava):
    batch = tiny_models.inputs(llava, "llava", case="multi_image")
    with compress(llava, Random(keep=0.5)) as session:
        llava(**batch)
        together = [kept.tolist() for kept in session.report.kept]
        alone = tiny_models.inputs(llava, "llava", case="single")
        for pixels, kept in zip(batch["pixel_values"], together, strict=True):
            llava(**{**alone, "pixel_values": pixels[None]})
            assert session.report.kept[0].tolist() == kept
        assert len({tuple(kept) for kept in together}) == 3
        # One image per row: transformers 5.17 hands images of other rows to beams of rows with several.
        batch = tiny_models.inputs(llava, "llava", case="plain")
        llava(**batch)
        first, second = (kept.tolist() for kept in session.report.kept)
        llava.generate(**batch, num_beams=3, max_new_tokens=2, do_sample=False)
        assert [kept.tolist() for kept in session.report.kept] == [first] * 3 + [second] * 3


@torch.no_grad()
def test_a_bare_decoder_draws_by_the_prompt():
    model = tiny_models.build("llama")
    ids = torch.arange(10, 34)[None].repeat(2, 1)
    ids[1, 0] = 9
    visual = torch.zeros(2, 24, dtype=torch.bool)
    visual[:, 2:20] = True
    with compress(model, Random(keep=0.5), visual=visual) as session:
        model(input_ids=ids)
        first, second = (kept.tolist() for kept in session.report.kept)
    with compress(model, Random(keep=0.5), visual=visual[:1]) as session:
        model(input_ids=ids[1:])
        assert session.report.kept[0].tolist() == second != first


# --------------------------------------------------------------------------------------------------------- UniformGrid


@given(st.integers(1, 400), st.data())
def test_spread_numbers_are_distinct_centred_and_even(total, data):
    count = data.draw(st.integers(1, total))
    numbers = spread(count, total)
    assert len(numbers) == count and numbers == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] < total
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs((numbers[0] + 0.5) - (total - numbers[-1] - 0.5)) <= 1  # as much before as behind


def test_spread_examples():
    assert (
        spread(1, 9) == [4] and spread(3, 9) == [1, 4, 7] and spread(9, 9) == list(range(9)) and spread(2, 5) == [1, 3]
    )


@given(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)), st.data())
def test_a_lattice_has_exactly_the_count_and_no_index_twice(grid, data):
    total = math.prod(grid)
    count = data.draw(st.integers(1, total))
    chosen = lattice(count, grid)
    assert len(chosen) == len(set(chosen)) == count and chosen == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] < total
    area = grid[1] * grid[2]
    per_frame = [sum(index // area == frame for index in chosen) for frame in range(grid[0])]
    assert max(per_frame) - min(per_frame) <= 1
    for frame in range(grid[0]):
        rows = [index // grid[2] for index in chosen if index // area == frame]
        filled = [rows.count(row) for row in set(rows)]
        assert not filled or max(filled) - min(filled) <= 1


def test_a_square_lattice_is_square():
    assert lattice(4, (1, 4, 4)) == [5, 7, 13, 15]
    assert lattice(16, (1, 4, 4)) == list(range(16)) and lattice(1, (1, 3, 3)) == [4]
    assert lattice(2, (4, 1, 1)) == [1, 3]
    assert len(set(lattice(10, (1, 2, 9)))) == 10  # a single band of nine columns would not hold them


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    st.one_of(st.integers(1, 80), st.floats(0.01, 1.0)),
)
def test_a_grid_is_sampled_by_its_lattice_and_other_items_along_their_sequence(grids, keep):
    tokens, context = on_grid(*grids)
    left = act(UniformGrid(keep=keep), tokens, context)
    assert left.counts() == tokens.budget(keep)
    for kept, grid in zip(left.kept(), grids, strict=True):
        assert kept.tolist() == lattice(kept_count(keep, math.prod(grid), grid[0]), grid)
    without = VisualTokens.from_features(tokens.features, valid=tokens.valid)
    for kept, grid in zip(act(UniformGrid(keep=keep), without, context).kept(), grids, strict=True):
        assert kept.tolist() == spread(kept_count(keep, math.prod(grid)), math.prod(grid))


# ----------------------------------------------------------------------------------------------------------- Downscale


def test_two_by_two_cells_become_their_means_at_their_middle():
    tokens, context = on_grid((1, 4, 4))
    left = act(Downscale(keep=0.25), tokens, context)
    square = tokens.features[0].view(2, 2, 2, 2, 3)
    torch.testing.assert_close(left.features[0], square.mean((1, 3)).flatten(0, 1))
    assert left.source[0].tolist() == [5, 7, 13, 15] and left.size[0].tolist() == [4.0] * 4


def test_a_video_shrinks_frame_by_frame_and_below_a_token_per_frame_over_frames_too():
    tokens, context = on_grid((4, 2, 2))
    left = act(Downscale(keep=0.25), tokens, context)
    torch.testing.assert_close(left.features[0], tokens.features[0].view(4, 4, 3).mean(1))
    assert left.item[0].tolist() == [0, 1, 2, 3]
    fewer = act(Downscale(keep=2 / 16), tokens, context)
    torch.testing.assert_close(fewer.features[0], tokens.features[0].view(2, 8, 3).mean(1))
    assert fewer.counts() == [2] and fewer.size[0].tolist() == [8.0, 8.0]


def test_tokens_on_no_grid_are_pooled_along_their_sequence():
    tokens, context = make([12], width=3)
    left = act(Downscale(keep=3), tokens, context)
    torch.testing.assert_close(left.features[0], tokens.features[0].view(3, 4, 3).mean(1))
    assert left.source[0].tolist() == [2, 6, 10]


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.one_of(st.integers(1, 60), st.floats(0.01, 1.0)),
)
def test_a_smaller_grid_fits_the_budget_and_its_means_lie_within_the_values(grid, keep):
    tokens, context = on_grid(grid)
    left = act(Downscale(keep=keep), tokens, context)
    assert 1 <= left.counts()[0] <= tokens.budget(keep)[0]
    assert left.source[0].tolist() == sorted(set(left.source[0].tolist()))
    low, high = tokens.features[0].amin(0), tokens.features[0].amax(0)
    assert bool(((left.features[0] >= low - 1e-5) & (left.features[0] <= high + 1e-5)).all())
    assert math.isclose(float(left.size.sum()), math.prod(grid), rel_tol=1e-5)


@given(st.integers(1, 1200), st.integers(1, 40), st.integers(1, 40))
def test_the_grid_that_fits_is_within_budget_and_no_row_or_column_more_would_fit(budget, height, width):
    rows, columns = fit(budget, height, width)
    assert 1 <= rows <= height and 1 <= columns <= width and rows * columns <= max(1, budget)
    assert rows == height or (rows + 1) * columns > budget
    assert columns == width or rows * (columns + 1) > budget


def test_an_image_keeps_its_shape_and_loses_pixels():
    image = Image.new("RGB", (400, 200))
    assert Downscale(keep=0.25).prepare(image).size == (200, 100)
    assert Downscale(keep=25, token_pixels=784).prepare(image).size == (197, 98)  # 25 * 784 pixels at most
    assert Downscale(keep=1.0).prepare(image) is image and Downscale(keep=9999).prepare(image) is image


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=20)
def test_a_prepared_image_is_never_larger_and_never_empty(width, height, keep):
    small = Downscale(keep=keep).prepare(Image.new("L", (width, height)))
    assert 1 <= small.size[0] <= width and 1 <= small.size[1] <= height
    if min(small.size) > 1:
        assert small.size[0] * small.size[1] <= keep * width * height


def test_lists_of_images_keep_their_nesting():
    image = Image.new("RGB", (40, 20))
    out = Downscale(keep=0.25).prepare([image, [image, image], (image,)])
    assert [type(part).__name__ for part in out] == ["Image", "list", "tuple"]
    assert out[1][1].size == out[2][0].size == (20, 10)


@pytest.mark.parametrize("media", ["cat.png", None, torch.zeros(3, 4, 4), [None]])
def test_what_is_no_image_is_refused_by_its_type(media):
    with pytest.raises(InputError, match=r"media is a (str|NoneType|Tensor); give PIL images"):
        Downscale(keep=0.5).prepare(media)
