"""A policy that answers with several actions in one forward instead of one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from mmtoken.errors import ActionError, InputError, UnsupportedError
from mmtoken.models.openvla.config import OpenVLAChunksConfig
from mmtoken.models.openvla.network import OpenVLAForActionPrediction
from mmtoken.models.openvla.splice import insert


class OpenVLAForActionChunks(OpenVLAForActionPrediction):
    """OpenVLA with S * A learned queries behind the prompt, each of which becomes one number of one step.

    In the manner of OpenVLA-OFT's parallel decoding of action chunks (Kim et al., arXiv 2502.19645, section 3.1), with
    two differences: queries are learned vectors, not zeros, and attention stays causal. What a query's position
    predicts is its own number, not the next token, and only action tokens can win.

    `input_ids` end with `config.action_token_id` once per query, as the processor writes it; ids without them get them
    behind the last real token of each row.
    """

    config: OpenVLAChunksConfig
    config_class = OpenVLAChunksConfig

    def __init__(self, config: OpenVLAChunksConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.action_queries = nn.Parameter(torch.randn(config.action_queries, text.hidden_size) * 0.02)

    def _bare(self, input_ids: Tensor | None, pixel_values: Tensor | None) -> bool:
        return super()._bare(input_ids, pixel_values) or (input_ids is not None and not self._has_queries(input_ids))

    def _has_queries(self, input_ids: Tensor) -> bool:
        return bool(input_ids.eq(self._query).any())

    @property
    def _query(self) -> int:
        assert self.config.action_token_id is not None
        return self.config.action_token_id

    def with_placeholders(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids and mask with the placeholders that they lack: of one image, and of the queries. Labels stay.

        Arguments and results are those of `OpenVLAForActionPrediction.with_placeholders`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(input_ids.eq(self._placeholder).any()):
            input_ids, mask, _ = super().with_placeholders(input_ids, mask)
        if not self._has_queries(input_ids):
            end = mask.shape[1] - mask.flip(-1).long().argmax(-1)
            count = self.config.action_queries
            input_ids, mask = insert(input_ids, end, count, self._query), insert(mask, end, count, 1)
        return input_ids, mask, labels

    def _splice(self, input_ids: Tensor | None, embeds: Tensor, encoded: Any) -> Tensor:
        if input_ids is None:
            raise InputError("inputs_embeds do not say where the action queries are; give input_ids.")
        places = input_ids.eq(self._query)
        counts, wanted = places.sum(-1), self.config.action_queries
        if not bool((counts == wanted).all()):
            raise InputError(
                f"rows of input_ids hold {counts.tolist()} action queries (token {self._query}) and must hold {wanted} "
                "each; use the processor of this model."
            )
        queries = self.action_queries.to(embeds).repeat(len(embeds), 1)
        return super()._splice(input_ids, embeds, encoded).masked_scatter(places[..., None], queries)

    def _answer(self, input_ids: Tensor | None, labels: Tensor | None, **call: Any) -> Any:
        """Logits, and with labels int[B, S, A] the mean cross entropy of every query's own action token.

        Raises:
            InputError: labels have another shape.
        """
        if labels is None:
            return super()._answer(input_ids, None, **call)
        steps, length = self.config.action_steps, self.config.action_dim
        if labels.ndim != 3 or tuple(labels.shape[1:]) != (steps, length):
            raise InputError(
                f"labels have shape {tuple(labels.shape)}; expected int[B, {steps}, {length}], an action token for "
                "every query."
            )
        output = super()._answer(input_ids, None, **{**call, "logits_to_keep": 0})
        assert input_ids is not None
        said = output.logits[input_ids.eq(self._query)]
        output.loss = nn.functional.cross_entropy(said.float(), labels.flatten().to(said.device))
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Not for this policy.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a chunk policy generates no text; call predict_tokens(), one forward for all steps.")

    @torch.no_grad()
    def predict_tokens(self, *, unnorm_key: str | None = None, **inputs: Any) -> Tensor:
        """int64[B, S, A]: the action tokens of each row, from one forward.

        Args:
            unnorm_key: the data set whose actions have A dimensions; None: the only one.
            **inputs: what the processor returned; rows of different length may be padded on the left.

        Raises:
            ActionError: the model's answer is not a number.
            InputError: pixels are not finite, the prompt has no final space token, or there are no statistics, or those
                of actions of another length.
        """
        steps, length = self.config.action_steps, self.config.action_dim
        known = self.codec.length(unnorm_key)
        if known != length:
            raise InputError(
                f"the statistics of unnorm_key={unnorm_key!r} are for {known} dimensions and this policy has "
                f"{length}; choose the data set that it acts in."
            )
        ids, rest = self._checked(inputs)
        logits = self(input_ids=ids, **rest, logits_to_keep=steps * length, use_cache=False).logits
        bins = self.codec.tokens
        scores = logits[..., bins.start : bins.stop]
        if not bool(torch.isfinite(scores).all()):
            raise ActionError("the model answered with NaN or infinite logits, which is no action; check the weights.")
        tokens: Tensor = scores.argmax(-1) + bins.start
        return tokens.view(-1, steps, length)

    def _check_end(self, ids: Tensor) -> None:
        count = self.config.action_queries
        if not bool((ids[:, -count:] == self._query).all()):
            raise InputError(
                f"rows must end with {count} action queries (token {self._query}), as the processor does it."
            )
        super()._check_end(ids[:, :-count])


AutoConfig.register("openvla_chunks", OpenVLAChunksConfig, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAChunksConfig, OpenVLAForActionChunks, exist_ok=True)
