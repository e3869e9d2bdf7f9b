"""TokenCorr: hand-computed numbers, invariants, and a plain loop over its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken import MMTokenError, VisualTokens
from mmtoken.compressors import Context, TokenCorr
from mmtoken.compressors.tokencorr import (
    density,
    drawing_order,
    near_duplicates,
    nearest_mean,
    outliers,
    prumerge32,
    select,
)
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.kernels.similarity_stats import reference
from tests.compressors.batches import item

# ------------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("attention", "found"),
    [
        ([0.02, 0.03, 0.03, 0.04, 0.04, 0.05, 0.06, 0.73], [7]),  # Q1 .03, Q3 .0525, bound .08625
        ([1, 1, 2, 2, 3, 3, 4, 20], [7]),  # Q1 1.75, Q3 3.25, bound 5.5
        ([0.125] * 8, []),  # no spread: strictly above nothing
        ([1.0, 2.0, 3.0, 4.0, 7.0], []),  # Q1 2, Q3 4, bound 7: at the bound is not above it
        ([1.0, 2.0, 3.0, 4.0, 7.01], [4]),
        ([5.0], []),
    ],
)
def test_what_stands_out_by_hand(attention, found):
    assert outliers(torch.tensor(attention, dtype=torch.float32), 1.5).nonzero()[:, 0].tolist() == found


def test_density_by_hand():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert near_duplicates(keys, 0.9).tolist() == [2, 2, 2, 0]
    assert density(keys, 0.9, 1) == 0.25
    assert density(keys, 0.9, 2) == 1.0  # two are not more than two
    assert density(torch.eye(7), 0.9, 0) == 1.0
    assert density(torch.ones(7, 3), 0.9, 5) == 0.0  # six near-duplicates are more than five
    assert density(torch.ones(7, 3), 0.9, 6) == 1.0
    assert density(torch.eye(7), 0.0, 0) == 1.0  # a cosine at the threshold is not above it


def test_no_cosine_is_above_one():
    for vector in torch.randn(200, 16, generator=torch.Generator().manual_seed(0)):
        assert density(vector.expand(3, -1), 1.0, 0) == 1.0


@pytest.mark.parametrize(("patches", "limit"), [(576, 29), (1024, 51), (36, 2), (10, 1), (9, 0), (16, 1)])
def test_the_default_limit_of_near_duplicates_is_a_twentieth_rounded(patches, limit):
    keys = torch.eye(patches)
    keys[: limit + 1] = keys[0]  # limit near-duplicates each
    assert density(keys, 0.9) == 1.0
    keys[: limit + 2] = keys[0]
    assert density(keys, 0.9) == pytest.approx(1 - (limit + 2) / patches)


def test_near_duplicates_in_tiles_are_those_in_one_piece(monkeypatch):
    keys = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
    whole = near_duplicates(keys, 0.6)
    for tile in (1, 7, 64, 69):
        monkeypatch.setattr(reference, "TILE", tile)
        assert torch.equal(near_duplicates(keys, 0.6), whole)
    assert 0 < int(whole.min()) < int(whole.max())


def test_drawing_the_most_attended_by_hand():
    share = torch.tensor([0.10, 0.30, 0.15, 0.21, 0.06, 0.12, 0.25]) / 1.19
    assert sorted(drawing_order(share, None)[:3].tolist()) == [1, 3, 6]
    assert drawing_order(torch.ones(5), None).tolist() == [0, 1, 2, 3, 4]


def test_a_blank_crop_keeps_what_stands_out_or_the_least():
    keys, flat = torch.ones(20, 3), torch.full((20,), 0.05)
    arguments = {"tau_s": 0.9, "tau_c": None, "factor": 1.5, "most": 20, "seed": None}
    assert select(flat, flat, keys, n_min=1, **arguments).tolist() == [0]
    assert select(flat, flat, keys, n_min=3, **arguments).tolist() == [0, 1, 2]
    peak = flat.clone()
    peak[[4, 9]] = 0.5
    assert select(peak, flat, keys, n_min=1, **arguments).tolist() == [4, 9]
    assert select(peak, flat, keys, n_min=3, **arguments).tolist() == [0, 4, 9]


def test_the_bound_cuts_what_was_drawn_last():
    deep = torch.tensor([0.1, 0.11, 0.1, 0.12, 0.1, 0.11, 0.9, 0.8])
    low = torch.tensor([0.3, 0.2, 0.7, 0.1, 0.4, 0.5, 0.0, 0.6])
    arguments = {"tau_s": 0.9, "tau_c": None, "factor": 1.5, "n_min": 1, "seed": None}
    kept = {most: select(deep, low, torch.eye(8), most=most, **arguments).tolist() for most in (8, 4, 3, 2, 1)}
    assert kept == {8: list(range(8)), 4: [2, 5, 6, 7], 3: [2, 6, 7], 2: [6, 7], 1: [6]}


def test_aggregation_by_hand():
    features = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    attention, size = torch.tensor([0.1, 0.3, 0.2, 0.6]), torch.tensor([1.0, 2.0, 3.0, 1.0])
    index, merged, stands_for = nearest_mean(features, size, attention, keys, torch.tensor([0, 2]))
    assert index.tolist() == [0, 2] and stands_for.tolist() == [3.0, 4.0]
    torch.testing.assert_close(merged, torch.tensor([[(0.1 * 1 + 0.3 * 2) / 0.4], [(0.2 * 4 + 0.6 * 8) / 0.8]]))
    # Fewer than 32 others: each kept one adds all of them; the extra token stands at the most attended dropped patch.
    index, merged, stands_for = prumerge32(features, size, attention, keys, torch.tensor([0, 2]))
    assert index.tolist() == [0, 2, 3] and stands_for.tolist() == [1.0, 3.0, 3.0]
    torch.testing.assert_close(merged, torch.tensor([[1 + 0.6 + 0.8 + 4.8], [4 + 0.1 + 0.6 + 4.8], [0.6 + 4.8]]))


def test_without_attention_the_mean_is_plain_and_finite():
    features, ones = torch.tensor([[1.0], [3.0], [5.0]]), torch.ones(3)
    _, merged, _ = nearest_mean(features, ones, torch.zeros(3), torch.ones(3, 2), torch.tensor([1]))
    torch.testing.assert_close(merged, torch.tensor([[3.0]]))


# --------------------------------------------------------------------------------------------------- a plain loop


@dataclass
class Pages(Context):
    """A context with its own facts for the deep and the low block: float[B, N], float[B, N], float[B, N, d]."""

    deep: Tensor
    low: Tensor
    keys: Tensor
    seeds: list[int]
    cropped: list[bool] | None = None
    tokenwise_projector: bool = False
    depth: int = 8
    blocks: int = 9

    def tower_attention(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        assert block in (None, 2)
        return self.deep if block is None else self.low

    def tower_keys(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        assert block == 2
        return self.keys

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        return self.seeds


def pages(counts: list[list[int]], seed: int, *, separators: bool = False) -> tuple[VisualTokens, Pages]:
    """Items of crops of these sizes, the first of which is the thumbnail where there are several; padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(sum, counts))
    valid = torch.arange(longest) < torch.tensor([sum(c) for c in counts])[:, None]
    parts = [torch.arange(len(c)).repeat_interleave(torch.tensor(c)) for c in counts]
    number = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    protected = (torch.rand(valid.shape, generator=generator) < 0.15) & valid & separators

    def random(*shape: int) -> Tensor:
        values = torch.randn(*valid.shape, *shape, generator=generator)
        return values.masked_fill(~valid.view(*valid.shape, *[1] * len(shape)), torch.nan)

    tokens = VisualTokens.from_features(random(4), valid=valid, protected=protected).replace(item=number)
    attention = [(2 * random()).exp() for _ in range(2)]
    seeds = [seed * 100 + row for row in range(len(counts))]
    return tokens, Pages(*attention, random(2), seeds, [len(c) > 1 for c in counts])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double()) / math.sqrt(float(a.double() @ a.double()) * float(b.double() @ b.double()))


def quartile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def crop_by_loop(method: TokenCorr, deep, low, keys, features, seed: int) -> dict[int, tuple[list[float], int]]:
    """By index in the crop: feature and how many patches it stands for."""
    count = len(deep)
    limit = math.floor(0.05 * count + 0.5) if method.tau_c is None else method.tau_c
    redundant = 0
    for i in range(count):
        near = sum(cosine(keys[i], keys[j]) > method.tau_s for j in range(count) if j != i)
        redundant += near > limit
    drawn = math.floor((1 - redundant / count) * count + 0.5)
    first, third = quartile(deep.tolist(), 0.25), quartile(deep.tolist(), 0.75)
    bound = third + method.factor * (third - first)
    by_deep = sorted(range(count), key=lambda i: (-float(deep[i]), i))
    out = [i for i in by_deep if float(deep[i]) > bound]
    if method.sampling == "top":
        draw = sorted(range(count), key=lambda i: (-float(low[i]), i))
    else:
        uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.double).tolist()
        total = sum(low.tolist())
        noisy = [math.log(float(p) / total) - math.log(-math.log(u)) for p, u in zip(low, uniform, strict=True)]
        draw = sorted(range(count), key=lambda i: -noisy[i])
    kept = out + [i for i in draw[:drawn] if i not in out]
    most = max(1, math.floor(method.keep * count + 0.5)) if isinstance(method.keep, float) else method.keep
    extra = method.aggregate == "prumerge32" and most > 1
    most = most - 1 if extra and most < count else most
    kept = kept[:most]
    for i in by_deep:
        if len(kept) < min(method.n_min, most) and i not in kept:
            kept.append(i)
    kept.sort()
    dropped = [i for i in range(count) if i not in kept]
    x = [f.double() for f in features]
    result = {i: (x[i].tolist(), 1) for i in kept}
    if method.aggregate == "nearest_mean":
        members: dict[int, list[int]] = {i: [i] for i in kept}
        for j in dropped:
            members[max(kept, key=lambda i: (cosine(keys[i], keys[j]), -i))].append(j)
        for i, own in members.items():
            total = sum(float(deep[j]) for j in own)
            result[i] = (sum(float(deep[j]) * x[j] for j in own).div(total).tolist(), len(own))
    elif method.aggregate == "prumerge32":
        for i in kept:
            near = sorted((j for j in range(count) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:32]
            result[i] = ((x[i] + sum((float(deep[j]) * x[j] for j in near), torch.zeros(4))).tolist(), 1)
        if dropped and extra:
            place = max(dropped, key=lambda j: (float(deep[j]), -j))
            result[place] = (sum(float(deep[j]) * x[j] for j in dropped).tolist(), len(dropped))
    return result


METHODS = {
    "default": TokenCorr(),
    "loose": TokenCorr(tau_s=0.6, tau_c=1, factor=0.5),
    "bounded": TokenCorr(keep=0.3, tau_s=0.99),
    "count": TokenCorr(keep=4, n_min=2),
    "least": TokenCorr(tau_s=-0.5, tau_c=0, factor=50.0, n_min=3),
    "drawn": TokenCorr(sampling="multinomial", tau_s=0.7, seed=5),
    "untouched": TokenCorr(aggregate="none", tau_s=0.8),
    "prumerge": TokenCorr(aggregate="prumerge32", tau_s=0.8),
    "prumerge-bounded": TokenCorr(keep=0.3, aggregate="prumerge32"),
    "prumerge-one": TokenCorr(keep=1, aggregate="prumerge32"),
}


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=20)
@given(
    counts=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 9999),
    separators=st.booleans(),
)
def test_every_crop_is_the_plain_loop_and_thumbnails_stay(name, counts, seed, separators):
    method = METHODS[name]
    tokens, context = pages(counts, seed, separators=separators)
    left = act_on(method, tokens, context)
    for row in range(len(counts)):
        expected: dict[int, tuple[list[float], int]] = {}
        for number in range(len(counts[row])):
            where = (tokens.eligible[row] & (tokens.item[row] == number)).nonzero()[:, 0]
            if number == 0 and len(counts[row]) > 1:
                expected |= {int(i): (tokens.features[row, i].tolist(), 1) for i in where}
            elif len(where):
                facts = (values[row, where] for values in (context.deep, context.low, context.keys, tokens.features))
                seed_here = (context.seeds[row] + 0x9E3779B97F4A7C15 * (number + 1) + method.seed) % 2**63
                found = crop_by_loop(method, *facts, seed_here)
                expected |= {int(where[i]): value for i, value in found.items()}
        found = item(left, row)
        plain = ~found["protected"]
        assert found["source"][plain].tolist() == sorted(expected)
        values = torch.tensor([expected[i][0] for i in sorted(expected)], dtype=torch.float32).view(-1, 4)
        tolerance = 1e-5 * max(1.0, float(values.abs().max()) if len(values) else 1.0)
        torch.testing.assert_close(found["features"][plain], values, rtol=0, atol=tolerance)
        assert found["size"][plain].tolist() == [expected[i][1] for i in sorted(expected)]
        assert torch.equal(found["source"][~plain], tokens.source[row][tokens.protected[row]])


def act_on(method: TokenCorr, tokens: VisualTokens, context: Pages) -> VisualTokens:
    return method.project(tokens, lambda same: same, context)


# ---------------------------------------------------------------------------------------------------- invariants


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), count=st.integers(2, 60), scale=st.floats(0.01, 100.0))
def test_invariants(seed, count, scale):
    generator = torch.Generator().manual_seed(seed)
    keys, low, deep = (torch.randn(count, n, generator=generator) for n in (2, 1, 1))
    low, deep = (values[:, 0].exp() for values in (low, deep))
    thresholds = [density(keys, tau_s, 1) for tau_s in (-1.0, 0.0, 0.5, 0.9, 0.999, 1.0)]
    limits = [density(keys, 0.8, tau_c) for tau_c in range(count)]
    assert thresholds == sorted(thresholds) and limits == sorted(limits)
    assert torch.equal(outliers(deep, 1.5), outliers(deep * 2.0 ** round(math.log2(scale)), 1.5))
    arguments = {"tau_s": 0.8, "tau_c": 1, "factor": 1.5, "n_min": 1, "most": count, "seed": None}
    kept = select(deep, low, keys, **arguments)
    drawn, out = math.floor(density(keys, 0.8, 1) * count + 0.5), int(outliers(deep, 1.5).sum())
    assert max(out, drawn, 1) <= len(kept) <= max(1, out + drawn)
    order = torch.randperm(count, generator=generator)
    shuffled = select(deep[order], low[order], keys[order], **arguments)
    assert sorted(order[shuffled].tolist()) == kept.tolist()
    features = torch.randn(count, 3, generator=generator)
    _, merged, size = nearest_mean(features, torch.ones(count), deep, keys, kept)
    assert float(size.sum()) == count
    slack = 1e-5 * max(1.0, float(features.abs().max()))
    assert bool((merged <= features.amax(0) + slack).all() and (merged >= features.amin(0) - slack).all())
    everything = torch.arange(count)
    for merge in (nearest_mean,):
        index, same, _ = merge(features, torch.ones(count), deep, keys, everything)
        assert torch.equal(same, features) and torch.equal(index, everything)


def test_a_blank_crop_keeps_fewer_than_a_dense_one_and_the_thumbnail_all():
    tokens, context = pages([[16, 16, 16]], 3)
    context.keys[0, 16:32] = torch.tensor([1.0, 0.2]) + 0.01 * context.keys[0, 16:32]  # paper
    context.keys = torch.cat([context.keys, torch.zeros(1, 48, 14)], -1)
    context.keys[0, 32:48] += 3 * torch.eye(16)  # no two alike
    left = act_on(TokenCorr(aggregate="none"), tokens, context)
    numbers = left.item[0][left.valid[0]].bincount(minlength=3).tolist()
    assert numbers[0] == 16 and numbers[1] < 6 and numbers[2] == 16


def test_a_picture_that_is_not_cut_is_compressed():
    tokens, context = pages([[30]], 4)
    assert act_on(TokenCorr(tau_s=0.5), tokens, context).counts()[0] < 30
    context.cropped = None
    assert act_on(TokenCorr(tau_s=0.5), tokens, context).counts()[0] < 30
    context.cropped = [True]  # the thumbnail of a page whose crops are other items
    assert act_on(TokenCorr(tau_s=0.5), tokens, context).counts() == [30]


@pytest.mark.parametrize("aggregate", ["none", "nearest_mean", "prumerge32"])
@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 40), keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)), seed=st.integers(0, 999))
def test_keep_is_an_upper_bound_that_counts_everything(aggregate, count, keep, seed):
    tokens, context = pages([[count]], seed)
    left = act_on(TokenCorr(keep=keep, aggregate=aggregate, tau_s=1.0), tokens, context).counts()
    assert 1 <= left[0] <= tokens.budget(keep)[0]
    if aggregate != "prumerge32":
        assert left == tokens.budget(keep)  # nothing is redundant, so the bound decides


def test_drawing_depends_on_content_crop_and_seed_and_on_nothing_else():
    tokens, context = pages([[40, 30, 30], [40, 30, 30]], 6)
    method = TokenCorr(sampling="multinomial", tau_s=0.9, aggregate="none", factor=50.0)
    for values in (context.deep, context.low, context.keys):
        values[1] = values[0]
        values[0, 70:] = values[0, 40:70]
        values[1, 70:] = values[1, 40:70]
    first = act_on(method, tokens, context)
    assert all(torch.equal(a, b) for a, b in zip(first.kept(), act_on(method, tokens, context).kept(), strict=True))
    one, two = ([s for s in first.kept()[row].tolist() if s >= 40] for row in range(2))
    assert one != two  # other pixels
    assert [s - 40 for s in one if s < 70] != [s - 70 for s in one if s >= 70]  # another crop
    assert first.kept()[0].tolist() != act_on(replace(method, seed=1), tokens, context).kept()[0].tolist()
    context.seeds = [context.seeds[0]] * 2
    same = act_on(method, tokens, context)
    assert torch.equal(same.kept()[0], same.kept()[1])


def test_drawing_follows_the_attention():
    """Of two patches with attention 3 : 1 the first is drawn first in three quarters of all draws."""
    share = torch.tensor([3.0, 1.0])
    first = sum(int(drawing_order(share, seed)[0]) == 0 for seed in range(2000))
    assert abs(first / 2000 - 0.75) < 0.03  # three standard deviations
    assert drawing_order(torch.tensor([0.0, 1.0, 0.0]), 3)[0] == 1


# ------------------------------------------------------------------------------------------- where it sits, and input


@pytest.mark.parametrize(
    ("reading", "tokenwise", "projected"),
    [("auto", True, "after"), ("auto", False, "before"), ("patches", True, "after"), ("outputs", True, "before")],
)
def test_both_readings_of_where_it_sits(reading, tokenwise, projected):
    tokens, context = pages([[40]], 7)
    context.tokenwise_projector = tokenwise
    seen = []

    def square(some: VisualTokens) -> VisualTokens:
        seen.append(some.features.shape[1])
        return some.replace(features=some.features**2)

    method = TokenCorr(tau_s=0.7, reading=reading)
    left = method.project(tokens, square, context)
    patches = act_on(replace(method, reading="auto"), tokens, context)
    assert torch.equal(left.source, patches.source)
    if projected == "after":
        assert seen == [left.features.shape[1]]
        torch.testing.assert_close(left.features, patches.features**2)
    else:
        assert seen == [40]
        mean_of_squares = act_on(method, tokens.replace(features=tokens.features**2), context)
        torch.testing.assert_close(left.features, mean_of_squares.features)
        assert not torch.allclose(left.features, patches.features**2)


def test_patches_are_refused_where_the_projector_groups_them():
    tokens, context = pages([[9]], 0)
    with pytest.raises(UnsupportedError, match="reading='patches'"):
        act_on(TokenCorr(reading="patches"), tokens, context)


@pytest.mark.parametrize(
    ("method", "depth", "layers"),
    [
        (TokenCorr(), 24, (6,)),
        (TokenCorr(), 23, (5,)),
        (TokenCorr(), 3, (0,)),
        (TokenCorr(low=7, deep=20), 24, (7, 20)),
        (TokenCorr(low=23, deep=23), 24, ()),
        (TokenCorr(low=3, deep=3), 24, (3,)),
    ],
)
def test_blocks_that_are_read(method, depth, layers):
    assert method.tower_layers(depth, depth + 1) == layers


@pytest.mark.parametrize("name", ["deep", "low"])
def test_a_block_that_the_tower_lacks_is_refused(name):
    with pytest.raises(UnsupportedError, match=f"{name}=12 but this tower has 12 blocks"):
        TokenCorr(**{name: 12}).tower_layers(11, 12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("deep", value) for value in (-1, True, 2.0, "2")),
        *(("low", value) for value in (-1, True, 2.0)),
        *(("tau_s", value) for value in (-1.5, 1.01, math.nan, True, "0.9", None)),
        *(("tau_c", value) for value in (-1, True, 0.05)),
        *(("factor", value) for value in (-0.1, math.nan, math.inf, True, None)),
        *(("seed", value) for value in (-1, True, None)),
        *(("n_min", value) for value in (0, True, 1.0)),
        *((name, "both") for name in ("sampling", "aggregate", "heads", "reading")),
        *((name, None) for name in ("sampling", "aggregate", "heads", "reading")),
    ],
)
def test_bad_settings_name_the_field_the_value_and_a_way_out(field, value):
    with pytest.raises(MMTokenError, match=f"{field}={value!r}.*(give|use)"):
        TokenCorr(**{field: value})


@pytest.mark.parametrize("name", ["deep", "low", "keys"])
def test_not_a_number_is_an_error_that_names_the_item(name):
    tokens, context = pages([[9], [9]], 0)
    getattr(context, name)[1, 3] = math.nan
    with pytest.raises(InputError, match="NaN for item 1"):
        act_on(TokenCorr(), tokens, context)


def test_heads_decide_what_is_asked_for():
    asked = []

    class Asked(Pages):
        def tower_attention(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
            asked.append(("attention", block, joint))
            return super().tower_attention(tokens, block, joint=joint)

        def tower_keys(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
            asked.append(("keys", block, joint))
            return super().tower_keys(tokens, block, joint=joint)

    tokens, context = pages([[9]], 0)
    act_on(TokenCorr(), tokens, Asked(**vars(context)))
    act_on(TokenCorr(heads="mean"), tokens, Asked(**vars(context)))
    both = [("attention", None), ("attention", 2), ("keys", 2)]
    assert asked == [(*one, True) for one in both] + [(*one, False) for one in both]
