"""Loss and gradients through a compressor are those of the model whose dropped keys are masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtoken import compress
from mmtoken.backbones.registry import adapt
from mmtoken.compressors import (
    TCA,
    DivPrune,
    FastV,
    FlowCut,
    PyramidDrop,
    ToMe,
    UniformGrid,
    VisionZip,
    ZeroTPrune,
)
from mmtoken.compressors.base import Compressor
from mmtoken.errors import UnsupportedError
from tests import oracle
from tests.backbones.tiny_models import build, inputs, visual_mask
from tests.engine.agreement import assert_close, cells, left_in_layers, tiny

PRUNERS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.4),
    "fastv": FastV(keep=0.4),
    "pyramiddrop": PyramidDrop(keep=0.25),
}
pruners = pytest.mark.parametrize("name", PRUNERS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def checkpoints_around_hooks() -> bool:
    """Whether this version of transformers checkpoints a layer's call with its hooks (5.17), not its forward."""
    layer = type(oracle.text_model(build("llava", layers=1)).layers[0])
    return any("__call__" in vars(kind) for kind in layer.__mro__ if kind not in (nn.Module, object))


def trained(family: str, modality: str, side: str, case: str = "padded_ragged") -> tuple[nn.Module, dict, Tensor]:
    """(model, batch, labels).

    A token behind a visual one gets no label: the model predicts it from the last token that is left, the masked
    reference from the masked one, which still exists there.
    """
    model = tiny(family)
    batch = inputs(model, family, modality, case)
    batch = oracle.right_padded(batch) if side == "right" else batch
    labels = oracle.labels_for(model, batch)
    behind = nn.functional.pad(visual_mask(model, batch)[:, :-1], (1, 0))
    return model, batch, labels.masked_fill(behind, -100)


def meaningful(gradients: oracle.Gradients) -> oracle.Gradients:
    """Without the biases of the tower's key projections: softmax does not see them, their gradient is rounding."""
    towers = ("vision", "image_tower", "video_tower")
    kept = {
        n: g
        for n, g in gradients.grads.items()
        if not (any(tower in n for tower in towers) and n.endswith("k_proj.bias"))
    }
    return gradients._replace(grads=kept)


def assert_same_gradients(got: oracle.Gradients, want: oracle.Gradients) -> None:
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    assert oracle.grad_error(meaningful(got), meaningful(want)) < 1e-4


def compressed(
    model: nn.Module, method: Compressor, batch: Mapping[str, Any], labels: Tensor, **options: Any
) -> tuple[oracle.Gradients, dict[int, Tensor]]:
    """The gradients, and per decoder layer what it saw."""
    with compress(model, method) as session:
        got = oracle.loss_and_grads(model, batch, labels, **options)
    return got, left_in_layers(session.report, batch, len(oracle.text_model(model).layers))


@cells
@pruners
@sides
def test_loss_and_gradients_equal_the_masked_reference(family: str, modality: str, name: str, side: str) -> None:
    model, batch, labels = trained(family, modality, side)
    assert not bool(batch["attention_mask"].all())
    got, keep = compressed(model, PRUNERS[name], batch, labels)
    assert not all(bool(left.all()) for left in keep.values())
    with oracle.masked_keys(model, keep):
        want = oracle.loss_and_grads(model, batch, labels)
    assert_same_gradients(got, want)
    assert oracle.grad_error(meaningful(got), meaningful(oracle.loss_and_grads(model, batch, labels))) > 1e-2


@pruners
@sides
def test_training_with_a_cache_gives_the_same_gradients(name: str, side: str) -> None:
    model, batch, labels = trained("llava", "image", side)
    got, keep = compressed(model, PRUNERS[name], batch, labels, use_cache=True)
    with oracle.masked_keys(model, keep):
        assert_same_gradients(got, oracle.loss_and_grads(model, batch, labels))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize("reentrant", [False, True])
@pruners
def test_gradient_checkpointing_changes_nothing_or_is_refused(family: str, reentrant: bool, name: str) -> None:
    model = build(family)
    _, batch, labels = trained(family, "image", "left")
    want, _ = compressed(model, PRUNERS[name], batch, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert oracle.text_model(model).gradient_checkpointing or oracle.text_model(model).layers[0].gradient_checkpointing
    if checkpoints_around_hooks() and name != "divprune":
        with pytest.raises(UnsupportedError, match="gradient_checkpointing=True"):
            compressed(model, PRUNERS[name], batch, labels)
    else:
        got, _ = compressed(model, PRUNERS[name], batch, labels)
        assert_same_gradients(got, want)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_tower_changes_nothing_or_is_refused(family: str, reentrant: bool) -> None:
    model = build(family)
    _, batch, labels = trained(family, "image", "left")
    want, _ = compressed(model, FlowCut(keep=0.6), batch, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    if checkpoints_around_hooks():
        with pytest.raises(UnsupportedError, match="gradient_checkpointing=True"):
            compressed(model, FlowCut(keep=0.6), batch, labels)
    else:
        got, _ = compressed(model, FlowCut(keep=0.6), batch, labels)
        assert_same_gradients(got, want)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(
    "method", [ToMe(keep=0.6), ZeroTPrune(keep=0.6), TCA(keep=0.6)], ids=lambda m: type(m).__name__
)
def test_checkpointing_a_tower_cut_inside_its_blocks_is_refused_and_elsewhere_served(
    family: str, method: Compressor
) -> None:
    """A block is computed again after the call, without the cut."""
    model = build(family)
    _, batch, labels = trained(family, "image", "left")
    want, _ = compressed(model, method, batch, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with pytest.raises(UnsupportedError, match="gradient_checkpointing=True"):
        compressed(model, method, batch, labels)
    tower = adapt(model).tower()
    assert tower is not None
    for block in tower.blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    text = oracle.text_model(model)
    assert text.gradient_checkpointing or text.layers[0].gradient_checkpointing
    got, _ = compressed(model, method, batch, labels)
    assert_same_gradients(got, want)


def test_a_checkpointed_tower_without_gradients_is_not_computed_again() -> None:
    model = build("qwen3_vl")
    _, batch, labels = trained("qwen3_vl", "image", "left")
    model.base_model.visual.requires_grad_(False)
    want, _ = compressed(model, ToMe(keep=0.6), batch, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if not checkpoints_around_hooks():
        got, _ = compressed(model, ToMe(keep=0.6), batch, labels)
        assert_same_gradients(got, want)


@pruners
def test_labels_and_logits_keep_the_callers_length(name: str) -> None:
    model, batch, labels = trained("qwen3_vl", "image", "left")
    given = labels.clone()
    with compress(model, PRUNERS[name]), torch.no_grad():
        out = model(**oracle.clone(batch), labels=labels, logits_to_keep=0)
        last = model(**oracle.clone(batch), logits_to_keep=2)
    assert torch.equal(labels, given)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert torch.equal(last.logits, out.logits[:, -2:])
    shift = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), given[:, 1:].flatten(), ignore_index=-100)
    assert_close(out.loss, shift)


@pruners
def test_the_token_behind_an_image_is_predicted_from_the_last_token_left(name: str) -> None:
    """The one thing that differs from the masked reference, which predicts it from the dropped token itself."""
    model, batch, _ = trained("llava", "image", "left", "single")
    visual = visual_mask(model, batch)[0]
    last = int(visual.nonzero()[-1])
    with compress(model, PRUNERS[name]) as session, torch.no_grad():
        logits = model(**oracle.clone(batch)).logits[0]
    places, kept = session.report.places[0], session.report.kept[0]
    assert last not in places[kept].tolist()
    assert torch.equal(logits[last], logits[int(places[kept].max())])


def test_dropped_tokens_send_no_gradient_to_the_projector() -> None:
    """Everything but the first image's tokens is dropped nowhere: their gradient is zero where they are dropped."""
    model, batch, labels = trained("llava", "image", "left", "single")
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: output.register_hook(seen.append) and None
    )
    with compress(model, DivPrune(keep=0.25)) as session:
        oracle.loss_and_grads(model, batch, labels)
    handle.remove()
    moved = seen[0][0].abs().sum(-1) > 0
    assert moved.nonzero()[:, 0].tolist() == session.report.kept[0].tolist()


# --------------------------------------------------------------------------------- VisionZip, composed without hooks


def visionzip_by_hand(model: nn.Module, pixels: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """(projected tokens float[K, D], their places int[K]) of one image, from the tower's own outputs.

    Formulas of the paper, section 3: patches by attention from CLS; of the others, evenly spaced ones take the mean of
    those whose keys are most similar to theirs.
    """
    tower = model.model.vision_tower
    states = tower(pixels[None], output_hidden_states=True).hidden_states
    block = tower.encoder.layers[-2]
    heads, normed = block.self_attn.num_heads, block.layer_norm1(states[-3])[0]
    query, key = (p(normed).unflatten(-1, (heads, -1)) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
    attention = torch.einsum("hd,khd->hk", query[0], key) * query.shape[-1] ** -0.5
    received = attention.softmax(-1).sum(0)[1:].detach()
    keys = nn.functional.normalize(key[1:].mean(1).detach(), dim=-1)
    features = states[-2][0, 1:]
    first = received.topk(dominant).indices.sort().values
    assert float(oracle.score_gap(received, dominant)) > 1e-4
    rest = [i for i in range(len(features)) if i not in first.tolist()]
    anchors = rest[:: len(rest) // contextual][:contextual]
    made = [features[i] for i in first.tolist()]
    for anchor in anchors:
        others = [i for i in rest if i not in anchors]
        owners = [anchors[int(torch.stack([keys[i] @ keys[a] for a in anchors]).argmax())] for i in others]
        members = [features[i] for i, owner in zip(others, owners, strict=True) if owner == anchor]
        made.append(features[anchor] + torch.stack(members).mean(0) if members else features[anchor])
    return model.model.multi_modal_projector(torch.stack(made)[None])[0], torch.tensor([*first.tolist(), *anchors])


@sides
@pytest.mark.parametrize("case", ["left_padded", "multi_image"])
def test_visionzip_equals_its_composition_without_hooks(side: str, case: str) -> None:
    model, batch, labels = trained("llava", "image", side, case)
    visual = visual_mask(model, batch)
    method = VisionZip(keep=7, contextual=2)
    got, _ = compressed(model, method, batch, labels)

    model.zero_grad(set_to_none=True)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    keep, filled = ~visual, embeds.clone()
    for pixels, span in zip(batch["pixel_values"], visual.nonzero().view(-1, 16, 2), strict=True):
        features, places = visionzip_by_hand(model, pixels, dominant=5, contextual=2)
        rows, columns = span[places].unbind(-1)
        filled = filled.index_put((rows, columns), features)
        keep = keep.index_put((rows, columns), torch.tensor(True))
    with oracle.masked_keys(model, oracle.keep_in_layers(keep, range(4))):
        loss = model(inputs_embeds=filled, attention_mask=batch["attention_mask"], labels=labels, use_cache=False).loss
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert_same_gradients(got, oracle.Gradients(loss.item(), want))


# ----------------------------------------------------------------------------------------- a few steps of training


@pytest.mark.parametrize("name", ["divprune", "visionzip", "tome"])
def test_a_few_steps_of_training_lower_the_loss(name: str) -> None:
    model = build("llava").train()
    _, batch, labels = trained("llava", "image", "left")
    method = {"divprune": DivPrune(keep=0.4), "visionzip": VisionZip(keep=7), "tome": ToMe(keep=0.5)}[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with compress(model, method):
        for _ in range(8):
            loss = model(**oracle.clone(batch), labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "smolvlm", "idefics3"])
def test_gaps_in_positions_are_not_taken_for_packed_sequences(family: str, positions: str) -> None:
    """Without a cache and without a mask transformers reads a jump in position ids as the start of a new sequence."""
    model = tiny(family)
    batch = inputs(model, family, "image", "single")
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    method = dataclasses.replace(UniformGrid(keep=0.4), positions=positions)
    with torch.no_grad(), compress(model, method):
        want = model(**oracle.clone(batch), use_cache=False).logits
        del batch["attention_mask"]
        got = model(**oracle.clone(batch), use_cache=False).logits
    assert_close(got[:, -1], want[:, -1])
