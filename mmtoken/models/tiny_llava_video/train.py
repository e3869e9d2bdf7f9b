"""Trains tiny-llava-video for a given wall time, with clips drawn by processes of their own.

    python -m mmtoken.models.tiny_llava_video.train --seed 0 --minutes 7 --out runs/seed0

The same as `mmtoken fit --config models/tiny_llava_video/recipe.yaml`, made for a machine with a GPU and little time:
no configuration parser, batches in memory that the drawing processes share with this one, and a schedule that follows
the clock. It writes `metrics.json` (accuracy per question type, about once a minute) and `last.ckpt`, each whole.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtoken.datasets.clip_mix import ClipBatches
from mmtoken.datasets.moving_shapes import QUESTION_TYPES, MovingShapes
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.models.tiny_llava_video.objective import TinyLlavaVideo
from mmtoken.models.tiny_llava_video.packing import ClipBatch, Gaps, pack_clips
from mmtoken.wholefile import whole_file

_FRAME = 96 * 96 * 3
_LOOK_AHEAD = 3
"""Batches that each drawing process may be ahead."""


class Drawn:
    """Batches in the order of their steps, drawn by `workers` processes.

    Worker w draws the steps first + w, first + w + workers, ... into slots of memory that it shares with this process,
    so frames are written once and never sent. Start it before the GPU is used: the workers are forked.
    """

    def __init__(self, batches: ClipBatches, gaps: Gaps, seed: int, workers: int, first: int = 0) -> None:
        context = multiprocessing.get_context("fork")
        self._slots: list[list[mmap.mmap]] = []
        self._pipes: list[Connection] = []
        self._processes = []
        for w in range(workers):
            slots = [mmap.mmap(-1, batches.frames * _FRAME) for _ in range(_LOOK_AHEAD)]
            here, there = context.Pipe()
            process = context.Process(
                target=_draw, args=(batches, gaps, seed, first + w, workers, slots, there), daemon=True
            )
            process.start()
            there.close()
            self._slots.append(slots)
            self._pipes.append(here)
            self._processes.append(process)

    def __iter__(self) -> Iterator[ClipBatch]:
        """Batches; the frames of one are valid until the next is asked for."""
        step = 0
        while True:
            worker, turn = step % len(self._pipes), step // len(self._pipes)
            shape, rest = self._pipes[worker].recv()
            slot = self._slots[worker][turn % _LOOK_AHEAD]
            frames = torch.frombuffer(slot, dtype=torch.uint8, count=int(np.prod(shape))).view(shape)
            yield ClipBatch(frames, *(torch.from_numpy(v) for v in rest))
            self._pipes[worker].send(None)
            step += 1

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def _draw(
    batches: ClipBatches, gaps: Gaps, seed: int, first: int, workers: int, slots: list[mmap.mmap], pipe: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    turn = 0
    while True:
        step = first + turn * workers
        batch = pack_clips(batches[step], gaps, np.random.default_rng((seed, step, 2)))
        parts = [value.numpy() for value in vars(batch).values()]
        if turn >= _LOOK_AHEAD:  # the slot is free again when its batch has been used
            try:
                pipe.recv()
            except EOFError:
                return
        shape = parts[0].shape
        np.frombuffer(slots[turn % _LOOK_AHEAD], dtype=np.uint8, count=parts[0].size).reshape(shape)[:] = parts[0]
        try:
            pipe.send((shape, parts[1:]))
        except BrokenPipeError:
            return
        turn += 1


@torch.no_grad()
def accuracy(
    model: TinyLlavaVideo, batches: Sequence[ClipBatch], device: torch.device, bfloat16: bool
) -> dict[str, float]:
    """Fraction of questions answered right, per type and in all ("all")."""
    right = torch.zeros(len(QUESTION_TYPES))
    asked = torch.zeros(len(QUESTION_TYPES))
    model.eval()
    for batch in batches:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            correct = model.correct(batch.to(device)).cpu()
        there = batch.types >= 0
        asked.index_add_(0, batch.types[there], torch.ones(int(there.sum())))
        right.index_add_(0, batch.types[there], correct[there].float())
    model.train()
    found = {kind: round(float(r / n), 4) for kind, r, n in zip(QUESTION_TYPES, right, asked, strict=True) if n}
    return {**found, "all": round(float(right.sum() / asked.sum()), 4)}


def validation_batches(seed: int, clips: int, length: int = 16, active: int | None = None) -> list[ClipBatch]:
    """Held-out clips with one question of each type at their end."""
    source = list(MovingShapes(split_seed(seed, "validation"), clips, (length, length), active=active))
    size = max(1, 1024 // length)
    return [pack_clips(source[i : i + size]) for i in range(0, len(source), size)]


def save(model: TinyLlavaVideo, step: int, path: Path) -> None:
    """A checkpoint that `export` reads, written whole."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    checkpoint = {"state_dict": weights, "global_step": step, "epoch": 0}
    model.on_save_checkpoint(checkpoint)
    with whole_file(path) as file:
        torch.save(checkpoint, file)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def train(options: argparse.Namespace, model: TinyLlavaVideo | None = None) -> dict[str, Any]:
    """Run it; the content of metrics.json.

    Args:
        options: what `parser` describes.
        model: another objective on the same clips; None: that of tiny-llava-video.
    """
    begin = time.monotonic()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    gaps = Gaps() if model is None else model.gaps
    before = torch.load(options.start_from, map_location="cpu", weights_only=True) if options.start_from else None
    first = before["global_step"] if before else 0
    drawn = Drawn(
        ClipBatches(split_seed(options.seed, "train"), options.frames, options.questions),
        gaps,
        options.seed,
        options.workers,
        first,
    )
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bfloat16 = device.type == "cuda" and not options.float32
    torch.set_float32_matmul_precision("high")
    if model is None:
        model = TinyLlavaVideo(
            gaps=gaps,
            object_layer=options.object_layer,
            learning_rate=options.learning_rate,
            tower_learning_rate=options.tower_learning_rate,
            minutes=options.minutes,
            attention=options.attention,
            seed=options.seed,
        )
    model = model.to(device)
    if before:
        model.load_state_dict(before["state_dict"])
    model.train()
    optimizer = model.optimizer()
    peaks = [group["lr"] for group in optimizer.param_groups]
    checks = validation_batches(options.seed, options.validation_clips)
    far = validation_batches(options.seed, max(1, options.validation_clips // 4), 48, 16)
    report: dict[str, Any] = {"options": vars(options), "device": str(device), "torch": torch.__version__, "checks": []}

    def check(step: int, loss: list[float]) -> None:
        seconds = time.monotonic() - begin
        found = accuracy(model, checks, device, bfloat16)
        row = {"step": first + step, "seconds": round(seconds, 1), "loss": loss, "accuracy": found}
        row["accuracy_48_frames"] = accuracy(model, far, device, bfloat16)
        report["checks"].append(row)
        with whole_file(out / "metrics.json") as file:
            file.write_text(json.dumps(report, indent=1) + "\n")
        _say(json.dumps({"seed": options.seed, **row}))

    step, smooth = 0, [0.0]
    check(step, smooth)
    start = last = time.monotonic()
    model.factor(0, None)  # the clock of the schedule starts
    losses: list[torch.Tensor] = []
    try:
        for batch in drawn:
            factor = model.factor(step, options.steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            moved = batch.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                terms = torch.stack(list(model.losses(moved).values()))
            loss = terms.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(terms.detach())
            step += 1
            if step % 20 == 0:  # asking for a number waits for the device, so not at each step
                smooth = [round(float(v), 4) for v in torch.stack(losses).mean(dim=0)]
                losses.clear()
                if step in (20, 100):
                    rate = step / (time.monotonic() - start)
                    _say(f"seed {options.seed} step {step} loss {smooth} steps/s {rate:.2f}")
            now = time.monotonic()
            ended = now - start >= 60 * options.minutes or (options.steps is not None and step >= options.steps)
            if ended or now - last >= options.check_seconds:
                if not ended:
                    check(step, smooth)
                    save(model, first + step, out / "last.ckpt")
                last = time.monotonic()
            if ended:
                break
    finally:
        drawn.close()
    save(model, first + step, out / "last.ckpt")
    check(step, smooth)
    return report


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of `train`."""
    made = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--minutes", type=float, default=7.0, help="wall time of the training steps")
    made.add_argument("--steps", type=int, default=None, help="end earlier, after so many steps")
    made.add_argument("--out", required=True, help="folder of metrics.json and last.ckpt")
    made.add_argument("--start-from", default=None, help="a last.ckpt whose weights to go on with, on further clips")
    made.add_argument("--frames", type=int, default=1024, help="frames per step")
    made.add_argument("--questions", type=int, default=10, help="questions per clip")
    made.add_argument("--workers", type=int, default=5, help="processes that draw clips")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--device", default=None)
    made.add_argument("--float32", action="store_true", help="no bfloat16 on a GPU")
    made.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    made.add_argument("--object-layer", type=int, default=5)
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--tower-learning-rate", type=float, default=3e-4)
    made.add_argument("--validation-clips", type=int, default=256)
    made.add_argument("--check-seconds", type=float, default=60.0)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("python -m mmtoken.models.tiny_llava_video.train", str(__doc__)).parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(options)


if __name__ == "__main__":
    main()
