"""What the card of the tiny LLaVA shows, made from files that lie beside it.

`metrics/<run>.csv` are Lightning's logs of the training runs; `accuracy-<model>.json` is what
`mmtoken bench --what accuracy --model <model> --out models/tiny_llava` writes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtoken.datasets.photo_digits import PHOTOGRAPHS
from mmtoken.datasets.shapes_qa import QUESTION_TYPES
from mmtoken.errors import MMTokenError
from mmtoken.models.tiny_llava.objective import PHOTO_NUMBER


def training_facts(metrics: Sequence[str | Path]) -> dict[str, Any]:
    """Steps and CPU minutes of a run from its metrics files, given in order where it was resumed."""
    rows = _rows(metrics)
    steps = max(int(row["step"]) for row in rows) + 1
    return {"steps": steps, "cpu_minutes": round(max(row["cpu"] for row in rows), 1)}


def plot_curves(runs: Mapping[str, Sequence[str | Path]], picture: str | Path) -> None:
    """Validation accuracy per question type against CPU minutes, one panel per run.

    Raises:
        MMTokenError: matplotlib (the `plot` extra) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MMTokenError(
            "plot_curves needs matplotlib, which is not installed; run: pip install mmtoken[plot]"
        ) from error
    figure = Figure(figsize=(6.4 * len(runs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for panel, (name, metrics) in zip(panels, runs.items(), strict=True):
        checks = [row for row in _rows(metrics) if row.get("val/accuracy")]
        for i, kind in enumerate((*QUESTION_TYPES, PHOTO_NUMBER)):
            values = [float(row.get(f"val/{kind}", "nan")) for row in checks]
            label = "number on photographs" if kind == PHOTO_NUMBER else kind
            panel.plot([row["cpu"] for row in checks], values, label=label, color=f"C{i}", linewidth=1.6)
        panel.set(title=name, xlabel="CPU minutes (one thread)", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy")
    panels[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(picture, dpi=110)


def result_table(accuracy: Mapping[str, Mapping[str, Any]], training: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracy table of the card, in Markdown.

    Args:
        accuracy: per model the content of its accuracy JSON; all asked the same questions.
        training: per model its `training_facts`.
    """
    first = next(iter(accuracy.values()))
    dense = {name: found["results"][0]["accuracy"] for name, found in accuracy.items()}
    lines = [
        "| question type | questions | majority | " + " | ".join(accuracy) + " |",
        "|---|---|---|" + "---|" * len(accuracy),
    ]
    for benchmark, title in first["titles"].items():
        for kind, row in first["results"][0]["accuracy"][benchmark].items():
            label = f"**{title}, all**" if kind == "all" else kind
            scores = [dense[name][benchmark][kind] for name in accuracy]
            cells = " | ".join(f"{s['accuracy']:.3f} ({s['low']:.2f}-{s['high']:.2f})" for s in scores)
            lines.append(f"| {label} | {row['total']} | {first['baselines'][benchmark][kind]:.3f} | {cells} |")
    steps = " | ".join(f"{training[name]['steps']} / {training[name]['cpu_minutes']:.0f}" for name in accuracy)
    lines.append(f"| training steps / CPU minutes | | | {steps} |")
    return "\n".join(lines)


def photograph_table() -> str:
    """The photographs behind PhotoDigits with their terms, in Markdown."""
    lines = ["| photograph | from | used for | licence | source |", "|---|---|---|---|---|"]
    lines += [f"| {p.name} | {p.package} | {p.split} | {p.license} | {p.source} |" for p in PHOTOGRAPHS]
    return "\n".join(lines)


def _rows(metrics: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Rows of the CSV files, each with the CPU minutes spent by then under "cpu"."""
    rows: list[dict[str, Any]] = []
    minutes = 0.0
    for path in metrics:
        with Path(path).open(newline="") as file:
            for row in csv.DictReader(file):
                minutes = float(row["train/cpu_minutes"] or minutes)
                rows.append({**row, "cpu": minutes})
    return rows
