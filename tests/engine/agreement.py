"""What the engine's tests share: cached tiny models, the compressors under test, and one tolerance."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtoken.compressors import DivPrune, Downscale, FastV, PyramidDrop, Random, ToMe, UniformGrid, VisionZip
from mmtoken.compressors.base import Compressor
from mmtoken.engine.report import Report
from tests import oracle
from tests.backbones.tiny_models import CASES, CELLS, build

BEFORE_DECODER: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "uniformgrid": UniformGrid(keep=0.4),
    "random": Random(keep=0.4),
    "visionzip": VisionZip(keep=0.4),
    "tome": ToMe(keep=0.6),
    "downscale": Downscale(keep=0.4),
}
"""Compressors that act before the decoder, so that a shorter prompt exists."""

INSIDE_DECODER: dict[str, Compressor] = {"fastv": FastV(keep=0.4), "pyramiddrop": PyramidDrop(keep=0.25)}

BATCHES = tuple(case for case in CASES if case != "single")
QWEN = ("qwen2_5_vl", "qwen3_vl")

cells = pytest.mark.parametrize(("family", "modality"), CELLS, ids=[f"{f}-{m}" for f, m in CELLS])


@functools.cache
def tiny(family: str, attn: str = "sdpa") -> nn.Module:
    """One model per family for all tests that leave it as it was."""
    return build(family, attn)


def hosts(family: str) -> list[str]:
    """Names in `BEFORE_DECODER` that a family can host."""
    return [name for name in BEFORE_DECODER if not (name == "downscale" and family in QWEN)]


def assert_close(got: Tensor, want: Tensor) -> None:
    """1e-5 x max(1, largest entry), in float32."""
    error, scale = oracle.max_error(got, want), max(1.0, float(want.float().abs().max()))
    assert error <= 1e-5 * scale, f"differs by {error:.2e} at entries up to {scale:.1f}"


def left_in_layers(report: Report, batch: Mapping[str, Any], depth: int) -> dict[int, Tensor]:
    """Per decoder layer bool[B, L], False at visual tokens that a report says the layer did not see.

    For cuts between layers: the sites of the report name the layers.
    """
    shape = batch["input_ids"].shape
    keep = {}
    for layer in range(depth):
        left = torch.ones(shape, dtype=torch.bool)
        done = [site for site in report.sites if site.layer is None or site.layer <= layer]
        if done:
            for row, places, kept in zip(report.item_rows, report.places, done[-1].kept, strict=True):
                gone = torch.ones(len(places), dtype=torch.bool)
                gone[kept] = False
                left[row, places[gone & _counted(report, places, row)]] = False
        keep[layer] = left
    return keep


def _counted(report: Report, places: Tensor, row: int) -> Tensor:
    """bool[N]: which of an item's tokens are not separators (these are never dropped)."""
    assert report.tokens is not None
    item = next(i for i, p in enumerate(report.places) if p is places)
    flags = torch.ones(len(places), dtype=torch.bool)
    tokens = report.tokens
    where = tokens.valid[item] & tokens.protected[item]
    flags[tokens.source[item][where]] = False
    return flags
