"""docs/ecosystem.md: every example runs, one after the other."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")

TEXT = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    names: dict[str, Any] = {}
    examples = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.M)
    assert len(examples) == 7
    for number, example in enumerate(examples):
        exec(compile(example, f"example {number}", "exec"), names)
    assert names["session"].report.tokens_out == [16]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_script_of_several_processes_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process; `test_placement` starts two."""
    script = re.search(r'^```python title="share.py"\n(.*?)^```$', TEXT, re.DOTALL | re.M)
    assert script is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    exec(compile(script[1], "share.py", "exec"), {})
    assert capsys.readouterr().out == "[[4]]\n"
