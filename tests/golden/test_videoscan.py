"""VideoScan against its official code: a stream on a model with LLaVA-Video's layout and the case's language model.

The tower is a stand-in that gives the case's features, so pooling, newlines, carriers, positions, the cache and the
bank are the library's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, SiglipVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mmtoken
from mmtoken import Stream
from mmtoken.compressors import Context, VideoScan
from mmtoken.compressors.videoscan import duplicate
from mmtoken.models.llava_video import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from mmtoken.streaming.view import View
from tests.golden.case import GoldenCase

METHOD = "videoscan"


@pytest.mark.golden
def test_videoscan_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


class Given(nn.Module):
    """A tower whose pixels are the number of a frame, and whose features are given."""

    def __init__(self, tower: nn.Module, features: Tensor) -> None:
        super().__init__()
        self.encoder, self.config = tower.encoder, tower.config  # type: ignore[attr-defined]
        self.features = features

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        features = self.features[pixel_values[:, 0, 0, 0].long()]
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))


class Words:
    """A processor that reads token ids, and whose pixels are the number of a frame."""

    video_token, image_token, chat_template = "<video>", "<image>", "see apply_chat_template"

    def __init__(self, before: Tensor, side: int) -> None:
        self.before, self.side = " ".join(map(str, before.tolist())), side
        self.tokenizer, self.video_processor = self._words, self._pixels

    def _words(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
        return f"{self.before} <video> {conversation[0]['content'][1]['text']}"

    def _pixels(self, videos: list[Tensor], **kwargs: Any) -> dict[str, Tensor]:
        number = videos[0][:, :, :1, :1].float()
        return {"pixel_values_videos": number.expand(-1, -1, self.side, self.side)[None]}


def parts(case: GoldenCase) -> tuple[LlavaVideoForConditionalGeneration, Words]:
    """The model and its processor."""
    settings, side = case.settings, case.settings["grid_side"]
    weights = {name.removeprefix("lm."): case.take(name) for name in case.tensors if name.startswith("lm.")}
    text = Qwen2Config(
        hidden_size=settings["width"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        num_hidden_layers=settings["layers"],
        intermediate_size=settings["intermediate"],
        vocab_size=settings["vocab"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        rms_norm_eps=settings["rms_norm_eps"],
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=side, patch_size=1
    )
    model = LlavaVideoForConditionalGeneration(
        LlavaVideoConfig(
            text_config=text,
            vision_config=vision,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            mm_spatial_pool_mode=settings["pool_mode"],
            tie_word_embeddings=text.tie_word_embeddings,
        )
    ).eval()
    lacking, unknown = model.model.language_model.load_state_dict(
        {name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"}
    )
    assert not lacking and not unknown
    if "lm_head.weight" in weights:
        model.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    model.model.image_newline.data = case.take("newline")
    model.model.vision_tower = Given(model.model.vision_tower, case.take("features"))
    model.model.multi_modal_projector = nn.Identity()
    return model, Words(case.take("sys_ids"), side)


@dataclass(frozen=True)
class LastStays(VideoScan):
    """In the official stream the cache lets nothing go at the last frame."""

    last: int = 0

    def evict(self, held: Any, over: bool, ctx: Context) -> int | None:
        return None if held[-1].number == self.last else super().evict(held, over, ctx)


@contextmanager
def entering(model: LlavaVideoForConditionalGeneration) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(embeddings float[n, D], positions int[n]) of each pass through the decoder's first layer."""
    passes: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cosine, sine = (table[0] for table in kwargs["position_embeddings"])
        half = cosine.shape[-1] // 2
        rate = model.model.language_model.rotary_emb.inv_freq[-1]  # the slowest one turns less than once
        angle = torch.atan2(sine[:, half - 1], cosine[:, half - 1]) / rate
        passes.append((args[0] if args else kwargs["hidden_states"], angle.round().long()))

    handle = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    yield passes
    handle.remove()


def cached(live: Stream) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values float[layers, G, n, d] that a question now would see."""
    memory, passes = live._memory, live._passes
    rows = live._framing.text(live._framing.embed([0]))
    view = View(memory, passes, memory.everything(), memory.cursor, text=rows)
    seen = [view(layer, rows.embeddings[None]) for layer in range(len(passes.layers))]
    return tuple(torch.stack([getattr(one, name)[0] for one in seen]) for name in ("keys", "values"))  # type: ignore[return-value]


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Every step of the official stream.

    It feeds a query behind every frame; nothing that is held can depend on it, so this library does not. Where the code
    holds raw rows, too, it never evicts. At the last frame the list of carriers is evicted but the cache is not; the
    flags of surviving frames go with the cache.
    """
    settings = case.settings
    model, processor = parts(case)
    query_ids, extra, frames = case.take("query_ids"), settings["extra_kv"], settings["frames"]
    question = " ".join(map(str, query_ids.tolist()))
    query = model.get_input_embeddings()(query_ids)
    method = LastStays(
        bank=None if extra else settings["memory_limit"],
        extra_kv=extra,
        kv_select_layer=settings["kv_select_layer"],
        carrier="block",
        last=frames - 1,
    )
    alive: list[int] = []
    with (
        entering(model) as passes,
        mmtoken.stream(model, processor, method, memory_tokens=10**6, positions="repo") as live,
    ):
        for number in range(frames):
            live.push(np.full((1, 1, 3), number, dtype=np.uint8), number)
            fed = torch.cat([embeddings.flatten(0, -2) for embeddings, _ in passes])
            positions = torch.cat([at for _, at in passes])
            assert len(passes) == (1 if number else 2)
            passes.clear()

            alive = [*alive, number]
            held = [step.number for step in live._memory.held]
            (dropped,) = [place for place, one in enumerate(alive) if one not in held] or [-1]
            alive = held
            carriers = torch.stack([step.embedding for step in live._memory.held])
            if number == frames - 1 and method.bank is not None and len(carriers) >= method.bank:
                dropped = duplicate(carriers)
                carriers = torch.cat([carriers[:dropped], carriers[dropped + 1 :]])

            name = f"frame{number}_"
            case.compare(f"{name}block", torch.cat([fed, query]))
            behind = torch.arange(1, len(query) + 1) + positions[-1]
            case.compare(f"{name}position", torch.cat([positions, behind]))
            keys, values = cached(live)
            case.compare(f"{name}cache_keys", keys)
            case.compare(f"{name}cache_values", values)
            case.compare(f"{name}carriers", carriers)
            case.compare(f"{name}dropped", torch.tensor([dropped]))
        next(live.answer(question))
        case.compare("final_query_embeds", passes[0][0].flatten(0, -2))
    case.compare("cache_source_frames", torch.tensor(alive))
    case.compare("surviving_frames_flag", torch.isin(torch.arange(frames), torch.tensor(alive)))
    case.settle()
