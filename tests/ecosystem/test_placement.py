"""Models whose weights accelerate keeps elsewhere, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mmtoken import attach, compress
from mmtoken.compressors import FastV, SnapKV, STCCacher, VisionZip
from mmtoken.compressors.base import Compressor
from tests import oracle
from tests.backbones.processors import write_checkpoint
from tests.backbones.tiny_models import build, inputs
from tests.engine.agreement import tiny

accelerate = pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]


def places(model: nn.Module) -> dict[str, str]:
    """The parts of every other decoder layer on disk, the rest in memory."""
    decoder = next(name for name, part in model.named_modules() if part is oracle.text_model(model))
    parts = {
        f"{decoder}.layers.{number}.{part}": ("cpu", "disk")[number % 2]
        for number in range(4)
        for part in dict(oracle.text_model(model).layers[number].named_children())
    }
    held = {name.rpartition(".")[0] for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    rest = sorted(name for name in held if not name.startswith(f"{decoder}.layers."))
    return {**dict.fromkeys(rest, "cpu"), **parts}


def spread(model: Any, folder: Path) -> None:
    accelerate.dispatch_model(model, places(model), main_device="cpu", offload_dir=str(folder), force_hooks=True)


def all_on_disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device="cpu")


METHODS: dict[str, Compressor] = {
    "fastv": FastV(keep=0.4),
    "visionzip": VisionZip(keep=0.4),
    "snapkv": SnapKV(keep=0.4, window=2),
}


@pytest.mark.parametrize("first", ["attach", "dispatch"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "attn", "place"), [
    ("llava", "eager", spread),
    ("qwen3_vl", "sdpa", all_on_disk),
])  # fmt: skip
def test_weights_on_disk_change_nothing(
    family: str, attn: str, place: Callable[[Any, Path], None], name: str, first: str, tmp_path: Path
) -> None:
    method, model = METHODS[name], build(family, attn)
    batch = inputs(model, family, "image", "padded_ragged")
    with compress(tiny(family, attn), method):
        want = oracle.generate_with_logits(tiny(family, attn), batch, max_new_tokens=3)
    plain = oracle.generate_with_logits(tiny(family, attn), batch, max_new_tokens=3)
    if first == "dispatch":
        place(model, tmp_path)
    session = attach(model, method)
    if first == "attach":
        place(model, tmp_path)
    assert any(value.is_meta for value in model.parameters())
    got = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    session.detach()
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(oracle.generate_with_logits(model, batch, max_new_tokens=3).logits, plain.logits)
    assert oracle.hook_count(model) == 0
    accelerate.hooks.remove_hook_from_submodules(model)


@pytest.mark.parametrize("first", ["attach", "dispatch"])
def test_a_forward_that_is_replaced_and_one_that_is_wrapped_do_not_undo_each_other(first: str, tmp_path: Path) -> None:
    """STC-Cacher and accelerate both set the forward of tower blocks."""
    method, model = STCCacher(keep=0.5), build("qwen2_5_vl")
    batch = inputs(model, "qwen2_5_vl", "video", "plain")
    with compress(tiny("qwen2_5_vl"), method):
        want = oracle.generate_with_logits(tiny("qwen2_5_vl"), batch, max_new_tokens=3)
    plain = oracle.generate_with_logits(tiny("qwen2_5_vl"), batch, max_new_tokens=3)
    assert oracle.max_error(want.logits, plain.logits) > 1e-3
    if first == "dispatch":
        blocks_on_disk(model, tmp_path)
    session = attach(model, method)
    if first == "attach":
        blocks_on_disk(model, tmp_path)
    assert torch.equal(oracle.generate_with_logits(model, batch, max_new_tokens=3).logits, want.logits)
    session.detach()
    assert torch.equal(oracle.generate_with_logits(model, batch, max_new_tokens=3).logits, plain.logits)
    assert all("forward" in vars(block) for block in model.base_model.visual.blocks)  # accelerate's, as before


def blocks_on_disk(model: Any, folder: Path) -> None:
    names = {name: "cpu" for name in places(model) if ".visual.blocks." not in name}
    blocks = {f"model.visual.blocks.{number}": ("cpu", "disk")[number % 2] for number in range(4)}
    accelerate.dispatch_model(model, {**names, **blocks}, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def test_a_checkpoint_loaded_with_a_device_map(tmp_path: Path) -> None:
    folder = write_checkpoint("llava", tmp_path / "model")
    models = [
        tf.AutoModelForImageTextToText.from_pretrained(folder, **more)
        for more in ({}, {"device_map": places(tiny("llava")), "offload_folder": str(tmp_path / "offload")})
    ]
    assert any(value.is_meta for value in models[1].parameters())
    batch = inputs(tiny("llava"), "llava", "image", "padded_ragged")
    found = []
    for model in models:
        with compress(model, FastV(keep=0.4)):
            found.append(oracle.generate_with_logits(model, batch, max_new_tokens=3).logits)
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------ processes


def share(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """One of the two rows of a batch with one image each."""
    return {name: value[rank : rank + 1] for name, value in batch.items()}


def labelled(model: nn.Module) -> dict[str, Tensor]:
    batch = inputs(model, "llava", "image", "plain")
    return {**batch, "labels": oracle.labels_for(model, batch)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that torchrun started."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*words, "-m", "tests.ecosystem.rank", str(folder)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_each_process_generates_what_one_process_does(ranks: list[dict[str, Any]]) -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "plain")
    for rank, found in enumerate(ranks):
        with compress(model, FastV(keep=0.4)) as session:
            alone = oracle.generate_with_logits(model, share(batch, rank), max_new_tokens=3)
        assert torch.equal(found["sequences"], alone.sequences)
        assert torch.equal(found["logits"], alone.logits)
        assert found["kept"] == [kept.tolist() for kept in session.report.kept]
    assert not torch.equal(ranks[0]["logits"], ranks[1]["logits"])


@pytest.mark.parametrize("first", ["attached before", "attached after"])
def test_a_step_of_two_processes_has_the_mean_of_their_gradients(first: str, ranks: list[dict[str, Any]]) -> None:
    model = build("llava").train()
    shares = [share(labelled(model), rank) for rank in (0, 1)]
    with compress(model, FastV(keep=0.4)):
        parts = [oracle.loss_and_grads(model, part, part.pop("labels")) for part in shares]
    one, other = parts
    grads = {name: (one.grads[name] + other.grads[name]) / 2 for name in one.grads}
    for rank, found in enumerate(ranks):
        got = found[first]
        assert got["loss"] == pytest.approx(parts[rank].loss, abs=1e-6)
        assert oracle.grad_error(oracle.Gradients(0.0, got["grads"]), oracle.Gradients(0.0, grads)) <= 2e-5
