"""Scorers of frames: real tiny models against one forward per frame by hand, and the ways to name a scorer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmtoken.compressors.framequestion import TextPlanner, frame_question
from mmtoken.compressors.framescorer import (
    CLIP,
    SCORERS,
    VLM,
    Clip,
    FrameScorer,
    GivenScores,
    RandomScores,
    Uniform,
    resolve_scorer,
)
from mmtoken.errors import InputError, MMTokenError, UnknownNameError
from tests.backbones.processors import conversation, video, write_checkpoint


def clip(frames: int = 3, **more: Any) -> Clip:
    size = more.pop("size", (56, 56))
    pixels = torch.from_numpy(video(1, frames, size))
    return Clip(frames, pixels=pixels, question="Where is the cat?", **more)


# ------------------------------------------------------------------------------------------------------------- the VLM


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_vlm_gives_the_probability_of_yes_over_its_whole_vocabulary(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path, layers=2)
    model = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = tf.AutoProcessor.from_pretrained(folder)
    shown = clip(entities=("cat", "mat"))
    want = []
    for picture in shown.pixels:
        text = frame_question("", ("cat", "mat"))
        turn = conversation(text, Image.fromarray(picture.numpy()))
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[Image.fromarray(picture.numpy())], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].double()
        letter = processor.tokenizer.convert_tokens_to_ids("A")
        want.append(float(logits.softmax(-1)[letter]))
    for batch in (1, 2, 64):
        got = VLM(model, processor, batch=batch).score(shown)
        assert got.tolist() == pytest.approx(want, rel=1e-4)
    assert len(set(want)) == 3
    # Asked without entities it is another question, with another answer.
    other = VLM(model, processor).score(dataclasses.replace(shown, entities=()))
    assert not torch.allclose(other, got)


def test_a_vlm_by_name_is_loaded_when_it_is_needed(tmp_path: Path) -> None:
    folder = write_checkpoint("llava", tmp_path, layers=1)
    scorer = VLM(str(folder))
    model = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    live = VLM(model, tf.AutoProcessor.from_pretrained(folder))
    assert scorer.score(clip()).tolist() == pytest.approx(live.score(clip()).tolist(), rel=1e-5)
    assert scorer.settings() == {"name": "vlm", "model": str(folder)}


def test_models_by_name_are_not_read_from_pickles(tmp_path: Path) -> None:
    folder = write_checkpoint("llava", tmp_path, layers=1)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    tf.AutoModelForImageTextToText.from_pretrained(folder)  # transformers alone does
    for scorer in (VLM(str(folder)), CLIP(str(folder))):
        with pytest.raises(OSError, match="safetensors"):
            scorer.score(clip())
    tf.LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "text")
    torch.save({}, tmp_path / "text" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TextPlanner.load(str(tmp_path / "text"))


class Padded:
    """A processor whose batches are padded on the right, and a model whose logits are the ids themselves."""

    tokenizer = staticmethod(lambda text, add_special_tokens: {"input_ids": [9, 2]})
    image_token = "<img>"
    device, dtype = "cpu", torch.float32

    def __call__(self, text: Any = None, images: Any = None, **options: Any) -> Any:
        assert len(text) == len(images) and text[0].startswith("<img>\n")
        lengths = [int(picture[0][0, 0, 0]) for picture in images]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {"input_ids": mask * (1 + torch.arange(max(lengths))), "attention_mask": mask.long()}


def test_the_answer_is_read_at_the_last_real_position() -> None:
    def forward(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=input_ids[..., None] * torch.tensor([0.0, 0.0, 1.0]))

    model = type("Model", (), {"device": "cpu", "dtype": torch.float32, "__call__": lambda self, **k: forward(**k)})()
    pixels = torch.tensor([2, 5, 3], dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3)
    got = VLM(model, Padded()).score(Clip(3, pixels=pixels, question="?"))
    # Vocabulary of three; the last id of "A" is 2, whose logit is the position.
    assert got.tolist() == pytest.approx([math.exp(n) / (2 + math.exp(n)) for n in (2, 5, 3)])


def test_a_letter_without_a_token_is_refused() -> None:
    processor = SimpleNamespace(tokenizer=lambda text, add_special_tokens: {"input_ids": []})
    with pytest.raises(MMTokenError, match="letter='é'"):
        VLM(object(), processor, letter="é").score(clip())


# ---------------------------------------------------------------------------------------------------------------- CLIP


def hugging_face_clip() -> tuple[Any, Any]:
    text = tf.CLIPTextConfig(
        vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14,
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    config = tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = tf.CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)

    class Processor:
        texts: list[str] = []  # noqa: RUF012

        def __call__(self, text: Any = None, images: Any = None, **options: Any) -> Any:
            if text is not None:
                self.texts += text
                ids = [1, *(ord(c) for c in text[0][:20]), 2]
                return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            return {"pixel_values": torch.stack([torch.from_numpy(i).permute(2, 0, 1) / 255 - 0.5 for i in images])}

    return model, Processor()


def test_clip_gives_half_of_one_plus_the_cosine() -> None:
    model, processor = hugging_face_clip()
    shown = clip()
    ids = torch.tensor([[1, *(ord(c) for c in "Where is the cat?"), 2]])
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=shown.pixels.permute(0, 3, 1, 2) / 255 - 0.5)
    want = (1 + output.image_embeds @ output.text_embeds[0]) / 2  # both of length 1
    for batch in (1, 2, 64):
        got = CLIP(model, processor, batch=batch).score(shown)
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)
    assert bool(((got >= 0) & (got <= 1)).all()) and len(set(got.tolist())) == 3
    processor.texts.clear()
    CLIP(model, processor, batch=1).score(dataclasses.replace(shown, entities=("cat", "mat")))
    assert processor.texts == ["cat, mat"]  # once, not per batch


def test_open_clip_models_are_called_by_their_own_names() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def encode_image(self, pixels: Tensor) -> Tensor:
            return torch.stack([pixels.mean((1, 2, 3)), torch.ones(len(pixels))], 1)

        def encode_text(self, ids: Tensor) -> Tensor:
            return ids.float()

    def transform(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255

    shown = clip()
    got = CLIP(Model(), transform, lambda texts: torch.tensor([[3, 4]])).score(shown)
    mean = shown.pixels.double().mean((1, 2, 3)) / 255
    want = (1 + (3 * mean + 4) / (5 * (mean**2 + 1).sqrt())) / 2
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- controls


def test_random_scores_depend_on_the_pixels_and_the_seed_alone() -> None:
    first = RandomScores().score(Clip(5, seed=7))
    assert torch.equal(first, RandomScores().score(Clip(5, number=3, seed=7)))
    assert not torch.equal(first, RandomScores().score(Clip(5, seed=8)))
    assert not torch.equal(first, RandomScores(1).score(Clip(5, seed=7)))
    assert bool(((first >= 0) & (first < 1)).all())
    assert Uniform().score(Clip(3)).tolist() == [1, 1, 1]


def test_given_scores_are_those_of_the_frames_that_are_left() -> None:
    assert GivenScores([0.1, 0.2]).score(Clip(2)).tolist() == [0.1, 0.2]
    per_video = GivenScores([[0.1, 0.2], [0.3, 0.4, 0.5]])
    assert per_video.score(Clip(3, number=1)).tolist() == [0.3, 0.4, 0.5]
    assert per_video.score(Clip(2, number=1, total=3, kept=(0, 2))).tolist() == [0.3, 0.5]
    with pytest.raises(InputError, match="scores has 2 lists but there is a video 2"):
        per_video.score(Clip(2, number=2))
    with pytest.raises(InputError, match="scores has 2 numbers but video 0 has 3 frames"):
        per_video.score(Clip(3))
    for bad in ("0.5", [], 3, [True], [math.nan], [-1.0], [[0.1], [math.inf]], [[0.1], 0.2]):
        with pytest.raises(MMTokenError, match="scores="):
            GivenScores(bad)
    assert GivenScores(torch.tensor([0.5, 0.25])) == GivenScores((0.5, 0.25))


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "scorer",
    [
        Uniform(),
        RandomScores(),
        RandomScores(4),
        GivenScores([0.25, 0.5]),
        GivenScores([[0.25], [0.5]]),
        VLM(),
        VLM("some/model", batch=8, letter="B"),
        CLIP("some/clip"),
    ],
)
def test_scorers_survive_json(scorer: FrameScorer) -> None:
    data = json.loads(json.dumps(scorer.settings()))
    assert resolve_scorer(data) == scorer and hash(resolve_scorer(data)) == hash(scorer)


def test_live_models_cannot_be_saved_and_say_what_to_do() -> None:
    model, processor = hugging_face_clip()
    for scorer, field in ((CLIP(model, processor), "model"), (CLIP("some/clip", processor), "processor")):
        with pytest.raises(MMTokenError, match=rf"scorer\.{field}=.*live object.*name or folder"):
            scorer.settings()

    @dataclasses.dataclass(frozen=True)
    class Mine(FrameScorer):
        def score(self, clip: Clip) -> Tensor:
            return torch.ones(clip.frames)

    assert resolve_scorer(Mine()) == Mine()
    with pytest.raises(MMTokenError, match="scorer=Mine is not one of vlm, clip"):
        Mine().settings()


def test_what_names_no_scorer_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"scorer='vml' is unknown; did you mean 'vlm'"):
        resolve_scorer("vml")
    with pytest.raises(MMTokenError, match="sede=3 is no setting of scorer 'random'; did you mean 'seed'"):
        resolve_scorer({"name": "random", "sede": 3})
    with pytest.raises(MMTokenError, match="scores is missing"):
        resolve_scorer("given")
    for spec in (None, 3, {}, {"name": 3}, ["random"]):
        with pytest.raises(MMTokenError, match="scorer="):
            resolve_scorer(spec)
    for make in (lambda: VLM(object()), lambda: CLIP(object())):
        with pytest.raises(MMTokenError, match="processor=None"):
            make()
    with pytest.raises(MMTokenError, match="tokenizer=None: an open_clip model"):
        CLIP(object(), object())
    for batch in (0, True, 2.0):
        with pytest.raises(MMTokenError, match="batch="):
            VLM(batch=batch)
    with pytest.raises(MMTokenError, match="seed="):
        RandomScores(-1)
    assert all(resolve_scorer(name) == kind() for name, kind in SCORERS.items() if name != "given")
