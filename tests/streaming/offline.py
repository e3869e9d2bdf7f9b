"""The same video given to the plain model at once: what a stream is compared with."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtoken.streaming.stream import Stream
from tests.backbones import processors
from tests.backbones.tiny_models import build

FAMILIES = ("llava_onevision", "llava_video", "qwen2_5_vl", "qwen3_vl")

SIZE = (128, 64)
"""(width, height) of frames that every processor resizes alike, in a step as in a video of six frames."""

FPS = 2.0


@functools.cache
def parts(family: str, layers: int = 4, seed: int = 0, attn: str = "sdpa") -> tuple[Any, Any]:
    """A tiny model and its processor."""
    return build(family, layers=layers, seed=seed, attn=attn), _processor(family)


@functools.cache
def _processor(family: str) -> Any:
    return processors.processor(family, Path(tempfile.mkdtemp()))


def clip(frames: int, seed: int = 0) -> np.ndarray:
    """uint8[F, H, W, 3]."""
    return processors.video(seed, frames, SIZE)


def push_all(live: Stream, video: np.ndarray, first: int = 0) -> None:
    """Push frames at `FPS`, as numbers `first`, first + 1, ..."""
    for number, frame in enumerate(video):
        live.push(frame, (first + number) / FPS)


def inputs(processor: Any, video: np.ndarray, question: str) -> dict[str, Any]:
    """What the processor makes of the whole video and a question."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    count = len(video)
    metadata = {"total_num_frames": count, "fps": FPS, "frames_indices": [*range(count)], "duration": count / FPS}
    made = processor(
        text=[text],
        videos=[torch.from_numpy(video)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
        input_data_format="channels_last",
    )
    return {name: value for name, value in made.items() if isinstance(value, Tensor | list)}


def generated(model: Any, made: dict[str, Any], count: int) -> tuple[list[int], Tensor]:
    """(token ids, float[count, V] logits) of the model's own greedy answer."""
    out = model.generate(
        **made, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[0, -count:].tolist(), torch.cat(out.logits).float()


def answered(live: Stream, question: str, count: int) -> tuple[list[int], Tensor]:
    """The same of a stream."""
    made = [pair for pair, _ in zip(live.answer(question), range(count), strict=False)]
    return [token for token, _ in made], torch.stack([logits for _, logits in made])
