"""Composition: order, facts, budgets, settings as data, and what a part is shown."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn

from mmtoken import MMTokenError
from mmtoken.compressors import (
    TOVA,
    Compressor,
    Context,
    DivPrune,
    Downscale,
    FastV,
    FlowCut,
    FlowCutHR,
    Knorm,
    PruMerge,
    PyramidDrop,
    Schedule,
    Sequential,
    SnapKV,
    ToMe,
    UniformGrid,
    VideoScan,
    VisionZip,
    VLAPruner,
    ZeroTPrune,
)
from mmtoken.compressors.base import Dims, Positions
from mmtoken.compressors.compose import check_parts
from mmtoken.compressors.registry import names, resolve
from mmtoken.errors import KeepError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests.compressors.batches import act, item, make

THREE = Sequential(parts=(VisionZip(keep=0.5), FastV(keep=0.5, layer=1), SnapKV(keep=0.5, window=2)))


# ---------------------------------------------------------------------------------------------------------- behaviour


def test_parts_act_one_after_the_other_on_what_is_left() -> None:
    tokens, context = make([16, 8], separators=True)
    parts = (DivPrune(keep=0.5), UniformGrid(keep=0.5), FastV(keep=0.5), Knorm(keep=0.5))
    got = act(Sequential(parts=parts), tokens, context)
    want, counts = tokens, context.original_counts
    for part in parts:
        context.original_counts = want.counts() if part is not parts[3] else counts
        want = act(part, want, context)
    context.original_counts = counts
    assert all(torch.equal(item(got, row)[field], item(want, row)[field]) for row in (0, 1) for field in item(got, row))


def test_a_quarter_is_left_of_two_halves() -> None:
    tokens, context = make([16, 8])
    left = act(Sequential(parts=(DivPrune(keep=0.5), UniformGrid(keep=0.5))), tokens, context)
    assert left.counts() == [4, 2]


@dataclass(frozen=True)
class Notes(Compressor):
    """Cuts nothing at chosen layers, and notes what it is shown."""

    keep: int | float = 1.0
    positions: Positions = "keep"
    layers: tuple[int, ...] = (2,)
    cut: float = 1.0

    seen: ClassVar[list[tuple[Any, ...]]] = []

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        ctx.memory.setdefault("calls", []).append(layer)
        self.seen.append((self.layers, layer, list(ctx.original_counts), list(ctx.memory["calls"]), ctx.learned))
        ctx.scores = torch.full(tokens.source.shape, float(layer))
        return tokens.top(tokens.features[..., 0], self.cut)


@dataclass(frozen=True)
class Counts(Compressor):
    """Cuts nothing before the decoder, and notes how many tokens it is told that there were."""

    keep: int | float = 1.0
    positions: Positions = "keep"

    seen: ClassVar[list[list[int]]] = []

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        self.seen.append(list(ctx.original_counts))
        return tokens


def test_counts_are_those_of_each_step_of_a_stream() -> None:
    method = Sequential(parts=(UniformGrid(keep=0.5), Counts()))
    memory: dict[str, Any] = {}
    Counts.seen.clear()
    for count in (16, 8):
        tokens, context = make([count])
        context.memory, context.streaming = memory, True
        method.llm_input(tokens, context)
    assert Counts.seen == [[8], [4]]


def test_every_part_has_its_own_memory_weights_and_counts() -> None:
    tokens, context = make([16, 8])
    Notes.seen.clear()
    method = Sequential(parts=(DivPrune(keep=0.5), Notes(layers=(1, 2), cut=0.5), Notes(layers=(2, 3), cut=0.5)))
    left = act(method, tokens, context)
    assert [entry[:4] for entry in Notes.seen] == [
        ((1, 2), 1, [8, 4], [1]),
        ((1, 2), 2, [8, 4], [1, 2]),
        ((2, 3), 2, [2, 1], [2]),
        ((2, 3), 3, [2, 1], [2, 3]),
    ]
    assert left.counts() == [1, 1]  # 16 -> 8 -> 4 -> 2 -> 1 -> 1
    assert context.original_counts == [16, 8] and context.learned is None
    # scores in reports are those of the tokens that the site was handed
    context.scores = None
    tokens, context = make([16, 8])
    both = Sequential(parts=(Notes(layers=(1,), cut=0.5), Notes(layers=(1,), cut=0.5)))
    both.llm_layer(tokens, 1, context)
    assert context.scores is not None and context.scores.shape == tokens.source.shape


@dataclass(frozen=True)
class Learns(Notes):
    trainable: ClassVar[bool] = True

    def build(self, dims: Dims) -> nn.Module:
        return nn.Linear(dims.llm, 1)


def test_learned_parts_are_built_and_handed_out_by_place() -> None:
    tokens, context = make([16, 8])
    method = Sequential(parts=(Learns(layers=(1,)), Notes(layers=(2,)), Learns(layers=(3,))))
    assert method.trainable and not THREE.trainable
    module = method.build(Dims(2, 3, 5, 7))
    assert isinstance(module, nn.ModuleDict) and sorted(module) == ["0", "2"]
    Notes.seen.clear()
    context.learned = module
    for layer in method.cut_layers(8):
        tokens = method.llm_layer(tokens, layer, context)
    assert [entry[4] for entry in Notes.seen] == [module["0"], None, module["2"]]
    assert context.learned is module


@dataclass(frozen=True)
class Frames(Compressor):
    keep: int | float = 0.5
    positions: Positions = "keep"
    first: int = 0

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        return torch.arange(self.first, len(clip), 2)


def test_frames_and_media_pass_through_all_parts() -> None:
    clip = torch.zeros(9, 3, 4, 4)
    assert Sequential(parts=(Frames(first=1), Frames())).frames(clip, Context()).tolist() == [1, 5]

    @dataclass(frozen=True)
    class Adds(Compressor):
        keep: int | float = 0.5
        positions: Positions = "keep"
        what: str = "a"

        def prepare(self, media: Any) -> Any:
            return media + self.what

    assert Sequential(parts=(Adds(what="b"), Adds(what="c"))).prepare("a") == "abc"


# -------------------------------------------------------------------------------------------------------------- order


WRONG: dict[str, tuple[tuple[Compressor, ...], str]] = {
    "decoder before tower": ((FastV(), VisionZip()), "VisionZip acts at project, which comes before llm_layer"),
    "cache before layers": ((SnapKV(), FastV()), "FastV acts at llm_layer, which comes before cache, where SnapKV"),
    "input before projector": ((DivPrune(), VisionZip()), "put VisionZip first, or leave one out"),
    "inside twice": ((FlowCutHR(), ToMe()), "ToMe acts at vision_layer, which comes before llm_layer, where FlowCutHR"),
    "two at the projector": ((VisionZip(), VisionZip()), "both act around the projector"),
    "two on the cache": ((SnapKV(), Knorm()), "SnapKV and Knorm both act on the cache"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_part_that_would_act_before_an_earlier_one_is_refused(case: str) -> None:
    parts, words = WRONG[case]
    with pytest.raises(MMTokenError, match=f"parts: .*{words}"):
        Sequential(parts=parts)
    with pytest.raises(MMTokenError, match=words):
        Schedule(keep=0.5, parts=parts)


def test_cuts_between_layers_must_come_in_order() -> None:
    wrong = Sequential(parts=(PyramidDrop(keep=0.5, layers=(1, 4)), FastV(layer=2)))
    with pytest.raises(UnsupportedError, match=r"FastV cuts before layer 2.*PyramidDrop .*last cut \(layer 4\)"):
        wrong.cut_layers(8)
    right = Sequential(parts=(FastV(layer=2), PyramidDrop(keep=0.25, layers=(2, 5))))
    assert right.cut_layers(8) == (2, 5) and right.score_layers(8) == (1,)
    with pytest.raises(UnsupportedError, match="layer=9 but this decoder has 8 layers"):
        Sequential(parts=(DivPrune(), FastV(layer=9))).cut_layers(8)
    with pytest.raises(UnsupportedError, match="more than one of them records"):
        Sequential(parts=(VLAPruner(), VLAPruner())).recording(8)
    assert Sequential(parts=(DivPrune(), VLAPruner())).recording(8) == VLAPruner().recording(8)


# -------------------------------------------------------------------------------------------------------------- facts


def test_facts_are_those_of_the_parts() -> None:
    assert THREE.sites == {"project", "llm_layer", "cache"}
    assert THREE.needs == VisionZip.needs | FastV.needs
    assert THREE.merges and not THREE.size_bias and not THREE.query_agnostic and not THREE.causal
    assert THREE.budget == "exact" and THREE.identity_at_full is True and THREE.parity == "official code"
    assert (THREE.keep, THREE.positions, THREE.cost) == (0.5, "keep", "rows")
    loose = Sequential(parts=(Downscale(keep=0.5), FastV(keep=0.5)))
    assert loose.budget == "at_most" and loose.identity_at_full == Downscale.identity_at_full
    assert loose.parity == "oracle only" and not loose.size_bias
    assert Sequential(parts=(ToMe(), DivPrune())).size_bias == ToMe.size_bias is True
    assert Sequential(parts=(PruMerge(), FastV())).budget == "adaptive"
    agnostic = Sequential(parts=(DivPrune(), UniformGrid(keep=0.5)))
    assert agnostic.query_agnostic and agnostic.causal
    # another instance, and the class, have facts of their own
    assert Sequential.needs == frozenset() and agnostic.sites == {"llm_input"}


def test_positions_are_common_and_those_of_cached_keys_do_not_count() -> None:
    with pytest.raises(MMTokenError, match=r"positions of the parts are \['renumber', 'keep'\]; give all the same"):
        Sequential(parts=(DivPrune(positions="renumber"), FastV()))
    assert Sequential(parts=(DivPrune(positions="renumber"), SnapKV())).positions == "renumber"
    schedule = Schedule(keep=0.5, positions="renumber", parts=(DivPrune(), FastV(), SnapKV()))
    assert [part.positions for part in schedule.chain] == ["renumber", "renumber", "keep"]
    with pytest.raises(MMTokenError, match="positions='renumber', but no part moves tokens"):
        Schedule(keep=0.5, positions="renumber", parts=(SnapKV(),))


def test_what_the_encoder_leaves_is_the_budget_of_the_parts_before_the_decoder() -> None:
    assert THREE.encoder_keep() == 0.5
    assert Sequential(parts=(FlowCut(keep=0.5), FlowCut(keep=0.5), FastV(keep=0.1))).encoder_keep() == 0.25
    assert Sequential(parts=(FlowCut(keep=0.5), VisionZip(keep=0.5))).encoder_keep() == 0.5
    assert Sequential(parts=(FlowCut(keep=0.5), VisionZip(keep=0.5))).vision_keep() == 0.5
    assert THREE.vision_keep() == 1.0
    assert Sequential(parts=(ZeroTPrune(keep=64), ToMe(keep=0.5))).encoder_keep() == 32
    assert Sequential(parts=(ZeroTPrune(keep=64), ToMe(keep=100))).encoder_keep() == 64
    assert Sequential(parts=(FlowCutHR(keep=0.2, spread=2.0), SnapKV())).encoder_keep() == pytest.approx(0.4)


# ----------------------------------------------------------------------------------------------------------- schedule


def keeps(method: Schedule) -> list[int | float]:
    return [part.keep for part in method.chain]


def test_a_schedule_says_how_many_times_keep_each_part_leaves() -> None:
    parts = (FlowCut(), FastV(layer=3, keep=0.9), Knorm())
    assert keeps(Schedule(keep=64, parts=parts, ratios=(4.0, 2.0, 1.0))) == [256, 128, 64]
    assert keeps(Schedule(keep=3, parts=parts, ratios=(1.5, 1.2, 1.0))) == [5, 4, 3]
    # fractions are of what a part is handed; on the cache of what entered the decoder
    assert keeps(Schedule(keep=0.1, parts=parts, ratios=(4.0, 2.0, 1.0))) == pytest.approx([0.4, 0.5, 0.25])
    assert keeps(Schedule(keep=0.5, parts=parts, ratios=(4.0, 2.0, 1.0))) == pytest.approx([1.0, 1.0, 0.5])
    assert keeps(Schedule(keep=0.5, parts=parts)) == pytest.approx([0.5, 1.0, 1.0])
    assert keeps(Schedule(keep=1.0, parts=parts, ratios=(4.0, 2.0, 1.0))) == [1.0, 1.0, 1.0]
    within = Schedule(keep=0.1, parts=(FlowCutHR(spread=2.0), TOVA()), ratios=(2.0, 1.0))
    assert keeps(within) == pytest.approx([0.2, 0.25]) and within.encoder_keep() == pytest.approx(0.4)
    chain = Schedule(keep=64, parts=parts, ratios=(4.0, 2.0, 1.0)).chain
    assert chain[1] == FastV(layer=3, keep=128)  # all other settings stay


def test_a_schedule_leaves_keep_at_the_end() -> None:
    tokens, context = make([32, 20])
    method = Schedule(keep=0.25, parts=(DivPrune(), UniformGrid(keep=0.5), FastV()), ratios=(3.0, 2.0, 1.0))
    assert act(method, tokens, context).counts() == [8, 5]
    tokens, context = make([32, 20])
    assert act(dataclasses.replace(method, keep=3), tokens, context).counts() == [3, 3]


BAD_RATIOS: list[tuple[Any, str]] = [
    ((2.0,), "ratios=.* for 2 parts"),
    ((2.0, 1.5), "falling to 1.0"),
    ((0.5, 1.0), "falling to 1.0"),
    ((2.0, "1"), "'1' is no number"),
    ((True, 1.0), "True is no number"),
    ((float("nan"), 1.0), "nan is no number"),
    ("21", "give a list with a number per part"),
    (2.0, "give a list with a number per part"),
]


@pytest.mark.parametrize(("ratios", "words"), BAD_RATIOS)
def test_bad_ratios_are_refused(ratios: Any, words: str) -> None:
    with pytest.raises(MMTokenError, match=words):
        Schedule(keep=0.5, parts=(DivPrune(), FastV()), ratios=ratios)


@dataclass(frozen=True)
class Nowhere(Compressor):
    keep: int | float = 0.5
    positions: Positions = "keep"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((), "is no list of compressors"),
        ("fastv", "is no list of compressors"),
        (FastV(), "is no list of compressors"),
        ((FastV(), "tova"), "parts: 'tova' is a str; give compressors"),
        ((Nowhere(),), "Nowhere acts nowhere"),
    ],
)
def test_bad_parts_are_refused(parts: Any, words: str) -> None:
    with pytest.raises(MMTokenError, match=words):
        Sequential(parts=parts)
    with pytest.raises(MMTokenError, match=words):
        check_parts(parts)


def test_budgets_are_checked() -> None:
    with pytest.raises(KeepError, match="keep="):
        Schedule(keep=1.5, parts=(DivPrune(),))
    with pytest.raises(MMTokenError, match="Sequential has no keep of its own"):
        Schedule(keep=0.5, parts=(Sequential(parts=(DivPrune(),)), FastV()))
    inner = Schedule(keep=0.9, parts=(DivPrune(), FastV()), ratios=(2.0, 1.0))
    outer = Schedule(keep=0.2, parts=(inner, SnapKV()), ratios=(1.0, 1.0))
    assert outer.chain[0] == dataclasses.replace(inner, keep=0.2)


# ------------------------------------------------------------------------------------------------------------ as data

NESTED = (
    THREE,
    Schedule(keep=64, parts=(FlowCut(), FastV(layer=3)), ratios=(2.0, 1.0)),
    Schedule(keep=0.25, parts=(DivPrune(), Schedule(keep=0.5, parts=(FastV(), TOVA())))),
    Sequential(parts=(Sequential(parts=(DivPrune(), FastV())), Knorm())),
    Sequential(parts=(DivPrune(), PyramidDrop(layers=(1, 2), shares=(0.5, 0.125)))),
)


@pytest.mark.parametrize("method", NESTED, ids=range(len(NESTED)))
@pytest.mark.parametrize("form", [json, yaml])
def test_settings_survive_json_and_yaml(method: Compressor, form: Any) -> None:
    spec = method.to_dict()
    text = json.dumps(spec) if form is json else yaml.safe_dump(spec)
    back = resolve(json.loads(text) if form is json else yaml.safe_load(text))
    assert back == method and hash(back) == hash(method) and back.chain == method.chain
    assert spec["class_path"] == f"mmtoken.compressors.{type(method).__name__}"
    assert resolve(method) is method


def test_parts_may_be_named() -> None:
    found = resolve("sequential", parts=["fastv", {"class_path": "SnapKV", "init_args": {"keep": 0.5}}])
    assert found == Sequential(parts=(FastV(), SnapKV(keep=0.5)))
    assert resolve(Schedule(keep=64, parts=(DivPrune(), FastV())), keep=32).chain[1].keep == 32
    for words, spec in (
        ("parts is missing.*a list of compressors", {"class_path": "Sequential"}),
        ("compressor='fastvv' is unknown", {"class_path": "Sequential", "init_args": {"parts": ["fastvv"]}}),
        ("keep=0.5 is no setting of Sequential", {"class_path": "Sequential", "init_args": {"keep": 0.5, "parts": []}}),
    ):
        with pytest.raises(MMTokenError, match=words):
            resolve(spec)
    assert not {"sequential", "schedule"} & set(names())


def test_compositions_are_frozen_and_differ_by_their_parts() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        THREE.keep = 0.9  # type: ignore[misc]
    assert Sequential(parts=(FastV(),)) != Sequential(parts=(FastV(keep=0.9),))
    assert dataclasses.replace(THREE) == THREE


def test_a_chain_holds_as_many_steps_as_its_most_demanding_part():
    assert Sequential((DivPrune(),)).held_steps() is None
    assert Sequential((DivPrune(positions="renumber"), VideoScan(bank=48))).held_steps() == 48
