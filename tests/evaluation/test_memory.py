"""The live peak against allocations whose size is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtoken.evaluation.memory import LivePeak, peak_bytes

CPU = torch.device("cpu")
KIB = 256  # float32 values


def test_tensors_count_while_they_live() -> None:
    with LivePeak() as counter:
        a = torch.zeros(4 * KIB)
        assert (counter.live, counter.peak) == (4096, 4096)
        b = torch.ones(2 * KIB)
        assert (counter.live, counter.peak) == (6144, 6144)
        del a
        assert (counter.live, counter.peak) == (2048, 6144)
        a = torch.zeros(KIB)
        assert (counter.live, counter.peak) == (3072, 6144)
        del a, b
    assert (counter.live, counter.peak) == (0, 6144)


def test_a_peak_comes_from_what_lives_at_the_same_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(KIB)

    def together() -> list[Tensor]:
        return [torch.zeros(KIB) for _ in range(5)]

    assert peak_bytes(one_after_the_other, CPU) == 1024
    assert peak_bytes(together, CPU) == 5 * 1024


def test_intermediate_results_count() -> None:
    x = torch.ones(KIB)
    # x + 1 lives while it is doubled; the result of the doubling lives beside it.
    assert peak_bytes(lambda: (x + 1) * 2, CPU) == 2 * 1024


def test_views_and_changes_in_place_cost_nothing() -> None:
    def run() -> None:
        x = torch.zeros(4, KIB)
        views = [x[0], x.T, x.reshape(-1), x.view(2, -1), x.detach(), *x.chunk(2), x.expand(3, 4, KIB)]
        x.add_(1)
        torch.mul(x, 2, out=x)
        assert len(views) == 8

    assert peak_bytes(run, CPU) == 4 * 1024


def test_what_was_there_before_does_not_count() -> None:
    weights = nn.Linear(64, 32, bias=False)
    x = torch.ones(8, 64)
    with torch.no_grad():
        assert peak_bytes(lambda: weights(x), CPU) == 8 * 32 * 4


def test_small_types_count_by_their_bytes() -> None:
    assert peak_bytes(lambda: torch.zeros(1000, dtype=torch.uint8), CPU) == 1000
    assert peak_bytes(lambda: torch.zeros(1000, dtype=torch.bfloat16), CPU) == 2000


def test_two_runs_with_one_counter_do_not_mix_reused_addresses() -> None:
    with LivePeak() as counter:
        for _ in range(20):
            torch.zeros(KIB)
        kept = [torch.zeros(KIB) for _ in range(3)]
    assert counter.live == 3 * 1024 == counter.peak
    kept.clear()
    assert counter.live == 0
