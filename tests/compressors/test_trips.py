"""TRIPS by hand, and against plain loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtoken import MMTokenError, VisualTokens
from mmtoken.compressors import TRIPS, Context
from mmtoken.compressors.trips import joint_attention, select_and_fuse, stage_count, text_attention, text_query
from mmtoken.errors import InputError, UnsupportedError
from tests.compressors.batches import item


def tokens_of(rows: list[list[float]]) -> VisualTokens:
    return VisualTokens.from_features(torch.tensor([rows]))


QUERY = torch.tensor([[[1.0, 0.0]]])
KEYS = torch.tensor([[[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]]])


def test_the_attention_of_the_specification_s_example() -> None:
    scores = text_attention(QUERY, KEYS)
    torch.testing.assert_close(scores, torch.tensor([[0.538776, 0.130985, 0.265654, 0.064585]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("normalise", "wanted"), [(False, 0.778650), (True, 3.981431)])
def test_the_fused_token_of_the_specification_s_example(normalise: bool, wanted: float) -> None:
    tokens = tokens_of([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 8.0]])
    left, fused = select_and_fuse(tokens, text_attention(QUERY, KEYS), [2], normalise=normalise)
    # 0 and 2 stay, and the fused token stands where 1 was, the better one of 1 and 3
    assert left.source.tolist() == [[0, 1, 2]] and fused.tolist() == [[False, True, False]]
    torch.testing.assert_close(left.features[0, 1], torch.tensor([0.0, wanted]), rtol=0, atol=1e-6)
    assert left.size.tolist() == [[1.0, 2.0, 1.0]]
    assert torch.equal(left.features[0, [0, 2]], tokens.features[0, [0, 2]])


def test_attention_is_the_mean_over_heads_and_padding_gets_none() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    keys[1, :, 3:] = torch.nan
    got = text_attention(query, keys, valid)
    for row, count in enumerate((5, 3)):
        for patch in range(count):
            shares = []
            for head in range(3):
                weights = [
                    math.exp(sum(float(query[row, head, d] * keys[row, head, i, d]) for d in range(4)) / 2)
                    for i in range(count)
                ]
                shares.append(weights[patch] / sum(weights))
            assert float(got[row, patch]) == pytest.approx(sum(shares) / 3, abs=1e-6)
    assert bool((got[1, 3:] == 0).all())


def test_a_text_feature_is_a_query_of_the_block_with_and_without_its_norm() -> None:
    torch.manual_seed(0)
    projection, norm, text = nn.Linear(6, 6), nn.LayerNorm(6), torch.randn(2, 6)
    assert torch.equal(text_query(text, projection, 2), projection(text).view(2, 2, 3))
    assert torch.equal(text_query(text, projection, 3, norm), projection(norm(text)).view(2, 3, 2))
    with pytest.raises(InputError, match="text has width 5 but the block's query projection takes 6"):
        text_query(torch.randn(2, 5), projection, 2)


def test_joint_attention_is_a_softmax_of_cosines() -> None:
    generator = torch.Generator().manual_seed(1)
    text, patches = torch.randn(1, 3, generator=generator), torch.randn(1, 4, 3, generator=generator)
    cosines = []
    for patch in patches[0]:
        product = sum(float(a * b) for a, b in zip(text[0], patch, strict=True))
        cosines.append(product / math.sqrt(sum(float(a) ** 2 for a in text[0]) * sum(float(b) ** 2 for b in patch)))
    weights = [math.exp(cosine / 0.3) for cosine in cosines]
    wanted = torch.tensor([[weight / sum(weights) for weight in weights]])
    torch.testing.assert_close(joint_attention(text, patches, 0.3), wanted, rtol=0, atol=1e-5)
    scaled = joint_attention(text * 7, patches * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None], 0.3)
    torch.testing.assert_close(scaled, wanted, rtol=0, atol=1e-5)


class Shared(Context):
    """A space that text and patches share without a projector."""

    def __init__(self, text: Tensor, counts: list[int], depth: int) -> None:
        self.given, self.original_counts, self.depth, self.memory = text, counts, depth, {}

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        return self.given

    def to_llm(self, tokens: VisualTokens) -> Tensor:
        return tokens.features


def run(method: TRIPS, tokens: VisualTokens, text: Tensor, depth: int = 12) -> VisualTokens:
    context = Shared(text, tokens.counts(), depth)
    for layer in range(1, depth):
        tokens = method.vision_layer(tokens, layer, context)
    return tokens


def by_hand(
    features: list[list[float]], text: list[float], counts: list[int], temperature: float, apart: bool, share: bool
) -> dict[int, tuple[list[float], float]]:
    """Place -> (feature, size), one selection after the other, in double precision."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    held = {place: (list(feature), 1.0) for place, feature in enumerate(features)}
    fused_before: set[int] = set()
    for count in counts:
        if count >= len(held):
            continue
        raw = {place: cosine(text, feature) / temperature for place, (feature, _) in held.items()}
        top = max(raw.values())
        weights = {place: math.exp(value - top) for place, value in raw.items()}
        scores = {place: weight / sum(weights.values()) for place, weight in weights.items()}
        free = sorted((place for place in held if not (apart and place in fused_before)), key=lambda p: (-scores[p], p))
        stay = max(0, count - 1 - (len(held) - len(free)))
        rest = free[stay:]
        total = sum(scores[place] for place in rest) if share else 1.0
        fused = [sum(scores[p] * held[p][0][d] for p in rest) / total for d in range(len(text))]
        size = sum(held[p][1] for p in rest)
        for place in rest:
            del held[place]
        held[rest[0]] = (fused, size)
        fused_before.add(rest[0])
    return held


@pytest.mark.parametrize("layers", [(5, 10), (2, 5, 9)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_selections_are_those_of_plain_loops(seed: int, normalise: bool, apart: bool, layers: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [17, 9, 12]
    features = torch.randn(3, 17, 5, generator=generator)
    text = torch.randn(3, 5, generator=generator)
    valid = torch.arange(17) < torch.tensor(lengths)[:, None]
    tokens = VisualTokens.from_features(features.masked_fill(~valid[..., None], torch.nan), valid=valid)
    method = TRIPS(keep=0.3, layers=layers, temperature=0.5, normalise=normalise, protect_fused=apart)
    left = run(method, tokens, text)
    for row, length in enumerate(lengths):
        last = math.floor(0.3 * length + 0.5)
        parts = [(number + 1) / len(layers) for number in range(len(layers) - 1)]
        counts = [max(last, math.floor(length * (last / length) ** part + 0.5)) for part in parts] + [last]
        wanted = by_hand(features[row, :length].tolist(), text[row].tolist(), counts, 0.5, apart, normalise)
        got = item(left, row)
        assert got["source"].tolist() == sorted(wanted)
        for place, feature, size in zip(got["source"].tolist(), got["features"], got["size"], strict=True):
            torch.testing.assert_close(feature, torch.tensor(wanted[place][0]), rtol=1e-4, atol=1e-5)
            assert float(size) == wanted[place][1]
        assert float(got["size"].sum()) == length


def test_blocks_are_five_and_ten_of_twelve_scaled_to_the_depth() -> None:
    assert TRIPS().selecting(12) == (5, 10)
    assert TRIPS().selecting(24) == (10, 20)
    assert TRIPS().selecting(23) == (10, 19)
    assert TRIPS().selecting(3) == (1,)  # 2.5 is rounded to 3, which is no block before the projector
    assert TRIPS(layers=(2,)).selecting(3) == (2,)
    with pytest.raises(UnsupportedError, match=r"layers=5 but this tower has 4 blocks .* from 1 to 3"):
        TRIPS(layers=(1, 5)).tower_layers(4, 5)


def test_budgets_fall_in_geometric_steps() -> None:
    assert [stage_count(0.49, 100, 1, part) for part in (0.5, 1.0)] == [70, 49]
    assert [stage_count(8, 128, 1, part) for part in (0.5, 1.0)] == [32, 8]
    assert stage_count(1.0, 100, 1, 0.5) == 100 and stage_count(1, 1, 1, 0.5) == 1


def test_other_texts_select_other_patches_and_their_length_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = VisualTokens.from_features(torch.randn(1, 30, 6, generator=generator))
    one, other = torch.randn(1, 6, generator=generator), torch.randn(1, 6, generator=generator)
    method = TRIPS(keep=0.3)
    assert run(method, tokens, one).source.tolist() != run(method, tokens, other).source.tolist()
    assert run(method, tokens, one).source.tolist() == run(method, tokens, one * 5).source.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", value) for value in ("5", 5, (), (0, 2), (3, 3), (4, 2), (True,), (2.0,))),
        *(("temperature", value) for value in (0, -1.0, math.inf, math.nan, True, "0.1", None)),
        ("normalise", 1),
        ("protect_fused", None),
    ],
)
def test_a_bad_setting_names_itself_and_a_way_out(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=rf"{field}=.*(give|use)"):
        dataclasses.replace(TRIPS(), **{field: value})
