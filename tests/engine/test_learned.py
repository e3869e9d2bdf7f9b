"""Learned parts: made for a model, refused where they are missing or do not fit, and trained through a forward."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mmtoken import MMTokenError, Session, attach, check, compress, compress_inputs, learnable
from mmtoken.backbones import adapt
from mmtoken.compressors import BUS, Compressor, DivPrune, QueCC, Trained
from mmtoken.compressors.base import Dims
from mmtoken.compressors.bus import patch_text_loss
from mmtoken.compressors.registry import resolve
from mmtoken.engine.learned import dims_of
from mmtoken.errors import UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import build, inputs
from tests.engine.agreement import tiny

METHODS: dict[str, Compressor] = {
    "bus": BUS(keep=0.25),
    "bus-learned": BUS(keep=3, queries="learned"),
    "quecc": QueCC(keep=0.25),
}
PAIRS = [
    *((name, ("llava", "image")) for name in METHODS),
    ("quecc", ("qwen3_vl", "image")),
    ("quecc", ("qwen3_vl", "video")),
    ("quecc", ("smolvlm", "image")),
    ("quecc", ("llava_onevision", "image")),
]
pairs = pytest.mark.parametrize(("name", "cell"), PAIRS, ids=lambda value: value if type(value) is str else value[0])
methods = pytest.mark.parametrize("name", METHODS)


def frozen(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build(family, dtype=dtype).requires_grad_(False)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**oracle.clone(batch), labels=oracle.labels_for(model, batch), use_cache=False).loss


def exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same in the model's precision: transformers computes losses in single."""
    labels = oracle.labels_for(model, batch)
    logits = model(**oracle.clone(batch), labels=labels, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------------------ making


@pytest.mark.parametrize(
    ("family", "dims"),
    [
        ("llava", Dims(tower=32, tokens=32, llm=64, blocks=3)),
        ("llava_onevision", Dims(tower=32, tokens=64, llm=64, blocks=3)),
        ("qwen2_vl", Dims(tower=32, tokens=64, llm=64, blocks=4)),
        ("internvl", Dims(tower=32, tokens=64, llm=64, blocks=3)),
        ("qwen2_5_vl", Dims(tower=32, tokens=64, llm=64, blocks=4)),
        ("qwen3_vl", Dims(tower=32, tokens=64, llm=64, blocks=4)),
        ("smolvlm", Dims(tower=32, tokens=64, llm=64, blocks=3)),
        ("idefics3", Dims(tower=32, tokens=64, llm=64, blocks=3)),
    ],
)
def test_sizes_are_read_off_the_model(family: str, dims: Dims) -> None:
    assert dims_of(adapt(tiny(family))) == dims


def test_several_tower_layers_side_by_side_make_wider_patches() -> None:
    model = tiny("llava")
    before = model.config.vision_feature_layer
    model.config.vision_feature_layer = [-3, -2]
    try:
        assert dims_of(adapt(model)) == Dims(tower=32, tokens=64, llm=64, blocks=3)
        with pytest.raises(UnsupportedError, match="reads several tower layers"):
            attach(model, learnable(model, BUS()))
    finally:
        model.config.vision_feature_layer = before


@methods
def test_a_seed_means_the_same_weights_whatever_was_drawn_before(name: str) -> None:
    model = tiny("llava")
    torch.manual_seed(1)
    first = learnable(model, METHODS[name], seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    same, other = learnable(model, METHODS[name], seed=3), learnable(model, METHODS[name], seed=4)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[key])
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())


def test_parts_take_the_model_s_dtype_and_a_name_is_enough() -> None:
    model = build("llava", dtype=torch.bfloat16)
    trained = learnable(model, "quecc")
    assert isinstance(trained.compressor, QueCC)
    assert {value.dtype for value in trained.parameters()} == {torch.bfloat16}
    batch = inputs(model, "llava", "image", "plain")
    for parts in (trained, trained.float()):  # weights in full precision beside a model in half
        with compress(model, parts) as session, torch.no_grad():
            assert bool(model(**oracle.clone(batch)).logits.isfinite().all())
        assert session.report.tokens_out == [1, 1]


def test_parts_are_made_for_methods_that_have_them_and_models_that_can_use_them() -> None:
    with pytest.raises(MMTokenError, match="has no learned parts; attach it as it is"):
        learnable(tiny("llava"), DivPrune())
    with pytest.raises(MMTokenError, match="has no learned parts; use it as it is"):
        Trained(DivPrune(), nn.Linear(2, 2))
    with pytest.raises(MMTokenError, match=r"give what compressor.build\(\) made"):
        Trained(QueCC(), {"weight": torch.zeros(2)})  # type: ignore[arg-type]
    for family in ("clip_vision", "llama"):
        with pytest.raises(UnsupportedError, match="need a model with a tower and a decoder"):
            learnable(tiny(family), QueCC())


# --------------------------------------------------------------------------------------------------------- attaching


@methods
@pytest.mark.parametrize("use", [attach, compress, check, lambda model, method: compress_inputs(model, method, {})])
def test_without_learned_parts_a_method_is_refused_with_the_way_out(name: str, use: Any) -> None:
    if use not in (attach, compress, check) and not oracle.ENCODES_APART:
        pytest.skip("this version of transformers has no compress_inputs")
    model = tiny("llava")
    before = oracle.fingerprint(model)
    with pytest.raises(UnsupportedError, match=r"has learned parts: attach mmtoken.learnable\(model, compressor\)"):
        use(model, METHODS[name])
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []


@pytest.mark.parametrize(
    ("other", "compressor"),
    [("smolvlm", QueCC(keep=0.25)), ("llava", QueCC(keep=0.0625)), ("llava", QueCC(keep=0.25, levels=(0,)))],
    ids=["another model", "another window", "other levels"],
)
def test_parts_of_another_model_or_other_settings_are_refused(other: str, compressor: QueCC) -> None:
    parts = learnable(tiny(other), compressor).module
    given = Trained(QueCC(keep=0.25), parts)
    with pytest.raises(UnsupportedError, match=r"the learned parts of QueCC do not fit: .* is \(.*asks for"):
        attach(tiny("llava"), given)
    missing = learnable(tiny("llava"), QueCC(keep=0.25))
    del missing.module.text
    with pytest.raises(UnsupportedError, match=r"do not fit: text.* is None"):
        check(tiny("llava"), missing)


@pairs
def test_what_is_attached_is_no_part_of_the_model(name: str, cell: tuple[str, str]) -> None:
    model = tiny(cell[0])
    before, names = oracle.fingerprint(model), list(model.state_dict())
    trained = learnable(model, METHODS[name])
    with compress(model, trained) as session:
        assert session.trained is trained and session.compressor == METHODS[name]
        assert list(model.state_dict()) == names
        check_works(model, cell, session)
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model)) == []


def check_works(model: nn.Module, cell: tuple[str, str], session: Session) -> None:
    with torch.no_grad():
        model(**oracle.clone(inputs(model, *cell, "plain")))
    assert all(out < before for before, out in zip(session.report.tokens_in, session.report.tokens_out, strict=True))


@pytest.mark.skipif(not oracle.ENCODES_APART, reason="this version of transformers has no mm_encoder_outputs")
@pairs
def test_compressed_inputs_give_what_the_attached_model_gives(name: str, cell: tuple[str, str]) -> None:
    model = tiny(cell[0])
    batch = inputs(model, *cell, "padded_ragged")
    trained = learnable(model, METHODS[name])
    with compress(model, trained):
        want = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    got = oracle.generate_with_logits(model, compress_inputs(model, trained, batch), max_new_tokens=3)
    assert torch.equal(got.sequences[:, -3:], want.sequences[:, -3:])
    assert oracle.max_error(got.logits, want.logits) <= 1e-5 * max(1.0, float(want.logits.abs().max()))


# ------------------------------------------------------------------------------------------------------------- data


@methods
def test_settings_go_to_json_and_yaml_and_back(name: str) -> None:
    trained = learnable(tiny("llava"), METHODS[name])
    data = trained.to_dict()
    assert data == METHODS[name].to_dict()
    assert resolve(json.loads(json.dumps(data))) == METHODS[name]
    assert resolve(yaml.safe_load(yaml.safe_dump(data))) == METHODS[name]


def test_settings_may_change_around_the_same_weights() -> None:
    trained = learnable(tiny("llava"), BUS(keep=0.25))
    assert resolve(trained) is trained
    changed = resolve(trained, keep=0.5)
    assert changed.module is trained.module and changed.compressor == BUS(keep=0.5)
    with compress(tiny("llava"), changed) as session, torch.no_grad():
        tiny("llava")(**oracle.clone(inputs(tiny("llava"), "llava", "image", "plain")))
    assert session.report.tokens_out == [8, 8]


# ---------------------------------------------------------------------------------------------------------- training


@pairs
def test_a_loss_reaches_the_learned_parts_and_not_the_frozen_model(name: str, cell: tuple[str, str]) -> None:
    model = frozen(cell[0])
    trained = learnable(model, METHODS[name])
    batch = inputs(model, *cell, "padded_ragged")
    with compress(model, trained):
        loss_of(model, batch).backward()
    assert all(p.grad is None for p in model.parameters())
    for key, value in trained.named_parameters():
        assert value.grad is not None and bool(value.grad.isfinite().all()), key
        assert bool((value.grad != 0).any()), key


@pairs
def test_gradients_are_the_slopes_of_the_loss(name: str, cell: tuple[str, str]) -> None:
    """Along a random direction, against differences; weights are double, but the decoder's norms compute in single."""
    model = frozen(cell[0], torch.float64)
    trained = learnable(model, METHODS[name])
    batch = inputs(model, *cell, "padded_ragged")
    parameters, step = list(trained.parameters()), 2e-4

    def moved(session: Session, by: list[Tensor], far: float) -> tuple[float, list[list[int]]]:
        """The loss at some distance, and what was selected there."""
        with torch.no_grad():
            for p, d in zip(parameters, by, strict=True):
                p.add_(d, alpha=far)
            loss = float(exact_loss(model, batch))
            for p, d in zip(parameters, by, strict=True):
                p.sub_(d, alpha=far)
        return loss, [kept.tolist() for site in session.report.sites for kept in site.kept]

    with compress(model, trained) as session:
        gradients = torch.autograd.grad(exact_loss(model, batch), parameters)
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            (ahead, one), (behind, other) = (moved(session, direction, far) for far in (step, -step))
            if one == other:  # a selection that changes on the way is a jump, which no gradient knows of
                break
    assert one == other
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-2)


@pairs
def test_a_few_steps_of_an_optimizer_lower_the_loss(name: str, cell: tuple[str, str]) -> None:
    model = frozen(cell[0])
    trained = learnable(model, METHODS[name])
    batch = inputs(model, *cell, "plain")
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    losses = []
    with compress(model, trained):
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01


def test_the_patch_text_loss_reaches_the_selector_beside_the_model_s_loss() -> None:
    model = frozen("llava")
    trained = learnable(model, BUS(keep=0.25, share=1.0))  # nothing is fused, so the other loss does not reach it
    batch = inputs(model, "llava", "image", "plain")
    seen: list[Tensor] = []
    handle = trained.module.selector.register_forward_hook(lambda module, args, scores: seen.append(scores))
    with compress(model, trained):
        loss = loss_of(model, batch)
    handle.remove()
    (scores,) = seen
    assert scores.shape == (2, 16) and scores.requires_grad
    (alone,) = torch.autograd.grad(loss, trained.module.selector.text.weight, retain_graph=True)
    assert not bool(alone.any())
    (loss + patch_text_loss(scores, torch.arange(16).expand(2, -1) < 4)).backward()
    assert bool((trained.module.selector.text.weight.grad != 0).any())
