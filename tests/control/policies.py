"""A random policy: the classes of OpenVLA at a size that takes milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mmtoken import Policy
from mmtoken.models.openvla import (
    OpenVLAChunksConfig,
    OpenVLAConfig,
    OpenVLAForActionChunks,
    OpenVLAForActionPrediction,
    PrismaticImageProcessor,
    PrismaticProcessor,
)

ACTION = 3
"""Numbers of an action."""
WORDS = ["<unk>", "<s>", "_", "pick", "up", "put", "down", "cup", "it", "to", "the"]
SPACE = WORDS.index("_")
"""The token that prompts must end with."""
VOCAB = len(WORDS) + 256
SIDE = 56
NORM_STATS: dict[str, Any] = {
    "toy_arm": {"action": {"q01": [-0.5, -2.0, 0.0], "q99": [0.5, 4.0, 1.0], "mask": [True, True, False]}},
    "other_arm": {"action": {"q01": [0.0, 0.0, 0.0, 0.0], "q99": [1.0, 1.0, 1.0, 2.0]}},
}


def model(seed: int = 0, steps: int = 1, **config: Any) -> OpenVLAForActionPrediction:
    """A random model that always answers with action tokens; of several `steps`: the policy that predicts chunks."""
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCAB + 64,
        pad_token_id=VOCAB, eos_token_id=None,
    )  # fmt: skip
    sizes = {"mlp_ratio": 2.0}
    chunks: dict[str, Any] = {} if steps == 1 else {"action_steps": steps, "action_dim": ACTION}
    made = (OpenVLAConfig if steps == 1 else OpenVLAChunksConfig)(
        **{
            "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
            "timm_model_args": [
                {"embed_dim": 32, "depth": 4, "num_heads": 4, **sizes},
                {"embed_dim": 24, "depth": 3, "num_heads": 2, **sizes},
            ],
            "image_sizes": [SIDE] * 2, "text_config": text, "pad_token_id": VOCAB, "space_token_id": SPACE,
            "norm_stats": NORM_STATS,
        }
        | chunks
        | config
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = (OpenVLAForActionPrediction if steps == 1 else OpenVLAForActionChunks)(made).eval()
        # Wide weights, so that attention prefers some tokens; other answers than actions have logits of 0.
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.3)
    network.language_model.lm_head.weight.data[: VOCAB - 256] = 0
    network.language_model.lm_head.weight.data[VOCAB:] = 0
    return network


def tokenizer() -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel({**ids, "<PAD>": VOCAB}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", pad_token="<PAD>")


def processor(network: OpenVLAForActionPrediction) -> PrismaticProcessor:
    return PrismaticProcessor(
        PrismaticImageProcessor(
            use_fused_vision_backbone=True, image_resize_strategy="resize-naive",
            input_sizes=[(3, SIDE, SIDE)] * 2,
        ),
        tokenizer(),
        num_image_tokens=network.vision_backbone.patches,
        image_token_id=VOCAB + 1,
        space_token_id=SPACE,
        action_queries=getattr(network.config, "action_queries", 0),
        action_token_id=VOCAB + 2,
    )  # fmt: skip


def policy(seed: int = 0, unnorm_key: str | None = "toy_arm", steps: int = 1, **config: Any) -> Policy:
    network = model(seed, steps, **config)
    return Policy(network, processor(network), unnorm_key=unnorm_key)


def camera(seed: int, count: int, size: int = 40) -> list[NDArray[np.uint8]]:
    """Pictures that an arm could see one after the other."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
