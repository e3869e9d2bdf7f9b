"""Pictures of an accuracy run: four files, every method once, and a clear word where matplotlib is missing."""

from __future__ import annotations

import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtoken.errors import MMTokenError
from mmtoken.evaluation import pictures
from mmtoken.evaluation.accuracy import ALL
from mmtoken.evaluation.lineup import DENSE
from mmtoken.evaluation.pictures import AXES, accuracy_figure, check_matplotlib, draw_all, styles, types_figure
from tests.evaluation.results import accuracy_results


def lines(panel: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in panel.get_lines()}


def test_every_picture_is_written_and_nothing_else(tmp_path: Path) -> None:
    files = draw_all(accuracy_results(), tmp_path, "accuracy-tiny")
    assert [file.name for file in files] == [
        f"accuracy-tiny-{name}.png" for name in ("tokens", "flops", "cache", "time", "scoring", "types")
    ]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG" and min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 50


def test_a_picture_that_cannot_be_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, file: Path, **kwargs: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        draw_all(accuracy_results(), tmp_path, "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_points_stand_at_the_measured_values(axis: Any) -> None:
    results = accuracy_results()
    figure = accuracy_figure(results, axis)
    assert len(figure.axes) == len(results["titles"])
    for panel, (benchmark, title) in zip(figure.axes, results["titles"].items(), strict=True):
        asked = results["split"]["questions"][benchmark]
        assert panel.get_title(loc="left") == f"{title} ({asked} questions)"
        assert panel.get_xlabel() == axis.label
        drawn = lines(panel)
        for method in ("Random", "FastV", "DivPrune"):
            mine = [row for row in results["results"] if row["method"] == method]
            expected = sorted((axis.value(row, benchmark), row["accuracy"][benchmark][ALL]["accuracy"]) for row in mine)
            line = drawn[mine[0]["title"]]
            assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == expected
        dense = next(row for row in results["results"] if row["method"] == DENSE)
        assert set(drawn["dense"].get_ydata()) == {dense["accuracy"][benchmark][ALL]["accuracy"]}
        assert set(drawn["most frequent answer"].get_ydata()) == {results["baselines"][benchmark][ALL]}


def test_there_is_a_small_panel_per_question_type() -> None:
    results = accuracy_results()
    figure = types_figure(results, AXES[0])
    shown = [panel.get_title(loc="left") for panel in figure.axes if panel.get_visible()]
    kinds = [kind for kind in results["baselines"]["shapes_qa"] if kind != ALL]
    assert shown == [*kinds, "digits on photographs"]


def test_methods_have_colours_and_controls_are_grey_and_broken() -> None:
    rows = accuracy_results()["results"]
    found = styles(rows)
    assert list(found) == ["FastV", "DivPrune", "Random"]  # methods first
    assert found["FastV"]["color"] != found["DivPrune"]["color"]
    assert found["Random"]["linestyle"] != "-" and found["FastV"]["linestyle"] == "-"
    many = [{"title": f"M{i}", "control": False, "method": "M"} for i in range(20)]
    looks = {(style["color"], style["marker"]) for style in styles(many).values()}
    assert len(looks) == 20


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__, importlib.import_module

    def no_import(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real[0](name, *args, **kwargs)

    def no_module(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real[1](name, package)

    monkeypatch.setattr(builtins, "__import__", no_import)
    monkeypatch.setattr(pictures.importlib, "import_module", no_module)
    with pytest.raises(MMTokenError, match=r"pip install 'mmtoken\[plot\]'"):
        check_matplotlib()
    with pytest.raises(MMTokenError, match="matplotlib, which is not installed"):
        draw_all(accuracy_results(), tmp_path, "x")
    assert not list(tmp_path.iterdir())
