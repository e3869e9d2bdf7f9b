"""How long a vision tower takes on a video, dense and with STC-Cacher, beside what the multiply-adds promise.

The tower has the shape of SigLIP-so400m/14-384 and random weights: those do not change how long a block takes.
`python -m mmtoken.evaluation.tower_speed --device cuda --out benchmarks/tower.json` writes the JSON and a Markdown
report beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmtoken.compressors import STCCacher
from mmtoken.compressors.base import Compressor
from mmtoken.engine.reuse import VideoState
from mmtoken.engine.session import compress
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.tables import Table
from mmtoken.evaluation.timing import (
    MIN_ROUNDS,
    Stopwatch,
    Summary,
    Timings,
    environment,
    interleave,
    one_thread,
    paired,
)
from mmtoken.wholefile import check_target, whole_file

SCHEMA_VERSION = 1

DENSE = "dense"
VARIANTS: dict[str, Compressor | None] = {
    DENSE: None,
    "u=0.25 N=2": STCCacher(),
    "u=0.25 N=4": STCCacher(interval=4),
    "u=0.25 N=2 shared": STCCacher(share_selection=True),
    "u=1": STCCacher(keep=1.0),
}
"""What is timed: u is the share of patches that is computed anew, every N-th frame is computed in full."""

MODES = {"whole": "all frames in one call", "frame by frame": "one call per frame, as a stream comes"}


@dataclass(frozen=True)
class TowerSize:
    """Sizes of the random SigLIP tower and its video.

    Attributes:
        width, mlp, heads: of a block.
        side: patches of a row; T = side^2.
        layers: blocks.
        frames: of the video.
    """

    width: int = 1152
    mlp: int = 4304
    heads: int = 16
    side: int = 27
    layers: int = 27
    frames: int = 8


def build(size: TowerSize, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[SiglipVisionModel, Tensor]:
    """A tower with random weights and a video float[F, 3, S, S] whose frames drift; no global generator is touched."""
    patch = 14
    pixels_per_side = size.side * patch
    config = SiglipVisionConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=pixels_per_side,
        patch_size=patch,
        vision_use_head=False,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = SiglipVisionModel(config).eval().to(device, dtype)
        pixels = torch.randn(size.frames, 3, pixels_per_side, pixels_per_side)
    pixels[1:] *= 0.1
    return model, pixels.cumsum(0).to(device, dtype)


@torch.no_grad()
def run(model: SiglipVisionModel, pixels: Tensor, method: Compressor | None, step: int, watch: Stopwatch) -> Tensor:
    """The tower on a video in calls of `step` frames, under the stopwatch; attaching is not measured.

    Returns:
        float[F, T, C].
    """

    def calls() -> list[Tensor]:
        return [model(pixel_values=some).last_hidden_state for some in pixels.split(step)]

    if method is None:
        with watch.stage("tower"):
            return torch.cat(calls())
    with compress(model, method) as session, session.continuing(VideoState()), watch.stage("tower"):
        return torch.cat(calls())


@torch.no_grad()
def share_of_multiply_adds(model: SiglipVisionModel, pixels: Tensor, method: Compressor | None) -> float:
    """Multiply-adds of all blocks on this video over those of the plain tower, as the report counts them."""
    if method is None:
        return 1.0
    with compress(model, method) as session, session.continuing(VideoState()):
        model(pixel_values=pixels)
    return session.report.tower_multiply_adds / session.report.tower_multiply_adds_dense


def measure(
    size: TowerSize,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int = MIN_ROUNDS,
    modes: Sequence[str] = ("whole",),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time all of `VARIANTS` in interleaved rounds.

    Args:
        size: of tower and video.
        device, dtype: where and in what.
        rounds: measured rounds, after one that is thrown away.
        modes: some of `MODES`.
        progress: told about every round.

    Returns:
        JSON-ready results.
    """
    load = [_load()]
    with one_thread(device):
        model, pixels = build(size, device, dtype)
        steps = {mode: size.frames if mode == "whole" else 1 for mode in modes}

        def variant(method: Compressor | None, step: int) -> Callable[[Stopwatch], object]:
            return lambda watch: run(model, pixels, method, step, watch)

        timings = interleave(
            {f"{mode}: {name}": variant(method, steps[mode]) for mode in modes for name, method in VARIANTS.items()},
            rounds,
            stopwatch=lambda: Stopwatch(device=device),
            progress=lambda line: progress(f"tower: {line}"),
        )
        dense = run(model, pixels, None, size.frames, Stopwatch())
        same = torch.equal(dense, run(model, pixels, VARIANTS["u=1"], size.frames, Stopwatch()))
        shares = {name: share_of_multiply_adds(model, pixels, method) for name, method in VARIANTS.items()}
    load.append(_load())
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "tower",
        "weights": "random, SigLIP-so400m-shaped; says nothing about accuracy",
        "environment": environment(device),
        "load_average": load,
        "dtype": str(dtype).removeprefix("torch."),
        "size": {**asdict(size), "patches": size.side**2},
        "rounds": rounds,
        "u=1 is dense to the bit": same,
        "results": [
            _row(mode, name, method, timings, shares[name]) for mode in modes for name, method in VARIANTS.items()
        ],
    }


def _row(mode: str, name: str, method: Compressor | None, timings: Timings, share: float) -> dict[str, Any]:
    mine, dense = timings[f"{mode}: {name}"], timings[f"{mode}: {DENSE}"]
    return {
        "name": name,
        "mode": mode,
        "compressor": None if method is None else method.to_dict(),
        "milliseconds": {stage: Summary.of(mine[stage]).to_dict(1e3) for stage in mine},
        "share_of_time": Summary.of(paired(mine["tower"], dense["tower"])).to_dict(),
        "share_of_multiply_adds": round(share, 4),
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def tower_table(results: dict[str, Any]) -> Table:
    """Times and shares of every variant."""
    rows = []
    for row in results["results"]:
        ms, share = row["milliseconds"]["tower"], row["share_of_time"]
        rows.append(
            (
                f"{row['mode']}: {row['name']}",
                f"{ms['median']:.1f}",
                f"({ms['q1']:.1f}-{ms['q3']:.1f})",
                f"{share['median']:.3f}",
                f"({share['q1']:.3f}-{share['q3']:.3f})",
                f"{row['share_of_multiply_adds']:.3f}",
            )
        )
    return Table(("random weights", "tower ms", "(q1-q3)", "of dense time", "(q1-q3)", "of multiply-adds"), rows)


def tower_report(results: dict[str, Any]) -> str:
    """The Markdown that is read beside the JSON."""
    size, where = results["size"], results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    modes = "; ".join(f"{mode}: {MODES[mode]}" for mode in dict.fromkeys(row["mode"] for row in results["results"]))
    same = "is" if results["u=1 is dense to the bit"] else "is not"
    return (
        "# Vision tower on a video\n\n"
        f"SigLIP-so400m-shaped tower with random weights: {size['layers']} blocks of width {size['width']}, MLP "
        f"{size['mlp']}, {size['patches']} patches, {size['frames']} frames, {results['dtype']}. Measured on "
        f"{where['device']} ({where['clock']}), {versions}, Python {where['python']}; load average "
        f"{' to '.join(map(str, results['load_average']))}. Medians of {results['rounds']} interleaved rounds; shares "
        "are ratios taken within a round. Multiply-adds are those of the blocks, times include the patch embedding. "
        f"u is the share of patches computed anew, every N-th frame is computed in full; {modes}. Nothing here says "
        "anything about accuracy.\n\n"
        f"{tower_table(results).markdown()}\n\n"
        f"The output of u=1 {same} that of the plain tower to the bit.\n"
    )


def main(argv: Sequence[str]) -> int:
    """Measure and write the JSON and, beside it, the Markdown; 0 on success.

    Raises:
        MMTokenError: an argument cannot be used.
    """
    parser = argparse.ArgumentParser("python -m mmtoken.evaluation.tower_speed", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tower.json"), help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="blocks; default: 27 on a GPU, 2 on a CPU")
    parser.add_argument("--frames", type=int, default=8, help="of the video; default: %(default)s")
    parser.add_argument("--rounds", type=int, help=f"default: {MIN_ROUNDS} on a CPU, 15 on a GPU, 7 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args(argv)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise MMTokenError(f"device={options.device!r} is unknown; give cpu, cuda or cuda:1.") from error
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise MMTokenError(f"device={options.device!r}, but torch finds no GPU; give cpu.")
    layers = options.layers or (27 if cuda else 2)
    rounds = options.rounds or (15 if cuda and not options.quick else MIN_ROUNDS)
    for field, value in (("layers", layers), ("frames", options.frames), ("rounds", rounds)):
        if value < 1:
            raise MMTokenError(f"{field}={value}; give a whole number of at least 1.")
    target = check_target(options.out, "out", ".json")
    results = measure(
        TowerSize(layers=layers, frames=options.frames),
        device,
        torch.bfloat16 if cuda else torch.float32,
        rounds=rounds,
        modes=tuple(MODES) if cuda else ("whole",),
        progress=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    for path, text in (
        (target, json.dumps(results, indent=1) + "\n"),
        (target.with_suffix(".md"), tower_report(results)),
    ):
        with whole_file(path) as temporary:
            temporary.write_text(text)
    sys.stdout.write(f"{tower_table(results).text()}\n\nwrote {target} and {target.with_suffix('.md')}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MMTokenError as error:
        sys.exit(f"error: {error}")
