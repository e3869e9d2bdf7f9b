"""Interleaved rounds, pairs and summaries, with a clock that the tests turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
import transformers

from mmtoken.errors import MMTokenError
from mmtoken.evaluation.timing import (
    Stopwatch,
    Summary,
    differences,
    environment,
    interleave,
    one_thread,
    paired,
)


class FakeClock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_a_stopwatch_adds_up_what_is_spent_inside_a_stage(clock: FakeClock) -> None:
    watch = Stopwatch(clock)
    with watch.stage("prefill"):
        clock.now += 2
    clock.now += 50
    with watch.stage("prefill"):
        clock.now += 3
    with watch.stage("decode"):
        clock.now += 7
    watch.add("scoring", 0.5)
    watch.add("scoring", 0.25)
    assert watch.seconds == {"prefill": 5, "decode": 7, "scoring": 0.75}


def variant(name: str, clock: FakeClock, seconds: float, order: list[str]) -> Callable[[Stopwatch], None]:
    """Takes `seconds` times the number of variants that ran so far."""

    def run(watch: Stopwatch) -> None:
        order.append(name)
        with watch.stage("whole"):
            clock.now += seconds * len(order)

    return run


def test_every_variant_runs_once_per_round_and_rounds_begin_with_another_one(clock: FakeClock) -> None:
    order: list[str] = []
    variants = {name: variant(name, clock, 1.0, order) for name in "abc"}
    lines: list[str] = []
    timings = interleave(variants, 3, stopwatch=lambda: Stopwatch(clock), progress=lines.append)
    assert ["".join(order[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    # The warm-up took 1 to 3 and is gone; entry i of every variant belongs to round i.
    assert timings == {"a": {"whole": [4, 9, 11]}, "b": {"whole": [5, 7, 12]}, "c": {"whole": [6, 8, 10]}}
    assert lines == ["warm-up", "round 1 of 3", "round 2 of 3", "round 3 of 3"]


def test_warm_up_rounds_are_thrown_away(clock: FakeClock) -> None:
    order: list[str] = []
    variants = {"a": variant("a", clock, 1.0, order)}
    assert interleave(variants, 2, warmup=3, stopwatch=lambda: Stopwatch(clock)) == {"a": {"whole": [4, 5]}}
    order.clear()
    assert interleave(variants, 2, warmup=0, stopwatch=lambda: Stopwatch(clock)) == {"a": {"whole": [1, 2]}}


@pytest.mark.parametrize("rounds", [0, -1])
def test_too_few_rounds_are_refused_before_anything_runs(clock: FakeClock, rounds: int) -> None:
    order: list[str] = []
    with pytest.raises(MMTokenError, match=f"rounds={rounds}; at least 1"):
        interleave({"a": variant("a", clock, 1.0, order)}, rounds)
    assert not order


def test_a_variant_that_measures_other_stages_in_another_round_is_refused() -> None:
    runs: list[int] = []

    def run(watch: Stopwatch) -> None:
        runs.append(0)
        watch.add("prefill", 1.0)
        if len(runs) > 2:
            watch.add("scoring", 1.0)

    with pytest.raises(MMTokenError, match=r"odd measured \['prefill', 'scoring'\] in one round"):
        interleave({"odd": run}, 3)


def test_speed_ups_are_taken_within_a_round() -> None:
    """The machine became ten times slower in the second round: the ratio does not move."""
    dense, other = [4.0, 40.0, 4.0], [2.0, 20.0, 1.0]
    assert paired(dense, other) == [2.0, 2.0, 4.0]
    assert differences(dense, other) == [-2.0, -20.0, -3.0]
    assert Summary.of(paired(dense, other)).median == 2.0


@pytest.mark.parametrize("pair", [paired, differences])
def test_rounds_without_a_partner_are_refused(pair: Callable[[list[float], list[float]], list[float]]) -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair([1.0, 2.0], [1.0])


def test_a_summary_holds_median_quartiles_and_ends() -> None:
    assert Summary.of([5, 1, 4, 2, 3]) == Summary(median=3, q1=2, q3=4, low=1, high=5, count=5)
    assert Summary.of([1, 2]) == Summary(median=1.5, q1=1.25, q3=1.75, low=1, high=2, count=2)
    assert Summary.of([7.0]) == Summary(7, 7, 7, 7, 7, 1)
    with pytest.raises(MMTokenError, match="values is empty"):
        Summary.of([])


def test_a_summary_as_data_is_scaled_but_its_count_is_not() -> None:
    summary = Summary.of([0.001, 0.002, 0.00312345])
    data = summary.to_dict(1e3)
    assert data == {"median": 2.0, "q1": 1.5, "q3": 2.5617, "low": 1.0, "high": 3.1235, "count": 3}
    assert data.keys() == asdict(summary).keys()
    assert summary.to_dict(digits=3)["high"] == 0.003


def test_one_thread_on_a_cpu_and_the_old_number_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), one_thread(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
        with one_thread(torch.device("cuda")):  # nothing changes beside a GPU
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_environment_names_device_clock_and_versions() -> None:
    found = environment(torch.device("cpu"))
    assert found["device"].startswith("CPU: ") and len(found["device"]) > len("CPU: ")
    assert found["clock"] == "process CPU time, one thread"
    assert set(found["versions"]) == {"mmtoken", "torch", "transformers"}
    assert found["versions"]["transformers"] == transformers.__version__
    assert json.loads(json.dumps(found)) == found
