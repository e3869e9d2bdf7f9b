"""How tiny-llava-video is trained: answer cross-entropy plus a loss on visual tokens inside the decoder."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from mmtoken.datasets.moving_shapes import QUESTION_TYPES, Clip
from mmtoken.models.tiny_llava.network import NetworkConfig
from mmtoken.models.tiny_llava.processor import BOS_ID
from mmtoken.models.tiny_llava_video.network import ObjectHeads, build_network, from_tiny_llava
from mmtoken.models.tiny_llava_video.packing import ClipBatch, Gaps, answered, pack_clips
from mmtoken.training.objective import Objective, cosine

OBJECT_TERMS = ("colours", "shapes", "directions", "order")


class TinyLlavaVideo(Objective):
    """Objective of tiny-llava-video.

    Args:
        network: sizes of the network, which then starts at random; None: tiny-llava's weights.
        gaps: how often visual tokens and positions are disturbed.
        object_weight: weight of reading colour, shape, direction and order of objects off the visual tokens.
        object_layer: after which decoder layer they are read.
        learning_rate: peak of the schedule, of the decoder, the projector and what is new.
        tower_learning_rate: the same of the vision tower.
        warmup_steps: steps of linear warm-up; a cosine down to 2 % follows.
        weight_decay: of matrices; vectors have none.
        beta2: second AdamW coefficient.
        minutes: wall time after which the schedule has ended, whatever the steps done; None: steps alone count.
        attention: "sdpa", or "eager", which is faster on CPUs.
        seed: seeds new weights and disturbances.
    """

    def __init__(
        self,
        network: NetworkConfig | None = None,
        gaps: Gaps | None = None,
        object_weight: float = 0.3,
        object_layer: int = 5,
        learning_rate: float = 1e-3,
        tower_learning_rate: float = 3e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        beta2: float = 0.98,
        minutes: float | None = None,
        attention: str = "sdpa",
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, beta2)
        torch.manual_seed(seed)
        self.network: LlavaOnevisionForConditionalGeneration = (
            from_tiny_llava(seed) if network is None else build_network(network)
        )
        self.network.set_attn_implementation(attention)
        self.attention = attention
        self.gaps = gaps or Gaps()
        self.heads = ObjectHeads(len(self.network.model.image_newline))
        self.object_weight, self.object_layer = object_weight, object_layer
        self.tower_learning_rate = tower_learning_rate
        self.minutes, self.seed = minutes, seed
        self._started: float | None = None
        self._right = torch.zeros(len(QUESTION_TYPES))
        self._asked = torch.zeros(len(QUESTION_TYPES))

    def batch(self, clips: Sequence[Clip], step: int | None = None) -> ClipBatch:
        """Clips as tensors, disturbed as in that step of training; None: undisturbed."""
        if step is None or step < 0:
            return pack_clips(clips)
        return pack_clips(clips, self.gaps, np.random.default_rng((self.seed, step, 2)))

    def visual(self, batch: ClipBatch) -> Tensor:
        """Tokens of the frames as the decoder gets them, float[B, 16 F, D].

        The pieces of `get_video_features`, which differs between versions of transformers.
        """
        inner = self.network.model
        hidden = inner.vision_tower(batch.pixels()).last_hidden_state[:, 1:]
        pooled: Tensor = inner.apply_pooling(inner.multi_modal_projector(hidden))
        return pooled.reshape(len(batch.frames), -1, pooled.shape[-1])

    def forward(self, batch: ClipBatch, *, objects: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits float[B, S, vocabulary]; with `objects`, hidden states float[B, V, D] of the visual tokens, too."""
        inner = self.network.model
        embed = self.network.get_input_embeddings()
        visual = self.visual(batch)
        bos = embed(torch.full((len(visual), 1), BOS_ID, device=visual.device))
        text = embed(batch.text.long())
        newline = (batch.text == self.network.config.video_token_id)[..., None]
        text = torch.where(newline, inner.image_newline.to(text.dtype), text)
        sequence = torch.cat([bos, visual.to(bos.dtype), text], dim=1)
        mask = batch.mask()
        if self.attention == "eager":  # it adds its mask
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -1e4)
        out = inner.language_model(
            inputs_embeds=sequence,
            attention_mask=mask,
            position_ids=batch.positions(),
            use_cache=False,
            output_hidden_states=objects,
        )
        prefix = 1 + visual.shape[1]
        logits: Tensor = self.network.lm_head(out.last_hidden_state[:, prefix:])
        return logits.float(), out.hidden_states[self.object_layer][:, 1:prefix] if objects else None

    def answer_logits(self, batch: ClipBatch) -> Tensor:
        """Logits float[answer tokens, vocabulary] at the labelled positions."""
        logits: Tensor = self(batch)[0][batch.labels >= 0]
        return logits

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted; their sum is what is minimised."""
        logits, hidden = self(batch, objects=self.object_weight > 0)
        # Everywhere, and then ignored: to pick positions out would make the host wait for the device.
        terms = {"answers": F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten().long())}
        if hidden is None:
            return terms
        for name, read, label in zip(OBJECT_TERMS, self.heads(hidden), batch.objects.unbind(-1), strict=True):
            label = torch.where(batch.kept, label, -1).flatten().long()
            loss = F.cross_entropy(read.float().flatten(0, 1), label, ignore_index=-1, reduction="sum")
            terms[name] = self.object_weight * loss / (label >= 0).sum().clamp(min=1)
        return terms

    def correct(self, batch: ClipBatch) -> Tensor:
        """bool[B, Q]: whether greedy decoding would give the whole answer (teacher-forced, which is the same)."""
        return answered(batch, self.answer_logits(batch).argmax(dim=-1))

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a smaller rate for the tower, without decay for vectors."""
        groups = []
        for tower in (False, True):
            for matrix in (False, True):
                parameters = [
                    p
                    for name, p in self.named_parameters()
                    if ("vision_tower" in name) == tower and (p.ndim > 1) == matrix
                ]
                rate = self.tower_learning_rate if tower else self.learning_rate
                decay = self.weight_decay if matrix else 0.0
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, self.beta2), fused=True)

    def factor(self, step: int, total: int | None) -> float:
        """What the peak rates are multiplied with: warm-up by steps, the cosine by steps or time, what is further."""
        if self._started is None:
            self._started = time.monotonic()
        done = 0.0 if total is None else step / total
        if self.minutes is not None:
            done = max(done, (time.monotonic() - self._started) / (60 * self.minutes))
        return cosine(step, min(1.0, done), self.warmup_steps)

    # Lightning hooks

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer()
        steps = self.trainer.estimated_stepping_batches
        total = int(steps) if 0 < steps < float("inf") else None
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(
        self, batch: tuple[int, list[Clip]], device: torch.device, dataloader_idx: int
    ) -> ClipBatch:
        step, clips = batch
        return self.batch(clips, step).to(device)

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        terms = self.losses(batch)
        size = len(batch.frames)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=size)
        self.log("train/cpu_minutes", self.cpu_minutes(), prog_bar=True, batch_size=size)
        return torch.stack(list(terms.values())).sum()

    def on_validation_epoch_start(self) -> None:
        self._right.zero_()
        self._asked.zero_()

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        types = batch.types.cpu().long()
        asked = types >= 0
        self._asked.index_add_(0, types[asked], torch.ones(int(asked.sum())))
        self._right.index_add_(0, types[asked], self.correct(batch).cpu()[asked].float())

    def on_validation_epoch_end(self) -> None:
        for name, right, asked in zip(QUESTION_TYPES, self._right, self._asked, strict=True):
            if asked > 0:
                self.log(f"val/{name}", right / asked)
        self.log("val/accuracy", self._right.sum() / self._asked.sum().clamp(min=1))
