"""Whether a stream's memory and time per frame stay constant: thousands of frames through a random network.

    python -m mmtoken.evaluation.stream_endurance --frames 10000 --out benchmarks/stream.json
    python -m mmtoken.evaluation.stream_endurance --speed --device cuda --out stream_speed.json

The first form notes resident memory and CPU time of every frame and puts a table (.md) and a figure (.png) beside the
JSON. Other work on the machine makes CPU time drift, too; so beside every frame a fixed piece of work is timed (the
same tower and decoder on one frame that never changes), and what must not drift is the ratio of the two.

The second compares frames per second, time to the first token and bytes held, dense and compressed, on a network of the
shape of LLaVA-OneVision-0.5B. Nothing here says anything about accuracy.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import settings_of
from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation.pictures import check_matplotlib
from mmtoken.evaluation.stream_models import (
    HALF_BILLION,
    TINY,
    StreamShape,
    random_frames,
    random_stream_model,
)
from mmtoken.evaluation.timing import environment
from mmtoken.streaming.stream import Stream, stream
from mmtoken.wholefile import check_target, whole_file

SCHEMA_VERSION = 1

QUESTION = "what happens now?"

WINDOW = 100
"""Frames over which a median is taken."""

LIMIT = 1.0
"""Percent per 1,000 frames that memory and time may drift."""


@dataclass(frozen=True)
class Trace:
    """What was noted of a run, per frame.

    Attributes:
        method: who decided what is held.
        limit: most rows that may be held.
        rss: float64[F], bytes of resident memory after each frame.
        seconds: float64[F], CPU time of each push.
        fixed: float64[F], CPU time of the fixed work beside each push.
        rows: int64[F], rows held after each frame.
        ttft_ms: of every question.
    """

    method: str
    limit: int
    rss: np.ndarray[Any, Any]
    seconds: np.ndarray[Any, Any]
    fixed: np.ndarray[Any, Any]
    rows: np.ndarray[Any, Any]
    ttft_ms: list[float]


def watch(
    method: Compressor | None, frames: int, *, shape: StreamShape | None = None, every: int = 500, seed: int = 0
) -> Trace:
    """Push frames through a random network, ask every `every` frames, and note what each costs."""
    if frames < 1 or every < 1:
        raise InputError(f"frames={frames}, every={every}: both must be at least 1.")
    shape = shape or TINY
    model, processor = random_stream_model(shape, torch.device("cpu"), seed=seed)
    # Filled, not only reserved: what is noted must not itself count as growth.
    rss, seconds, fixed, rows = (np.ones(frames, dtype) for dtype in (float, float, float, np.int64))
    work = _fixed_work(model, shape)
    ttft: list[float] = []
    with stream(model, processor, method) as live:
        for number, frame in enumerate(random_frames(shape.image, frames, seed)):
            started = time.process_time()
            live.push(frame, number / 10)
            pushed = time.process_time()
            work()
            seconds[number], fixed[number] = pushed - started, time.process_time() - pushed
            rows[number] = live.report.kv_tokens
            if (number + 1) % every == 0:
                live.ask(QUESTION, max_new_tokens=4)
                ttft.append(live.report.ttft_ms or 0.0)
            rss[number] = resident_bytes()
        limit = live.memory_tokens or 0
    return Trace("dense" if method is None else type(method).__name__, limit, rss, seconds, fixed, rows, ttft)


def _fixed_work(model: Any, shape: StreamShape) -> Callable[[], object]:
    """One frame through tower and decoder, always the same, behind nothing."""
    pixels = torch.zeros(1, 1, 3, shape.image, shape.image)

    @torch.no_grad()
    def work() -> object:
        features = model.model.get_video_features(pixel_values_videos=pixels, return_dict=True).pooler_output
        return model.model.language_model(inputs_embeds=features)

    return work


def resident_bytes() -> int:
    """Resident memory of this process.

    Raises:
        MMTokenError: this system does not tell.
    """
    path = Path("/proc/self/statm")
    if not path.exists():
        raise MMTokenError("/proc/self/statm does not exist, so resident memory cannot be read; run this on Linux.")
    return int(path.read_text().split()[1]) * 4096


def drift(
    values: np.ndarray[Any, Any], first: int, window: int = WINDOW, beside: np.ndarray[Any, Any] | None = None
) -> float:
    """Percent per 1,000 frames by which values rise from frame `first` on, or their ratio to the values `beside` them.

    Medians over windows of frames, and the Theil-Sen slope through them (the median of the slopes of all pairs), over
    the median of the medians: neither a slow moment nor a collection of garbage moves it.

    Raises:
        InputError: fewer than two windows are left.
    """
    count = (len(values) - first) // window
    if count < 2:
        raise InputError(
            f"{len(values)} frames leave {count} windows of {window} behind frame {first}; two at least are needed."
        )

    def medians_of(some: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.median(some[first : first + count * window].reshape(count, window), axis=1)
        return found

    medians = medians_of(values) if beside is None else medians_of(values) / medians_of(beside)
    before, after = np.triu_indices(count, 1)
    slope = float(np.median((medians[after] - medians[before]) / ((after - before) * window)))
    return 100 * 1000 * slope / float(np.median(medians))


def summary(trace: Trace) -> dict[str, Any]:
    """Figures of a run, JSON-ready; the first fifth of the frames does not count for drifts."""
    frames = len(trace.rss)
    first = frames // 5
    window = min(WINDOW, max(1, (frames - first) // 8))
    bound = bool((trace.rows <= trace.limit).all())
    rss, seconds = drift(trace.rss, first, window), drift(trace.seconds, first, window)
    ratio = drift(trace.seconds, first, window, trace.fixed)
    return {
        "method": trace.method,
        "frames": frames,
        "memory_tokens": trace.limit,
        "most_rows_held": int(trace.rows.max()),
        "bound_held_at_every_frame": bound,
        "first_frame_of_drifts": first,
        "frames_per_window": window,
        "rss_mib": {"after_first_fifth": _mib(trace.rss[first]), "at_the_end": _mib(trace.rss[-1])},
        "rss_percent_per_1000_frames": round(rss, 4),
        "cpu_ms_per_frame": {
            "median": round(1000 * float(np.median(trace.seconds[first:])), 4),
            "first_window": round(1000 * float(np.median(trace.seconds[first : first + window])), 4),
            "last_window": round(1000 * float(np.median(trace.seconds[-window:])), 4),
        },
        "cpu_percent_per_1000_frames": round(ratio, 4),
        "cpu_percent_per_1000_frames_uncorrected": round(seconds, 4),
        "fixed_work_ms": round(1000 * float(np.median(trace.fixed[first:])), 4),
        "ttft_ms_median": round(statistics.median(trace.ttft_ms), 3) if trace.ttft_ms else None,
        "questions": len(trace.ttft_ms),
        "constant": bound and abs(rss) <= LIMIT and abs(ratio) <= LIMIT,
    }


def _mib(value: float) -> float:
    return round(float(value) / 2**20, 2)


def curves(trace: Trace, points: int = 200) -> dict[str, list[float]]:
    """Medians for a figure: at most `points` of them over all frames."""
    width = max(1, len(trace.rss) // points)
    count = len(trace.rss) // width

    def medians(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.median(values[: count * width].reshape(count, width), axis=1)
        return found

    return {
        "frame": [float(width * (number + 1)) for number in range(count)],
        "rss_mib": [round(float(v) / 2**20, 3) for v in medians(trace.rss)],
        "cpu_ms": [round(1000 * float(v), 4) for v in medians(trace.seconds)],
        "cpu_ratio": [round(float(v), 4) for v in medians(trace.seconds) / medians(trace.fixed)],
        "rows_held": [float(v) for v in medians(trace.rows)],
    }


def endurance(methods: Sequence[Compressor | None], frames: int, *, every: int = 500) -> dict[str, Any]:
    """Every method by itself, one after the other.

    The first one also pays for what is loaded when it is first used, so a short run comes before and is not noted.
    """
    watch(None, min(frames, 50))
    runs = []
    for method in methods:
        gc.collect()
        trace = watch(method, frames, every=every)
        runs.append({**summary(trace), "curves": curves(trace)})
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "endurance",
        "shape": {**asdict(TINY), "tokens_per_frame": TINY.tokens},
        "threads": torch.get_num_threads(),
        "frames_between_questions": every,
        "environment": environment(torch.device("cpu")),
        "limit_percent_per_1000_frames": LIMIT,
        "runs": runs,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of an endurance run."""
    where, shape = result["environment"], result["shape"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        "# Streams: constant memory and time per frame",
        "",
        f"LLaVA-OneVision-shaped network with random weights ({shape['layers']} layers of {shape['hidden']}, "
        f"{shape['tokens_per_frame']} tokens per frame of {shape['image']} x {shape['image']} pixels), float32, "
        f"{result['threads']} thread(s). Measured on {where['device']}, {versions}, Python {where['python']}. A "
        f"question every {result['frames_between_questions']} frames. Drift is the Theil-Sen slope through medians of "
        "windows, the first fifth of the frames left out, over their median; that of CPU time is of its ratio to a "
        "fixed piece of work that is timed beside every frame (uncorrected in brackets), since other work on the "
        "machine moves both. Nothing here says anything about accuracy.",
        "",
        "| held by | frames | rows held (bound) | RSS MiB, then | at the end | RSS %/1,000 | CPU ms/frame | "
        "CPU %/1,000 | time to first token ms | constant |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in result["runs"]:
        rss, cpu = run["rss_mib"], run["cpu_ms_per_frame"]
        lines.append(
            f"| {run['method']} | {run['frames']} | {run['most_rows_held']} ({run['memory_tokens']}) | "
            f"{rss['after_first_fifth']} | {rss['at_the_end']} | {run['rss_percent_per_1000_frames']:+.3f} | "
            f"{cpu['median']} | {run['cpu_percent_per_1000_frames']:+.3f} "
            f"({run['cpu_percent_per_1000_frames_uncorrected']:+.3f}) | {run['ttft_ms_median']} | "
            f"{'yes' if run['constant'] else 'NO'} |"
        )
    lines += [
        "",
        f"Wanted: at most {result['limit_percent_per_1000_frames']} % per 1,000 frames either way, and never more rows "
        "than the bound.",
        "",
    ]
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Any:
    """A matplotlib Figure: resident memory, CPU time and rows held against frames."""
    check_matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(7, 9), layout="constrained")
    axes = made.subplots(4, 1, sharex=True)
    names = (
        ("rss_mib", "resident memory (MiB)"),
        ("cpu_ms", "CPU time (ms)"),
        ("cpu_ratio", "CPU time / fixed work"),
        ("rows_held", "rows held"),
    )
    for panel, (name, label) in zip(axes, names, strict=True):
        for run in result["runs"]:
            panel.plot(run["curves"]["frame"], run["curves"][name], label=run["method"], linewidth=1)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("frames")
    return made


# --- speed on a larger network ----------------------------------------------------------------------------------------


def speed(
    methods: Sequence[Compressor | None],
    device: torch.device,
    *,
    shape: StreamShape | None = None,
    frames: int = 80,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Frames per second, time to the first token and bytes held per method, on one random network.

    Every method watches the same frames with the bound that it sets itself, 32 times what it holds of the first one;
    the last `RECENT` pushes are timed, when the memory is full.
    """
    shape = shape or HALF_BILLION
    model, processor = random_stream_model(shape, device, dtype)
    pictures = list(random_frames(shape.image, frames))
    rows = []
    for method in methods:
        with stream(model, processor, method) as live:
            for number, frame in enumerate(pictures[:3]):  # warm-up
                live.push(frame, number)
            live.ask(QUESTION, max_new_tokens=2)
            live.reset()
            _push_all(live, pictures)
            times = []
            for _ in range(3):
                live.ask(QUESTION, max_new_tokens=2)
                times.append(live.report.ttft_ms or 0.0)
            report = live.report
        rows.append(
            {
                "method": "dense" if method is None else type(method).__name__,
                "settings": None if method is None else method.to_dict(),
                "fps": round(report.fps, 2),
                "ttft_ms": round(statistics.median(times), 2),
                "kv_tokens": report.kv_tokens,
                "kv_bytes": report.kv_bytes,
                "frames_held": report.frames_held,
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "speed",
        "shape": {**asdict(shape), "tokens_per_frame": shape.tokens},
        "dtype": str(dtype).removeprefix("torch."),
        "frames": frames,
        "environment": environment(device),
        "runs": rows,
    }


def _push_all(live: Stream, frames: Sequence[np.ndarray[Any, Any]]) -> None:
    for number, frame in enumerate(frames):
        live.push(frame, float(number))


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write, and say what came out; 0 if everything was constant (or with --speed)."""
    parser = argparse.ArgumentParser(prog="python -m mmtoken.evaluation.stream_endurance", description=__doc__)
    parser.add_argument("--out", required=True, help="JSON file; with endurance also .md and .png beside it")
    parser.add_argument("--frames", type=int, help="default: 10000, with --speed 80")
    parser.add_argument("--every", type=int, default=500, help="frames between questions")
    parser.add_argument("--compressor", action="append", help="a name, or its JSON; several times for several")
    parser.add_argument("--speed", action="store_true", help="compare speed on a larger network instead")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    try:
        return _run(given)
    except MMTokenError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _run(given: argparse.Namespace) -> int:
    out = check_target(given.out, "--out", ".json")
    named = [json.loads(text) if text.lstrip().startswith("{") else text for text in given.compressor or []]
    methods: list[Compressor | None] = [None, *(settings_of(resolve(one)) for one in named)]
    if given.speed:
        device = torch.device(given.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        result = speed(methods, device, frames=given.frames or 80, dtype=dtype)
        _write(out, json.dumps(result, indent=2) + "\n")
        for row in result["runs"]:
            held = f"{row['kv_bytes'] / 2**20:.1f} MiB held"
            sys.stdout.write(f"{row['method']}: {row['fps']} fps, {row['ttft_ms']} ms, {held}\n")
        return 0
    check_matplotlib()
    result = endurance(methods, given.frames or 10_000, every=given.every)
    _write(out, json.dumps(result, indent=2) + "\n")
    _write(out.with_suffix(".md"), table(result))
    with whole_file(out.with_suffix(".png")) as temporary:
        figure(result).savefig(temporary, dpi=120)
    sys.stdout.write(table(result))
    return 0 if all(run["constant"] for run in result["runs"]) else 1


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
