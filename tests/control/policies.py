"""A random policy: the classes of OpenVLA at a size that takes milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig

from mmtoken import Policy
from mmtoken.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticImageProcessor, PrismaticProcessor
from tests.backbones.openvla_checkpoint import ARGS, IMAGE_SIZE, MEANS, NORM_STATS, PAD, PATCH, STDS, TOWERS, VOCAB
from tests.backbones.processors import llama_tokenizer

ACTION = 3
"""Numbers of an action."""
SPACE = 5
"""The token that prompts must end with; any will do."""


def model(seed: int = 0, **config: Any) -> OpenVLAForActionPrediction:
    """A random model that always answers with action tokens."""
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCAB + 64,
        pad_token_id=VOCAB, eos_token_id=None,
    )  # fmt: skip
    args = [{**arg, "img_size": IMAGE_SIZE, "patch_size": PATCH} for arg in ARGS]
    made = OpenVLAConfig(
        **{
            "timm_model_ids": TOWERS, "timm_model_args": args, "image_sizes": [IMAGE_SIZE] * 2, "text_config": text,
            "pad_token_id": VOCAB, "space_token_id": SPACE, "norm_stats": NORM_STATS,
        }
        | config
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = OpenVLAForActionPrediction(made).eval()
        # Wide weights, so that attention prefers some tokens; other answers than actions have logits of 0.
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.3)
    network.language_model.lm_head.weight.data[: VOCAB - 256] = 0
    network.language_model.lm_head.weight.data[VOCAB:] = 0
    return network


def processor(network: OpenVLAForActionPrediction) -> PrismaticProcessor:
    return PrismaticProcessor(
        PrismaticImageProcessor(
            use_fused_vision_backbone=True, image_resize_strategy="resize-naive",
            input_sizes=[(3, IMAGE_SIZE, IMAGE_SIZE)] * 2, means=MEANS, stds=STDS,
        ),
        llama_tokenizer([PAD]),
        num_image_tokens=network.vision_backbone.patches,
        image_token_id=VOCAB + 1,
        space_token_id=SPACE,
    )  # fmt: skip


def policy(seed: int = 0, unnorm_key: str | None = "toy_arm", **config: Any) -> Policy:
    network = model(seed, **config)
    return Policy(network, processor(network), unnorm_key=unnorm_key)


def camera(seed: int, count: int, size: int = 40) -> list[NDArray[np.uint8]]:
    """Pictures that an arm could see one after the other."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
