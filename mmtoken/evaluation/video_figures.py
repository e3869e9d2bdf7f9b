"""Pictures, tables and readings of the video evidence, from what `mmtoken.evaluation.video` wrote for several seeds.

    python -m mmtoken.evaluation.video_figures --evidence runs/evidence --out models/tiny_llava_video \\
        --metrics models/tiny_llava_video/metrics --cards compressors

`runs/evidence` holds a folder per training seed. `--out` gets the joined `video-<part>.json`, pictures, `video.md`, and
in its README what stands between `<!-- video -->` and `<!-- end -->`; it can be the evidence of a later call itself.
`--cards` gets `video.md` and `video.png` in the folders of the methods, which `mmtoken list compressors --cards` puts
into their cards.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtoken.datasets.moving_shapes import QUESTION_TYPES
from mmtoken.evaluation.pictures import check_matplotlib
from mmtoken.evaluation.video_results import (
    AGES,
    CARDS,
    Accuracy,
    Part,
    gather,
    method_page,
    report,
    summary,
    tower_error,
)
from mmtoken.wholefile import whole_file

_MARKS = "osD^v<>PXhd*"
_COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy", "lime")
"""Without grey, which is for controls."""
_CONTROLS = ("random", "uniformgrid", "downscale", "fewer frames", "oldest leave")


def family(part: Part, name: str) -> str:
    """The method or control that a setting belongs to."""
    setting = part.setting(name)
    if setting["method"]:
        return str(setting["method"])
    for control in ("fewer frames", "oldest leave"):
        if name.startswith(control):
            return control
    return name


def families(part: Part, names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Settings by the method or control that they belong to."""
    found: dict[str, list[str]] = {}
    for name in part.names if names is None else names:
        found.setdefault(family(part, name), []).append(name)
    return found


def _style(number: int, name: str) -> dict[str, Any]:
    if name in ("dense", "everything"):
        return {"color": "black", "marker": "*", "markersize": 9}
    control = name in _CONTROLS
    shade = f"{0.25 + 0.13 * _CONTROLS.index(name)}" if control else None
    return {
        "color": shade or _COLORS[number % len(_COLORS)],
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": "--" if control else "-",
        "linewidth": 1.2,
        "markersize": 4,
    }


def _line(panel: Any, x: Sequence[float], found: Sequence[Accuracy], label: str, style: Mapping[str, Any]) -> None:
    """Means over seeds, with a band from the lowest to the highest."""
    order = np.argsort(x)
    at = np.asarray(x, dtype=float)[order]
    low, mean, high = (np.array([getattr(f, key) for f in found])[order] for key in ("low", "mean", "high"))
    (drawn,) = panel.plot(at, mean, label=label, **style)
    panel.fill_between(at, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)


def draw_tokens(part: Part, picture: Path) -> None:
    """Accuracy against tokens, one panel over all types and one per type."""
    figure, panels = _panels(2, 4, (17, 8.4))
    for number, (name, settings) in enumerate(families(part).items()):
        x = [part.mean(setting, "layer_average") for setting in settings]
        for panel, kind in zip(panels, (None, *QUESTION_TYPES), strict=True):
            found = [part.accuracy(setting, kind) for setting in settings]
            if kind is None:
                _line(panel, x, found, name, _style(number, name))
            else:
                order = np.argsort(x)
                panel.plot(np.array(x)[order], np.array([f.mean for f in found])[order], **_style(number, name))
    for panel, title in zip(panels, ("all types; bands: over seeds", *QUESTION_TYPES), strict=True):
        panel.set(title=title, xscale="log", ylim=(0, 1.03), xlabel="visual tokens, mean over decoder layers")
        panel.set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
        panel.minorticks_off()
    for panel in (panels[0], panels[4]):
        panel.set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    _save(figure, picture)


def draw_ages(part: Part, picture: Path) -> None:
    """Recall against the age of the asked fact, a panel per memory size."""
    figure, panels = _panels(1, 3, (17.5, 4.8))
    for panel, size in zip(panels, (512, 256, 128), strict=True):
        for number, (name, settings) in enumerate(families(part).items()):
            mine = [s for s in settings if part.setting(s)["memory"] == size or part.setting(s)["role"] == "dense"]
            for setting in mine:
                found = [part.accuracy(setting, ages=group) for group in AGES]
                _line(panel, range(len(AGES)), found, name, _style(number, name))
        panel.set(title=f"{size} tokens held", xlabel="frames since the evidence was last visible", ylim=(0, 1.03))
        panel.set_xticks(range(len(AGES)), [f"{low}-{high}" for low, high in AGES])
    panels[0].set_ylabel("accuracy; bands: over seeds")
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=9)
    _save(figure, picture)


def draw_cacher(part: Part, picture: Path) -> None:
    """Reuse in the tower beside skipped frames, at equal multiply-adds: error per kind of frame, and accuracy."""
    figure, panels = _panels(1, 4, (18, 4.4))
    groups: dict[str, list[str]] = {}
    for name in part.names:
        groups.setdefault("skipped frames" if name.startswith("skip") else name.rsplit(" ", 1)[0], []).append(name)
    for number, (group, names) in enumerate(groups.items()):
        names = sorted(names, key=lambda n: part.mean(n, "multiply_add_share"))
        x = [part.mean(n, "multiply_add_share") for n in names]
        style = _style(number, group) | {"linestyle": "--" if group.startswith("skip") else "-"}
        for panel, kind in zip(panels, ("static", "panning", "cut"), strict=False):
            panel.plot(x, [tower_error(part, n, kind) for n in names], label=group, **style)
        _line(panels[3], x, [part.accuracy(n) for n in names], group, style)
    for panel, kind in zip(panels, ("static", "panning", "cut"), strict=False):
        panel.set(title=f"frames: {kind}", xlabel="multiply-adds of the tower, share", ylim=(0, None))
    panels[3].set(title="answers", xlabel="multiply-adds of the tower, share", ylabel="accuracy")
    panels[0].set_ylabel("relative error of the tower's patches")
    panels[0].legend(fontsize=8)
    _save(figure, picture)


def draw_scorers(part: Part, picture: Path) -> None:
    """QuoTA's accuracy against its budget, one line per scorer."""
    figure, panels = _panels(1, 1, (6.4, 4.6))
    lines: dict[str, list[str]] = {}
    for name in part.names:
        lines.setdefault(part.entries(name)[0]["scorer"], []).append(name)
    for number, (scorer, names) in enumerate(lines.items()):
        x = [part.mean(n, "tokens") for n in names]
        _line(
            panels[0], x, [part.accuracy(n) for n in names], scorer, {"marker": _MARKS[number], "color": f"C{number}"}
        )
    panels[0].set(xlabel="tokens per clip (of 256)", ylabel="accuracy", title="QuoTA by its scorer", ylim=(0, 1.03))
    panels[0].legend(fontsize=8, loc="lower right")
    _save(figure, picture)


def draw_ablations(part: Part, picture: Path) -> None:
    """Recall against age of VideoScan's settings."""
    figure, panels = _panels(1, 1, (6.8, 4.8))
    for number, name in enumerate(part.names):
        found = [part.accuracy(name, ages=group) for group in AGES]
        _line(panels[0], range(len(AGES)), found, name, {"marker": _MARKS[number % 12], "color": f"C{number % 10}"})
    panels[0].set(xlabel="frames since the evidence was last visible", ylabel="accuracy", ylim=(0, 1.03))
    panels[0].set_xticks(range(len(AGES)), [f"{low}-{high}" for low, high in AGES])
    panels[0].legend(fontsize=8)
    _save(figure, picture)


def draw_method(method: str, parts: Mapping[str, Part], picture: Path) -> None:
    """A method beside the controls: accuracy against tokens, and recall against age in the two smaller memories."""
    offline, live = parts.get("offline"), parts.get("streaming")
    offline = offline if offline is not None and offline.of(method) else None
    live = live if live is not None and live.of(method) else None
    sizes = (
        [] if live is None else [m for m in (256, 128) if any(live.setting(n)["memory"] == m for n in live.of(method))]
    )
    if live is not None and not sizes:
        sizes = [live.setting(live.of(method)[0])["memory"]]
    figure, panels = _panels(
        1, max(1, (offline is not None) + len(sizes)), (5.4 * max(1, bool(offline) + len(sizes)), 4.4)
    )
    at = 0
    if offline is not None:
        for number, (name, names) in enumerate(families(offline).items()):
            if name in (method, "dense", *_CONTROLS):
                x = [offline.mean(n, "layer_average") for n in names]
                bold = {"color": "C3", "linewidth": 2.2} if name == method else {}
                _line(panels[0], x, [offline.accuracy(n) for n in names], name, _style(number, name) | bold)
        panels[0].set(
            title="clips of 16 frames", xlabel="visual tokens, mean over layers", xscale="log", ylim=(0, 1.03)
        )
        panels[0].set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
        panels[0].minorticks_off()
        panels[0].legend(fontsize=7, loc="lower right")
        at = 1
    for panel, size in zip(panels[at:], sizes, strict=False):
        assert live is not None
        for number, (name, names) in enumerate(families(live).items()):
            if name not in (method, "everything", *_CONTROLS):
                continue
            for setting in names:
                if name == "everything" or live.setting(setting)["memory"] == size:
                    bold = {"color": "C3", "linewidth": 2.2} if name == method else {}
                    label = setting if name == method else name
                    _line(
                        panel,
                        range(len(AGES)),
                        [live.accuracy(setting, ages=g) for g in AGES],
                        label,
                        _style(number, name) | bold,
                    )
        panel.set(title=f"streams, at most {size} tokens", xlabel="age of the fact, frames", ylim=(0, 1.03))
        panel.set_xticks(range(len(AGES)), [f"{low}-{high}" for low, high in AGES])
        panel.legend(fontsize=7, loc="lower left")
    panels[0].set_ylabel("accuracy; bands: over seeds")
    _save(figure, picture)


def draw_curves(runs: Mapping[str, Mapping[str, Any]], picture: Path) -> None:
    """Validation accuracy per type against minutes: mean over the seeds and the band between them."""
    figure, panels = _panels(1, len(runs), (5.6 * len(runs), 4.4))
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        for number, kind in enumerate(QUESTION_TYPES):
            checks = [row for row in run["checks"] if kind in row["accuracy"]]
            x = [row["seconds"] / 60 for row in checks]
            panel.plot(x, [row["accuracy"][kind] for row in checks], label=kind, color=f"C{number}")
        panel.set(title=name, xlabel="minutes", ylim=(0, 1.03))
    panels[0].set_ylabel("validation accuracy")
    panels[-1].legend(fontsize=8, loc="center right")
    _save(figure, picture)


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
        figure.savefig(file, dpi=90)


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write_text(text)


DRAW: Mapping[str, Callable[[Part, Path], None]] = {
    "offline": draw_tokens,
    "streaming": draw_ages,
    "cacher": draw_cacher,
    "quota": draw_scorers,
    "videoscan": draw_ablations,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmtoken.evaluation.video_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--evidence", type=Path, required=True, help="a folder per seed, or an earlier --out")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model's card")
    parser.add_argument("--metrics", type=Path, default=None, help="folder of the metrics.json of training runs")
    parser.add_argument("--cards", type=Path, default=None, help="folder of the compressors' cards")
    options = parser.parse_args(argv)
    parts = gather(options.evidence)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        _write(options.out / f"video-{name}.json", json.dumps(part.to_dict()) + "\n")
        DRAW[name](part, options.out / f"video-{name}.png")
    _write(options.out / "video.md", report(parts))
    card = options.out / "README.md"
    if card.is_file():
        block = f"<!-- video -->\n{summary(parts)}\n<!-- end -->"
        _write(card, re.sub(r"<!-- video -->\n.*?<!-- end -->", lambda _: block, card.read_text(), flags=re.DOTALL))
    if options.metrics is not None:
        runs = {file.stem: json.loads(file.read_text()) for file in sorted(options.metrics.glob("seed*.json"))}
        draw_curves(runs, options.out / "curve.png")
    for method in CARDS if options.cards is not None else ():
        page = method_page(method, parts)
        if page is None:
            continue
        place = options.cards / method
        place.mkdir(parents=True, exist_ok=True)
        _write(place / "video.md", page)
        own = {"stccacher": "cacher", "quota": "quota", "videoscan": "videoscan"}.get(method)
        if own in parts:
            DRAW[str(own)](parts[str(own)], place / "video.png")
        else:
            draw_method(method, parts, place / "video.png")
    sys.stdout.write(f"wrote {', '.join(parts)} to {options.out}\n")


if __name__ == "__main__":
    main()
