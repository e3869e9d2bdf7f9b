"""One pass over a whole stream, layer by layer, under a mask in which each step sees what was held when it passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtoken.engine.compat import CACHE
from mmtoken.engine.positions import generation_positions
from tests.streaming.offline import inputs


@dataclass
class Prompt:
    """A whole prompt, ready for the decoder.

    Attributes:
        embeddings: float[L, D].
        positions: int[A, L].
        steps: for each temporal step (first row, end).
        deepstack: per layer float[v, D], at rows `visual`.
        attention: per layer float[H, L, L], noted by `run` with eager attention.
    """

    model: Any
    embeddings: Tensor
    positions: Tensor
    steps: list[tuple[int, int]]
    visual: Tensor
    deepstack: list[Tensor]
    attention: dict[int, Tensor] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """Rows before the video."""
        return self.steps[0][0]

    @property
    def end(self) -> int:
        """The first row of the question."""
        return self.steps[-1][1]


@torch.no_grad()
def prompt(model: Any, processor: Any, video: np.ndarray, question: str) -> Prompt:
    """The prompt of the whole video and a question."""
    made = inputs(processor, video, question)
    ids = made["input_ids"]
    positions = generation_positions(model, made)
    positions = positions[-3:, 0] if positions.ndim == 3 else positions
    names = ("pixel_values_videos", "video_grid_thw")
    output = model.base_model.get_video_features(**{n: made[n] for n in names if n in made}, return_dict=True)
    features = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])
    places = (ids[0] == model.config.video_token_id).nonzero()[:, 0]
    embeddings = model.get_input_embeddings()(ids)[0]
    embeddings[places] = features
    deepstack = [torch.cat([*layer]) for layer in getattr(output, "deepstack_features", None) or []]
    count = len(video) if "video_grid_thw" not in made else int(made["video_grid_thw"][0, 0])
    if deepstack:  # a step begins with its time and ends with its end mark
        ends = [int(run[-1]) + 2 for run in places.tensor_split(count)]
        steps = list(zip([int(places[0]) - len(_time(processor, video)) - 1, *ends[:-1]], ends, strict=True))
    else:
        area = len(places) // count
        steps = [(int(places[0]) + area * n, int(places[0]) + area * (n + 1)) for n in range(count)]
    return Prompt(model, embeddings, positions, steps, places, deepstack)


def _time(processor: Any, video: np.ndarray) -> list[int]:
    ids: list[int] = processor.tokenizer("<0.2 seconds>", add_special_tokens=False)["input_ids"]
    return ids


def mask(given: Prompt, seen: Callable[[int], Sequence[int]], asked: Sequence[int]) -> Tensor:
    """bool[L, L].

    Args:
        given: the prompt.
        seen: of a step the rows of earlier steps that it sees.
        asked: rows of steps that the question sees.
    """
    length = len(given.embeddings)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    allowed[:, : given.start] = True
    for number, (first, end) in enumerate(given.steps):
        allowed[first:end, list(seen(number))] = True
        allowed[first:end, first:end] = True
    allowed[given.end :, list(asked)] = True
    allowed[given.end :, given.end :] = True
    return allowed.tril()


@torch.no_grad()
def run(given: Prompt, masks: Callable[[int, Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
    """float[V]: logits behind the last row.

    Args:
        given: the prompt.
        masks: of a layer and float[L, D] that enters it bool[L, L].
        rows: positions int[A, L] instead of the prompt's own.
    """
    decoder = given.model.base_model.language_model
    positions = given.positions if rows is None else rows
    tables = decoder.rotary_emb(given.embeddings[None], positions if len(positions) == 1 else positions[:, None])
    hidden = given.embeddings[None]
    eager = decoder.config._attn_implementation == "eager"

    def note(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if output[1] is not None:
                given.attention[number] = output[1][0]

        return hook

    for number, layer in enumerate(decoder.layers):
        allowed = masks(number, hidden[0])[None, None]
        if eager:
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        handle = layer.self_attn.register_forward_hook(note(number))
        hidden = layer(hidden, attention_mask=allowed, position_embeddings=tables, **{CACHE: None})
        handle.remove()
        if number < len(given.deepstack):
            hidden[0, given.visual] += given.deepstack[number]
    logits: Tensor = given.model.get_output_embeddings()(decoder.norm(hidden[:, -1]))[0]
    return logits
