"""VideoScan in a stream is the plainest stream of it: a decoder with its own cache, cut after each frame."""

from __future__ import annotations

import pytest
import torch

import mmtoken
from mmtoken.compressors import VideoScan
from mmtoken.tokens import VisualTokens
from tests.compressors.carrier_stream import CarrierStream
from tests.streaming.offline import answered, clip, parts, push_all


@pytest.mark.parametrize("method", [VideoScan(bank=4), VideoScan(bank=5, extra_kv=2)])
@pytest.mark.parametrize("positions", ["repo", "true"])
@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_carriers_are_those_of_the_plainest_stream(family: str, positions: str, method: VideoScan) -> None:
    model, processor = parts(family, attn="eager")
    video = clip(8)
    with mmtoken.stream(model, processor, method, positions=positions, memory_tokens=1000) as live:
        push_all(live, video)
        framing = live._framing
        text = framing.question("What is shown?")[0].embeddings
        found = answered(live, "What is shown?", 1)[1][0]
        numbers = [step.number for step in live._memory.held]
        plain = CarrierStream(
            model.model.language_model,
            method,
            framing.prefix().embeddings.detach(),
            positions,  # type: ignore[arg-type]
        )
        with torch.no_grad():
            left = list(range(len(video)))
            dropped = []
            for frame in video:
                call = framing.pixels([torch.from_numpy(frame)])
                layout = framing.backbone.layout("video", call, 1)
                count = layout.counts[0] - framing.tail
                features = model.model.get_video_features(**call, return_dict=True).pooler_output[:, :count]
                tokens = VisualTokens.from_features(
                    features, protected=layout.protected[None, :count], grid=layout.grids
                )
                dropped.append(plain.push(tokens).dropped)
            for step, number in enumerate(dropped):
                if number >= 0:
                    left.remove([n for n in left if n <= step][number])
            expected = model.lm_head(plain.ask(text)[-1]).float()
    assert numbers == left and len(left) == (method.bank or 0) - 1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
