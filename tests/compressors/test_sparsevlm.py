"""SparseVLM and SparseVLM+: worked examples, invariants, and plain loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken import MMTokenError, VisualTokens
from mmtoken.compressors import SparseVLM, SparseVLMPlus
from mmtoken.compressors.sparsevlm import (
    attention_ranks,
    behind,
    choose_raters,
    cluster,
    cluster_means,
    rotary_bias,
    unbiased_scores,
)
from mmtoken.errors import InputError
from tests.compressors.batches import Given, act, item, lengths, make

# -------------------------------------------------------------------------------------------------------------- raters


def raters_by_loops(visual: list[list[float]], text: list[list[float]]) -> list[bool]:
    """Text tokens above the mean of softmax over text of dot products, averaged over the image."""
    weight = [0.0] * len(text)
    for v in visual:
        dots = [sum(a * b for a, b in zip(v, t, strict=True)) for t in text]
        mass = sum(math.exp(dot) for dot in dots)
        for i, dot in enumerate(dots):
            weight[i] += math.exp(dot) / mass / len(visual)
    chosen = [w > sum(weight) / len(weight) + 1e-7 for w in weight]
    return chosen if any(chosen) else [True] * len(text)


def test_raters_are_the_text_tokens_above_the_mean():
    visual = torch.tensor([[[1.0, 0.0], [0.8, 0.1]]])
    text = torch.tensor([[[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [1.9, 0.0]]])
    every = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    assert choose_raters(visual, every[0], text, every[1]).tolist() == [[True, False, False, True]]
    # Without the first one the mean is lower.
    asked = torch.tensor([[False, True, True, True]])
    assert choose_raters(visual, every[0], text, asked).tolist() == [[False, False, False, True]]


@settings(deadline=None, max_examples=40)
@given(sizes=lengths(12), seed=st.integers(0, 9999), separators=st.booleans())
def test_raters_of_ragged_batches_are_those_of_the_plain_loop(sizes, seed, separators):
    tokens, context = make(sizes, seed, separators=separators)
    text = context.text(tokens)
    found = choose_raters(tokens.features, tokens.eligible, text.embeddings, text.after)
    for row in range(len(sizes)):
        asked = text.after[row].nonzero()[:, 0]
        want = raters_by_loops(
            tokens.features[row][tokens.eligible[row]].tolist(), text.embeddings[row, asked].tolist()
        )
        assert found[row, asked].tolist() == want and int(found[row].sum()) == sum(want)


def test_a_single_text_token_rates_although_it_is_not_above_its_own_mean():
    one = torch.ones(1, 1, dtype=torch.bool)
    assert choose_raters(torch.ones(1, 1, 2), one, torch.ones(1, 1, 2), one).tolist() == [[True]]
    assert choose_raters(torch.ones(1, 1, 2), one, torch.ones(1, 1, 2), ~one).tolist() == [[False]]


def test_raters_are_chosen_once_from_what_entered_the_decoder():
    tokens, context = make([20])
    method = SparseVLM(keep=0.3)
    asked = []

    class Notes(Given):
        def embeddings(self, tokens):
            asked.append(tokens.counts())
            return super().embeddings(tokens)

        def text_attention(self, tokens, layer, rows="last"):
            rated.append(rows)
            return super().text_attention(tokens, layer, rows)

    rated: list[Tensor] = []
    act(method, tokens, Notes(**vars(context)))
    assert asked == [[20]] and len(rated) == len(method.cut_layers(8)) > 1
    assert all(torch.equal(rows, rated[0]) for rows in rated)


# -------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("table", "left"),
    [((300, 200, 110), (309, 204, 113)), ((303, 110, 36), (312, 117, 39)), ((66, 30, 17), (82, 32, 18))],
)
def test_the_official_tables_and_what_clusters_add_to_them(table, left):
    method, now = SparseVLM(keep=table[-1], layers=(3, 7, 16), stages=table, variant="repo"), 576
    for kept, after in zip(table, left, strict=True):
        found = method.split(now, kept)
        assert found[0] == kept and sum(found) == after
        now = after


def test_the_official_code_prunes_at_least_one_token():
    method = SparseVLM(variant="repo")
    assert method.split(10, 10) == (9, 1) and method.split(1, 1) == (0, 1)
    tokens, context = make([10])
    assert act(SparseVLMPlus(keep=1.0, layers=(1,), variant="repo"), tokens, context).counts() == [9]


@settings(deadline=None)
@given(
    total=st.integers(1, 400),
    share=st.floats(0.0, 1.0),
    recycle=st.floats(0.01, 1.0),
    members=st.integers(1, 20),
)
def test_kept_tokens_and_clusters_make_up_the_budget(total, share, recycle, members):
    method = SparseVLM(recycle=recycle, members=members)
    budget = max(1, math.floor(share * total))
    kept, clusters = method.split(total, budget)
    assert kept + clusters == budget and kept >= 1
    recycled = min(int(recycle * (total - kept)) + 1, total - kept)
    natural = min(int(recycled / members) + 1, recycled)
    assert clusters <= natural
    if kept > 1:
        assert clusters == natural


def test_stages_follow_a_geometric_series_down_to_the_budget():
    tokens, context = make([64])
    context.depth = 32
    method, found = SparseVLM(keep=0.125), []
    for layer in method.cut_layers(32):
        tokens = method.llm_layer(tokens, layer, context)
        found.append(tokens.counts()[0])
    assert found == [32, 16, 8]


def test_the_papers_default_budget_is_the_last_of_its_192_table():
    tokens = VisualTokens.from_features(torch.zeros(1, 576, 2))
    assert tokens.budget(SparseVLM().keep) == [113] and tokens.budget(SparseVLMPlus().keep) == [113]


def test_the_rank_rule_prunes_in_proportion_to_what_the_rank_leaves_over():
    attention = torch.tensor([[[1.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 2.0], [0.0, 1.0, 0.0, math.nan]]])
    eligible = torch.tensor([[True, True, True, False]])
    assert attention_ranks(attention, eligible) == [2]
    tokens, context = make([40])
    context.depth = 32
    method, found = SparseVLM(keep=0.1, scale=0.5), []
    for layer in method.cut_layers(32):
        rank = (
            attention_ranks(context.head_attention(tokens, 0, context.memory["raters"]).mean(1), tokens.eligible)[0]
            if context.memory
            else 1
        )
        n = tokens.counts()[0]
        tokens = method.llm_layer(tokens, layer, context)
        found.append((n, rank, tokens.counts()[0]))
    # The stand-in's raters pay attention in proportion, so the rank is 1; the last stage meets the budget.
    assert [rank for _, rank, _ in found] == [1, 1, 1]
    assert [left for _, _, left in found] == [40 - 19, 21 - 10, 4]


# ------------------------------------------------------------------------------------------------------------ clusters


def cluster_by_loops(points: list[list[float]], count: int) -> tuple[list[int], list[int]]:
    """Density peaks with plain loops; equal densities are equal to within rounding."""
    total, width = len(points), len(points[0])

    def distance(i: int, j: int) -> float:
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(points[i], points[j], strict=True)) / width)

    everyone = range(total)
    density = []
    for i in everyone:
        near = sorted(distance(i, j) for j in everyone)[:count]
        density.append(math.exp(-sum(d * d for d in near) / count))

    def denser(j: int, i: int) -> bool:
        if abs(density[j] - density[i]) < 1e-9:
            return j < i
        return density[j] > density[i]

    farthest = max(distance(i, j) for i in everyone for j in everyone)
    score = []
    for i in everyone:
        others = [distance(i, j) for j in everyone if j != i and denser(j, i)]
        score.append(density[i] * min(others, default=farthest))
    centres = sorted(everyone, key=lambda i: (-score[i], i))[:count]
    owner = []
    for i in everyone:
        owner.append(centres.index(i) if i in centres else min(range(count), key=lambda c: distance(i, centres[c])))
    return centres, owner


def test_two_groups_worked_out_by_hand():
    # Around 0 and around 10. Three nearest, itself included: densities exp(-5/3), exp(-2/3), exp(-5/3) and the same.
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    centres, owner = cluster(points, 3)
    assert centres[:2].tolist() == [1, 4]  # of the two densest the lower index is the densest of all
    assert owner[:3].unique().tolist() != owner[3:].unique().tolist()
    merged = cluster_means(points, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    torch.testing.assert_close(merged, torch.tensor([[1.0], [11.0]]))


@settings(deadline=None, max_examples=40)
@given(total=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 9999), width=st.sampled_from([1, 3, 8]))
def test_clusters_are_those_of_the_plain_loop(total, share, seed, width):
    points = torch.randn(total, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Coarse numbers, so that equal densities are equal in either arithmetic.
    points = (points * 64).round() / 64
    count = max(1, int(share * total))
    centres, owner = cluster(points, count)
    assert (centres.tolist(), owner.tolist()) == cluster_by_loops(points.tolist(), count)


def test_of_equally_dense_tokens_the_lower_index_is_the_centre():
    assert cluster(torch.tensor([[3.0], [0.0], [1.0]]), 1)[0].tolist() == [0]  # one cluster: all densities are 1
    # 1 and 2 are each other's nearest and equally dense, exp(-1/2): 2 is at 1 from a denser token, 3 at 1.5 but thin.
    centres, owner = cluster(torch.tensor([[9.0], [0.0], [1.0], [2.5]]), 2)
    assert centres.tolist() == [1, 2] and owner.tolist() == [1, 0, 1, 1]
    centres, owner = cluster(torch.zeros(5, 2), 3)
    assert centres.tolist() == [0, 1, 2] and owner.tolist() == [0, 1, 2, 0, 0]


def test_distances_in_tiles_are_the_same(monkeypatch):
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    whole = cluster(points, 6)
    monkeypatch.setattr("mmtoken.compressors.sparsevlm.TILE", 7)
    for a, b in zip(cluster(points, 6), whole, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- merging


@settings(deadline=None, max_examples=30)
@given(sizes=lengths(40), seed=st.integers(0, 9999), separators=st.booleans(), keep=st.floats(0.05, 1.0))
def test_one_stage_is_the_plain_loop(sizes, seed, separators, keep):
    tokens, context = make(sizes, seed, separators=separators)
    method = SparseVLM(keep=keep, layers=(2,), recycle=0.6, members=4)
    left = act(method, tokens, context)
    for row in range(len(sizes)):
        mine = tokens.eligible[row].nonzero()[:, 0].tolist()
        budget = max(1, math.floor(keep * len(mine) + 0.5)) if mine else 0
        order = sorted(mine, key=lambda i: (-float(context.received[row, i]), i))
        want = {i: tokens.features[row, i] for i in mine}
        sizes_want = dict.fromkeys(mine, 1.0)
        if budget < len(mine):
            kept, clusters = method.split(len(mine), budget)
            pruned = order[kept:]
            best = pruned[: min(int(0.6 * len(pruned)) + 1, len(pruned))] if clusters else []
            want = {i: tokens.features[row, i] for i in order[:kept]}
            if clusters:
                centres, owner = cluster(tokens.features[row, best], clusters)
                for number, centre in enumerate(centres.tolist()):
                    members = [best[i] for i in range(len(best)) if owner[i] == number]
                    want[best[centre]] = tokens.features[row, members].mean(0)
                    sizes_want[best[centre]] = float(len(members))
        found = item(left, row)
        counted = ~found["protected"]
        assert found["source"][counted].tolist() == sorted(want)
        for i, features, size in zip(
            found["source"][counted].tolist(), found["features"][counted], found["size"][counted], strict=True
        ):
            torch.testing.assert_close(features, want[i], rtol=1e-5, atol=1e-6)
            assert size == sizes_want[i]


def test_tokens_come_out_in_the_order_of_their_positions():
    tokens, context = make([40, 23], separators=True)
    for method in (SparseVLM(keep=0.3), SparseVLM(keep=9, variant="repo")):
        left = act(method, tokens, context)
        for row in range(2):
            source = left.source[row, left.valid[row]]
            assert bool((source.diff() > 0).all())


def test_the_official_order_puts_clusters_behind_the_kept_tokens():
    tokens, context = make([40])
    method = SparseVLM(keep=12, layers=(2,), stages=(12,), recycle=0.6, members=4, variant="repo")
    left = act(method, tokens, context)
    kept, clusters = method.split(40, 12)
    assert (kept, clusters) == (12, 5) and left.counts() == [17]
    best = context.received[0].argsort(descending=True)[:12].sort().values
    assert torch.equal(left.features[0, :12], tokens.features[0, best])
    assert left.source[0, 12:].tolist() == [35, 36, 37, 38, 39] and bool((left.size[0, 12:] >= 1).all())
    assert float(left.size[0, 12:].sum()) == int(0.6 * 28) + 1


@pytest.mark.parametrize(
    ("places", "kept", "clusters", "want"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 2], 2, [0, 2, 4, 5]),
        ([0, 1, 2, 3, 4, 5], [0, 4, 5], 2, [0, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 4, 5], [3, 4, 5], 3, [0, 1, 2, 3, 4, 5]),
        ([2, 3, 7, 9, 12], [3, 12], 1, [3, 9, 12]),
        ([2, 3, 7, 9, 12], [3, 12], 0, [3, 12]),
        ([2, 3], [], 1, [3]),
    ],
)
def test_places_of_clusters_behind_kept_tokens(places, kept, clusters, want):
    found = behind(torch.tensor(places), torch.tensor(kept, dtype=torch.long), clusters)
    assert found.tolist() == want


def test_gradients_flow_through_the_means():
    tokens, context = make([30])
    features = tokens.features.clone().requires_grad_()
    act(SparseVLM(keep=0.3, layers=(2,)), tokens.replace(features=features), context).features.sum().backward()
    recycled = int((features.grad.abs().sum(-1) > 0).sum())
    assert recycled > 9  # the kept ones and the members of clusters


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_an_error_that_names_the_item(bad):
    tokens, context = make([9, 9])
    features = tokens.features.clone()
    context.embeddings = lambda _: tokens.features  # type: ignore[method-assign]
    features[1, 4] = bad
    with pytest.raises(InputError, match="features contains NaN for item 1"):
        SparseVLM(keep=0.5).llm_layer(tokens.replace(features=features), SparseVLM().cut_layers(8)[0], context)


# ---------------------------------------------------------------------------------------------------------------- plus


def rotated_ones(position: float, frequencies: Tensor) -> Tensor:
    """A vector of ones, its pairs (i, i + half) turned by position * frequency."""
    half = len(frequencies)
    out = torch.zeros(2 * half, dtype=torch.float64)
    for i, frequency in enumerate(frequencies.tolist()):
        angle = position * frequency
        out[i] = math.cos(angle) - math.sin(angle)
        out[i + half] = math.cos(angle) + math.sin(angle)
    return out


@pytest.mark.parametrize("width", [8, 12])
def test_the_bias_is_the_scaled_dot_product_of_rotated_ones(width):
    frequencies = torch.tensor([1.0, 0.1, 0.03, 0.01])

    def table(places: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.cat([frequencies, frequencies]) * places[None, :, None]
        return angle.cos(), angle.sin()

    rows, columns = torch.tensor([9.0, 30.0]), torch.arange(5.0)
    found = rotary_bias(table(rows), table(columns), width)
    for r, row in enumerate(rows.tolist()):
        for c, column in enumerate(columns.tolist()):
            dot = float(rotated_ones(row, frequencies) @ rotated_ones(column, frequencies)) + (width - 8)
            assert float(found[0, r, c]) == pytest.approx(dot / math.sqrt(width), abs=1e-5)


def test_the_bias_depends_on_the_distance_alone():
    angle = torch.arange(12.0)[None, :, None] * torch.ones(6) * 0.3
    bias = rotary_bias((angle.cos(), angle.sin()), (angle.cos(), angle.sin()), 6)[0]
    for shift in range(12):
        diagonal = bias.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    torch.testing.assert_close(bias.diagonal(), torch.full((12,), math.sqrt(6)))


def test_the_heads_that_are_averaged_are_those_with_the_largest_sum_after_the_division():
    attention = torch.tensor([[[[0.1, 0.2]], [[0.4, 0.1]], [[0.3, 0.3]]]])
    bias = torch.tensor([[[1.0, 0.1]]])
    every = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    # Shares .1 + 2, .4 + 1, .3 + 3.
    found = [unbiased_scores(attention, bias, *every, heads)[0].tolist() for heads in (1, 2, 3)]
    assert found[0] == pytest.approx([0.3, 3.0])
    assert found[1] == pytest.approx([0.2, 2.5])
    assert found[2] == pytest.approx([0.8 / 3, 2.0])


@settings(deadline=None, max_examples=30)
@given(sizes=lengths(20), seed=st.integers(0, 9999), separators=st.booleans(), heads=st.sampled_from([1, 2]))
def test_selection_of_the_second_version_is_the_plain_loop(sizes, seed, separators, heads):
    tokens, context = make(sizes, seed, separators=separators)
    method = SparseVLMPlus(keep=0.4, layers=(3,), heads=heads)
    left = act(method, tokens, context)
    text = context.text(tokens)
    for row in range(len(sizes)):
        mine = tokens.eligible[row].nonzero()[:, 0].tolist()
        asked = text.after[row].nonzero()[:, 0].tolist()
        rating = raters_by_loops(tokens.features[row, mine].tolist(), text.embeddings[row, asked].tolist())
        raters = [place for place, yes in zip(asked, rating, strict=True) if yes]
        # The stand-in: text stands at 40 and on, tokens at 1 and on, all frequencies are .1, widths 4; head h pays
        # (h + 1) / 2 of what is received, rater number r one (r + 1)th of it.
        frequencies = torch.tensor([0.1, 0.1])
        share = [[dict.fromkeys(mine, 0.0) for _ in raters] for _ in range(2)]
        for head in range(2):
            for number, rater in enumerate(raters):
                for i in mine:
                    bias = float(rotated_ones(40 + rater, frequencies) @ rotated_ones(1 + i, frequencies)) / 2
                    paid = float(context.received[row, i]) * (head + 1) / 2 / (1 + number)
                    share[head][number][i] = paid / bias
        mass = [sum(sum(by.values()) for by in share[head]) for head in range(2)]
        best = sorted(range(2), key=lambda head: (-mass[head], head))[:heads]
        score = {i: sum(by[i] for head in best for by in share[head]) for i in mine}
        budget = max(1, math.floor(0.4 * len(mine) + 0.5)) if mine else 0
        assert left.kept()[row].tolist() == sorted(sorted(mine, key=lambda i: (-score[i], i))[:budget])


def test_the_second_version_asks_the_last_token_where_no_text_follows():
    tokens, context = make([12, 9])
    context.word_counts[:] = torch.tensor([1, 3])  # the only text token of item 0 comes before it
    left = act(SparseVLMPlus(keep=0.5, layers=(2,)), tokens, context)
    best = context.received[0].argsort(descending=True)[:6].sort().values
    assert torch.equal(left.kept()[0], best)


def test_how_many_heads():
    assert [SparseVLMPlus()._heads(heads) for heads in (32, 28, 16, 4, 1)] == [14, 12, 7, 2, 1]
    assert [SparseVLMPlus(variant="repo")._heads(heads) for heads in (32, 16, 4)] == [14, 14, 4]
    assert SparseVLMPlus(heads=3)._heads(2) == 2


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("cls", [SparseVLM, SparseVLMPlus])
@pytest.mark.parametrize(
    ("depth", "cuts"), [(32, (3, 7, 16)), (28, (3, 6, 14)), (8, (1, 2, 4)), (4, (1, 2)), (2, (1,))]
)
def test_the_papers_layers_are_scaled_to_the_decoder(cls, depth, cuts):
    assert cls().cut_layers(depth) == cuts
    assert cls().score_layers(depth) == tuple(cut - 1 for cut in cuts)


BOTH = [
    *(("layers", value) for value in ("246", 2, (), (0, 1), (2, 2), (4, 2), (1, True), (1.0,))),
    *(("stages", value) for value in ("0.5", 0.5, (), (0,), (1.5,), (0.1, 0.196), (64,), (True,), (64, 0.196))),
    *(("variant", value) for value in ("official", None, True)),
]


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        *((cls, *entry) for cls in (SparseVLM, SparseVLMPlus) for entry in BOTH),
        *((SparseVLM, field, value) for field in ("recycle", "scale") for value in (0, 1.1, -0.5, math.nan, True, "1")),
        *((SparseVLM, "members", value) for value in (0, -1, True, 2.0, None)),
        *((SparseVLMPlus, "heads", value) for value in (0, -1, True, 2.0, "2")),
    ],
)
def test_bad_settings_are_errors_that_name_them_and_a_way_out(cls, field, value):
    with pytest.raises(MMTokenError, match=f"{field}=.*(give|use|keep|is an int)"):
        cls(**{field: value})


@pytest.mark.parametrize("cls", [SparseVLM, SparseVLMPlus])
def test_stages_and_layers_must_fit(cls):
    with pytest.raises(MMTokenError, match="3 stages but layers"):
        cls(keep=2, layers=(1, 2), stages=(9, 4, 2))
    with pytest.raises(MMTokenError, match="3 stages but layers"):
        cls(keep=2, stages=(9, 4, 2)).cut_layers(4)
    assert cls(keep=2, stages=[9, 4, 2]).stages == (9, 4, 2)


def test_the_rank_rule_and_a_table_exclude_each_other():
    with pytest.raises(MMTokenError, match="give one of them"):
        SparseVLM(keep=2, stages=(9, 4, 2), scale=0.5)
