"""How tiny-openvla is trained: cross-entropy of the expert's action tokens, and losses in place of pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtoken.datasets.demonstrations import Demonstration
from mmtoken.datasets.tabletop import ACTIONS
from mmtoken.models.openvla import OpenVLAForActionPrediction
from mmtoken.models.tiny_openvla.network import NetworkConfig, PatchHeads, Pointers, build_network
from mmtoken.models.tiny_openvla.packing import ActionBatch, around, common_ids, pack, soft_targets
from mmtoken.models.tiny_openvla.processor import BINS, BOS_ID, VISUAL_TOKENS, WORDS
from mmtoken.training.objective import Objective

GUIDED_HEADS = 2
"""Heads whose attention is guided; the others are free."""
_VISUAL = slice(1, 1 + VISUAL_TOKENS)


class TinyOpenVLA(Objective):
    """Objective of tiny-openvla.

    OpenVLA begins with a vision-language model that can see and knows what words mean. What stands in for this here:
    for `tower_steps` only the tower is trained, to tell what is on each patch; after that, colour words and the last
    prompt token are asked where the things are that they name, and some of their attention is guided there. (In a first
    350 such steps the read-outs of item words fell to 1.3 nats with guidance and to 3.6 without.) Guided attention
    favours methods that rank visual tokens by attention.

    Args:
        network: sizes of the network.
        tower_steps: steps in which the tower is trained alone.
        bin_width: standard deviation of the target around the expert's number, in bins.
        patch_weight: weight of the losses on patches.
        point_weight: weight of the losses on pointing and on guided attention.
        word_layer: after how many decoder layers the words point; in the last of these their attention is guided.
        goal_layer: the same of the last prompt token.
        background_weight: weight of patches without content.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up; a cosine down to 2 % follows.
        weight_decay: of matrices; vectors have none.
        beta2: second AdamW coefficient.
        seed: seeds the initial weights.
    """

    def __init__(
        self,
        network: NetworkConfig | None = None,
        tower_steps: int = 300,
        bin_width: float = 6.0,
        patch_weight: float = 0.3,
        point_weight: float = 0.5,
        word_layer: int = 2,
        goal_layer: int = 4,
        background_weight: float = 0.1,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        beta2: float = 0.98,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, beta2)
        self.config = network or NetworkConfig()
        torch.manual_seed(seed)
        self.network: OpenVLAForActionPrediction = build_network(self.config)
        # Eager attention with an additive mask trains about twice as fast as SDPA on CPU; saved models do not keep it.
        self.network.language_model.set_attn_implementation("eager")
        for block in self.network.vision_backbone.featurizer.blocks:
            block.attn.fused_attn = False
        self.patch_heads = PatchHeads(self.config.vision_width)
        self.pointers = Pointers(self.config.width, 4)
        self.tower_steps, self.bin_width = tower_steps, bin_width
        self.patch_weight, self.point_weight = patch_weight, point_weight
        self.word_layer, self.goal_layer = word_layer, goal_layer
        self.background_weight = background_weight
        self._errors: list[Tensor] = []

    def decode(self, patches: Tensor, batch: ActionBatch) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What the decoder answers, and what it does on the way.

        Args:
            patches: float[B, 64, D_v], output of the tower.
            batch: the instructions.

        Returns:
            Log-probabilities of bins float[labels, 255]; hidden states of the text float[B, S, D], of the embedding and
            after each layer; the text's attention to the patches float[B, H, S, 64] in each layer.
        """
        model = self.network.language_model
        embed = self.network.get_input_embeddings()
        visual = self.network.projector(patches)
        start = torch.tensor([BOS_ID], device=visual.device)
        common = torch.tensor(common_ids(), device=visual.device)
        bos, before = (embed(ids).expand(len(visual), -1, -1) for ids in (start, common))
        sequence = torch.cat([bos, visual.to(bos.dtype), before, embed(batch.packed.text)], dim=1)
        out = model.model(
            inputs_embeds=sequence,
            attention_mask=batch.packed.mask,
            position_ids=batch.packed.positions,
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
        prefix = sequence.shape[1] - batch.packed.text.shape[1]
        asked = out.last_hidden_state[:, prefix:][batch.packed.labels >= 0]
        bins = torch.arange(WORDS - 1, WORDS - 1 - BINS, -1, device=visual.device)
        logits = model.lm_head(asked).float()
        hidden = tuple(h[:, prefix:] for h in out.hidden_states)
        return logits.log_softmax(-1)[:, bins], hidden, tuple(a[:, :, prefix:, _VISUAL] for a in out.attentions)

    def losses(self, batch: ActionBatch, step: int | None = None) -> dict[str, Tensor]:
        """Every term of the loss, weighted; their sum is what is minimised.

        Args:
            batch: pictures and instructions.
            step: of training; before `tower_steps` there are only the patches. None: all terms.
        """
        patches = self.network.vision_backbone(batch.pixels)
        terms = {"patches": self.patch_weight * self.patch_loss(patches, batch)}
        if step is not None and step < self.tower_steps:
            return terms
        found, hidden, attention = self.decode(patches, batch)
        target = soft_targets(batch.actions, self.bin_width)
        # The entropy of the target is what a perfect policy is left with.
        terms["actions"] = F.kl_div(found, target, reduction="batchmean")
        terms["pointing"] = self.point_weight * self.point_loss(hidden, batch)
        terms["guiding"] = self.point_weight * self.guide_loss(attention, batch)
        return terms

    def patch_loss(self, patches: Tensor, batch: ActionBatch) -> Tensor:
        """Of reading from each patch what is on it and where its centre is."""
        *logits, places = self.patch_heads(patches)
        loss = torch.zeros((), device=places.device)
        for found, target in zip(logits, batch.classes, strict=True):
            weight = torch.ones(found.shape[-1], device=found.device)
            weight[0] = self.background_weight
            loss = loss + F.cross_entropy(found.flatten(0, 1), target.flatten(), weight=weight)
        for k in range(3):  # of items, bases and the gripper; their first class says whether there is one
            there = batch.classes[2 * k] > 0
            columns = slice(2 * k, 2 * k + 2)
            loss = loss + 20 * F.mse_loss(places[there][:, columns], batch.places[there][:, columns])
        return loss

    def point_loss(self, hidden: Sequence[Tensor], batch: ActionBatch) -> Tensor:
        """Of reading where things are: off the words that name them, and the goal and the gripper off the last token.

        Args:
            hidden: float[B, S, D], of the embedding and after each layer.
            batch: where to read, and what.
        """
        rows = torch.arange(len(batch.readers), device=batch.readers.device)[:, None]
        loss = hidden[0].new_zeros((), dtype=torch.float32)
        for number, (reader, layer) in enumerate(self._asked(("item", "base", "goal", "gripper"))):
            read = hidden[layer][rows, batch.readers[..., reader]]
            loss = loss + self.pointers.loss(number, read, batch.points[:, :, number])
        return loss

    def guide_loss(self, attention: Sequence[Tensor], batch: ActionBatch) -> Tensor:
        """Cross-entropy between attention and the patches around what is named, in the first `GUIDED_HEADS` heads.

        Args:
            attention: float[B, H, S, 64], of each layer.
            batch: who attends, and where the things are.
        """
        rows = torch.arange(len(batch.readers), device=batch.readers.device)[:, None]
        loss = attention[0].new_zeros((), dtype=torch.float32)
        for number, (reader, layer) in enumerate(self._asked(("item", "base", "goal"))):
            # float[B, Q, H, 64]
            paid = attention[layer - 1][rows, :GUIDED_HEADS, batch.readers[..., reader]].float()
            wanted = around(batch.points[:, :, number])[:, :, None]
            loss = loss - (wanted * (paid + 1e-6).log()).sum(-1).mean()
        return loss

    def _asked(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """(which of `ActionBatch.readers` is asked, after how many layers) for each of the things."""
        who = {"item": (0, self.word_layer), "base": (1, self.word_layer)}
        return [who.get(name, (2, self.goal_layer)) for name in names]

    # Lightning hooks

    def transfer_batch_to_device(
        self, batch: list[Demonstration], device: torch.device, dataloader_idx: int
    ) -> ActionBatch:
        return pack(batch).to(device)

    def training_step(self, batch: ActionBatch, batch_idx: int) -> Tensor:
        terms = self.losses(batch, self.global_step)
        size = len(batch.pixels)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=size)
        self.log("train/cpu_minutes", self.cpu_minutes(), prog_bar=True, batch_size=size)
        return torch.stack(list(terms.values())).sum()

    def on_validation_epoch_start(self) -> None:
        self._errors = []

    def validation_step(self, batch: ActionBatch, batch_idx: int) -> None:
        found, _, _ = self.decode(self.network.vision_backbone(batch.pixels), batch)
        numbers = (found.argmax(dim=-1) + 0.5) * (2 / BINS) - 1
        self._errors.append((numbers - batch.actions).abs().view(-1, len(ACTIONS)).cpu())

    def on_validation_epoch_end(self) -> None:
        for name, errors in zip(ACTIONS, torch.cat(self._errors).unbind(1), strict=True):
            self.log(f"val/{name}_off", (errors > 0.4).float().mean())
