"""How the tiny LLaVA is trained: answer cross-entropy plus two auxiliary losses on the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmtoken.datasets.shapes_qa import QUESTION_TYPES
from mmtoken.datasets.vqa_mix import Batch
from mmtoken.models.tiny_llava.network import AuxiliaryHeads, NetworkConfig, build_network
from mmtoken.models.tiny_llava.packing import PREFIX, pack, pair_labels, patch_labels, pixels
from mmtoken.models.tiny_llava.processor import BOS_ID
from mmtoken.training.objective import Objective
from mmtoken.training.packing import Packed, answered

PHOTO_NUMBER = "photo_number"
"""Name under which validation reports numbers read off photographs; "number" are those on generated scenes."""


@dataclass(frozen=True)
class TensorBatch:
    """A `Batch` as tensors: pictures of scenes first, then of photographs, and the packed questions of either."""

    pixels: Tensor
    pairs: Tensor
    patches: Tensor
    scenes: Packed | None
    photos: Packed | None
    scene_count: int

    @classmethod
    def of(cls, batch: Batch) -> TensorBatch:
        samples = [*batch.scenes, *batch.photos]
        return cls(
            pixels(samples),
            pair_labels(samples),
            patch_labels(samples),
            pack(batch.scenes) if batch.scenes else None,
            pack(batch.photos) if batch.photos else None,
            len(batch.scenes),
        )

    def to(self, device: torch.device) -> TensorBatch:
        return TensorBatch(
            self.pixels.to(device),
            self.pairs.to(device),
            self.patches.to(device),
            self.scenes.to(device) if self.scenes else None,
            self.photos.to(device) if self.photos else None,
            self.scene_count,
        )

    @property
    def groups(self) -> list[tuple[str, slice, Packed]]:
        """Name, rows and questions of scenes and of photographs, as far as there are any."""
        both = (
            ("scenes", slice(None, self.scene_count), self.scenes),
            ("photos", slice(self.scene_count, None), self.photos),
        )
        return [(name, rows, packed) for name, rows, packed in both if packed is not None]


class TinyLlava(Objective):
    """Objective of the tiny LLaVA.

    Args:
        network: sizes of the network.
        dense_patch_steps: steps during which colour, shape and digit are also read off every patch; None: all of
            them, 0: none. The loss makes patches of objects stand out, which favours pruning methods that rank patches;
            the second zoo model has it for the first fifth of its training only.
        pair_weight: weight of the loss that teaches CLS which colour-shape pairs the picture holds.
        photo_weight: weight of the answers on photographs, beside 1 for those on scenes.
        background_weight: weight of patches without content in the dense loss.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up; a cosine down to 2 % follows.
        weight_decay: of matrices; vectors have none.
        beta2: second AdamW coefficient.
        compile: compile tower and decoder for training; takes a minute and a half, then saves a third of each step.
        seed: seeds the initial weights.
    """

    def __init__(
        self,
        network: NetworkConfig | None = None,
        dense_patch_steps: int | None = None,
        pair_weight: float = 0.1,
        photo_weight: float = 0.25,
        background_weight: float = 0.1,
        learning_rate: float = 8e-4,
        warmup_steps: int = 200,
        weight_decay: float = 0.05,
        beta2: float = 0.98,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, beta2)
        self.config = network or NetworkConfig()
        torch.manual_seed(seed)
        self.network: LlavaForConditionalGeneration = build_network(self.config)
        # Eager attention with an additive mask trains about twice as fast as SDPA on CPU; saved models do not keep it.
        self.network.set_attn_implementation("eager")
        if compile:
            self.network.model.vision_tower.compile(dynamic=False)
            self.network.model.language_model.compile(dynamic=True)  # the packed length differs from step to step
        self.heads = AuxiliaryHeads(self.config.width)
        self.dense_patch_steps = dense_patch_steps
        self.pair_weight, self.photo_weight, self.background_weight = pair_weight, photo_weight, background_weight
        self._right = torch.zeros(len(QUESTION_TYPES) + 1)
        self._asked = torch.zeros(len(QUESTION_TYPES) + 1)

    def answer_logits(self, patches: Tensor, packed: Packed) -> Tensor:
        """Logits `float[answer tokens, vocabulary]` at the labelled positions, from tower patches `float[B, 64, D]`."""
        inner = self.network.model
        embed = self.network.get_input_embeddings()
        visual = inner.multi_modal_projector(patches)
        bos = embed(torch.full((len(patches), 1), BOS_ID, device=patches.device))
        sequence = torch.cat([bos, visual.to(bos.dtype), embed(packed.text)], dim=1)
        hidden = inner.language_model(
            inputs_embeds=sequence, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state[:, PREFIX:]
        logits: Tensor = self.network.lm_head(hidden[packed.labels >= 0])
        return logits.float()

    def losses(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted; their sum is what is minimised."""
        hidden = self.network.model.vision_tower(batch.pixels).last_hidden_state
        pairs, patches = self.heads(hidden)
        terms: dict[str, Tensor] = {}
        for name, rows, packed in batch.groups:
            weight = self.photo_weight if name == "photos" else 1.0
            target = packed.labels[packed.labels >= 0]
            terms[name] = weight * F.cross_entropy(self.answer_logits(hidden[rows, 1:], packed), target)
        pair_loss = F.binary_cross_entropy_with_logits(pairs.float(), batch.pairs, reduction="none")
        terms["pairs"] = self.pair_weight * pair_loss.sum(dim=1).mean()
        if self.dense_patch_steps is None or self.global_step < self.dense_patch_steps:
            dense = hidden.new_zeros((), dtype=torch.float32)
            for logits, target in zip(patches, batch.patches, strict=True):
                weights = torch.ones(logits.shape[-1], device=logits.device)
                weights[0] = self.background_weight
                dense = dense + F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), weight=weights)
            terms["patches"] = dense
        return terms

    def correct(self, batch: TensorBatch) -> Tensor:
        """bool[B, Q]: whether greedy decoding would give the whole answer (teacher-forced, which is the same)."""
        hidden = self.network.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]
        found = []
        for _, rows, packed in batch.groups:
            found.append(answered(packed, self.answer_logits(hidden[rows], packed).argmax(dim=-1)))
        questions = max(f.shape[1] for f in found)
        return torch.cat([F.pad(f, (0, questions - f.shape[1])) for f in found])

    # Lightning hooks

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> TensorBatch:
        return TensorBatch.of(batch).to(device)

    def training_step(self, batch: TensorBatch, batch_idx: int) -> Tensor:
        terms = self.losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        size = len(batch.pixels)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=size)
        self.log("train/cpu_minutes", self.cpu_minutes(), prog_bar=True, batch_size=size)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._right.zero_()
        self._asked.zero_()

    def validation_step(self, batch: TensorBatch, batch_idx: int) -> None:
        # Not worth compiling once more for: evaluation mode and other batch sizes are other graphs.
        with torch.compiler.set_stance("force_eager"):
            correct = self.correct(batch).cpu()
        for name, rows, packed in batch.groups:
            types = packed.types.cpu()
            asked = types >= 0
            kinds = torch.full_like(types, len(QUESTION_TYPES))[asked] if name == "photos" else types[asked]
            good = correct[rows, : types.shape[1]][asked].float()
            self._asked.index_add_(0, kinds, torch.ones_like(good))
            self._right.index_add_(0, kinds, good)

    def on_validation_epoch_end(self) -> None:
        for name, right, asked in zip((*QUESTION_TYPES, PHOTO_NUMBER), self._right, self._asked, strict=True):
            if asked > 0:
                self.log(f"val/{name}", right / asked)
        scenes = slice(0, len(QUESTION_TYPES))
        self.log("val/accuracy", self._right[scenes].sum() / self._asked[scenes].sum().clamp(min=1))
