"""Methods before the language model that read the tower or the text: what they leave, computed again with loops.

Attention, keys, features and text come from the unmodified model; the loops are those of the methods' own tests. Inputs
are chosen so that no decision is closer than `GAP`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmtoken.compressors import EVS, CDPruner, DyCoke, HoloV, PruMerge, STCPruner, VidCom2, VisPruner
from mmtoken.engine.report import Report
from tests import oracle
from tests.backbones.tiny_models import CELLS, GEMMA, TILES, TOKENWISE, visual_mask
from tests.compressors import (
    test_cdpruner,
    test_dycoke,
    test_evs,
    test_holov,
    test_prumerge,
    test_stcpruner,
    test_vidcom2,
    test_vispruner,
)
from tests.contract.matrix import COMPRESSORS, Cell, batch, logits, pairs, protected, tiny
from tests.contract.reference import CLS, IDEFICS, attention_in, tower_blocks, unit_of
from tests.contract.test_merging import (
    ZIPPED,
    _clip_patches,
    assert_same_features,
    features_left,
    openvla_states,
    projected,
    report_of,
    tower_facts,
)
from tests.contract.test_selections import GAP, count_of, steps_of

CASES = ["plain", "padded_ragged", "multi_image"]


class Facts(NamedTuple):
    """One item of a prompt: indices of the tokens that may be dropped, and what the model says of them.

    Attributes:
        indices: into the item's places.
        budget: tokens to keep.
        embeds: float[n, D], as they enter the decoder.
        patches: float[n, d], as the projector gets them, or `embeds` where it does not map patch by patch.
        attention, keys: of the tower's block.
        words: float[T, D], the embeddings of the row's text.
        frames: temporal steps, 1 for an image.
    """

    indices: list[int]
    budget: int
    embeds: Tensor
    patches: Tensor
    attention: Tensor
    keys: Tensor
    words: Tensor
    frames: int


def facts(
    name: str,
    cell: Cell,
    case: str,
    seed: int,
    report: Report,
    tower: Callable[[Cell, str, int], tuple[Tensor, Tensor]],
) -> list[Facts]:
    inputs, separators = batch(cell, case, seed), protected(cell, case, seed)
    embeds = projected(cell, case, seed)
    attention, keys = tower(cell, case, seed)
    patches = _clip_patches(cell, case, seed) if cell[0] in TOKENWISE else None
    text = inputs["attention_mask"].bool() & ~visual_mask(tiny(cell[0]), inputs)
    found, start = [], 0
    for item, (row, places) in enumerate(zip(report.item_rows, report.places, strict=True)):
        indices = [i for i, place in enumerate(places.tolist()) if not separators[row, place]]
        here = start + torch.tensor(indices)
        mine = embeds[row, places[indices]]
        frames = steps_of(report, item)
        found.append(
            Facts(
                indices,
                count_of(COMPRESSORS[name].keep, len(indices), frames),
                mine,
                mine if patches is None else patches[here],
                attention[here],
                keys[here],
                embeds[row, text[row]],
                frames,
            )
        )
        start += len(places)
    return found


def no_tower(cell: Cell, case: str, seed: int) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros(int(visual_mask(tiny(cell[0]), batch(cell, case, seed)).sum()), 1)
    return nothing[:, 0], nothing


Choice = tuple[list[int], float]


def vispruner(method: VisPruner, item: Facts) -> Choice:
    return test_vispruner.plain(item.patches, item.attention, item.budget, method.important, method.step)


def holov(method: HoloV, item: Facts) -> Choice:
    crops = method.crops * item.frames
    return test_holov.plain(item.embeds, item.attention, item.budget, crops, method.weight)


def cdpruner(method: CDPruner, item: Facts) -> Choice:
    weights = test_cdpruner.relevances(item.embeds, item.words, method.sign_flip)
    if method.theta is not None:
        weights = [math.exp(method.theta / (2 * (1 - method.theta)) * (weight - 1)) for weight in weights]
    chosen, gap = test_cdpruner.plain(item.embeds, weights, item.budget)
    return sorted(chosen), gap


def dycoke(method: DyCoke, item: Facts) -> Choice:
    if item.frames == 1:
        return list(range(len(item.indices))), math.inf
    return test_dycoke.plain(item.embeds.unflatten(0, (item.frames, -1)), method.keep)


def evs(method: EVS, item: Facts) -> Choice:
    return test_evs.plain(item.embeds.unflatten(0, (item.frames, -1)), method.keep)


def stcpruner(method: STCPruner, item: Facts) -> Choice:
    return test_stcpruner.plain(method, item.embeds.unflatten(0, (item.frames, -1)))


def vidcom2(method: VidCom2, item: Facts) -> Choice:
    return test_vidcom2.plain(method, item.embeds.unflatten(0, (item.frames, -1)))


def first_of_equals(item: Facts) -> list[int]:
    """For every token the index of the first one that nothing tells from it: all patches of padding are such."""
    near = torch.cdist(item.embeds, item.embeds, compute_mode="donot_use_mm_for_euclid_dist") < 1e-6
    return [item.indices[int(row.nonzero()[0])] for row in near]


def check(
    name: str,
    cell: Cell,
    case: str,
    choose: Callable[..., Choice],
    tower: Callable[[Cell, str, int], tuple[Tensor, Tensor]],
) -> None:
    """Find inputs on which every decision is clear, those between tokens of padding aside."""
    for seed in range(1, 200):
        report = report_of(name, cell, case, seed)
        items = facts(name, cell, case, seed, report, tower)
        choices = [choose(COMPRESSORS[name], item) for item in items]
        twins = [first_of_equals(item) for item in items]
        found = zip(choices, twins, items, strict=True)
        clear = all(gap >= GAP or first != item.indices for (_, gap), first, item in found)
        if clear:
            break
    assert clear
    (site,) = report.sites
    for item, first, (kept, _), got in zip(items, twins, choices, site.kept, strict=True):
        assert len(set(got.tolist())) == len(kept)
        assert sorted(first[item.indices.index(i)] for i in got.tolist()) == sorted(first[i] for i in kept)
    assert [sorted(kept.tolist()) for kept in report.kept] == [sorted(kept.tolist()) for kept in site.kept]


@pairs(["vispruner", "vispruner-count"], ZIPPED)
@pytest.mark.parametrize("case", CASES)
def test_vispruner_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, vispruner, tower_facts)


@pairs(["holov", "holov-count"], ZIPPED)
@pytest.mark.parametrize("case", CASES)
def test_holov_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, holov, tower_facts)


@pairs(["cdpruner", "cdpruner-count"])
@pytest.mark.parametrize("case", CASES)
def test_cdpruner_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, cdpruner, no_tower)


@pairs(["dycoke", "dycoke-count"])
@pytest.mark.parametrize("case", CASES)
def test_dycoke_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, dycoke, no_tower)


@pairs(["evs", "evs-count"])
@pytest.mark.parametrize("case", CASES)
def test_evs_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, evs, no_tower)


@pairs(["stcpruner", "stcpruner-dual", "stcpruner-keep"])
@pytest.mark.parametrize("case", CASES)
def test_stcpruner_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, stcpruner, no_tower)


@pairs(["vidcom2", "vidcom2-official", "vidcom2-keep"])
@pytest.mark.parametrize("case", CASES)
def test_vidcom2_keeps_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    check(name, cell, case, vidcom2, no_tower)


# ---------------------------------------------------------------------------------------------------------- PruMerge


@torch.no_grad()
def last_block(cell: Cell, case: str, seed: int) -> tuple[Tensor, Tensor]:
    """(attention float[tokens], keys float[tokens, d]) in the tower's last block, without heads, in prompt order."""
    family, inputs = cell[0], batch(cell, case, seed)
    model = tiny(family)
    if family == "openvla":  # the last block never runs, the one before it is the last
        query, key = (states.transpose(1, 2).flatten(2) for states in openvla_states(model, inputs))
        weights = (query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])).softmax(-1)
        return weights[:, 0, 5:].flatten(), key[:, 5:].flatten(0, 1)
    block = attention_in(tower_blocks(model)[-1])
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(block, name).register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        for name in ("q_proj", "k_proj")
    ]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    query, key = seen["q_proj"], seen["k_proj"]
    scores = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
    if "pixel_attention_mask" in inputs:
        tiles = inputs["pixel_values"].flatten(0, 1).flatten(1).ne(0).any(-1)
        size = model.config.vision_config.patch_size
        pixels = inputs["pixel_attention_mask"].flatten(0, 1)[tiles].float()
        real = torch.nn.functional.max_pool2d(pixels[:, None], size).flatten(1).bool()
        scores = scores.masked_fill(~real[:, None], -math.inf)  # patches that hold nothing are not looked at
    else:
        real = torch.ones(scores.shape[:2], dtype=torch.bool)
    weights = scores.softmax(-1)
    if family == "llava":
        return weights[:, 0, 1:].flatten(), key[:, 1:].flatten(0, 1)
    received = (weights * real[..., None]).sum(1) / real.sum(-1, keepdim=True)
    if family in CLS:
        received, key = weights[:, 0, 1:], key[:, 1:]
    unit = unit_of(model)
    side = math.isqrt(received.shape[1])
    squares = [
        [(y + dy) * side + x + dx for dy in range(unit) for dx in range(unit)]
        for y in range(0, side, unit)
        for x in range(0, side, unit)
    ]
    return (
        torch.stack([received[:, square].mean(1) for square in squares], 1).flatten(),
        torch.stack([key[:, square].mean(1) for square in squares], 1).flatten(0, 1),
    )


@functools.cache
def merged(
    name: str, cell: Cell, case: str
) -> tuple[Report, list[Facts], list[tuple[dict[int, tuple[Tensor, float]], float]]]:
    """A report on inputs on which every decision is clear, and what the loops leave."""
    method = COMPRESSORS[name]
    assert isinstance(method, PruMerge)
    for seed in range(1, 200):
        report = report_of(name, cell, case, seed)
        items = facts(name, cell, case, seed, report, last_block)
        wanted = [
            test_prumerge.plain(
                item.patches, item.attention, item.keys, item.budget, method.adaptive, method.plus, method.neighbours
            )
            for item in items
        ]
        if all(gap >= 1e-5 for _, gap in wanted):
            return report, items, wanted
    raise AssertionError(f"no seed gives {name} a clear choice on {cell} {case}")


@pairs(
    ["prumerge", "prumerge-plus", "prumerge-fixed", "prumerge-fixed-plus"],
    [cell for cell in CELLS if cell[0] in ("llava", *TILES, *IDEFICS, *GEMMA)],
)
@pytest.mark.parametrize("case", CASES)
def test_prumerge_keeps_and_merges_what_its_formulas_say(name: str, cell: Cell, case: str) -> None:
    report, items, wanted = merged(name, cell, case)
    assert report.tokens is not None
    project = tiny(cell[0]).base_model.multi_modal_projector if cell[0] in TOKENWISE else lambda value: value
    for number, (item, (found, _)) in enumerate(zip(items, wanted, strict=True)):
        with torch.no_grad():
            want = {item.indices[i]: project(value.float()) for i, (value, _) in found.items()}
        assert_same_features(features_left(report, number), want)
        assert sorted(report.tokens.size[number, report.tokens.eligible[number]].tolist()) == sorted(
            size for _, size in found.values()
        )
    assert oracle.hook_count(tiny(cell[0])) == 0
