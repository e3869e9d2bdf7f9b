"""FlowCut: counts and scores computed by hand, plain loops without CLS and with tokens of several patches, its cuts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken import MMTokenError, compress
from mmtoken.compressors import FlowCut, FlowCutHR
from mmtoken.compressors.base import TowerStates
from mmtoken.compressors.flowcut import attention_entropy, flow_scores, removed, text_flow, tower_flow
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens, kept_count
from tests.backbones.tiny_models import build, inputs
from tests.compressors.batches import make


def row(*values: float) -> Tensor:
    """float[1, N, 1]: one image of tokens of one patch."""
    return torch.tensor(values)[None, :, None]


def every(values: Tensor) -> Tensor:
    return torch.ones(values.shape[:2], dtype=torch.bool)


# ---------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("attention", "share", "remaining", "leave"),
    [
        ((0.25, 0.25, 0.25, 0.25), 1.0, 4, 0),
        ((0.25, 0.25, 0.25, 0.25), 1.0, 1, 0),
        ((0.7, 0.1, 0.1, 0.1), 0.678390, 4, 1),
        ((0.7, 0.1, 0.1, 0.1), 0.678390, 2, 1),
        ((0.7, 0.1, 0.1, 0.1), 0.678390, 1, 1),
        ((0.4, 0.3, 0.2, 0.1), 0.923220, 4, 0),
        ((0.97, 0.01, 0.01, 0.01), None, 1, 2),
        ((0.4, 0.3, 0.2, 0.1), 0.923220, 0, 2),
    ],
)
def test_counts_by_hand(attention: tuple[float, ...], share: float | None, remaining: int, leave: int) -> None:
    """Four tokens, two to keep."""
    values = row(*attention)
    entropy = float(attention_entropy(values, every(values))[0])
    if share is not None:
        assert entropy == pytest.approx(share, abs=2e-6)
    assert removed(4, 2, remaining, entropy) == leave
    # scaling all attention changes nothing
    assert float(attention_entropy(values * 3.7, every(values))[0]) == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize(
    ("attention", "remaining", "real"),
    [
        ((0.7, 0.1, 0.1, 0.1), 4, 0.539787),
        ((0.7, 0.1, 0.1, 0.1), 2, 0.763374),
        ((0.7, 0.1, 0.1, 0.1), 1, 1.079574),
        ((0.4, 0.3, 0.2, 0.1), 4, 0.147665),
        ((0.97, 0.01, 0.01, 0.01), 1, 1.970733),
    ],
)
def test_the_count_before_rounding_by_hand(attention: tuple[float, ...], remaining: int, real: float) -> None:
    """A million times as many tokens as four with two to keep, so that six digits are left after rounding."""
    values = row(*attention)
    entropy = float(attention_entropy(values, every(values))[0])
    assert removed(4_000_000, 2_000_000, remaining, entropy) / 1e6 == pytest.approx(real, abs=1e-5)


def test_halves_go_to_the_even_number() -> None:
    assert [removed(n, 0, 4, 0.0) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]


def test_more_leave_as_entropy_falls_and_as_the_last_place_comes_near() -> None:
    by_entropy = [removed(500, 64, 8, e) for e in (1.0, 0.9, 0.7, 0.4, 0.0)]
    by_place = [removed(500, 64, left, 0.8) for left in (20, 12, 6, 2, 0)]
    assert by_entropy == sorted(by_entropy) and by_entropy[0] == 0 < by_entropy[-1]
    assert by_place == sorted(set(by_place)) and by_place[-1] == 500 - 64


def test_a_token_without_attention_adds_nothing_to_the_entropy() -> None:
    values = row(0.5, 0.5, 0.0, 0.0)
    assert float(attention_entropy(values, every(values))[0]) == pytest.approx(0.5)
    near = -2 * 0.5 * math.log(0.5 + 1e-7) / math.log(4)
    assert float(attention_entropy(values, every(values), 1e-7)[0]) == pytest.approx(near, abs=1e-6)
    assert float(attention_entropy(row(1.0), every(row(1.0)))[0]) == 1.0


def test_scores_and_the_running_score_by_hand() -> None:
    """Keeps {1, 3} in the first block and {2, 3} after the second."""
    method, ones = FlowCut(keep=2), torch.ones(1, 4, dtype=torch.bool)
    tokens, context = make([4])
    first = flow_scores(row(0.4, 0.3, 0.2, 0.1), row(0.1, 0.2, 0.3, 0.4), row(1, 2, 1, 2), ones[..., None])[..., 0]
    torch.testing.assert_close(first, torch.tensor([[0.5, 1.0, 0.5, 1.0]]))
    assert tokens.top(method.remember(first, tokens, context), 2).source.tolist() == [[1, 3]]
    attention = row(0.1, 0.1, 0.1, 0.5)
    second = flow_scores(attention, row(0.25, 0.25, 0.25, 0.25), row(1, 1, 3, 1), ones[..., None])[..., 0]
    torch.testing.assert_close(second, torch.tensor([[0.375, 0.375, 1.125, 0.875]]))
    running = method.remember(second, tokens, context)
    torch.testing.assert_close(running, torch.tensor([[0.4375, 0.6875, 0.8125, 0.9375]]))
    assert tokens.top(running, 2).source.tolist() == [[2, 3]]


def test_the_running_score_follows_tokens_and_weighs_the_past_as_set() -> None:
    method = FlowCut(keep=2, history=0.75)
    tokens, context = make([4, 3])
    method.remember(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, math.nan]]), tokens, context)
    left = tokens.where(torch.tensor([[True, False, True, True], [False, False, True, False]]))
    got = method.remember(torch.tensor([[8.0, 8.0, 8.0], [8.0, math.nan, math.nan]]), left, context)
    assert got[0].tolist() == [2.75, 4.25, 5.0] and float(got[1, 0]) == 7.25


def test_scaling_attention_or_similarities_changes_no_score_and_density_scales_it() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, similarity, density = torch.rand(3, 2, 7, 1, generator=generator)
    real = torch.ones(2, 7, 1, dtype=torch.bool)
    want = flow_scores(attention, similarity, density, real)
    torch.testing.assert_close(flow_scores(attention * 5, similarity * 0.3, density, real), want)
    torch.testing.assert_close(flow_scores(attention, similarity, density * 4, real), want * 4)
    order = torch.randperm(7, generator=generator)
    moved = flow_scores(attention[:, order], similarity[:, order], density[:, order], real)
    torch.testing.assert_close(moved, want[:, order])


# ------------------------------------------------------------------------------------------------------- plain loops


def states(tokens: int, patches: int, prefix: int, seed: int = 0) -> TowerStates:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, 4, generator=generator)

    return TowerStates(
        *(random(tokens, patches) for _ in range(3)),
        *(random(prefix) for _ in range(3)),
    )


def softmax(values: list[float]) -> list[float]:
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    return [weight / sum(weights) for weight in weights]


def loop(made: TowerStates, image: int, count: int, variant: str) -> tuple[list[float], list[float]]:
    """(score, attention) per token of one image with `count` tokens, in Python numbers."""
    heads, patches, width = made.key.shape[1], made.key.shape[3], made.key.shape[4]
    prefix = made.prefix_key.shape[2]
    places = [(token, patch) for token in range(count) for patch in range(patches)]
    attention, similarity = [0.0] * len(places), [0.0] * len(places)

    def vectors(name: str, head: int) -> tuple[list[list[float]], list[list[float]]]:
        body = [getattr(made, name)[image, head, token, patch].tolist() for token, patch in places]
        return body, [p.tolist() for p in getattr(made, f"prefix_{name}")[image, head]]

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def mean(many: list[list[float]]) -> list[float]:
        return [sum(column) / len(many) for column in zip(*many, strict=True)]

    for head in range(heads):
        query, first_query = vectors("query", head)
        key, first_key = vectors("key", head)
        value, first_value = vectors("value", head)
        asks = first_query[0] if prefix else mean(query)
        centre = first_value[0] if prefix else mean(value)
        for place, weight in enumerate(softmax([dot(asks, k) / width**0.5 for k in first_key + key])[prefix:]):
            attention[place] += weight / heads
        if variant == "paper":
            weights = softmax([dot(centre, v) / width**0.5 for v in value])
        else:
            weights = softmax([dot(centre, v) for v in first_value + value])[prefix:]
        for place, weight in enumerate(weights):
            similarity[place] += weight / heads
    density = [
        sum(abs(sum(float(made.value[image, h, t, p, c]) for h in range(heads)) / heads) for c in range(width))
        for t, p in places
    ]
    scores, mass = [0.0] * count, [0.0] * count
    for place, (token, _) in enumerate(places):
        share = attention[place] / sum(attention) + similarity[place] / sum(similarity)
        if variant == "repo" and not prefix:
            share = attention[place]
        scores[token] += share * density[place]
        mass[token] += attention[place]
    return scores, mass


@pytest.mark.parametrize("variant", ["paper", "repo"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("patches", [1, 4])
def test_flow_through_patches_equals_plain_loops(patches: int, prefix: int, variant: Any) -> None:
    """Rows of 6 and 4 tokens; what is behind the shorter one is never read."""
    made = states(6, patches, prefix)
    eligible = torch.arange(6) < torch.tensor([[6], [4]])
    holes = (name for name in ("query", "key", "value"))
    made = dataclasses.replace(
        made, **{n: getattr(made, n).masked_fill(~eligible[:, None, :, None, None], math.nan) for n in holes}
    )
    got = tower_flow(made, eligible, variant)
    for image, count in enumerate((6, 4)):
        scores, mass = loop(made, image, count, variant)
        torch.testing.assert_close(got.scores[image, :count], torch.tensor(scores), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.attention[image, :count].sum(-1), torch.tensor(mass), rtol=1e-5, atol=1e-6)


def test_the_score_in_the_decoder_equals_plain_loops() -> None:
    """Two query heads share each of two key heads."""
    generator = torch.Generator().manual_seed(0)
    query, value = torch.randn(2, 4, 4, generator=generator), torch.randn(2, 2, 4, generator=generator)
    keys, values = torch.randn(2, 2, 2, 5, 4, generator=generator)
    eligible = torch.tensor([[True] * 5, [True, False, True, True, False]])
    got = text_flow(query, value, keys.masked_fill(~eligible[:, None, :, None], math.nan), values, eligible)
    for image in range(2):
        places = eligible[image].nonzero()[:, 0].tolist()
        relevance, similarity = torch.zeros(len(places)), torch.zeros(len(places))
        for head in range(4):
            shared = head // 2
            products = [[], []]
            for place in places:
                products[0].append(float(query[image, head] @ keys[image, shared, place]) / 2)
                products[1].append(float(value[image, shared] @ values[image, shared, place]) / 2)
            relevance += torch.tensor(softmax(products[0])) / 4
            similarity += torch.tensor(softmax(products[1])) / 4
        for number, place in enumerate(places):
            mean = sum(values[image, head // 2, place] for head in range(4)) / 4
            want = (relevance[number] / relevance.sum() + similarity[number] / similarity.sum()) * mean.abs().sum()
            torch.testing.assert_close(got[image, place], want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("variant", ["paper", "repo"])
@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision"])
def test_counts_fall_to_exactly_the_budget_and_images_do_not_know_each_other(name: str, variant: Any) -> None:
    model = build(name)
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [0.2, 3.0, 1.0]
    ).view(3, 1, 1, 1)
    method = FlowCut(keep=5, variant=variant, interval=1)
    with torch.no_grad(), compress(model, method) as session:
        model(pixels)
        together = session.report
        for image in range(3):
            model(pixels[image : image + 1])
            alone = session.report
            assert [site.kept[image].tolist() for site in together.sites] == [s.kept[0].tolist() for s in alone.sites]
    for image in range(3):
        path = [16, *(site.tokens_out[image] for site in together.sites)]
        assert path == sorted(path, reverse=True) and path[-1] == 5 and min(path) == 5
        for site in together.sites:
            kept = site.kept[image].tolist()
            assert kept == sorted(set(kept))
    assert len({tuple(site.tokens_out) for site in together.sites[:-1]}) > 0


@pytest.mark.parametrize("keep", [16, 40, 1.0])
def test_an_image_that_has_no_more_than_the_budget_is_left_alone(keep: int | float) -> None:
    model = build("clip_vision")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        with compress(model, FlowCut(keep=keep)):
            assert torch.equal(model(pixels).last_hidden_state, plain)


def test_places_are_every_other_block_counted_from_the_last_one() -> None:
    """A tower that is read after 5 blocks: cuts when blocks 2 and 4 begin."""
    tokens, context = make([24])
    context.depth = 5
    method, seen = FlowCut(keep=3), []
    left = tokens
    for layer in range(1, 5):
        after = method.vision_layer(left, layer, context)
        seen.append(after.counts()[0] < left.counts()[0])
        left = after
    assert (seen[0], seen[2], seen[3]) == (False, False, True) and left.counts() == [3]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_high_resolution_method_leaves_twice_the_budget_to_the_decoder(family: str) -> None:
    model = build(family)
    batch = inputs(model, family, "image", "plain")
    with torch.no_grad(), compress(model, FlowCutHR(keep=0.25)) as session:
        model(**batch)
    report = session.report
    (cut,) = [site for site in report.sites if site.site == "llm_layer"]
    assert cut.layer == 2
    for total, before, after in zip(report.tokens_in, cut.tokens_in, cut.tokens_out, strict=True):
        assert before == kept_count(0.5, total) and after == kept_count(0.25, total)
    assert report.tokens_out == cut.tokens_out


def test_the_tower_keeps_at_most_everything() -> None:
    assert FlowCutHR(keep=0.7).encoder_keep() == 1.0
    assert FlowCutHR(keep=5, spread=1.5).encoder_keep() == 8
    assert FlowCut(keep=5).encoder_keep() == 5


def test_the_decoder_stage_reads_the_last_text_token_of_the_layer_before() -> None:
    tokens, context = make([8, 6], separators=True)
    method = FlowCutHR(keep=0.4, layer=3)
    asked: list[int] = []
    original = context.decoder_states

    def watched(tokens: VisualTokens, layer: int) -> Any:
        asked.append(layer)
        return original(tokens, layer)

    context.decoder_states = watched  # type: ignore[method-assign]
    left = method.llm_layer(tokens, 3, context)
    words, seen = context.text_states(tokens, 2), original(tokens, 2)
    for image in range(2):
        last = int(context.word_counts[image]) - 1
        here = tokens.eligible[image : image + 1]
        one = slice(image, image + 1)
        scores = text_flow(words.query[one, :, last], words.value[one, :, last], seen.key[one], seen.value[one], here)
        best = scores[0].masked_fill(~here[0], -1).argsort(descending=True)[: kept_count(0.4, int(here.sum()))]
        assert left.kept()[image].tolist() == best.sort().values.tolist()
    assert asked == [2]
    assert method.score_layers(8) == (2,) and method.cut_layers(8) == (3,)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("interval", value) for value in (0, -1, True, "2", 1.5)),
        *(("history", value) for value in (-0.1, 1, 1.5, True, "half", math.nan)),
        *(("variant", value) for value in ("official", None, 1)),
        *(("layer", value) for value in (0, True, 2.0)),
        *(("spread", value) for value in (0.5, 0, True, "2", math.inf, math.nan)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=f"{field}="):
        FlowCutHR(**{field: value})


def test_a_decoder_that_is_too_shallow_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layer=4 but this decoder has 4 layers"):
        FlowCutHR(layer=4).cut_layers(4)


def test_not_a_number_is_refused() -> None:
    tokens, context = make([5, 5])
    context.states[1, 2] = math.nan
    with pytest.raises(MMTokenError, match="flow score contains NaN for item 1"):
        FlowCut(keep=2).vision_layer(tokens, 2, context)
