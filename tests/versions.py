"""Which adapters hold on other versions of transformers and torch.

    python -m tests.versions "transformers==5.20.*" "torch==2.12.*"

Makes a virtual environment for these requirements beside the others (.venv-<requirements>; it stays, for a second run),
installs mmtoken with them, runs the contract tests of the three anchor compressors on every family, and prints a line
per family. Exit status 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(requirements: Sequence[str]) -> Path:
    """The interpreter of an environment with these requirements; made if there is none."""
    slug = re.sub(r"[^a-z0-9.]+", "-", "-".join(sorted(requirements)).lower()).strip("-")
    folder = ROOT / f".venv-{slug or 'newest'}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test]", *requirements], check=True
    )
    return python


def held(results: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Family -> (tests that passed, tests that did not)."""
    found: dict[str, tuple[int, int]] = {}
    for cells in results["pairs"].values():
        for cell, counts in cells.items():
            family = cell.split("/")[0]
            passed, failed = found.get(family, (0, 0))
            found[family] = passed + counts["passed"], failed + counts["failed"]
    return dict(sorted(found.items()))


def lines(results: Mapping[str, Any]) -> list[str]:
    """What `main` prints: the versions, then a line per family."""
    versions = [f"{name} {version}" for name, version in sorted(results["environment"].items())]
    return [
        ", ".join(versions),
        *(
            f"{family:24} {'holds' if passed and not failed else 'FAILS'}: {passed} passed, {failed} failed"
            for family, (passed, failed) in held(results).items()
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.split("\n")[0])
    parser.add_argument("requirements", nargs="*", help='for pip, such as "transformers==5.20.*"; none: the newest')
    chosen = parser.parse_args(arguments)
    python = environment(chosen.requirements)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "support.json"
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "auto", "-m", "anchor", "tests/contract", "--support", file],
            cwd=ROOT,
            check=False,
        )
        results = json.loads(file.read_text()) if file.exists() else None
    if results is None:
        sys.stderr.write("no test ran; see above.\n")
        return 1
    sys.stdout.write("\n".join(lines(results)) + "\n")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
