"""Page rank against plain loops, its invariants; tests/kernels/test_ops.py holds the kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.cases import made
from mmtoken.kernels.pagerank import pagerank, reference
from mmtoken.kernels.pagerank.cases import OPERATION
from tests.kernels.test_similarity_stats import Largest


@pytest.fixture(params=["kept", "formed again"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with attention that is kept over the rounds, and with attention that is not."""
    if request.param != "kept":
        monkeypatch.setattr(reference, "KEPT", 0)
    return str(request.param)


def graph(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, H, n, n] whose attention is the given one [H, n, n], positive rows that sum to 1."""
    length = attention.shape[-1]
    return attention.log()[None] * length**0.5, torch.eye(length).expand(1, attention.shape[0], -1, -1)


def random_attention(heads: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def ranked(attention: Tensor, rounds: int, tolerance: float = 0.0) -> Tensor:
    """float[H, n], from equal weights."""
    length = attention.shape[-1]
    seen = torch.ones(1, length, dtype=torch.bool)
    return pagerank(*graph(attention), seen, seen / length, rounds, tolerance=tolerance)[0]


@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
def test_scores_sum_to_one_and_are_not_negative(rounds: int) -> None:
    scores = ranked(random_attention(3, 9), rounds)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3))
    assert bool((scores >= 0).all())


def test_many_rounds_end_at_the_stationary_vector() -> None:
    attention = random_attention(2, 7)
    scores = ranked(attention, 200)
    for head in range(2):
        values, vectors = torch.linalg.eig(attention[head].T.double())
        vector = vectors[:, (values.real - 1).abs().argmin()].real
        torch.testing.assert_close(scores[head], (vector / vector.sum()).float(), rtol=1e-5, atol=1e-6)


def test_one_round_from_equal_weights_is_the_mean_of_each_column() -> None:
    attention = random_attention(2, 7)
    torch.testing.assert_close(ranked(attention, 1), attention.mean(1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rounds_stop_once_scores_stand_still_for_each_item_by_itself(impl: Any) -> None:
    """The second item hardly moves in a round, so that it needs more of them than the first."""
    quick = random_attention(1, 6)
    slow = 0.8 * torch.eye(6) + 0.2 * random_attention(1, 6, seed=1)
    (a, b), (c, d) = graph(quick), graph(slow)
    seen = torch.ones(2, 6, dtype=torch.bool)
    both = pagerank(torch.cat([a, c]), torch.cat([b, d]), seen, seen / 6, 50, tolerance=1e-3, impl=impl)
    rounds = []
    for item, attention in enumerate((quick, slow)):
        scores, change, number = torch.full((6,), 1 / 6), 1.0, 0
        while change >= 1e-3:
            after = attention[0].T @ scores
            change = float((after - scores).abs().mean())
            scores, number = after, number + 1
        torch.testing.assert_close(both[item, 0], scores)
        assert not torch.allclose(ranked(attention, number + 3)[0], scores, rtol=0, atol=1e-5)
        rounds.append(number)
    assert 1 < rounds[0] < rounds[1] < 50


def test_doubly_stochastic_attention_gives_equal_scores() -> None:
    shifts = [torch.eye(6).roll(k, 0) for k in range(6)]
    weights = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    attention = sum(w * s for w, s in zip(weights, shifts, strict=True))
    torch.testing.assert_close(ranked(attention[None], 13), torch.full((1, 6), 1 / 6))


def test_permuted_tokens_have_permuted_scores() -> None:
    attention = random_attention(2, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ranked(attention[:, order][:, :, order], 4), ranked(attention, 4)[:, order])


def by_loops(
    query: Tensor, key: Tensor, seen: Tensor, start: Tensor, rounds: int, tolerance: float, scale: float
) -> Tensor:
    """The definition, one number at a time."""
    batch, heads, length, _ = query.shape
    found = torch.zeros(batch, heads, length)
    for b in range(batch):
        tokens = seen[b].nonzero()[:, 0].tolist()
        scores = [{t: float(start[b, t]) for t in tokens} for _ in range(heads)]
        change = math.inf
        for _ in range(rounds):
            if change < tolerance or not tokens:
                break
            before = scores
            scores = []
            for h in range(heads):
                scores.append(dict.fromkeys(tokens, 0.0))
                for i in tokens:
                    weights = {
                        j: math.exp(scale * float(query[b, h, i].double() @ key[b, h, j].double())) for j in tokens
                    }
                    for j in tokens:
                        scores[h][j] += before[h][i] * weights[j] / sum(weights.values())
            change = sum(abs(scores[h][t] - before[h][t]) for h in range(heads) for t in tokens) / heads / len(tokens)
        for h in range(heads):
            for t in tokens:
                found[b, h, t] = scores[h][t]
    return found


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 6),
    rounds=st.integers(0, 6),
    tolerance=st.sampled_from([0.0, 0.003, 0.03]),
    tile=st.sampled_from([1, 10, 1 << 20]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_the_reference_is_the_definition(
    batch: int, heads: int, length: int, rounds: int, tolerance: float, tile: int, seed: int
) -> None:
    """Whatever is formed at a time, with NaN in tokens that are not seen, each item stopping by itself."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, length, 3, generator=generator)
    seen = torch.rand(batch, length, generator=generator) < 0.8
    start = torch.rand(batch, length, generator=generator) * seen
    start = start / start.sum(-1, keepdim=True).clamp(min=1e-6)
    wanted = by_loops(query, key, seen, start, rounds, tolerance, 0.9)
    for x in (query, key):
        x.masked_fill_(~seen[:, None, :, None], torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.TILE, "cpu", tile)
        found = pagerank(query, key, seen, start, rounds, tolerance=tolerance, scale=0.9, impl="torch")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_generic_case_with_a_tolerance_stops_before_its_last_round(impl: Any, kind: str) -> None:
    """Else that case would not tell whether kernels stop."""
    case = next(case for case in OPERATION.cases if case.name == "ragged")
    inputs = made(case, 63, torch.float32) | {"rounds": 9}
    found = pagerank(**inputs, impl=impl)
    assert not torch.allclose(pagerank(**inputs | {"tolerance": 0.0}, impl=impl), found, rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_square(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of attention of few tokens, else a tile."""
    monkeypatch.setitem(reference.TILE, "cpu", 1 << 14)
    length = 1000
    query, key = torch.randn(2, 1, 3, length, 4, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(1, length, dtype=torch.bool)
    with Largest() as largest:
        pagerank(query, key, seen, seen / length, 2, impl="torch")
    assert largest.elements == length**2 if kind == "kept" else largest.elements <= 1 << 14
    assert 4096**2 == 1 << 24  # what the documentation says is kept


def test_scores_have_no_gradient() -> None:
    x = torch.randn(1, 1, 4, 3, requires_grad=True)
    seen = torch.ones(1, 4, dtype=torch.bool)
    assert not pagerank(x, x, seen, seen / 4, 2).requires_grad


X, SEEN = torch.zeros(2, 3, 5, 4), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": X[:, :2]}, r"query \[2, 3, 5, 4\], key \[2, 2, 5, 4\]"),
        ({"query": X[0], "key": X[0]}, r"both must be \[items, heads, tokens, width\]"),
        ({"seen": SEEN[:, :4]}, r"seen \[2, 4\] must be \[items, tokens\] = \[2, 5\]"),
        ({"start": SEEN[:1]}, r"start \[1, 5\] must be"),
        ({"rounds": -1}, "rounds=-1 is negative"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pagerank(**{"query": X, "key": X, "seen": SEEN, "start": SEEN / 5, "rounds": 1, **changes})
