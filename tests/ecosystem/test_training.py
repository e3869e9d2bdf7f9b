"""Hugging Face's Trainer and peft, with a compressor attached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import mmtoken
from mmtoken import attached, compress, learnable
from mmtoken.compressors import DivPrune, FastV, QueCC, SnapKV, VisionZip
from mmtoken.compressors.base import Compressor
from mmtoken.errors import UnsupportedError
from mmtoken.training.callback import CompressionCallback
from tests import oracle
from tests.backbones.tiny_models import build, inputs, visual_mask
from tests.engine.agreement import assert_close, left_in_layers

peft = pytest.importorskip("peft")

ROWS = 4


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of one batch, as a collator takes them."""

    def __init__(self, model: Any) -> None:
        model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        batch = oracle.right_padded(inputs(model, "llava", "image", "left_padded"))
        labels = oracle.labels_for(model, batch)
        # What follows an image is predicted by its last token that is left.
        behind = nn.functional.pad(visual_mask(model, batch)[:, :-1], (1, 0))
        self.batch = {**batch, "labels": labels.masked_fill(behind, -100)}

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: value[number % 2] for name, value in self.batch.items()}


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], **more: Any) -> tf.Trainer:
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "max_grad_norm": 0.0,
        **more.pop("settings", {}),
    }
    settings = tf.TrainingArguments(output_dir=str(folder), **options)
    return tf.Trainer(model=model, args=settings, train_dataset=Rows(model), callbacks=callbacks, **more)


def test_trainer_takes_the_steps_that_a_loop_takes(tmp_path: Path) -> None:
    weights, hooks = [], []
    for by_trainer in (True, False):
        model = build("llava")
        if by_trainer:
            callback = CompressionCallback(FastV(keep=0.4, layer=1))
            trainer(model, tmp_path, [callback], settings={"optim": "sgd"}).train()
            assert callback.session is not None
            assert [report.compressor for report in callback.session.reports] == ["FastV"] * 2
            assert attached(model) is None
            hooks.append(oracle.hook_count(model))
        else:
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            rows = Rows(model)
            batch = {name: value[:2] for name, value in rows.batch.items()}
            with compress(model, FastV(keep=0.4, layer=1)):
                for _ in range(2):
                    optimizer.zero_grad()
                    model(**batch).loss.backward()
                    optimizer.step()
            hooks.append(oracle.hook_count(model))
        weights.append(dict(model.named_parameters()))
    assert hooks == [0, 0]
    moved = [name for name, value in build("llava").named_parameters() if not torch.equal(value, weights[0][name])]
    assert any("language_model" in name for name in moved)
    for name, value in weights[0].items():
        assert_close(value.detach(), weights[1][name].detach())


def test_a_checkpoint_of_trainer_is_the_plain_model(tmp_path: Path) -> None:
    model = build("llava")
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer(model, tmp_path, [CompressionCallback("divprune")], settings=settings).train()
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert "mmtoken" not in (tmp_path / "checkpoint-2" / "config.json").read_text()


def test_learned_parts_are_trained_if_the_optimizer_holds_them_and_refused_otherwise(tmp_path: Path) -> None:
    model = build("llava")
    trained = learnable(model, QueCC(keep=0.25))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with pytest.raises(UnsupportedError, match="does not hold the learned parts of QueCC"):
        trainer(model, tmp_path, [CompressionCallback(trained)]).train()
    assert attached(model) is None
    optimizer = torch.optim.AdamW([*model.parameters(), *trained.parameters()], lr=1e-2)
    trainer(model, tmp_path, [CompressionCallback(trained)], optimizers=(optimizer, None)).train()
    assert any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    frozen = {name: value.clone() for name, value in trained.requires_grad_(False).state_dict().items()}
    trainer(model, tmp_path, [CompressionCallback(trained)]).train()
    assert all(torch.equal(value, frozen[name]) for name, value in trained.state_dict().items())
    assert oracle.hook_count(model) == 0


def test_learned_parts_are_not_trained_in_several_processes() -> None:
    model = build("llava")
    trained = learnable(model, QueCC(keep=0.25))
    callback = CompressionCallback(trained)
    settings: Any = SimpleNamespace(world_size=2)
    nothing: Any = None
    given = {"model": model, "optimizer": torch.optim.SGD(trained.parameters(), lr=1e-2)}
    with pytest.raises(UnsupportedError, match="2 processes: Trainer averages gradients of the model only"):
        callback.on_train_begin(settings, nothing, nothing, **given)
    assert attached(model) is None
    trained.requires_grad_(False)
    callback.on_train_begin(settings, nothing, nothing, **given)
    assert attached(model) is callback.session is not None
    callback.detach()


def test_a_callback_can_be_detached_after_an_exception(tmp_path: Path) -> None:
    class Stop(tf.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, callback = build("llava"), CompressionCallback("divprune")
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, [callback, Stop()]).train()
    assert attached(model) is not None
    callback.detach()
    callback.detach()
    assert attached(model) is None
    assert oracle.hook_count(model) == 0


# ------------------------------------------------------------------------------------------------ peft

DECODER = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj)"
EVERYWHERE = ["q_proj", "k_proj", "v_proj"]


def with_lora(model: nn.Module, where: str | list[str] = DECODER) -> Any:
    """The model with adapters that change what it answers."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=where)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1, generator=generator)
    return adapted


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [FastV(keep=0.4), VisionZip(keep=0.4), SnapKV(keep=0.4, window=2)],
                         ids=lambda m: type(m).__name__)  # fmt: skip
def test_adapters_give_what_merged_weights_give(method: Compressor, attn: str) -> None:
    """Attached to peft's wrapper and to the model inside, before and after merging."""
    adapted = with_lora(build("llava", attn), EVERYWHERE)
    batch = inputs(adapted.get_base_model(), "llava", "image", "padded_ragged")
    found = []
    for target in (adapted, adapted.get_base_model()):
        with compress(target, method) as session:
            assert attached(adapted) is attached(adapted.get_base_model()) is session
            found.append((generate(adapted, batch), [k.tolist() for k in session.report.kept]))
        assert oracle.hook_count(adapted) == 0
    adapted.merge_adapter()
    with compress(adapted, method) as session:
        found.append((generate(adapted, batch), [k.tolist() for k in session.report.kept]))
    merged = adapted.merge_and_unload()
    with compress(merged, method) as session:
        found.append((generate(merged, batch), [k.tolist() for k in session.report.kept]))
        plain = build("llava", attn)
    with compress(plain, method):
        assert oracle.max_error(generate(plain, batch), found[0][0]) > 1e-2  # the adapters do something
    for logits, kept in found[1:]:
        assert kept == found[0][1]
        assert_close(logits, found[0][0])


def generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return oracle.generate_with_logits(model, batch, max_new_tokens=3).logits


def test_only_adapters_are_trained_and_saved(tmp_path: Path) -> None:
    adapted = with_lora(build("llava")).train()
    batch = Rows(adapted).batch
    with compress(adapted, FastV(keep=0.4, layer=1)) as session:
        adapted(**batch).loss.backward()
        adapted.save_pretrained(tmp_path / "attached")
    adapted.save_pretrained(tmp_path / "plain")
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert grads
    assert all("lora_" in name for name in grads)
    files = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("attached", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all("lora_" in name for name in files[0])
    # The masked model gives the same gradients.
    adapted.zero_grad(set_to_none=True)
    keep = left_in_layers(session.report, batch, 4)
    with oracle.masked_keys(adapted.get_base_model(), keep):
        adapted(**batch).loss.backward()
    for name, p in adapted.named_parameters():
        if p.grad is not None:
            assert_close(grads[name], p.grad)


def test_trainer_trains_adapters(tmp_path: Path) -> None:
    adapted = with_lora(build("llava"))
    before = {name: value.clone() for name, value in adapted.named_parameters()}
    callback = CompressionCallback(DivPrune(keep=0.4))
    trainer(adapted, tmp_path, [callback]).train()
    moved = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert callback.session is not None
    assert len(callback.session.reports) == 2
    assert oracle.hook_count(adapted) == 0


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind: str) -> None:
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=4, token_dim=64,
                                   num_attention_heads=4, num_transformer_submodules=1)  # fmt: skip
    adapted = peft.get_peft_model(build("llava"), settings)
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        mmtoken.attach(adapted, DivPrune())
