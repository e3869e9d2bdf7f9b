"""Which compressors, settings and models the contract suites run, and which part of it `make test` runs.

The full product runs under `pytest tests/contract -m ""`. By default pairs outside these are deselected (marker
`contract_full`): every compressor on three anchor backbones and each of its further settings on one, every backbone
under three anchor compressors, and a seeded twentieth of the rest. Pairs of anchors carry the marker `lowest`: the
lowest supported versions run those.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmtoken
from mmtoken import compressors as shelf
from mmtoken.compressors import Compressor, Trained
from mmtoken.engine.report import Report
from tests import oracle
from tests.backbones.tiny_models import ANYRES, CELLS, DYNAMIC, OPAQUE, TOKENWISE, build, inputs
from tests.contract import reference

Cell = tuple[str, str]
"""(family, modality)."""

# The tiny models have four decoder layers. The first setting of a compressor stands for it where one is enough.
COMPRESSORS: dict[str, Compressor] = {
    "fastv": shelf.FastV(keep=0.4, layer=2),
    "fastv-count": shelf.FastV(keep=3, layer=1),
    "fastv-last-layer": shelf.FastV(keep=0.25, layer=3),
    "fastv-renumber": shelf.FastV(keep=0.4, layer=2, positions="renumber"),
    "flowcut": shelf.FlowCut(keep=0.4),
    "flowcut-count": shelf.FlowCut(keep=3, interval=1),
    "flowcut-repo": shelf.FlowCut(keep=0.4, variant="repo", interval=1),
    "flowcut-renumber": shelf.FlowCut(keep=0.4, positions="renumber"),
    "flowcuthr": shelf.FlowCutHR(keep=0.3, layer=2),
    "flowcuthr-renumber": shelf.FlowCutHR(keep=3, layer=1, positions="renumber"),
    "tca": shelf.TCA(keep=0.5),
    "tca-repo": shelf.TCA(keep=3, variant="repo", layers=(1,)),
    "tca-renumber": shelf.TCA(keep=0.5, positions="renumber"),
    "zerotprune": shelf.ZeroTPrune(keep=0.4, similar=2),
    "zerotprune-count": shelf.ZeroTPrune(keep=3, layers=(1,), order="I-S", variance=(0.0, 0.1)),
    "zerotprune-renumber": shelf.ZeroTPrune(keep=0.4, positions="renumber"),
    "pyramiddrop": shelf.PyramidDrop(keep=0.25),
    "pyramiddrop-count": shelf.PyramidDrop(keep=2, layers=(1, 2)),
    "pyramiddrop-shares": shelf.PyramidDrop(keep=0.25, layers=(1, 3), shares=(0.5, 0.25)),
    "pyramiddrop-repo": shelf.PyramidDrop(keep=0.3, layers=(2, 3), variant="repo"),
    "pyramiddrop-renumber": shelf.PyramidDrop(keep=0.25, layers=(1, 3), positions="renumber"),
    "dart": shelf.DART(keep=0.4, visual_pivots=1, text_pivots=2),
    "dart-official": shelf.DART(keep=0.3, layer=1, visual_pivots=2, text_pivots=0, budget_rule="official"),
    "dart-renumber": shelf.DART(keep=0.4, layer=3, positions="renumber"),
    "sparsevlm": shelf.SparseVLM(keep=0.4),
    "sparsevlm-count": shelf.SparseVLM(keep=3, layers=(2,), recycle=0.6, members=2),
    "sparsevlm-repo": shelf.SparseVLM(
        keep=1, positions="renumber", layers=(1, 3), stages=(3, 1), recycle=0.6, members=4, variant="repo"
    ),
    "sparsevlmplus": shelf.SparseVLMPlus(keep=0.4),
    "sparsevlmplus-renumber": shelf.SparseVLMPlus(keep=0.3, layers=(3,), heads=1, positions="renumber"),
    "transprune": shelf.TransPrune(keep=0.25),
    "transprune-count": shelf.TransPrune(keep=3, layers=(2,), accumulate=(0, 1), cosine="signed"),
    "transprune-repo": shelf.TransPrune(keep=0.3, positions="renumber", layers=(2, 3), variant="repo"),
    # No call here makes so many tokens, so this one never leaves its warm-up; `test_episodes` runs those that do.
    "vlapruner": shelf.VLAPruner(keep=0.4, layer=2, action_tokens=16),
    "visionzip": shelf.VisionZip(keep=0.4),
    "visionzip-count": shelf.VisionZip(keep=3, contextual=2),
    "visionzip-repo": shelf.VisionZip(keep=0.5, contextual=2, variant="repo"),
    "visionzip-renumber": shelf.VisionZip(keep=0.4, positions="renumber"),
    "divprune": shelf.DivPrune(keep=0.3),
    "divprune-count": shelf.DivPrune(keep=3),
    "divprune-renumber": shelf.DivPrune(keep=0.3, positions="renumber"),
    "cdpruner": shelf.CDPruner(keep=0.3),
    "cdpruner-count": shelf.CDPruner(keep=3, theta=0.5, sign_flip=True),
    "cdpruner-renumber": shelf.CDPruner(keep=0.3, positions="renumber"),
    "dycoke": shelf.DyCoke(keep=0.3),
    "dycoke-count": shelf.DyCoke(keep=3),
    "dycoke-renumber": shelf.DyCoke(keep=0.3, positions="renumber"),
    "evs": shelf.EVS(keep=0.4),
    "evs-count": shelf.EVS(keep=3),
    "evs-renumber": shelf.EVS(keep=0.4, positions="renumber"),
    "stcpruner": shelf.STCPruner(keep=0.4),
    "stcpruner-dual": shelf.STCPruner(keep=2, score="dual_anchor", memory="window", window=2),
    "stcpruner-keep": shelf.STCPruner(keep=0.4, positions="keep", chunk_frames=2),
    "vidcom2": shelf.VidCom2(keep=0.4),
    "vidcom2-official": shelf.VidCom2(keep=0.45, exact=False),
    "vidcom2-keep": shelf.VidCom2(keep=3, positions="keep", floor=1),
    "holov": shelf.HoloV(keep=0.4, crops=4),
    "holov-count": shelf.HoloV(keep=3),
    "holov-renumber": shelf.HoloV(keep=0.4, positions="renumber"),
    "prumerge": shelf.PruMerge(),
    "prumerge-plus": shelf.PruMerge(plus=True, neighbours=3),
    "prumerge-fixed": shelf.PruMerge(keep=0.4, adaptive=False, neighbours=3),
    "prumerge-fixed-plus": shelf.PruMerge(keep=0.4, adaptive=False, plus=True),
    "prumerge-repo": shelf.PruMerge(keep=0.4, adaptive=False, plus=True, variant="repo"),
    "prumerge-renumber": shelf.PruMerge(keep=0.4, adaptive=False, positions="renumber"),
    "tokencorr": shelf.TokenCorr(keep=0.6, tau_s=0.3, tau_c=0),
    "tokencorr-bounded": shelf.TokenCorr(keep=0.4, low=0, aggregate="prumerge32"),
    "tokencorr-drawn": shelf.TokenCorr(keep=0.6, tau_s=0.3, sampling="multinomial", heads="mean", aggregate="none"),
    "tokencorr-outputs": shelf.TokenCorr(keep=0.5, deep=0, low=1, reading="outputs"),
    "tokencorr-renumber": shelf.TokenCorr(keep=0.6, tau_s=0.3, positions="renumber"),
    "bus": shelf.BUS(keep=0.25),
    "bus-count": shelf.BUS(keep=3, queries="learned", share=0.4, layer=2, decoder_layers=2, normalise=True),
    "bus-renumber": shelf.BUS(keep=0.25, positions="renumber"),
    "quecc": shelf.QueCC(keep=0.25),
    "quecc-renumber": shelf.QueCC(keep=0.25, levels=(0,), positions="renumber"),
    "quota": shelf.QuoTA(keep=0.5, scorer="random", positions="keep"),
    "quota-count": shelf.QuoTA(keep=3, assigner="adaptive_pool", scorer="random"),
    "quota-capped": shelf.QuoTA(keep=0.6, cap=True, most=9, scorer="random"),
    "quota-spread": shelf.QuoTA(keep=0.4, assigner="linspace", scorer="random"),
    "quota-merge": shelf.QuoTA(keep=0.4, assigner="merge", scorer="random"),
    "quota-rows": shelf.QuoTA(keep=0.4, assigner="merge_rows_cols", power=1.0, scorer="random", positions="keep"),
    "trips": shelf.TRIPS(keep=0.4),
    "trips-count": shelf.TRIPS(keep=5, layers=(1, 2), protect_fused=True, temperature=0.1),
    "trips-renumber": shelf.TRIPS(keep=0.4, normalise=True, positions="renumber"),
    "stccacher": shelf.STCCacher(),
    "stccacher-count": shelf.STCCacher(keep=3, interval=3, share_selection=True, similarity="l2"),
    "tome": shelf.ToMe(keep=0.5),
    "tome-count": shelf.ToMe(keep=3),
    "tome-renumber": shelf.ToMe(keep=0.5, positions="renumber"),
    "vispruner": shelf.VisPruner(keep=0.4, step=2),
    "vispruner-count": shelf.VisPruner(keep=3, important=0.7),
    "vispruner-renumber": shelf.VisPruner(keep=0.4, positions="renumber"),
    "videoscan": shelf.VideoScan(),
    "videoscan-visual": shelf.VideoScan(carrier="visual"),
    "videoscan-keep": shelf.VideoScan(positions="keep"),
    "snapkv": shelf.SnapKV(keep=0.4, window=4, kernel=3),
    "snapkv-count": shelf.SnapKV(keep=3, window=2, kernel=5, pooling="max"),
    "knorm": shelf.Knorm(keep=0.4),
    "expectedattention": shelf.ExpectedAttention(keep=0.4, future=16),
    "keydiff": shelf.KeyDiff(keep=0.4),
    "keydiff-blocks": shelf.KeyDiff(keep=0.4, block_size=7),
    "tova": shelf.TOVA(keep=0.4),
    "schedule-visionzip-fastv": shelf.Schedule(keep=0.3, parts=(shelf.VisionZip(), shelf.FastV()), ratios=(2.0, 1.0)),
    "schedule-flowcut-visionzip": shelf.Schedule(
        keep=0.3, parts=(shelf.FlowCut(), shelf.VisionZip()), ratios=(2.0, 1.0)
    ),
    "schedule-flowcut-snapkv": shelf.Schedule(
        keep=1, parts=(shelf.FlowCut(), shelf.SnapKV(window=4)), ratios=(2.0, 1.0)
    ),
    "schedule-four": shelf.Schedule(
        keep=0.2,
        parts=(shelf.ToMe(), shelf.DivPrune(), shelf.PyramidDrop(layers=(1, 3)), shelf.Knorm()),
        ratios=(4.0, 3.0, 2.0, 1.0),
    ),
    "schedule-renumber": shelf.Schedule(
        keep=0.3, positions="renumber", parts=(shelf.DivPrune(), shelf.PyramidDrop(layers=(1, 3))), ratios=(2.0, 1.0)
    ),
    "random": shelf.Random(keep=0.4),
    "random-count": shelf.Random(keep=3, seed=7),
    "random-renumber": shelf.Random(keep=0.4, positions="renumber"),
    "uniformgrid": shelf.UniformGrid(keep=0.3),
    "uniformgrid-count": shelf.UniformGrid(keep=3),
    "uniformgrid-renumber": shelf.UniformGrid(keep=0.3, positions="renumber"),
    "downscale": shelf.Downscale(keep=0.4),
    "downscale-count": shelf.Downscale(keep=3),
    "downscale-renumber": shelf.Downscale(keep=0.4, positions="renumber"),
    "regionmask": shelf.RegionMask(boxes=((0.1, 0.2, 0.6, 0.5),)),
    "regionmask-zero": shelf.RegionMask(boxes=((0.1, 0.2, 0.6, 0.5),), mode="zero"),
    "regionmask-mean": shelf.RegionMask(boxes=((0.1, 0.2, 0.6, 0.5),), mode="mean"),
    "regionmask-mask": shelf.RegionMask(boxes=((0.1, 0.2, 0.6, 0.5),), mode="mask"),
    "regionmask-patches-zero": shelf.RegionMask(boxes=((0.1, 0.2, 0.6, 0.5),), mode="zero", site="patches"),
    "regionmask-patches": shelf.RegionMask(boxes=((0.1, 0.2, 0.6, 0.5),), site="patches"),
}

ANCHOR_COMPRESSORS = ("divprune", "fastv", "pyramiddrop")
ANCHOR_CELLS: tuple[Cell, ...] = (("llava", "image"), ("qwen3_vl", "image"), ("smolvlm", "image"))

TILED: tuple[Cell, ...] = tuple((family, "image") for family in ANYRES)
"""Where an image may be several grids in one item."""


def refused(name: str, cell: Cell) -> str | None:
    """Why a pair cannot be attached, in words that the error must contain; None where it can."""
    method = COMPRESSORS[name]
    tower = {"tower_attention", "tower_keys", "tower_states"}
    reads = method.needs & tower or isinstance(method, shelf.QueCC)
    if cell[0] in OPAQUE and (method.sites & {"vision_layer", "refresh"} or reads):
        return "holds all images in one masked sequence"
    if "prepare" in method.sites and cell[0] in DYNAMIC:
        return "before the processor"
    if method.patchwise_projector and cell[0] not in TOKENWISE:
        return "maps every patch by itself"
    if "vision_layer" in method.sites and cell[0] == "openvla":
        return "joins what two towers make"
    if "refresh" in method.sites and (cell[0], "video") not in CELLS:
        return "reads images only"
    return None


def refused_when_called(name: str, cell: Cell) -> str | None:
    """Why a pair that can be attached (its family reads other inputs, too) refuses this kind of input."""
    method = COMPRESSORS[name]
    if isinstance(method, shelf.RegionMask) and method.site == "llm_input" and cell in TILED:
        return "do not fill one grid"
    return None


def ready(model: nn.Module, method: Compressor) -> Compressor | Trained:
    """The method, with fresh learned parts, always the same ones, if it has any."""
    return mmtoken.learnable(model, method, seed=0) if method.trainable else method


def compress(model: nn.Module, method: Compressor, **options: Any) -> mmtoken.Session:
    """`mmtoken.compress`, with fresh learned parts for methods that have any."""
    return mmtoken.compress(model, ready(model, method), **options)


def drops(name: str, cell: Cell) -> bool:
    """Whether tokens leave the sequence: filled regions, presses and the cacher leave all, DyCoke and EVS leave images,
    and VLA-Pruner all of them at first."""
    whole = ("regionmask-zero", "regionmask-mean", "regionmask-patches-zero", "vlapruner")
    if name.startswith(whole) or COMPRESSORS[name].sites in ({"cache"}, {"refresh"}):
        return False
    return not name.startswith(("dycoke", "evs")) or cell[1] == "video"


def stands_for_its_class(name: str) -> bool:
    """Whether a setting is the first one of its class."""
    kind = type(COMPRESSORS[name])
    return name == next(other for other, method in COMPRESSORS.items() if type(method) is kind)


def _rest() -> set[tuple[str, Cell]]:
    """The pairs that the default run leaves out."""
    rest = []
    for name in COMPRESSORS:
        anchors = ANCHOR_CELLS if stands_for_its_class(name) else ANCHOR_CELLS[:1]
        rest += [(name, cell) for cell in CELLS if name not in ANCHOR_COMPRESSORS and cell not in anchors]
    drawn = set(random.Random(0).sample(range(len(rest)), len(rest) // 20))
    return {pair for number, pair in enumerate(rest) if number not in drawn}


LEFT_OUT = _rest()


def marks(name: str, cell: Cell) -> list[pytest.MarkDecorator]:
    """The markers of a pair."""
    found = [pytest.mark.support] if stands_for_its_class(name) else []
    if name in ANCHOR_COMPRESSORS:
        found.append(pytest.mark.anchor)
    if (name, cell) in LEFT_OUT:
        return [*found, pytest.mark.contract_full]
    return [*found, pytest.mark.lowest] if name in ANCHOR_COMPRESSORS and cell in ANCHOR_CELLS else found


def pairs(names: Iterable[str] = COMPRESSORS, cells: Iterable[Cell] = tuple(CELLS)) -> Callable[[Any], Any]:
    """Parametrize a test over (name, cell) for every supported pair."""
    params = [
        pytest.param(name, cell, id=f"{name}-{'-'.join(cell)}", marks=marks(name, cell))
        for name in names
        for cell in cells
        if refused(name, cell) is None and refused_when_called(name, cell) is None
    ]
    return pytest.mark.parametrize(("name", "cell"), params)


@functools.cache
def tiny(family: str, attn: str = "sdpa") -> nn.Module:
    """The family's model; shared, so tests must leave it as it was."""
    return build(family, attn)


@functools.cache
def batch(cell: Cell, case: str, seed: int = 1) -> dict[str, Tensor]:
    """The inputs of a case; shared, so runs get clones (`oracle.clone`)."""
    return inputs(tiny(cell[0]), *cell, case, seed=seed)


@functools.cache
def dense(cell: Cell, case: str, attn: str = "sdpa", tokens: int = 4, seed: int = 1) -> oracle.Generated:
    """What the unmodified model generates."""
    return oracle.generate_with_logits(tiny(cell[0], attn), batch(cell, case, seed), max_new_tokens=tokens)


@functools.cache
def dense_logits(cell: Cell, case: str, attn: str = "sdpa") -> Tensor:
    """float[B, L, V]: logits of one forward call of the unmodified model."""
    return logits(tiny(cell[0], attn), batch(cell, case))


@functools.cache
def protected(cell: Cell, case: str, seed: int = 1) -> Tensor:
    """bool[B, L]: separators among the visual tokens of a case."""
    return reference.separators(tiny(cell[0]), batch(cell, case, seed))


def keeps(report: Report, cell: Cell, case: str, seed: int = 1) -> dict[int, Tensor]:
    """bool[B, L] per decoder layer: what a report of a call on this case says is left."""
    depth = len(oracle.text_model(tiny(cell[0])).layers)
    return reference.kept_by_layer(report, protected(cell, case, seed), depth)


@torch.no_grad()
def logits(model: nn.Module, inputs: oracle.Inputs, **kwargs: Any) -> Tensor:
    """float[B, L, V]: logits of one forward call."""
    result: Tensor = model(**oracle.clone(inputs), **kwargs).logits
    return result


def assert_close(got: Tensor, want: Tensor) -> None:
    """The project's one tolerance: 1e-5 x max(1, largest magnitude) in float32."""
    limit = 1e-5 * max(1.0, float(want.abs().max()))
    error = oracle.max_error(got, want)
    assert error <= limit, f"differs by {error:.3g}, allowed are {limit:.3g}"
