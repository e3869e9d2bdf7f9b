"""VideoScan's training stages: what the decoder sees, what is trained, and that it is what inference computes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

import mmtoken
from mmtoken.cli.main import main
from mmtoken.compressors import VideoScan
from mmtoken.datasets.moving_shapes import Clip, MovingShapes
from mmtoken.errors import CheckpointError, MMTokenError
from mmtoken.models.tiny_llava_video import NetworkConfig, build_network, export, videoscan
from mmtoken.models.tiny_llava_video.packing import FRAME_TOKENS, ClipBatch
from mmtoken.models.tiny_llava_video.videoscan import (
    Lora,
    VideoScanStage,
    carrier_mask,
    carrier_positions,
    merge_adapters,
    plain_weights,
)
from mmtoken.tokens import VisualTokens
from tests.compressors.carrier_stream import CarrierStream

ROOT = Path(__file__).parents[2]
TINY = NetworkConfig(vision_layers=2, text_layers=2, width=32, heads=2)
FRAMES = 6


def objective(stage: int, **options: object) -> VideoScanStage:
    return VideoScanStage(stage, None, network=TINY, **options)  # type: ignore[arg-type]


@functools.cache
def clips() -> list[Clip]:
    """Two clips of six frames with questions, some of which come before the end."""
    return list(MovingShapes(0, 2, (FRAMES, FRAMES), 5, anytime=0.6))


def spoken(batch: ClipBatch, row: int) -> list[tuple[int, list[int]]]:
    """Per question of a clip (frames seen, its places among the text)."""
    numbers = sorted(set(batch.question[row].tolist()) - {-1})
    places = [(batch.question[row] == q).nonzero()[:, 0].tolist() for q in numbers]
    return [(int(batch.seen[row, mine[0]]), mine) for mine in places]


@pytest.mark.parametrize("block", [1, 3])
def test_questions_see_the_carriers_of_the_frames_before_them_and_themselves(block):
    batch = objective(2).batch(clips())
    mask, visual = carrier_mask(batch, block), 1 + FRAMES * block
    assert {seen for seen, _ in spoken(batch, 0)} | {seen for seen, _ in spoken(batch, 1)} != {FRAMES}
    for row in range(2):
        want = torch.zeros(visual + batch.text.shape[1], visual + batch.text.shape[1], dtype=torch.bool)
        want[0, 0] = True
        carriers = [block * (f + 1) for f in range(FRAMES)]
        for f in range(FRAMES):
            for j in range(block):
                me = 1 + f * block + j
                want[me, [0, *carriers[:f], *range(1 + f * block, me + 1)]] = True
        for seen, places in spoken(batch, row):
            for n, place in enumerate(places):
                want[visual + place, [0, *carriers[:seen], *(visual + p for p in places[: n + 1])]] = True
        real = [*range(visual), *(visual + p for _, places in spoken(batch, row) for p in places)]
        assert torch.equal(mask[row, 0][real], want[real])
        assert bool(mask[row, 0].any(-1).all())  # padding sees itself


@pytest.mark.parametrize("policy", ["true", "repo"])
def test_positions_are_those_of_a_stream(policy):
    batch = objective(2).batch(clips())
    block, apart = 5, 5 if policy == "true" else 1
    positions = carrier_positions(batch, block, policy)
    for row in range(2):
        want = [0] + [1 + f * apart + j for f in range(FRAMES) for j in range(block)]
        assert positions[row, : len(want)].tolist() == want
        for seen, places in spoken(batch, row):
            got = positions[row, len(want) :][places].tolist()
            assert got == [1 + seen * apart + n for n in range(len(places))]


def frame(tokens: Tensor) -> VisualTokens:
    side = int(FRAME_TOKENS**0.5)
    return VisualTokens.from_features(tokens[None], grid=((1, side, side),))


@torch.no_grad()
def streamed(model: VideoScanStage, batch: ClipBatch, row: int, policy: str, method: VideoScan) -> list[Tensor]:
    """Logits of every question's text, from a stream of the clip up to its moment."""
    network, decoder = model.network, model.network.model.language_model
    decoder.set_attn_implementation("eager")
    embed = network.get_input_embeddings()
    tokens = super(VideoScanStage, model).visual(batch)[row].view(FRAMES, FRAME_TOKENS, -1)
    logits = []
    for seen, places in spoken(batch, row):
        system = embed(torch.tensor([network.config.text_config.bos_token_id]))
        stream = CarrierStream(decoder, method, system, policy)
        for number in range(seen):
            stream.push(frame(tokens[number]))
        text = embed(batch.text[row, places].long())
        text[0] = network.model.image_newline
        logits.append(network.lm_head(stream.ask(text)))
    return logits


@pytest.mark.parametrize(("stage", "policy"), [(1, "true"), (2, "true"), (2, "repo")])
def test_training_computes_what_a_stream_computes(stage, policy):
    model = objective(stage, policy=policy).eval()
    batch = model.batch(clips())
    with torch.no_grad():
        got = model.answer_logits(batch)
    method = VideoScan(without="kv") if stage == 1 else VideoScan()
    want = []
    for row in range(2):
        for logits, (_, places) in zip(streamed(model, batch, row, policy, method), spoken(batch, row), strict=True):
            want.append(logits[batch.labels[row, places] >= 0])
    torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=1e-4)


def test_the_first_stage_computes_what_generate_computes():
    model = objective(1).eval()
    batch = model.batch(clips())
    network, config = model.network, model.network.config
    (seen, places), *_ = spoken(batch, 0)
    prompt = [p for p in places if batch.labels[0, p] < 0]
    prompt = places[: len(prompt) + 1]  # the last one predicts the first word of the answer
    ids = [config.text_config.bos_token_id, *[config.video_token_id] * (seen * FRAME_TOKENS)]
    ids = torch.tensor([[*ids, *batch.text[0, prompt].tolist()]])  # its first one stands for the newline
    pixels = batch.pixels()[None, :seen]
    with torch.no_grad(), mmtoken.compress(network, VideoScan()):
        got = network(input_ids=ids, pixel_values_videos=pixels, attention_mask=torch.ones_like(ids)).logits[0, -1]
    with torch.no_grad():
        want = model.answer_logits(batch)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_eager_and_fused_attention_agree():
    results = []
    for attention in ("eager", "sdpa"):
        model = objective(2, attention=attention).eval()
        with torch.no_grad():
            results.append(model(model.batch(clips()))[0])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_each_stage_trains_its_matrices_and_learns(stage):
    model = objective(stage, learning_rate=3e-3)
    parts = {name.split("network.model.")[1].split(".")[0] for name in model.trained}
    assert parts == ({"language_model", "vision_tower"} if stage == 1 else {"language_model"})
    leaves = {name.split(".")[-2] for name in model.trained if "vision_tower" in name}
    assert leaves == ({"q_proj", "k_proj", "v_proj"} if stage == 1 else set())
    decoder = {name.split(".")[-2] for name in model.trained if "language_model" in name}
    assert decoder == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, optimizer, losses = model.batch(clips()), model.optimizer(), []
    for _ in range(12):
        loss = torch.stack(list(model.losses(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(model.trained)


def test_the_second_stage_goes_on_from_a_checkpoint_of_the_first(tmp_path):
    first = objective(1, seed=3)
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": first.state_dict(), "global_step": 1, "epoch": 0}, file)
    second = VideoScanStage(2, str(file), network=TINY)
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value)
    with pytest.raises(CheckpointError, match=r"start=.*holds no network of this size"):
        VideoScanStage(2, str(file))
    folder = tmp_path / "exported"
    first.network.save_pretrained(folder)
    third = VideoScanStage(2, str(folder), network=TINY)
    assert torch.equal(third.network.lm_head.weight, first.network.lm_head.weight)


def test_settings_that_cannot_be_trained_are_refused():
    with pytest.raises(MMTokenError, match=r"stage=3 is unknown; use 1 or 2"):
        objective(3)
    with pytest.raises(MMTokenError, match=r"policy='contiguous' cannot be trained in one pass"):
        objective(2, policy="contiguous")
    with pytest.raises(MMTokenError, match="start-from-nothing"):
        VideoScanStage(1, "start-from-nothing", network=TINY)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_adapters_are_worked_into_the_weights_by_name():
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    weights = {
        "a.base_layer.weight": torch.eye(2),
        "a.base_layer.bias": torch.ones(2),
        "a.lora_A.default.weight": down,
        "a.lora_B.default.weight": up,
        "b.weight": torch.ones(1),
    }
    plain = merge_adapters(weights, 0.5)
    assert sorted(plain) == ["a.bias", "a.weight", "b.weight"]
    assert plain["a.weight"].tolist() == [[2.5, 3.0], [2.0, 5.0]]


def test_what_adapters_learned_is_the_same_in_a_network_without_them(tmp_path):
    model = objective(1, lora=Lora(rank=3, alpha=6, dropout=0.5))
    assert all(".lora_" in name for name in model.trained)
    assert {name.split("network.model.")[1].split(".")[0] for name in model.trained} == {
        "language_model",
        "vision_tower",
    }
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # they start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    batch = model.batch(clips())
    plain = objective(1).eval()
    plain.network.load_state_dict(model.plain_state())
    with torch.no_grad():
        torch.testing.assert_close(plain(batch)[0], model(batch)[0], atol=1e-4, rtol=1e-4)
    saved: dict[str, object] = {"state_dict": model.state_dict(), "global_step": 1, "epoch": 0}
    file = tmp_path / "last.ckpt"
    torch.save(saved, file)
    with pytest.raises(CheckpointError, match="adapters but not their scale"):
        plain_weights(file)
    model.on_save_checkpoint(saved)
    torch.save(saved, file)
    assert all(torch.equal(value, model.plain_state()[name]) for name, value in plain_weights(file).items())
    folder = export(file, tmp_path / "exported", config=TINY, dtype=torch.float32)
    loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(value, model.plain_state()[name]) for name, value in loaded.state_dict().items())
    second = VideoScanStage(2, str(file), network=TINY, lora=Lora(rank=2))
    assert all("language_model" in name for name in second.trained)


def test_adapters_without_their_package_say_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MMTokenError, match=r"lora needs the package peft .*lora=None"):
        objective(1, lora=Lora())


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("stage", [1, 2])
def test_a_recipe_trains(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "models" / "tiny_llava_video" / f"videoscan-stage{stage}.yaml"
    tiny = {"vision_layers": 1, "text_layers": 1, "width": 16, "heads": 2}
    options = [f"--model.network.{name}={value}" for name, value in tiny.items()]
    options += ["--model.start=null", "--model.lora=null", "--model.warmup_steps=1", "--model.minutes=1"]
    options += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"]
    options += ["--trainer.precision=32", "--trainer.callbacks.every_n_train_steps=1", "--trainer.log_every_n_steps=1"]
    options += ["--data.frames=24", "--data.questions=2", "--data.validation_clips=2"]
    assert main(["fit", "--config", str(recipe), *options]) == 0
    last = tmp_path / "runs" / f"videoscan_stage{stage}" / "checkpoints" / "last.ckpt"
    small = build_network(NetworkConfig(**tiny))
    assert {name: value.shape for name, value in plain_weights(last).items()} == {
        name: value.shape for name, value in small.state_dict().items()
    }


@pytest.mark.parametrize(("stage", "adapters"), [(1, []), (2, ["--lora-rank", "2"])])
def test_a_stage_trains_for_a_given_time(stage, adapters, tmp_path, monkeypatch):
    first = objective(1)
    out = tmp_path / "run"
    monkeypatch.setattr(videoscan, "VideoScanStage", functools.partial(VideoScanStage, network=TINY))
    file = tmp_path / "before.ckpt"
    torch.save({"state_dict": first.state_dict(), "global_step": 1, "epoch": 0}, file)
    options = ["--stage", str(stage), "--start", str(file), "--out", str(out), "--minutes", "1", "--steps", "2"]
    options += ["--frames", "12", "--questions", "2", "--workers", "1", "--validation-clips", "2", "--device", "cpu"]
    videoscan.main([*options, *adapters])
    report = json.loads((out / "metrics.json").read_text())
    assert [check["step"] for check in report["checks"]] == [0, 2] and report["options"]["stage"] == stage
    assert set(plain_weights(out / "last.ckpt")) == set(first.network.state_dict())
