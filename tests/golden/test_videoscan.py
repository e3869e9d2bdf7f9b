"""VideoScan against its official code: carriers, positions, what the cache holds after every frame, and who leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmtoken.compressors import VideoScan
from mmtoken.compressors.videoscan import duplicate
from mmtoken.tokens import VisualTokens
from tests.compressors.carrier_stream import CarrierStream
from tests.golden.case import GoldenCase

METHOD = "videoscan"


@pytest.mark.golden
def test_videoscan_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def decoder(case: GoldenCase) -> Qwen2ForCausalLM:
    """The case's language model, with eager attention."""
    weights = {name.removeprefix("lm."): case.take(name) for name in case.tensors if name.startswith("lm.")}
    settings = case.settings
    config = Qwen2Config(
        hidden_size=settings["width"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        num_hidden_layers=settings["layers"],
        intermediate_size=settings["intermediate"],
        vocab_size=settings["vocab"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        rms_norm_eps=settings["rms_norm_eps"],
        tie_word_embeddings="lm.lm_head.weight" not in case.tensors,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    return model


def pooled(features: Tensor, settings: dict[str, int | str]) -> Tensor:
    """float[F, side * side, D] pooled by two: float[F, D, rows, columns]."""
    side, target = int(settings["grid_side"]), int(settings["pooled_side"])
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    if settings["pool_mode"] == "average":
        grid = F.avg_pool2d(grid, 2)
    else:
        grid = F.interpolate(grid, size=(-(-side // 2),) * 2, mode="bilinear")
    assert grid.shape[-1] == target
    return grid


def frame_tokens(grid: Tensor, newline: Tensor) -> VisualTokens:
    """One frame float[D, rows, columns] as a model with LLaVA-Video's layout encodes it: a newline ends every row."""
    rows, columns = grid.shape[1:]
    ends = newline[:, None, None].expand(-1, rows, 1)
    features = torch.cat([grid, ends], -1).flatten(1).T
    protected = (torch.arange(rows * (columns + 1)) % (columns + 1)) == columns
    return VisualTokens.from_features(features[None], protected=protected[None], grid=((1, rows, columns),))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Every step of the official stream.

    Where the code holds raw rows, too, it never evicts. At the last frame the list of carriers is evicted but the cache
    is not; the flags of surviving frames go with the cache.
    """
    settings, model = case.settings, decoder(case)
    embed = model.get_input_embeddings()
    query = embed(case.take("query_ids"))
    extra = settings["extra_kv"]
    method = VideoScan(
        bank=None if extra else settings["memory_limit"],
        extra_kv=extra,
        kv_select_layer=settings["kv_select_layer"],
        carrier="block",
    )
    stream = CarrierStream(model.model, method, embed(case.take("sys_ids")), "repo")
    newline, alive = case.take("newline"), []
    grids = pooled(case.take("features"), settings)
    for number, grid in enumerate(grids):
        last = number == settings["frames"] - 1
        step = stream.push(frame_tokens(grid, newline), query, evict=not last)
        alive.append(number)
        carriers, dropped = torch.stack([frame.embedding for frame in stream.held]), step.dropped
        if dropped >= 0:
            del alive[dropped]
        elif last and method.bank is not None and len(carriers) >= method.bank:
            dropped = duplicate(carriers)
            carriers = torch.cat([carriers[:dropped], carriers[dropped + 1 :]])
        name = f"frame{number}_"
        case.compare(f"{name}block", step.fed)
        case.compare(f"{name}position", step.positions)
        case.compare(f"{name}cache_keys", torch.stack([layer.keys[0] for layer in stream.cache.layers]))
        case.compare(f"{name}cache_values", torch.stack([layer.values[0] for layer in stream.cache.layers]))
        case.compare(f"{name}carriers", carriers)
        case.compare(f"{name}dropped", torch.tensor([dropped]))
    case.compare("final_query_embeds", query)
    case.compare("cache_source_frames", torch.tensor(alive))
    case.compare("surviving_frames_flag", torch.isin(torch.arange(settings["frames"]), torch.tensor(alive)))
    case.settle()
