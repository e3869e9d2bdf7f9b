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
    "control": {"errors", "tokens", "wholefile", "compressors", "backbones", "engine", "models", "kernels"},
    "datasets": {"errors", "tokens"},
    "training": {"errors", "tokens", "wholefile", "compressors", "datasets", "engine"},
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


def private_modules(code: str) -> list[str]:
    """What a file imports of the modules that transformers rewrites from release to release."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [
            name
            for name in names
            if name.startswith("transformers.models.")
            and any(part.startswith(("modeling_", "modular_")) for part in name.split("."))
        ]
    return found


def class_patches(code: str) -> list[str]:
    """Assignments to attributes of classes: of imported ones, and of whatever class an object has."""
    tree = ast.parse(code)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mmtoken")
        for alias in node.names
        if alias.name[:1].isupper()
    }

    def is_class(owner: ast.expr) -> bool:
        if isinstance(owner, ast.Name):
            return owner.id in imported
        if isinstance(owner, ast.Attribute):  # module.Class, object.__class__
            return owner.attr[:1].isupper() or owner.attr == "__class__"
        return isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "type"

    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in ast.walk(target) if isinstance(part, ast.expr)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            found += [ast.unparse(node)] if is_class(node.args[0]) else []
        found += [
            ast.unparse(node)
            for target in targets
            if isinstance(target, ast.Attribute)
            and isinstance(target.ctx, ast.Store)
            and (is_class(target.value) or target.attr == "__class__")
        ]
    return found


@pytest.mark.parametrize(
    "file", sorted((ROOT / "mmtoken").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT / "mmtoken"))
)
def test_no_private_module_is_imported_and_no_class_patched(file: Path) -> None:
    code = file.read_text()
    assert private_modules(code) == []
    assert class_patches(code) == []


@pytest.mark.parametrize(
    "line",
    [
        "import transformers.models.llama.modeling_llama",
        "from transformers.models.llama.modeling_llama import LlamaDecoderLayer",
        "from transformers.models.llama import modeling_llama",
    ],
)
def test_private_modules_are_found(line: str) -> None:
    assert private_modules(line) and private_modules(f"def late():\n    {line}")


@pytest.mark.parametrize(
    "line",
    [
        "from transformers import CLIPModel\nCLIPModel.forward = None",
        "from transformers import CLIPModel as Tower\nsetattr(Tower, 'forward', None)",
        "import transformers\ntransformers.CLIPModel.forward = None",
        "type(model).forward = None",
        "a, type(model).forward = 1, 2",
        "model.__class__ = dict",
        "model.__class__.forward = None",
    ],
)
def test_class_patches_are_found(line: str) -> None:
    assert class_patches(line)


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
