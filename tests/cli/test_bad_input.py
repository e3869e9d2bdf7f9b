"""Whatever is handed in wrong gives one line that names it and says what to do, exit code 2 and no file."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtoken.cli.main import main
from mmtoken.models.registry import find_model

SAMPLES = Path(__file__).parents[2] / "mmtoken" / "assets" / "samples"
SCENE = str(SAMPLES / "scene_1.png")
ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "models" / "tiny_llava" / "recipe.yaml")

Output = pytest.CaptureFixture[str]


def refused(capsys: Output, *words: str) -> str:
    """The error line of a command that must fail."""
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("mmtoken: error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def ask(capsys: Output, *words: str, image: str = SCENE) -> str:
    return refused(capsys, "run", "--image", image, "--ask", "read the number.", *words)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("0", "keep=0 keeps nothing"),
        ("-3", "keep=-3 keeps nothing"),
        ("0.0", "keep=0.0 keeps nothing"),
        ("-.5", "keep=-0.5 keeps nothing"),
        ("1.5", "keep=1.5 is a float above 1"),
        (".nan", "keep=nan is not"),
        (".inf", "keep=inf is not"),
        ("true", "keep=True is a bool"),
        ("many", "keep='many' is a str"),
        ("[1, 2]", "keep=[1, 2] is a list"),
    ],
)
def test_keep(capsys: Output, keep: str, words: str) -> None:
    assert words in ask(capsys, "--compressor", "divprune", f"--keep={keep}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compressor", "fastvv"], "did you mean 'fastv'"),
        (["--compressor", "os.system"], "class_path='os.system' is no Compressor"),
        (["--compressor", "random"], "keep is missing"),
        (["--compressor", "fastv", "--compressor.layr", "2"], "did you mean 'layer'"),
        (["--compressor", "fastv", "--compressor.layer", "99"], "layer=99 but this decoder has 8 layers"),
        (["--compressor", "fastv", "--compressor.layer"], "expects a value"),
        (["--compressor", "nothing.yaml"], "compressor='nothing.yaml' cannot be read"),
        (["--keep", "4"], "name one with --compressor"),
        (["--colour"], "unrecognized argument '--colour'"),
        (["--max-new-tokens", "0"], "max-new-tokens=0"),
        (["--max-new-tokens", "x"], "invalid int value"),
        (["--device", "warp"], "device='warp' cannot be used"),
        (["--save-overlay", "x.png"], "name one with --compressor"),
        (["--compressor", "fastv", "--save-overlay", "/nowhere/x.png"], "does not exist"),
        (["--compressor", "fastv", "--save-overlay", "x.txt"], "ends in .png"),
        (["--model", "tiny-lava"], "did you mean 'tiny-llava'"),
        (["--model", "./no/such/folder"], "does not exist"),
        (["--model", SCENE], "is a file; give the folder"),
    ],
)
def test_options(capsys: Output, options: list[str], words: str) -> None:
    assert words in ask(capsys, *options)


def test_commands(capsys: Output) -> None:
    assert "did you mean 'run'" in refused(capsys, "rum")
    assert "--image, --ask" in refused(capsys, "run")
    assert "invalid choice: 'colours'" in refused(capsys, "list", "colours")
    assert "ask='' is empty" in refused(capsys, "run", "--image", SCENE, "--ask", "")


def forged_png(path: Path, width: int, height: int) -> None:
    """A PNG whose header claims a size that its data do not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def test_images(capsys: Output, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    overlay = tmp_path / "overlay.png"

    def message() -> str:
        line = ask(capsys, "--compressor", "fastv", "--save-overlay", str(overlay), image=str(file))
        assert f"image={str(file)!r}" in line
        assert not overlay.exists()
        return line

    assert "does not exist" in message()
    file.mkdir()
    assert "is a directory" in message()
    file.rmdir()
    file.write_text("no picture at all")
    assert "is no picture" in message()
    file.write_bytes(b"")
    assert "is empty" in message()
    file.write_bytes(Path(SCENE).read_bytes()[:2000])
    assert "truncated" in message()
    forged_png(file, 30_000, 30_000)
    assert "900000000" in message()
    forged_png(file, 0, 0)
    assert "0 x 0" in message()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_model("tiny-llava").path, tmp_path / "model"))


def test_checkpoints(capsys: Output, checkpoint: Path) -> None:
    weights, name = checkpoint / "model.safetensors", str(checkpoint)

    def message() -> str:
        line = ask(capsys, "--model", name)
        assert name in line
        return line

    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in message()
    tensors = load_file(find_model("tiny-llava").path / "model.safetensors")
    lost = next(key for key in tensors if key.endswith("layers.3.mlp.up_proj.weight"))
    save_file({key: value for key, value in tensors.items() if key != lost}, weights, {"format": "pt"})
    assert "lacks 1 tensors" in message()
    save_file({**tensors, lost: tensors[lost][:5].clone()}, weights, {"format": "pt"})
    assert "cannot be loaded" in message()
    weights.unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    assert "pickle" in message()
    (checkpoint / "pytorch_model.bin").unlink()
    assert "no *.safetensors" in message()
    weights.write_bytes(whole)
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace('"llava"', '"gpt2"'))
    assert "model_type='gpt2' has no adapter" in ask(capsys, "--model", name)
    (checkpoint / "config.json").write_text("{")
    assert "cannot be loaded" in message()
    (checkpoint / "config.json").unlink()
    assert "cannot be loaded" in message()
    (checkpoint / "config.json").write_text(config)
    (checkpoint / "processor_config.json").unlink()
    (checkpoint / "tokenizer.json").unlink()
    assert "cannot be loaded" in message()


def test_nan_weights(capsys: Output, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    for key, value in tensors.items():
        if "multi_modal_projector" in key:
            value.fill_(torch.nan)
    save_file(tensors, weights, {"format": "pt"})
    for name in ("divprune", "fastv"):
        assert "NaN" in ask(capsys, "--model", str(checkpoint), "--compressor", name)


def test_recipes(capsys: Output, tmp_path: Path) -> None:
    assert "nothing.yaml" in refused(capsys, "fit", "--config", "nothing.yaml")
    wrong = tmp_path / "wrong.yaml"
    recipe = Path(RECIPE).read_text()
    wrong.write_text(recipe.replace("mmtoken.models.tiny_llava.TinyLlava", "os.system"))
    assert "os.system" in refused(capsys, "fit", "--config", str(wrong))
    wrong.write_text(recipe.replace("warmup_steps", "warmup_stairs"))
    assert "warmup_stairs" in refused(capsys, "fit", "--config", str(wrong))
    wrong.write_text("trainer: [")
    assert "wrong.yaml" in refused(capsys, "fit", "--config", str(wrong))
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"nothing")
    runs = ["--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.logger", "false"]
    line = refused(capsys, "fit", "--config", RECIPE, "--model.compile", "false", *runs, "--ckpt_path", str(broken))
    assert "is no checkpoint" in line


def test_images_of_several_sizes_and_modes_are_read(capsys: Output, tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        file = tmp_path / f"{mode}.tif"
        Image.open(SCENE).resize((131, 77)).convert("RGB").convert(mode).save(file)
        assert main(["run", "--image", str(file), "--ask", "read the number.", "--compressor", "fastv"]) == 0
