"""Pictures of accuracy against measured tokens, FLOPs and time, drawn from the results that `accuracy.evaluate` gives.

One line per method, one marker per budget. Methods have colours, controls are grey and dashed, the dense model is a
black level: what a method must beat and what it gives up can be read off without the legend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtoken.errors import MMTokenError
from mmtoken.evaluation.accuracy import ALL
from mmtoken.evaluation.lineup import DENSE
from mmtoken.wholefile import whole_file

Row = Mapping[str, Any]

# Told apart without red against green; a second round of the colours gets other markers.
COLOURS = ("#0b66b0", "#d1500f", "#0f8a5f", "#a0429b", "#b8860b", "#2aa5c9", "#7a4b2a", "#5b5bd6")
_MARKERS = "oDsv"
_GREYS = (("#6b6b6b", ":", "x"), ("#6b6b6b", "--", "s"), ("#9a9a9a", "-.", "^"), ("#9a9a9a", "--", "D"))
_INK = "#222222"


@dataclass(frozen=True)
class Axis:
    """What stands below a picture.

    Attributes:
        name: end of the file name.
        label: of the axis, with the unit.
        value: (row, benchmark) -> number.
        logarithmic: whether each step to the right doubles.
        against: what the headline calls it.
        cache_only: whether methods are shown that let every layer process all tokens, and only shrink the cache.
    """

    name: str
    label: str
    value: Callable[[Row, str], float]
    logarithmic: bool
    against: str
    cache_only: bool = True


AXES = (
    Axis(
        "tokens",
        "visual tokens (measured, average over decoder layers)",
        lambda r, b: r["layer_average"][b],
        True,
        "visual tokens",
        cache_only=False,
    ),
    Axis(
        "flops",
        "FLOPs of the decoder's prefill, millions per question",
        lambda r, b: r["flops"][b] / 1e6,
        True,
        "FLOPs",
        cache_only=False,
    ),
    Axis(
        "cache",
        "key/value cache after the prefill, % of the dense model's (text included)",
        lambda r, b: 100 * r["kv_share"][b],
        True,
        "bytes of the cache",
    ),
    Axis("time", "time to the first token, ms per question", lambda r, b: r["first_token_ms"]["median"], False, "time"),
    Axis(
        "scoring",
        "time inside the compressor, scores included, ms per question",
        lambda r, b: r["scoring_ms"][b],
        False,
        "scoring time",
    ),
)


def draw_all(results: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Every picture of one accuracy run, as `<stem>-<name>.png` in `folder`.

    Args:
        results: what `accuracy.evaluate` returned, or the same read from JSON.
        folder: exists.
        stem: start of the file names.

    Returns:
        The files written.

    Raises:
        MMTokenError: matplotlib (the `plot` extra) is not installed.
    """
    figures = {axis.name: accuracy_figure(results, axis) for axis in AXES}
    figures["types"] = types_figure(results, AXES[0])
    files = []
    for name, figure in figures.items():
        file = folder / f"{stem}-{name}.png"
        with whole_file(file) as temporary:
            figure.savefig(temporary, dpi=130)
        files.append(file)
    return files


def accuracy_figure(results: Mapping[str, Any], axis: Axis) -> Any:
    """A matplotlib Figure with one panel per benchmark: accuracy over all its questions against `axis`."""
    titles: Mapping[str, str] = results["titles"]
    figure = _figure(4.7 * len(titles) + 1.6, max(4.3, _legend_height(results)))
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for panel, (benchmark, title) in zip(panels, titles.items(), strict=True):
        _panel(panel, results, benchmark, ALL, axis)
        asked = results["split"]["questions"][benchmark]
        panel.set_title(f"{title} ({asked} questions)", fontsize=10.5, loc="left", color=_INK)
        panel.set_xlabel(axis.label, fontsize=9)
    panels[0].set_ylabel("accuracy on held-out pictures", fontsize=9)
    _legend(figure, panels[0])
    figure.suptitle(_headline(results, axis), fontsize=11.5, x=0.01, ha="left", color=_INK)
    return figure


def types_figure(results: Mapping[str, Any], axis: Axis, columns: int = 3) -> Any:
    """A matplotlib Figure with one small panel per question type."""
    kinds = [
        (benchmark, kind, kind if len(table) > 2 else results["titles"][benchmark].lower())
        for benchmark, table in results["baselines"].items()
        for kind in table
        if kind != ALL
    ]
    rows = -(-len(kinds) // columns)
    figure = _figure(3.0 * columns + 1.7, max(2.35 * rows + 0.6, _legend_height(results)))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (benchmark, kind, title) in zip(panels, kinds, strict=False):
        _panel(panel, results, benchmark, kind, axis, size=3.2)
        panel.set_title(title, fontsize=9.5, loc="left", color=_INK)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel(axis.label, fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    _legend(figure, panels[0])
    figure.suptitle(f"{_headline(results, axis)}, by type of question", fontsize=11.5, x=0.01, ha="left", color=_INK)
    return figure


def styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Line style of each method (title -> matplotlib keywords), controls last."""
    methods = dict.fromkeys(row["title"] for row in rows if not row["control"])
    controls = dict.fromkeys(row["title"] for row in rows if row["control"] and row["method"] != DENSE)
    found: dict[str, dict[str, Any]] = {}
    for i, title in enumerate(methods):
        marker = _MARKERS[i // len(COLOURS) % len(_MARKERS)]
        found[title] = {"color": COLOURS[i % len(COLOURS)], "linestyle": "-", "marker": marker, "linewidth": 1.8}
    for i, title in enumerate(controls):
        colour, line, marker = _GREYS[i % len(_GREYS)]
        found[title] = {"color": colour, "linestyle": line, "marker": marker, "linewidth": 1.3}
    return found


def check_matplotlib() -> None:
    """Do nothing if pictures can be drawn: ask before the work, not after it.

    Raises:
        MMTokenError: matplotlib (the `plot` extra) is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MMTokenError(
            "pictures need matplotlib, which is not installed; run: pip install 'mmtoken[plot]'"
        ) from error


def _figure(width: float, height: float) -> Any:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _legend_height(results: Mapping[str, Any]) -> float:
    """Inches that the legend needs: a line per method and control, and some for headings and levels."""
    return 0.19 * (len(styles(results["results"])) + 7)


def _headline(results: Mapping[str, Any], axis: Axis) -> str:
    device = f" ({results['environment']['device']})" if "ms" in axis.label else ""
    return f"{results['model']}: accuracy against {axis.against}{device}"


def _shown(rows: Sequence[Row], benchmark: str, axis: Axis) -> list[Row]:
    """Rows that have a place on an axis."""
    return [
        row
        for row in rows
        if axis.cache_only or row["method"] == DENSE or row["layer_average"][benchmark] < row["tokens_in"][benchmark]
    ]


def _panel(panel: Any, results: Mapping[str, Any], benchmark: str, kind: str, axis: Axis, size: float = 4.5) -> None:
    rows = _shown(results["results"], benchmark, axis)
    dense = next(row for row in rows if row["method"] == DENSE)
    score = dense["accuracy"][benchmark][kind]
    panel.axhspan(score["low"], score["high"], color="#000000", alpha=0.06, linewidth=0)
    panel.axhline(score["accuracy"], color=_INK, linewidth=1.2, label="dense", zorder=1)
    baseline = results["baselines"][benchmark][kind]
    panel.axhline(baseline, color="#b0b0b0", linewidth=1, linestyle=(0, (1, 2)), label="most frequent answer", zorder=1)
    for title, style in styles(results["results"]).items():
        if all(row["title"] != title for row in rows):
            continue
        points = sorted(
            (axis.value(row, benchmark), *(row["accuracy"][benchmark][kind][k] for k in ("accuracy", "low", "high")))
            for row in rows
            if row["title"] == title
        )
        x, y, low, high = zip(*points, strict=True)
        panel.vlines(x, low, high, color=style["color"], alpha=0.28, linewidth=1.4, zorder=2)
        panel.plot(x, y, label=title, markersize=size, zorder=3, **style)
    value = axis.value(dense, benchmark)
    panel.plot([value], [score["accuracy"]], color=_INK, marker="*", markersize=2 * size, linestyle="none", zorder=4)
    if axis.logarithmic:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    else:
        panel.set_xlim(left=0)
    panel.set_ylim(-0.02, 1.02)
    panel.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    panel.grid(color="#000000", alpha=0.08, linewidth=0.8)
    panel.tick_params(labelsize=8.5, length=0, labelcolor="#444444")
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color("#999999")


def _legend(figure: Any, panel: Any) -> None:
    """Methods, controls and levels as three groups beside the panels."""
    from matplotlib.lines import Line2D

    lines = {line.get_label(): line for line in panel.get_lines() if not line.get_label().startswith("_")}
    levels = ("dense", "most frequent answer")
    methods = [n for n in lines if n not in levels and lines[n].get_linestyle() == "-"]
    controls = [n for n in lines if n not in levels and n not in methods]
    entries: list[tuple[Any, str]] = []
    for heading, names in (("Methods", methods), ("Controls", controls), ("Levels", [n for n in levels if n in lines])):
        entries.append((Line2D([], [], linestyle="none"), heading))
        entries += [(lines[name], name) for name in names]
    entries.append((Line2D([], [], linestyle="none"), "bars, band: 95 % interval"))
    legend = figure.legend(
        [handle for handle, _ in entries],
        [text for _, text in entries],
        loc="outside right center",
        frameon=False,
        fontsize=8.5,
        handlelength=2.6,
    )
    for text in legend.get_texts():
        if text.get_text() in ("Methods", "Controls", "Levels"):
            text.set_fontweight("bold")
