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
from tests.backbones.tiny_models import CASES, CELLS, DYNAMIC, OPAQUE, build

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

cells = pytest.mark.parametrize(("family", "modality"), CELLS, ids=[f"{f}-{m}" for f, m in CELLS])


@functools.cache
def tiny(family: str, attn: str = "sdpa") -> nn.Module:
    """One model per family for all tests that leave it as it was."""
    return build(family, attn)


def hosts(family: str) -> list[str]:
    """Names in `BEFORE_DECODER` that a family can host."""
    refused = {"downscale"} if family in DYNAMIC else {"tome"} if family == "openvla" else set()
    if family in OPAQUE:
        refused |= {"visionzip", "tome"}
    return [name for name in BEFORE_DECODER if name not in refused]


def assert_close(got: Tensor, want: Tensor) -> None:
    """1e-5 x max(1, largest entry), in float32."""
    error, scale = oracle.max_error(got, want), max(1.0, float(want.float().abs().max()))
    assert error <= 1e-5 * scale, f"differs by {error:.2e} at entries up to {scale:.1f}"


def tower_of(model: Any) -> tuple[Any, nn.ModuleList, int]:
    """The tower module, its blocks, its heads; of two towers the one for videos."""
    config = model.config
    base = getattr(model, "model", model)
    if hasattr(base, "visual"):
        return base.visual, base.visual.blocks, config.vision_config.num_heads
    tower = getattr(base, "video_tower", getattr(base, "vision_tower", base))
    inner = tower._modules.get("vision_model", tower)
    heads = getattr(config, "vision_config", config).num_attention_heads
    return tower, inner.encoder.layers, heads


def left_in_layers(report: Report, batch: Mapping[str, Any], depth: int) -> dict[int, Tensor]:
    """Per decoder layer bool[B, L], False at visual tokens that a report says the layer did not see."""
    assert report.tokens is not None
    cuts = {site.layer: site.kept for site in report.sites if site.site == "llm_layer"}
    before = [site.kept for site in report.sites if site.site == "llm_input"]
    # Sites before the decoder count in tiles or frames; only the last set counts in tokens of an item.
    now = before[-1] if before else None if cuts else report.kept
    keep = {}
    for layer in range(depth):
        now = cuts.get(layer, now)
        left = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
        for item, kept in enumerate([] if now is None else now):
            gone = torch.ones(len(report.places[item]), dtype=torch.bool)
            gone[kept] = False
            gone[report.separators[item]] = False
            left[report.item_rows[item], report.places[item][gone]] = False
        keep[layer] = left
    return keep
