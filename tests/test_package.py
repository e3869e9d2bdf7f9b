"""What importing costs and in which direction imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmtoken

ROOT = Path(__file__).parents[1]

# A part may import itself and the parts named here, nothing else of mmtoken.
ALLOWED = {
    "errors": set(),
    "tokens": {"errors"},
    "wholefile": {"errors"},
    "kernels": {"errors", "tokens"},
    "compressors": {"errors", "tokens", "kernels"},
    "backbones": {"errors", "tokens"},
    "engine": {"errors", "tokens", "kernels", "compressors", "backbones"},
    "streaming": {"errors", "tokens", "compressors", "backbones", "engine"},
    "classify": {"errors", "compressors", "engine"},
    "control": {"errors", "tokens", "wholefile", "compressors", "backbones", "engine", "models", "kernels"},
    "datasets": {"errors", "tokens"},
    "training": {"errors", "tokens", "wholefile", "datasets"},
    "models": {"errors", "tokens", "wholefile", "compressors", "datasets", "engine", "training"},
    "hub": {"errors", "wholefile", "backbones", "compressors", "engine", "models"},
    "evaluation": {
        "errors",
        "tokens",
        "wholefile",
        "kernels",
        "compressors",
        "backbones",
        "engine",
        "streaming",
        "control",
        "datasets",
        "models",
        "hub",
    },
}


def imports_of(file: Path) -> set[str]:
    """Parts of mmtoken that a file imports, those for type checkers only left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmtoken."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mmtoken.")}
    return names


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part: str) -> None:
    folder = ROOT / "mmtoken" / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    for file in files:
        assert imports_of(file) <= ALLOWED[part] | {part}, file


def test_every_part_has_its_place() -> None:
    parts = {
        path.stem for path in (ROOT / "mmtoken").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set(ALLOWED) | {"cli"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mmtoken_imports_no_torch() -> None:
    assert run("import sys, mmtoken; dir(mmtoken); print('torch' in sys.modules, 'transformers' in sys.modules)") == (
        "False False\n"
    )


def test_help_imports_no_torch_and_takes_less_than_half_a_second() -> None:
    code = (
        "import sys, time\nfrom mmtoken.cli.main import main\nassert main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules\nassert time.process_time() < .5, time.process_time()"
    )
    assert "usage: mmtoken" in run(code)


def test_public_names_are_there() -> None:
    for name in mmtoken.__all__:
        assert getattr(mmtoken, name) is not None
    assert set(mmtoken.__all__) <= set(dir(mmtoken))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmtoken.nothing  # noqa: B018


def test_root_folders_hold_no_python() -> None:
    """A root package called `datasets` or `models` would shadow other people's."""
    shelf = [ROOT / name for name in ("models", "compressors", "datasets", "kernels")]
    assert not [file for folder in shelf if folder.exists() for file in folder.rglob("*.py")]
    out = run("import importlib.util as u; s = u.find_spec('datasets'); print(s.origin if s else None)").strip()
    assert not Path(out).is_relative_to(ROOT / "datasets")


def test_the_version_is_stated_once() -> None:
    assert f'version = "{mmtoken.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {mmtoken.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {mmtoken.__version__} " in (ROOT / "CHANGELOG.md").read_text()
