"""similarity_stats against plain loops over its definition; tests/kernels/test_ops.py holds the kernels against it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmtoken.errors import InputError
from mmtoken.kernels.similarity_stats import reference, similarity_stats

INF = math.inf


def by_hand(
    features: Tensor, other: Tensor | None, rows: Tensor | None, columns: Tensor | None, threshold: float
) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """(max, argmax, above) pair by pair in float64; similarities closer than 1e-9 are equal."""

    def unit(x: Tensor) -> list[list[float]]:
        return [[float(v) / max(math.hypot(*x.tolist()), 1e-12) for v in x] for x in x.double()]

    best, place, above = [], [], []
    for item, tokens in enumerate(features):
        ours = unit(tokens)
        theirs = ours if other is None else unit(other[item])
        for results in (best, place, above):
            results.append([])
        for i, a in enumerate(ours):
            highest, where, count = -INF, -1, 0
            for j, b in enumerate(theirs):
                hidden = (rows is not None and not rows[item, i]) or (columns is not None and not columns[item, j])
                if hidden or (other is None and i == j):
                    continue
                similarity = sum(x * y for x, y in zip(a, b, strict=True))
                if similarity > highest + 1e-9:
                    highest, where = similarity, j
                count += similarity > threshold + 1e-9
            best[-1].append(highest)
            place[-1].append(where)
            above[-1].append(count)
    return best, place, above


def random_inputs(seed: int, n: int, m: int | None, masked: bool) -> dict[str, Any]:
    """Small whole numbers: many tokens are alike or parallel, and some are zero."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {"features": torch.randint(-1, 2, (2, n, 4), generator=generator).float()}
    if m is not None:
        inputs["other"] = torch.randint(-1, 2, (2, m, 4), generator=generator).float()
    if masked:
        inputs["rows"] = torch.rand(2, n, generator=generator) < 0.7
        inputs["columns"] = torch.rand(2, n if m is None else m, generator=generator) < 0.7
    return inputs


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 9),
    m=st.none() | st.integers(0, 9),
    masked=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.3, 0.6, 0.95]),
    tile=st.integers(1, 10),
)
@settings(max_examples=60, deadline=None)
def test_the_statistics_are_those_of_a_loop_over_pairs(
    seed: int, n: int, m: int | None, masked: bool, threshold: float, tile: int
) -> None:
    inputs = random_inputs(seed, n, m, masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "TILE", tile)
        found = similarity_stats(**inputs, threshold=threshold, impl="torch")
    best, place, above = by_hand(*(inputs.get(x) for x in ("features", "other", "rows", "columns")), threshold)
    torch.testing.assert_close(found.max, torch.tensor(best).view(2, n), atol=1e-5, rtol=1e-4)
    assert found.above.tolist() == above or threshold == -1.0  # where rounding decides
    # Parallel tokens are equally similar up to rounding: what is found must be as similar as the first of them.
    for item in range(2):
        for i, j in enumerate(found.argmax[item].tolist()):
            assert (j == -1) == (place[item][i] == -1)
            if j >= 0:
                other = inputs.get("other", inputs["features"])[item, j]
                similarity = torch.cosine_similarity(inputs["features"][item, i], other, dim=0, eps=1e-12)
                assert float(similarity) == pytest.approx(best[item][i], abs=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("other", [False, True])
def test_of_equal_similarities_the_lower_index_wins(impl: Any, other: bool) -> None:
    """Tokens repeat in places that are far apart, so in other tiles and splits too."""
    tokens = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, 1, -1, 1]])[torch.arange(700) % 3][None]
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    tokens = tokens.to(device)
    found = similarity_stats(tokens, tokens.clone() if other else None, impl=impl)
    first = torch.arange(700) % 3
    if not other:
        first[:3] += 3
    assert found.argmax[0].tolist() == first.tolist()
    assert torch.equal(found.max.cpu(), torch.ones(1, 700))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_is_above_a_threshold_of_one(impl: Any) -> None:
    tokens = torch.rand(1, 1, 11, generator=torch.Generator().manual_seed(0)).expand(1, 40, 11).contiguous()
    tokens = tokens.to("cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
    assert similarity_stats(tokens, threshold=0.999, impl=impl).above.tolist() == [[39] * 40]
    assert similarity_stats(tokens, impl=impl).above.tolist() == [[0] * 40]


def test_the_gradient_is_that_of_the_cosine_of_each_pair() -> None:
    """Of a loop that writes the cosine down, without normalised copies."""
    features, other = (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    for second in (None, other):
        leaves = [x.clone().requires_grad_() for x in (features, other)]
        y = leaves[0] if second is None else leaves[1]
        weights = torch.arange(1.0, 11).view(2, 5)
        place = by_hand(features, second, None, None, 1.0)[1]
        total = sum(
            weights[b, i] * (leaves[0][b, i] @ y[b, j]) / (leaves[0][b, i].norm() * y[b, j].norm())
            for b in range(2)
            for i, j in enumerate(place[b])
        )
        total.backward()
        for impl in ("torch", "triton"):
            device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
            ours = [x.float().to(device).requires_grad_() for x in (features, other)]
            found = similarity_stats(ours[0], None if second is None else ours[1], impl=impl)  # type: ignore[arg-type]
            (found.max * weights.to(device)).sum().backward()
            for mine, theirs in zip(ours, leaves, strict=True):
                wanted = None if theirs.grad is None else theirs.grad.float().to(device)
                torch.testing.assert_close(mine.grad, wanted, atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("against", [None, 2000])
def test_no_tensor_grows_with_the_pairs(against: int | None) -> None:
    tokens = torch.randn(1, 2000, 4, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        similarity_stats(tokens, None if against is None else tokens.clone(), threshold=0.5, impl="torch")
    assert 2000 * 4 <= largest.elements <= reference.TILE * 2000


def test_inputs_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 5, 3)
    for changes, message in (
        ({"features": x[0]}, r"features has shape \(5, 3\); expected \[items, tokens, width\]"),
        ({"other": x[:1]}, r"other has shape \(1, 5, 3\); expected \[2, tokens, 3\]"),
        ({"other": x[..., :2]}, r"other has shape \(2, 5, 2\)"),
        ({"rows": torch.ones(2, 4, dtype=torch.bool)}, r"rows has shape \(2, 4\); expected \[2, 5\]"),
        ({"other": x[:, :4], "columns": torch.ones(2, 5, dtype=torch.bool)}, r"columns .* expected \[2, 4\]"),
    ):
        with pytest.raises(InputError, match=message):
            similarity_stats(**{"features": x, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_similarity_equal_to_the_threshold_is_not_above_it(impl: Any) -> None:
    right_angles = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    assert similarity_stats(right_angles, threshold=0.0, impl=impl).above.tolist() == [[1, 0, 1]]
