"""docs/add-a-compressor.md, followed to the letter: outside the package, then inside a copy of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "add-a-compressor.md").read_text()

BLOCKS = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', TEXT, re.DOTALL | re.M))
"""Title of a block -> what it holds."""

INSERTS = [title for title in BLOCKS if (ROOT / title).is_file()]


def run(words: list[str], folder: Path, path: Path) -> str:
    """What a command prints that is run in `folder` with the packages at `path`."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{path}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable if word == "python" else word for word in words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def insert(text: str, diff: str) -> str:
    """Put the lines that begin with + behind the line above them, which must stand there once."""
    above = ""
    for line in diff.splitlines():
        if line.startswith("+"):
            lines = text.split("\n")
            assert lines.count(above) == 1, above
            place = lines.index(above) + 1
            text = "\n".join([*lines[:place], line[1:], *lines[place:]])
        above = line[1:]
    return text


def test_a_class_of_another_module_is_used_by_its_path_in_yaml(tmp_path: Path) -> None:
    for title in ("long_vectors.py", "long_vectors.yaml", "use.py"):
        (tmp_path / title).write_text(BLOCKS[title])
    assert run(["python", "use.py"], tmp_path, ROOT) == "[64] -> [16]\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the method brought into it."""
    folder = tmp_path_factory.mktemp("copy")
    for part in ("mmtoken", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("assets", "golden", "__pycache__"))
    (folder / "docs").mkdir()
    for file in ("pyproject.toml", "README.md", "docs/compressors.md", "docs/add-a-compressor.md"):
        shutil.copy(ROOT / file, folder / file)
    assert len(INSERTS) == 2
    for title in INSERTS:
        (folder / title).write_text(insert((folder / title).read_text(), BLOCKS[title]))
    (folder / "mmtoken" / "compressors" / "long_vectors.py").write_text(BLOCKS["long_vectors.py"])
    return folder


def test_it_is_known_by_name(copy: Path) -> None:
    code = (
        "import mmtoken, mmtoken.compressors as shelf; from mmtoken.compressors.registry import resolve\n"
        "print(mmtoken.__file__, resolve('long-vectors', keep=4) == shelf.LongVectors(keep=4))"
    )
    assert run(["python", "-c", code], copy, copy) == f"{copy / 'mmtoken' / '__init__.py'} True\n"


def test_it_passes_the_checks_of_every_compressor(copy: Path) -> None:
    words = shlex.split(BLOCKS["checks"])
    assert {"tests/contract", "longvectors"} <= set(words)
    # Everything would take minutes: of the models one family, and of the contract what concerns any method.
    contract = [f"tests/contract/test_{name}.py" for name in ("identity", "drop_equals_mask")]
    place = words.index("tests/contract")
    words[place : place + 1] = contract
    words[words.index("longvectors")] = "LongVectors or longvectors and (test_every_compressor or llava-image)"
    out = run([*words, "-p", "no:cacheprovider"], copy, copy)
    found = re.search(r"(\d+) passed", out)
    assert found is not None and int(found[1]) >= 50, out


def test_what_is_generated_is_renewed(copy: Path) -> None:
    first, second = (shlex.split(line) for line in BLOCKS["renew"].splitlines())
    run(first, copy, copy)
    assert "# LongVectors" in (copy / "compressors" / "longvectors" / "README.md").read_text()
    run(second, copy, copy)
    assert "| longvectors | LongVectors | method | 2026 |" in (copy / "docs" / "compressors.md").read_text()
    assert "| longvectors | 2026 |" in (copy / "README.md").read_text()
