"""docs/media.md: its examples run, its numbers are those of the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mmtoken.datasets.media.limits import MediaLimits
from mmtoken.datasets.media.video import BACKENDS
from tests.datasets.media.clips import clip

TEXT = (Path(__file__).parents[3] / "docs" / "media.md").read_text()

UNITS = {"": 1, "million": 10**6, "hours": 3600, "GiB": 2**30}


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "clip.mp4", range(0, 13000, 500), clock=1000)
    clip(tmp_path / "day.mkv", range(0, 2000, 500), clock=1000)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"```python.*?\n(.*?)```", TEXT, re.DOTALL):
        exec(code, names)
    assert names["frames"].shape == (32, 48, 64, 3)  # type: ignore[attr-defined]


def test_the_limits_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", TEXT, re.MULTILINE))
    assert set(rows) == {field.name for field in fields(MediaLimits)}
    for name, text in rows.items():
        number, _, unit = text.partition(" ")
        assert getattr(MediaLimits(), name) == pytest.approx(float(number) * UNITS[unit], rel=0.01), name


def test_every_backend_has_its_column() -> None:
    assert all(f"`{backend}`" in TEXT for backend in BACKENDS)
