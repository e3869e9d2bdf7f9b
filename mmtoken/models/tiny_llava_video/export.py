"""From a training checkpoint to a folder that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from mmtoken.models.tiny_llava.network import NetworkConfig
from mmtoken.models.tiny_llava.processor import BOS_ID, EOS_ID, PAD_ID
from mmtoken.models.tiny_llava_video.network import build_network
from mmtoken.models.tiny_llava_video.processor import build_processor
from mmtoken.models.tiny_llava_video.videoscan import plain_weights
from mmtoken.training.export import export_network

MAX_NEW_TOKENS = 4
"""Answers are a word or two digits, and `<eos>`."""


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    config: NetworkConfig | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write network and processor of a checkpoint to `folder`, see `export_network`.

    The checkpoint is one of `TinyLlavaVideo`, or of a stage of VideoScan's training, whose adapters are worked in.

    Raises:
        CheckpointError: no checkpoint of this network at that path.
    """
    network = build_network(config)
    network.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    processor = build_processor()
    return export_network(
        network, processor, checkpoint, folder, name="TinyLlavaVideo", dtype=dtype, read=plain_weights
    )
