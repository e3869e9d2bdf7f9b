"""PyramidDrop's stages and budgets; its numbers are held against the official code in tests/golden."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtoken.compressors import PyramidDrop
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import kept_count
from tests.compressors.batches import make


def counts(method: PyramidDrop, length: int, depth: int = 8) -> list[int]:
    """Tokens of one item left after each stage."""
    tokens, context = make([length])
    context.depth = depth
    left = []
    for layer in method.cut_layers(depth):
        tokens = method.llm_layer(tokens, layer, context)
        left += tokens.counts()
    return left


def test_three_stages_at_an_eighth_are_the_papers_halves():
    assert counts(PyramidDrop(), 64) == [32, 16, 8]
    assert counts(PyramidDrop(), 576, depth=32) == [288, 144, 72]
    assert PyramidDrop().cut_layers(32) == (8, 16, 24)


@pytest.mark.parametrize(("depth", "layers"), [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (8, (2, 4, 6)), (9, (2, 4, 6))])
def test_default_layers_are_at_the_quarters_of_any_decoder(depth, layers):
    assert PyramidDrop().cut_layers(depth) == layers


def test_a_decoder_of_one_layer_cannot_be_cut():
    with pytest.raises(UnsupportedError, match="a decoder of 1 layers"):
        PyramidDrop().cut_layers(1)


@pytest.mark.parametrize("layers", [(8,), (2, 9)])
def test_layers_that_the_decoder_does_not_have_are_refused(layers):
    with pytest.raises(UnsupportedError, match=rf"layers={layers[-1]} but this decoder has 8 layers"):
        PyramidDrop(layers=layers).cut_layers(8)


def test_shares_for_another_number_of_stages_are_refused():
    with pytest.raises(MMTokenError, match=r"has 1 stages but layers=\(1, 2\) 2"):
        PyramidDrop(keep=0.5, layers=(1, 2), shares=(0.5,))
    with pytest.raises(MMTokenError, match=r"has 2 stages but layers=\(2, 4, 6\) 3"):
        PyramidDrop(keep=0.5, shares=(0.7, 0.5)).cut_layers(8)


def test_shares_that_end_elsewhere_than_keep_are_refused_with_the_value_to_give():
    with pytest.raises(MMTokenError, match=r"keep=0\.125 .* give keep=0\.3"):
        PyramidDrop(layers=(1, 3), shares=(0.6, 0.3))
    with pytest.raises(MMTokenError, match=r"keep=8 "):
        PyramidDrop(keep=8, layers=(1, 3), shares=(0.6, 0.3))


def test_shares_count_original_tokens_and_only_the_official_variant_truncates():
    paper = PyramidDrop(keep=0.3, layers=(1, 3), shares=(0.6, 0.3))
    repo = PyramidDrop(keep=0.3, layers=(1, 3), shares=(0.6, 0.3), variant="repo")
    assert counts(paper, 25) == [15, 8] and counts(repo, 25) == [15, 7]
    assert counts(paper, 26) == [16, 8] and counts(repo, 26) == [15, 7]


@given(
    length=st.integers(1, 300),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 320)),
    layers=st.sets(st.integers(1, 11), min_size=1, max_size=6),
)
def test_stages_are_a_geometric_series_that_ends_at_the_budget(length, keep, layers):
    method = PyramidDrop(keep=keep, layers=tuple(sorted(layers)))
    left = [method._count(length, stage, len(layers), 1) for stage in range(len(layers))]
    final = kept_count(keep, length)
    assert left[-1] == final and left == sorted(left, reverse=True)
    fraction = keep if isinstance(keep, float) else min(1.0, keep / length)
    for stage, count in enumerate(left):
        ideal = length * fraction ** ((stage + 1) / len(layers))
        assert abs(count - max(1.0, ideal)) <= 0.5 + 1e-6 or count == final


def test_each_stage_looks_again_at_what_is_left():
    tokens, context = make([16])
    method = PyramidDrop(keep=0.25, layers=(2, 4))
    first = method.llm_layer(tokens, 2, context)
    context.received = -context.received  # the next layer thinks otherwise
    second = method.llm_layer(first, 4, context)
    worst = sorted(first.kept()[0].tolist(), key=lambda i: float(-context.received[0, i]))[:4]
    assert second.kept()[0].tolist() == sorted(worst) and context.asked == ("next_attention",) * 2


def test_a_video_counts_tokens_per_step():
    method = PyramidDrop(keep=2, layers=(1, 2))
    assert method._count(40, 1, 2, steps=4) == 8
    assert method._count(40, 0, 2, steps=4) == math.floor(40 * (8 / 40) ** 0.5 + 0.5)
