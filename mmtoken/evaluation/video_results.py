"""What `mmtoken.evaluation.video` found, over several training seeds: means, differences, tables and readings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtoken.datasets.moving_shapes import QUESTION_TYPES
from mmtoken.errors import InputError
from mmtoken.evaluation.video import joined

PARTS = ("offline", "streaming", "cacher", "quota", "videoscan")
AGES = ((0, 14), (15, 29), (30, 44), (45, 63))
"""Frames since the evidence was last visible, first and last of each group."""
CARDS = ("stcpruner", "stccacher", "videoscan", "quota", "dycoke", "vidcom2", "evs", "rekv")
"""Methods whose cards show this evidence."""

_TITLES = {"random": "random draw", "uniformgrid": "evenly spaced tokens", "downscale": "down-scaling"}


@dataclass(frozen=True)
class Accuracy:
    """Mean over seeds, the lowest and the highest of them, how many there are, and questions of each."""

    mean: float
    low: float
    high: float
    runs: int
    questions: int

    def __str__(self) -> str:
        spread = "one seed" if self.runs == 1 else f"{self.low:.2f} to {self.high:.2f} over {self.runs} seeds"
        return f"{self.mean:.2f} ({spread})"

    def cell(self) -> str:
        """For tables."""
        return f"{self.mean:.3f}" + (f" ({self.low:.2f}-{self.high:.2f})" if self.runs > 1 else "")


@dataclass(frozen=True)
class Part:
    """One part of the evidence: the same questions, answered with every setting by each of `runs`.

    A run may have been asked about fewer clips, the first ones.

    Attributes:
        name: one of `PARTS`.
        head: clips, frames, questions of the run that was asked most.
        runs: name -> {"model", "clips", "environment", "results", "refused"}.
        partial: runs that lack more than a tenth of the settings, in the same form; they are in no number here.
    """

    name: str
    head: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    partial: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Settings that some run has."""
        longest = max(self.runs.values(), key=lambda run: len(run["results"]))["results"]
        more = {name: None for run in self.runs.values() for name in run["results"] if name not in longest}
        return [*longest, *more]

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The results of a setting, one per run that has it."""
        return [run["results"][name] for run in self.runs.values() if name in run["results"]]

    def setting(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.entries(name)[0]["setting"]
        return found

    def mean(self, name: str, key: str) -> float:
        """Mean over runs of a number that was measured."""
        return float(np.mean([entry.get(key, float("nan")) for entry in self.entries(name)]))

    def accuracy(self, name: str, kind: str | None = None, ages: tuple[int, int] | None = None) -> Accuracy:
        """Share of right answers, of a question type or an age only."""
        chosen = [
            i
            for i, q in enumerate(self.head["questions"])
            if kind in (None, q["type"]) and (ages is None or ages[0] <= q["age"] <= ages[1])
        ]
        shares = []
        for entry in self.entries(name):
            marks = [entry["correct"][i] for i in chosen if i < len(entry["correct"])]
            shares.append(float(np.mean(marks)) if marks else float("nan"))
        return Accuracy(float(np.mean(shares)), min(shares), max(shares), len(shares), len(chosen))

    def difference(self, a: str, b: str, rounds: int = 1000) -> tuple[float, float, float]:
        """How much more `a` gets right than `b`, on the same questions and seeds, and a 95 % interval.

        Clips are drawn anew with all their questions (bootstrap), since questions about a clip are not independent.
        """
        runs = [r["results"] for r in self.runs.values() if a in r["results"] and b in r["results"]]
        if not runs:
            return float("nan"), float("nan"), float("nan")
        questions = self.head["questions"]
        gains = np.full((len(runs), len(questions)), np.nan)
        for row, run in zip(gains, runs, strict=True):
            row[: len(run[a]["correct"])] = np.array(run[a]["correct"]) - np.array(run[b]["correct"])
        asked = ~np.isnan(gains).all(axis=0)
        each = np.nanmean(gains[:, asked], axis=0)
        clips = np.array([q["clip"] for q in questions])[asked]
        sums = np.bincount(clips, weights=each)
        counts = np.bincount(clips)
        draws = np.random.default_rng(0).integers(0, len(sums), (rounds, len(sums)))
        means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(each.mean()), float(low), float(high)

    def of(self, method: str) -> list[str]:
        """Settings of a method."""
        return [name for name in self.names if self.entries(name)[0].get("setting", {}).get("method") == method]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": f"video-{self.name}", **self.head, "runs": {**self.runs, **self.partial}}


def gather(folder: Path) -> dict[str, Part]:
    """All parts in a folder: `<run>/video-<part>[-<number>].json` of several runs, or what `Part.to_dict` wrote.

    Raises:
        InputError: there are none, or runs were asked different questions.
    """
    parts: dict[str, Part] = {}
    for name in PARTS:
        file = folder / f"video-{name}.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        runs: dict[str, dict[str, Any]] = content.get("runs", {})
        head = {key: content[key] for key in ("clips", "frames", "questions")} if content else {}
        for place in sorted(path for path in folder.iterdir() if path.is_dir() and not content):
            found = joined(place, name)
            if found is None or not found["results"]:
                continue
            mine = {key: found[key] for key in ("clips", "frames", "questions")}
            long, short = (head, mine) if head and len(head["questions"]) >= len(mine["questions"]) else (mine, head)
            if short and long["questions"][: len(short["questions"])] != short["questions"]:
                raise InputError(f"evidence={str(folder)!r}: {place.name} was asked other questions in part {name}.")
            head = long
            keys = ("clips", "environment", "results", "refused")
            runs[place.name] = {"model": Path(found["model"]).name, **{key: found[key] for key in keys}}
        most = max((len(run["results"]) for run in runs.values()), default=0)
        whole = {key: run for key, run in runs.items() if len(run["results"]) >= 0.9 * most}
        if runs:
            parts[name] = Part(name, head, whole, {key: run for key, run in runs.items() if key not in whole})
    if not parts:
        raise InputError(f"evidence={str(folder)!r} holds no video-<part>.json; run mmtoken.evaluation.video.")
    return parts


# --- tables -----------------------------------------------------------------------------------------------------------

_COST = (("tokens", "tokens"), ("per layer", "layer_average"), ("scoring ms", "scoring_ms"))
_LIVE = (
    ("tokens held", "kv_tokens"),
    ("frames held", "frames_held"),
    ("frames/s", "fps"),
    ("first token ms", "ttft_ms"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(part: Part, names: Sequence[str] | None = None) -> str:
    """Markdown: a row per setting, with what it cost, accuracy over seeds, and accuracy per question type."""
    kinds = [kind for kind in QUESTION_TYPES if any(q["type"] == kind for q in part.head["questions"])]
    columns = {"offline": _COST, "quota": (*_COST[:1], ("scorer ms", "scorer_ms"))}.get(part.name, _LIVE)
    rows = []
    for name in part.names if names is None else names:
        numbers = [
            f"{part.mean(name, key):.3g}" if part.mean(name, key) < 100 else f"{part.mean(name, key):.0f}"
            for _, key in columns
        ]
        cells = [f"{part.accuracy(name, kind).mean:.2f}" for kind in kinds]
        rows.append([name, *numbers, part.accuracy(name).cell(), *cells])
    return markdown(["setting", *(title for title, _ in columns), "all", *kinds], rows)


def age_table(part: Part, names: Sequence[str] | None = None) -> str:
    """Markdown: accuracy per age of the asked fact."""
    first = part.names[0]
    rows = [["questions per seed", "", *(str(part.accuracy(first, ages=group).questions) for group in AGES)]]
    for name in part.names if names is None else names:
        cells = [f"{part.accuracy(name, ages=group).mean:.2f}" for group in AGES]
        rows.append([name, f"{part.mean(name, 'kv_tokens'):.0f}", *cells])
    return markdown(["setting", "tokens held", *(f"{low}-{high} frames" for low, high in AGES)], rows)


def cacher_table(part: Part) -> str:
    """Markdown: multiply-adds of the tower, error per kind of frame, accuracy in all and by the motion of the clip."""
    rows = []
    for name in sorted(part.names, key=lambda n: part.mean(n, "multiply_add_share")):
        error = [f"{tower_error(part, name, kind):.3f}" for kind in ("static", "panning", "cut")]
        motion = [f"{value:.2f}" for value in by_motion(part, name)]
        rows.append([name, f"{part.mean(name, 'multiply_add_share'):.2f}", *error, part.accuracy(name).cell(), *motion])
    header = [
        "setting",
        "multiply-adds",
        "error static",
        "panning",
        "cut",
        "accuracy",
        "calm clips",
        "between",
        "moving clips",
    ]
    return markdown(header, rows)


def tower_error(part: Part, name: str, kind: str) -> float:
    """Mean over runs of the relative error of the tower's patches in frames of a kind."""
    return float(np.mean([entry["error"].get(kind, float("nan")) for entry in part.entries(name)]))


def by_motion(part: Part, name: str, groups: int = 3) -> list[float]:
    """Accuracy for clips of little to much camera motion, in groups of about the same size."""
    order = np.argsort([q["motion"] for q in part.head["questions"]], kind="stable")
    found = []
    for mine in np.array_split(order, groups):
        marks = [[e["correct"][i] for i in mine if i < len(e["correct"])] for e in part.entries(name)]
        found.append(float(np.mean([np.mean(one) for one in marks])))
    return found


# --- readings ---------------------------------------------------------------------------------------------------------


_NOTES = {
    "videoscan": "The model was not fine-tuned to read carriers in these two parts, which the method needs.",
    "dycoke": "In streams the first of every four frames stays whole, so that the same memory holds fewer frames.",
    "stccacher": "It saves work in the tower only: tokens and memory are those of the whole model.",
    "vidcom2": "It needs the whole video and so is not in the streams.",
    "evs": "It needs the whole video and so is not in the streams.",
}


def reading(method: str, parts: Mapping[str, Part]) -> list[str]:
    """Paragraphs about a method, every number in them taken from the results; [] where there are none."""
    found: list[str] = []
    for name in ("offline", "streaming"):
        if name in parts and parts[name].of(method):
            found += _READ[name](method, parts[name])
    if found and method in _NOTES:
        found.append(_NOTES[method])
    if method == "stccacher" and "cacher" in parts:
        found += _reuse(parts["cacher"])
    if method == "quota" and "quota" in parts:
        found += _scorers(parts["quota"])
    if method == "videoscan" and "videoscan" in parts:
        found += _carriers(parts["videoscan"])
    return found


def _signed(part: Part, a: str, b: str) -> str:
    mean, low, high = part.difference(a, b)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _controls(part: Part, tokens: float) -> dict[str, str]:
    """Controls at that many tokens, by their title."""
    found: dict[str, str] = {}
    for name in part.names:
        if part.setting(name)["role"] == "control" and abs(part.mean(name, "tokens") - tokens) < 0.15 * tokens:
            found[_TITLES.get(part.setting(name)["method"] or "", "fewer whole frames")] = name
    return found


def _offline(method: str, part: Part) -> list[str]:
    dense = part.accuracy("dense").mean
    lines = []
    for name in part.of(method):
        tokens = part.mean(name, "tokens")
        line = f"- {tokens:.0f} of 256 tokens: {part.accuracy(name)}; the whole model {dense:.2f}."
        controls = _controls(part, tokens)
        if controls:
            gains = ", ".join(f"{title} {_signed(part, name, control)}" for title, control in controls.items())
            line += f" {gains[0].upper()}{gains[1:]}."
        lost = _lost(part, name)
        lines.append(line + (f" It loses most in {lost}." if lost else ""))
    head = (
        f"Clips of 16 frames, {len(part.head['questions'])} questions. Behind each control: by how much more the method"
    )
    head += " gets right, and a 95 % interval (clips drawn anew); below zero the control is better."
    return [head, "\n".join(lines)]


def _lost(part: Part, name: str) -> str:
    falls = {k: part.accuracy("dense", k).mean - part.accuracy(name, k).mean for k in QUESTION_TYPES}
    worst = sorted((k for k in falls if falls[k] >= 0.1), key=lambda k: -falls[k])[:2]
    return " and ".join(f"`{kind}` (-{falls[kind]:.2f})" for kind in worst)


def _streaming(method: str, part: Part) -> list[str]:
    lines = []
    far = (AGES[-2][0], AGES[-1][1])
    for name in part.of(method):
        memory = part.setting(name)["memory"]
        others = [n for n in part.names if part.setting(n)["memory"] == memory and part.setting(n)["role"] == "control"]
        line = (
            f"- {name}: {part.mean(name, 'kv_tokens'):.0f} tokens of {part.mean(name, 'frames_held'):.0f} frames held: "
            f"{part.accuracy(name)}; facts {far[0]} frames old or more {part.accuracy(name, ages=far).mean:.2f}."
        )
        if others:
            gains = ", ".join(f"{n} {_signed(part, name, n)}" for n in others)
            line += f" {gains[0].upper()}{gains[1:]}." if gains[0].isupper() else f" Against {gains}."
        lines.append(line)
    whole = next((n for n in part.names if part.setting(n)["role"] == "dense"), None)
    asked = len(part.head["questions"])
    head = f"Streams of 64 frames, {asked} questions at their end, memory of a given number of tokens."
    if whole:
        head += f" With everything held: {part.accuracy(whole)}."
    return [head, "\n".join(lines)]


_READ: Mapping[str, Callable[[str, Part], list[str]]] = {"offline": _offline, "streaming": _streaming}


def _reuse(part: Part) -> list[str]:
    skips = sorted((n for n in part.names if n.startswith("skip")), key=lambda n: part.mean(n, "multiply_add_share"))
    x = [part.mean(n, "multiply_add_share") for n in skips]
    lines = []
    for name in (n for n in part.names if not n.startswith("skip")):
        share = part.mean(name, "multiply_add_share")
        line = f"- {name}: {share:.2f} of the tower's multiply-adds, answers {part.accuracy(name)}"
        if len(skips) > 1 and x[0] <= share <= x[-1]:
            answers = np.interp(share, x, [part.accuracy(n).mean for n in skips])
            line += f", skipping frames at equal cost {answers:.2f}. Error of the tower, reuse and skipping: "
            line += ", ".join(
                f"{kind} {tower_error(part, name, kind):.3f} and "
                f"{np.interp(share, x, [tower_error(part, n, kind) for n in skips]):.3f}"
                for kind in ("static", "panning", "cut")
            )
        lines.append(line + ".")
    head = (
        "Reuse beside skipping: skipped frames take the tower's output of the last frame that was computed; figures "
        "for skipping are interpolated between the shares that were run."
    )
    return [head, "\n".join(lines)]


def _scorers(part: Part) -> list[str]:
    lines = []
    for keep in sorted({e["keep"] for n in part.names for e in part.entries(n)}, reverse=True):
        mine = {part.entries(n)[0]["scorer"]: n for n in part.names if part.entries(n)[0]["keep"] == keep}
        marks = ", ".join(f"{scorer} {part.accuracy(n)}" for scorer, n in mine.items())
        line = f"- keep={keep:g}, {part.mean(next(iter(mine.values())), 'tokens'):.0f} tokens: {marks}."
        if {"oracle", "uniform"} <= set(mine):
            line += f" Oracle over uniform {_signed(part, mine['oracle'], mine['uniform'])}."
        lines.append(line)
    head = (
        "QuoTA by its scorer. The oracle gives frames with evidence 1 and others .1; noisy ones take that many frames "
        "for the other kind; uniform scores make it plain resizing."
    )
    return [head, "\n".join(lines)]


def _carriers(part: Part) -> list[str]:
    lines = [
        f"- {name}: {part.accuracy(name)} with {part.mean(name, 'kv_tokens'):.0f} tokens held; facts 30 frames old or "
        f"more {part.accuracy(name, ages=(30, 63)).mean:.2f}."
        for name in part.names
    ]
    models = ", ".join(sorted({run["model"] for run in part.runs.values()}))
    return [f"Ablations in streams of 64 frames, model {models}.", "\n".join(lines)]


def method_page(method: str, parts: Mapping[str, Part]) -> str | None:
    """Markdown of a method's evidence, for its card; None where there is none."""
    text = reading(method, parts)
    if not text:
        return None
    tables = []
    for name in ("offline", "streaming"):
        if name in parts and parts[name].of(method):
            part = parts[name]
            mine = part.of(method)
            controls = [n for n in part.names if part.setting(n)["role"] != "method"]
            tables.append(table(part, [*mine, *controls]))
            if name == "streaming":
                tables.append(age_table(part, [*mine, *controls]))
    if method == "stccacher" and "cacher" in parts:
        tables.append(cacher_table(parts["cacher"]))
    if method in ("quota", "videoscan") and method in parts:
        tables.append(table(parts[method]))
    seeds = max(len(part.runs) for part in parts.values())
    head = (
        f"On tiny-llava-video (training seeds: {seeds}), a model of 3 M parameters on generated clips: it shows "
        "whether a method keeps what a question needs, and need not rank methods as a large model would."
    )
    return "\n\n".join([head, "![accuracy](video.png)", *text, *tables]) + "\n"


def report(parts: Mapping[str, Part]) -> str:
    """Markdown of all parts."""
    text = [
        "# Video methods on tiny-llava-video",
        "Made by `python -m mmtoken.evaluation.video_figures`; ranges are over training seeds.",
    ]
    for name, part in parts.items():
        text.append(f"## {name}")
        for key, run in {**part.runs, **part.partial}.items():
            done = f", {len(run['results'])} settings so far, in no number here" if key in part.partial else ""
            text.append(f"- {key}: {run['clips']} clips of {part.head['frames']} frames{done}")
        if name == "cacher":
            text += [*_reuse(part), cacher_table(part)]
        elif name == "quota":
            text += [*_scorers(part), table(part)]
        else:
            text.append(table(part))
            if name != "offline":
                text.append(age_table(part))
        refused = {n: why for run in part.runs.values() for n, why in run["refused"].items()}
        if refused:
            text.append("Not run:\n\n" + "\n".join(f"- {n}: {why}" for n, why in refused.items()))
    return "\n\n".join(text) + "\n"


def summary(parts: Mapping[str, Part]) -> str:
    """Markdown for the model's card: who leads at each budget, and what a bounded memory costs."""
    text = []
    if "offline" in parts:
        part = parts["offline"]
        lines = []
        for tokens in (128, 64, 32):
            close = [n for n in part.names if abs(part.mean(n, "layer_average") - tokens) < 0.15 * tokens]
            ranked = sorted(close, key=lambda n: -part.accuracy(n).mean)
            lines.append(
                f"- about {tokens} tokens per layer: " + ", ".join(f"{n} {part.accuracy(n).mean:.2f}" for n in ranked)
            )
        text += [
            f"Offline, {len(part.head['questions'])} questions, mean over {len(part.runs)} seeds; dense "
            f"{part.accuracy('dense')}:",
            "\n".join(lines),
            "![accuracy against tokens](video-offline.png)",
        ]
    if "streaming" in parts:
        part = parts["streaming"]
        lines = []
        for memory in (512, 256, 128):
            ranked = sorted(
                (n for n in part.names if part.setting(n)["memory"] == memory), key=lambda n: -part.accuracy(n).mean
            )
            lines.append(
                f"- memory of {memory} tokens: "
                + ", ".join(f"{n.rsplit(' ', 1)[0]} {part.accuracy(n).mean:.2f}" for n in ranked)
            )
        whole = next((n for n in part.names if part.setting(n)["role"] == "dense"), part.names[0])
        text += [
            f"Streams of 64 frames, {len(part.head['questions'])} questions; everything held {part.accuracy(whole)}:",
            "\n".join(lines),
            "![recall against age](video-streaming.png)",
        ]
    if "cacher" in parts:
        text.append("![reuse in the tower](video-cacher.png)")
    if "quota" in parts:
        text.append("![QuoTA by its scorer](video-quota.png)")
    return "\n\n".join([*text, "All numbers: [video.md](video.md)."])
