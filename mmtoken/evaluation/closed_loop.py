"""Success of a policy in closed loop, dense and pruned: paired episodes of `PickPlace`, three trained policies.

    python -m mmtoken.evaluation.closed_loop --out compressors/vlapruner

Every cell (a method at a budget) runs the same episodes: the same scenes, cameras and instructions for the same policy,
so that what differs is the pruning. Cells go into `control.json`, whole after every cell of one policy, and a call goes
on where an earlier one stopped. `--share I/N` does every N-th of them (in `control-I.json`); the call that finds all
of them joins them in `control.json` and writes `control.md` and `control.png`, see `closed_loop_figures`.

Beside success stand the tokens that decoder layers really processed, averaged over layers and steps, the warm-up of
methods that look back included: the same count for methods that cut before and inside the decoder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.vlapruner import VLAPruner
from mmtoken.control.episode import Episode
from mmtoken.control.policy import Policy
from mmtoken.datasets.pick_place import PickPlace
from mmtoken.engine.report import Report
from mmtoken.errors import ActionError
from mmtoken.evaluation.closed_loop_figures import OVERLAP, TIME, complete, joined, write
from mmtoken.evaluation.timing import Stopwatch, Summary, environment, interleave, one_thread
from mmtoken.hub import load
from mmtoken.wholefile import whole_file

SCHEMA_VERSION = 1

POLICIES = ("tiny-openvla", "tiny-openvla-seed1", "tiny-openvla-seed2")
"""The same recipe with three training seeds."""

EPISODES = 70
"""Per cell and policy."""

FIRST_SEED = 1_000_000
"""Of the episodes' seeds; every policy has seeds of its own, and every cell of it the same ones."""

KEEPS = (0.5, 0.25, 0.125)

LAYER = 1
"""First decoder layer that sees kept tokens only, for methods that cut inside the decoder: 2 and 3 of 32 in their
papers, at this depth the earliest there is."""


@dataclass(frozen=True)
class Cell:
    """A method at a budget.

    Attributes:
        title: of the method, for people.
        method: name of a compressor, None for the dense policy.
        options: its settings but the budget.
        keep: budget.
        role: "method", "ablation" or "control".
    """

    title: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: float = 1.0
    role: str = "control"

    @property
    def name(self) -> str:
        return self.title if self.method is None else f"{self.title} {self.keep:g}"

    def compressor(self) -> Compressor | None:
        if self.method is None:
            return None
        return resolve({"class_path": self.method, "init_args": {"keep": self.keep, **self.options}})

    def to_dict(self) -> dict[str, Any]:
        compressor = self.compressor()
        return {
            "title": self.title,
            "role": self.role,
            "keep": self.keep,
            "compressor": None if compressor is None else compressor.to_dict(),
        }


def cells(action_tokens: int) -> list[Cell]:
    """Dense, then everything at every budget.

    Args:
        action_tokens: A, tokens of an action.
    """
    ours: dict[str, Any] = {"layer": LAYER, "action_tokens": action_tokens}
    kinds = [
        ("VLA-Pruner", "vlapruner", ours, "method"),
        # 1 / 0.8: the order of the official code's decay, and nothing else of it.
        ("VLA-Pruner, old steps count most", "vlapruner", {**ours, "gamma": 1.25}, "ablation"),
        ("VLA-Pruner, no action branch", "vlapruner", {**ours, "branches": "semantic"}, "ablation"),
        ("VLA-Pruner, no diversity filter", "vlapruner", {**ours, "diversity": False}, "ablation"),
        ("VLA-Pruner, last action only", "vlapruner", {**ours, "window": 1}, "ablation"),
        ("FastV", "fastv", {"layer": LAYER}, "method"),
        ("DivPrune", "divprune", {}, "method"),
        ("Random", "random", {}, "control"),
        ("Uniform grid", "uniform_grid", {}, "control"),
    ]
    return [Cell("Dense")] + [Cell(t, m, o, keep, role) for keep in KEEPS for t, m, o, role in kinds]


# --- episodes ---------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Visual tokens of all steps of all episodes so far.

    Attributes:
        steps: control steps.
        layers: sum over steps of the tokens that a decoder layer processed, averaged over layers.
        left: sum over steps of the tokens after the last cut.
        pruned: steps in which some were dropped.
        flops, flops_dense: of the decoder's prefill.
    """

    steps: int = 0
    layers: float = 0.0
    left: int = 0
    pruned: int = 0
    flops: float = 0.0
    flops_dense: float = 0.0

    def add(self, report: Report) -> None:
        """One step of some episodes."""
        self.steps += len(report.tokens_in)
        self.layers += report.layer_average * len(report.tokens_in)
        self.left += sum(report.tokens_out)
        self.pruned += sum(out < into for out, into in zip(report.tokens_out, report.tokens_in, strict=True))
        self.flops += report.flops
        self.flops_dense += report.flops_dense

    def to_dict(self) -> dict[str, Any]:
        """Means per step."""
        return {
            "steps": self.steps,
            "layer_average": round(self.layers / self.steps, 4),
            "tokens_left": round(self.left / self.steps, 4),
            "pruned_steps": round(self.pruned / self.steps, 4),
            "flops_share": round(self.flops / self.flops_dense, 5),
        }


Step = Callable[[Episode, list[int], NDArray[np.float32]], None]
"""Told of every step: the episode, the seeds that took it, their actions float32[B, A]."""


def run(
    policy: Policy, compressor: Compressor | None, seeds: Sequence[int], batch: int, each: Step = lambda *_: None
) -> dict[str, Any]:
    """Episodes of these seeds, `batch` at a time in lockstep; those that have ended leave the batch.

    Returns:
        "success" (0 or 1) and "length" (steps) per seed, in how many episodes the policy answered with no action, which
        is a failure ("without_action"), and the tokens (`Tokens.to_dict`; none for the dense policy).
    """
    success, length, tokens = dict.fromkeys(seeds, 0), dict.fromkeys(seeds, 0), Tokens()
    silent = 0
    for first in range(0, len(seeds), batch):
        alive = list(seeds[first : first + batch])
        worlds = {seed: PickPlace() for seed in alive}
        seen = {seed: world.reset(seed=seed)[0] for seed, world in worlds.items()}
        with Episode(policy, compressor) as episode:
            while alive:
                try:
                    actions = episode.act([seen[s]["image"] for s in alive], [seen[s]["instruction"] for s in alive])
                except ActionError as error:
                    if not error.rows:
                        raise
                    # No action is a failure of these episodes; the others take the step without them.
                    going = [row for row in range(len(alive)) if row not in error.rows]
                    silent += len(error.rows)
                    if going and episode.steps:
                        episode.only(going)
                    alive = [alive[row] for row in going]
                    continue
                if compressor is not None:
                    tokens.add(episode.report)
                each(episode, alive, actions)
                going = []
                for row, (seed, action) in enumerate(zip(alive, actions, strict=True)):
                    seen[seed], _, done, late, info = worlds[seed].step(action)
                    length[seed] += 1
                    success[seed] = int(info["success"])
                    if not done and not late:
                        going.append(row)
                if going and len(going) < len(alive):
                    episode.only(going)
                alive = [alive[row] for row in going]
    found: dict[str, Any] = {
        "success": [success[s] for s in seeds],
        "length": [length[s] for s in seeds],
        "without_action": silent,
    }
    if tokens.steps:
        found["tokens"] = tokens.to_dict()
    return found


# --- what attention looks at ------------------------------------------------------------------------------------------


@dataclass
class Overlap:
    """How far sets of tokens agree in dense episodes: best by prefill, best by action, best by the action before.

    Attributes:
        sums: per name and budget, the sum of shares of the set that the other one has as well.
        counts: per name, the steps.
        picked: actions per seed, to compare with the dense cell.
    """

    sums: dict[str, dict[float, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    before: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, episode: Episode, seeds: list[int], actions: NDArray[np.float32]) -> None:
        now = episode.history[-1]
        semantic = None
        for site in episode.report.sites:
            if site.scores is not None:
                semantic = [scores.numpy() for scores in site.scores]
        for row, seed in enumerate(seeds):
            if semantic is not None:
                self._add("prefill and action", semantic[row], now[row])
            if seed in self.before:
                self._add("consecutive actions", self.before[seed], now[row])
            self.before[seed] = now[row]

    def _add(self, name: str, one: NDArray[np.float32], other: NDArray[np.float32]) -> None:
        sums = self.sums.setdefault(name, dict.fromkeys(KEEPS, 0.0))
        self.counts[name] = self.counts.get(name, 0) + 1
        for keep in KEEPS:
            sums[keep] += shared(one, other, keep)

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {
                "steps": self.counts[name],
                "percent": {f"{k:g}": round(100 * s / self.counts[name], 2) for k, s in sums.items()},
            }
            for name, sums in self.sums.items()
        }


def shared(one: NDArray[np.float32], other: NDArray[np.float32], keep: float) -> float:
    """Share of the best `keep` of N tokens by one score float[N] that are among the best by the other; ties go to the
    lower index."""
    count = max(1, round(keep * len(one)))
    best = (set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (one, other))
    return len(set.intersection(*best)) / count


def overlap(policy: Policy, seeds: Sequence[int], batch: int, action_tokens: int) -> dict[str, Any]:
    """Overlaps in episodes of the dense policy. Everything is kept, so these are its episodes to the bit."""
    notes = Overlap()
    watcher = VLAPruner(keep=1.0, layer=LAYER, action_tokens=action_tokens, window=1)
    found = run(policy, watcher, seeds, batch, notes)
    return {"success": found["success"], "length": found["length"], "overlap": notes.to_dict()}


# --- time -------------------------------------------------------------------------------------------------------------


def times(policy: Policy, plans: Sequence[Cell], seed: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per control step of one episode, cells interleaved, on what the dense policy saw.

    Three steps warm up whoever looks back, three are measured; attaching and the processor are part of a step.

    Returns:
        Summary per cell.
    """
    world, observations = PickPlace(), []
    seen, _ = world.reset(seed=seed)
    with Episode(policy) as episode:
        for _ in range(6):
            observations.append(seen)
            seen = world.step(episode.act(seen["image"], seen["instruction"]))[0]

    def variant(compressor: Compressor | None) -> Callable[[Stopwatch], object]:
        def go(watch: Stopwatch) -> None:
            with Episode(policy, compressor) as episode:
                for number, seen in enumerate(observations):
                    with watch.stage("step" if number >= 3 else "warm-up"):
                        episode.act(seen["image"], seen["instruction"])

        return go

    with one_thread(torch.device("cpu")):
        found = interleave({cell.name: variant(cell.compressor()) for cell in plans}, rounds)
    return {"milliseconds": {name: Summary.of(stages["step"]).to_dict(1e3 / 3) for name, stages in found.items()}}


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """`control.json`, written whole after every entry; entries that it holds are not run again."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "runs": {}}
        if path.is_file():
            before = json.loads(path.read_text())
            if all(before.get(key) == head[key] for key in ("schema_version", "weights", "seeds", "cells")):
                self.content = before

    def has(self, policy: str, name: str) -> bool:
        return name in self.content["runs"].get(policy, {})

    def put(self, policy: str, name: str, found: dict[str, Any]) -> None:
        self.content["runs"].setdefault(policy, {})[name] = found
        self.write()

    def write(self) -> None:
        with whole_file(self.path) as file:
            file.write_text(json.dumps(self.content) + "\n")


def tasks(names: Sequence[str], plans: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """(policy, entry) of everything there is to run, cells first."""
    for name in [*(cell.name for cell in plans), OVERLAP]:
        for policy in names:
            yield policy, name
    yield names[0], TIME


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmtoken.evaluation.closed_loop", description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--models", default=",".join(POLICIES), help="zoo entries or folders, with commas")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="per cell and policy")
    parser.add_argument("--batch", type=int, default=EPISODES, help="episodes in lockstep")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--share", default=None, metavar="I/N", help="every N-th entry from the I-th, 0 <= I < N")
    options = parser.parse_args(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    turn, of = (int(number) for number in (options.share or "0/1").split("/"))
    torch.set_num_threads(1)
    policies = {name: Policy(*load(name)) for name in options.models.split(",")}
    first = next(iter(policies.values()))
    action_tokens = first.action_length
    plans = cells(action_tokens)
    seeds = {
        name: list(range(start := FIRST_SEED + number * options.episodes, start + options.episodes))
        for number, name in enumerate(policies)
    }
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "closed_loop",
        "task": "PickPlace, the time limit of its class",
        "weights": {name: _fingerprint(policy.model) for name, policy in policies.items()},
        "environment": environment(torch.device("cpu")),
        "visual_tokens": first.processor.num_image_tokens,
        "token_count": "visual tokens that a decoder layer processed in a step, averaged over layers and steps, those "
        "before a method prunes included",
        "seeds": seeds,
        "cells": {cell.name: cell.to_dict() for cell in plans},
    }
    results = Results(out / f"control{f'-{turn:02d}' if options.share else ''}.json", head)
    by_name = {cell.name: cell for cell in plans}
    mine = list(tasks(list(policies), plans))[turn::of]
    for number, (policy, name) in enumerate(mine, 1):
        if results.has(policy, name):
            continue
        started = time.process_time()
        if name == TIME:
            found = times(policies[policy], plans, seeds[policy][0], options.rounds)
        elif name == OVERLAP:
            found = overlap(policies[policy], seeds[policy], options.batch, action_tokens)
        else:
            found = run(policies[policy], by_name[name].compressor(), seeds[policy], options.batch)
        found["cpu_seconds"] = round(time.process_time() - started, 1)
        results.put(policy, name, found)
        rate = f"{np.mean(found['success']):.3f} of {options.episodes} in " if "success" in found else ""
        sys.stderr.write(f"{number}/{len(mine)} {policy} {name}: {rate}{found['cpu_seconds']} s\n")
    content = joined(out)
    if complete(content):
        write(content, out)


def _fingerprint(model: Any) -> str:
    """A number that another set of weights does not have."""
    return f"{sum(float(p.detach().double().abs().sum()) for p in model.parameters()):.6f}"


if __name__ == "__main__":
    main()
