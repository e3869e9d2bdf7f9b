"""Compressors and models go to a hub and come back through its real client; what is hostile or broken is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

import mmtoken
from mmtoken import attached, learnable, load, push, save
from mmtoken.cli.main import main
from mmtoken.compressors import BUS, DivPrune, FastV, QueCC, Sequential, Trained
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.pretrained import CARD_FILE, COMPRESSOR_FILE, PARTS_FILE
from mmtoken.compressors.registry import COMPRESSORS, resolve
from mmtoken.errors import CheckpointError, MMTokenError, UnknownNameError
from tests.backbones.processors import conversation, photograph, write_checkpoint
from tests.hub_server import HubServer

pytestmark = pytest.mark.lowest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that the client of this process takes for the real one, with an empty cache; nobody else is reached."""
    server = HubServer()
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"an attempt to reach the network: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries
    monkeypatch.setenv("HF_TOKEN", "")
    # Some versions of transformers keep a client of the address that they saw first.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    yield server
    server.close()
    assert not server.unknown, "the client asked for what this hub does not speak"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llava", tmp_path_factory.mktemp("llava"), layers=3)


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> Trained:
    return learnable(load(checkpoint)[0], QueCC(keep=0.25), seed=5).eval()


@pytest.fixture
def written(trained: Trained, tmp_path: Path) -> dict[str, bytes]:
    """The files of a QueCC with learned parts."""
    return contents(trained.save_pretrained(tmp_path / "written"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model: Any, processor: Any) -> torch.Tensor:
    turns = [conversation("What is shown?", photograph(1))]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def changed(files: dict[str, bytes], **entries: Any) -> dict[str, bytes]:
    """The files of a compressor with other entries in its JSON."""
    return {**files, COMPRESSOR_FILE: json.dumps({**json.loads(files[COMPRESSOR_FILE]), **entries}).encode()}


def with_parts(files: dict[str, bytes], parts: bytes) -> dict[str, bytes]:
    """The same with other learned parts, that its JSON vouches for."""
    return {**changed(files, parts_sha256=hashlib.sha256(parts).hexdigest()), PARTS_FILE: parts}


def cached(tmp_path: Path) -> set[str]:
    """Names of the files that the client's cache shows."""
    return {path.name for path in (tmp_path / "cache").rglob("*") if "snapshots" in path.parts and not path.is_dir()}


# There and back

LEARNED = [
    *(resolve(kind.__name__, keep=0.25) for kind in COMPRESSORS if kind.trainable),
    BUS(keep=3, queries="learned"),
    Sequential([QueCC(keep=0.25), DivPrune(keep=0.5)]),
]


@pytest.mark.parametrize("method", LEARNED, ids=repr)
def test_learned_parts_come_back_from_a_folder_and_from_the_hub(
    method: Compressor, checkpoint: Path, hub: HubServer, tmp_path: Path
) -> None:
    model, processor = load(checkpoint)
    given = learnable(model, method, seed=5).eval()
    folder = given.save_pretrained(tmp_path / "deep" / "saved")
    assert contents(folder).keys() == {COMPRESSOR_FILE, PARTS_FILE, CARD_FILE}
    commit = given.push_to_hub("org/learned")
    assert hub.repositories["org/learned"].branches["main"] == commit
    assert {n: hub.repositories["org/learned"].files[n] for n in (COMPRESSOR_FILE, PARTS_FILE)} == {
        n: contents(folder)[n] for n in (COMPRESSOR_FILE, PARTS_FILE)
    }
    for found in (
        Trained.from_pretrained(folder),
        Trained.from_pretrained("org/learned"),
        type(method).from_pretrained("org/learned", revision=commit),
    ):
        assert isinstance(found, Trained) and not found.training
        assert found.compressor == method and found.dims == given.dims and same(found, given)
    mmtoken.attach(model, given)
    want = logits(model, processor)
    again, _ = load(checkpoint, compressor="org/learned")
    session = attached(again)
    assert session is not None and session.compressor == method
    assert torch.equal(logits(again, processor), want)
    session.detach()
    assert not torch.equal(logits(again, processor), want)


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if not kind.trainable], ids=lambda kind: kind.__name__)
def test_settings_come_back(kind: type[Compressor], tmp_path: Path) -> None:
    method = resolve(kind.__name__, keep=0.25) if kind.control else resolve(kind.__name__)
    folder = method.save_pretrained(tmp_path / "saved")
    assert contents(folder).keys() == {COMPRESSOR_FILE, CARD_FILE}
    assert Compressor.from_pretrained(folder) == kind.from_pretrained(str(folder)) == method
    assert f"# {kind.title}\n" in (folder / CARD_FILE).read_text()


@pytest.mark.parametrize("entry", mmtoken.list_models(), ids=lambda entry: entry.name)
def test_zoo_models_come_back(entry: Any, hub: HubServer) -> None:
    commit = push(entry.path, f"org/{entry.name}")
    repository = hub.repositories[f"org/{entry.name}"]
    assert len(repository.commits) == 2 and repository.branches["main"] == commit  # it was made with one
    assert {name: data for name, data in repository.files.items() if name != ".gitattributes"} == contents(entry.path)
    model, processor = load(f"org/{entry.name}")
    kept, its_processor = load(entry.name)
    assert same(model, kept) and type(model) is type(kept) and type(processor) is type(its_processor)
    assert attached(model) is None


def test_a_model_and_its_learned_compressor_come_back_together(
    trained: Trained, checkpoint: Path, hub: HubServer, tmp_path: Path
) -> None:
    model, processor = load(checkpoint, compressor=trained)
    want = logits(model, processor)
    push(save(model, tmp_path / "saved", processor=processor), "org/model")
    again, processor = load("org/model")
    session = attached(again)
    assert session is not None and session.trained is not None and same(session.trained, trained)
    assert torch.equal(logits(again, processor), want)
    assert Trained.from_pretrained("org/model").compressor == trained.compressor
    DivPrune(keep=3).push_to_hub("org/other")
    session = attached(load("org/model", compressor="org/other")[0])
    assert session is not None and session.compressor == DivPrune(keep=3)


def test_the_client_as_users_have_it(trained: Trained, checkpoint: Path, hub: HubServer, tmp_path: Path) -> None:
    """A process of its own whose only sign of this hub is HF_ENDPOINT, set before anything is imported."""
    folder = trained.save_pretrained(tmp_path / "saved")
    code = (
        "import mmtoken\nfrom mmtoken.compressors import Trained\n"
        f"Trained.from_pretrained({str(folder)!r}).push_to_hub('org/learned', token='hf_me')\n"
        f"mmtoken.push({str(checkpoint)!r}, 'org/model', token='hf_me')\n"
        "model, _ = mmtoken.load('org/model', compressor='org/learned')\n"
        "print(mmtoken.attached(model).compressor)"
    )
    root = str(Path(__file__).parents[1])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{trained.compressor!r}\n"
    assert hub.repositories.keys() == {"org/learned", "org/model"}


# Transfers that break off


@pytest.mark.parametrize("name", ["model.safetensors", PARTS_FILE])
def test_a_download_goes_on_where_it_broke_off(
    name: str,
    trained: Trained,
    checkpoint: Path,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what the client keeps is whole chunks
    model, processor = load(checkpoint, compressor=trained)
    push(save(model, tmp_path / "saved", processor=processor), "org/model")
    hub.cut[name] = [20_500, 2_500, 0]
    again, _ = load("org/model")
    assert same(again, model)
    ranges = [line.rpartition(" ")[2] for line in hub.requests if name in line and line.endswith("-")]
    assert ranges == ["bytes=20000-", "bytes=22000-", "bytes=22000-"]


def test_a_download_that_fails_shows_nothing_and_a_later_one_succeeds(
    written: dict[str, bytes], trained: Trained, hub: HubServer, tmp_path: Path
) -> None:
    hub.add("org/learned", written)
    hub.cut[PARTS_FILE] = [100, *[0] * 20]
    with pytest.raises(CheckpointError, match=r"compressor='org/learned' cannot be loaded \("):
        Trained.from_pretrained("org/learned")
    assert cached(tmp_path) == {COMPRESSOR_FILE}
    with pytest.raises(CheckpointError, match="not all of its files are in the cache"):
        Trained.from_pretrained("org/learned", local_files_only=True)
    hub.cut.clear()
    assert same(Trained.from_pretrained("org/learned"), trained)


@pytest.mark.parametrize("request_", [("POST", "/commit/"), ("PUT", "/lfs/"), ("POST", "/preupload/")], ids=str)
def test_an_upload_that_fails_changes_nothing(
    request_: tuple[str, str], trained: Trained, written: dict[str, bytes], hub: HubServer
) -> None:
    DivPrune(keep=3).push_to_hub("org/learned")
    before = dict(hub.repositories["org/learned"].files)
    hub.refuse[request_] = 403
    with pytest.raises(CheckpointError, match=r"not pushed to 'org/learned' \(.*; the repository's files are as they"):
        trained.push_to_hub("org/learned")
    assert hub.repositories["org/learned"].files == before
    assert Compressor.from_pretrained("org/learned") == DivPrune(keep=3)
    hub.refuse.clear()
    trained.push_to_hub("org/learned")
    assert len(hub.repositories["org/learned"].commits) == 3, "made, DivPrune, QueCC: one commit each"


def test_pushing_replaces_weights_and_compressor_and_keeps_other_files(
    trained: Trained, checkpoint: Path, hub: HubServer, tmp_path: Path
) -> None:
    model, processor = load(checkpoint, compressor=trained)
    push(save(model, tmp_path / "saved", processor=processor), "org/model")
    files = hub.repositories["org/model"].files
    hub.add("org/model", {**files, "figure.png": b"mine", "model-00001-of-00002.safetensors": b"old"})
    commit = push(checkpoint, "org/model")
    left = hub.repositories["org/model"].files
    assert left["figure.png"] == b"mine"
    assert not {COMPRESSOR_FILE, PARTS_FILE, "model-00001-of-00002.safetensors"} & left.keys()
    assert attached(load("org/model", revision=commit)[0]) is None
    FastV(keep=4, layer=1).push_to_hub("org/learned")
    trained.push_to_hub("org/learned")
    FastV(keep=4, layer=1).push_to_hub("org/learned")
    assert PARTS_FILE not in hub.repositories["org/learned"].files


def test_what_is_not_whole_is_not_pushed(
    trained: Trained, written: dict[str, bytes], hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "written"
    for name, data in {"deep/optimizer.pt": b"x", "weights.bin": b"x"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"holds {name}, a pickle"):
            push(folder, "org/learned")
        (folder / name).unlink()
    (folder / PARTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{PARTS_FILE} with its learned parts is missing"):
        push(folder, "org/learned")
    (folder / COMPRESSOR_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json and no mmtoken_compressor\.json"):
        push(folder, "org/learned")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        push(folder, "org/learned")
    with pytest.raises(CheckpointError, match="does not exist"):
        push(tmp_path / "nothing", "org/learned")
    assert not hub.requests


# What the hub refuses, and the cache


def test_what_the_hub_has_not_or_does_not_show_is_named(checkpoint: Path, hub: HubServer) -> None:
    with pytest.raises(CheckpointError, match=r"model='org/model' cannot be loaded: the hub has no such repository"):
        load("org/model")
    with pytest.raises(CheckpointError, match=r"compressor='org/none' cannot be loaded: the hub has no such repos"):
        load(checkpoint, compressor="org/none")
    push(checkpoint, "org/model")
    with pytest.raises(CheckpointError, match=r"model='org/model' .* it has no revision='v2'"):
        load("org/model", revision="v2")
    with pytest.raises(CheckpointError, match=rf"compressor='org/model' cannot be loaded: it has no {COMPRESSOR_FILE}"):
        load(checkpoint, compressor="org/model")
    DivPrune(keep=3).push_to_hub("org/divprune")
    with pytest.raises(CheckpointError, match=r"model='org/divprune' cannot be loaded: it has no config\.json"):
        load("org/divprune")
    hub.repositories["org/model"].gated = True
    with pytest.raises(CheckpointError, match=r"model='org/model' cannot be loaded: it is gated; ask for access"):
        load("org/model")
    assert load("org/model", token="hf_friend")[0].config.model_type == "llava"
    for name in ("a/b/c", "./nothing", "nothing"):
        with pytest.raises(CheckpointError, match="is no folder and no repository"):
            Compressor.from_pretrained(name)


def test_the_cache_is_enough_without_the_hub(trained: Trained, checkpoint: Path, hub: HubServer, caplog: Any) -> None:
    push(checkpoint, "org/model")
    trained.push_to_hub("org/learned")
    with pytest.raises(CheckpointError, match=r"model='org/model' .* not all of its files are in the cache"):
        load("org/model", local_files_only=True)
    model, _ = load("org/model")
    Trained.from_pretrained("org/learned")
    hub.requests.clear()
    again, _ = load("org/model", local_files_only=True)
    assert same(again, model) and attached(again) is None
    assert not [record for record in caplog.records if "offline" in record.message], "that there is none is known"
    found = load("org/model", compressor="org/learned", local_files_only=True)[0]
    session = attached(found)
    assert session is not None and session.trained is not None and same(session.trained, trained)
    assert not hub.requests
    hub.add("org/model", {})  # and a repository that was emptied is no obstacle
    assert same(load("org/model", local_files_only=True)[0], model)


def test_what_another_program_fetched_is_enough_without_the_hub(
    trained: Trained, checkpoint: Path, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its cache does not say which files the repository lacks."""
    push(checkpoint, "org/model")
    hub.add("org/bare", {"config.json": (checkpoint / "config.json").read_bytes(), "pytorch_model.bin": b""})
    for name in ("org/model", "org/bare"):
        huggingface_hub.snapshot_download(name)
    hub.requests.clear()
    assert same(load("org/model", local_files_only=True)[0], load(checkpoint)[0])
    assert "whether org/model was saved with a compressor is not known" in caplog.text
    with pytest.raises(CheckpointError, match=r"model='org/bare' .* not all of its files are in the cache"):
        load("org/bare", local_files_only=True)
    assert not hub.requests


# Revisions


def test_all_files_are_of_the_commit_that_the_first_one_was_of(
    trained: Trained, checkpoint: Path, hub: HubServer
) -> None:
    other = learnable(load(checkpoint)[0], QueCC(keep=0.25), seed=6)
    first = trained.push_to_hub("org/learned")
    second = other.push_to_hub("org/learned")
    branches = hub.repositories["org/learned"].branches
    branches["main"] = first

    def move(request: str) -> None:
        """The branch moves on between the settings and the weights."""
        if PARTS_FILE in request:
            branches["main"] = second

    hub.watch = move
    assert same(Trained.from_pretrained("org/learned"), trained) and branches["main"] == second
    assert same(Trained.from_pretrained("org/learned"), other)
    assert same(Trained.from_pretrained("org/learned", revision=first), trained)


def test_a_model_is_of_one_commit_too(checkpoint: Path, hub: HubServer) -> None:
    first = push(checkpoint, "org/model")

    def move(request: str) -> None:
        if "adapter_config.json" in request:
            hub.repositories["org/model"].commit({"config.json": b"{}", "adapter_config.json": b"{}", "a.bin": b"evil"})

    hub.watch = move
    load("org/model")
    assert hub.repositories["org/model"].branches["main"] != first
    assert not [
        line for line in hub.requests if "/resolve/" in line and first not in line and "/main/config" not in line
    ]


def test_settings_and_weights_of_two_revisions_are_refused(
    trained: Trained, checkpoint: Path, written: dict[str, bytes], hub: HubServer, tmp_path: Path
) -> None:
    other = learnable(load(checkpoint)[0], QueCC(keep=0.25), seed=6)
    hub.add("org/mixed", {**written, PARTS_FILE: contents(other.save_pretrained(tmp_path / "other"))[PARTS_FILE]})
    with pytest.raises(CheckpointError, match="was saved with other weights, perhaps of another revision"):
        Trained.from_pretrained("org/mixed")


# Hostile compressors


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"class_path": "os.system", "init_args": {"command": "touch hacked"}}, UnknownNameError, "os.system"),
        ({"class_path": "mmtoken.compressors.Nothing"}, UnknownNameError, "Nothing"),
        ({"class_path": "mmtoken.hub.load"}, UnknownNameError, "no Compressor"),
        ({"class_path": "mmtoken.compressors.trained.Trained"}, UnknownNameError, "unknown"),
        ({"class_path": ["mmtoken.compressors.QueCC"]}, MMTokenError, "class_path"),
        ({"mmtoken_version": "99.0.0"}, CheckpointError, "mmtoken_version='99.0.0' and this is .*; upgrade mmtoken"),
        ({"schema_version": 2}, CheckpointError, "schema_version=2"),
        ({"init_args": {"keep": 0.25, "head": 8}}, MMTokenError, "did you mean 'heads'"),
        ({"init_args": {"keep": 0.25, "heads": "8"}}, MMTokenError, "heads='8'"),
        ({"init_args": {"keep": 0.25, "heads": 7}}, CheckpointError, "no QueCC can be built .*heads=7 does not divide"),
        ({"dims": None}, CheckpointError, "without dims and parts_sha256"),
        ({"parts_sha256": None}, CheckpointError, "without dims and parts_sha256"),
        ({"parts_sha256": "0" * 64}, CheckpointError, "was saved with other weights"),
        ({"dims": {"tower": 1}}, CheckpointError, "is no compressor file"),
        ({"dims": {"tower": -1, "tokens": 1, "llm": 1, "blocks": 1}}, CheckpointError, "tower=-1"),
        ({"dims": {"tower": 10**30, "tokens": 32, "llm": 32, "blocks": 1}}, CheckpointError, "cannot|can be built"),
        ({"dims": {"tower": 32, "tokens": 64, "llm": 64, "blocks": 1}}, CheckpointError, r"is \[\d+.*instead of \["),
    ],
)
def test_a_hostile_compressor_file_is_refused(
    entries: dict[str, Any], error: type[MMTokenError], message: str, written: dict[str, bytes], hub: HubServer
) -> None:
    hub.add("org/evil", changed(written, **entries))
    with pytest.raises(error, match=message):
        Compressor.from_pretrained("org/evil")
    assert not Path("hacked").exists()


def test_hostile_learned_parts_are_refused(written: dict[str, bytes], hub: HubServer, tmp_path: Path) -> None:
    parts = load_bytes(written[PARTS_FILE])
    key = sorted(parts)[0]
    missing = {name: value for name, value in parts.items() if name != key}
    cases: list[tuple[bytes, str]] = [
        (save_bytes(missing), f"{key} is missing"),
        (save_bytes({**parts, "more": torch.zeros(1)}), "more is none of them"),
        (save_bytes({**parts, key: torch.zeros(2, 3)}), rf"{key} is \[2, 3\] instead of \["),
        (save_bytes({**parts, key: parts[key].to(torch.int32)}), f"{key} is torch.int32 instead of torch.float32"),
        (written[PARTS_FILE][:-1], "cannot be loaded as the learned parts of a QueCC"),
        (written[PARTS_FILE][:20], "cannot be loaded as the learned parts of a QueCC"),
        (b"", "cannot be loaded as the learned parts of a QueCC"),
        (b"\x80\x04\x95", "cannot be loaded as the learned parts of a QueCC"),
        (b"\xff" * 8 + b"{}", "cannot be loaded as the learned parts of a QueCC"),
    ]
    for data, message in cases:
        hub.add("org/evil", with_parts(written, data))
        with pytest.raises(CheckpointError, match=message):
            Compressor.from_pretrained("org/evil")
    files = dict(written)
    files["pytorch_model.bin"] = files["mmtoken_compressor.bin"] = files.pop(PARTS_FILE)
    hub.add("org/evil", files)
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=f"{PARTS_FILE} with its learned parts is missing"):
        Compressor.from_pretrained("org/evil")
    assert not [line for line in hub.requests if ".bin" in line]


def test_a_class_is_asked_for_what_it_is(trained: Trained, tmp_path: Path) -> None:
    folder = trained.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"holds a QueCC, no BUS; use Compressor\.from_pretrained"):
        BUS.from_pretrained(folder)
    plain = FastV(keep=4, layer=1).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"holds a FastV, no Trained"):
        Trained.from_pretrained(plain)


# Hostile models


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle is read")

    monkeypatch.setattr(torch, "load", refuse)


def hostile(files: dict[str, bytes]) -> list[tuple[dict[str, bytes], str]]:
    """Model repositories that are refused, and what the message says."""
    whole = dict(files)
    weights = whole.pop("model.safetensors")
    config = json.loads(files["config.json"])
    single = {"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}

    def index(content: Any) -> dict[str, bytes]:
        return {**whole, "model.safetensors.index.json": json.dumps(content).encode()}

    def shards(name: Any) -> dict[str, bytes]:
        return index({**single, "weight_map": {"lm_head.weight": name}})

    def named(name: Any) -> dict[str, bytes]:
        return {**files, "config.json": json.dumps({**config, "transformers_weights": name}).encode()}

    bad = "only .*safetensors files beside it"
    return [
        ({**whole, "pytorch_model.bin": weights}, r"its weights as pytorch_model\.bin, a pickle"),
        ({**whole, "pytorch_model.bin.index.json": b"{}", "a.pt": b""}, r"its weights as a\.pt, a pickle"),
        (whole, r"no \*\.safetensors file"),
        ({**shards("pytorch_model.bin"), "pytorch_model.bin": weights}, bad),
        (shards("../../other/model.safetensors"), bad),
        (shards("/etc/model.safetensors"), bad),
        (shards("..\\model.safetensors"), bad),
        (shards(7), bad),
        ({**shards("../model.safetensors"), "model.safetensors": weights}, bad),
        (index([]), "is no index of weights"),
        ({**whole, "model.safetensors.index.json": b"{"}, "is no index of weights"),
        ({**named("adapter_model.bin"), "adapter_model.bin": weights}, bad),
        (named("../../model.safetensors"), bad),
        (named(["model.safetensors"]), bad),
        ({**files, "adapter_config.json": b'{"base_model_name_or_path": "evil/base"}'}, "holds adapter_config.json"),
        ({**files, "model.safetensors": weights[:-9]}, "cannot be loaded"),
    ]


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("number", range(16))
def test_a_hostile_model_is_refused(number: int, checkpoint: Path, hub: HubServer, tmp_path: Path) -> None:
    files, message = hostile(contents(checkpoint))[number]
    hub.add("org/evil", files)
    folder = tmp_path / "evil"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for place in ("org/evil", folder):
        with pytest.raises(CheckpointError, match=message):
            load(place)
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith((".bin", ".pt"))]
    with pytest.raises(CheckpointError, match=r"cannot be loaded|pickle|adapter|no \*|no index"):
        push(folder, "org/copy")
    assert "org/copy" not in hub.repositories


def test_there_is_a_case_for_every_number(checkpoint: Path) -> None:
    assert len(hostile(contents(checkpoint))) == 16


# Saving


def test_parts_without_sizes_and_sizes_without_parts_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(MMTokenError, match=r"has learned parts: save the Trained that"):
        trained.compressor.save_pretrained(tmp_path / "saved")
    with pytest.raises(MMTokenError, match=r"not known for which sizes .* Trained\(compressor, module, dims\)"):
        Trained(trained.compressor, trained.module).save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    folder = DivPrune(keep=3).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"exists and is not empty; .*overwrite=True"):
        FastV(keep=4, layer=1).save_pretrained(folder)
    assert Compressor.from_pretrained(folder) == DivPrune(keep=3)
    FastV(keep=4, layer=1).save_pretrained(folder, overwrite=True)
    assert Compressor.from_pretrained(folder) == FastV(keep=4, layer=1)
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no compressor, so overwrite=True does not replace it"):
        DivPrune(keep=3).save_pretrained(tmp_path, overwrite=True)


def test_a_save_that_breaks_off_leaves_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def fail(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == COMPRESSOR_FILE:
            raise OSError("no space left")
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        trained.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_parts_for_another_width_are_refused_with_both_numbers(trained: Trained, tmp_path: Path) -> None:
    folder = trained.save_pretrained(tmp_path / "saved")
    assert trained.dims is not None
    other, _ = load("tiny-llava")
    with pytest.raises(MMTokenError, match=rf"built for tower={trained.dims.tower} and this model has tower=\d+"):
        mmtoken.attach(other, Trained.from_pretrained(folder))
    with pytest.raises(MMTokenError, match=rf"built for tower={trained.dims.tower} and this model has tower=\d+"):
        load("tiny-llava", compressor=folder)


def test_the_card_says_what_was_measured(trained: Trained, tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "compressors" / "fastv" / "results.json"
    measured = json.loads(source.read_text())["models"][0]
    bench = {**measured, "kind": "accuracy", "results": [measured["dense"], *measured["results"]]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    for results in (bench, tmp_path / "bench.json", str(tmp_path / "bench.json")):
        method = FastV(keep=4, layer=1)
        card = (method.save_pretrained(tmp_path / "saved", results=results, overwrite=True) / CARD_FILE).read_text()
        best = measured["results"][0]
        assert f"| {best['name']} | {best['layer_average']['shapes_qa']:.1f} |" in card and "| dense |" in card
        assert "| `4` |" in card and card.startswith("---\nlibrary_name: mmtoken\n")
    for wrong, message in (
        ({**bench, "kind": "speed"}, "of kind 'speed'"),
        ({**bench, "results": bench["results"][:1]}, "holds no FastV"),
        ({"kind": "accuracy"}, "cannot be read"),
        (tmp_path / "nothing.json", "cannot be read"),
    ):
        with pytest.raises(MMTokenError, match=message):
            FastV(keep=4, layer=1).save_pretrained(tmp_path / "new", results=wrong)
    assert not (tmp_path / "new").exists()
    learned = (trained.save_pretrained(tmp_path / "learned") / CARD_FILE).read_text()
    assert trained.dims is not None and f"tower width {trained.dims.tower}," in learned


def test_the_command_line_takes_a_compressor_of_the_hub(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    FastV(keep=0.25, layer=1).push_to_hub("org/fastv")
    picture = str(Path(mmtoken.__file__).parent / "assets" / "samples" / "scene_1.png")
    words = ["run", "--image", picture, "--ask", "x", "--compressor", "org/fastv", "--compressor.layer", "2", "--json"]
    assert main(words) == 0
    settings = json.loads(capsys.readouterr().out)["compressor"]["init_args"]
    assert (settings["keep"], settings["layer"]) == (0.25, 2)


def test_the_examples_of_the_documentation_run(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "hub.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/hub.md", "exec"), names)
    session = attached(names["model"])
    assert session is not None and session.trained is not None and same(session.trained, names["trained"])
    assert hub.repositories.keys() == {"org/quecc-tiny-llava", "org/pruned"}
