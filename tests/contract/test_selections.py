"""What a method drops is what its formulas drop, computed again in the plainest way and without the product's code.

Scores come from the whole attention matrices of the unmodified model under eager attention. Inputs are chosen so that
the last token kept and the first one dropped differ by at least `GAP` in score: rounding cannot decide.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmtoken.engine.report import Report
from tests import oracle
from tests.contract.matrix import COMPRESSORS, Cell, batch, compress, keeps, logits, pairs, protected, tiny

GAP = 1e-4


class Item(NamedTuple):
    """One image or video: its prompt row, the places of its tokens, and which of them may be dropped."""

    row: int
    places: list[int]
    eligible: list[int]


class Choice(NamedTuple):
    """Indices into an item's places that are left after a cut, and how far the decision was from being another."""

    kept: list[int]
    gap: float


def items(report: Report, cell: Cell, case: str, seed: int) -> list[Item]:
    separators = protected(cell, case, seed)
    return [
        Item(row, places.tolist(), [i for i, place in enumerate(places.tolist()) if not separators[row, place]])
        for row, places in zip(report.item_rows, report.places, strict=True)
    ]


def best(scores: dict[int, float], count: int) -> Choice:
    """The `count` indices with the highest scores."""
    order = sorted(scores, key=lambda i: (-scores[i], i))
    gap = math.inf if count >= len(order) else scores[order[count - 1]] - scores[order[count]]
    return Choice(sorted(order[:count]), gap)


def count_of(keep: int | float, total: int, steps: int) -> int:
    wanted = math.floor(keep * total + 0.5) if isinstance(keep, float) else keep * steps
    return min(total, max(1, wanted))


def steps_of(report: Report, item: int) -> int:
    assert report.tokens is not None
    grid = report.tokens.grid[item]
    return 1 if grid is None else grid[0]


@torch.no_grad()
def attention_of_the_last_token(cell: Cell, case: str, seed: int, layer: int, keep: dict[int, Tensor]) -> Tensor:
    """float[B, L]: head mean of what the last prompt token pays in a layer of the (partly masked) eager model."""
    model = tiny(cell[0], "eager")
    with oracle.masked_keys(model, keep):
        out = model(**oracle.clone(batch(cell, case, seed)), output_attentions=True)
    result: Tensor = out.attentions[layer][:, :, -1].mean(1)
    return result


def fastv(report: Report, cell: Cell, case: str, seed: int) -> list[list[Choice]]:
    method = COMPRESSORS["fastv"]
    scores = attention_of_the_last_token(cell, case, seed, 1, {})
    cut = []
    for number, item in enumerate(items(report, cell, case, seed)):
        count = count_of(method.keep, len(item.eligible), steps_of(report, number))
        cut.append(best({i: float(scores[item.row, item.places[i]]) for i in item.eligible}, count))
    return [cut]


def pyramiddrop(report: Report, cell: Cell, case: str, seed: int) -> list[list[Choice]]:
    keep = COMPRESSORS["pyramiddrop"].keep
    all_items = items(report, cell, case, seed)
    left = {number: item.eligible for number, item in enumerate(all_items)}
    visible = torch.ones_like(batch(cell, case, seed)["input_ids"], dtype=torch.bool)
    hidden: dict[int, Tensor] = {}
    cuts = []
    for stage, layer in enumerate((1, 2, 3)):
        scores = attention_of_the_last_token(cell, case, seed, layer, hidden)
        cut = []
        for number, item in enumerate(all_items):
            total = len(item.eligible)
            last = count_of(keep, total, 1)
            count = last if stage == 2 else max(last, count_of(keep ** ((stage + 1) / 3), total, 1))
            cut.append(best({i: float(scores[item.row, item.places[i]]) for i in left[number]}, count))
        visible = visible.clone()
        for number, (item, choice) in enumerate(zip(all_items, cut, strict=True)):
            gone = [item.places[i] for i in left[number] if i not in choice.kept]
            visible[item.row, gone] = False
            left[number] = choice.kept
        hidden |= dict.fromkeys(range(layer, 4), visible)
        cuts.append(cut)
    return cuts


def features(cell: Cell, case: str, seed: int) -> Tensor:
    """float[B, L, D]: what the unmodified decoder gets."""
    from tests.contract.reference import recording

    model = tiny(cell[0])
    with recording(model) as calls:
        logits(model, batch(cell, case, seed))
    embeds: Tensor = calls[0]["inputs_embeds"]
    return embeds


def divprune(report: Report, cell: Cell, case: str, seed: int) -> list[list[Choice]]:
    embeds = features(cell, case, seed)
    cut = []
    for number, item in enumerate(items(report, cell, case, seed)):
        vectors = {i: embeds[item.row, item.places[i]] for i in item.eligible}
        distance = {
            (a, b): 1 - float(torch.nn.functional.cosine_similarity(vectors[a], vectors[b], dim=0))
            for a, b in itertools.permutations(item.eligible, 2)
        }
        count = count_of(COMPRESSORS["divprune"].keep, len(item.eligible), steps_of(report, number))
        chosen: list[int] = []
        gap = math.inf
        while len(chosen) < count:
            rest = [i for i in item.eligible if i not in chosen]
            nearest = {i: min(distance[i, j] for j in (chosen or item.eligible) if j != i) for i in rest}
            step = best(nearest, 1)
            chosen += step.kept
            gap = min(gap, step.gap)
        cut.append(Choice(sorted(chosen), gap))
    return [cut]


FORMULAS: dict[str, Callable[[Report, Cell, str, int], list[list[Choice]]]] = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "divprune": divprune,
}


def run(name: str, cell: Cell, case: str, seed: int) -> Report:
    with compress(tiny(cell[0]), COMPRESSORS[name]) as session:
        logits(tiny(cell[0]), batch(cell, case, seed))
    return session.report


def gap_of(cuts: list[list[Choice]]) -> float:
    return min(choice.gap for choice in itertools.chain.from_iterable(cuts))


@functools.cache
def clear_case(name: str, cell: Cell, case: str) -> tuple[int, list[list[Choice]]]:
    """The first seed whose inputs leave no decision to rounding, and what the formulas choose there."""
    for seed in range(1, 200):
        cuts = FORMULAS[name](run(name, cell, case, seed), cell, case, seed)
        if gap_of(cuts) >= GAP:
            return seed, cuts
    raise AssertionError(f"no seed gives {name} a clear choice on {cell} {case}")


def left(kept: Iterable[Tensor]) -> list[list[int]]:
    return [sorted(indices.tolist()) for indices in kept]


@pairs(FORMULAS)
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image", "text_row"])
def test_a_method_drops_what_its_formulas_drop(name: str, cell: Cell, case: str) -> None:
    seed, cuts = clear_case(name, cell, case)
    assert gap_of(cuts) >= GAP
    report = run(name, cell, case, seed)
    assert len(report.sites) == len(cuts)
    for site, cut in zip(report.sites, cuts, strict=True):
        assert left(site.kept) == [choice.kept for choice in cut]
    # and on these inputs, where no selection hangs on rounding, dropping is masking
    model, inputs = tiny(cell[0]), batch(cell, case, seed)
    with compress(model, COMPRESSORS[name]):
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=3)
    with oracle.masked_keys(model, keeps(report, cell, case, seed)):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=3)
    assert torch.equal(got.sequences, want.sequences)
    assert oracle.max_error(got.logits, want.logits) <= 1e-5 * max(1.0, float(want.logits.abs().max()))
