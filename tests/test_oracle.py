"""The reference itself: it hides what it says, hides nothing else, and notices what is left behind."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.backbones.tiny_models import CASES, CELLS, QWEN, build, inputs, visual_mask

CELL_IDS = [f"{family}-{modality}" for family, modality in CELLS]
cells = pytest.mark.parametrize(("family", "modality"), CELLS, ids=CELL_IDS)
TOLERANCE = 1e-5  # float32, logits of unit scale


@functools.cache
def tiny(family: str, attn: str = "sdpa") -> nn.Module:
    return build(family, attn)


def every_third(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    visual = visual_mask(model, batch)
    return ~visual | (visual.long().cumsum(-1) % 3 == 1)


def all_layers(model: nn.Module) -> range:
    return range(len(oracle.text_model(model).layers))


def perturbed_logits(model: nn.Module, batch: dict[str, Tensor], where: Tensor) -> Tensor:
    """Logits after other embeddings were put in the marked places."""

    def change(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        noise = torch.randn(kwargs["inputs_embeds"].shape, generator=torch.Generator().manual_seed(5))
        return args, {**kwargs, "inputs_embeds": torch.where(where[..., None], noise, kwargs["inputs_embeds"])}

    handle = oracle.text_model(model).register_forward_pre_hook(change, with_kwargs=True)
    try:
        with torch.no_grad():
            return model(**oracle.clone(batch)).logits
    finally:
        handle.remove()


@cells
@pytest.mark.parametrize("case", CASES)
def test_every_case_runs_and_rows_do_not_mix(family: str, modality: str, case: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, case)
    counts = visual_mask(model, batch).sum(-1)
    with torch.no_grad():
        logits = model(**oracle.clone(batch)).logits
    assert torch.isfinite(logits[batch["attention_mask"].bool()]).all()
    if case == "text_row":
        assert counts[-1] == 0
    elif "ragged" in case or case == "multi_image":
        assert len(set(counts.tolist())) > 1
    assert (case in ("plain", "single")) == bool(batch["attention_mask"].all())
    if case in ("plain", "left_padded"):
        assert not torch.equal(logits[0, -1], logits[1, -1])


@cells
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
def test_keeping_all_changes_nothing(family: str, modality: str, attn: str, case: str) -> None:
    model = tiny(family, attn)
    batch = inputs(model, family, modality, case)
    keep = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with oracle.masked_keys(model, oracle.keep_in_layers(keep, all_layers(model))):
        masked = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert torch.equal(plain.sequences, masked.sequences)
    assert oracle.max_error(plain.logits, masked.logits) < TOLERANCE


@cells
def test_hidden_tokens_are_hidden(family: str, modality: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, "padded_ragged")
    keep = every_third(model, batch)
    hidden, seen = ~keep, keep & batch["attention_mask"].bool()
    nowhere = torch.zeros_like(hidden)
    with oracle.masked_keys(model, oracle.keep_in_layers(keep, all_layers(model))):
        a, b = (perturbed_logits(model, batch, where) for where in (nowhere, hidden))
    assert oracle.max_error(a[seen], b[seen]) == 0
    assert oracle.max_error(a[hidden], b[hidden]) > 0.1  # they still see themselves
    # and without the mask, or with layer 0 left open, the same change is noticed
    open_layers = oracle.keep_in_layers(keep, all_layers(model)[1:])
    for layers in ({}, open_layers):
        with oracle.masked_keys(model, layers):
            a, b = (perturbed_logits(model, batch, where) for where in (nowhere, hidden))
        assert oracle.max_error(a[:, -1], b[:, -1]) > 1e-2


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
def test_decoding_modes_agree_under_the_mask(family: str, case: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", case)
    keep = oracle.keep_in_layers(every_third(model, batch), [1, 2, 3])
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=4)
    with oracle.masked_keys(model, keep):
        want = oracle.generate_with_logits(model, batch, max_new_tokens=4)
        others = [
            oracle.generate_with_logits(model, batch, max_new_tokens=4, use_cache=False),
            oracle.generate_with_logits(model, batch, max_new_tokens=4, cache_implementation="static"),
        ]
    assert oracle.max_error(plain.logits[:, 0], want.logits[:, 0]) > 1e-2
    for got in others:
        assert torch.equal(want.sequences, got.sequences)
        assert oracle.max_error(want.logits, got.logits) < TOLERANCE


def test_eager_and_sdpa_agree_under_the_mask() -> None:
    results = []
    for attn in ("sdpa", "eager"):
        model = tiny("llava", attn)
        batch = inputs(model, "llava", "image", "padded_ragged")
        with oracle.masked_keys(model, oracle.keep_in_layers(every_third(model, batch), [2, 3])):
            results.append(oracle.generate_with_logits(model, batch))
    assert oracle.max_error(results[0].logits, results[1].logits) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_batch_equals_its_rows_and_beams_repeat_rows(family: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "plain")
    keep = every_third(model, batch)
    keep[1] &= ~visual_mask(model, batch)[1] | (torch.arange(keep.shape[1]) % 2 == 0)  # rows keep different tokens
    with oracle.masked_keys(model, oracle.keep_in_layers(keep, [1, 2, 3])):
        greedy = oracle.generate_with_logits(model, batch, max_new_tokens=1)
        beams = oracle.generate_with_logits(model, batch, max_new_tokens=4, num_beams=3)
    first = beams.logits[:, 0].reshape(2, 3, -1)
    for beam in range(3):
        assert oracle.max_error(first[:, beam], greedy.logits[:, 0]) < TOLERANCE


def test_decode_only_spares_the_prompt() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "left_padded")
    keep = every_third(model, batch)
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    with oracle.masked_keys(model, oracle.keep_in_layers(keep, all_layers(model)), decode_only=True):
        cut = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    assert oracle.max_error(plain.logits[:, 0], cut.logits[:, 0]) < TOLERANCE
    assert oracle.max_error(plain.logits[:, 1], cut.logits[:, 1]) > 1e-3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_hidden_token_sees_itself(attn: str) -> None:
    model = tiny("llava", attn)
    batch = inputs(model, "llava", "image", "single")
    keep = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    keep[:, :3] = False  # without the exception, row 0 of the attention would be empty
    with torch.no_grad(), oracle.masked_keys(model, oracle.keep_in_layers(keep, all_layers(model))):
        masked = model(**oracle.clone(batch)).logits
    alone = {name: batch[name][:, :1] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert oracle.max_error(masked[:, :1], model(**alone).logits) < TOLERANCE
    assert torch.isfinite(masked).all()


def test_one_keep_per_head() -> None:
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "left_padded")
    keep = every_third(model, batch)
    layers = all_layers(model)
    same = keep[:, None].expand(-1, 2, -1)  # the models have two key/value heads
    other = same.clone()
    other[:, 1] = True
    with oracle.masked_keys(model, oracle.keep_in_layers(keep, layers)):
        want = oracle.generate_with_logits(model, batch, max_new_tokens=2)
    with oracle.masked_keys(model, oracle.keep_in_layers(same, layers)):
        got = oracle.generate_with_logits(model, batch, max_new_tokens=2)
    with oracle.masked_keys(model, oracle.keep_in_layers(other, layers)):
        half = oracle.generate_with_logits(model, batch, max_new_tokens=2)
    assert oracle.max_error(want.logits, got.logits) < TOLERANCE
    assert oracle.max_error(want.logits, half.logits) > 1e-3


@cells
def test_manual_loop_equals_generate(family: str, modality: str) -> None:
    model = tiny(family)
    case = "plain" if family in QWEN else "single"
    batch = inputs(model, family, modality, case)
    with oracle.masked_keys(model, oracle.keep_in_layers(every_third(model, batch), [2, 3])):
        loop = oracle.manual_loop(model, batch, steps=3)
        want = oracle.generate_with_logits(model, batch, max_new_tokens=4)
    assert torch.equal(loop.sequences, want.sequences[:, :-1])
    assert oracle.max_error(loop.logits, want.logits) < TOLERANCE


@cells
def test_second_turn_equals_one_long_prompt(family: str, modality: str) -> None:
    model = tiny(family)
    batch = inputs(model, family, modality, "padded_ragged")
    with oracle.masked_keys(model, oracle.keep_in_layers(every_third(model, batch), [2, 3])):
        two = oracle.second_turn(model, batch, max_new_tokens=3)
        ids = two.sequences[:, :-3]
        grown = ids.shape[1] - batch["input_ids"].shape[1]
        whole = {
            **batch,
            "input_ids": ids,
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, grown), value=1),
        }
        if "mm_token_type_ids" in batch:
            whole["mm_token_type_ids"] = nn.functional.pad(batch["mm_token_type_ids"], (0, grown))
        want = oracle.generate_with_logits(model, whole, max_new_tokens=3)
    assert torch.equal(two.sequences, want.sequences)
    assert oracle.max_error(two.logits, want.logits) < TOLERANCE


def test_score_gap() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.2]])
    assert torch.allclose(oracle.score_gap(scores, 1), torch.tensor([0.4, 0.0]))
    assert oracle.score_gap(scores, 3).isinf().all()


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients(family: str, side: str) -> None:
    model = build(family)
    batch = inputs(model, family, "image", "left_padded")
    batch = oracle.right_padded(batch) if side == "right" else batch
    assert int(batch["attention_mask"][0, 0 if side == "left" else -1]) == 0
    labels = oracle.labels_for(model, batch)
    assert not (labels[visual_mask(model, batch)] != -100).any()
    plain = oracle.loss_and_grads(model, batch, labels)
    layers = all_layers(model)
    with oracle.masked_keys(model, oracle.keep_in_layers(torch.ones_like(labels, dtype=torch.bool), layers)):
        same = oracle.loss_and_grads(model, batch, labels)
    with oracle.masked_keys(model, oracle.keep_in_layers(every_third(model, batch), layers)):
        other = oracle.loss_and_grads(model, batch, labels)
    assert same.loss == pytest.approx(plain.loss, abs=1e-6)
    assert oracle.grad_error(same, plain) < 1e-4
    assert oracle.grad_error(other, plain) > 1e-2


@cells
def test_a_plain_call_leaves_the_fingerprint(family: str, modality: str) -> None:
    model = build(family)
    before = oracle.fingerprint(model)
    batch = inputs(model, family, modality, "left_padded")
    with oracle.masked_keys(model, oracle.keep_in_layers(every_third(model, batch), [1])):
        assert oracle.hook_count(model) == 1
        oracle.generate_with_logits(model, batch, max_new_tokens=2)
    assert oracle.hook_count(model) == 0
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []


def test_the_fingerprint_sees_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import cache_utils, modeling_utils

    model = build("qwen3_vl")
    text = model.base_model.language_model
    before = oracle.fingerprint(model)

    def changes() -> list[str]:
        return oracle.fingerprint_changes(before, oracle.fingerprint(model))

    def seen(word: str) -> bool:
        lines = changes()
        return len(lines) == 1 and word in lines[0]

    assert changes() == []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                     "register_state_dict_post_hook", "register_load_state_dict_post_hook"):  # fmt: skip
        handle = getattr(text.layers[0], register)(lambda *a, **k: None)
        assert seen("layers.0.hooks"), register
        assert oracle.hook_count(model) == 1
        handle.remove()
    text.config._attn_implementation, kept = "other", text.config._attn_implementation
    assert any("_attn_implementation" in line for line in changes())
    text.config._attn_implementation = kept
    text.config, config = type(text.config)(**text.config.to_dict()), text.config
    assert any(".config:" in line for line in changes())
    text.config = config
    text._deepstack_process = text._deepstack_process
    assert seen("new: module.model.language_model._deepstack_process")
    del text._deepstack_process
    with monkeypatch.context() as patch:
        patch.setattr(cache_utils.DynamicLayer, "update", lambda *a: None)
        assert seen("DynamicLayer.update")
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register("left_behind", lambda *a: None)
    assert seen("registry.attention.left_behind")
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model), allow=("registry.attention.left_",)) == []
    type(modeling_utils.ALL_ATTENTION_FUNCTIONS)._global_mapping.pop("left_behind")
    with torch.no_grad():
        text.norm.weight.mul_(1.0)
    assert seen("norm._parameters.weight.version")


def test_the_mask_goes_away_when_the_body_fails() -> None:
    model = tiny("llava")
    with pytest.raises(RuntimeError), oracle.masked_keys(model, {0: torch.ones(1, 3, dtype=torch.bool)}):
        raise RuntimeError
    assert oracle.hook_count(model) == 0
