"""The README says what the classes say, and shows only files and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmtoken.cli.list import facts, markdown
from mmtoken.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("what", ["compressors", "backbones"])
def test_tables_are_generated(what: str) -> None:
    """Out of date? Paste the output of `mmtoken list compressors --markdown` between the markers."""
    shown = re.search(rf"<!-- {what} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == markdown(facts(what))


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets
    assert set(re.findall(r"^mmtoken ([a-z]+)", README, re.MULTILINE)) <= set(COMMANDS)


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines
    assert "make test " in README


def test_the_first_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    assert "[64] -> [16]" in capsys.readouterr().out
