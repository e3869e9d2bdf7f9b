"""TCA's condensation: the paper's counts, ranks, clusters and sums, by hand and by plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken import MMTokenError, compress
from mmtoken.compressors import TCA
from mmtoken.compressors.base import TowerStates
from mmtoken.compressors.tca import class_attention, condense, mean_rank, split_by_rate, split_to
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens
from tests.backbones.tiny_models import build
from tests.compressors.batches import item, make


@pytest.mark.parametrize(("drop", "split", "length"), [(0.1, (137, 40, 19), 143), (0.035, (176, 14, 6), 182)])
def test_the_counts_of_the_paper(drop: float, split: tuple[int, int, int], length: int) -> None:
    """Of 196 patches and CLS."""
    assert split_by_rate(196, drop) == (*split, 4)
    stay, condensed, summed = split
    assert stay + condensed + summed == 196 and 1 + stay + 4 + 1 == length
    # the same count asked for by a budget splits in the same way
    assert split_to(196, length - 1) == (*split, 4)


def test_nothing_is_condensed_where_no_token_would_stay_as_it_is() -> None:
    assert split_by_rate(4, 0.5)[:3] == (4, 0, 0)  # 2 to keep, 3 places: not more than twice as many
    assert split_by_rate(9, 0.5)[0] == 9
    assert split_by_rate(20, 0.01)[:3] == (20, 0, 0)  # nothing leaves
    assert split_by_rate(10, 0.1) == (5, 4, 1, 4)  # 0.9 * 10 is nine


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 12, 40])
def test_a_budget_is_met_exactly(count: int) -> None:
    for target in range(1, count + 1):
        stay, condensed, summed, clusters = split_to(count, target)
        assert min(stay, condensed, summed) >= 0 and stay >= 1
        if target == count:
            assert (stay, condensed, summed) == (count, 0, 0)
            continue
        assert stay + min(clusters, condensed) + bool(summed) == target
        if target > 1:
            assert stay + condensed + summed == count and summed >= 2
            assert condensed >= min(4, target - 2)


def test_ranks_are_taken_in_every_head() -> None:
    """The second token has the highest mean, and the first one the higher places."""
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.05, 0.8, 0.1, 0.05]])
    assert attention.mean(0).argmax() == 1
    torch.testing.assert_close(mean_rank(attention), -torch.tensor([2.0, 2.0, 5.0, 9.0]) / 3)
    # of equal ones the lower index comes first
    assert mean_rank(torch.tensor([[0.5, 0.5]])).tolist() == [0.0, -1.0]


def test_clusters_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [12.0, 0.0], [0.0, 8.0]])
    centres, owner, merged = condense(features, 3)
    assert centres.tolist() == [0, 3, 4] and owner.tolist() == [0, 0, 1, 1, 2]
    # weights: 1 for a centre, 1 / distance for the others
    want = torch.tensor([[0.5, 0.0], [(12 + 10 * 0.5) / 1.5, 0.0], [0.0, 8.0]])
    torch.testing.assert_close(merged, want)


@pytest.mark.parametrize(("length", "count", "first"), [(9, 4, 0), (9, 4, 5), (4, 4, 99), (3, 4, 0), (1, 4, 0)])
def test_clusters_equal_plain_loops(length: int, count: int, first: int) -> None:
    features = torch.randn(length, 3, generator=torch.Generator().manual_seed(length + first))
    rows = features.tolist()
    centres = [min(first, length - 1)]
    while len(centres) < min(count, length):
        far = [-1.0 if i in centres else min(math.dist(rows[i], rows[c]) for c in centres) for i in range(length)]
        centres.append(far.index(max(far)))
    owner = [min(range(len(centres)), key=lambda k, i=i: math.dist(rows[i], rows[centres[k]])) for i in range(length)]
    got = condense(features, count, first)
    assert got[0].tolist() == centres and got[1].tolist() == owner
    for cluster, centre in enumerate(centres):
        members = [i for i in range(length) if owner[i] == cluster]
        weights = [1.0 if i == centre else 1 / math.dist(rows[i], rows[centre]) for i in members]
        mean = [sum(w * rows[i][c] for w, i in zip(weights, members, strict=True)) / sum(weights) for c in range(3)]
        torch.testing.assert_close(got[2][cluster], torch.tensor(mean))
        # a mean lies in the box around its members
        inside = features[members]
        assert bool((got[2][cluster] >= inside.amin(0) - 1e-6).all() & (got[2][cluster] <= inside.amax(0) + 1e-6).all())


def test_equal_tokens_make_no_holes() -> None:
    centres, owner, merged = condense(torch.ones(6, 2), 4)
    assert sorted(centres.tolist()) == sorted(set(centres.tolist()))
    assert owner[centres].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(merged, torch.ones(4, 2))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("patches", [1, 2])
def test_the_class_tokens_attention_equals_plain_loops(prefix: int, patches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, patches, 4, generator=generator)
    first = torch.randn(3, 2, 2, prefix, 4, generator=generator)
    eligible = torch.tensor([[True] * 5, [True, True, False, True, False]])
    holes = ~eligible[:, None, :, None, None]
    got = class_attention(
        TowerStates(query.masked_fill(holes, math.nan), key.masked_fill(holes, math.nan), value, *first), eligible
    )
    for image in range(2):
        tokens = eligible[image].nonzero()[:, 0].tolist()
        for head in range(2):
            rows = [key[image, head, t, p] for t in tokens for p in range(patches)]
            asks = torch.stack([query[image, head, t, p] for t in tokens for p in range(patches)]).mean(0)
            if prefix:
                asks = first[0, image, head, 0]
                rows = [first[1, image, head, 0], *rows]
            weights = torch.tensor([float(asks @ k) / 2 for k in rows]).softmax(0)[prefix:]
            want = weights.view(len(tokens), patches).sum(-1)
            torch.testing.assert_close(got[image, head, tokens], want)
    assert not bool(got[1, :, [2, 4]].any())


def test_one_place_equals_the_formulas_token_by_token() -> None:
    """What stays, four clusters and the sum, each at the position of its best token, with the size of its members."""
    tokens, context = make([24], separators=True)
    method = TCA(keep=0.5, layers=(2,), variant="repo")
    left = method.vision_layer(tokens, 2, context)
    attention = class_attention(context.tower_states(tokens), tokens.eligible).mean(1)[0]
    where = tokens.eligible[0].nonzero()[:, 0].tolist()
    stay, condensed, summed, _ = split_to(len(where), tokens.budget(0.5)[0])
    order = sorted(where, key=lambda i: (-float(attention[i]), i))
    got = item(left, 0)
    place = {int(source): number for number, source in enumerate(got["source"])}
    for kept in order[:stay]:
        assert torch.equal(got["features"][place[kept]], tokens.features[0, kept])
    middle, rest = order[stay : stay + condensed], order[stay + condensed :]
    centres, owner, merged = condense(tokens.features[0, middle], 4)
    for cluster, centre in enumerate(centres.tolist()):
        at = place[middle[centre]]
        torch.testing.assert_close(got["features"][at], merged[cluster])
        assert float(got["size"][at]) == owner.tolist().count(cluster)
    at = place[rest[0]]
    torch.testing.assert_close(got["features"][at], sum(attention[i] * tokens.features[0, i] for i in rest))
    assert float(got["size"][at]) == summed == len(rest)
    assert left.counts() == tokens.budget(0.5) and float(got["size"].sum()) == 24


def test_ranks_and_attention_choose_differently() -> None:
    tokens, context = make([24])
    kept = [TCA(keep=0.5, layers=(2,), variant=v).vision_layer(tokens, 2, context).kept() for v in ("paper", "repo")]
    assert kept[0][0].tolist() != kept[1][0].tolist()


def test_the_drop_rate_decides_alone_at_every_place() -> None:
    tokens, context = make([196])
    context.depth = 12
    method, counts = TCA(drop=0.1), []
    left: VisualTokens = tokens
    for layer in range(1, 12):
        left = method.vision_layer(left, layer, context)
        counts.append(left.counts()[0])
    assert counts == [196] * 2 + [142] * 3 + [103] * 3 + [76] * 3
    assert TCA().split(103, 196, 2, 3)[0] + 5 == 76, "the default budget is what this rate leaves"


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision"])
def test_keeping_all_is_the_plain_tower_and_images_do_not_know_each_other(name: str) -> None:
    model = build(name)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))

    def states(some: Tensor) -> Tensor:
        out: Tensor = model(some).last_hidden_state
        return out

    with torch.no_grad():
        plain = states(pixels)
        with compress(model, TCA(keep=1.0)):
            assert torch.equal(states(pixels), plain)
        with compress(model, TCA(keep=0.5)) as session:
            together = states(pixels)
            assert session.report.tokens_out == [8, 8]
            for image in range(2):
                torch.testing.assert_close(states(pixels[image : image + 1])[0], together[image], rtol=1e-5, atol=1e-4)


def test_hidden_states_of_a_block_that_condenses_are_those_behind_it() -> None:
    """Also where transformers notes what blocks put out by hooks of its own that were there first."""
    model = build("clip_vision")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    noted: list[Tensor] = []
    with torch.no_grad():
        plain = model(pixels, output_hidden_states=True).hidden_states
        with compress(model, TCA(keep=7, layers=(1,))) as session:
            blocks: Any = model._modules.get("vision_model", model)
            handle = blocks.encoder.layers[1].register_forward_hook(lambda *given: noted.append(given[-1]))
            states = model(pixels, output_hidden_states=True).hidden_states
            handle.remove()
    assert [s.shape for s in states] == [s.shape for s in plain]
    (site,) = [site for site in session.report.sites if site.layer == 1]
    short = noted[0] if isinstance(noted[0], Tensor) else noted[0][0]
    for row, kept in enumerate(site.kept):
        assert torch.equal(states[2][row, 1 + kept], short[row, 1:])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", value) for value in ((), (-1,), (2, 1), "3", 3)),
        *(("drop", value) for value in (0.0, 1.0, -0.1, 1, True, "0.1", math.nan)),
        *(("first", value) for value in (-1, True, 0.5)),
        *(("variant", value) for value in ("official", None)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(MMTokenError, match=f"{field}="):
        TCA(**{field: value})


def test_a_tower_without_such_a_place_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layers="):
        compress(build("clip_vision"), TCA(layers=(3,)))
    with pytest.raises(UnsupportedError, match="first block"):
        TCA().tower_layers(1, 2)


def test_not_a_number_is_refused() -> None:
    tokens, context = make([8, 8])
    context.states[1, 3] = math.nan
    with pytest.raises(MMTokenError, match="NaN for item 1"):
        TCA(keep=0.5, layers=(2,)).vision_layer(tokens, 2, context)
