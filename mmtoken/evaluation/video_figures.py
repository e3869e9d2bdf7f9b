"""Pictures and tables of the video evidence, made from the files that `mmtoken.evaluation.video` wrote.

    python -m mmtoken.evaluation.video_figures --results models/tiny_llava_video \\
        --metrics models/tiny_llava_video/metrics

Draws what there is results for, and writes `video.md` with the numbers behind the pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtoken.datasets.moving_shapes import QUESTION_TYPES
from mmtoken.errors import InputError
from mmtoken.evaluation.metrics import wilson
from mmtoken.evaluation.pictures import check_matplotlib
from mmtoken.wholefile import whole_file

AGES = ((0, 4), (5, 14), (15, 29), (30, 44), (45, 63))
"""Frames since the evidence was last visible, first and last of each group."""

_MARKS = "osD^v<>PXh"


def marks(results: Mapping[str, Any], name: str) -> list[tuple[dict[str, Any], int]]:
    """(question, right or not) of a setting."""
    return list(zip(results["questions"], results["results"][name]["correct"], strict=True))


def share(found: Sequence[int]) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval."""
    low, high = wilson(sum(found), len(found))
    return {"accuracy": sum(found) / len(found) if found else float("nan"), "low": low, "high": high, "n": len(found)}


def by_type(results: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Accuracy per question type that was asked, and over all ("all")."""
    pairs = marks(results, name)
    found = {"all": share([mark for _, mark in pairs])}
    for kind in QUESTION_TYPES:
        mine = [mark for question, mark in pairs if question["type"] == kind]
        if mine:
            found[kind] = share(mine)
    return found


def by_age(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Accuracy per group of `AGES`."""
    pairs = marks(results, name)
    return [share([mark for question, mark in pairs if low <= question["age"] <= high]) for low, high in AGES]


def by_motion(results: Mapping[str, Any], name: str, groups: int = 3) -> list[dict[str, Any]]:
    """Accuracy for clips of little to much camera motion, in groups of about the same size, with their mean motion."""
    pairs = marks(results, name)
    order = np.argsort([question["motion"] for question, _ in pairs], kind="stable")
    return [
        {
            **share([pairs[i][1] for i in part]),
            "motion": float(np.mean([pairs[i][0]["motion"] for i in part])),
        }
        for part in np.array_split(order, groups)
    ]


def families(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Settings of one method (or control) by its name, in the order of the file."""
    found: dict[str, list[str]] = {}
    for name, entry in results["results"].items():
        setting = entry["setting"]
        family = setting["method"] or ("fewer frames" if setting["frames"] else name)
        if family.startswith("oldest leave"):
            family = "oldest leave"
        found.setdefault(family, []).append(name)
    return found


def draw_tokens(results: Mapping[str, Any], picture: Path) -> None:
    """Accuracy against tokens, one panel over all types and one per type."""
    figure, panels = _panels(2, 4, (17, 8))
    groups = families(results)
    for panel, kind in zip(panels, ("all", *QUESTION_TYPES), strict=True):
        for number, (family, names) in enumerate(groups.items()):
            entries = [results["results"][name] for name in names]
            x = [entry["layer_average"] for entry in entries]
            y = [by_type(results, name).get(kind, share([]))["accuracy"] for name in names]
            control = entries[0]["setting"]["role"] != "method"
            panel.plot(
                x,
                y,
                linestyle="--" if control else "-",
                marker=_MARKS[number % len(_MARKS)],
                color="black" if family == "dense" else f"C{number % 10}",
                label=family,
                linewidth=1.2,
                markersize=4,
            )
        panel.set(title=kind, xscale="log", xlabel="visual tokens per layer (of 256)", ylim=(0, 1.03))
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _save(figure, picture)


def draw_ages(results: Mapping[str, Any], picture: Path) -> None:
    """Recall against the age of the asked fact, a panel per memory size."""
    sizes = sorted({e["setting"]["memory"] for e in results["results"].values()}, reverse=True)
    sizes = [size for size in sizes if size in (512, 256, 128)]
    figure, panels = _panels(1, max(1, len(sizes)), (5.6 * max(1, len(sizes)), 4.4))
    x = range(len(AGES))
    for panel, size in zip(panels, sizes, strict=False):
        for number, (name, entry) in enumerate(results["results"].items()):
            setting = entry["setting"]
            if setting["memory"] != size and setting["role"] != "dense":
                continue
            found = by_age(results, name)
            panel.plot(
                x,
                [f["accuracy"] for f in found],
                marker=_MARKS[number % len(_MARKS)],
                linestyle="--" if setting["role"] == "control" else "-",
                color="black" if setting["role"] == "dense" else f"C{number % 10}",
                label=name,
                linewidth=1.2,
            )
        panel.set(title=f"{size} tokens held", xlabel="frames since the evidence was last visible", ylim=(0, 1.03))
        panel.set_xticks(list(x), [f"{low}-{high}" for low, high in AGES])
        panel.legend(fontsize=7)
    panels[0].set_ylabel("accuracy")
    _save(figure, picture)


def draw_cacher(results: Mapping[str, Any], picture: Path) -> None:
    """Reuse in the tower beside skipped frames, at equal multiply-adds: error per kind of frame, and accuracy."""
    figure, panels = _panels(1, 4, (18, 4.4))
    groups: dict[str, list[str]] = {}
    for name in results["results"]:
        groups.setdefault("skipped frames" if name.startswith("skip") else name.rsplit(" ", 1)[0], []).append(name)
    for number, (family, names) in enumerate(groups.items()):
        entries = sorted((results["results"][name] for name in names), key=lambda e: e["multiply_add_share"])
        x = [entry["multiply_add_share"] for entry in entries]
        style = {"marker": _MARKS[number], "label": family, "linestyle": "--" if family.startswith("skip") else "-"}
        for panel, kind in zip(panels, ("static", "panning", "cut"), strict=False):
            panel.plot(x, [entry["error"].get(kind, float("nan")) for entry in entries], **style)
        panels[3].plot(x, [np.mean(entry["correct"]) for entry in entries], **style)
    for panel, kind in zip(panels, ("static", "panning", "cut"), strict=False):
        panel.set(title=f"frames: {kind}", xlabel="multiply-adds of the tower, share", ylim=(0, None))
    panels[3].set(title="answers", xlabel="multiply-adds of the tower, share", ylim=(0, 1.03), ylabel="accuracy")
    panels[0].set_ylabel("relative error of the tower's patches")
    panels[3].legend(fontsize=8)
    _save(figure, picture)


def draw_scorers(results: Mapping[str, Any], picture: Path) -> None:
    """QuoTA's accuracy against its budget, one line per scorer."""
    figure, panels = _panels(1, 1, (6.4, 4.6))
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in results["results"].values():
        lines.setdefault(entry["scorer"], []).append(entry)
    for number, (scorer, entries) in enumerate(lines.items()):
        entries = sorted(entries, key=lambda e: e["keep"])
        y = [np.mean(entry["correct"]) for entry in entries]
        panels[0].plot([e["tokens"] for e in entries], y, marker=_MARKS[number], label=scorer)
    panels[0].set(xlabel="tokens per clip (of 256)", ylabel="accuracy", title="QuoTA by its scorer", ylim=(0, 1.03))
    panels[0].legend(fontsize=8)
    _save(figure, picture)


def draw_curves(runs: Mapping[str, Mapping[str, Any]], picture: Path) -> None:
    """Validation accuracy per type against minutes, a panel per run."""
    figure, panels = _panels(1, len(runs), (5.6 * len(runs), 4.4))
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        for number, kind in enumerate(QUESTION_TYPES):
            checks = [row for row in run["checks"] if kind in row["accuracy"]]
            panel.plot(
                [row["seconds"] / 60 for row in checks],
                [row["accuracy"][kind] for row in checks],
                label=kind,
                color=f"C{number}",
            )
        panel.set(title=name, xlabel="minutes", ylim=(0, 1.03))
    panels[0].set_ylabel("validation accuracy")
    panels[-1].legend(fontsize=8)
    _save(figure, picture)


def table(results: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> str:
    """Markdown: a row per setting with its accuracy per type, and numbers of the entry by (title, key)."""
    kinds = [kind for kind in QUESTION_TYPES if any(q["type"] == kind for q in results["questions"])]
    lines = [
        "| setting | " + " | ".join(title for title, _ in columns) + " | all | " + " | ".join(kinds) + " |",
        "|---|" + "---|" * (len(columns) + 1 + len(kinds)),
    ]
    for name, entry in results["results"].items():
        found = by_type(results, name)
        whole = found["all"]
        numbers = " | ".join(f"{entry.get(key, float('nan')):.4g}" for _, key in columns)
        cells = " | ".join(f"{found[kind]['accuracy']:.2f}" for kind in kinds)
        accuracy = f"{whole['accuracy']:.3f} ({whole['low']:.2f}-{whole['high']:.2f})"
        lines.append(f"| {name} | {numbers} | {accuracy} | {cells} |")
    return "\n".join(lines)


def age_table(results: Mapping[str, Any]) -> str:
    """Markdown: accuracy per age of the asked fact."""
    head = " | ".join(f"{low}-{high}" for low, high in AGES)
    first = by_age(results, next(iter(results["results"])))
    lines = [
        f"| setting | tokens held | {head} |",
        "|---|---|" + "---|" * len(AGES),
        "| questions | | " + " | ".join(str(found["n"]) for found in first) + " |",
    ]
    for name, entry in results["results"].items():
        cells = " | ".join(f"{found['accuracy']:.2f}" for found in by_age(results, name))
        lines.append(f"| {name} | {entry['kv_tokens']:.0f} | {cells} |")
    return "\n".join(lines)


def cacher_table(results: Mapping[str, Any]) -> str:
    """Markdown: multiply-adds, errors per kind of frame, accuracy in all and by motion of the clip."""
    first = by_motion(results, next(iter(results["results"])))
    motions = " | ".join(f"clips with {found['motion']:.2f} moving frames" for found in first)
    lines = [
        f"| setting | multiply-adds | error static | panning | cut | accuracy | {motions} |",
        "|---|" + "---|" * (5 + len(first)),
    ]
    ordered = sorted(results["results"].items(), key=lambda item: item[1]["multiply_add_share"])
    for name, entry in ordered:
        errors = " | ".join(f"{entry['error'].get(kind, float('nan')):.3f}" for kind in ("static", "panning", "cut"))
        cells = " | ".join(f"{found['accuracy']:.2f}" for found in by_motion(results, name))
        accuracy = f"{np.mean(entry['correct']):.3f}"
        lines.append(f"| {name} | {entry['multiply_add_share']:.2f} | {errors} | {accuracy} | {cells} |")
    return "\n".join(lines)


_SPEED = (
    ("frames/s", "fps"),
    ("first token ms", "ttft_ms"),
    ("tokens held", "kv_tokens"),
    ("frames held", "frames_held"),
)
_COST = (("tokens", "tokens"), ("per layer", "layer_average"), ("FLOPs", "flops_share"), ("scoring ms", "scoring_ms"))


def report(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of all parts that there are results of."""
    parts = ["# Video methods on tiny-llava-video", "Made by `python -m mmtoken.evaluation.video_figures`."]
    for part, results in found.items():
        asked = len(results["questions"])
        parts.append(f"## {part}: {results['clips']} clips of {results['frames']} frames, {asked} questions")
        if part == "cacher":
            parts.append(cacher_table(results))
        elif part == "quota":
            parts.append(table(results, (("tokens", "tokens"), ("scorer ms", "scorer_ms"))))
        elif part == "offline":
            parts.append(table(results, _COST))
        else:
            parts += [table(results, _SPEED), age_table(results)]
        if results["refused"]:
            parts.append("Not run:\n\n" + "\n".join(f"- {name}: {why}" for name, why in results["refused"].items()))
    return "\n\n".join(parts) + "\n"


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _save(figure: Any, picture: Path) -> None:
    with whole_file(picture) as file:
        figure.savefig(file, dpi=100)


_DRAW = {"offline": draw_tokens, "streaming": draw_ages, "cacher": draw_cacher, "quota": draw_scorers}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmtoken.evaluation.video_figures", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder of video-<part>.json; pictures go there")
    parser.add_argument("--metrics", type=Path, default=None, help="folder of the metrics.json of training runs")
    options = parser.parse_args(argv)
    found = {}
    for part in ("offline", "streaming", "cacher", "quota", "videoscan"):
        file = options.results / f"video-{part}.json"
        if file.is_file():
            found[part] = json.loads(file.read_text())
            if part in _DRAW:
                _DRAW[part](found[part], options.results / f"video-{part}.png")
    if not found:
        raise InputError(f"results={str(options.results)!r} holds no video-<part>.json; run mmtoken.evaluation.video.")
    with whole_file(options.results / "video.md") as target:
        target.write_text(report(found))
    if options.metrics is not None:
        runs = {file.stem: json.loads(file.read_text()) for file in sorted(options.metrics.glob("*.json"))}
        draw_curves(runs, options.results / "curve.png")
    sys.stdout.write(f"wrote video.md and pictures of {', '.join(found)} to {options.results}\n")


if __name__ == "__main__":
    main()
