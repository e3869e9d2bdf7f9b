"""tiny-llava-video: packed questions equal questions asked alone; weights carry over; training runs and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from mmtoken.backbones.registry import adapt
from mmtoken.datasets.moving_shapes import QUESTION_TYPES, Clip, MovingShapes
from mmtoken.errors import CheckpointError
from mmtoken.models.registry import find_model
from mmtoken.models.tiny_llava.processor import VOCABULARY as OLD_WORDS
from mmtoken.models.tiny_llava_video import NetworkConfig, TinyLlavaVideo, build_network, build_processor, export
from mmtoken.models.tiny_llava_video.network import from_tiny_llava
from mmtoken.models.tiny_llava_video.packing import Gaps, encode, object_labels, pack_clips
from mmtoken.models.tiny_llava_video.processor import FRAME_TOKENS, VIDEO_ID, VOCABULARY
from mmtoken.models.tiny_llava_video.train import main
from mmtoken.training.objective import cosine

SMALL = NetworkConfig(vision_layers=2, text_layers=2, width=32, heads=2)


@pytest.fixture(scope="module")
def objective() -> TinyLlavaVideo:
    return TinyLlavaVideo(SMALL, object_layer=1).eval()


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(MovingShapes(21, 2, (8, 8), questions=5, anytime=0.7))


def conversation(question: str, answer: str | None = None) -> list[dict[str, object]]:
    turns: list[dict[str, object]] = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    ]
    return [*turns, {"role": "assistant", "content": answer}] if answer else turns


def test_a_frame_becomes_sixteen_tokens_and_a_clip_one_more() -> None:
    processor = build_processor()
    text = processor.apply_chat_template(conversation("read the number."), add_generation_prompt=True)
    clip = MovingShapes(21, 1)[0]
    inputs = processor(videos=[clip.frames], text=text, return_tensors="pt", add_special_tokens=False)
    assert int((inputs["input_ids"] == VIDEO_ID).sum()) == 16 * FRAME_TOKENS + 1
    assert inputs["pixel_values_videos"].shape == (1, 16, 3, 96, 96)
    pixels = pack_clips([clip]).pixels()
    torch.testing.assert_close(inputs["pixel_values_videos"][0], pixels, rtol=1e-5, atol=1e-5)


def test_words_keep_their_ids_and_questions_have_no_unknown_ones() -> None:
    assert VOCABULARY[: len(OLD_WORDS)] == OLD_WORDS
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    unknown = VOCABULARY.index("<unk>")
    for clip in MovingShapes(22, 40):
        for q in clip.questions:
            ids, prompt = encode(q.text, q.answer)
            assert unknown not in ids
            assert ids[0] == VIDEO_ID
            assert 3 < prompt < len(ids) <= prompt + 3


def test_packed_questions_equal_questions_asked_alone(objective: TinyLlavaVideo, clips: list[Clip]) -> None:
    processor = build_processor()
    batch = pack_clips(clips)
    with torch.no_grad():
        logits = objective.answer_logits(batch)
    at = 0
    for clip in clips:
        for q in clip.questions:
            text = processor.apply_chat_template(conversation(q.text, q.answer))
            inputs = processor(videos=[clip.frames[: q.seen]], text=text, return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                alone = objective.network(**inputs).logits[0]
            count = len(encode(q.text, q.answer)[0]) - encode(q.text, q.answer)[1]
            torch.testing.assert_close(logits[at : at + count], alone[-count - 1 : -1], rtol=1e-4, atol=1e-4)
            at += count
    assert at == len(logits)


def test_missing_tokens_equal_a_shorter_prompt(objective: TinyLlavaVideo, clips: list[Clip]) -> None:
    """With positions closed up, tokens that are masked are as good as never there."""
    rng = np.random.default_rng(4)
    batch = pack_clips(clips[:1], Gaps(missing=1.0, closed=1.0), rng)
    kept = batch.kept[0]
    assert 0.3 < kept.float().mean() < 1
    inner, embed = objective.network.model, objective.network.get_input_embeddings()
    with torch.no_grad():
        logits = objective.answer_logits(batch)
        visual = objective.visual(batch)[0]
        q = clips[0].questions[0]
        ids, prompt = encode(q.text, q.answer)
        left = visual[: q.seen * FRAME_TOKENS][kept[: q.seen * FRAME_TOKENS]]
        text = embed(torch.tensor(ids))
        text[0] = inner.image_newline
        sequence = torch.cat([embed(torch.tensor([1])), left, text])[None]
        alone = objective.network(inputs_embeds=sequence).logits[0]
    count = len(ids) - prompt
    torch.testing.assert_close(logits[:count], alone[-count - 1 : -1], rtol=1e-4, atol=1e-4)


def test_positions_jump_between_frames_only(clips: list[Clip]) -> None:
    batch = pack_clips(clips, Gaps(missing=0.0, jumps=1.0), np.random.default_rng(0))
    steps = batch.visual_positions.diff(dim=1)
    inside = torch.arange(1, steps.shape[1] + 1) % FRAME_TOKENS != 0
    assert (steps[:, inside] == 1).all()
    assert (steps >= 1).all()
    assert int(batch.visual_positions.max()) <= 1200
    assert int(steps.max()) > 1
    last = batch.visual_positions[0].view(-1, FRAME_TOKENS)[:, -1]
    first_text = batch.text_positions[0][batch.text[0] == VIDEO_ID]
    seen = torch.tensor([q.seen for q in clips[0].questions])
    torch.testing.assert_close(first_text, last[seen - 1] + 1)


def test_no_position_sees_what_it_must_not(clips: list[Clip]) -> None:
    batch = pack_clips(clips)
    mask = batch.mask()[:, 0]
    visual, prefix = batch.kept.shape[1], 1 + batch.kept.shape[1]
    assert mask.any(dim=-1).all()
    assert not mask.triu(1).any()
    for b, clip in enumerate(clips):
        for i in range(batch.text.shape[1]):
            row = mask[b, prefix + i]
            question = int(batch.question[b, i])
            if question < 0:
                continue
            assert row[1:prefix].tolist() == [t // FRAME_TOKENS < clip.questions[question].seen for t in range(visual)]
            others = batch.question[b][row[prefix:]].unique().tolist()
            assert others == [question]


def test_object_labels_are_where_the_objects_are(clips: list[Clip]) -> None:
    labels = object_labels(clips).reshape(len(clips), 8, 4, 4, 4)
    for b, clip in enumerate(clips):
        expected = np.full((8, 4, 4), -1)
        for order, o in enumerate(clip.objects):
            for t, (x0, y0, x1, y1) in enumerate(o.boxes, start=o.start):
                for row in range(4):
                    for column in range(4):
                        wide = min(x1, 24 * column + 24) - max(x0, 24 * column)
                        high = min(y1, 24 * row + 24) - max(y0, 24 * row)
                        if max(wide, 0) * max(high, 0) >= 0.3 * (x1 - x0) * (y1 - y0):
                            expected[t, row, column] = order
        np.testing.assert_array_equal(labels[b, ..., 3], expected)
        known = labels[b, ..., 2] >= 0
        starts = {o.start for o in clip.objects}
        assert all(t not in starts or len(clip.objects) > 1 for t in np.nonzero(known)[0])


def test_tiny_llava_is_where_it_starts() -> None:
    network = from_tiny_llava()
    shipped = LlavaForConditionalGeneration.from_pretrained(find_model("tiny-llava").path, dtype=torch.float32)
    own = network.state_dict()
    for name, value in shipped.state_dict().items():
        torch.testing.assert_close(own[name][: len(value)], value)
    assert {name for name in own if name not in shipped.state_dict()} == {"model.image_newline"}


def test_the_towers_class_token_is_no_patch() -> None:
    tower = adapt(build_network(SMALL)).tower()
    assert tower is not None
    assert tower.prefix == 1


def test_every_weight_learns(objective: TinyLlavaVideo, clips: list[Clip]) -> None:
    objective.train()
    terms = objective.losses(objective.batch(clips, 3))
    assert set(terms) == {"answers", "colours", "shapes", "directions", "order"}
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in objective.named_parameters():
        if "post_layernorm" not in name:  # CLIP's pooled output alone has it
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().sum() > 0, name
    objective.zero_grad()
    objective.eval()


def test_eager_attention_is_the_same(clips: list[Clip]) -> None:
    one, two = TinyLlavaVideo(SMALL, object_layer=1), TinyLlavaVideo(SMALL, object_layer=1, attention="eager")
    batch = pack_clips(clips)
    with torch.no_grad():
        torch.testing.assert_close(one.answer_logits(batch), two.answer_logits(batch), rtol=1e-4, atol=1e-4)


def test_the_schedule_follows_the_clock_where_that_is_further() -> None:
    objective = TinyLlavaVideo(SMALL, object_layer=1, warmup_steps=10, minutes=1.0)
    assert objective.factor(0, 1000) == pytest.approx(0.1, rel=1e-3)
    assert objective.factor(500, 1000) == pytest.approx(0.51, rel=1e-2)
    assert objective._started is not None
    objective._started -= 60
    assert objective.factor(500, None) == pytest.approx(0.02, rel=1e-3)
    assert cosine(99, 0.0, 100) == 1.0


def test_training_writes_metrics_and_a_checkpoint_that_goes_on_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_network(SMALL)

    monkeypatch.setattr("mmtoken.models.tiny_llava_video.objective.from_tiny_llava", small)
    common = ["--frames", "24", "--workers", "2", "--validation-clips", "4", "--device", "cpu", "--object-layer", "1"]
    main(["--seed", "1", "--steps", "3", "--out", str(tmp_path / "a"), *common])
    report = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert [row["step"] for row in report["checks"]] == [0, 3]
    assert set(report["checks"][-1]["accuracy"]) <= {*QUESTION_TYPES, "all"}
    checkpoint = tmp_path / "a" / "last.ckpt"
    main(["--seed", "1", "--steps", "1", "--start-from", str(checkpoint), "--out", str(tmp_path / "b"), *common])
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["checks"][-1]["step"] == 4

    folder = export(tmp_path / "b" / "last.ckpt", tmp_path / "model", config=SMALL)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    clip = MovingShapes(21, 1)[0]
    text = processor.apply_chat_template(conversation("read the number."), add_generation_prompt=True)
    inputs = processor(videos=[clip.frames], text=text, return_tensors="pt", add_special_tokens=False)
    assert model.generate(**inputs).shape[1] <= inputs["input_ids"].shape[1] + 4
    with pytest.raises(CheckpointError, match="TinyLlavaVideo"):
        export(checkpoint, tmp_path / "other")
