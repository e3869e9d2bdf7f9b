"""Tables and pictures of the closed-loop evidence, from what `mmtoken.evaluation.closed_loop` measured.

    python -m mmtoken.evaluation.closed_loop_figures --out compressors/vlapruner

reads `control.json` and its shares there, and writes `control.json` (everything, in one file), `control.md` and
`control.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtoken.errors import InputError
from mmtoken.evaluation.lineup import DENSE
from mmtoken.evaluation.metrics import paired_difference, wilson
from mmtoken.evaluation.pictures import check_matplotlib, styles
from mmtoken.evaluation.tables import Table
from mmtoken.wholefile import whole_file

OVERLAP, TIME = "overlap", "time"
PAPER_OVERLAP = {"prefill and action": (72, 59, 52), "consecutive actions": (95, 93, 89)}
"""Per cent at 50, 25 and 12.5 % kept, OpenVLA on LIBERO (arXiv 2511.16449)."""

_KEEPS = ("0.5", "0.25", "0.125")
_INK = "#222222"


def joined(folder: Path) -> dict[str, Any]:
    """The content of `control.json` and its shares.

    Raises:
        InputError: there are none, or they are about different policies, episodes or cells.
    """
    files = [*sorted(folder.glob("control-[0-9]*.json")), *folder.glob("control.json")]
    if not files:
        raise InputError(f"out={str(folder)!r} holds no control.json; run mmtoken.evaluation.closed_loop first.")
    contents = [json.loads(file.read_text()) for file in files]
    whole: dict[str, Any] = contents[0]
    for content in contents[1:]:
        if any(content[key] != whole[key] for key in ("schema_version", "weights", "seeds", "cells")):
            raise InputError(f"out={str(folder)!r}: control files are about different policies, episodes or cells.")
        for policy, runs in content["runs"].items():
            whole["runs"].setdefault(policy, {}).update(runs)
    return whole


def complete(content: Mapping[str, Any]) -> bool:
    """Whether every task is among the results."""
    names, plans = list(content["seeds"]), [*content["cells"], OVERLAP]
    runs = content["runs"]
    return all(name in runs.get(policy, {}) for policy in names for name in plans) and TIME in runs[names[0]]


def summaries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per cell: success with its interval, what it is ahead of dense, tokens, time.

    Args:
        content: what `closed_loop.joined` gives, complete.
    """
    runs = content["runs"]
    names = list(content["seeds"])
    dense = [mark for name in names for mark in runs[name]["Dense"]["success"]]
    clock = runs[names[0]][TIME]["milliseconds"]
    rows = []
    for key, cell in content["cells"].items():
        mine = [runs[name][key] for name in names]
        marks = [mark for run in mine for mark in run["success"]]
        low, high = wilson(sum(marks), len(marks))
        ahead, ahead_low, ahead_high = paired_difference(marks, dense)
        tokens = {
            what: _mean([(run["tokens"][what], run["tokens"]["steps"]) for run in mine])
            if "tokens" in mine[0]
            else full
            for what, full in (
                ("layer_average", float(content["visual_tokens"])),
                ("tokens_left", float(content["visual_tokens"])),
                ("pruned_steps", 0.0),
                ("flops_share", 1.0),
            )
        }
        lengths = [length for run in mine for length in run["length"]]
        rows.append(
            {
                "name": key,
                "title": cell["title"],
                "method": DENSE if cell["compressor"] is None else key,
                "control": cell["role"] == "control",
                "role": cell["role"],
                "keep": cell["keep"],
                "episodes": len(marks),
                "successes": sum(marks),
                "success": round(sum(marks) / len(marks), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "by_policy": {
                    n: round(sum(r["success"]) / len(r["success"]), 4) for n, r in zip(names, mine, strict=True)
                },
                "ahead_of_dense": {
                    "difference": round(ahead, 4),
                    "low": round(ahead_low, 4),
                    "high": round(ahead_high, 4),
                },
                "mean_length": round(sum(lengths) / len(lengths), 2),
                **tokens,
                "step_ms": clock[key],
            }
        )
    return rows


def _mean(values: Sequence[tuple[float, int]]) -> float:
    """Of (value, weight) pairs."""
    return round(sum(value * weight for value, weight in values) / sum(weight for _, weight in values), 4)


def overlaps(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per pair of sets: per cent at every budget, mean over policies, its range, and what the paper prints."""
    each = [run[OVERLAP]["overlap"] for run in content["runs"].values()]
    found = {}
    for pair, paper in PAPER_OVERLAP.items():
        percent = {keep: [one[pair]["percent"][keep] for one in each] for keep in _KEEPS}
        found[pair] = {
            "percent": {keep: round(sum(values) / len(values), 1) for keep, values in percent.items()},
            "low": {keep: min(values) for keep, values in percent.items()},
            "high": {keep: max(values) for keep, values in percent.items()},
            "chance": {keep: round(100 * float(keep), 1) for keep in _KEEPS},
            "paper": dict(zip(_KEEPS, paper, strict=True)),
            "steps": sum(one[pair]["steps"] for one in each),
        }
    return found


def success_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Success, intervals, tokens and time of every cell."""
    return Table(
        (
            "cell", "success", "95 %", "ahead of dense", "95 %", "layer-average tokens", "left", "FLOPs of dense",
            "ms per step",
        ),
        [
            (
                row["name"],
                f"{row['success']:.3f}",
                f"{row['low']:.2f}-{row['high']:.2f}",
                f"{row['ahead_of_dense']['difference']:+.3f}",
                f"{row['ahead_of_dense']['low']:+.2f} to {row['ahead_of_dense']['high']:+.2f}",
                f"{row['layer_average']:.1f}",
                f"{row['tokens_left']:.1f}",
                f"{row['flops_share']:.3f}",
                f"{row['step_ms']['median']:.1f} ({row['step_ms']['q1']:.1f}-{row['step_ms']['q3']:.1f})",
            )
            for row in rows
        ],
    )  # fmt: skip


def overlap_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Overlaps beside the paper's."""
    return Table(
        ("best tokens shared", *(f"{100 * float(keep):g} % kept" for keep in _KEEPS), "paper", "by chance"),
        [
            (
                pair,
                *(f"{one['percent'][k]:.0f} ({one['low'][k]:.0f}-{one['high'][k]:.0f})" for k in _KEEPS),
                " / ".join(f"{one['paper'][keep]}" for keep in _KEEPS),
                " / ".join(f"{one['chance'][keep]:g}" for keep in _KEEPS),
            )
            for pair, one in found.items()
        ],
    )


def report(content: Mapping[str, Any]) -> str:
    """Markdown of everything."""
    rows, names = content["summary"], list(content["seeds"])
    where = content["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    dense = rows[0]["by_policy"]
    minutes = sum(one["cpu_seconds"] for run in content["runs"].values() for one in run.values()) / 60
    return "\n\n".join(
        [
            f"{rows[0]['episodes']} paired episodes of `PickPlace` per row: {len(names)} policies that differ in their "
            f"training seed, each with {len(content['seeds'][names[0]])} scenes of its own, the same ones in all rows "
            f"(dense: {', '.join(f'{name} {rate:.2f}' for name, rate in dense.items())}). Success with its Wilson "
            "interval; the difference to dense with that of paired shares (Bonett and Price). Layer-average tokens: "
            f"{content['token_count']}. Milliseconds of a step of one episode, interleaved medians (quartiles), on "
            f"{where['device']} ({where['clock']}), {versions}.",
            "![success](control.png)",
            success_table(rows).markdown(),
            "Sets of best tokens that agree in dense episodes, per cent, with the range over policies: by attention of "
            "the prompt in the layer before the cut and by attention of the action tokens in the later layers, in one "
            "step; and by action tokens of two steps in a row.",
            overlap_table(content["overlap"]).markdown(),
            f"Made by `python -m mmtoken.evaluation.closed_loop --out compressors/vlapruner` in {minutes:.0f} "
            "CPU-minutes; every episode's outcome is in [control.json](control.json).",
        ]
    ) + "\n"  # fmt: skip


def figure(content: Mapping[str, Any]) -> Any:
    """A matplotlib Figure: success against tokens, against time, and the overlaps.

    Raises:
        MMTokenError: matplotlib (the `plot` extra) is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = content["summary"]
    drawn = Figure(figsize=(14, 5.2), layout="constrained", facecolor="white")
    panels = drawn.subplots(1, 3, width_ratios=(5, 5, 3))
    panels[1].sharey(panels[0])
    axes = (
        (lambda row: row["layer_average"], "visual tokens per step (average over layers and steps)"),
        (lambda row: row["step_ms"]["median"], "ms per step, tiny policy (one episode)"),
    )
    for panel, (value, label) in zip(panels, axes, strict=False):
        _success(panel, rows, value)
        panel.set_xlabel(label, fontsize=9)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    panels[0].set_ylabel(f"success in {rows[0]['episodes']} episodes", fontsize=9)
    _overlap(panels[2], content["overlap"])
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    drawn.suptitle(
        "PickPlace in closed loop, three training seeds (bars, band: 95 % interval)", fontsize=11.5, x=0.01, ha="left"
    )
    return drawn


def _success(panel: Any, rows: Sequence[Mapping[str, Any]], value: Any) -> None:
    dense = rows[0]
    panel.axhspan(dense["low"], dense["high"], color="#000000", alpha=0.06, linewidth=0)
    panel.axhline(dense["success"], color=_INK, linewidth=1.2, zorder=1)
    panel.plot(
        [value(dense)], [dense["success"]], color=_INK, marker="*", markersize=10, linestyle="none", label="Dense"
    )
    for title, style in styles(rows).items():
        mine = sorted((row for row in rows if row["title"] == title), key=value)
        x = [value(row) for row in mine]
        role = mine[0]["role"]
        line = {**style, "linestyle": (0, (4, 2))} if role == "ablation" else style
        panel.vlines(
            x, [r["low"] for r in mine], [r["high"] for r in mine], color=style["color"], alpha=0.3, linewidth=1.4
        )
        panel.plot(x, [row["success"] for row in mine], label=title, markersize=4.5, **line)
    panel.set_ylim(-0.02, 1.02)
    panel.grid(color="#000000", alpha=0.08, linewidth=0.8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(labelsize=8.5, length=0)


def _overlap(panel: Any, found: Mapping[str, Mapping[str, Any]]) -> None:
    places = range(len(_KEEPS))
    for (pair, one), color in zip(found.items(), ("#0b66b0", "#d1500f"), strict=True):
        panel.plot(places, [one["percent"][k] for k in _KEEPS], color=color, marker="o", label=pair)
        panel.plot(
            places, [one["paper"][k] for k in _KEEPS], color=color, marker="x", linestyle=":", label=f"{pair} (paper)"
        )
    chance = next(iter(found.values()))["chance"]
    panel.plot(places, [chance[k] for k in _KEEPS], color="#9a9a9a", linestyle="--", label="by chance")
    panel.set_xticks(list(places), [f"{100 * float(k):g} %" for k in _KEEPS])
    panel.set_ylim(0, 102)
    panel.set_ylabel("best tokens shared, %", fontsize=9)
    panel.set_xlabel("kept", fontsize=9)
    panel.grid(color="#000000", alpha=0.08, linewidth=0.8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(labelsize=8.5, length=0)
    panel.legend(frameon=False, fontsize=7.5, loc="lower left")


def write(content: Mapping[str, Any], out: Path) -> None:
    """`control.json`, `control.md` and `control.png` in `out`, each whole."""
    whole = {**content, "summary": summaries(content), "overlap": overlaps(content)}
    for name, text in (("control.json", json.dumps(whole) + "\n"), ("control.md", report(whole))):
        with whole_file(out / name) as file:
            file.write_text(text)
    with whole_file(out / "control.png") as file:
        figure(whole).savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmtoken.evaluation.closed_loop_figures", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    out = parser.parse_args(argv).out
    content = joined(out)
    if not complete(content):
        raise InputError(f"out={str(out)!r}: some cells are missing; run mmtoken.evaluation.closed_loop to its end.")
    write(content, out)


if __name__ == "__main__":
    main()
