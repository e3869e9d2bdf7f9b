"""Paired, interleaved timing: every variant is measured in every round, so slow drifts hit all of them alike.

On a CPU the clock is the CPU time of the process with one thread, for wall time on a shared machine measures its
neighbours. On a GPU it is the time between two CUDA events, synchronised, and the wall time beside it.
Speed-ups are ratios taken within a round (pairs) and then summarised; a ratio of two medians would mix rounds.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmtoken.errors import MMTokenError

Clock = Callable[[], float]
"""Seconds since some fixed moment."""

MIN_ROUNDS = 7
"""Fewest rounds of a figure that is published."""


class Stopwatch:
    """Measures the stages of one run of one variant.

    Args:
        clock: seconds; process CPU time by default.
        device: with a CUDA device, stages are timed by events and `<stage>_wall` is added.
    """

    def __init__(self, clock: Clock = time.process_time, device: torch.device | None = None) -> None:
        self.clock = clock
        self.device = device if device is not None and device.type == "cuda" else None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        if self.device is None:
            started = self.clock()
            yield
            self.add(name, self.clock() - started)
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter()
        first.record()
        yield
        last.record()
        torch.cuda.synchronize(self.device)
        self.add(name, first.elapsed_time(last) / 1e3)
        self.add(f"{name}_wall", time.perf_counter() - wall)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


Variant = Callable[[Stopwatch], object]
Timings = dict[str, dict[str, list[float]]]
"""variant -> stage -> seconds per round; the i-th entries of all variants belong to the same round."""


def interleave(
    variants: Mapping[str, Variant],
    rounds: int = MIN_ROUNDS,
    *,
    warmup: int = 1,
    stopwatch: Callable[[], Stopwatch] = Stopwatch,
    progress: Callable[[str], None] = lambda line: None,
) -> Timings:
    """Run every variant once per round, each round starting with another one.

    Args:
        variants: name -> function that runs it and measures its stages with the stopwatch it is given.
        rounds: measured rounds.
        warmup: rounds before them that are thrown away.
        stopwatch: makes the stopwatch of one run.
        progress: told about every round.

    Raises:
        MMTokenError: rounds below 1, or a variant measured other stages in another round.
    """
    if rounds < 1:
        raise MMTokenError(f"rounds={rounds}; at least 1 round is needed, {MIN_ROUNDS} for a figure to publish.")
    names = list(variants)
    timings: Timings = {name: {} for name in names}
    for number in range(-warmup, rounds):
        start = number % len(names) if names else 0
        for name in names[start:] + names[:start]:
            watch = stopwatch()
            variants[name](watch)
            if number < 0:
                continue
            stages = timings[name]
            if number and stages.keys() != watch.seconds.keys():
                raise MMTokenError(f"{name} measured {sorted(watch.seconds)} in one round and {sorted(stages)} before.")
            for stage, seconds in watch.seconds.items():
                stages.setdefault(stage, []).append(seconds)
        progress(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up")
    return timings


@dataclass(frozen=True)
class Summary:
    """Median and spread of a series."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Quartiles by linear interpolation (`statistics.quantiles`, inclusive)."""
        if not values:
            raise MMTokenError("values is empty; nothing was measured.")
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median, q1, q3, min(values), max(values), len(values))

    def to_dict(self, scale: float = 1.0, digits: int = 4) -> dict[str, float | int]:
        """JSON-ready, values times `scale`."""
        values = asdict(self)
        count = values.pop("count")
        return {**{name: round(value * scale, digits) for name, value in values.items()}, "count": count}


def paired(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """`base / other` per round: how many times faster `other` is than `base`."""
    return [b / o for b, o in zip(base, other, strict=True)]


def differences(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """`other - base` per round."""
    return [o - b for b, o in zip(base, other, strict=True)]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One torch thread on CPUs, so that process CPU time is what one core needs; nothing changes on GPUs."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device) -> dict[str, Any]:
    """Device name, clock and versions, to stand beside every figure."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU: {_cpu_name()}",
        "clock": "CUDA events, synchronised" if cuda else "process CPU time, one thread",
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("mmtoken", "torch", "transformers")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
