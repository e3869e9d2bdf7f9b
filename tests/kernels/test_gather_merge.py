"""`gather_merge` against plain loops, and what it promises besides values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl
from mmtoken.kernels.gather_merge import gather_merge, reference
from mmtoken.kernels.gather_merge.cases import OPERATION, with_one_hot_matrix

IMPLS: list[Impl] = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_loops(
    features: Tensor, index: Tensor, slot: Tensor, weight: Tensor, source: Tensor | None, own: Tensor | None
) -> Tensor:
    """float64[B, K, D], one number after the other."""
    batch, _, width = features.shape
    out = torch.zeros(batch, index.shape[1], width, dtype=torch.float64)
    for b in range(batch):
        for k, row in enumerate(index[b].tolist()):
            if row >= 0:
                for d in range(width):
                    out[b, k, d] += (1.0 if own is None else float(own[b, k])) * float(features[b, row, d])
        for e, k in enumerate(slot[b].tolist()):
            row = e if source is None else int(source[b, e])
            if k >= 0 and row >= 0:
                for d in range(width):
                    out[b, k, d] += float(weight[b, e]) * float(features[b, row, d])
    return out


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 6),
    kept=st.integers(1, 5),
    addends=st.integers(0, 12),
    seed=st.integers(0, 999),
    weighted=st.booleans(),
    impl=st.sampled_from(IMPLS),
)
def test_rows_and_sums_are_those_of_plain_loops(
    batch: int, rows: int, kept: int, addends: int, seed: int, weighted: bool, impl: Impl
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, rows, 3, generator=generator)
    index = torch.randint(-1, rows, (batch, kept), generator=generator)
    slot = torch.randint(-1, kept, (batch, addends), generator=generator)
    source = torch.randint(-1, rows, (batch, addends), generator=generator)
    weight = torch.randn(batch, addends, generator=generator)
    own = torch.randn(batch, kept, generator=generator) if weighted else None
    wanted = in_loops(features, index, slot, weight, source, own).float()
    inputs = [None if x is None else x.to(DEVICE) for x in (features, index, slot, weight, source, own)]
    torch.testing.assert_close(gather_merge(*inputs, impl=impl).cpu(), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(with_one_hot_matrix(*inputs).cpu(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_source_row_e_is_added(impl: Impl) -> None:
    features = torch.tensor([[[1.0], [10.0], [100.0]]], device=DEVICE)
    index, slot = torch.tensor([[1]], device=DEVICE), torch.tensor([[0, -1, 0]], device=DEVICE)
    weight = torch.tensor([[2.0, 5.0, 3.0]], device=DEVICE)
    assert gather_merge(features, index, slot, weight, impl=impl).tolist() == [[[312.0]]]


def test_gradients_are_those_of_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.tensor([[0, 1, 1, -1], [2, 2, 0, 1]])
    slot = torch.tensor([[0, 0, 1, 1], [1, -1, 1, 0]])
    features = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: reference.add_rows(x, source, slot, w, 2), (features, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_to_which_nothing_is_added_stays_the_same_to_the_bit(impl: Impl, dtype: torch.dtype) -> None:
    features = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    index = torch.tensor([[7, 0, 3]], device=DEVICE)
    slot = torch.full((1, 9), -1, device=DEVICE)
    slot[0, 5] = 2
    merged = gather_merge(features, index, slot, torch.ones(1, 9, device=DEVICE), impl=impl)
    assert torch.equal(merged[:, :2], features[:, [7, 0]]) and not torch.equal(merged[:, 2], features[:, 3])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_nothing_refers_to_are_not_read(impl: Impl) -> None:
    features = torch.ones(2, 4, 3, device=DEVICE)
    features[0, 2] = features[0, 0] = features[1] = torch.nan
    features.requires_grad_()
    index = torch.tensor([[1, -1], [-1, -1]], device=DEVICE)
    slot = torch.tensor([[-1, 1, -1, 0], [-1, -1, -1, -1]], device=DEVICE)
    weight = torch.full((2, 4), 0.5, device=DEVICE).requires_grad_()
    merged = gather_merge(features, index, slot, weight, impl=impl)
    assert merged.tolist() == [[[1.5] * 3, [0.5] * 3], [[0.0] * 3, [0.0] * 3]]
    merged.sum().backward()
    assert features.grad[..., 0].tolist() == [[0.0, 1.5, 0.0, 0.5], [0.0] * 4]  # type: ignore[index]
    assert weight.grad.tolist() == [[0.0, 3.0, 0.0, 3.0], [0.0] * 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("impl", IMPLS)
def test_long_sums_keep_their_digits_in_half_precision(impl: Impl) -> None:
    """Of ones, bfloat16 would stop at 256."""
    features = torch.ones(1, 600, 1, dtype=torch.bfloat16, device=DEVICE)
    slot, weight = torch.zeros(1, 600, dtype=torch.long, device=DEVICE), torch.ones(1, 600, device=DEVICE)
    merged = gather_merge(features, torch.tensor([[-1]], device=DEVICE), slot, weight, impl=impl)
    assert merged.item() == 600.0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_at_all(impl: Impl) -> None:
    nothing = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
    features = torch.zeros(2, 0, 3, device=DEVICE, requires_grad=True)
    index = torch.full((2, 4), -1, device=DEVICE)
    merged = gather_merge(features, index, nothing, torch.zeros(2, 0, device=DEVICE), impl=impl)
    assert torch.equal(merged, torch.zeros(2, 4, 3, device=DEVICE))
    merged.sum().backward()
    some = torch.ones(2, 3, 3, device=DEVICE)
    merged = gather_merge(some, nothing, torch.full((2, 3), -1, device=DEVICE), some[..., 0], impl=impl)
    assert merged.shape == (2, 0, 3)


def test_what_does_not_fit_is_named() -> None:
    features, index = torch.ones(2, 4, 3), torch.zeros(2, 2, dtype=torch.long)
    slot, weight = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4)
    for name, arguments in {
        "features": (features[0], index, slot, weight),
        "index": (features, index[0], slot, weight),
        "slot": (features, index, slot[:, :3], weight),
        "weight": (features, index, slot, weight[:, :3]),
        "source": (features, index, slot, weight, slot[:1]),
        "own": (features, index, slot, weight, slot, weight),
    }.items():
        with pytest.raises(InputError, match=f"^{name} has shape"):
            gather_merge(*arguments)
    for name, arguments in {
        "index holds 4; expected -1 .none. or 0 to 3": (features, index + 4, slot, weight),
        "index holds -2": (features, index - 2, slot, weight),
        "slot holds 2; expected -1 .none. or 0 to 1": (features, index, slot + 2, weight),
        "source holds 4": (features, index, slot, weight, slot + 4),
    }.items():
        with pytest.raises(InputError, match=f"^{name}"):
            gather_merge(*arguments)


def test_cost_counts_each_row_once() -> None:
    inputs = {
        "features": torch.ones(1, 5, 7, dtype=torch.float16),
        "index": torch.tensor([[0, -1]]),
        "slot": torch.tensor([[0, 1, -1]]),
        "weight": torch.ones(1, 3),
        "source": torch.tensor([[0, 3, 4]]),
    }
    cost = OPERATION.cost(inputs, (gather_merge(**inputs),))
    assert cost.flops == 2 * 7 * 3  # of index 0, and two of the three addends
    assert cost.bytes == 2 * 7 * 2 + 2 * 7 * 2 + 2 * 8 + 3 * 8 + 3 * 4 + 3 * 8  # rows 0 and 3
