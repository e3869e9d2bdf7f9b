"""tiny-llava: training sees what inference sees, a switch switches one thing, a resumed run is the same run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmtoken.cli.fit import main
from mmtoken.datasets.photo_digits import PhotoDigits
from mmtoken.datasets.shapes_qa import COLORS, QUESTION_TYPES, SHAPES, Sample, ShapesQA
from mmtoken.datasets.vqa_mix import Batch, Stage, TrainBatches, VQAMix, split_seed
from mmtoken.errors import CheckpointError, MMTokenError
from mmtoken.models.tiny_llava import NetworkConfig, TinyLlava, build_network, build_processor, export
from mmtoken.models.tiny_llava.objective import TensorBatch
from mmtoken.models.tiny_llava.packing import encode, pack, patch_labels, pixels
from mmtoken.models.tiny_llava.processor import BOS_ID, IMAGE_ID, PAD_ID, UNK_ID
from mmtoken.models.tiny_llava.results import plot_curves, training_facts

pytestmark = pytest.mark.lowest

SMALL = NetworkConfig(vision_layers=1, text_layers=2, width=32, heads=2)
RECIPE = Path(__file__).parents[2] / "models" / "tiny_llava" / "recipe.yaml"


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return list(ShapesQA(seed=31, size=3, min_objects=2))


@pytest.fixture(scope="module")
def photos() -> list[Sample]:
    return list(PhotoDigits(seed=31, size=2))


def conversation(sample: Sample, question: str, answer: str | None = None) -> list[dict[str, object]]:
    picture = {"type": "image", "image": Image.fromarray(sample.image)}
    turns: list[dict[str, object]] = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def inputs(processor: object, turns: object, **kwargs: object) -> dict[str, torch.Tensor]:
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return dict(processor.apply_chat_template(turns, **settings))  # type: ignore[attr-defined]


# Tokenizer and processor


def test_every_question_and_answer_has_words_and_reads_back() -> None:
    tokenizer = build_processor().tokenizer
    texts = {t for s in ShapesQA(seed=1, size=150) for q in s.questions for t in (q.text, q.answer)}
    for text in texts:
        ids = tokenizer(text).input_ids
        assert UNK_ID not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ordinary_spelling_means_the_same() -> None:
    tokenizer = build_processor().tokenizer
    plain = tokenizer("what color is the circle?").input_ids
    for text in ("What colour is the circle ?", "WHAT COLOR IS THE CIRCLE?", " what  color is the circle?\n"):
        assert tokenizer(text).input_ids == plain
    assert tokenizer("zebra").input_ids == [UNK_ID]


def test_training_ids_are_the_chat_templates(scenes: list[Sample], photos: list[Sample]) -> None:
    processor = build_processor()
    for sample in (*scenes, *photos):
        for question in sample.questions:
            ids, prompt = encode(question.text, question.answer)
            prefix = [BOS_ID] + [IMAGE_ID] * 64
            whole = inputs(processor, conversation(sample, question.text.capitalize(), question.answer))
            assert whole["input_ids"][0].tolist() == [*prefix, *ids]
            asked = inputs(processor, conversation(sample, question.text), add_generation_prompt=True)
            assert asked["input_ids"][0].tolist() == [*prefix, *ids[:prompt]]
            assert torch.allclose(whole["pixel_values"], pixels([sample]), atol=1e-5)


# Packing


def test_a_packed_question_is_computed_as_if_asked_alone(scenes: list[Sample]) -> None:
    model, processor = TinyLlava(SMALL).eval(), build_processor()
    batch = TensorBatch.of(Batch(scenes, []))
    assert batch.scenes is not None
    with torch.no_grad():
        hidden = model.network.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]
        packed = model.answer_logits(hidden, batch.scenes)
        model.network.set_attn_implementation("sdpa")
        alone = []
        for sample in scenes:
            for question in sample.questions:
                ids, prompt = encode(question.text, question.answer)
                logits = model.network(**inputs(processor, conversation(sample, question.text, question.answer))).logits
                alone.append(logits[0, -(len(ids) - prompt) - 1 : -1])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-4)


def test_labels_are_the_next_ids_of_the_answers(scenes: list[Sample]) -> None:
    packed = pack(scenes)
    for b, sample in enumerate(scenes):
        for q, question in enumerate(sample.questions):
            ids, prompt = encode(question.text, question.answer)
            here = packed.question[b] == q
            assert packed.text[b, here].tolist() == list(ids[:-1])
            assert packed.labels[b, here].tolist() == [-100] * (prompt - 1) + list(ids[prompt:])
            assert QUESTION_TYPES[int(packed.types[b, q])] == question.type
        padding = packed.question[b] == -1
        assert (packed.labels[b, padding] == -100).all() and (packed.text[b, padding] == PAD_ID).all()


def test_patch_labels_against_counting_pixels(scenes: list[Sample], photos: list[Sample]) -> None:
    samples = [*scenes, *photos]
    labels = patch_labels(samples)
    for b, sample in enumerate(samples):
        for patch in range(64):
            area = {}
            things = [(o.box, (1 + list(COLORS).index(o.color), 1 + SHAPES.index(o.shape), 0)) for o in sample.objects]
            things += [(box, (0, 0, d + 1)) for box, d in zip(sample.digit_boxes, sample.number, strict=True)]
            for (x0, y0, x1, y1), classes in things:
                rows = range(patch // 8 * 12, patch // 8 * 12 + 12)
                columns = range(patch % 8 * 12, patch % 8 * 12 + 12)
                covered = sum(y0 <= y < y1 for y in rows) * sum(x0 <= x < x1 for x in columns)
                area[classes] = max(covered, area.get(classes, 0))
            most = max(area.values())
            allowed = [c for c, a in area.items() if a == most] if most >= 0.3 * 144 else [(0, 0, 0)]
            assert tuple(labels[:, b, patch].tolist()) in allowed


# Objective


def test_the_switch_removes_the_dense_loss_and_nothing_else(scenes: list[Sample], photos: list[Sample]) -> None:
    batch = TensorBatch.of(Batch(scenes, photos))
    dense, plain = (TinyLlava(SMALL, dense_patch_steps=steps).losses(batch) for steps in (None, 0))
    assert set(dense) - set(plain) == {"patches"} and dense["patches"] > 0
    for name, value in plain.items():
        assert torch.equal(value, dense[name]), name


def test_every_parameter_of_the_network_is_trained(scenes: list[Sample], photos: list[Sample]) -> None:
    model = TinyLlava(SMALL)
    torch.stack(list(model.losses(TensorBatch.of(Batch(scenes, photos))).values())).sum().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # LLaVA reads the tower before its last layer norm.
    assert still == {f"network.model.vision_tower.post_layernorm.{k}" for k in ("weight", "bias")}


def test_correct_agrees_with_generation(scenes: list[Sample]) -> None:
    model, processor = TinyLlava(SMALL).eval(), build_processor()
    # Answers are what the untrained network says, then one of them is made wrong.
    with torch.no_grad():
        asked = [conversation(s, s.questions[0].text) for s in scenes]
        given = inputs(processor, asked, add_generation_prompt=True, processor_kwargs={"padding": True})
        model.network.set_attn_implementation("sdpa")
        logits = model.network(**given).logits[:, -1]
        model.network.set_attn_implementation("eager")
        batch = TensorBatch.of(Batch([], [Sample(s.image, s.questions[:1]) for s in scenes]))
        assert batch.photos is not None
        batch.photos.labels[batch.photos.labels >= 0] = -100
        last = [len(encode(s.questions[0].text, "")[0]) - 2 for s in scenes]
        for b, (position, best) in enumerate(zip(last, logits.argmax(dim=-1), strict=True)):
            batch.photos.labels[b, position] = best if b != 1 else (best + 1) % 7
        assert model.correct(batch)[:, 0].tolist() == [True, False, True]


def test_left_padded_batches_generate_what_single_prompts_do(scenes: list[Sample]) -> None:
    processor = build_processor()
    torch.manual_seed(0)
    model = build_network(SMALL).eval()
    asked = [conversation(s, q.text) for s in scenes for q in s.questions[:3]]
    together = inputs(processor, asked, add_generation_prompt=True, processor_kwargs={"padding": True})
    assert (together["input_ids"][:, 0] == PAD_ID).any() and (together["input_ids"][:, -1] != PAD_ID).all()
    start = together["input_ids"].shape[1]
    batched = model.generate(**together, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, start:]
    for row, turns in zip(batched, asked, strict=True):
        single = inputs(processor, turns, add_generation_prompt=True)
        alone = model.generate(**single, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert torch.equal(alone[0, single["input_ids"].shape[1] :], row)


# Data module and command


def test_batches_are_a_function_of_the_step() -> None:
    stages = (0, ShapesQA(seed=1, size=1000)), (4, ShapesQA(seed=1, size=1000, mix={"number": 1.0}))
    source = stages, PhotoDigits(seed=1, size=1000, split="train")
    straight = iter(TrainBatches(*source, scene_batch=2, photo_batch=1))
    for _ in range(3):
        next(straight)
    later, resumed = next(straight), next(iter(TrainBatches(*source, scene_batch=2, photo_batch=1, start=3)))
    for a, b in zip(later.scenes + later.photos, resumed.scenes + resumed.photos, strict=True):
        assert np.array_equal(a.image, b.image) and a.questions == b.questions
    second = next(straight)
    assert {q.type for s in later.scenes for q in s.questions} != {"number"}
    assert {q.type for s in second.scenes for q in s.questions} == {"number"}


@pytest.mark.parametrize("starts", [[1], [0, 5, 5], [0, 7, 3]])
def test_stages_out_of_order_are_refused(starts: list[int]) -> None:
    with pytest.raises(MMTokenError, match="stages"):
        VQAMix(stages=[Stage(start=s) for s in starts])


def test_splits_and_seeds_share_no_generator() -> None:
    seeds = [split_seed(seed, split) for seed in range(5) for split in ("train", "validation", "test")]
    assert len(set(seeds)) == len(seeds)
    batches = list(VQAMix(validation_scenes=40, validation_photos=33).val_dataloader())
    assert [(len(b.scenes), len(b.photos)) for b in batches] == [(32, 0), (8, 0), (0, 32), (0, 1)]


def fit(folder: Path, *extra: str) -> None:
    """The shipped recipe, made small."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    recipe["trainer"]["default_root_dir"] = str(folder)
    recipe["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    recipe["trainer"]["callbacks"][0]["init_args"] |= {
        "dirpath": str(folder / "checkpoints"),
        "every_n_train_steps": 2,
        "save_top_k": -1,
    }
    recipe["model"]["init_args"] |= {"compile": False, "network": vars(SMALL)}
    recipe["data"]["init_args"] |= {"scene_batch": 2, "photo_batch": 1, "validation_scenes": 2, "validation_photos": 2}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["--config", str(folder / "recipe.yaml"), *extra])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(folder)
    return folder


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def test_a_resumed_run_ends_where_the_straight_one_does(run: Path, tmp_path: Path) -> None:
    halfway = run / "checkpoints" / "step=2.ckpt"
    fit(tmp_path, "--ckpt_path", str(halfway))
    straight, resumed = (weights(p / "checkpoints" / "last.ckpt") for p in (run, tmp_path))
    early = weights(halfway)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert any(not torch.equal(straight[k], early[k]) for k in straight)


def test_validation_reports_every_type(run: Path) -> None:
    header, *rows = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert {"val/photo_number", "val/accuracy", "train/cpu_minutes"} <= set(columns)
    assert sum(bool(row.split(",")[columns.index("val/accuracy")]) for row in rows) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model=os.system", "os.system"),
        ("--model.init_args.dense_patch=false", "dense_patch"),
        ("--data=mmtoken.datasets.shapes_qa.ShapesQA", "ShapesQA"),
    ],
)
def test_a_recipe_with_another_class_or_field_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(MMTokenError, match=message):
        fit(tmp_path, override)
    assert not (tmp_path / "checkpoints").exists()


# Export


def test_the_exported_folder_loads_with_nothing_special(run: Path, tmp_path: Path, scenes: list[Sample]) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    folder = export(checkpoint, tmp_path / "tiny", config=SMALL)
    export(checkpoint, folder, config=SMALL)  # replaces
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"], "no temporary folder may stay"
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    trained = weights(checkpoint)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[f"network.{name}"], rtol=1e-3, atol=1e-6)
    given = inputs(processor, conversation(scenes[0], "Read the number."), add_generation_prompt=True)
    out = model.generate(**given)
    assert out.shape[1] <= given["input_ids"].shape[1] + 8


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.ckpt"):
        export(tmp_path / "none.ckpt", tmp_path / "out", config=SMALL)
    with pytest.raises(CheckpointError, match="config"):
        export(run / "checkpoints" / "last.ckpt", tmp_path / "out")  # the full size
    (tmp_path / "bad.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="bad"):
        export(tmp_path / "bad.ckpt", tmp_path / "out", config=SMALL)
    assert not (tmp_path / "out").exists()


# Results


def test_curves_and_training_facts_come_from_the_metrics(run: Path, tmp_path: Path) -> None:
    metrics = [run / "logs" / "version_0" / "metrics.csv"]
    facts = training_facts(metrics)
    assert facts["steps"] == 4 and facts["cpu_minutes"] >= 0
    plot_curves({"tiny-llava": metrics, "again": metrics}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > picture.height > 300
