"""STC-Cacher against its official code, through the hooks of a bare tower: all frames at once, and one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmtoken import compress
from mmtoken.compressors import Context, STCCacher
from mmtoken.compressors.stccacher import key_similarity
from mmtoken.engine.reuse import VideoState
from tests.golden.case import GoldenCase

METHOD = "stc_cacher"


@pytest.mark.golden
def test_stc_cacher_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@dataclass(frozen=True)
class Watched(STCCacher):
    """Notes what is chosen in every block, and by which similarities."""

    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list, compare=False)

    def refresh(self, keys: Tensor, reference: Tensor, block: int, ctx: Context) -> Tensor:
        index = super().refresh(keys, reference, block, ctx)
        self.seen.append((block, index, key_similarity(keys, reference)))
        return index


class Given(nn.Module):
    """Hidden states in the place of what is embedded of the pixels: frames from `first` on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.first = 0

    def forward(self, pixels: Tensor, **_: Any) -> Tensor:
        return self.hidden[self.first : self.first + len(pixels)]


def tower(case: GoldenCase, given: Given) -> tuple[nn.Module, Tensor]:
    """A bare tower with the case's blocks behind the given hidden states, and pixels of the right shape."""
    settings = case.settings
    clip = settings["encoder"] == "clip"
    kind, shape = (CLIPVisionModel, CLIPVisionConfig) if clip else (SiglipVisionModel, SiglipVisionConfig)
    config = shape(
        hidden_size=settings["width"],
        num_attention_heads=settings["heads"],
        num_hidden_layers=settings["layers"],
        intermediate_size=settings["mlp_width"],
        hidden_act={"gelu tanh": "gelu_pytorch_tanh", "quick gelu": "quick_gelu"}[settings["activation"]],
        layer_norm_eps=settings["layernorm_eps"],
        image_size=2,
        patch_size=1,
    )
    model = kind(config).eval()
    inner = model._modules.get("vision_model", model)
    inner.embeddings = given
    if clip:
        inner.pre_layrnorm = nn.Identity()
    for number, block in enumerate(inner.encoder.layers):
        names = [name for name in case.tensors if name.startswith(f"layer{number}.")]
        block.load_state_dict({name.split(".", 1)[1]: case.take(name) for name in names})
    patches = settings["tokens"] - int(clip)
    return model, torch.zeros(settings["frames"], 3, 1, patches)


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Which frames are references, what is chosen in every block, and what every block puts out.

    The official CLIP tower takes every second chunk as reference, whatever is set: the schedule of the file says which
    interval its numbers were made with.
    """
    settings, given = case.settings, Given(case.take("hidden_in"))
    frames, layers, tokens = settings["frames"], settings["layers"], settings["tokens"]
    assert case.description["variant"] == "repo"
    intervals = (settings["cache_interval"], *((2,) if settings["encoder"] == "clip" else ()))
    method = Watched(keep=settings["update_ratio"], chunk=settings["frames_per_chunk"])
    assert method.refresh_count(tokens) == settings["tokens_updated"]
    for interval in intervals:
        method = Watched(keep=method.keep, interval=interval, chunk=method.chunk)
        scheduled = torch.tensor([method.references(number) for number in range(frames)])
        if torch.equal(scheduled, case.tensors["is_reference_frame"]):
            break
    case.compare("is_reference_frame", scheduled)
    others = (~scheduled).nonzero()[:, 0]
    model, pixels = tower(case, given)
    blocks = model._modules.get("vision_model", model).encoder.layers
    outputs: list[list[Tensor]] = [[] for _ in range(layers)]
    keys: list[list[Tensor]] = [[] for _ in range(layers)]
    handles = []
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_hook(lambda *call, to=outputs[number]: to.append(call[-1])))
        handles.append(block.self_attn.k_proj.register_forward_hook(lambda *call, to=keys[number]: to.append(call[-1])))
    for step in (frames, 1):
        state = VideoState()
        method.seen.clear()
        for some in (*outputs, *keys):
            some.clear()
        with compress(model, method) as session:
            for given.first in range(0, frames, step):
                with session.continuing(state):
                    model(pixel_values=pixels[given.first : given.first + step])
        assert state.frames == frames
        case.compare("layer_out", torch.stack([torch.cat(some) for some in outputs]))
        case.compare("hidden_out", torch.cat(outputs[-1]))
        chosen = torch.full((frames, layers, settings["tokens_updated"]), -1)
        cosine = torch.zeros(frames, layers, tokens)
        if settings["tokens_updated"] == tokens:  # all patches: nothing to choose
            for layer, some in enumerate(keys):
                whole = torch.cat(some)
                for frame in others.tolist():
                    last = int(scheduled[:frame].nonzero()[-1])
                    chosen[frame, layer] = torch.arange(tokens)
                    cosine[frame, layer] = key_similarity(whole[frame], whole[last])
        for block in range(layers):
            mine = [(index, close) for at, index, close in method.seen if at == block]
            if mine:
                chosen[others, block] = torch.cat([index for index, _ in mine])
                cosine[others, block] = torch.cat([close for _, close in mine])
        case.compare("update_indices", chosen)
        case.compare("key_cosine", cosine)
    for handle in handles:
        handle.remove()
    case.settle()
