"""ReKV's choice of blocks against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.compressors import ReKV
from mmtoken.compressors.base import Context
from mmtoken.compressors.rekv import best_chunks, block_scores
from mmtoken.errors import InputError, MMTokenError


def scores_by_loop(blocks: torch.Tensor, queries: torch.Tensor) -> list[float]:
    """Key heads repeated to the query heads, everything flattened, a plain dot product."""
    share = queries.shape[0] // blocks.shape[1]
    mean = [sum(head[i].double() for i in range(head.shape[0])) / head.shape[0] for head in queries]
    return [sum(float(block[h // share].double() @ mean[h]) for h in range(len(queries))) for block in blocks]


def best_by_loop(scores: list[float], count: int, chunk: int) -> list[int]:
    if len(scores) <= count:
        return list(range(len(scores)))
    chunks = [list(range(first, min(first + chunk, len(scores)))) for first in range(0, len(scores), chunk)]
    means = [sum(scores[i] for i in members) / len(members) for members in chunks]
    order = sorted(range(len(chunks)), key=lambda number: (-means[number], number))
    return sorted(i for number in order[: max(1, count // chunk)] for i in chunks[number])


def test_worked_example() -> None:
    keys = [((1, 0), (3, 0)), ((0, 1), (0, 1)), ((2, 2), (0, 2)), ((-1, 0), (-1, 0))]
    blocks = torch.tensor(keys).float().mean(1)[:, None]
    queries = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])
    assert block_scores(blocks, queries).tolist() == [2.0, 1.0, 3.0, -1.0]
    assert ReKV(keep=2).retrieve(blocks, queries, 0, Context()).tolist() == [0, 2]
    assert ReKV(keep=2, chunk=2).retrieve(blocks, queries, 0, Context()).tolist() == [0, 1]
    assert ReKV(keep=4).retrieve(blocks, queries, 0, Context()).tolist() == [0, 1, 2, 3]
    assert ReKV(keep=0.5).retrieve(blocks, queries, 0, Context()).tolist() == [0, 2]


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 12), groups=st.integers(1, 3), share=st.integers(1, 3), length=st.integers(1, 4),
    chunk=st.integers(1, 4), keep=st.one_of(st.integers(1, 4), st.floats(0.05, 1.0)), seed=st.integers(0, 999),
)  # fmt: skip
def test_it_is_the_plain_loop(
    total: int, groups: int, share: int, length: int, chunk: int, keep: int | float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(total, groups, 4, generator=generator)
    queries = torch.randn(groups * share, length, 4, generator=generator)
    expected = scores_by_loop(blocks, queries)
    torch.testing.assert_close(
        block_scores(blocks, queries).double(), torch.tensor(expected).double(), atol=1e-4, rtol=0
    )
    keep = keep * chunk if isinstance(keep, int) else keep
    count = min(total, keep) if isinstance(keep, int) else max(1, int(keep * total + 0.5))
    chosen = ReKV(keep=keep, chunk=chunk).retrieve(blocks, queries, 0, Context())
    assert chosen.tolist() == best_by_loop(expected, count, chunk)
    assert len(chosen) <= max(count, chunk) and chosen.tolist() == sorted(set(chosen.tolist()))


def test_ties_go_to_the_earlier_chunk() -> None:
    assert best_chunks(torch.zeros(6), 2, 1).tolist() == [0, 1]
    assert best_chunks(torch.tensor([0.0, 1.0, 1.0, 0.0, 5.0]), 2, 2).tolist() == [4]


def test_half_precision_and_no_blocks() -> None:
    assert block_scores(torch.ones(3, 1, 2).bfloat16(), torch.ones(1, 1, 2).half()).dtype == torch.float32
    assert ReKV(keep=2).retrieve(torch.zeros(0, 1, 2), torch.ones(1, 1, 2), 0, Context()).tolist() == []


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match="block scores contains NaN"):
        ReKV(keep=1).retrieve(torch.full((3, 1, 2), torch.nan), torch.ones(1, 1, 2), 0, Context())


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"chunk": 0}, "chunk=0 is too small"),
        ({"chunk": True}, "chunk=True is a bool"),
        ({"keep": 3, "chunk": 2}, "chunk=2 does not divide keep=3"),
        ({"window": 1}, "window=1 is no bool"),
    ],
)
def test_settings(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MMTokenError, match=message):
        ReKV(**given_settings)


def test_what_a_question_sees_besides() -> None:
    assert not ReKV().sees_window() and ReKV(window=True).sees_window()
