"""OpenVLA in the official layout: names, files, and what it computes against timm and Llama put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

import mmtoken
from mmtoken.compressors import CDPruner, DivPrune, FastV
from mmtoken.errors import ActionError, CheckpointError, InputError, UnsupportedError
from mmtoken.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticProcessor
from tests.backbones import openvla_checkpoint as official
from tests.backbones.processors import photograph
from tests.backbones.tiny_models import TEXT_TOKENS, VOCAB

pytestmark = pytest.mark.lowest
LOADED = tuple[Path, official.Parts, OpenVLAForActionPrediction, PrismaticProcessor]
PROMPTS = ["Pick up the CUP", "Put it on the left of the right one"]


@pytest.fixture(scope="module", params=[2, 1], ids=["fused", "single"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LOADED:
    folder = tmp_path_factory.mktemp("openvla")
    parts = official.write(folder, request.param)
    model, processor = mmtoken.load(folder)
    assert isinstance(model, OpenVLAForActionPrediction)
    assert isinstance(processor, PrismaticProcessor)
    return folder, parts, model, processor


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenVLAForActionPrediction, PrismaticProcessor]:
    """A model that answers with action tokens: no other token has a logit above 0."""
    folder = tmp_path_factory.mktemp("policy")
    official.write(folder)
    model, processor = mmtoken.load(folder)
    head = model.get_output_embeddings().weight.data
    head[: TEXT_TOKENS - official.BINS] = 0
    head[TEXT_TOKENS:] = 0
    return model, processor


def encoded(processor: PrismaticProcessor, *texts: str, seed: int = 0) -> dict[str, Tensor]:
    pictures = [photograph(seed + number) for number in range(len(texts))]
    return dict(processor(text=[processor.prompt(text) for text in texts], images=pictures))


def bare(batch: dict[str, Tensor], row: int) -> Tensor:
    """int[1, L]: the prompt of a row as official code has it."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    return ids[ids != TEXT_TOKENS + 1][None]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- layout


def test_logits_are_those_of_the_parts_put_together_by_hand(loaded: LOADED) -> None:
    _, parts, model, processor = loaded
    batch = encoded(processor, *PROMPTS)
    with torch.no_grad():
        together = model(**batch).logits
    assert together.shape[1] == batch["input_ids"].shape[1]
    for row in range(2):
        want = parts.logits(bare(batch, row), batch["pixel_values"][row : row + 1])
        close(together[row, -want.shape[1] :], want[0])
        with torch.no_grad():
            alone = model(input_ids=bare(batch, row), pixel_values=batch["pixel_values"][row : row + 1]).logits
        close(alone, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_of_official_code_may_be_padded_on_either_side(loaded: LOADED, side: str) -> None:
    _, parts, model, processor = loaded
    batch = encoded(processor, *PROMPTS)
    rows = [bare(batch, row)[0] for row in range(2)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TEXT_TOKENS, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    labels = ids.masked_fill((mask == 0) | (ids == 1), -100)  # BOS is not to be predicted
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"], labels=labels)
    total, count = torch.zeros(()), 0
    for row in range(2):
        want = parts.logits(rows[row][None], batch["pixel_values"][row : row + 1])[0]
        got = output.logits[row]
        close(got[-len(want) :] if side == "left" else got[: len(want)], want)
        # What follows BOS are patches, which nobody has to predict; the first word is predicted by the last patch.
        total += torch.nn.functional.cross_entropy(want[official.PATCHES : -1], rows[row][1:], reduction="sum")
        count += len(rows[row]) - 1
    close(output.loss, total / count)


def test_layer_scales_have_their_official_names_in_files_and_act(loaded: LOADED, tmp_path: Path) -> None:
    _, parts, model, processor = loaded
    names = set(parts.named())
    scale = "vision_backbone.featurizer.blocks.1.ls2.scale_factor"
    assert scale in names and set(model.state_dict()) == names
    folder = mmtoken.save(model, tmp_path / "again", processor=processor)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
        assert all(torch.equal(file.get_tensor(name), value) for name, value in parts.named().items())
    again, reader = mmtoken.load(folder)
    batch = encoded(processor, *PROMPTS)
    assert all(torch.equal(value, encoded(reader, *PROMPTS)[name]) for name, value in batch.items())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        weight = again.state_dict()[scale]
        weight.zero_()
        assert not torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-3)


def test_features_are_the_second_to_last_block_without_norm_and_prefix(loaded: LOADED) -> None:
    _, parts, model, processor = loaded
    pixels = encoded(processor, *PROMPTS)["pixel_values"]
    with torch.no_grad():
        features = model.vision_backbone(pixels)
    assert features.shape == (
        2,
        official.PATCHES,
        sum(args["embed_dim"] for args in official.ARGS[: len(parts.towers)]),
    )
    close(features, parts.patches(pixels))


def test_the_first_three_channels_are_dinos_and_the_next_three_siglips(tmp_path: Path) -> None:
    parts = official.write(tmp_path)
    model, processor = mmtoken.load(tmp_path)
    picture = photograph(3)
    pixels = processor.image_processor(picture)["pixel_values"]
    square = torch.from_numpy(np.array(picture.resize((56, 56), 3))).permute(2, 0, 1) / 255
    for number, (mean, deviation) in enumerate(zip(official.MEANS, official.STDS, strict=True)):
        want = (square - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
        close(pixels[0, 3 * number : 3 * number + 3], want)
    width = official.ARGS[0]["embed_dim"]
    with torch.no_grad():
        first, changed = (
            model.vision_backbone(pixels),
            model.vision_backbone(torch.cat([pixels[:, :3] + 1, pixels[:, 3:]], 1)),
        )
    assert torch.equal(first[..., width:], changed[..., width:])
    assert not torch.allclose(first[..., :width], changed[..., :width], atol=1e-2)
    close(first, parts.patches(pixels))


def test_names_shapes_and_count_at_full_size() -> None:
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig())
        towers = [timm.create_model(name, num_classes=0, img_size=224) for name in official.IDS]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted: dict[str, tuple[int, ...]] = {}
    for prefix, tower in zip(("featurizer", "fused_featurizer"), towers, strict=True):
        for name, value in tower.state_dict().items():
            wanted[f"vision_backbone.{prefix}.{name.replace('gamma', 'scale_factor')}"] = tuple(value.shape)
    for number, (read, written) in enumerate([(2176, 8704), (8704, 4096), (4096, 4096)], 1):
        wanted |= {f"projector.fc{number}.weight": (written, read), f"projector.fc{number}.bias": (written,)}
    for layer in range(32):
        where = f"language_model.model.layers.{layer}."
        wanted |= {f"{where}self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        wanted |= {f"{where}mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        wanted |= {f"{where}mlp.down_proj.weight": (4096, 11008)}
        wanted |= {f"{where}{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    wanted |= {"language_model.model.norm.weight": (4096,)}
    wanted |= {f"language_model.{name}.weight": (32064, 4096) for name in ("model.embed_tokens", "lm_head")}
    assert shapes == wanted
    assert shapes["vision_backbone.featurizer.blocks.23.ls2.scale_factor"] == (1024,)
    assert shapes["vision_backbone.featurizer.reg_token"] == (1, 4, 1024)
    assert shapes["vision_backbone.fused_featurizer.attn_pool.latent"] == (1, 1, 1152)
    # The published openvla-7b: 982 tensors, 15 082 474 368 bytes in bfloat16.
    assert len(shapes) == 982
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) == 15_082_474_368
    assert model.vision_backbone.patches == 256
    assert (model.config.image_token_id, model.codec.tokens) == (32001, range(31744, 32000))


def test_code_of_a_checkpoint_never_runs(loaded: LOADED, tmp_path: Path) -> None:
    folder, *_ = loaded
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("configuration_prismatic", "modeling_prismatic", "processing_prismatic"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    model, processor = mmtoken.load(tmp_path)
    assert type(model) is OpenVLAForActionPrediction and type(processor) is PrismaticProcessor


def test_a_missing_shard_or_tensor_is_named(tmp_path: Path) -> None:
    official.write(tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    kept = {name: place for name, place in index["weight_map"].items() if place != shard.name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": kept}))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        mmtoken.load(tmp_path)


# -------------------------------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_batch_act_as_they_do_alone(policy: Any, dtype: torch.dtype) -> None:
    model, processor = policy
    texts = [*PROMPTS, "go", "describe the picture in one sentence"]
    batch = encoded(processor, *texts, seed=5)
    assert (batch["attention_mask"].sum(-1).unique().numel()) == 4
    model.to(dtype)
    try:
        together = model.predict_tokens(unnorm_key="toy_arm", **batch)
        alone = torch.cat(
            [
                model.predict_tokens(
                    unnorm_key="toy_arm", input_ids=bare(batch, row), pixel_values=batch["pixel_values"][row : row + 1]
                )
                for row in range(4)
            ]
        )
    finally:
        model.float()
    assert together.shape == (4, 1, 3) and together.dtype == torch.int64
    assert dtype is torch.bfloat16 or len(together.flatten().unique()) > 3
    same = together == alone
    # In bfloat16 a row of another length rounds in other places, which may turn a near tie.
    assert bool(same.all()) if dtype is torch.float32 else same.float().mean() > 0.5
    assert model.codec.decode(together).abs().max() <= 1


def test_tokens_are_the_greedy_ones_of_the_parts(policy: Any) -> None:
    model, processor = policy
    parts = official.Parts()
    batch = encoded(processor, PROMPTS[1], seed=3)
    parts.llm.lm_head.weight.data.copy_(model.get_output_embeddings().weight)
    ids = bare(batch, 0)
    for _ in range(3):
        ids = torch.cat([ids, parts.logits(ids, batch["pixel_values"])[:, -1:].argmax(-1)], 1)
    assert model.predict_tokens(unnorm_key="toy_arm", **batch)[0, 0].tolist() == ids[0, -3:].tolist()


def test_what_is_no_action_is_an_error(policy: Any) -> None:
    model, processor = policy
    batch = encoded(processor, "go")
    head = model.get_output_embeddings().weight.data
    before = head.clone()
    try:
        head[TEXT_TOKENS - official.BINS - 1] = 5 * head[TEXT_TOKENS - official.BINS :].abs().amax(0)
        head[TEXT_TOKENS - official.BINS - 2] = -head[TEXT_TOKENS - official.BINS - 1]
        with pytest.raises(ActionError, match=r"token \d+ at .* is no action: the bins are the tokens 288 to 319"):
            model.predict_tokens(unnorm_key="toy_arm", **batch)
        head[[2, 3]] = head[[TEXT_TOKENS - official.BINS - 1, TEXT_TOKENS - official.BINS - 2]]
        head[[TEXT_TOKENS - official.BINS - 1, TEXT_TOKENS - official.BINS - 2]] = 0
        head[3] = 0  # the end token, or its opposite
        head[2] *= torch.sign(_last_hidden(model, batch) @ head[2])
        with pytest.raises(ActionError, match=r"stopped after 1 of 3 action tokens"):
            model.predict_tokens(unnorm_key="toy_arm", **batch)
    finally:
        head.copy_(before)


@torch.no_grad()
def _last_hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
    hidden: Tensor = model(**batch, output_hidden_states=True).hidden_states[-1][0, -1]
    return hidden


def broken(case: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    pixels = batch["pixel_values"]
    if case == "channels":
        return {**batch, "pixel_values": pixels[:, :3]}
    if case == "size":
        return {**batch, "pixel_values": pixels[..., :42]}
    if case == "nan":
        return {**batch, "pixel_values": pixels.masked_fill(pixels == pixels.max(), torch.nan)}
    if case == "space":
        return {**batch, "input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
    if case == "right":
        return {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 1), value=TEXT_TOKENS),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1)),
            "pixel_values": pixels,
        }
    if case == "placeholders":
        return {**batch, "input_ids": batch["input_ids"][:, 2:], "attention_mask": batch["attention_mask"][:, 2:]}
    if case == "images":
        return {**batch, "pixel_values": pixels.repeat(2, 1, 1, 1)}
    return {name: value for name, value in batch.items() if name != "pixel_values"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("channels", r"shape \(1, 3, 56, 56\); expected \(images, \*\(6, 56, 56\)\)"),
        ("size", r"shape \(1, 6, 56, 42\)"),
        ("nan", "NaN or infinite"),
        ("space", r"must end with token 259"),
        ("right", "padded on the right"),
        ("placeholders", r"15 visual placeholders .* give 16"),
        ("images", r"16 visual placeholders .* give 32"),
        ("no pixels", "needs input_ids and pixel_values"),
    ],
)
def test_observations_that_cannot_be_used_are_refused(policy: Any, case: str, message: str) -> None:
    model, processor = policy
    with pytest.raises(InputError, match=message):
        model.predict_tokens(unnorm_key="toy_arm", **broken(case, encoded(processor, "go")))


def test_statistics_are_asked_for_by_name(policy: Any) -> None:
    model, processor = policy
    batch = encoded(processor, "go")
    with pytest.raises(InputError, match=r"unnorm_key=None .*choose one of: other_arm, toy_arm"):
        model.predict_tokens(**batch)
    with pytest.raises(InputError, match=r"unnorm_key='arm' .*choose one of: other_arm, toy_arm"):
        model.predict_tokens(unnorm_key="arm", **batch)


def test_other_positions_do_not_go_with_bare_ids(policy: Any) -> None:
    model, processor = policy
    batch = encoded(processor, "go")
    ids = bare(batch, 0)
    with pytest.raises(InputError, match="position_ids"):
        model(input_ids=ids, pixel_values=batch["pixel_values"], position_ids=torch.arange(ids.shape[1])[None])


def test_generating_from_bare_ids_under_a_compressor(policy: Any) -> None:
    model, processor = policy
    batch = encoded(processor, *PROMPTS)
    single = {"input_ids": bare(batch, 1), "pixel_values": batch["pixel_values"][1:]}
    whole = {name: value[1:, -batch["attention_mask"][1].sum() :] for name, value in batch.items() if value.ndim == 2}
    options = {"max_new_tokens": 3, "do_sample": False}
    for method in (DivPrune(keep=4), FastV(keep=4, layer=1), CDPruner(keep=4)):
        with mmtoken.compress(model, method) as session:
            got = model.generate(**single, **options)
            assert session.report.tokens_out[0] < session.report.tokens_in[0] == official.PATCHES
            with torch.no_grad():
                logits = model(**single).logits
            want = model.generate(**whole, pixel_values=single["pixel_values"], **options)
            assert torch.equal(got, want)
            with torch.no_grad():
                close(logits, model(**whole, pixel_values=single["pixel_values"]).logits)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_fused_vision_backbone": True, "timm_model_ids": ["a"]}, "timm_model_ids names 1 towers"),
        ({"image_sizes": [224]}, "image_sizes=.*one entry per tower"),
        ({"image_sizes": [224, 336]}, "images of the same size"),
        ({"text_config": {"model_type": "qwen2"}}, "'qwen2' is not supported"),
        ({"text_config": {"vocab_size": 32000}}, "image_token_id=32001 is no row"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        OpenVLAConfig(**change)


@pytest.mark.parametrize("name", ["vit_no_such_model", "resnet18"])
def test_towers_that_are_none_are_refused(name: str) -> None:
    config = OpenVLAConfig(timm_model_ids=[name], text_config={"vocab_size": VOCAB}, pad_token_id=TEXT_TOKENS)
    with pytest.raises(UnsupportedError, match=f"'{name}'"), torch.device("meta"):
        OpenVLAForActionPrediction(config)
