"""STC-Cacher: which frames are references, how many patches the others compute, and which."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken import MMTokenError
from mmtoken.compressors import Context, Schedule, Sequential, STCCacher, VisionZip
from mmtoken.compressors.dycoke import DyCoke
from mmtoken.compressors.stccacher import key_similarity, least_similar


def memory() -> Context:
    context = Context()
    context.memory, context.learned, context.original_counts = {}, None, []
    return context


def slow_similarity(a: list[float], b: list[float], measure: str) -> float:
    """Higher is more alike, in plain numbers."""
    if measure == "l1":
        return -sum(abs(x - y) for x, y in zip(a, b, strict=True))
    if measure == "l2":
        return -math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    if measure == "dot":
        return dot
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize(
    ("patches", "keep", "wanted"),
    [
        (729, 0.25, 182),
        (577, 0.25, 144),
        (257, 0.25, 64),
        (729, 0.15, 109),
        (729, 1.0, 729),
        (3, 0.1, 1),
        (7, 0.99, 6),  # rounded down
        (729, 64, 64),
        (16, 64, 16),
        (16, 1, 1),
    ],
)
def test_the_number_of_patches_is_that_of_the_official_code(patches: int, keep: float, wanted: int) -> None:
    assert STCCacher(keep=keep).refresh_count(patches) == wanted


@given(patches=st.integers(1, 2000), keep=st.floats(0.001, 1.0))
def test_at_least_one_patch_and_at_most_all_are_computed(patches: int, keep: float) -> None:
    count = STCCacher(keep=keep).refresh_count(patches)
    assert count == min(max(math.floor(patches * keep), 1), patches)


@pytest.mark.parametrize(
    ("interval", "chunk", "wanted"),
    [
        (4, 1, [0, 4, 8]),
        (2, 1, [0, 2, 4, 6, 8]),
        (1, 1, list(range(9))),
        (100, 1, [0]),
        (2, 3, [0, 1, 2, 6, 7, 8]),
        (3, 2, [0, 1, 6, 7]),
    ],
)
def test_every_so_many_chunks_one_is_computed_in_full(interval: int, chunk: int, wanted: list[int]) -> None:
    method = STCCacher(interval=interval, chunk=chunk)
    assert [number for number in range(9) if method.references(number)] == wanted


@settings(deadline=None, max_examples=60)
@given(
    frames=st.integers(1, 3),
    patches=st.integers(1, 12),
    keep=st.one_of(st.integers(1, 12), st.floats(0.01, 1.0)),
    measure=st.sampled_from(["cosine", "dot", "l1", "l2"]),
    seed=st.integers(0, 999),
)
def test_the_least_similar_keys_are_chosen(frames: int, patches: int, keep: float, measure: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, reference = torch.randn(2, frames, patches, 5, generator=generator)
    method = STCCacher(keep=keep, similarity=measure)  # type: ignore[arg-type]
    got = method.refresh(keys, reference, 0, memory())
    assert got.dtype == torch.long and tuple(got.shape) == (frames, method.refresh_count(patches))
    for frame in range(frames):
        close = [
            slow_similarity(a, b, measure) for a, b in zip(keys[frame].tolist(), reference[frame].tolist(), strict=True)
        ]
        order = sorted(range(patches), key=lambda place: (close[place], place))
        assert got[frame].tolist() == sorted(order[: method.refresh_count(patches)])
        alone = method.refresh(keys[frame : frame + 1], reference[frame : frame + 1], 0, memory())
        assert torch.equal(alone[0], got[frame])


def test_ties_go_to_the_lower_index() -> None:
    keys = torch.ones(1, 6, 4)
    assert least_similar(keys, keys, 3).tolist() == [[0, 1, 2]]


def test_whole_keys_are_compared_and_no_part_of_them() -> None:
    """The first half of patch 1 and the second half of patch 2 are as in the reference; patch 2 changed more."""
    reference = torch.tensor([[[1.0, 0.0, 1.0, 0.0]] * 3])
    keys = reference.clone()
    keys[0, 1] = torch.tensor([1.0, 0.0, 0.9, 0.1])
    keys[0, 2] = torch.tensor([-1.0, 0.0, 1.0, 0.0])
    assert least_similar(keys, reference, 1).tolist() == [[2]]
    assert least_similar(keys, reference, 2).tolist() == [[1, 2]]


def test_the_length_of_a_key_counts_for_distances_only() -> None:
    reference = torch.eye(4)[None] + 0.5
    keys = reference.clone()
    keys[0, 3] *= 3.0
    close = key_similarity(keys, reference)
    torch.testing.assert_close(close, torch.ones(1, 4))
    for measure in ("l1", "l2"):
        assert least_similar(keys, reference, 1, measure).tolist() == [[3]]  # type: ignore[arg-type]
    assert least_similar(keys, reference, 3, "dot").tolist() == [[0, 1, 2]]


def test_shared_selection_takes_over_the_choice_of_the_first_block() -> None:
    keys, reference = torch.randn(2, 5, 2, 9, 4, generator=torch.Generator().manual_seed(3))
    context, alone = memory(), memory()
    shared = [
        STCCacher(share_selection=True).refresh(k, r, block, context)
        for block, (k, r) in enumerate(zip(keys, reference, strict=True))
    ]
    apart = [STCCacher().refresh(k, r, block, alone) for block, (k, r) in enumerate(zip(keys, reference, strict=True))]
    assert all(torch.equal(chosen, shared[0]) for chosen in shared)
    assert torch.equal(apart[0], shared[0]) and not all(torch.equal(chosen, apart[0]) for chosen in apart)
    again = STCCacher(share_selection=True).refresh(keys[1], reference[1], 0, context)
    assert torch.equal(again, apart[1])  # the next frames begin at the first block


def test_a_key_that_is_no_number_is_computed_anew() -> None:
    keys = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    reference = keys.clone()
    keys[0, 4, 2] = math.nan
    reference[0, 1, 0] = math.inf
    assert least_similar(keys, reference, 2).tolist() == [[1, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    keys, reference = torch.randn(2, 2, 9, 64, generator=torch.Generator().manual_seed(5)).to(dtype) * 50
    got = key_similarity(keys, reference, "dot")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (keys.double() * reference.double()).sum(-1).float(), rtol=1e-5, atol=1e-2)


def test_choosing_leaves_no_gradient_behind() -> None:
    keys = torch.randn(1, 4, 3, requires_grad=True)
    assert not key_similarity(keys, torch.randn(1, 4, 3)).requires_grad


def test_a_composition_hands_the_decisions_to_its_part() -> None:
    method = Sequential(parts=(STCCacher(keep=2, interval=3), DyCoke()))
    keys, reference = torch.randn(2, 1, 8, 4, generator=torch.Generator().manual_seed(2))
    alone = STCCacher(keep=2).refresh(keys, reference, 0, memory())
    assert torch.equal(method.refresh(keys, reference, 0, memory()), alone)
    assert method.refresh_count(9) == 2 and [method.references(n) for n in range(4)] == [True, False, False, True]
    assert method.encoder_keep() == 1.0 and method.budget == "adaptive"
    with pytest.raises(MMTokenError, match="both act inside tower blocks"):
        Sequential(parts=(STCCacher(), STCCacher()))


def test_a_schedule_has_no_budget_for_it() -> None:
    with pytest.raises(MMTokenError, match=r"STCCacher leaves every token.*use Sequential"):
        Schedule(keep=0.3, parts=(STCCacher(), VisionZip()))
