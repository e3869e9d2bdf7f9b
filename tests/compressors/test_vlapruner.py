"""VLA-Pruner: worked examples, invariants, and plain loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken import MMTokenError
from mmtoken.compressors import VLAPruner
from mmtoken.compressors.vlapruner import diverse, inner_rows, smooth
from mmtoken.errors import InputError, UnsupportedError
from mmtoken.tokens import VisualTokens, top_mask
from tests.compressors.batches import Given, act, lengths, make

HISTORY = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])[:, None]
VECTORS = torch.tensor([[1.0, 0.0], [0.98, 0.2], [0.0, 1.0], [-1.0, 0.1]])


def everyone(count: int) -> Tensor:
    return torch.ones(1, count, dtype=torch.bool)


# --------------------------------------------------------------------------------------------------- worked examples


def test_the_paper_lets_the_newest_call_count_most():
    found = smooth(HISTORY, 0.8, everyone(4))[0]
    torch.testing.assert_close(found, torch.tensor([0.257377, 0.296721, 0.345902, 0.1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found * 1.952, torch.tensor([0.5024, 0.5792, 0.6752, 0.1952]), rtol=0, atol=1e-6)
    assert int(found.argmax()) == 2


def test_the_official_code_lets_the_oldest_call_count_most_and_rounds_to_bfloat16():
    found = smooth(HISTORY, 0.8, everyone(4), variant="repo")[0]
    want = torch.tensor([0.345902, 0.296721, 0.257377, 0.1])
    assert torch.equal(found, want.bfloat16().float()) and found.dtype == torch.float32
    assert int(found.argmax()) == 0


def test_the_official_order_alone_is_a_decay_above_one():
    found = smooth(HISTORY, 1 / 0.8, everyone(4))[0]
    want = torch.tensor([0.345902, 0.296721, 0.257377, 0.1])  # as above, not rounded
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_the_official_sum_leaves_out_what_is_not_the_items():
    some = torch.tensor([[True, True, False, False]])
    history = HISTORY.masked_fill(~some, math.nan)
    found = smooth(history, 0.8, some, variant="repo")[0, :2]
    assert torch.equal(found, (torch.tensor([0.844, 0.724]) / 1.568).bfloat16().float())


def test_diversity_worked_out_by_hand():
    # Distances to the nearest other: .020196, .020196, .800040, .900496.
    every = torch.ones(4, dtype=torch.bool)
    assert diverse(VECTORS, every, 2).tolist() == [3, 0]
    assert sorted(diverse(VECTORS, every, 3).tolist()) == [0, 2, 3]


def test_diversity_sees_the_candidates_only_and_never_picks_one_twice():
    some = torch.tensor([True, True, True, False])
    assert diverse(VECTORS, some, 1).tolist() == [2]
    twice = torch.tensor([[1.0, 0.0]] * 4)
    assert sorted(diverse(twice, torch.ones(4, dtype=torch.bool), 3).tolist()) == [0, 1, 2]


def tokens_of(count: int) -> VisualTokens:
    return VisualTokens.from_features(torch.zeros(1, count, 2))


@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_the_papers_counts(variant):
    found = [VLAPruner(keep=keep, variant=variant).counts(tokens_of(256)) for keep in (0.5, 0.25, 0.125)]
    assert found == [[128], [64], [32]]


@pytest.mark.parametrize(("total", "keep", "repo", "paper"), [(30, 0.15, 5, 5), (35, 0.3, 11, 11), (10, 0.25, 2, 3)])
def test_official_counts_go_through_one_minus_keep(total, keep, repo, paper):
    # Half of the time binary fractions, not the rule for halves, decide: 30 * (1 - 0.85) is a little more than 4.5.
    assert VLAPruner(keep=keep, variant="repo").counts(tokens_of(total)) == [repo]
    assert VLAPruner(keep=keep).counts(tokens_of(total)) == [paper]


@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_counts_never_fall_to_nothing_and_a_whole_number_is_itself(variant):
    assert VLAPruner(keep=0.01, variant=variant).counts(tokens_of(5)) == [1]
    assert VLAPruner(keep=64, variant=variant).counts(tokens_of(256)) == [64]
    assert VLAPruner(keep=64, variant=variant).counts(tokens_of(9)) == [9]


# ---------------------------------------------------------------------------------------------------------- invariants


def cut(method: VLAPruner, tokens: VisualTokens, context: Given) -> list[list[int]]:
    return [kept.tolist() for kept in act(method, tokens, context).kept()]


def test_nothing_is_pruned_before_the_window_is_full():
    tokens, context = make([12, 7])
    for recorded in (1, 2):
        context.calls = torch.rand(recorded, 2, 12)
        assert act(VLAPruner(keep=0.25), tokens, context) is tokens
    context.calls = torch.rand(3, 2, 12)
    assert act(VLAPruner(keep=0.25), tokens, context).counts() == [3, 2]


def test_only_the_last_calls_count():
    tokens, context = make([12])
    plain = cut(VLAPruner(keep=0.25), tokens, context)
    context.calls = torch.cat([torch.rand(4, 1, 12) * 9, context.calls])
    assert cut(VLAPruner(keep=0.25), tokens, context) == plain


def test_two_equal_rankings_leave_no_choice_and_two_disjoint_ones_twice_the_budget():
    tokens, context = make([12])
    method = VLAPruner(keep=0.25)
    best = context.received[0].argsort(descending=True)[:3].sort().values.tolist()
    context.calls = context.received.expand(3, 1, 12)
    assert cut(method, tokens, context) == [best]
    context.calls = 1 - context.received.expand(3, 1, 12)
    worst = context.received[0].argsort()[:3].tolist()
    (kept,) = cut(method, tokens, context)
    assert len(kept) == 3 and set(kept) < {*best, *worst}
    pool = torch.zeros(12, dtype=torch.bool)
    pool[[*best, *worst]] = True
    assert kept == sorted(diverse(tokens.features[0], pool, 3).tolist())


def test_lengths_of_scores_and_of_embeddings_do_not_matter():
    tokens, context = make([20])
    plain = cut(VLAPruner(keep=0.3), tokens, context)
    stretched = tokens.replace(features=tokens.features * torch.linspace(0.1, 9, 20)[:, None])
    assert cut(VLAPruner(keep=0.3), stretched, context) == plain
    context.received, context.calls = context.received * 5, context.calls * 0.01
    assert cut(VLAPruner(keep=0.3), tokens, context) == plain


def test_permuting_tokens_permutes_the_choice():
    # Without ties: of two mutual neighbours that are farthest from the rest the order decides.
    tokens, context = make([20], seed=2)
    plain = cut(VLAPruner(keep=0.3), tokens, context)[0]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = VisualTokens.from_features(tokens.features[:, order])
    context.received, context.calls = context.received[:, order], context.calls[:, :, order]
    assert sorted(order[cut(VLAPruner(keep=0.3), moved, context)[0]].tolist()) == plain


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_embeddings_that_are_no_numbers_are_an_error_that_names_the_item(bad):
    tokens, context = make([9, 9])
    tokens.features[1, 4] = bad
    with pytest.raises(InputError, match="embeddings contains NaN for item 1"):
        act(VLAPruner(keep=0.5), tokens, context)


# ----------------------------------------------------------------------------------------------------------- ablations


def ranked(scores: Tensor) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_one_branch_alone_keeps_its_own_best_tokens_after_the_same_warm_up(variant):
    tokens, context = make([20])
    action = smooth(context.calls, 0.8, tokens.eligible, variant=variant)[0]
    for branch, scores in (("semantic", context.received[0]), ("action", action)):
        for diversity in (True, False):
            method = VLAPruner(keep=0.25, branches=branch, diversity=diversity, variant=variant)
            assert cut(method, tokens, context) == [sorted(ranked(scores)[:5])]
    whole = context.calls
    context.calls = whole[:2]
    assert act(VLAPruner(keep=0.25, branches="semantic"), tokens, context) is tokens


@settings(deadline=None, max_examples=30)
@given(sizes=lengths(20), seed=st.integers(0, 9999), separators=st.booleans())
def test_without_diversity_the_best_of_either_order_are_kept(sizes, seed, separators):
    tokens, context = make(sizes, seed, separators=separators)
    kept = cut(VLAPruner(keep=0.3, diversity=False), tokens, context)
    action = smooth(context.calls, 0.8, tokens.eligible)
    for row in range(len(sizes)):
        indices = tokens.eligible[row].nonzero()[:, 0].tolist()
        count = max(1, math.floor(0.3 * len(indices) + 0.5)) if indices else 0
        orders = [sorted(indices, key=lambda i: (-float(s[row, i]), i)) for s in (context.received, action)]
        best = sorted(indices, key=lambda i: (min(order.index(i) for order in orders), i))[:count]
        assert kept[row] == sorted(best)


# ---------------------------------------------------------------------------------------------------------- plain loops


def plain(method: VLAPruner, context: Given, features: Tensor, row: int, indices: list[int]) -> list[int]:
    count = max(1, math.floor(method.keep * len(indices) + 0.5)) if indices else 0
    action = dict.fromkeys(indices, 0.0)
    for age, call in enumerate(reversed(context.calls), start=1):
        for i in indices:
            action[i] += method.gamma**age * float(call[row, i])
    semantic = {i: float(context.received[row, i]) for i in indices}
    pool = {i for score in (semantic, action) for i in sorted(indices, key=lambda i: (-score[i], i))[:count]}
    units = {i: (features[i] / features[i].norm()).double() for i in pool}
    picked: list[int] = []
    while len(picked) < count:
        best, farthest = -1, -1.0
        for i in sorted(pool - set(picked)):
            nearest = min((1 - float(units[i] @ units[j]) for j in picked or pool - {i}), default=2.0)
            if nearest > farthest + 1e-7:
                best, farthest = i, nearest
        picked.append(best)
    return sorted(picked)


@settings(deadline=None, max_examples=40)
@given(sizes=lengths(20), seed=st.integers(0, 9999), separators=st.booleans(), gamma=st.sampled_from([0.8, 0.3, 1.0]))
def test_selection_is_the_plain_loop(sizes, seed, separators, gamma):
    tokens, context = make(sizes, seed, separators=separators)
    method = VLAPruner(keep=0.3, gamma=gamma)
    left = act(method, tokens, context)
    scores = context.received, smooth(context.calls, gamma, tokens.eligible)
    pool = top_mask(scores[0], method.counts(tokens), tokens.eligible)
    pool |= top_mask(scores[1], method.counts(tokens), tokens.eligible)
    assert left.counts() == method.counts(tokens)
    for row in range(len(sizes)):
        indices = tokens.eligible[row].nonzero()[:, 0].tolist()
        assert set(left.kept()[row].tolist()) <= set(pool[row].nonzero()[:, 0].tolist())
        assert left.kept()[row].tolist() == plain(method, context, tokens.features[row], row, indices)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_text_rows_are_those_after_the_image_but_the_first_and_the_last():
    after = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    want = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    assert torch.equal(inner_rows(after), want)


@pytest.mark.parametrize(("rows", "asked"), [("prefill", "all"), ("last", "last"), ("text", "rows")])
def test_the_rows_that_are_asked_for(rows, asked):
    tokens, context = make([9])
    seen = []

    class Notes(Given):
        def text_attention(self, tokens, layer, rows="last"):
            seen.append((layer, rows))
            return super().text_attention(tokens, layer, rows)

    act(VLAPruner(keep=0.5, layer=5, rows=rows), tokens, Notes(**vars(context)))
    ((layer, got),) = seen
    assert layer == 4
    if asked == "rows":
        text = context.text(tokens)
        assert torch.equal(got, inner_rows(text.valid & text.after))
    else:
        assert got == asked


# ------------------------------------------------------------------------------------------------------------- settings


def test_action_attention_comes_from_the_later_half_or_from_the_official_layer():
    assert VLAPruner().recording(32).layers == tuple(range(16, 32))
    assert VLAPruner(variant="repo").recording(32).layers == (15,)
    assert VLAPruner(variant="repo").recording(4).layers == (2,)
    assert VLAPruner(variant="repo").recording(1).layers == (0,)
    own = VLAPruner(recorded=[1, 3], window=5, action_tokens=2).recording(4)
    assert (own.layers, own.calls, own.tokens) == ((1, 3), 5, 2)
    with pytest.raises(UnsupportedError, match="recorded=3"):
        VLAPruner(recorded=(1, 3)).recording(3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("layer", "window", "action_tokens") for value in (0, -1, True, "2", 2.0, None)),
        *(("gamma", value) for value in (0, 0.0, -0.5, math.nan, math.inf, True, "0.8", None)),
        *(("recorded", value) for value in ("12", 3, (), (2, 2), (3, 1), (-1,), (True,))),
        *(("rows", value) for value in ("all", None, True)),
        *(("variant", value) for value in ("official", None, True)),
        *(("branches", value) for value in ("none", None, ("semantic",))),
        *(("diversity", value) for value in ("no", None, 0)),
    ],
)
def test_bad_settings_are_errors_that_name_them_and_a_way_out(field, value):
    with pytest.raises(MMTokenError, match=f"{field}=.*(give|use)"):
        VLAPruner(**{field: value})
