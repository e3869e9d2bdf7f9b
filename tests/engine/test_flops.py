"""The count of operations reproduces the numbers that papers print."""

from __future__ import annotations

import pytest

from mmtoken.compressors import TransPrune, VLAPruner
from mmtoken.engine.flops import DecoderShape, multiply_adds, prefill_flops
from mmtoken.tokens import kept_count
from tests.backbones.tiny_models import config

VICUNA = DecoderShape(layers=32, width=4096, mlp_width=11008, query_width=4096, key_width=4096)


@pytest.mark.parametrize(
    ("step", "dense", "width"), [(1, [], 2 * 48), (1, [0], (3 * 96 + 96) // 4), (2, [], 96), (3, [], 96)]
)
def test_of_experts_only_those_count_that_a_token_visits(step: int, dense: list[int], width: int) -> None:
    text = config("qwen3_vl_moe").get_text_config()
    text.decoder_sparse_step, text.mlp_only_layers, text.intermediate_size = step, dense, 96
    assert DecoderShape.from_config(text).mlp_width == width
    text.moe_intermediate_size = 24
    sparse = 4 // step - len(dense)
    assert DecoderShape.from_config(text).mlp_width == (sparse * 2 * 24 + (4 - sparse) * 96) // 4


def lengths(total: int, cuts: dict[int, int]) -> list[list[int]]:
    """Tokens in each layer of a prompt of `total` tokens, `cuts` tokens from each layer on."""
    rows, n = [], total
    for layer in range(VICUNA.layers):
        n = cuts.get(layer, n)
        rows.append([n])
    return rows


def transprune(total: int, layers: tuple[int, int, int] | None = None) -> list[list[int]]:
    """Image tokens that each layer processes under the paper's setting."""
    method = TransPrune() if layers is None else TransPrune(layers=layers)
    cuts = method.cut_layers(VICUNA.layers)
    return lengths(total, {layer: method.count(total, stage, 3, 1) for stage, layer in enumerate(cuts)})


@pytest.mark.parametrize(
    ("counted", "printed", "exact"),
    [
        (lengths(576, {}), 3.82, 3.81715),
        (transprune(576), 1.56, 1.55718),
        (lengths(2880, {}), 20.83, 20.82522),
        (transprune(2880), 8.33, 8.33032),
        (transprune(576, (5, 7, 10)), 1.35, 1.34783),
        (transprune(576, (6, 8, 11)), 1.45, 1.45251),
        (transprune(576, (7, 9, 12)), 1.56, 1.55718),
        (transprune(576, (8, 10, 13)), 1.66, 1.66185),
        (transprune(576, (9, 11, 14)), 1.77, 1.76652),
    ],
)
def test_transprune_prints_these_teraflops(counted: list[list[int]], printed: float, exact: float) -> None:
    found = multiply_adds(VICUNA, counted) / 1e12
    assert found == pytest.approx(exact, abs=6e-6)
    assert round(found, 2) == printed


@pytest.mark.parametrize(
    ("keep", "exact", "printed"),
    [(1.0, 1.90672, 1.906), (0.5, 1.14169, 1.139), (0.25, 0.76210, 0.758), (0.125, 0.57304, 0.571)],
)
def test_vla_pruner_prints_these_teraflops(keep: float, exact: float, printed: float) -> None:
    # 256 visual tokens among 291; three full layers, as "K = 3" counts from 0.
    left = 291 - 256 + kept_count(keep, 256)
    (cut,) = VLAPruner(keep=keep).cut_layers(VICUNA.layers)
    found = multiply_adds(VICUNA, lengths(291, {cut: left})) / 1e12
    assert found == pytest.approx(exact, abs=6e-6)
    assert found == pytest.approx(printed, rel=6e-3)


def test_two_full_layers_would_not_reproduce_vla_pruners_numbers() -> None:
    found = multiply_adds(VICUNA, lengths(291, {2: 35 + 128})) / 1e12
    assert found == pytest.approx(1.11531, abs=6e-6) and abs(found - 1.139) > 0.02


def test_the_report_counts_a_multiply_add_twice() -> None:
    counted = transprune(576)
    assert prefill_flops(VICUNA, counted) == 2 * multiply_adds(VICUNA, counted)
    grouped = DecoderShape(layers=32, width=4096, mlp_width=11008, query_width=4096, key_width=1024)
    assert prefill_flops(grouped, counted) < 2 * multiply_adds(grouped, counted)
