"""Rows of attention against plain loops; Triton against the reference is in test_ops.py."""

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
from mmtoken.kernels.attention_rows import attention_rows, reference
from mmtoken.kernels.attention_rows.cases import OPERATION, naive
from mmtoken.kernels.cases import made

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


def by_loops(
    query: Tensor,
    key: Tensor,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    causal_offset: int | None,
    valid: Tensor | None,
    mean: str,
) -> Tensor:
    """The definition, one number at a time."""
    batch, heads, queries, width = query.shape
    groups, length = key.shape[1:3]
    count = queries if index is None else index.shape[1]
    rows = torch.zeros(batch, heads, count, length)
    for b in range(batch):
        for h in range(heads):
            for r in range(count):
                place = r if index is None else int(index[b, r])
                weights = {}
                for n in range(length):
                    score = scale * sum(
                        float(query[b, h, place, d]) * float(key[b, h // (heads // groups), n, d]) for d in range(width)
                    )
                    if causal_offset is not None and n > causal_offset + place:
                        continue
                    if mask is not None:
                        entry = mask[b % mask.shape[0], place % mask.shape[1], n]
                        if not (bool(entry) if mask.dtype == torch.bool else entry > torch.finfo(mask.dtype).min / 2):
                            continue
                        score += 0.0 if mask.dtype == torch.bool else float(entry)
                    weights[n] = score
                most = max(weights.values(), default=0.0)
                total = sum(math.exp(score - most) for score in weights.values())
                for n, score in weights.items():
                    rows[b, h, r, n] = math.exp(score - most) / total
    if mean == "none":
        return rows
    averaged = rows.mean(1)
    if mean == "heads":
        return averaged
    counted = torch.ones(batch, count, dtype=torch.bool) if valid is None else valid
    return torch.stack(
        [averaged[b][counted[b]].mean(0) if counted[b].any() else torch.zeros(length) for b in range(batch)]
    )


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    batch, groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, length, width = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, index = queries, None
    if draw(st.booleans()):
        rows = draw(st.integers(1, 4))
        index = torch.randint(0, queries, (batch, rows), generator=generator)
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "lowest", "infinite"]))
    if kind != "none":
        shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, queries])), length
        seen = torch.rand(shape, generator=generator) > 0.4
        lowest = torch.finfo(torch.float32).min if kind == "lowest" else -math.inf
        mask = seen if kind == "bool" else normal(*shape).masked_fill(~seen, lowest)
    return {
        "query": normal(batch, groups * shared, queries, width),
        "key": normal(batch, groups, length, width),
        "scale": draw(st.sampled_from([0.3, 1.0])),
        "index": index,
        "mask": mask,
        "causal_offset": draw(st.sampled_from([None, -2, 0, 1])),
        "valid": draw(st.sampled_from([None, torch.rand(batch, rows, generator=generator) > 0.4])),
        "mean": draw(st.sampled_from(["none", "heads", "queries"])),
    }


@given(inputs(), st.sampled_from([1, 3, 512]))
@settings(max_examples=60, deadline=None)
def test_the_reference_is_the_definition(given: dict[str, Any], tile: int) -> None:
    """Whatever the rows of a tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.ROWS, "cpu", tile)
        torch.testing.assert_close(attention_rows(**given), by_loops(**given), **CLOSE)


@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("case", OPERATION.cases, ids=lambda case: case.name)
def test_gradients_are_those_of_the_straightforward_way(case: Any, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.ROWS, "cpu", tile)
    found = []
    for function in (attention_rows, naive):
        given = made(case, 17, torch.float32, batch=2)
        given["query"].requires_grad_()
        given["key"].requires_grad_()
        output = function(**given)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output * weight).sum().backward()
        found.append((output, given["query"].grad, given["key"].grad))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, **CLOSE)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("mean", ["none", "heads", "queries"])
def test_a_query_that_sees_nothing_has_zeros_and_no_gradient(mean: str, impl: Any) -> None:
    query, key = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 1, 5, 4, requires_grad=True)
    for mask in (torch.zeros(1, 3, 5, dtype=torch.bool), torch.full((1, 1, 5), -torch.inf)):
        found = attention_rows(query, key, mask=mask, mean=mean, impl=impl)
        assert torch.equal(found, torch.zeros_like(found))
        for gradient in torch.autograd.grad(found.sum(), (query, key)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_mean_over_no_query_is_zero(impl: Any) -> None:
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    valid = torch.tensor([[False] * 3, [True, False, True]])
    found = attention_rows(query, key, valid=valid, mean="queries", impl=impl)
    assert torch.equal(found[0], torch.zeros(5))
    torch.testing.assert_close(found[1].sum(), torch.tensor(1.0))
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(attention_rows(query, key, index=none, mean="queries", impl=impl), torch.zeros(2, 5))
    assert attention_rows(query, key, index=none, impl=impl).shape == (2, 2, 0, 5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_queries_that_do_not_count_and_hidden_keys_may_be_nan(impl: Any) -> None:
    query, key = torch.randn(1, 2, 4, 3), torch.randn(1, 1, 5, 3)
    valid, mask = torch.tensor([[True, False, True, False]]), torch.tensor([[[True, True, False, True, True]]])
    wanted = attention_rows(query[:, :, ::2], key, mask=mask, mean="queries", impl="torch")
    query[:, :, 1::2], key[:, :, 2] = torch.nan, torch.nan
    found = attention_rows(query, key, mask=mask, valid=valid, mean="queries", impl=impl)
    torch.testing.assert_close(found, wanted, **CLOSE)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for output in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(output, Tensor):
                self.numbers = max(self.numbers, output.untyped_storage().size() // output.element_size())
        return found


@pytest.mark.parametrize("training", [False, True])
def test_memory_of_the_mean_over_queries_is_linear(training: bool) -> None:
    """Nothing larger than ROWS rows, forwards and backwards."""
    length = 2000
    query, key = (torch.randn(1, 2, length, 8, requires_grad=training) for _ in range(2))
    with Largest() as largest:
        found = attention_rows(query, key, causal_offset=0, mean="queries", impl="torch")
        if training:
            found.sum().backward()
    assert largest.numbers <= reference.ROWS["cpu"] * length < length**2


@pytest.fixture
def kernels() -> Any:
    pytest.importorskip("triton")
    from mmtoken.kernels.attention_rows import triton

    return triton


@pytest.mark.parametrize("case", OPERATION.cases, ids=lambda case: case.name)
def test_block_sizes_of_devices_give_the_same(
    case: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """The interpreter's own are larger, so that it takes fewer steps."""
    given = made(case, 131, torch.float32)
    wanted = attention_rows(**given, impl="torch")
    monkeypatch.setattr(kernels, "ROWS", 64)
    monkeypatch.setattr(kernels, "KEYS", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)  # so that a program takes several tiles
    monkeypatch.setattr(kernels, "MOST_WIDTH", 16)
    torch.testing.assert_close(attention_rows(**given, impl="triton"), wanted, **CLOSE)


@pytest.mark.parametrize("indexed", [False, True])
def test_the_mean_over_heads_of_many_rows_goes_in_parts(
    indexed: bool, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = torch.randn(2, 2, 5, 4), torch.randn(2, 1, 6, 4)
    given: dict[str, Any] = {"causal_offset": 1, "mean": "heads"}
    if indexed:
        given["index"] = torch.tensor([[4, 0, 2], [1, 1, 3]])
    wanted = attention_rows(query, key, **given, impl="torch")
    monkeypatch.setattr(kernels, "MOST_SCORES", 2 * 2 * 6 * 2)
    torch.testing.assert_close(attention_rows(query, key, **given, impl="triton"), wanted, **CLOSE)


def test_keys_of_another_type_than_queries() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4).bfloat16()
    wanted = attention_rows(query, key.float())
    for impl in ("torch", "triton"):
        torch.testing.assert_close(attention_rows(query, key, impl=impl), wanted, **CLOSE)


X = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"key": X[:1]}, r"query \[2, 4, 3, 8\], key \[1, 4, 3, 8\]"),
        ({"key": X[..., :4]}, "same B and d"),
        ({"key": X[:, :3]}, "multiple of the 3 key/value heads"),
        ({"index": torch.zeros(1, 2, dtype=torch.int64)}, r"index \[1, 2\] must be \[B, R\] with B = 2"),
        ({"valid": torch.ones(2, 2, dtype=torch.bool)}, r"valid \[2, 2\] must be \[B, R\] = \[2, 3\]"),
        ({"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, r"mask \[2, 3, 5\]"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"mask \[3, 3\]"),
        ({"mean": "rows"}, r"mean='rows'.*'none', 'heads', 'queries'"),
    ],
)
def test_shapes_that_do_not_fit_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention_rows(**{"query": X, "key": X, **given})
