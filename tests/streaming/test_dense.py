"""A stream that holds everything is the plain model on the whole video."""

from __future__ import annotations

import pytest
import torch

import mmtoken
from tests.streaming.offline import FAMILIES, answered, clip, generated, inputs, parts, push_all


@pytest.mark.parametrize("frames", [6, 5, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_stream_is_generate_on_the_whole_video(family: str, frames: int) -> None:
    if family == "qwen3_vl" and frames == 1:
        frames = 2  # its processor takes no video of one frame
    model, processor = parts(family)
    video = clip(frames)
    with torch.no_grad():
        expected, logits = generated(model, inputs(processor, video, "What is shown?"), 6)
    with mmtoken.stream(model, processor, positions="true", memory_tokens=10_000) as live:
        push_all(live, video)
        tokens, found = answered(live, "What is shown?", 6)
    assert tokens == expected
    torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-4)
