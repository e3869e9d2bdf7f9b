"""Zero-TPrune: heads, near-duplicates, counts and plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken import MMTokenError, compress
from mmtoken.compressors import ZeroTPrune, zerotprune
from mmtoken.compressors.base import TowerStates
from mmtoken.compressors.zerotprune import emphasise, informative_heads, near_duplicates
from mmtoken.errors import UnsupportedError
from mmtoken.kernels.pagerank import pagerank
from mmtoken.tokens import kept_count
from tests.backbones.tiny_models import build
from tests.compressors.batches import make


def test_raw_scores_can_never_reach_the_published_variance() -> None:
    """All weight on one of 197 tokens, the highest variance that there is, is 0.00505."""
    peaked = torch.zeros(1, 2, 197)
    peaked[:, :, 0] = 1.0
    seen = torch.ones(1, 197, dtype=torch.bool)
    assert float(peaked[0, 0].var(unbiased=False)) == pytest.approx(0.00505, abs=5e-6)
    half = torch.cat([torch.full((1, 1, 197), 1 / 197), peaked[:, :1]], 1)
    bounds = (0.004, 0.7)
    assert informative_heads(half, seen, bounds, rescale=False).tolist() == [[False, True]]
    assert informative_heads(half, seen, (0.01, 0.7), rescale=False).tolist() == [[True, True]]  # none: all


def test_heads_count_whose_variance_lies_within_the_bounds() -> None:
    seen = torch.tensor([[True, True, True, True, False]])
    heads = torch.tensor(
        [[[0.25, 0.25, 0.25, 0.25, 9.0], [0.3, 0.2, 0.3, 0.2, 9.0], [0.4, 0.1, 0.4, 0.1, 9.0], [1.0, 0, 0, 0, 9.0]]]
    )
    # with mean 1: variances 0, 0.04, 0.36 and 3
    assert informative_heads(heads, seen, (0.01, 0.7)).tolist() == [[False, True, True, False]]
    assert informative_heads(heads, seen, (0.04 - 1e-6, 0.3)).tolist() == [[False, True, False, False]]
    assert informative_heads(heads, seen, (5.0, 6.0)).tolist() == [[True] * 4]
    flat = heads[:, :1].expand(-1, 4, -1)  # an item of which none counts, beside one of which some do
    both = informative_heads(torch.cat([heads, flat]), seen.expand(2, -1), (0.01, 0.7))
    assert both.tolist() == [[False, True, True, False], [True] * 4]


def test_heads_come_together_as_root_mean_square() -> None:
    ranks = torch.tensor([[[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]]])
    got = emphasise(ranks, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(got, torch.tensor([[math.sqrt(0.2), math.sqrt(0.4)]]))
    same = ranks[:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(emphasise(same, torch.ones(1, 4, dtype=torch.bool)), ranks[:, 0])


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_the_less_important_of_two_equal_keys_leaves_first(metric: Any) -> None:
    features = torch.eye(6) * 2
    features[4] = features[1]  # 1 is important, 4 is not
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, 0.3])
    assert near_duplicates(features, scores, 1, "unimportant", metric).tolist() == [4]
    assert near_duplicates(features, scores, 1, "important", metric).tolist() == [1]


def test_of_equally_near_duplicates_the_one_with_the_lower_index_leaves() -> None:
    features = torch.eye(6)
    features[3] = features[5] = features[0]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, 0.3])
    assert near_duplicates(features, scores, 1, "unimportant", "cosine").tolist() == [3]


@pytest.mark.parametrize("length", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("split", ["unimportant", "important", "alternate"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_near_duplicates_equal_plain_loops(
    metric: Any, split: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zerotprune, "CHUNK", 3)
    generator = torch.Generator().manual_seed(length)
    features, scores = torch.randn(length, 4, generator=generator), torch.rand(length, generator=generator)
    ranking = sorted(range(length), key=lambda i: (-float(scores[i]), i))
    half = math.ceil(length / 2)
    stay, leave = {
        "unimportant": (ranking[:half], ranking[half:]),
        "important": (ranking[length - half :], ranking[: length - half]),
        "alternate": (ranking[0::2], ranking[1::2]),
    }[split]

    def alike(a: int, b: int) -> float:
        x, y = features[a].tolist(), features[b].tolist()
        product = sum(p * q for p, q in zip(x, y, strict=True))
        if metric == "dot":
            return product
        if metric == "euclidean":
            return -math.dist(x, y)
        return product / math.hypot(*x) / math.hypot(*y)

    best = {a: max(alike(a, b) for b in stay) for a in leave}
    want = sorted(leave, key=lambda a: (-best[a], a))[:4]
    assert near_duplicates(features, scores, 4, split, metric).tolist() == want


def test_importance_equals_plain_loops() -> None:
    """CLS votes and is voted for, starts higher, and is no candidate; tokens of two patches have their sum."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 2, 3, generator=generator)
    first = torch.randn(3, 1, 2, 1, 3, generator=generator)
    left = torch.tensor([[True, False, True, True]])
    states = TowerStates(query, key, value, *first)
    got = ZeroTPrune(boost=True, variance=(0.0, 100.0)).importance(states, left, 3)
    patches = [(token, patch) for token in (0, 2, 3) for patch in range(2)]
    squares = [0.0] * 7
    for head in range(2):
        rows = [first[0, 0, head, 0]] + [query[0, head, t, p] for t, p in patches]
        columns = [first[1, 0, head, 0]] + [key[0, head, t, p] for t, p in patches]
        weights = torch.tensor([[float(q @ k) / 3**0.5 for k in columns] for q in rows]).softmax(-1)
        scores = [math.sqrt(7)] + [1.0] * 6
        scores = [s / sum(scores) for s in scores]
        for _ in range(3):
            scores = [sum(scores[i] * float(weights[i, j]) for i in range(7)) for j in range(7)]
        squares = [total + s**2 for total, s in zip(squares, scores, strict=True)]
    for number, token in enumerate((0, 2, 3)):
        want = sum(math.sqrt(squares[1 + 2 * number + patch] / 2) for patch in range(2))
        assert float(got[0, token]) == pytest.approx(want, rel=1e-5)
    assert float(got[0, 1]) == 0.0


def test_importance_heeds_variance_rescale_and_tolerance() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 6, 1, 3, generator=generator)
    query[:, 1] *= 4  # the second head's attention has higher peaks
    none = query.new_zeros(1, 2, 0, 3)
    states, left = TowerStates(query, key, key, none, none, none), torch.ones(1, 6, dtype=torch.bool)
    ranks = pagerank(query[..., 0, :], key[..., 0, :], left, left / 6, 3)[0]
    calm, wild = (ranks * 6).var(-1, unbiased=False).tolist()
    between = (calm + wild) / 2

    def importance(**settings: Any) -> Tensor:
        return ZeroTPrune(**settings).importance(states, left, 3)[0]

    assert 0.0 < calm < 0.9 * between
    torch.testing.assert_close(importance(variance=(0.0, between)), ranks[0])
    torch.testing.assert_close(importance(variance=(between, 9.0)), ranks[1])
    both = (ranks**2).mean(0).sqrt()  # raw scores vary 36 times less
    torch.testing.assert_close(importance(variance=(0.0, between), rescale=False), both)
    once = pagerank(query[..., 0, :], key[..., 0, :], left, left / 6, 1)[0]
    torch.testing.assert_close(importance(variance=(0.0, 9.0), tolerance=1.0), (once**2).mean(0).sqrt())


def test_near_duplicates_leave_by_the_split_and_the_metric_of_the_method() -> None:
    generator = torch.Generator().manual_seed(3)
    features, scores = torch.randn(12, 4, generator=generator), torch.rand(12, generator=generator)
    found = set()
    for split in ("unimportant", "important", "alternate"):
        for metric in ("cosine", "dot", "euclidean"):
            method: Any = ZeroTPrune(split=split, metric=metric)  # type: ignore[arg-type]
            left = method._thin(features[None], scores[None], torch.ones(1, 12, dtype=torch.bool), [3])[0]
            gone = near_duplicates(features, scores, 3, split, metric)  # type: ignore[arg-type]
            assert (~left).nonzero()[:, 0].tolist() == sorted(gone.tolist())
            found.add(tuple(left.tolist()))
    assert len(found) > 5


@pytest.mark.parametrize("order", ["I'-S-I", "I-S"])
@pytest.mark.parametrize("keep", [0.2, 5, 0.9])
def test_counts_are_exact_at_every_cut_and_order_is_kept(keep: int | float, order: Any) -> None:
    method = ZeroTPrune(keep=keep, layers=(1, 3, 4), order=order, similar=3)
    tokens, context = make([20, 7], separators=True)
    before = tokens.counts()
    left = tokens
    for layer in range(6):
        left = method.vision_layer(left, layer, context)
        stage = {1: 0, 3: 1, 4: 2}.get(layer)
        if stage is not None:
            assert left.counts() == [method.target(total, stage, 3) for total in before]
        for source, valid in zip(left.source, left.valid, strict=True):
            assert source[valid].tolist() == sorted(set(source[valid].tolist()))
    assert left.counts() == tokens.budget(keep)
    assert [int(p.sum()) for p in left.protected & left.valid] == [int(p.sum()) for p in tokens.protected]


def test_the_same_share_leaves_at_every_cut() -> None:
    method = ZeroTPrune(keep=0.125)
    assert [method.target(640, stage, 3) for stage in range(3)] == [320, 160, 80]
    assert method.target(0, 0, 3) == 0 and method.target(5, 2, 3) == kept_count(0.125, 5)


def test_the_first_pass_ranks_only_and_the_second_sees_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[int], int]] = []
    found: list[Tensor] = []
    original = ZeroTPrune.importance

    def watched(self: Any, states: Any, left: Tensor, rounds: int) -> Tensor:
        calls.append((left.sum(-1).tolist(), rounds))
        found.append(original(self, states, left, rounds))
        return found[-1]

    monkeypatch.setattr(ZeroTPrune, "importance", watched)
    tokens, context = make([20])
    context.depth = 12
    ZeroTPrune(keep=0.5, layers=(2,), similar=3).vision_layer(tokens, 2, context)
    assert context.scores is found[1]  # what the report shows
    ZeroTPrune(keep=0.5, layers=(3,), similar=3, order="I-S").vision_layer(tokens, 3, context)
    assert context.scores is found[2]
    assert calls == [([20], 1), ([17], 30), ([20], 5)]


def test_rounds_fall_with_depth_and_places_scale() -> None:
    method = ZeroTPrune()
    assert method.cuts(12) == (1, 3, 6, 9, 11) and method.cuts(24) == (2, 6, 12, 18, 22)
    assert [method._rounds(cut, 12) for cut in method.cuts(12)] == [30, 5, 5, 1, 1]


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision"])
def test_keeping_all_is_the_plain_tower_to_the_bit_and_images_do_not_know_each_other(name: str) -> None:
    model = build(name)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        with compress(model, ZeroTPrune(keep=1.0)):
            assert torch.equal(model(pixels).last_hidden_state, plain)
        with compress(model, ZeroTPrune(keep=0.3)) as session:
            model(pixels)
            together = session.report.kept
            for image in range(2):
                model(pixels[image : image + 1])
                assert torch.equal(session.report.kept[0], together[image])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", value) for value in ((), (-1,), (2, 1), (1, True), "12", 3)),
        *(("similar", value) for value in (-1, True, 1.0)),
        *(("rounds", value) for value in ((30, 5), (30, 5, 0), None, 5, (30, 5, 1.0))),
        *(("tolerance", value) for value in (-1, "0", True, math.nan)),
        *(("variance", value) for value in ((0.7, 0.01), (-1, 1), (0.1,), None, (math.nan, 1), ("a", "b"))),
        *(("rescale", value) for value in (None, 1)),
        *(("boost", value) for value in (None, 1)),
        *((field, "other") for field in ("feature", "metric", "split", "order")),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=f"{field}="):
        ZeroTPrune(**{field: value})


def test_a_tower_without_such_a_place_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layers="):
        compress(build("clip_vision"), ZeroTPrune(layers=(3,)))  # it is read after three blocks
    with pytest.raises(UnsupportedError, match="first block"):
        ZeroTPrune().tower_layers(1, 2)


@pytest.mark.parametrize("feature", ["key", "query", "value", "features"])
def test_what_is_compared_is_what_was_asked_for(feature: Any) -> None:
    """Token 11 is made a copy of token 0 in one feature; only there it is a duplicate."""
    tokens, context = make([12])
    source = {"key": context.keys, "features": tokens.features}.get(feature)
    if source is None:
        context.states[0, 11, :, {"query": 0, "value": 2}[feature]] = context.states[
            0, 0, :, {"query": 0, "value": 2}[feature]
        ]
    else:
        source[0, 11] = source[0, 0]
    method = ZeroTPrune(feature=feature)
    compared = method._features(tokens, context.tower_states(tokens), context)[0]
    scores = torch.ones(12)
    assert near_duplicates(compared, scores, 1, "unimportant", "euclidean").tolist() == [11]
