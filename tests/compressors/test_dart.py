"""DART: a worked example, budgets, and a plain loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken import MMTokenError
from mmtoken.compressors import DART
from mmtoken.compressors.dart import key_strength, select_unlike, strongest
from mmtoken.errors import InputError, UnsupportedError
from tests.compressors.batches import act, lengths, make

KEYS = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.5, 0.5], [2.0, 2.0], [0.0, 1.0], [1.0, 0.0]])
TEXT_KEYS = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
FEATURES = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.2], [-1.0, 0.0], [0.0, -1.0]])
TEXT = torch.tensor([[1.0, 0.5], [0.0, 1.0]])


def select(budget: int, visual: int = 1, text: int = 1, *, exact: bool = True) -> list[int]:
    strength, text_strength = key_strength(KEYS[None, None])[0], key_strength(TEXT_KEYS[None, None])[0]
    return select_unlike(FEATURES, strength, TEXT, text_strength, budget, visual, text, exact=exact).tolist()


def test_a_small_case_worked_out_by_hand():
    # Strengths 2, 3, 1, 4, 1, 1 and 1, 3. Token 3's cosines: .981, .832, .196, -.981, -.196: it takes 4. The second
    # text token's with those left: 0, .707, 1, -1: it takes 5.
    assert key_strength(KEYS[None, None])[0].tolist() == [2, 3, 1, 4, 1, 1]
    assert select(3) == [3, 4, 5]
    assert select(3, exact=False) == [3, 4, 5] and select(2, exact=False) == [3, 4, 5]


def test_strength_is_summed_over_heads():
    keys = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    want = [[sum(abs(float(x)) for x in keys[b, :, n].flatten()) for n in range(7)] for b in range(2)]
    torch.testing.assert_close(key_strength(keys), torch.tensor(want))


def test_the_official_rule_exceeds_the_budget_by_its_visual_pivots():
    generator = torch.Generator().manual_seed(1)
    features, text = torch.randn(576, 8, generator=generator), torch.randn(40, 8, generator=generator)
    strength, text_strength = torch.rand(576, generator=generator), torch.rand(40, generator=generator)
    counts = [
        len(select_unlike(features, strength, text, text_strength, 128, 4, 4, exact=exact)) for exact in (False, True)
    ]
    assert counts == [132, 128]


def test_the_official_rule_rounds_down():
    tokens, context = make([30])
    official = DART(keep=0.33, visual_pivots=1, text_pivots=1, budget_rule="official")  # 9.9: four for each pivot
    assert act(official, tokens, context).counts() == [1 + 2 * 4]


def test_the_visual_pivot_takes_first():
    # Token 3 likes token 2 least, the text token likes token 1 least; a budget of two leaves room for one of them.
    features = torch.tensor([[0.0, 1.0], [0.5, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    strength = torch.tensor([0.0, 0.0, 0.0, 9.0])
    text, loud = torch.tensor([[-1.0, 0.1]]), torch.tensor([99.0])
    assert select_unlike(features, strength, text, loud, 2, 1, 1).tolist() == [2, 3]
    assert select_unlike(features, strength, text, loud, 3, 1, 1).tolist() == [1, 2, 3]


def test_without_text_the_visual_pivots_take_all():
    tokens, context = make([20])
    context.word_counts[:] = 1  # the only text token comes before the image
    assert act(DART(keep=9), tokens, context).counts() == [9]


def test_pivots_do_not_exceed_the_budget():
    assert select(1, visual=4) == [3] and select(2, visual=4) == [1, 3]


def test_ties_go_to_the_lower_index():
    assert strongest(torch.tensor([1.0, 2.0, 2.0, 1.0]), 3).tolist() == [1, 2, 0]
    same = torch.ones(6, 3)
    assert select_unlike(same, torch.ones(6), same[:2], torch.ones(2), 4, 1, 1).tolist() == [0, 1, 2, 3]


def test_lengths_of_features_do_not_matter_and_lengths_of_keys_do():
    generator = torch.Generator().manual_seed(2)
    features, text = torch.randn(20, 8, generator=generator), torch.randn(5, 8, generator=generator)
    strength, loud = torch.rand(20, generator=generator), torch.rand(5, generator=generator)
    plain = select_unlike(features, strength, text, loud, 9, 2, 2).tolist()
    stretched = features * torch.linspace(0.1, 9, 20)[:, None]
    assert select_unlike(stretched, strength, text, loud, 9, 2, 2).tolist() == plain
    assert select_unlike(features, 1 - strength, text, loud, 9, 2, 2).tolist() != plain


# ---------------------------------------------------------------------------------------------------------- plain loop


def plain(
    features: Tensor, strength: list[float], text: Tensor, loud: list[float], keep: float, p_v: int, p_t: int
) -> list[int]:
    total = len(features)
    budget = max(1, math.floor(keep * total + 0.5)) if total else 0
    if budget >= total:
        return list(range(total))

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double()) / (a.double().norm() * b.double().norm()))

    visual = sorted(range(total), key=lambda i: (-strength[i], i))[: min(p_v, budget)]
    asking = sorted(range(len(text)), key=lambda i: (-loud[i], i))[:p_t]
    pivots = [features[i] for i in visual] + [text[i] for i in asking]
    kept = list(visual)
    for pivot in pivots:
        share = math.ceil((budget - len(visual)) / len(pivots))
        left = sorted((i for i in range(total) if i not in kept), key=lambda i: (cosine(features[i], pivot), i))
        kept += left[: min(share, budget - len(kept))]
    return sorted(kept)


@settings(deadline=None, max_examples=40)
@given(
    sizes=lengths(25),
    seed=st.integers(0, 9999),
    separators=st.booleans(),
    keep=st.floats(0.05, 1.0),
    pivots=st.tuples(st.integers(1, 4), st.integers(0, 4)),
)
def test_selection_is_the_plain_loop(sizes, seed, separators, keep, pivots):
    tokens, context = make(sizes, seed, separators=separators)
    left = act(DART(keep=keep, visual_pivots=pivots[0], text_pivots=pivots[1]), tokens, context)
    text = context.text(tokens)
    for row in range(len(sizes)):
        mine = tokens.eligible[row].nonzero()[:, 0].tolist()
        asking = text.after[row].nonzero()[:, 0].tolist()
        # Keys are the second of the stand-in's states: [token, head, (query, key, value), channel].
        strength = [sum(abs(float(x)) for x in context.states[row, i, :, 1].flatten()) for i in mine]
        loud = [sum(abs(float(x)) for x in context.word_states[row, i, :, 1].flatten()) for i in asking]
        found = plain(tokens.features[row, mine], strength, text.features[row, asking], loud, keep, *pivots)
        assert left.kept()[row].tolist() == [mine[i] for i in found]


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_features_and_text_that_are_no_numbers_are_errors_that_name_the_item(bad):
    for change in ("features", "text"):
        tokens, context = make([9, 9])
        context.word_counts[:], context.words = 4, torch.randn(2, 5, 5)
        context.word_states = torch.randn(2, 5, 2, 3, 4)
        (tokens.features if change == "features" else context.words)[1, 2] = bad
        with pytest.raises(InputError, match="features contains NaN for item 1"):
            act(DART(keep=0.5), tokens, context)
    tokens, context = make([9, 9])
    context.states[1, 2] = math.nan
    with pytest.raises(InputError, match="keys contains NaN for item 1"):
        act(DART(keep=0.5), tokens, context)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("layer", "visual_pivots") for value in (0, -1, True, "2", 2.0, None)),
        *(("text_pivots", value) for value in (-1, True, "2", 2.0, None)),
        *(("budget_rule", value) for value in ("repo", None, True)),
    ],
)
def test_bad_settings_are_errors_that_name_them_and_a_way_out(field, value):
    with pytest.raises(MMTokenError, match=f"{field}=.*(give|use)"):
        DART(**{field: value})


def test_a_layer_that_the_decoder_does_not_have_is_refused():
    with pytest.raises(UnsupportedError, match="layer=8"):
        DART(layer=8).cut_layers(8)
    assert DART(layer=3).score_layers(8) == (2,)
