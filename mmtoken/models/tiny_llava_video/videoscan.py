"""VideoScan's two training stages for tiny-llava-video: first read carriers, then make them gather their frames.

Stage 1: of every frame the decoder gets its carrier alone, the mean of its tokens, so the tower learns features that
survive averaging and the decoder to read one token per frame. Stage 2: the decoder gets every frame with its carrier
behind it, under a mask by which questions see carriers only (`mmtoken.compressors.videoscan.semantic_mask`), so the
carrier's keys and values must hold what the question will need.

As in the paper's code both stages train low-rank adapters (LoRA, by the `peft` package of the extra `train`): on all
linear layers of the decoder, in stage 1 also on the tower's queries, keys and values; the projector stays. Without
adapters (`lora: null`) the same matrices are trained themselves, which needs no further package.

For a machine with a GPU and little time, one stage after the other:

    python -m mmtoken.models.tiny_llava_video.videoscan --stage 1 --minutes 4 --out runs/stage1
    python -m mmtoken.models.tiny_llava_video.videoscan --stage 2 --minutes 4 --out runs/stage2 \
        --start runs/stage1/last.ckpt

or `mmtoken fit --config models/tiny_llava_video/videoscan-stage1.yaml` (and `-stage2.yaml`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from mmtoken.compressors.videoscan import mean_token, semantic_mask
from mmtoken.datasets.moving_shapes import Clip
from mmtoken.errors import CheckpointError, MMTokenError
from mmtoken.models.registry import find_model, list_models
from mmtoken.models.tiny_llava.network import NetworkConfig
from mmtoken.models.tiny_llava.processor import BOS_ID
from mmtoken.models.tiny_llava_video.objective import TinyLlavaVideo
from mmtoken.models.tiny_llava_video.packing import ClipBatch, Gaps, pack_clips
from mmtoken.models.tiny_llava_video.train import parser, train
from mmtoken.training.export import network_state

Stage = Literal[1, 2]
Policy = Literal["true", "repo"]
"""Positions, named as those of streams (`mmtoken.streaming.memory.StreamPositions`)."""

_DECODER = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
_TOWER = r"model\.vision_tower\..*self_attn\.[qkv]_proj"
_SCALE = "lora_scale"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, with the paper's sizes.

    Attributes:
        rank: columns of an adapter.
        alpha: an adapter's product is scaled by alpha / rank.
        dropout: on what enters an adapter.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05


class VideoScanStage(TinyLlavaVideo):
    """Objective of one of VideoScan's stages on clips with questions, each asked at its own moment.

    Args:
        stage: 1, carriers alone; 2, frames and carriers under the mask, decoder only.
        start: what is trained on: a zoo entry, a folder that transformers loads, or the checkpoint of an earlier
            training of this network (stage 2 goes on from that of stage 1); None: `network` at random.
        lora: the adapters; None: the matrices themselves are trained.
        policy: positions of stage 2: "true", counted over all tokens, as the paper trains; "repo", a frame starts
            behind as many positions as there are carriers, as the official code then streams. A stream with the same
            policy computes the same numbers as this objective.
        network: sizes of the network; None: those of tiny-llava-video.
        learning_rate: peak of the schedule, of the decoder.
        tower_learning_rate: the same of the vision tower; stage 2 leaves it alone.
        warmup_steps, weight_decay, beta2, minutes, attention, seed: as `TinyLlavaVideo`.

    Raises:
        MMTokenError: a setting is wrong, or `lora` is given and peft is not installed.
        CheckpointError: `start` holds no network of this size.
    """

    def __init__(
        self,
        stage: Stage,
        start: str | None = "tiny-llava-video",
        lora: Lora | None = None,
        policy: Policy = "true",
        network: NetworkConfig | None = None,
        learning_rate: float = 3e-4,
        tower_learning_rate: float = 6e-5,
        warmup_steps: int = 50,
        weight_decay: float = 0.0,
        beta2: float = 0.98,
        minutes: float | None = None,
        attention: str = "sdpa",
        seed: int = 0,
    ) -> None:
        if stage not in (1, 2):
            raise MMTokenError(f"stage={stage!r} is unknown; use 1 or 2.")
        if policy not in ("true", "repo"):
            raise MMTokenError(f"policy={policy!r} cannot be trained in one pass; use 'true' or 'repo'.")
        super().__init__(
            network=network or NetworkConfig(),
            gaps=Gaps(missing=0.0, jumps=0.0),
            object_weight=0.0,
            learning_rate=learning_rate,
            tower_learning_rate=tower_learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            beta2=beta2,
            minutes=minutes,
            attention=attention,
            seed=seed,
        )
        self.stage, self.policy, self.lora = stage, policy, lora
        if start is not None:
            _load(self.network, start)
        pattern = _DECODER if stage == 2 else f"{_DECODER}|{_TOWER}"
        self.requires_grad_(False)
        if lora is None:
            for name, module in self.network.named_modules():
                if re.fullmatch(pattern, name):
                    module.requires_grad_(True)
        else:
            _add_adapters(self.network, lora, pattern)
        self.trained = [name for name, p in self.named_parameters() if p.requires_grad]

    def batch(self, clips: Sequence[Clip], step: int | None = None) -> ClipBatch:
        """Clips as tensors; whatever the step, they are not disturbed."""
        return pack_clips(clips)

    def visual(self, batch: ClipBatch) -> Tensor:
        """What the decoder gets of the frames, float[B, F * n, D]: n is 1 in stage 1, else a frame and its carrier."""
        clips, frames = batch.frames.shape[:2]
        tokens = super().visual(batch)
        tokens = tokens.view(clips, frames, -1, tokens.shape[-1])
        carriers = mean_token(tokens)[:, :, None]
        return (carriers if self.stage == 1 else torch.cat([tokens, carriers], 2)).flatten(1, 2)

    def forward(self, batch: ClipBatch, *, objects: bool = False) -> tuple[Tensor, None]:
        """Logits float[B, S, vocabulary]; no loss is taken off the visual tokens."""
        inner, embed = self.network.model, self.network.get_input_embeddings()
        visual = self.visual(batch)
        block = visual.shape[1] // batch.frames.shape[1]
        start = embed(torch.full((len(visual), 1), BOS_ID, device=visual.device))
        text = embed(batch.text.long())
        newline = (batch.text == self.network.config.video_token_id)[..., None]
        text = torch.where(newline, inner.image_newline.to(text.dtype), text)
        mask = carrier_mask(batch, block)
        if self.attention == "eager":  # it adds its mask
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -1e4)
        hidden = inner.language_model(
            inputs_embeds=torch.cat([start, visual.to(start.dtype), text], dim=1),
            attention_mask=mask,
            position_ids=carrier_positions(batch, block, self.policy),
            use_cache=False,
        ).last_hidden_state[:, 1 + visual.shape[1] :]
        logits: Tensor = self.network.lm_head(hidden)
        return logits.float(), None

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW on what is trained, with a smaller rate for the tower."""
        groups = []
        for tower, rate in ((False, self.learning_rate), (True, self.tower_learning_rate)):
            mine = [p for name, p in self.named_parameters() if p.requires_grad and ("vision_tower" in name) == tower]
            if mine:
                groups.append({"params": mine, "lr": rate, "weight_decay": self.weight_decay})
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, self.beta2), fused=True)

    def plain_state(self) -> dict[str, Tensor]:
        """Weights of the network with the adapters worked in, by the names of a network without."""
        scale = 1.0 if self.lora is None else self.lora.alpha / self.lora.rank
        return merge_adapters(self.network.state_dict(), scale)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.lora is not None:
            checkpoint[_SCALE] = self.lora.alpha / self.lora.rank


def carrier_mask(batch: ClipBatch, block: int) -> Tensor:
    """bool[B, 1, L, L] for [bos | blocks of `block` tokens, each frame's carrier last | questions].

    Semantic-aware causal attention; a question sees the carriers of the frames that were shown before it.
    """
    clips, frames = batch.frames.shape[:2]
    device = batch.frames.device
    frame = torch.cat([torch.tensor([-1], device=device), torch.arange(frames, device=device).repeat_interleave(block)])
    question = frames + 1 + batch.question.long()  # padding is a segment of its own
    segment = torch.cat([frame.expand(clips, -1), question], 1)
    carrier = torch.arange(block, device=device).repeat(frames) == block - 1
    shared = torch.cat([carrier.new_ones(1), carrier, carrier.new_zeros(question.shape[1])])
    mask = semantic_mask(segment, shared.expand(clips, -1))
    behind = len(frame)
    mask[:, 0, behind:, :behind] &= frame < batch.seen[..., None]
    return mask


def carrier_positions(batch: ClipBatch, block: int, policy: Policy) -> Tensor:
    """int64[B, L]: positions of the same sequence under the policies "true" and "repo"."""
    clips, frames = batch.frames.shape[:2]
    device = batch.frames.device
    apart = block if policy == "true" else 1
    starts = 1 + apart * torch.arange(frames, device=device)
    visual = (starts[:, None] + torch.arange(block, device=device)).flatten()
    at = torch.arange(batch.question.shape[1], device=device).expand(clips, -1)
    first = torch.ones_like(batch.question, dtype=torch.bool)
    first[:, 1:] = batch.question[:, 1:] != batch.question[:, :-1]
    within = at - (at * first).cummax(1).values
    text = 1 + apart * batch.seen.long() + within
    return torch.cat([visual.new_zeros(clips, 1), visual.expand(clips, -1), text], 1)


# ------------------------------------------------------------------------------------------------------------ adapters


def _add_adapters(network: nn.Module, lora: Lora, pattern: str) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise MMTokenError(
            "lora needs the package peft (pip install 'mmtoken[train]'), or give lora=None: the matrices themselves "
            "are trained then."
        ) from error
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", target_modules=pattern
    )
    inject_adapter_in_model(config, network)


def merge_adapters(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights W + scale * B A by their plain names, from those of a network with peft's adapters.

    Args:
        weights: a state dict; without adapters it comes back as it is.
        scale: alpha / rank.
    """
    plain = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            stem, kind = name.split(".base_layer.")
            if kind == "weight":
                down, up = (weights[f"{stem}.lora_{side}.default.weight"] for side in "AB")
                value = (value.float() + scale * (up.float() @ down.float())).to(value.dtype)
            name = f"{stem}.{kind}"
        plain[name] = value
    return plain


def plain_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """Weights of the network in a checkpoint of `TinyLlavaVideo` or `VideoScanStage`, adapters worked in.

    Raises:
        CheckpointError: there is no checkpoint at that path.
    """
    weights = network_state(checkpoint)
    if not any(".lora_" in name for name in weights):
        return weights
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if _SCALE not in saved:
        raise CheckpointError(
            f"checkpoint={str(checkpoint)!r} has adapters but not their scale; give the last.ckpt of a run of "
            "VideoScanStage."
        )
    return merge_adapters(weights, float(saved[_SCALE]))


def _load(network: LlavaOnevisionForConditionalGeneration, start: str) -> None:
    path = Path(start)
    if path.is_file():
        weights = plain_weights(path)
    else:
        zoo = start in {entry.name for entry in list_models()}
        if not zoo and not path.is_dir():
            find_model(start)  # names what there is
        folder = find_model(start).path if zoo else path
        loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        weights = loaded.state_dict()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"start={start!r} holds no network of this size ({reason}); give a checkpoint of it, or its `network`."
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """One stage for a given wall time, see `mmtoken.models.tiny_llava_video.train`."""
    options = parser("python -m mmtoken.models.tiny_llava_video.videoscan", str(__doc__))
    options.set_defaults(learning_rate=3e-4, tower_learning_rate=6e-5)
    options.add_argument("--stage", type=int, required=True, choices=(1, 2))
    options.add_argument("--start", default="tiny-llava-video", help="zoo entry, folder or checkpoint to train on")
    options.add_argument("--lora-rank", type=int, default=None, help="adapters of that rank; none: whole matrices")
    options.add_argument("--policy", default="true", choices=("true", "repo"), help="positions of stage 2")
    chosen = options.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(chosen, objective(chosen))


def objective(options: argparse.Namespace) -> VideoScanStage:
    """What the options of `main` describe."""
    return VideoScanStage(
        stage=options.stage,
        start=options.start,
        lora=None if options.lora_rank is None else Lora(rank=options.lora_rank),
        policy=options.policy,
        learning_rate=options.learning_rate,
        tower_learning_rate=options.tower_learning_rate,
        minutes=options.minutes,
        attention=options.attention,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
