"""The README says what the classes say, and shows only files and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmtoken.cli.list import facts, markdown, short
from mmtoken.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FACTS = ROOT / "docs" / "compressors.md"


def table(text: str, what: str) -> str:
    """What stands between the markers."""
    shown = re.search(rf"<!-- {what} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert shown is not None
    return shown[1]


def test_tables_are_generated() -> None:
    """Out of date? Run `python -m tests.test_readme`, which writes them anew."""
    assert table(README, "compressors") == markdown(short(facts("compressors")))
    assert table(README, "backbones") == markdown(facts("backbones"))
    assert table(FACTS.read_text(), "compressors") == markdown(facts("compressors"))


def write_tables() -> None:
    """Bring the tables of README.md and docs/compressors.md up to date."""
    tables = (
        (ROOT / "README.md", "compressors", markdown(short(facts("compressors")))),
        (ROOT / "README.md", "backbones", markdown(facts("backbones"))),
        (FACTS, "compressors", markdown(facts("compressors"))),
    )
    for file, what, rows in tables:
        text = file.read_text()
        file.write_text(text.replace(table(text, what), rows))


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


def test_the_streaming_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = [
        found for found in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "mmtoken.stream(" in found
    ]
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "blue" and printed[1].startswith("32 frames in 128 tokens")


if __name__ == "__main__":
    write_tables()
