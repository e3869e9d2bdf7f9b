"""Memory of scoring grows with the tokens, not with their pairs.

Peaks are live bytes from the memory events of torch.profiler, so scratch buffers inside operators count, and what was
there before does not.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.compressors.batches import SETTINGS, act, make

SIZES = (1024, 4096, 16384)
STEEPEST = 1.15
"""Largest exponent of growth: 1 is proportional to the tokens, 2 to their pairs."""

ROWS = [name for name, method in SETTINGS.items() if method.cost == "rows"]
PAIRS = [name for name, method in SETTINGS.items() if method.cost == "pairs"]


class Memory(NamedTuple):
    """Bytes: the most that were alive at once, and the largest single allocation."""

    peak: int
    largest: int


def measure(run: Callable[[], object], folder: Path) -> Memory:
    """What a run allocates on the CPU; its result is still alive at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    file = folder / "trace.json"
    profiler.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["args"]["Ev Idx"])]
    assert result is not None
    return Memory(max(itertools.accumulate(changes), default=1), max(changes, default=1))


def slope(values: Sequence[int], sizes: Sequence[int] = SIZES) -> float:
    """Least-squares exponent of growth over sizes."""
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def grown(name: str, folder: Path) -> list[Memory]:
    """What the sites of a compressor allocate for one item of each size."""
    found = []
    for size in SIZES:
        tokens, context = make([size], width=4)
        with torch.no_grad():
            found.append(measure(lambda: act(SETTINGS[name], tokens, context), folder))  # noqa: B023
    return found


def test_every_compressor_is_measured() -> None:
    assert {*ROWS, *PAIRS} == set(SETTINGS)


@pytest.mark.parametrize("name", ROWS)
def test_the_peak_of_scoring_grows_with_the_tokens(name: str, tmp_path: Path) -> None:
    found = grown(name, tmp_path)
    assert slope([memory.peak for memory in found]) <= STEEPEST, found


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_taken_in_tiles(name: str, tmp_path: Path) -> None:
    found = grown(name, tmp_path)
    # Below the size of a tile all pairs of few tokens may be one; from there on nothing grows like pairs.
    for kind in zip(*found[1:], strict=True):
        assert slope(list(kind), SIZES[1:]) <= STEEPEST, found
    assert found[-1].largest < SIZES[-1] ** 2 // 4, found


def test_the_measure_sees_what_grows_with_pairs_and_what_does_not(tmp_path: Path) -> None:
    def linear(size: int) -> torch.Tensor:
        values = torch.ones(size, 4)
        for start in range(0, size, 256):
            values[start : start + 256] += (values[start : start + 256] @ values.T).amax(-1, keepdim=True)
        return values

    def square(size: int) -> torch.Tensor:
        values = torch.ones(size, 4)
        return (values @ values.T).amax(-1)

    sizes = [size // 4 for size in SIZES]
    one, other = ([measure(lambda: run(size), tmp_path) for size in sizes] for run in (linear, square))  # noqa: B023
    assert slope([memory.peak for memory in one]) <= 1.05 and slope([memory.largest for memory in one]) <= 1.05
    assert slope([memory.peak for memory in other]) >= 1.8 and other[-1].largest == sizes[-1] ** 2 * 4
    assert all(memory.peak >= 256 * size * 4 for memory, size in zip(one, sizes, strict=True))
