"""Checkpoints as the hub has them load, answer and are compressed through the calls a user makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import mmtoken
from mmtoken.cli.main import main
from mmtoken.compressors import DivPrune, FastV
from tests.backbones.processors import conversation, photograph
from tests.backbones.tiny_models import build, inputs
from tests.backbones.upstream import _DTYPES, FORMATS, write_upstream

SIZE = (96, 64)


@pytest.fixture(scope="module", params=FORMATS)
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's own processor refuses to be made without num2words")
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_upstream(family, tmp_path_factory.mktemp(family))


def test_the_folder_is_the_hubs_and_every_tensor_is_read(family: str, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"}
    wanted |= {"tokenizer.json", "special_tokens_map.json", "model.safetensors.index.json"}
    assert wanted | {"chat_template.jinja" if family == "internvl" else "chat_template.json"} <= names
    assert sum(name.startswith("model-0000") for name in names) > 1
    tensors = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    prefixes = {
        "llava": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model."),
        "qwen2_5_vl": ("visual.", "model.layers.", "lm_head."),
        "smolvlm": ("model.vision_model.", "model.connector.", "model.text_model.", "lm_head."),
        "internvl": ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    }[family]
    assert all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)
    model, processor = mmtoken.load(str(folder))
    assert type(processor).__name__ == json.loads((folder / "preprocessor_config.json").read_text())["processor_class"]
    kind = getattr(torch, _DTYPES[family])
    assert model.dtype == kind
    tiny = build(family, layers=3)
    want, got = tiny.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value.to(kind)), name
    tiny.load_state_dict(got)
    model.float()
    # The settings are read, too: angles, norms, which layer the projector reads.
    batch = inputs(tiny, family, "image", "padded_ragged")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, tiny(**batch).logits)


@pytest.mark.parametrize("method", [FastV(keep=1.0, layer=2), DivPrune(keep=1.0)])
def test_everything_kept_gives_the_output_of_transformers_alone(
    family: str, folder: Path, method: mmtoken.compressors.Compressor
) -> None:
    plain = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    alone = tf.AutoProcessor.from_pretrained(folder)
    model, processor = mmtoken.load(str(folder))
    turn = [conversation("What is shown?", photograph(1, SIZE))]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = alone.apply_chat_template(turn, **options).to(plain.dtype)
    mine = processor.apply_chat_template(turn, **options).to(model.dtype)
    assert set(mine) == set(batch) and all(torch.equal(mine[name], batch[name]) for name in batch)
    generation = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = plain.generate(**batch, **generation)
    with mmtoken.compress(model, method) as session:
        got = model.generate(**mine, **generation)
    assert sum(session.report.tokens_in) > 0
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.logits, want.logits, strict=True))


def test_mmtoken_run_answers_like_transformers_alone(
    family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    photograph(2, SIZE).save(picture)
    words = ["run", "--image", str(picture), "--ask", "What is shown?", "--model", str(folder), "--json"]
    words += ["--max-new-tokens", "6"]
    answers = []
    for more in ([], ["--compressor", "divprune", "--keep", "1.0"], ["--compressor", "divprune", "--keep", "0.5"]):
        assert main([*words, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["answer"] == answers[1]["answer"]
    assert sum(answers[2]["report"]["tokens_out"]) < sum(answers[2]["report"]["tokens_in"])
    plain = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    processor = tf.AutoProcessor.from_pretrained(folder)
    batch = processor.apply_chat_template(
        conversation("What is shown?", photograph(2, SIZE)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(plain.dtype)
    out = plain.generate(**batch, max_new_tokens=6, do_sample=False)
    text = processor.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0]["answer"].strip() == text.strip()


def test_frames_of_a_video_are_pictures_to_internvl(tmp_path: Path) -> None:
    model, processor = mmtoken.load(str(write_upstream("internvl", tmp_path / "internvl")))
    frames = torch.stack([torch.from_numpy(np.array(photograph(number, SIZE))).movedim(-1, 0) for number in range(3)])
    turn = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What moves?"}]}]
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    sampled = {"do_sample_frames": False}
    batch = processor(text=text, videos=[frames], videos_kwargs=sampled, return_tensors="pt").to(model.dtype)
    with torch.no_grad():
        want = model(**batch).logits
        with mmtoken.compress(model, FastV(keep=1.0, layer=2)):
            assert torch.equal(model(**batch).logits, want)
        with mmtoken.compress(model, DivPrune(keep=0.25)) as session:
            model(**batch)
    tokens = int((batch["input_ids"] == model.config.image_token_id).sum()) // 3
    assert tokens > 4 and session.report.tokens_in == [tokens] * 3
    assert session.report.tokens_out == [tokens // 4] * 3
