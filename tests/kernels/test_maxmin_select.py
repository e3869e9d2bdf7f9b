"""maxmin_select against a plain loop over its definition; tests/kernels/test_ops.py holds the kernels against it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.maxmin_select import maxmin_select, reference
from tests.kernels.test_similarity_stats import Largest


def distances(features: Tensor) -> list[list[float]]:
    unit = [[float(v) / max(math.hypot(*x.tolist()), 1e-12) for v in x] for x in features.double()]
    return [[1 - sum(x * y for x, y in zip(a, b, strict=True)) for b in unit] for a in unit]


def by_hand(features: Tensor, steps: int, eligible: Tensor, count: int) -> list[int]:
    """Picks of one item in float64; distances closer than 1e-9 are equal, of which the first is farthest."""
    distance = distances(features)
    order: list[int] = []
    candidates = eligible.nonzero()[:, 0].tolist()
    while len(order) < min(count, steps, len(candidates)):
        best, farthest = -1, -math.inf
        for i in candidates:
            others = order or [j for j in candidates if j != i]
            nearest = min((distance[i][j] for j in others), default=math.inf)
            if i not in order and nearest > farthest + 1e-9:
                best, farthest = i, nearest
        order.append(best)
    return order + [-1] * (steps - len(order))


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 12),
    steps=st.integers(0, 14),
    exact=st.booleans(),
    whole=st.sampled_from([0, 1024]),
    ahead=st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_the_picks_are_those_of_a_loop_over_tokens(
    seed: int, n: int, steps: int, exact: bool, whole: int, ahead: int
) -> None:
    """Random tokens, and tokens of -1 and 1 with four entries, whose distances are exact and mostly equal."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, n, 4, generator=generator)
    if exact:
        features = torch.where(features > 0, 1.0, -1.0)
    eligible = torch.rand(3, n, generator=generator) < 0.8
    counts = torch.randint(0, steps + 2, (3,), generator=generator)
    wanted = [by_hand(features[b], steps, eligible[b], int(counts[b])) for b in range(3)]
    features[~eligible] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "WHOLE", whole)
        patch.setattr(reference, "AHEAD", ahead)
        found = maxmin_select(features, steps, eligible=eligible, counts=counts, impl="torch")
    assert found.shape == (3, steps)
    assert found.tolist() == wanted


def test_what_is_compiled_or_on_a_device_picks_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(2, 60, 5, generator=generator), dim=-1)
    eligible = torch.rand(2, 60, generator=generator) < 0.6
    assert int(eligible.sum(-1).min()) >= 30
    steps = reference.one_by_one(unit.masked_fill(~eligible[..., None], 0.0), eligible, 30)
    assert torch.equal(steps, maxmin_select(unit, 30, eligible=eligible, impl="torch"))
    assert [by_hand(unit[b], 30, eligible[b], 30) for b in range(2)] == steps.tolist()


@pytest.mark.parametrize(("impl", "whole"), [("torch", 1024), ("torch", 0), ("triton", 0)])
def test_of_two_mutual_neighbours_the_lower_index_is_first_whatever_rounding_says(
    impl: Any, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "WHOLE", whole)
    rows = 300 if impl == "torch" or torch.cuda.is_available() else 4
    features = torch.randn(rows, 11, 29, generator=torch.Generator().manual_seed(4))
    eligible = torch.zeros(rows, 11, dtype=torch.bool)
    eligible[:, [2, 9]] = True
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    found = maxmin_select(features.to(device), 3, eligible=eligible.to(device), impl=impl)
    assert found.tolist() == [[2, 9, -1]] * rows


def test_no_tensor_grows_with_the_pairs() -> None:
    tokens = torch.randn(1, 2000, 4, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        maxmin_select(tokens, 200, impl="torch")
    assert largest.elements <= 320 * 320
    with Largest() as largest:
        maxmin_select(tokens[:, : reference.WHOLE], 20, impl="torch")
    assert largest.elements == reference.WHOLE**2


def test_indices_have_no_gradient() -> None:
    picks = maxmin_select(torch.randn(1, 6, 3, requires_grad=True), 2)
    assert picks.dtype == torch.int64 and not picks.requires_grad


def test_inputs_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 5, 3)
    for changes, message in (
        ({"features": x[0]}, r"features has shape \(5, 3\); expected \[items, tokens, width\]"),
        ({"steps": -1}, r"steps=-1 is negative"),
        ({"eligible": torch.ones(2, 4, dtype=torch.bool)}, r"eligible has shape \(2, 4\); expected \(2, 5\)"),
        ({"counts": torch.ones(3, dtype=torch.long)}, r"counts has shape \(3,\); expected \(2,\)"),
    ):
        with pytest.raises(InputError, match=message):
            maxmin_select(**{"features": x, "steps": 2, **changes})  # type: ignore[arg-type]
