"""docs/control.md, as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("gymnasium")

import mmtoken
from tests.control.policies import model, processor

TEXT = (Path(__file__).parents[2] / "docs" / "control.md").read_text()


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    network = model(norm_stats={"table": {"action": {"q01": [-1.0] * 3, "q99": [1.0] * 3}}})
    loaded: list[str] = []

    def load(name: str) -> object:
        loaded.append(name)
        return network, processor(network)

    # A random policy instead of the trained one: this is about the interface.
    monkeypatch.setattr(mmtoken, "load", load)
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "control.md", "exec"), {})
    steps, before, after = re.fullmatch(r"(\d+) steps, \[(\d+)\] -> \[(\d+)\]\n", capsys.readouterr().out).groups()
    assert loaded == ["tiny-openvla"] and int(steps) > 3 and (before, after) == ("16", "4")


def test_every_name_of_an_episode_that_is_shown_exists() -> None:
    for owner, name in re.findall(r"`(policy|episode)\.(\w+)", TEXT):
        kind = {"policy": mmtoken.Policy, "episode": mmtoken.Episode}[owner]
        assert name in {"lock", "steps"} or getattr(kind, name, None) is not None, name
    for module in re.findall(r"python -m (mmtoken[\w.]+)", TEXT):
        assert (Path(__file__).parents[2] / f"{module.replace('.', '/')}.py").is_file()
