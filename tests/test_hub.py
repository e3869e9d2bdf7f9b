"""Models come with the compressor given or saved, never from pickles or a repository's code, and are saved whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import mmtoken
from mmtoken import attached, compress, load, save
from mmtoken.compressors import DivPrune, FastV
from mmtoken.compressors.pretrained import COMPRESSOR_FILE
from mmtoken.errors import CheckpointError, KeepError, MMTokenError, UnknownNameError, UnsupportedError
from mmtoken.hub import skeleton
from mmtoken.models import registry
from mmtoken.models.registry import DEFAULT, ZOO, ZooModel, find_model, list_models
from tests.backbones.processors import conversation, photograph, write_checkpoint

pytestmark = pytest.mark.lowest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries to reach a network fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"an attempt to reach the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA; tests that change files copy it."""
    return write_checkpoint("llava", tmp_path_factory.mktemp("llava"), layers=3)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def logits(model: Any, processor: Any) -> torch.Tensor:
    turns = [conversation("What is shown?", photograph(1))]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Load


def test_without_a_name_the_shipped_model_comes(capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = load()
    named, _ = load("tiny-llava")
    assert DEFAULT == "tiny-llava" and type(model) is LlavaForConditionalGeneration and not model.training
    assert attached(model) is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), named.parameters(), strict=True))
    assert type(processor).__name__ == "LlavaProcessor"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", [str, Path, lambda path: os.path.relpath(path)])
def test_a_folder_comes_as_transformers_loads_it(checkpoint: Path, form: Any) -> None:
    model, processor = load(form(checkpoint))
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    assert torch.equal(logits(model, processor), logits(plain, AutoProcessor.from_pretrained(checkpoint)))


def test_a_folder_is_found_in_the_home_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    model, _ = load("~/copy")
    assert model.config.model_type == "llava"


def test_arguments_reach_transformers(checkpoint: Path) -> None:
    model, _ = load(checkpoint, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config()._attn_implementation == "eager"


@pytest.mark.parametrize(
    "compressor",
    [
        FastV(keep=4, layer=1),
        {"class_path": "mmtoken.compressors.FastV", "init_args": {"keep": 4, "layer": 1}},
    ],
)
def test_a_compressor_given_comes_attached_and_can_be_taken_off(checkpoint: Path, compressor: Any) -> None:
    model, processor = load(checkpoint, compressor=compressor)
    session = attached(model)
    assert session is not None and session.compressor == FastV(keep=4, layer=1)
    logits(model, processor)
    assert session.report.tokens_in == [16] and session.report.tokens_out == [4]
    session.detach()
    assert attached(model) is None
    assert torch.equal(logits(model, processor), logits(*load(checkpoint)))


def test_a_compressor_may_be_given_by_name(checkpoint: Path) -> None:
    session = attached(load(checkpoint, compressor="divprune")[0])
    assert session is not None and session.compressor == DivPrune()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tiny-lava", UnknownNameError, "did you mean 'tiny-llava'"),
        ("./nothing/here", CheckpointError, "does not exist"),
        ("/nothing/here", CheckpointError, "does not exist"),
        ("~/nothing/here", CheckpointError, "does not exist"),
        ("a/b/c", CheckpointError, "does not exist"),
        (__file__, CheckpointError, "is a file; give the folder"),
    ],
)
def test_a_name_of_nothing_is_refused_without_asking_the_network(
    name: str, error: type[MMTokenError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(name)


def test_an_id_that_cannot_be_fetched_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model='org/name' cannot be loaded"):
        load("org/name", local_files_only=True, cache_dir=tmp_path)


def test_a_compressor_that_cannot_be_used_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fastv'"):
        load(checkpoint, compressor="fastvv")
    with pytest.raises(MMTokenError, match="layer=99 but this decoder has 3 layers"):
        load(checkpoint, compressor=FastV(layer=99))


# No code of others


@pytest.fixture
def with_code(copy: Path) -> Path:
    """A checkpoint that names code of its own for config, model and processor; running it leaves a mark."""
    code = "from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\nraise SystemExit('it ran')\n"
    (copy / "evil.py").write_text(code)
    for name, classes in (
        ("config.json", ("AutoConfig", "AutoModelForImageTextToText")),
        ("processor_config.json", ("AutoProcessor",)),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        settings = json.loads((copy / name).read_text())
        settings["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        if "AutoTokenizer" in classes:
            settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
        (copy / name).write_text(json.dumps(settings))
    return copy


def test_code_beside_a_model_never_runs_by_itself(with_code: Path) -> None:
    model, processor = load(with_code)
    assert logits(model, processor).isfinite().all()
    assert not list(with_code.rglob("it-ran"))


@pytest.mark.parametrize(("given", "expected"), [({}, False), ({"trust_remote_code": True}, True)])
def test_trust_is_passed_on_only_when_it_is_given(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, bool], expected: bool
) -> None:
    seen: set[tuple[str, Any]] = set()
    autos = (AutoConfig, AutoModelForImageTextToText, AutoProcessor)
    for auto in autos:

        def note(*args: Any, _auto: str = auto.__name__, _plain: Any = auto.from_pretrained, **kwargs: Any) -> Any:
            seen.add((_auto, kwargs.get("trust_remote_code")))
            return _plain(*args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", note)
    load(checkpoint, **given)
    assert seen == {(auto.__name__, expected) for auto in autos}


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle .* convert it to safetensors"):
        load(copy)


# Save


@pytest.fixture
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load(checkpoint, compressor=FastV(keep=0.25, layer=1))


def test_what_was_saved_loads_with_its_compressor_and_the_same_logits(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    assert save(model, tmp_path / "deep" / "saved", processor=processor) == tmp_path / "deep" / "saved"
    again, its_processor = load(tmp_path / "deep" / "saved")
    session = attached(again)
    assert session is not None and session.compressor == FastV(keep=0.25, layer=1)
    compressed = logits(model, processor)
    assert torch.equal(logits(again, its_processor), compressed)
    for one in (model, again):
        one_session = attached(one)
        assert one_session is not None
        one_session.detach()
    dense = logits(model, processor)
    assert torch.equal(logits(again, its_processor), dense)
    assert dense.shape != compressed.shape or not torch.equal(dense, compressed)


def test_the_saved_folder_is_an_ordinary_checkpoint(loaded: tuple[Any, Any], checkpoint: Path, tmp_path: Path) -> None:
    model, processor = loaded
    (tmp_path / "plain").mkdir()
    folder = save(model, tmp_path / "saved", processor=processor)
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    kept = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    assert torch.equal(logits(plain, AutoProcessor.from_pretrained(folder)), logits(kept, processor))
    assert (folder / "model.safetensors").is_file()
    assert not [name for name in files(folder) if name.endswith((".bin", ".pt", ".pkl"))]
    assert folder.stat().st_mode & 0o077 == (folder / ".." / "plain").stat().st_mode & 0o077  # not private


def test_the_compressor_file_says_class_settings_and_versions(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    folder = save(loaded[0], tmp_path / "saved")
    assert json.loads((folder / COMPRESSOR_FILE).read_text()) == {
        "schema_version": 1,
        "mmtoken_version": mmtoken.__version__,
        **FastV(keep=0.25, layer=1).to_dict(),
    }


def test_without_a_compressor_or_processor_there_are_no_files_of_them(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint)
    folder = save(model, tmp_path / "bare")
    assert not (folder / COMPRESSOR_FILE).exists() and not (folder / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    whole = save(model, tmp_path / "whole", processor=processor)
    assert attached(load(whole)[0]) is None


def test_a_compressor_attached_for_a_while_is_saved_only_meanwhile(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load(checkpoint)
    with compress(model, DivPrune(keep=3)):
        during = save(model, tmp_path / "during")
    after = save(model, tmp_path / "after")
    assert json.loads((during / COMPRESSOR_FILE).read_text())["init_args"]["keep"] == 3
    assert not (after / COMPRESSOR_FILE).exists()
    assert files(during).keys() - files(after).keys() == {COMPRESSOR_FILE}


def test_a_given_compressor_goes_before_a_saved_one(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    folder = save(loaded[0], tmp_path / "saved", processor=loaded[1])
    session = attached(load(folder, compressor=DivPrune(keep=2))[0])
    assert session is not None and session.compressor == DivPrune(keep=2)


def test_a_folder_with_something_in_it_is_refused_and_an_empty_one_taken(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    (target / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"folder=.* is not empty; .* overwrite=True"):
        save(loaded[0], target)
    assert files(target) == {"diary.txt": b"mine"}
    (target / "diary.txt").unlink()
    save(loaded[0], target)
    assert (target / "config.json").is_file()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="folder="):
            save(loaded[0], target / "config.json", overwrite=overwrite)


def test_overwriting_replaces_the_whole_folder(loaded: tuple[Any, Any], checkpoint: Path, tmp_path: Path) -> None:
    target = save(loaded[0], tmp_path / "saved", processor=loaded[1])
    (target / "old.txt").write_text("old")
    model, _ = load(checkpoint)
    assert save(model, str(target), overwrite=True) == target
    assert not {"old.txt", COMPRESSOR_FILE, "tokenizer.json"} & files(target).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "no temporary folder may stay"


@pytest.mark.parametrize("failing", ["model", "processor"])
def test_a_save_that_fails_leaves_nothing_and_the_old_folder_as_it_was(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model, processor = loaded
    target = save(model, tmp_path / "saved", processor=processor)
    before = files(target)

    def half(folder: str | Path, *args: Any, **kwargs: Any) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "half.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(model if failing == "model" else processor, "save_pretrained", half)
    for place, overwrite in ((target, True), (tmp_path / "new", False)):
        with pytest.raises(OSError, match="No space left"):
            save(model, place, processor=processor, overwrite=overwrite)
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save(loaded[0], tmp_path / "saved")
    before = files(target)
    rename = Path.rename

    def stubborn(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise PermissionError("not now")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(PermissionError):
        save(loaded[0], target, overwrite=True)
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# What a compressor file may hold

_FASTV = {"mmtoken_version": "0.1.0", "class_path": "mmtoken.compressors.FastV", "init_args": {"keep": 4, "layer": 1}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"fastv"',
        b"{}",
        b'{"schema_version": 1, "mmtoken_version": "0.1.0", "class_path": "mmtoken.compressors.FastV"}',
        b'{"mmtoken_version": "0.1.0", "class_path": "mmtoken.compressors.FastV", "init_args": {}}',
        b'{"schema_version": 1, "class_path": "mmtoken.compressors.FastV", "init_args": {}}',
        b'{"schema_version": 1, "mmtoken_version": 7, "class_path": "mmtoken.compressors.FastV", "init_args": {}}',
        b"[" * 100_000,
        b" " * 2**21 + b"{}",
    ],
)
def test_a_malformed_compressor_file_is_named(copy: Path, content: bytes) -> None:
    (copy / COMPRESSOR_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{COMPRESSOR_FILE} is no compressor file .*; delete it"):
        load(copy)
    assert attached(load(copy, compressor=DivPrune())[0]) is not None  # the way round it


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schema_version": 2}, CheckpointError, "schema_version=2, this mmtoken reads 1; upgrade mmtoken"),
        ({"schema_version": None}, CheckpointError, "schema_version=None"),
        ({"mmtoken_version": "1.0"}, CheckpointError, "mmtoken_version='1.0' and this is .*; upgrade mmtoken"),
        ({"class_path": "mmtoken.compressors.base.check_whole"}, UnknownNameError, "check_whole"),
        ({"class_path": "mmtoken.compressors.Compressor"}, UnknownNameError, "Compressor"),
        ({"class_path": "mmtoken.compressors.Trained"}, UnknownNameError, "Trained"),
        ({"class_path": "torch.nn.Linear"}, UnknownNameError, "torch.nn.Linear"),
        ({"class_path": "mmtoken.compressors.FastVV"}, UnknownNameError, "did you mean 'fastv'"),
        ({"class_path": "os.system", "init_args": {"command": "true"}}, UnknownNameError, "os.system"),
        ({"class_path": "subprocess.Popen", "init_args": {"args": "true"}}, UnknownNameError, "subprocess.Popen"),
        ({"class_path": "antigravity.Anything"}, UnknownNameError, "import it first"),
        ({"class_path": 7}, MMTokenError, "class_path"),
        ({"init_args": {"keep": 4, "layr": 1}}, MMTokenError, "did you mean 'layer'"),
        ({"init_args": {"keep": 0}}, KeepError, "keep=0"),
        ({"init_args": {"keep": 4, "layer": "1"}}, MMTokenError, "layer='1'"),
        ({"init_args": {"keep": [4]}}, MMTokenError, "keep="),
        (
            {"class_path": "mmtoken.compressors.TokenCorr", "init_args": {"factor": 10**400}},
            CheckpointError,
            "refuses its settings",
        ),
        ({"init_args": [1]}, MMTokenError, "init_args"),
    ],
)
def test_a_compressor_file_that_asks_for_something_else_is_refused(
    copy: Path, change: dict[str, Any], error: type[MMTokenError], message: str
) -> None:
    (copy / COMPRESSOR_FILE).write_text(json.dumps({"schema_version": 1, **_FASTV, **change}))
    with pytest.raises(error, match=message):
        load(copy)


def test_a_compressor_file_of_another_minor_version_of_mmtoken_is_read(copy: Path) -> None:
    (copy / COMPRESSOR_FILE).write_text(json.dumps({"schema_version": 1, **_FASTV, "mmtoken_version": "0.99.1"}))
    session = attached(load(copy)[0])
    assert session is not None and session.compressor == FastV(keep=4, layer=1)


# The zoo


def test_every_zoo_entry_that_is_listed_is_there() -> None:
    listed = list_models()
    assert mmtoken.list_models() == listed
    assert DEFAULT in [entry.name for entry in listed] and len({entry.name for entry in listed}) == len(listed)
    for entry in listed:
        assert (entry.path / "model.safetensors").is_file() and entry.description and entry.licence
        assert find_model(entry.name) == entry
    assert set(listed) <= set(ZOO)


def test_an_entry_whose_files_did_not_come_along_is_neither_listed_nor_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = ZooModel("ghost", "not shipped", "ghost", "ghost")
    monkeypatch.setattr(registry, "ZOO", (*ZOO, ghost))
    assert ghost not in list_models()
    with pytest.raises(UnknownNameError, match="Known: tiny-document, tiny-llava"):
        find_model("ghost")


# What load refuses, and what it takes to ask which compressors fit


def test_a_skeleton_has_no_weights_and_is_enough_to_check(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    folder = save(loaded[0], tmp_path / "saved", processor=loaded[1])
    (folder / "model.safetensors").unlink()  # is not even looked for
    model, saved = skeleton(folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert saved == FastV(keep=0.25, layer=1) and attached(model) is None
    mmtoken.check(model, FastV(keep=4, layer=2))
    with pytest.raises(UnsupportedError, match="layer=3 but this decoder has 3 layers"):
        mmtoken.check(model, FastV(keep=4, layer=3))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "clip_vision_model"])
def test_half_a_vision_language_model_is_refused(copy: Path, kind: str) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedError, match=rf"is a bare .*model_type='{kind}'.* mmtoken\.compress"):
        load(copy)


def test_a_family_without_adapter_is_refused_before_its_weights_are_read(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"")
    for kind in ("glm4v", "a-family-of-tomorrow"):
        (copy / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UnsupportedError, match=rf"model_type='{kind}' has no adapter.* Known: .*llava"):
            load(copy)


def test_tensors_that_are_missing_or_of_another_shape_are_not_made_up(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if "up_proj" in key)
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \[96, 5\] and config\.json asks for \[96, 64\]"):
        load(copy)
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, .*up_proj\.weight among them"):
        load(copy)


def test_a_package_that_the_processor_needs_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*args: object, **kwargs: object) -> None:
        raise ImportError("Package `num2words` is required.\nInstall it.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(UnsupportedError, match=r"needs a package that is missing: Package `num2words` is required\."):
        load(copy)


def test_a_part_of_a_processor_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For some folders `AutoProcessor` returns a tokenizer alone."""
    tokenizer = AutoProcessor.from_pretrained(copy).tokenizer
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(CheckpointError, match=r"of its processor there is only a \w*Tokenize"):
        load(copy)


def test_a_compressor_without_a_place_in_a_module_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Mine(DivPrune):
        pass

    model, _ = load(checkpoint, compressor=Mine(keep=3))
    with pytest.raises(UnsupportedError, match=r"cannot be found again as 'tests\.test_hub\.Mine'"):
        save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Ours(DivPrune):
    """A compressor outside mmtoken."""


def test_a_compressor_of_another_module_is_saved_and_found_when_it_is_imported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load(checkpoint, compressor=Ours(keep=3))
    folder = save(model, tmp_path / "saved", processor=processor)
    session = attached(load(folder)[0])
    assert session is not None and session.compressor == Ours(keep=3)
    monkeypatch.delitem(sys.modules, "tests.test_hub")
    with pytest.raises(UnknownNameError, match=rf"{COMPRESSOR_FILE}: class_path='tests.test_hub.Ours' .* import it"):
        load(folder)


def test_overwriting_does_not_take_what_is_no_checkpoint(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no checkpoint, so overwrite=True does not replace it"):
        save(loaded[0], tmp_path, overwrite=True)
    assert files(tmp_path) == {"diary.txt": b"mine"}


def test_without_a_network_an_id_is_looked_for_in_the_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[object] = []

    def unknown(*args: object) -> None:
        lookups.append(args)
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("mmtoken.repository.getproxies", dict)
    with pytest.raises(CheckpointError, match="model='org/name' cannot be loaded"):
        load("org/name", cache_dir=tmp_path)
    # One is ours, and huggingface_hub may look once for a list of agents; five retries per file would follow.
    assert 1 <= len(lookups) <= 2
