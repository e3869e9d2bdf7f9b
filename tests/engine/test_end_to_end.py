"""Pictures in files, upstream processors and chat templates, checkpoints from folders: what a user does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

import mmtoken
from mmtoken import compress, compress_inputs
from mmtoken.compressors import DivPrune, FastV, PyramidDrop, ToMe, UniformGrid, VisionZip
from mmtoken.compressors.base import Compressor
from mmtoken.errors import UnsupportedError
from tests import oracle
from tests.backbones.processors import video, write_checkpoint
from tests.backbones.tiny_models import FAMILIES, OPAQUE, video_families, visual_mask
from tests.engine.agreement import assert_close, left_in_layers
from tests.engine.test_inputs import needs_features

SAMPLES = Path(mmtoken.__file__).parent / "assets" / "samples"
METHODS: dict[str, Compressor] = {
    "divprune": DivPrune(keep=0.3),
    "visionzip": VisionZip(keep=0.4),
    "tome": ToMe(keep=0.6),
    "fastv": FastV(keep=0.3),
    "pyramiddrop": PyramidDrop(keep=0.25),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's own processor refuses to be made without num2words")
    return request.param


@pytest.fixture(scope="module")
def loaded(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_checkpoint(family, tmp_path_factory.mktemp(family))
    model = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, tf.AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wide PNG, a tall JPEG, and a grey PNG with an odd number of pixels on each side."""
    folder = tmp_path_factory.mktemp("pictures")
    wide, tall, grey = folder / "wide.png", folder / "tall.jpg", folder / "grey.png"
    Image.open(SAMPLES / "photo_astronaut.png").convert("RGB").resize((131, 67)).save(wide)
    Image.open(SAMPLES / "photo_chelsea.png").convert("RGB").resize((59, 93)).save(tall, quality=90)
    Image.open(SAMPLES / "scene_1.png").convert("L").resize((77, 77)).save(grey)
    return [wide, tall, grey]


def ask(text: str, *media: Path | np.ndarray) -> list[dict[str, Any]]:
    """One user turn; pictures are given as files."""
    parts: list[dict[str, Any]] = [
        {"type": "image", "path": str(m)} if isinstance(m, Path) else {"type": "video", "video": m} for m in media
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def encode(processor: Any, *turns: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )


def assert_masked_answer(model: Any, method: Compressor, batch: Any) -> None:
    """The answer is the masked model's for methods that only drop, and everyone's tokens are fewer."""
    with compress(model, method) as session:
        got = oracle.generate_with_logits(model, batch, max_new_tokens=5, eos_token_id=None)
    report = session.report
    assert all(0 < after < before for before, after in zip(report.tokens_in, report.tokens_out, strict=True))
    if not method.merges:
        with oracle.masked_keys(model, left_in_layers(report, batch, 4)):
            want = oracle.generate_with_logits(model, batch, max_new_tokens=5, eos_token_id=None)
        assert torch.equal(got.sequences, want.sequences)
        assert_close(got.logits, want.logits)


def refuses(model: Any, name: str) -> bool:
    """Whether the model's tower hosts no such method, which is then refused."""
    if model.config.model_type not in OPAQUE or name not in ("visionzip", "tome"):
        return False
    with pytest.raises(UnsupportedError, match="in one masked sequence"):
        compress(model, METHODS[name])
    return True


@pytest.mark.parametrize("name", METHODS)
def test_questions_about_picture_files_are_answered(loaded: tuple[Any, Any], files: list[Path], name: str) -> None:
    model, processor = loaded
    if refuses(model, name):
        return
    batch = encode(processor, ask("What is shown in the image?", files[0]), ask("How many cats are there?", files[1]))
    assert_masked_answer(model, METHODS[name], batch)
    with compress(model, METHODS[name]):
        together = model.generate(**batch, max_new_tokens=5, do_sample=False)
        answers = processor.batch_decode(together[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, (question, file) in enumerate(
            [("What is shown in the image?", files[0]), ("How many cats are there?", files[1])]
        ):
            single = encode(processor, ask(question, file))
            alone = model.generate(**single, max_new_tokens=5, do_sample=False)
            text = processor.batch_decode(alone[:, single["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text == [answers[row]]


@pytest.mark.parametrize("name", METHODS)
def test_several_pictures_in_one_question(loaded: tuple[Any, Any], files: list[Path], name: str) -> None:
    model, processor = loaded
    if refuses(model, name):
        return
    batch = encode(processor, ask("Describe the picture.", files[2]), ask("Left or right?", files[0], files[1]))
    assert_masked_answer(model, METHODS[name], batch)


def test_keeping_everything_gives_the_plain_answer(loaded: tuple[Any, Any], files: list[Path]) -> None:
    model, processor = loaded
    batch = encode(processor, ask("What is shown in the image?", files[1]), ask("Describe it.", files[2]))
    plain = oracle.generate_with_logits(model, batch, max_new_tokens=5, eos_token_id=None)
    for name in METHODS:
        if refuses(model, name):
            continue
        method = replace(METHODS[name], keep=1.0)
        with compress(model, method) as session:
            got = oracle.generate_with_logits(model, batch, max_new_tokens=5, eos_token_id=None)
        assert session.report.calls > 0
        assert torch.equal(got.sequences, plain.sequences)
        assert torch.equal(got.logits, plain.logits)


@needs_features
@pytest.mark.parametrize("name", ["divprune", "visionzip", "tome"])
def test_short_inputs_of_a_processor_give_the_same_answer(
    loaded: tuple[Any, Any], files: list[Path], name: str
) -> None:
    model, processor = loaded
    if refuses(model, name):
        return
    batch = encode(processor, ask("What is shown in the image?", files[0]), ask("Describe it.", files[2]))
    with compress(model, METHODS[name]):
        want = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    short = compress_inputs(model, METHODS[name], batch)
    got = model.generate(**short, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(got[:, -5:], want[:, -5:])
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("which", video_families())
def test_a_question_about_a_clip_is_answered(which: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, processor = _clip_model(which, tmp_path_factory)
    batch = encode(processor, ask("What is shown?", video(1, size=(90, 62))), ask("Is the answer on the left?",
                                                                                 video(2, size=(90, 62))))  # fmt: skip
    assert "pixel_values_videos" in batch
    assert bool((visual_mask(model, batch).sum(-1) > 0).all())
    assert_masked_answer(model, METHODS[name], batch)


_CLIP_MODELS: dict[str, tuple[Any, Any]] = {}


def _clip_model(family: str, factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    if family not in _CLIP_MODELS:
        folder = write_checkpoint(family, factory.mktemp(f"{family}-clips"))
        model = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
        _CLIP_MODELS[family] = model, tf.AutoProcessor.from_pretrained(folder)
    return _CLIP_MODELS[family]


def test_a_picture_beside_a_question_without_one(loaded: tuple[Any, Any], files: list[Path]) -> None:
    model, processor = loaded
    batch = encode(processor, ask("What is shown in the image?", files[0]), ask("How are you?"))
    for method in (DivPrune(keep=0.3), FastV(keep=0.3), UniformGrid(keep=3)):
        assert_masked_answer(model, method, batch)
