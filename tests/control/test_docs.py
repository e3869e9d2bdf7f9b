"""docs/control.md, as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium")

import mmtoken
from mmtoken.datasets.pick_place import LIMIT

TEXT = (Path(__file__).parents[2] / "docs" / "control.md").read_text()


CARD = Path(__file__).parents[2] / "models" / "tiny_openvla" / "README.md"


def run(text: str) -> dict[str, Any]:
    """What the first example of a page leaves behind, run with the weights that ship."""
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {}
    exec(compile(example[1], "example", "exec"), names)
    return names


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(TEXT)
    assert capsys.readouterr().out == f"{names['episode'].steps} steps, [64] -> [16]\n"
    assert 3 < names["episode"].steps <= LIMIT


def test_the_example_of_the_models_card_succeeds() -> None:
    names = run(CARD.read_text())
    assert names["success"] and names["episode"].report.tokens_out == [32]


def test_every_name_of_an_episode_that_is_shown_exists() -> None:
    for owner, name in re.findall(r"`(policy|episode)\.(\w+)", TEXT):
        kind = {"policy": mmtoken.Policy, "episode": mmtoken.Episode}[owner]
        assert name in {"lock", "steps"} or getattr(kind, name, None) is not None, name
    for module in re.findall(r"python -m (mmtoken[\w.]+)", TEXT):
        assert (Path(__file__).parents[2] / f"{module.replace('.', '/')}.py").is_file()
