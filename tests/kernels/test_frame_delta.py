"""`frame_delta` against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.errors import InputError
from mmtoken.kernels.dispatch import Impl
from mmtoken.kernels.frame_delta import frame_delta
from mmtoken.kernels.frame_delta.cases import in_single_steps

IMPLS: list[Impl] = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_loops(new: list[float], old: list[float], similarity: str) -> float:
    if similarity == "l1":
        return -sum(abs(a - b) for a, b in zip(new, old, strict=True))
    if similarity == "l2":
        return -math.dist(new, old)
    product = sum(a * b for a, b in zip(new, old, strict=True))
    return product if similarity == "dot" else product / (math.hypot(*new) * math.hypot(*old))


@settings(deadline=None, max_examples=40)
@given(
    frames=st.integers(1, 3),
    patches=st.integers(1, 5),
    width=st.sampled_from([1, 3, 300]),
    similarity=st.sampled_from(["cosine", "dot", "l1", "l2"]),
    seed=st.integers(0, 999),
    impl=st.sampled_from(IMPLS),
)
def test_scores_are_those_of_plain_loops(
    frames: int, patches: int, width: int, similarity: str, seed: int, impl: Impl
) -> None:
    keys, anchor = torch.randn(2, frames, patches, width, generator=torch.Generator().manual_seed(seed)) + 0.1
    wanted = torch.tensor(
        [
            [in_loops(new, old, similarity) for new, old in zip(*pair, strict=True)]
            for pair in zip(keys.tolist(), anchor.tolist(), strict=True)
        ]
    )
    for function in (lambda *args: frame_delta(*args, impl=impl), in_single_steps):
        got = function(keys.to(DEVICE), anchor.to(DEVICE), similarity)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_reference_may_serve_all_frames(impl: Impl) -> None:
    keys = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expanded = keys[:1].expand(3, -1, -1)
    assert torch.equal(frame_delta(keys, expanded, impl=impl), frame_delta(keys, expanded.contiguous(), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_keys_and_keys_that_are_no_numbers(impl: Impl) -> None:
    keys = torch.tensor([[[0.0, 0.0], [math.nan, 1.0], [1.0, 1.0], [2.0, 0.0]]], device=DEVICE)
    anchor = torch.tensor([[[1.0, 2.0], [1.0, 1.0], [math.inf, 1.0], [3.0, 0.0]]], device=DEVICE)
    zero, nan, inf, same = frame_delta(keys, anchor, impl=impl)[0].tolist()
    assert zero == 0.0 and math.isnan(nan) and math.isnan(inf) and same == 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_reaches_the_keys(impl: Impl) -> None:
    keys = torch.randn(1, 4, 3, device=DEVICE, requires_grad=True)
    assert not frame_delta(keys, keys, impl=impl).requires_grad


def test_what_does_not_fit_is_named() -> None:
    keys = torch.ones(1, 4, 3)
    with pytest.raises(InputError, match=r"keys and anchor have shapes \[1, 4, 3\] and \[1, 3, 3\]"):
        frame_delta(keys, keys[:, :3])
    with pytest.raises(InputError, match="similarity='cos' is unknown"):
        frame_delta(keys, keys, "cos")  # type: ignore[arg-type]
