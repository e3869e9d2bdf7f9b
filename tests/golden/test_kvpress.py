"""Five presses against their official code, through the hooks of a bare decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mmtoken import compress
from mmtoken.compressors import TOVA, Compressor, ExpectedAttention, KeyDiff, Knorm, SnapKV
from tests.golden.case import GoldenCase
from tests.golden.models import llama

METHOD = "kvpress"


def snapkv(keep: float, settings: dict[str, Any]) -> Compressor:
    return SnapKV(keep=keep, window=settings["window_size"], kernel=settings["kernel_size"], variant="repo")


def expected_attention(keep: float, settings: dict[str, Any]) -> Compressor:
    return ExpectedAttention(
        keep=keep,
        future=settings["n_future_positions"],
        sinks=settings["n_sink"],
        covariance=settings["use_covariance"],
        value_norm=settings["use_vnorm"],
        epsilon=settings["epsilon"],
        variant="repo",
    )


# Name in the files: the compressor, and the public function whose scores it ranks by.
PRESSES: dict[str, tuple[Callable[[float, dict[str, Any]], Compressor], str]] = {
    "knorm": (lambda keep, _: Knorm(keep=keep, variant="repo"), "knorm.knorm_scores"),
    "snapkv": (snapkv, "snapkv.snapkv_scores"),
    "expected_attention": (expected_attention, "expectedattention.expected_attention_scores"),
    "keydiff": (lambda keep, _: KeyDiff(keep=keep, variant="repo"), "keydiff.keydiff_scores"),
    "tova": (lambda keep, _: TOVA(keep=keep, variant="repo"), "tova.tova_scores"),
}


@pytest.mark.golden
def test_presses_give_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Scores, kept positions per head, and which entries the shortened cache holds, per press and layer."""
    settings, ids = case.settings, case.take("input.input_ids")
    model = llama(case)
    for name, (make, function) in PRESSES.items():
        if not case.expects(f"expected.{name}.layer0.score"):
            continue
        method = make(1.0 - settings["compression_ratio"], settings.get(name, {}))
        scores: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(recorded(function, scores))
            session = stack.enter_context(compress(model, method, visual=torch.ones_like(ids, dtype=torch.bool)))
            cache = model(ids, use_cache=True).past_key_values
        dense = model(ids, use_cache=True).past_key_values
        assert len(scores) == len(model.model.layers)
        for layer, score in enumerate(scores):
            prefix = f"expected.{name}.layer{layer}"
            case.compare(f"{prefix}.score", score, "scores")
            heads = session.report.sites[layer].heads
            assert heads is not None
            kept = torch.stack(heads[0])
            assert kept.shape[1] == settings["kept"]
            case.compare(f"{prefix}.kept", kept)
            # The product stores entries by position, not by score.
            assert torch.equal(
                cache.layers[layer].keys[0],
                dense.layers[layer]
                .keys[0]
                .gather(1, kept[..., None].expand(-1, -1, cache.layers[layer].keys.shape[-1])),
            )
            check_order(case, f"{prefix}.cache_positions_in_cache_order", kept, score)
    case.settle()


def check_order(case: GoldenCase, name: str, kept: Tensor, score: Tensor) -> None:
    """The official cache is sorted by falling score; entries whose scores are equal up to rounding may swap places.

    (Repeated tokens have keys of equal length, and protected entries have one score for all.)
    """
    official = case.tensors[name]
    case.compared[name] = "scores"
    assert torch.equal(official.sort().values, kept), f"{name}: {official.tolist()} holds others than {kept.tolist()}"
    falling = score.gather(1, kept).sort(descending=True).values
    excess = (score.gather(1, official) - falling).abs() - case.tolerance("scores", falling)
    assert bool((excess <= 0).all()), f"{name}: {official.tolist()} is not the order of falling scores"


def recorded(function: str, calls: list[Tensor]) -> Any:
    """Note what a public function returns to the method; it is called by name, so a patch reaches it."""
    from importlib import import_module

    module, name = function.split(".")
    real = getattr(import_module(f"mmtoken.compressors.{module}"), name)

    def note(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(real(*args, **kwargs).clone())
        return calls[-1].clone()

    return patch(f"mmtoken.compressors.{module}.{name}", note)
