"""The built wheel works outside the repository, with everything that it promises to carry."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "mmtoken/py.typed",
        "mmtoken/assets/tiny_llava/model.safetensors",
        "mmtoken/assets/samples/samples.json",
    } <= names
    assert {name.partition("/")[0] for name in names} == {"mmtoken", "mmtoken-0.1.0.dist-info"}
    assert "mmtoken-0.1.0.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".ckpt", ".pyc"))]


def test_an_installed_wheel_answers_a_question_about_a_shipped_sample(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    python = tmp_path / "venv" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300, cwd=tmp_path, env=environment)
    # Dependencies come from the environment of the tests; what is editable there stays invisible behind a .pth entry.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    home = run(str(python), "-c", "import mmtoken; print(mmtoken.__file__)").strip()
    assert Path(home).is_relative_to(site)
    sample = Path(home).parent / "assets" / "samples" / "scene_1.png"
    overlay = tmp_path / "overlay.png"
    script = str(python.parent / "mmtoken")
    out = run(
        script, "run", "--image", str(sample), "--ask", "read the number.", "--compressor", "divprune", "--keep", "16",
        "--save-overlay", str(overlay),
    )  # fmt: skip
    assert out.strip()
    assert overlay.stat().st_size > 0
