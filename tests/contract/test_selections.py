"""What a method drops is what its formulas drop, computed again in the plainest way and without the product's code.

Scores come from the whole attention matrices of the unmodified model under eager attention. Inputs are chosen so that
the last token kept and the first one dropped differ by at least `GAP` in score: rounding cannot decide.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmtoken.engine.report import Report
from tests import oracle
from tests.backbones.tiny_models import visual_mask
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


class Seen(NamedTuple):
    """What the (partly masked) eager model computed, by layer.

    Attributes:
        attention: float[B, H, L, L].
        entering: float[B, L, D], what enters the layer.
        keys: float[B, G, L, d], rotated.
        tables: rotary (cosine, sine), float[B, L, d].
        modules: per "attention" and "mlp", what enters and what comes out, float[B, L, D].
    """

    attention: list[Tensor]
    entering: dict[int, Tensor]
    keys: list[Tensor]
    tables: dict[int, tuple[Tensor, Tensor]]
    modules: dict[tuple[int, str], tuple[Tensor, Tensor]]


@torch.no_grad()
def see(cell: Cell, case: str, seed: int, keep: dict[int, Tensor]) -> Seen:
    model = tiny(cell[0], "eager")
    entering: dict[int, Tensor] = {}
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    modules: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def enter(number: int, module: Any, args: Any, kwargs: Any) -> None:
        entering[number], tables[number] = args[0], kwargs["position_embeddings"]

    def leave(key: tuple[int, str], module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        modules[key] = (before, output[0] if isinstance(output, tuple) else output)

    handles = []
    for number, layer in enumerate(oracle.text_model(model).layers):
        handles.append(layer.register_forward_pre_hook(functools.partial(enter, number), with_kwargs=True))
        for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
            hook = functools.partial(leave, (number, name))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with oracle.masked_keys(model, keep):
        out = model(**oracle.clone(batch(cell, case, seed)), output_attentions=True, use_cache=True)
    for handle in handles:
        handle.remove()
    keys = [layer.keys for layer in out.past_key_values.layers]
    return Seen(list(out.attentions), entering, keys, tables, modules)


def text_after(item: Item, cell: Cell, case: str, seed: int) -> list[int]:
    """Places of the text tokens behind an item, in its prompt row."""
    inputs = batch(cell, case, seed)
    visual = visual_mask(tiny(cell[0]), inputs)[item.row]
    real = inputs["attention_mask"][item.row].bool()
    return [place for place in range(item.places[-1] + 1, len(visual)) if real[place] and not visual[place]]


def last_place(item: Item, cell: Cell, case: str, seed: int) -> int:
    return int(batch(cell, case, seed)["attention_mask"][item.row].nonzero().max())


Cut = Callable[[int, int, Item, list[int], Seen], Choice]
"""(stage, number of the item, item, indices still there, what was seen) to the choice."""


def staged(
    report: Report, cell: Cell, case: str, seed: int, layers: tuple[int, ...], choose: Cut
) -> list[list[Choice]]:
    """Cuts before several layers, each from a model in which later layers do not see what earlier cuts dropped."""
    all_items = items(report, cell, case, seed)
    left = {number: item.eligible for number, item in enumerate(all_items)}
    visible = torch.ones_like(batch(cell, case, seed)["input_ids"], dtype=torch.bool)
    hidden: dict[int, Tensor] = {}
    cuts = []
    for stage, layer in enumerate(layers):
        seen = see(cell, case, seed, hidden)
        cut = [choose(stage, number, item, left[number], seen) for number, item in enumerate(all_items)]
        visible = visible.clone()
        for number, (item, choice) in enumerate(zip(all_items, cut, strict=True)):
            visible[item.row, [item.places[i] for i in left[number] if i not in choice.kept]] = False
            left[number] = choice.kept
        hidden |= dict.fromkeys(range(layer, 4), visible)
        cuts.append(cut)
    return cuts


def transprune(report: Report, cell: Cell, case: str, seed: int) -> list[list[Choice]]:
    """Two cuts, before layers 1 and 2; what layers 0 and 1 changed, and attention of the text behind the item."""
    change: dict[int, dict[int, float]] = {}

    def choose(stage: int, number: int, item: Item, left: list[int], seen: Seen) -> Choice:
        total = change.setdefault(number, dict.fromkeys(item.eligible, 0.0))
        for name in ("attention", "mlp"):
            before, after = (values[item.row].double() for values in seen.modules[stage, name])
            weight, size = {}, {}
            for i in left:
                x, y = before[item.places[i]], after[item.places[i]]
                weight[i] = math.exp(1 - abs(float(x @ y) / float(x.norm() * y.norm())))
                size[i] = float(y.norm() / x.norm())
            for i in left:
                total[i] += weight[i] / sum(weight.values()) * size[i]
        rows = text_after(item, cell, case, seed) or [last_place(item, cell, case, seed)]
        paid = seen.attention[stage + 1][item.row].mean(0)
        scores = {
            i: 0.5 * total[i] + 0.5 * sum(float(paid[row, item.places[i]]) for row in rows) / len(rows) for i in left
        }
        keep, n = COMPRESSORS["transprune"].keep, len(item.eligible)
        last = count_of(keep, n, 1)
        return best(scores, last if stage else max(last, count_of(1 - (1 - keep) / 3, n, 1)))

    return staged(report, cell, case, seed, (1, 2), choose)


def raters(item: Item, asked: list[int], embeds: Tensor) -> list[int]:
    """Places of the text tokens that matter to an item more than the average one."""
    weight = dict.fromkeys(asked, 0.0)
    for i in item.eligible:
        dots = {place: float(embeds[item.row, item.places[i]] @ embeds[item.row, place]) for place in asked}
        top = max(dots.values(), default=0.0)
        mass = sum(math.exp(dot - top) for dot in dots.values())
        for place, dot in dots.items():
            weight[place] += math.exp(dot - top) / mass / len(item.eligible)
    mean = sum(weight.values()) / max(1, len(weight))
    return [place for place in asked if weight[place] > mean] or asked


def sparsevlmplus(report: Report, cell: Cell, case: str, seed: int) -> list[list[Choice]]:
    """Two cuts, before layers 1 and 2, by the raters' attention in the two heads that count for most."""
    first = see(cell, case, seed, {}).entering[0]

    def choose(stage: int, number: int, item: Item, left: list[int], seen: Seen) -> Choice:
        rows = raters(item, text_after(item, cell, case, seed), first)
        paid = seen.attention[stage][item.row].double()
        if rows:
            cosine, sine = (table[item.row if len(table) > 1 else 0].double() for table in seen.tables[stage])
            half = cosine.shape[-1] // 2
            ones = torch.cat([cosine[:, :half] - sine[:, :half], cosine[:, half:] + sine[:, half:]], -1)
            places = [item.places[i] for i in left]
            bias = ones[rows] @ ones[places].T / math.sqrt(ones.shape[-1])
            share = paid[:, rows][:, :, places] / bias
            heads = max(1, math.floor(14 * len(share) / 32 + 0.5))
            order = sorted(range(len(share)), key=lambda head: -float(share[head].sum()))
            mean = share[order[:heads]].mean((0, 1))
        else:
            mean = paid[:, last_place(item, cell, case, seed), [item.places[i] for i in left]].mean(0)
        keep, n = COMPRESSORS["sparsevlmplus"].keep, len(item.eligible)
        last = count_of(keep, n, 1)
        count = last if stage else max(last, count_of(keep**0.5, n, 1))
        return best({i: float(score) for i, score in zip(left, mean, strict=True)}, count)

    return staged(report, cell, case, seed, (1, 2), choose)


def dart(report: Report, cell: Cell, case: str, seed: int) -> list[list[Choice]]:
    """One cut before layer 2: pivots by the keys of layer 1, one of the item and two of the text behind it."""
    seen, norm = see(cell, case, seed, {}), oracle.text_model(tiny(cell[0], "eager")).norm
    normed, strength = norm(seen.entering[2]).detach().double(), seen.keys[1].abs().sum((1, 3))
    cut = []
    for item in items(report, cell, case, seed):
        mine = {i: item.places[i] for i in item.eligible}
        count = count_of(COMPRESSORS["dart"].keep, len(mine), 1)
        (pivot,), gap = best({i: float(strength[item.row, place]) for i, place in mine.items()}, 1)
        asked = {place: float(strength[item.row, place]) for place in text_after(item, cell, case, seed)}
        text, text_gap = best(asked, 2)
        text.sort(key=lambda place: -asked[place])
        between = asked[text[0]] - asked[text[1]] if len(text) == 2 else math.inf
        gaps, kept = [gap, text_gap, between], [pivot]
        pivots = [item.places[pivot], *text]
        for place in pivots:
            vector = normed[item.row, place]
            rest = {
                i: -float(torch.cosine_similarity(vector, normed[item.row, mine[i]], dim=0))
                for i in mine
                if i not in kept
            }
            share = min(math.ceil((count - 1) / len(pivots)), count - len(kept))
            if share:
                taken, gap = best(rest, share)
                kept, gaps = kept + taken, [*gaps, gap]
        cut.append(Choice(sorted(kept), min(gaps)))
    return [cut]


FORMULAS: dict[str, Callable[[Report, Cell, str, int], list[list[Choice]]]] = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "divprune": divprune,
    "dart": dart,
    "sparsevlmplus": sparsevlmplus,
    "transprune": transprune,
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
    for seed in range(1, 2000):
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
    with compress(model, COMPRESSORS[name]) as session:
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=3)
    with oracle.masked_keys(model, keeps(session.report, cell, case, seed)):
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=3)
    assert torch.equal(got.sequences, want.sequences)
    assert oracle.max_error(got.logits, want.logits) <= 1e-5 * max(1.0, float(want.logits.abs().max()))
