"""What a stream refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmtoken
from mmtoken import compressors as shelf
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from tests.backbones.tiny_models import build
from tests.streaming.methods import Loudest, Thins
from tests.streaming.offline import clip, parts

FRAME = clip(1)[0]

FRAMES: list[tuple[Any, str]] = [
    (FRAME.tolist(), r"frame is a list; give uint8\[H, W, 3\]"),
    (Image.fromarray(FRAME), "frame is a Image; .*asarray"),
    (None, "frame is a NoneType"),
    (FRAME.astype(np.float32), "frame has dtype float32; give uint8"),
    (torch.from_numpy(FRAME).float(), r"frame has dtype torch.float32; give uint8"),
    (FRAME.astype(np.int8), "frame has dtype int8"),
    (FRAME[..., 0], r"frame has shape \(64, 128\); give \(height, width, 3\)"),
    (FRAME.transpose(2, 0, 1), r"frame has shape \(3, 64, 128\); give \(height, width, 3\)"),
    (np.zeros((4, 4, 4), np.uint8), r"frame has shape \(4, 4, 4\)"),
    (FRAME[None], r"frame has shape \(1, 64, 128, 3\)"),
    (FRAME[:0], "has no pixels"),
    (FRAME[:, :-1], r"frame has shape \(64, 127, 3\), but the frames before have \(64, 128, 3\).*resize.*reset"),
]

TIMES: list[tuple[Any, str]] = [
    (float("nan"), "t=nan is not finite"),
    (float("inf"), "t=inf is not finite"),
    (1.0, r"t=1.0 is not later than the frame before \(t=1.0\).*reset"),
    (0.5, "t=0.5 is not later"),
    ("2", "t='2' is a str; give the frame's time in seconds"),
    (None, "t=None is a NoneType"),
    (True, "t=True is a bool"),
]


@pytest.mark.parametrize(("frame", "message"), FRAMES)
def test_frames(frame: Any, message: str) -> None:
    with mmtoken.stream(*parts("llava_onevision")) as live:
        live.push(FRAME, 1.0)
        with pytest.raises(InputError, match=message):
            live.push(frame, 2.0)
        live.push(FRAME, 2.0)
        assert live.report.frames_seen == 2


@pytest.mark.parametrize(("t", "message"), TIMES)
def test_times(t: Any, message: str) -> None:
    with mmtoken.stream(*parts("llava_onevision")) as live:
        live.push(FRAME, 1.0)
        with pytest.raises(InputError, match=message):
            live.push(FRAME, t)
        live.push(FRAME, np.float32(1.5))  # type: ignore[arg-type]
        assert live.report.frames_seen == 2


def test_a_size_that_the_processor_refuses_is_refused_with_the_first_frame() -> None:
    with mmtoken.stream(*parts("qwen2_5_vl")) as live:
        with pytest.raises(InputError, match=r"frame of shape \(1, 300, 3\) cannot be processed: .*give another size"):
            live.push(np.zeros((1, 300, 3), np.uint8), 0.0)
        live.push(FRAME, 0.0)
        live.push(FRAME, 1.0)
        assert live.report.frames_held == 2


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "question='' is no text"),
        ("  ", "is no text"),
        (None, "question=None is no text"),
        ("Is <video> red?", "holds the placeholder '<video>'"),
        ("Is <image> red?", "holds the placeholder '<image>'"),
    ],
)
def test_questions(question: Any, message: str) -> None:
    with mmtoken.stream(*parts("llava_onevision")) as live:
        live.push(FRAME, 0.0)
        with pytest.raises(InputError, match=message):
            live.ask(question)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, None])
def test_lengths_of_answers(count: Any) -> None:
    with mmtoken.stream(*parts("llava_onevision")) as live:
        live.push(FRAME, 0.0)
        with pytest.raises(MMTokenError, match="max_new_tokens="):
            live.ask("What?", max_new_tokens=count)


def test_a_question_needs_a_frame() -> None:
    with mmtoken.stream(*parts("llava_onevision")) as live, pytest.raises(InputError, match="no frame has come yet"):
        live.ask("What?")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (shelf.FastV(keep=0.5), r"FastV looks at later frames \(causal=False\)"),
        (shelf.CDPruner(keep=0.5), "CDPruner looks at later frames"),
        (shelf.QueCC(keep=0.25), r"QueCC reads the question \(query_agnostic=False\)"),
        (shelf.Knorm(keep=0.5), "Knorm acts at cache: .*retain and evict"),
        (shelf.ToMe(keep=0.5), None),
        (shelf.Sequential([Loudest(), shelf.ReKV()]), None),
        (shelf.Sequential([Loudest(), shelf.FastV()]), "FastV looks at later frames"),
        (shelf.Sequential([shelf.ToMe(), Loudest()], calibrate=True), "calibrate=True"),
    ],
)
def test_compressors(method: Any, message: str | None) -> None:
    model, processor = parts("llava_onevision")
    if message is None:
        with mmtoken.stream(model, processor, method) as live:
            live.push(FRAME, 0.0)
            assert isinstance(live.ask("What?", 1), str)
        return
    with pytest.raises(UnsupportedError, match=message):
        mmtoken.stream(model, processor, method)
    assert mmtoken.attached(model) is None


def test_methods_of_streams_alone_are_not_for_generate() -> None:
    with pytest.raises(UnsupportedError, match=r"ReKV acts in streams only; use mmtoken.stream\("):
        mmtoken.attach(parts("llava_onevision")[0], shelf.ReKV())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_tokens": 0}, "memory_tokens=0 is too small"),
        ({"memory_tokens": 1.5}, "memory_tokens=1.5 is a float"),
        ({"memory_tokens": True}, "memory_tokens=True is a bool"),
        ({"store_tokens": 0}, "store_tokens=0 is too small"),
        ({"positions": "keep"}, "positions='keep' is unknown; use 'contiguous', 'true' or 'repo'"),
        ({"positions": None}, "positions=None is unknown"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MMTokenError, match=message):
        mmtoken.stream(*parts("llava_onevision"), **settings)


def test_models_and_processors() -> None:
    model, processor = parts("llava_onevision")
    with pytest.raises(UnsupportedError, match="model_type='llava' has no streams; those that have: llava_onevision"):
        mmtoken.stream(build("llava"), processor)
    with pytest.raises(UnsupportedError, match=r"processor is a .*without a tokenizer and a video token"):
        mmtoken.stream(model, processor.tokenizer)
    with mmtoken.compress(model, shelf.ToMe()), pytest.raises(MMTokenError, match="already has a compressor attached"):
        mmtoken.stream(model, processor)
    live = mmtoken.stream(model, processor, shelf.ToMe())
    with live, pytest.raises(MMTokenError, match="already has a compressor attached"):
        mmtoken.stream(model, processor, shelf.ToMe())
    assert mmtoken.attached(model) is None


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_closing_takes_every_hook_away() -> None:
    model, processor = parts("llava_onevision")
    # transformers itself sets hooks on a tower when it is first asked for hidden states
    with mmtoken.stream(model, processor) as first:
        first.push(FRAME, 0.0)
    before, members = hooks(model), set(model.model.__dict__)
    live = mmtoken.stream(model, processor, shelf.Sequential([Loudest(), Thins()]))
    live.push(FRAME, 0.0)
    assert hooks(model) > before
    live.close()
    live.close()
    assert hooks(model) == before and set(model.model.__dict__) == members and mmtoken.attached(model) is None
    for use in (lambda: live.push(FRAME, 1.0), lambda: live.ask("What?")):
        with pytest.raises(MMTokenError, match="the stream is closed"):
            use()


def test_a_stream_leaves_generate_of_the_model_alone() -> None:
    from tests.streaming.offline import generated, inputs

    model, processor = parts("llava_onevision")
    made = inputs(processor, clip(3), "What?")
    expected = generated(model, made, 3)[1]
    with mmtoken.stream(model, processor) as live:
        live.push(FRAME, 0.0)
        assert torch.equal(generated(model, made, 3)[1], expected)


def test_rotary_embeddings_that_move_with_the_length() -> None:
    model, processor = build("llava_onevision"), parts("llava_onevision")[1]
    model.model.language_model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(UnsupportedError, match="rope_type='dynamic' changes with the length"):
        mmtoken.stream(model, processor)


def test_rotary_embeddings_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    def other(q: Any, k: Any, cos: Any, sin: Any, **more: Any) -> Any:
        return q * cos[:, None], k.flip(-1) * sin[:, None]

    before = hooks(parts("llava_onevision")[0])
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", other)
    with pytest.raises(UnsupportedError, match="applies a rotary embedding of another form"):
        mmtoken.stream(*parts("llava_onevision"))
    assert hooks(parts("llava_onevision")[0]) == before
