"""TransPrune: worked examples, invariants, and plain loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken import MMTokenError
from mmtoken.compressors import TransPrune
from mmtoken.compressors.transprune import transition_value
from mmtoken.errors import UnsupportedError
from tests.compressors.batches import Given, act, lengths, make

X = torch.tensor([[1.0, 0.0]] * 4)
Y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, 0.0]])
ATTENTION = torch.tensor([0.1, 0.1, 0.05, 0.25])
EVERYONE = torch.ones(1, 4, dtype=torch.bool)


def module(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(magnitude, cosine), each float[1, n]."""
    return (y.norm(dim=-1) / x.norm(dim=-1))[None], torch.cosine_similarity(x, y, dim=-1)[None]


def values(x: Tensor, y: Tensor, *, absolute: bool) -> Tensor:
    return transition_value(*module(x, y), torch.ones(1, len(x), dtype=torch.bool), absolute=absolute)[0]


def chosen(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


# --------------------------------------------------------------------------------------------------- worked examples


def test_transition_values_worked_out_by_hand():
    signed = torch.tensor([0.0825945, 0.2245152, 0.6102957, 0.1651891])
    absolute = torch.tensor([0.1748777, 0.4753669, 0.1748777, 0.3497554])
    torch.testing.assert_close(values(X, Y, absolute=False), signed, rtol=0, atol=1e-6)
    torch.testing.assert_close(values(X, Y, absolute=True), absolute, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("cosine", "scores", "kept"),
    [
        ("signed", [0.276293, 0.407386, 0.663734, 0.652586], [2, 3]),
        ("absolute", [0.348848, 0.604610, 0.248848, 0.797695], [1, 3]),
    ],
)
def test_combined_scores_worked_out_by_hand_tell_the_two_cosines_apart(cosine, scores, kept):
    method = TransPrune(variant="repo", cosine=cosine)
    change = values(X, Y, absolute=cosine == "absolute")[None]
    found = method.combine(change, ATTENTION[None], EVERYONE)[0]
    torch.testing.assert_close(found, torch.tensor(scores), rtol=0, atol=1e-6)
    assert chosen(found, 2) == kept


@pytest.mark.parametrize("variant", ["paper", "repo"])
@pytest.mark.parametrize("shares", [None, (0.875, 0.625, 0.125)])
def test_the_papers_counts(variant, shares):
    method = TransPrune(variant=variant, shares=shares)
    assert [method.count(576, stage, 3, 1) for stage in range(3)] == [504, 360, 72]
    assert [method.count(2880, stage, 3, 1) for stage in range(3)] == [2520, 1800, 360]


def test_the_official_code_truncates_counts():
    paper, repo = (TransPrune(keep=0.25, shares=(0.9, 0.55, 0.25), variant=v) for v in ("paper", "repo"))
    assert [paper.count(39, stage, 3, 1) for stage in range(3)] == [35, 21, 10]
    assert [repo.count(39, stage, 3, 1) for stage in range(3)] == [35, 21, 9]


def test_each_stage_drops_half_of_what_the_next_one_drops_and_the_last_meets_the_budget():
    assert [TransPrune(keep=100).count(800, stage, 3, 1) for stage in range(3)] == [700, 500, 100]
    assert [TransPrune(keep=0.25).count(100, stage, 2, 1) for stage in range(2)] == [75, 25]
    assert TransPrune(keep=3).count(40, 2, 3, 4) == 12  # pooled over four steps of a video


# ---------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("absolute", [True, False])
def test_scaling_input_and_output_alike_changes_nothing_and_scaling_the_output_scales_magnitudes_only(absolute):
    x, y = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    plain = values(x, y, absolute=absolute)
    torch.testing.assert_close(values(7 * x, 7 * y, absolute=absolute), plain)
    torch.testing.assert_close(values(x, 3 * y, absolute=absolute), 3 * plain)


@pytest.mark.parametrize("absolute", [True, False])
def test_values_of_a_module_sum_up_to_the_weighted_mean_of_magnitudes(absolute):
    x, y = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))
    magnitude, cosine = module(x, y)
    weight = (1 - (cosine.abs() if absolute else cosine)).exp()
    want = (weight * magnitude).sum() / weight.sum()
    torch.testing.assert_close(values(x, y, absolute=absolute).sum(), want)


@pytest.mark.parametrize("absolute", [True, False])
def test_permuting_tokens_permutes_their_values(absolute):
    x, y = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    moved = values(x[order], y[order], absolute=absolute)
    torch.testing.assert_close(moved, values(x, y, absolute=absolute)[order])


def test_a_token_outside_of_the_support_weighs_nothing_and_has_no_value():
    magnitude, cosine = module(X, Y)
    support = torch.tensor([[True, True, True, False]])
    magnitude[0, 3], cosine[0, 3] = math.nan, math.nan
    found = transition_value(magnitude, cosine, support, absolute=True)[0]
    torch.testing.assert_close(found[:3], values(X[:3], Y[:3], absolute=True))
    assert found[3] == 0


def test_official_scores_sum_up_to_two_over_the_image():
    change, attention = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(2))
    eligible = torch.arange(8) < torch.tensor([[8], [5], [1]])
    scores = TransPrune(variant="repo").combine(change.masked_fill(~eligible, math.nan), attention, eligible)
    torch.testing.assert_close(torch.where(eligible, scores, 0.0).sum(-1), torch.full((3,), 2.0))


def test_alpha_goes_from_attention_alone_to_transitions_alone():
    change = values(X, Y, absolute=True)[None]
    assert torch.equal(TransPrune(alpha=0).combine(change, ATTENTION[None], EVERYONE)[0], ATTENTION)
    assert torch.equal(TransPrune(alpha=1).combine(change, ATTENTION[None], EVERYONE), change)
    quarter = TransPrune(alpha=0.25).combine(change, ATTENTION[None], EVERYONE)[0]
    torch.testing.assert_close(quarter, 0.25 * change[0] + 0.75 * ATTENTION)


def test_kept_sets_are_nested_and_counts_fall():
    tokens, context = make([30, 17])
    method = TransPrune(keep=0.2)
    before = tokens
    for layer in method.cut_layers(context.depth):
        after = method.llm_layer(before, layer, context)
        for old, new in zip(before.kept(), after.kept(), strict=True):
            assert set(new.tolist()) < set(old.tolist())
        before = after


# ---------------------------------------------------------------------------------------------------------- plain loops


def plain(method: TransPrune, context: Given, row: int, indices: list[int]) -> list[int]:
    """The tokens of an item that are left: loops over stages, layers, modules and tokens."""
    words, total = int(context.word_counts[row]), len(indices)
    absolute = method.cosine == "absolute" or (method.cosine is None and method.variant == "paper")
    cuts = method.cut_layers(context.depth)
    watched = method.watched_layers(context.depth)
    alive, change = list(indices), dict.fromkeys(indices, 0.0)
    offset = context.words.shape[1]
    # Text, then every token of the item: who is gone is still part of the stand-in's sequence.
    sequence = [*range(words), *(offset + i for i in range(context.received.shape[1]) if real(context, row, i))]

    def transition(place: int, layer: int, mlp: bool) -> tuple[float, float]:
        shift = 0.1 * layer + mlp
        cosine = math.tanh(float(context.turned[row, place]) + shift)
        weight = math.exp(1 - (abs(cosine) if absolute else cosine))
        return weight, float(context.stretched[row, place]) + shift

    for stage, cut in enumerate(cuts):
        start = cuts[stage - 1] if stage else 0
        for layer in (layer for layer in watched if start <= layer < cut):
            for mlp in (False, True):
                support = sequence if method.variant == "repo" else [offset + i for i in alive]
                mass = sum(transition(place, layer, mlp)[0] for place in support)
                for i in alive:
                    weight, magnitude = transition(offset + i, layer, mlp)
                    change[i] += weight / mass * magnitude
        attention = {i: float(context.received[row, i]) for i in alive}
        if method.variant == "repo":
            sums = sum(change[i] for i in alive) + 1e-8, sum(attention.values()) + 1e-8
            score = {i: change[i] / sums[0] + attention[i] / sums[1] for i in alive}
        else:
            score = {i: method.alpha * change[i] + (1 - method.alpha) * attention[i] for i in alive}
        share = 1 - (1 - method.keep) * (2 ** (stage + 1) - 1) / (2 ** len(cuts) - 1)
        final = max(1, math.floor(method.keep * total + 0.5))
        count = int(total * share) if method.variant == "repo" else max(1, math.floor(share * total + 0.5))
        count = final if stage == len(cuts) - 1 else max(final, count)
        alive = sorted(sorted(alive, key=lambda i: (-score[i], i))[:count])
    return alive


def real(context: Given, row: int, i: int) -> bool:
    return not math.isnan(float(context.received[row, i]))


@settings(deadline=None, max_examples=30)
@given(
    sizes=lengths(20),
    seed=st.integers(0, 9999),
    separators=st.booleans(),
    variant=st.sampled_from(["paper", "repo"]),
    cosine=st.sampled_from([None, "signed", "absolute"]),
    alpha=st.sampled_from([0.5, 0.2]),
)
def test_selection_is_the_plain_loop(sizes, seed, separators, variant, cosine, alpha):
    tokens, context = make(sizes, seed, separators=separators)
    context.depth = 32
    method = TransPrune(keep=0.3, variant=variant, cosine=cosine, alpha=alpha if variant == "paper" else 0.5)
    left = act(method, tokens, context)
    for row in range(len(sizes)):
        indices = tokens.eligible[row].nonzero()[:, 0].tolist()
        assert left.kept()[row].tolist() == plain(method, context, row, indices)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("depth", "cuts", "watched"),
    [
        (32, (7, 9, 12), (6, 7, 8, 9, 10, 11)),
        (64, (14, 18, 24), tuple(range(12, 24))),
        (28, (6, 8, 11), tuple(range(5, 11))),
        (8, (2, 3), (1, 2)),
        (4, (1, 2), (0, 1)),
        (2, (1,), (0,)),
    ],
)
def test_the_papers_layers_are_scaled_to_the_decoder(depth, cuts, watched):
    assert TransPrune().cut_layers(depth) == cuts
    assert TransPrune().watched_layers(depth) == watched


def test_layers_of_ones_own_are_taken_as_they_are():
    method = TransPrune(layers=(2, 5), accumulate=(0, 3))
    assert method.cut_layers(8) == (2, 5) and method.watched_layers(8) == (0, 3)
    with pytest.raises(UnsupportedError, match="layers=5"):
        method.cut_layers(5)
    with pytest.raises(UnsupportedError, match="at least 2 layers"):
        TransPrune().cut_layers(1)


@pytest.mark.parametrize("accumulate", [(2, 3), (0, 5), (0, 7)])
def test_transitions_that_no_cut_could_use_are_refused(accumulate):
    with pytest.raises(UnsupportedError, match="accumulate="):
        TransPrune(layers=(2, 5), accumulate=accumulate).watched_layers(8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", value) for value in ("246", 2, (), (0, 1), (2, 2), (4, 2), (1, True), (1.0,))),
        *(("accumulate", value) for value in ("246", 2, (), (-1, 1), (2, 2), (4, 2), (1, True), (1.0,))),
        *(("shares", value) for value in ("0.5", 0.5, (), (0.0,), (1.5,), (0.1, 0.125), (64,), (0.5,))),
        *(("alpha", value) for value in (-0.1, 1.1, math.nan, True, "0.5", None)),
        *(("cosine", value) for value in ("abs", True, 1)),
        *(("variant", value) for value in ("official", None, True)),
    ],
)
def test_bad_settings_are_errors_that_name_them_and_a_way_out(field, value):
    with pytest.raises(MMTokenError, match=f"{field}=.*(give|use|cannot)"):
        TransPrune(**{field: value})


def test_shares_and_layers_must_fit():
    with pytest.raises(MMTokenError, match=r"3 stages but layers=\(2, 4\) 2"):
        TransPrune(layers=(2, 4), shares=(0.5, 0.25, 0.125))
    with pytest.raises(MMTokenError, match="3 stages but layers"):
        TransPrune(shares=(0.5, 0.25, 0.125)).cut_layers(4)  # three of the paper's layers are two here
    with pytest.raises(MMTokenError, match=r"keep=0\.5 but shares"):
        TransPrune(keep=0.5, shares=(0.5, 0.25))
    with pytest.raises(MMTokenError, match=r"alpha=0\.4 has no place"):
        TransPrune(variant="repo", alpha=0.4)
