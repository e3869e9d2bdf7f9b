"""How tiny-document is trained: answer cross-entropy plus auxiliary losses on the patches of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration

from mmtoken.datasets.document_pages import QUESTION_TYPES, Page
from mmtoken.models.tiny_document.network import AuxiliaryHeads, NetworkConfig, TowerStates, build_network
from mmtoken.models.tiny_document.packing import PREFIX, kind_labels, pack_pages, patch_labels, prefixes, tiles
from mmtoken.models.tiny_document.processor import IMAGE_ID
from mmtoken.training.export import network_state
from mmtoken.training.objective import Objective
from mmtoken.training.packing import Packed, answered


@dataclass(frozen=True)
class TensorBatch:
    """Pages as tensors: tiles float[B, 7, 3, 48, 48], prompts int64[B, P], questions and what is on the patches."""

    tiles: Tensor
    prefix: Tensor
    packed: Packed
    patches: Tensor
    kinds: Tensor

    @classmethod
    def of(cls, pages: list[Page]) -> TensorBatch:
        return cls(tiles(pages), prefixes(pages), pack_pages(pages), patch_labels(pages), kind_labels(pages))

    def to(self, device: torch.device) -> TensorBatch:
        return TensorBatch(**{name: value.to(device) for name, value in vars(self).items()})


class TinyDocument(Objective):
    """Objective of tiny-document.

    Args:
        network: sizes of the network.
        patch_weight: weight of the loss that reads characters, bars and kinds of region off the patches.
        field_weight: weight of the loss that reads fields and heights of bars off the patches.
        background_weight: weight of patches without content in it.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up; a cosine down to 2 % follows.
        weight_decay: of matrices; vectors have none.
        beta2: second AdamW coefficient.
        compile: compile tower and decoder for training.
        seed: seeds the initial weights.
        start_from: a checkpoint of an earlier run whose network this one goes on with; its heads and optimizer state
            are left behind. None: new weights.
    """

    def __init__(
        self,
        network: NetworkConfig | None = None,
        patch_weight: float = 1.0,
        field_weight: float = 1.0,
        background_weight: float = 0.1,
        learning_rate: float = 8e-4,
        warmup_steps: int = 200,
        weight_decay: float = 0.05,
        beta2: float = 0.98,
        compile: bool = False,
        seed: int = 0,
        start_from: str | None = None,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, beta2)
        self.config = network or NetworkConfig()
        torch.manual_seed(seed)
        self.network: Idefics3ForConditionalGeneration = build_network(self.config)
        if start_from is not None:
            self.network.load_state_dict(network_state(start_from))
        # Eager attention with an additive mask trains about twice as fast as SDPA on CPU; saved models do not keep it.
        self.network.set_attn_implementation("eager")
        self.tower = TowerStates(self.network.model.vision_model)
        if compile:
            self.tower.compile(dynamic=False)
            self.network.model.text_model.compile(dynamic=True)  # the packed length differs from step to step
        self.heads = AuxiliaryHeads(self.config.width)
        self.patch_weight, self.field_weight, self.background_weight = patch_weight, field_weight, background_weight
        self._right = torch.zeros(len(QUESTION_TYPES))
        self._asked = torch.zeros(len(QUESTION_TYPES))

    def states(self, batch: TensorBatch) -> Tensor:
        """Tower output float[B, 7, 64, D]."""
        out: Tensor = self.tower(batch.tiles.flatten(0, 1))
        return out.view(*batch.tiles.shape[:2], *out.shape[1:])

    def answer_logits(self, states: Tensor, batch: TensorBatch) -> Tensor:
        """Logits `float[answer tokens, vocabulary]` at the labelled positions."""
        inner, packed = self.network.model, batch.packed
        embed = self.network.get_input_embeddings()
        visual = inner.connector(states.flatten(0, 1))
        prefix = embed(batch.prefix)
        where = (batch.prefix == IMAGE_ID)[..., None]
        prefix = prefix.masked_scatter(where, visual.to(prefix.dtype))
        sequence = torch.cat([prefix, embed(packed.text)], dim=1)
        hidden = inner.text_model(
            inputs_embeds=sequence, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state[:, PREFIX:]
        logits: Tensor = self.network.lm_head(hidden[packed.labels >= 0])
        return logits.float()

    def losses(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted; their sum is what is minimised."""
        states = self.states(batch)
        target = batch.packed.labels[batch.packed.labels >= 0]
        terms = {"answers": F.cross_entropy(self.answer_logits(states, batch), target)}
        read = self.heads(states[:, :-1])[:-1]
        for name, logits, labels in zip(("characters", "fields", "bars", "heights"), read, batch.patches, strict=True):
            weights = torch.ones(logits.shape[-1], device=logits.device)
            weights[0] = self.background_weight
            loss = F.cross_entropy(logits.float().flatten(0, 2), labels.flatten(), weight=weights)
            terms[name] = (self.patch_weight if name in ("characters", "bars") else self.field_weight) * loss
        kinds = self.heads(states[:, -1])[-1]
        terms["kinds"] = self.patch_weight * 0.3 * F.cross_entropy(kinds.float().flatten(0, 1), batch.kinds.flatten())
        return terms

    def correct(self, batch: TensorBatch) -> Tensor:
        """bool[B, Q]: whether greedy decoding would give the whole answer (teacher-forced, which is the same)."""
        return answered(batch.packed, self.answer_logits(self.states(batch), batch).argmax(dim=-1))

    # Lightning hooks

    def transfer_batch_to_device(self, batch: list[Page], device: torch.device, dataloader_idx: int) -> TensorBatch:
        return TensorBatch.of(batch).to(device)

    def training_step(self, batch: TensorBatch, batch_idx: int) -> Tensor:
        terms = self.losses(batch)
        size = len(batch.tiles)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=size)
        self.log("train/cpu_minutes", self.cpu_minutes(), prog_bar=True, batch_size=size)
        return torch.stack(list(terms.values())).sum()

    def on_validation_epoch_start(self) -> None:
        self._right.zero_()
        self._asked.zero_()

    def validation_step(self, batch: TensorBatch, batch_idx: int) -> None:
        # Not worth compiling once more for: evaluation mode and other batch sizes are other graphs.
        with torch.compiler.set_stance("force_eager"):
            correct = self.correct(batch).cpu()
        types = batch.packed.types.cpu()
        asked = types >= 0
        self._asked.index_add_(0, types[asked], torch.ones(int(asked.sum())))
        self._right.index_add_(0, types[asked], correct[asked].float())

    def on_validation_epoch_end(self) -> None:
        for name, right, asked in zip(QUESTION_TYPES, self._right, self._asked, strict=True):
            if asked > 0:
                self.log(f"val/{name}", right / asked)
        self.log("val/accuracy", self._right.sum() / self._asked.sum().clamp(min=1))
