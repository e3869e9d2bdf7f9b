"""QueCC by hand, and against plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmtoken import MMTokenError, VisualTokens
from mmtoken.compressors import Context, QueCC
from mmtoken.compressors.base import Dims
from mmtoken.compressors.quecc import QueCCParts, windows
from mmtoken.errors import KeepError, UnsupportedError
from mmtoken.tokens import Grid
from tests.compressors.batches import item

DIMS = Dims(tower=6, tokens=8, llm=5, blocks=23)


class Model(Context):
    """A tower and a language model whose answers are given."""

    depth, blocks, tokenwise_projector = 23, 24, True

    def __init__(self, levels: Tensor, text: Tensor, parts: QueCCParts) -> None:
        self.levels, self.text_state, self.learned = levels, text, parts

    def tower_features(self, tokens: VisualTokens, blocks: Sequence[int]) -> Tensor:
        return self.levels

    def question_state(self, tokens: VisualTokens) -> Tensor:
        return self.text_state


def parts_of(method: QueCC, seed: int = 0) -> QueCCParts:
    torch.manual_seed(seed)
    return method.build(DIMS)


def batch(grids: list[Grid | None], lengths: list[int], separators: Sequence[int] = (), seed: int = 0) -> Any:
    """Tokens with NaN as padding, features of four blocks, texts."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(valid)
    protected[:, list(separators)] = True

    def random(width: int) -> Tensor:
        values = torch.randn(len(lengths), max(lengths), width, generator=generator)
        return values.masked_fill(~valid[..., None], torch.nan)

    tokens = VisualTokens.from_features(random(8), valid=valid, protected=protected & valid, grid=tuple(grids))
    return tokens, random(24), torch.randn(len(lengths), 5, generator=generator)


@pytest.mark.parametrize(("keep", "kernel"), [(1.0, 1), (0.99, 2), (0.25, 2), (0.2499, 3), (1 / 9, 3), (0.0625, 4)])
def test_the_window_is_the_smallest_that_the_budget_allows(keep: float, kernel: int) -> None:
    assert QueCC(keep=keep).kernel == kernel


@pytest.mark.parametrize("kernel", [4, 6, 8, 12, 24])
def test_the_official_grid_gives_the_official_counts(kernel: int) -> None:
    method = QueCC(keep=1 / kernel**2)
    assert method.kernel == kernel
    tokens = VisualTokens.from_features(torch.zeros(1, 576, 1), grid=((1, 24, 24),))
    index, inside, _ = windows(tokens, kernel)
    assert index.shape == (1, (24 // kernel) ** 2, kernel**2) and bool(inside.all())
    assert tokens.budget(method.keep) == [(24 // kernel) ** 2]


def test_blocks_are_those_behind_the_official_hidden_states() -> None:
    assert QueCC().tower_layers(23, 24) == (11, 15, 21, 22)
    assert QueCC().tower_layers(3, 4) == (1, 2)
    assert QueCC(levels=(0, 3)).tower_layers(3, 4) == (0, 3)
    with pytest.raises(UnsupportedError, match=r"levels=4 but this tower has 4 blocks; choose from 0 to 3"):
        QueCC(levels=(4,)).tower_layers(3, 4)


def by_hand(parts: QueCCParts, kernel: int, grid: Grid, values: Tensor, levels: Tensor, text: Tensor) -> list[Tensor]:
    """The tokens of one item, window by window."""
    frames, rows, columns = grid

    def norm(layer: Any, x: Tensor) -> Tensor:
        spread = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / torch.sqrt(spread + 1e-6) * layer.weight + layer.bias

    def mlp(layers: Any, x: Tensor) -> Tensor:
        hidden = functional.gelu(layers[0].weight @ x + layers[0].bias)
        return norm(layers[3], layers[2].weight @ hidden + layers[2].bias)

    shift = norm(parts.text[1], parts.text[0].weight @ text + parts.text[0].bias)
    made = []
    for frame in range(frames):
        for top, start in itertools.product(range(0, rows, kernel), range(0, columns, kernel)):
            pooled = parts.pool.bias.clone()
            keys, found = [], []
            for y, x in itertools.product(range(kernel), range(kernel)):
                if top + y >= rows or start + x >= columns:
                    continue
                place = (frame * rows + top + y) * columns + start + x
                pooled = pooled + parts.pool.weight[:, 0, y, x] * mlp(parts.query, values[place] + shift)
                keys.append(mlp(parts.key, levels[place]))
                found.append(mlp(parts.value, levels[place]))
            made.append(attend(parts.attention, pooled, torch.stack(keys), torch.stack(found)))
    return made


def attend(attention: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    width, heads = len(query), attention.num_heads
    weights, biases = attention.in_proj_weight.split(width), attention.in_proj_bias.split(width)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, keys, values), weights, biases, strict=True))
    size = width // heads
    found = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        shares = (k[:, part] @ q[part] / math.sqrt(size)).softmax(0)
        found.append(shares @ v[:, part])
    return attention.out_proj.weight @ torch.cat(found) + attention.out_proj.bias


@pytest.mark.parametrize("kernel", [1, 2, 3])
@torch.no_grad()
def test_windows_of_any_grid_are_those_of_plain_loops(kernel: int) -> None:
    grids: list[Grid | None] = [(1, 6, 6), (2, 3, 5), (1, 4, 7)]
    lengths = [36, 30, 28]
    tokens, levels, text = batch(grids, lengths)
    method = QueCC(keep=1 / kernel**2, heads=2)
    parts = parts_of(method)
    left = method.project(tokens, lambda same: same.replace(features=same.features * 2), Model(levels, text, parts))
    for row, (grid, length) in enumerate(zip(grids, lengths, strict=True)):
        wanted = by_hand(parts, kernel, grid, tokens.features[row, :length], levels[row, :length], text[row])
        got = item(left, row)
        assert len(got["source"]) == len(wanted) == grid[0] * -(-grid[1] // kernel) * -(-grid[2] // kernel)
        assert float(got["size"].sum()) == length
        torch.testing.assert_close(got["features"], 2 * torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_a_token_stands_next_to_the_centre_of_its_window_and_for_all_of_it() -> None:
    tokens, levels, text = batch([(1, 5, 4)], [20])
    method = QueCC(keep=1 / 9, heads=1)
    left = item(method.project(tokens, lambda same: same, Model(levels, text, parts_of(method))), 0)
    # windows of 3 x 3, 3 x 1, 2 x 3 and 2 x 1 patches of a grid with 4 columns
    assert left["source"].tolist() == [5, 7, 17, 19]
    assert left["size"].tolist() == [9.0, 3.0, 6.0, 2.0]


def test_separators_pass_by_and_belong_to_no_window() -> None:
    tokens, levels, text = batch([(1, 4, 4)], [17], separators=[0])
    plain = VisualTokens.from_features(tokens.features[:, 1:], grid=((1, 4, 4),))
    method = QueCC(keep=0.25, heads=1)
    parts = parts_of(method)
    left = item(method.project(tokens, lambda same: same, Model(levels, text, parts)), 0)
    other = item(method.project(plain, lambda same: same, Model(levels[:, 1:], text, parts)), 0)
    assert torch.equal(left["features"][0], tokens.features[0, 0]) and bool(left["protected"][0])
    assert torch.equal(left["source"][1:], other["source"] + 1)
    torch.testing.assert_close(left["features"][1:], other["features"])


def test_items_that_are_no_grid_have_windows_in_a_line() -> None:
    tokens, _levels, _text = batch([None, (1, 1, 4)], [10, 4])
    index, inside, centre = windows(tokens, 2)
    assert index[0][inside[0]].tolist() == list(range(10))
    assert inside.sum(-1).tolist() == [[4, 4, 2], [2, 2, 0]]
    assert index.gather(2, centre[..., None])[0, :, 0].tolist() == [1, 5, 9]


def test_tokens_that_are_gone_leave_holes() -> None:
    tokens, _levels, _text = batch([(1, 4, 4)], [16])
    some = tokens.where((tokens.source % 4 < 2) & (tokens.source != 0))
    index, inside, _ = windows(some, 2)
    assert some.source[0, index[0][inside[0]]].tolist() == [1, 4, 5, 8, 9, 12, 13]
    assert inside[0].tolist() == [[False, True, True, True], [True] * 4]


@torch.no_grad()
def test_a_patch_moves_its_own_window_only_and_the_question_moves_all() -> None:
    tokens, levels, text = batch([(1, 6, 6)], [36])
    method = QueCC(keep=1 / 9, heads=2)
    parts = parts_of(method)

    def run(features: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        some = tokens.replace(features=features)
        return method.project(some, lambda same: same, Model(levels, text, parts)).features[0]

    plain = run(tokens.features, levels, text)
    changed, deeper = tokens.features.clone(), levels.clone()
    changed[0, 22] += 1  # row 3, column 4: the last window
    deeper[0, 22] += 1
    for moved in (run(changed, levels, text), run(tokens.features, deeper, text)):
        assert (moved != plain).any(-1).tolist() == [False, False, False, True]
    assert bool((run(tokens.features, levels, text + 1) != plain).any(-1).all())


@torch.no_grad()
def test_windows_of_one_patch_do_not_depend_on_the_query() -> None:
    tokens, levels, text = batch([(1, 2, 3)], [6])
    method = QueCC(keep=1.0, heads=2)
    parts = parts_of(method)
    left = method.project(tokens, lambda same: same, Model(levels, text, parts))
    value = parts.value(levels) @ parts.attention.in_proj_weight[16:].T + parts.attention.in_proj_bias[16:]
    torch.testing.assert_close(left.features, parts.attention.out_proj(value), rtol=1e-5, atol=1e-5)
    other = method.project(tokens, lambda same: same, Model(levels, text * 9, parts))
    torch.testing.assert_close(other.features, left.features)


@torch.no_grad()
def test_permuted_windows_permute_the_tokens() -> None:
    tokens, levels, text = batch([(1, 4, 4)], [16])
    method = QueCC(keep=0.25, heads=2)
    parts = parts_of(method)
    corners = torch.tensor([0, 1, 4, 5])
    blocks = [corners + shift for shift in (0, 2, 8, 10)]
    order = torch.empty(16, dtype=torch.long)
    for place, source in zip(blocks, [blocks[i] for i in (2, 0, 3, 1)], strict=True):
        order[place] = source
    straight = method.project(tokens, lambda same: same, Model(levels, text, parts)).features[0]
    moved = tokens.replace(features=tokens.features[:, order])
    swapped = method.project(moved, lambda same: same, Model(levels[:, order], text, parts)).features[0]
    torch.testing.assert_close(swapped, straight[[2, 0, 3, 1]])


def test_gradients_reach_every_part_and_none_is_lost_to_padding() -> None:
    tokens, levels, text = batch([(1, 4, 4), (1, 3, 2)], [16, 6])
    method = QueCC(keep=0.25, heads=2)
    parts = parts_of(method)
    left = method.project(tokens, lambda same: same, Model(levels, text, parts))
    (left.features[left.valid] ** 2).sum().backward()
    for name, value in parts.named_parameters():
        assert value.grad is not None and bool(value.grad.isfinite().all()), name
        assert bool((value.grad != 0).any()), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("levels", value) for value in ("5", 5, (), (-1,), (True,), (1.0,))),
        *(("heads", value) for value in (0, True, 2.0, None)),
    ],
)
def test_a_bad_setting_names_itself_and_a_way_out(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=rf"{field}=.*give"):
        dataclasses.replace(QueCC(), **{field: value})


def test_counts_are_refused_and_heads_must_divide_the_width() -> None:
    with pytest.raises(MMTokenError, match=r"keep=36 is a count.*give 1 / k\^2 as a float"):
        QueCC(keep=36)
    with pytest.raises(KeepError, match="keep=0"):
        QueCC(keep=0)
    with pytest.raises(MMTokenError, match="heads=3 does not divide the width 8 of the tokens; give"):
        QueCC(heads=3).build(DIMS)
