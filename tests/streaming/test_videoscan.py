"""VideoScan in streams: one pass under the mask of its second stage, the plainest stream, and a bounded bank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import mmtoken
from mmtoken.compressors import VideoScan
from mmtoken.compressors.videoscan import stage_mask
from mmtoken.tokens import VisualTokens
from tests.compressors.carrier_stream import CarrierStream
from tests.streaming.offline import FAMILIES, answered, clip, generated, inputs, parts, push_all
from tests.streaming.oneshot import Prompt, prompt

QUESTION = "What is shown?"
ONEVISION = ("llava_onevision", "llava_video")


def streamed(family: str, video: np.ndarray, positions: str, **options: object) -> Tensor:
    """float[3, V]: logits of the first words of an answer."""
    model, processor = parts(family)
    method = VideoScan(**options)  # type: ignore[arg-type]
    with mmtoken.stream(model, processor, method, memory_tokens=1000, positions=positions) as live:  # type: ignore[arg-type]
        push_all(live, video)
        return answered(live, QUESTION, 3)[1]


def with_carriers(given: Prompt) -> Tensor:
    """float[L, D]: the prompt with each frame's carrier behind it."""
    blocks = []
    for first, end in given.steps:
        frame = given.embeddings[first:end]
        blocks += [frame, frame.mean(0, keepdim=True)]
    return torch.cat([given.embeddings[: given.start], *blocks, given.embeddings[given.end :]])


@pytest.mark.parametrize("family", ONEVISION)
@torch.no_grad()
def test_the_stream_is_one_pass_under_the_mask_of_the_second_stage(family: str) -> None:
    video = clip(5)
    model, processor = parts(family)
    given = prompt(model, processor, video, QUESTION)
    (first, end), *_ = given.steps
    mask = stage_mask(given.start, 5, end - first + 1, len(given.embeddings) - given.end)
    decoder = model.base_model.language_model
    states = decoder(inputs_embeds=with_carriers(given)[None], attention_mask=mask).last_hidden_state
    want = model.get_output_embeddings()(states[0, -1])
    torch.testing.assert_close(streamed(family, video, "true")[0], want, atol=2e-4, rtol=1e-4)
    for other in ("repo", "contiguous"):
        assert float((streamed(family, video, other)[0] - want).abs().max()) > 1e-3


@pytest.mark.parametrize("positions", ["true", "repo"])
@pytest.mark.parametrize(
    "options",
    [{}, {"extra_kv": 3}, {"extra_kv": 3, "kv_select_layer": 1}, {"bank": 4}, {"without": "embedding"}],
    ids=str,
)
@torch.no_grad()
def test_the_stream_is_the_plainest_one(positions: str, options: dict[str, object]) -> None:
    video = clip(7)
    model, processor = parts("llava_video", attn="eager")
    given = prompt(model, processor, video, QUESTION)
    system = given.embeddings[: given.start]
    grid = model.base_model.apply_pooling(torch.zeros(1, _patches(model), 1)).shape[1]
    side = int(grid**0.5)
    plain = CarrierStream(model.base_model.language_model, VideoScan(**options), system, positions)  # type: ignore[arg-type]
    for first, end in given.steps:
        protected = torch.arange(end - first) % (side + 1) == side
        frame = VisualTokens.from_features(
            given.embeddings[None, first:end], protected=protected[None], grid=((1, side, side),)
        )
        plain.push(frame)
    want = model.get_output_embeddings()(plain.ask(given.embeddings[given.end :])[-1])
    got = streamed("llava_video", video, positions, **options)[0]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def _patches(model: object) -> int:
    vision = model.config.vision_config  # type: ignore[attr-defined]
    return (vision.image_size // vision.patch_size) ** 2


@pytest.mark.parametrize("family", ONEVISION)
@torch.no_grad()
def test_without_keys_and_values_the_stream_is_generate(family: str) -> None:
    model, processor = parts(family)
    video = clip(4)
    with mmtoken.compress(model, VideoScan()) as session:
        _, want = generated(model, inputs(processor, video, QUESTION), 3)
        assert [len(kept) for kept in session.report.kept] == [4]
    for positions in ("true", "contiguous"):
        got = streamed(family, video, positions, without="kv")
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_bank_takes_the_same_memory_from_then_on(family: str, extra: int) -> None:
    model, processor = parts(family)
    frames = model.config.model_type.startswith("qwen") + 1  # of a step
    bank, video = 4, clip(10 * frames)
    tokens, size = [], []
    with mmtoken.stream(model, processor, VideoScan(bank=bank, extra_kv=extra)) as live:
        for number, frame in enumerate(video):
            live.push(frame, number / 2)
            tokens.append(live.report.kv_tokens)
            size.append(live.report.kv_bytes)
        numbers = [step.number for step in live._memory.held]
        assert live.memory_tokens == bank * (1 + extra)
        assert isinstance(live.ask(QUESTION, 2), str)
    assert tokens[frames - 1 :: frames] == [(1 + extra) * min(n, bank - 1) for n in range(1, 11)]
    assert numbers == sorted(numbers) and numbers[-1] == 9
    config = model.config.text_config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    steady = size[bank * frames - 1 :]
    assert set(steady) == {steady[0]}
    assert steady[0] - size[frames - 1] == row * (1 + extra) * (bank - 2)


def test_a_stream_holds_the_bank_where_nobody_says_how_much() -> None:
    model, processor = parts("llava_onevision")
    for bank, limit in ((40, 40), (None, 32)):
        with mmtoken.stream(model, processor, VideoScan(bank=bank)) as live:
            push_all(live, clip(1))
            assert live.memory_tokens == limit
