"""Learned parts are saved beside the compressor file as safetensors, and come back with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtoken import attached, check, learnable, load, save
from mmtoken.compressors import BUS, QueCC, Trained
from mmtoken.compressors.pretrained import COMPRESSOR_FILE, PARTS_FILE
from mmtoken.engine.session import attach
from mmtoken.errors import CheckpointError, InputError, UnsupportedError
from mmtoken.hub import skeleton
from tests.backbones.processors import conversation, photograph, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llava", tmp_path_factory.mktemp("llava"), layers=3)


def logits(model: Any, processor: Any) -> torch.Tensor:
    turns = [conversation("What is shown?", photograph(1))]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(params=[QueCC(keep=0.25), BUS(keep=0.5, queries="patches"), BUS(keep=3, queries="learned")], ids=repr)
def trained(request: pytest.FixtureRequest, checkpoint: Path) -> Trained:
    model, _ = load(checkpoint)
    return learnable(model, request.param, seed=5).eval()  # torch adds up in another order while training


@pytest.fixture
def saved(trained: Trained, checkpoint: Path, tmp_path: Path) -> Path:
    model, processor = load(checkpoint, compressor=trained)
    return save(model, tmp_path / "saved", processor=processor)


def test_what_was_trained_loads_with_its_weights_and_the_same_logits(
    trained: Trained, checkpoint: Path, tmp_path: Path
) -> None:
    model, processor = load(checkpoint, compressor=trained)
    want = logits(model, processor)
    folder = save(model, tmp_path / "saved", processor=processor)
    again, processor = load(folder)
    session = attached(again)
    assert session is not None and session.trained is not None and session.trained is not trained
    assert session.compressor == trained.compressor
    assert not session.trained.training
    for key, value in trained.state_dict().items():
        assert torch.equal(session.trained.state_dict()[key], value), key
    assert all(p.requires_grad and p.device.type == "cpu" for p in session.trained.parameters())
    assert torch.equal(logits(again, processor), want)
    session.detach()
    assert not torch.equal(logits(again, processor), want)


def test_the_files_hold_the_weights_once_and_no_pickle(trained: Trained, saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {COMPRESSOR_FILE, PARTS_FILE} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in names)
    parts = load_file(saved / PARTS_FILE)
    assert parts.keys() == trained.module.state_dict().keys()
    model = load_file(saved / "model.safetensors")
    assert not any(name.startswith(("module.", "selector.", "pool.")) for name in model)
    record = json.loads((saved / COMPRESSOR_FILE).read_text())
    assert {name: record[name] for name in ("class_path", "init_args")} == json.loads(
        json.dumps(trained.compressor.to_dict())
    )


def test_what_is_no_longer_attached_is_not_saved(trained: Trained, checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load(checkpoint)
    attach(model, trained).detach()
    folder = save(model, tmp_path / "plain")
    assert not (folder / PARTS_FILE).exists() and not (folder / COMPRESSOR_FILE).exists()


def test_a_save_that_fails_leaves_nothing(
    trained: Trained, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(checkpoint, compressor=trained)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mmtoken.compressors.pretrained.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_parts_on_another_device_than_the_model_are_told_how_to_follow(trained: Trained, checkpoint: Path) -> None:
    model, processor = load(checkpoint, compressor=trained)
    trained.to("meta")
    with pytest.raises(InputError, match=r"are on meta and what they read is on cpu; move them too: .*to\('cpu'\)"):
        logits(model, processor)


def test_missing_parts_are_named(saved: Path) -> None:
    (saved / PARTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{PARTS_FILE} with its learned parts is missing"):
        load(saved)


def test_parts_that_are_broken_or_of_another_shape_are_named(saved: Path) -> None:
    parts = {key: value.clone() for key, value in load_file(saved / PARTS_FILE).items()}
    (saved / PARTS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=f"{PARTS_FILE} cannot be loaded as the learned parts"):
        load(saved)
    name = next(iter(parts))
    save_file(parts | {name: torch.zeros(2, 2)}, saved / PARTS_FILE)
    with pytest.raises(CheckpointError, match="cannot be loaded as the learned parts"):
        load(saved)
    save_file({key: value for key, value in parts.items() if key != name}, saved / PARTS_FILE)
    with pytest.raises(CheckpointError, match="cannot be loaded as the learned parts"):
        load(saved)


def test_parts_are_no_weights_of_a_model(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle"):
        load(saved)


def test_a_compressor_given_goes_before_saved_parts(saved: Path) -> None:
    (saved / PARTS_FILE).unlink()  # nobody asks for them
    model, _ = load(saved, compressor="divprune")
    session = attached(model)
    assert session is not None and session.trained is None
    with pytest.raises(UnsupportedError, match="has learned parts"):
        load(saved, compressor="quecc")


def test_a_skeleton_says_what_was_saved_and_whether_it_fits(saved: Path, trained: Trained) -> None:
    model, compressor = skeleton(saved)
    assert compressor == trained.compressor
    check(model, learnable(model, compressor))
