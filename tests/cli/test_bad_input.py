"""Whatever is handed in wrong gives one line that names it and says what to do, exit code 2 and no file."""

from __future__ import annotations

import shutil
import socket
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtoken.cli.main import main
from mmtoken.compressors import FastV
from mmtoken.models.registry import find_model

pytestmark = pytest.mark.lowest

SAMPLES = Path(__file__).parents[2] / "mmtoken" / "assets" / "samples"
SCENE = str(SAMPLES / "scene_1.png")
ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "models" / "tiny_llava" / "recipe.yaml")

Output = pytest.CaptureFixture[str]


def refused(capsys: Output, *words: str) -> str:
    """The one line that a command that must fail writes."""
    assert main(list(words)) == 2
    written = capsys.readouterr()
    assert written.err.startswith("mmtoken: error: ") and written.err.count("\n") == 1, written.err
    assert written.out == ""
    return written.err.strip()


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
        ("", "keep='' is a str"),
    ],
)
def test_keep(capsys: Output, keep: str, words: str) -> None:
    assert words in ask(capsys, "--compressor", "divprune", f"--keep={keep}")


def test_a_compressor_that_is_nowhere_or_whose_setting_is_not(capsys: Output, tmp_path: Path) -> None:
    folder = FastV(keep=0.25).save_pretrained(tmp_path / "saved")
    assert "layers='1' is no setting of FastV" in ask(capsys, "--compressor", str(folder), "--compressor.layers", '"1"')
    assert "it has no mmtoken_compressor.json" in ask(capsys, "--compressor", f"{tmp_path}/")
    gone = str(tmp_path / "gone")
    assert f"compressor={gone!r} is no folder and no repository" in ask(capsys, "--compressor", gone)


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
        (["--compressor", "{'class_path': os.system}"], "class_path='os.system' is no Compressor"),
        (["--compressor", "{'class_path': fastv, 'init_args': {'keep': 0}}"], "keep=0 keeps nothing"),
        (["--compressor", "{oops"], "compressor='{oops' is unknown"),
        (["--keep", "4"], "name one with --compressor"),
        (["--colour"], "unrecognized argument '--colour'"),
        (["--max-new-tokens", "0"], "max-new-tokens=0"),
        (["--max-new-tokens", "x"], "invalid int value"),
        (["--device", "warp"], "device='warp' cannot be used"),
        (["--device", "meta"], "device='meta' cannot be used"),
        (["--save-overlay", "x.png"], "name one with --compressor"),
        (["--compressor", "fastv", "--save-overlay", "/nowhere/x.png"], "does not exist"),
        (["--compressor", "fastv", "--save-overlay", "x.txt"], "ends in .png"),
        (["--model", "tiny-lava"], "did you mean 'tiny-llava'"),
        (["--model", "./no/such/folder"], "does not exist; give a folder"),
        (["--model", "./tiny_llava"], "did you mean 'tiny-llava'"),
        (["--model", ""], "model='' is no zoo entry"),
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
    assert "layers.3.mlp.up_proj.weight is [5, 128] and config.json asks for [384, 128]" in message()
    weights.unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    assert "pickle" in message()
    (checkpoint / "pytorch_model.bin").unlink()
    assert "no *.safetensors" in message()
    weights.write_bytes(whole)
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace('"llava"', '"gpt2"'))
    assert "model_type='gpt2' has no adapter" in ask(capsys, "--model", name)
    (checkpoint / "config.json").write_text('{"model_type": "a-family-of-tomorrow"}')
    assert "has no adapter. Known: " in ask(capsys, "--model", name)
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    assert "is a bare decoder (model_type='llama')" in message()
    (checkpoint / "config.json").write_text(config.replace('"hidden_size": 128', '"hidden_size": "wide"'))
    assert "'hidden_size' expected int, got str" in message()
    for garbage in ("{", "[1]", "{}"):
        (checkpoint / "config.json").write_text(garbage)
        assert "cannot be loaded" in message()
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in message()
    (checkpoint / "config.json").write_text(config)
    assert main(["run", "--model", name, "--image", SCENE, "--ask", "read the number."]) == 0


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("processor_config.json", None, "cannot be loaded"),
        ("processor_config.json", "{", "cannot be loaded"),
        ("tokenizer.json", None, "cannot be loaded"),
        ("tokenizer.json", "{", "cannot be loaded"),
        ("tokenizer_config.json", None, "has no tokenizer_config.json"),
        ("chat_template.jinja", None, "refused by this model's processor"),
        ("chat_template.jinja", "{% if %}", "refused by this model's processor"),
        ("chat_template.jinja", "no place for an image", "this model's processor"),
        ("mmtoken_compressor.json", "{", "is no compressor file"),
        (
            "mmtoken_compressor.json",
            '{"schema_version": 1, "mmtoken_version": "0.1.0", "class_path": "os.system", "init_args": {}}',
            "os.system",
        ),
    ],
)
def test_processors_and_compressor_files(
    capsys: Output, checkpoint: Path, file: str, content: str | None, words: str
) -> None:
    if content is None:
        (checkpoint / file).unlink()
    else:
        (checkpoint / file).write_text(content)
    assert words in ask(capsys, "--model", str(checkpoint))


def test_an_id_on_a_hub_that_cannot_be_reached(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """No retries: they take more than a minute and fill the screen."""

    def unknown(*args: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("mmtoken.repository.getproxies", dict)
    assert "model='nobody/nothing' cannot be loaded" in ask(capsys, "--model", "nobody/nothing")


def test_questions_that_hold_image_tokens(capsys: Output) -> None:
    """More placeholders than images, and the other way round."""
    line = refused(capsys, "run", "--image", SCENE, "--ask", "what <image> is it?")
    assert "ask='what <image> is it?' with 1 images" in line and "leave image tokens out" in line


def test_nan_weights(capsys: Output, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    for key, value in tensors.items():
        if "multi_modal_projector" in key:
            value.fill_(torch.nan)
    save_file(tensors, weights, {"format": "pt"})
    for name in ("divprune", "fastv"):
        assert "NaN" in ask(capsys, "--model", str(checkpoint), "--compressor", name)


_RECIPES = {
    "a class that is none": (
        ("mmtoken.models.tiny_llava.TinyLlava", "os.system"),
        'key "model": Import path os.system',
    ),
    "a class that does not exist": (("tiny_llava.TinyLlava", "tiny_llava.Nothing"), "has no attribute 'Nothing'"),
    "a module that does not exist": (("mmtoken.models.tiny_llava.", "nowhere."), "No module named 'nowhere'"),
    "a key that does not exist": (("warmup_steps", "warmup_stairs"), "'warmup_stairs' is not accepted"),
    "a value of another type": (("warmup_steps: 200", "warmup_steps: many"), "Got value: many"),
    "a value that the model refuses": (("heads: 4", "heads: 5"), "attention heads (5)"),
    "a value that the data refuse": (("scene_batch: 16", "scene_batch: -1"), "scene_batch=-1"),
    "a device that does not exist": (("accelerator: cpu", "accelerator: warp"), "accelerator='warp'"),
}


@pytest.mark.parametrize("case", _RECIPES)
def test_recipes_with(case: str, capsys: Output, tmp_path: Path) -> None:
    (old, new), words = _RECIPES[case]
    recipe = Path(RECIPE).read_text()
    assert old in recipe
    file = tmp_path / "wrong.yaml"
    file.write_text(recipe.replace(old, new).replace("runs/", f"{tmp_path}/runs/"))
    line = refused(capsys, "fit", "--config", str(file))
    assert words in line and "compare models/tiny_llava/recipe.yaml" in line and len(line) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


@pytest.mark.parametrize("content", [b"trainer: [", b"[1, 2]", b"", b"\xff\xfe", b"colour: red"])
def test_recipes_that_are_none(content: bytes, capsys: Output, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content)
    refused(capsys, "validate", "--config", str(file))


def test_recipes_that_are_missing(capsys: Output) -> None:
    assert "nothing.yaml" in refused(capsys, "fit", "--config", "nothing.yaml")
    assert "config is missing" in refused(capsys, "fit")
    assert "unrecognized arguments: --colour" in refused(capsys, "fit", "--config", RECIPE, "--colour", "red").lower()


class Evil:
    """Its pickle makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_training_checkpoints(capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, mark = tmp_path / "broken", tmp_path / "it-ran"
    quiet = ["--trainer.logger=false", "--trainer.callbacks=null", "--model.compile=false"]

    def message(*words: str) -> str:
        return refused(capsys, "fit", "--config", RECIPE, *quiet, *words)

    assert "No such file" in message("--ckpt_path", str(file))
    file.write_bytes(b"nothing")
    assert "is damaged" in message("--ckpt_path", str(file))
    torch.save({"epoch": 0, "global_step": 0}, file)
    assert "lacks state_dict" in message(f"--ckpt_path={file}")
    torch.save({"state_dict": {}, "epoch": 0, "global_step": 0, "more": Evil(mark)}, file)
    assert "more than tensors" in message(f"--ckpt_path={file}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{Path(RECIPE).read_text()}\nckpt_path: {file}\n")
    assert "more than tensors" in refused(capsys, "validate", "--config", str(recipe), *quiet)
    assert not mark.exists()


def test_ctrl_c_in_a_fit_is_130(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning makes exit code 1 of it."""

    class Interrupted:
        def __init__(self, **arguments: object) -> None:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

    monkeypatch.setattr("mmtoken.cli.fit.RecipeCLI", Interrupted)
    assert main(["fit", "--config", RECIPE]) == 130
    assert capsys.readouterr().err == "mmtoken: error: interrupted\n"


def test_images_of_several_sizes_and_modes_are_read(capsys: Output, tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        file = tmp_path / f"{mode}.tif"
        Image.open(SCENE).resize((131, 77)).convert("RGB").convert(mode).save(file)
        assert main(["run", "--image", str(file), "--ask", "read the number.", "--compressor", "fastv"]) == 0
