"""Every kernel compiles for sm_80 and sm_90 without a device, at its real block sizes, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtoken.kernels.cases import operations

pytest.importorskip("triton")

# Kernels of this process may be interpreted, so they are compiled in another one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=ENVIRONMENT | environment,
    )


@pytest.mark.lowest
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", operations())
def test_every_kernel_compiles_and_spills_nothing(name: str, capability: int, tmp_path: Path) -> None:
    file = tmp_path / "compiled.json"
    done = run("-m", "mmtoken.kernels.ahead", "--operation", name, "--capability", str(capability), "--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["results"]
    assert {row["capability"] for row in rows} == {capability}
    assert {row["case"].rpartition(", ")[2] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["stack_bytes"] == 0 and row["shared_bytes"] <= 100 * 1024, row


HUNGRY = ("-m", "tests.kernels.hungry")
WRONG = {
    "nothing": None,
    "registers": "registers spill to a stack of ",
    "shared": "bytes of shared memory, more than 102400.",
    "grid": "product_kernel: a grid of (1, 70000, 1) programs; at most (2147483647, 65535, 65535)",
    "idle": "hungry: no case launches idle_kernel; add one to its cases.",
    "tuned": "A kernel that tunes itself by timing cannot be compiled ahead of time",
}


def test_what_would_run_badly_is_named() -> None:
    done = run(*HUNGRY, *WRONG)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("nothing") == []
    for wrong, lines in said.items():
        assert lines and all(WRONG[wrong] in line for line in lines), (wrong, lines)


def test_interpreted_kernels_are_not_compiled() -> None:
    said = json.loads(run(*HUNGRY, "nothing", TRITON_INTERPRET="1").stdout)
    assert "TRITON_INTERPRET=1: interpreted kernels" in said["nothing"][0]
