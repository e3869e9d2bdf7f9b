"""The network: timm towers, an MLP projector and a Llama that answers with action tokens.

Kim et al., OpenVLA: An Open-Source Vision-Language-Action Model, arXiv 2406.09246. Parameters have the names of
official checkpoints. Importing this package makes `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` know
it, so no code from a checkpoint runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmtoken.errors import ActionError, InputError
from mmtoken.models.openvla.actions import ActionCodec
from mmtoken.models.openvla.config import OpenVLAConfig
from mmtoken.models.openvla.splice import IGNORED, insert
from mmtoken.models.openvla.towers import PrismaticVisionBackbone


class PrismaticProjector(nn.Module):
    """Patch by patch from D_v to D_llm channels.

    With two towers fc1 (4 D_v), GELU, fc2, GELU, fc3; with one fc1, GELU, fc2.
    """

    def __init__(self, width: int, llm: int, *, fused: bool) -> None:
        super().__init__()
        first = 4 * width if fused else llm
        self.fc1 = nn.Linear(width, first)
        self.fc2 = nn.Linear(first, llm)
        self.fc3 = nn.Linear(llm, llm) if fused else None

    def forward(self, patches: Tensor) -> Tensor:
        """float[n, patches, D_llm] from float[n, patches, D_v]."""
        hidden: Tensor = self.fc2(nn.functional.gelu(self.fc1(patches)))
        return hidden if self.fc3 is None else self.fc3(nn.functional.gelu(hidden))


class OpenVLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """OpenVLA: images and an instruction in, action tokens out.

    `input_ids` hold `config.image_token_id` once per visual token, as `PrismaticProcessor` writes it. Ids as official
    code has them, without any, are accepted too: the visual tokens then go behind the first token of each row (BOS),
    `attention_mask` and `labels` grow with them, and so do the returned logits and sequences.
    """

    config: OpenVLAConfig
    config_class = OpenVLAConfig
    input_modalities = ["image", "text"]  # noqa: RUF012  # transformers declares it so
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.vision_backbone = PrismaticVisionBackbone(config)
        text: Any = config.text_config
        self.projector = PrismaticProjector(
            self.vision_backbone.config.output_size, text.hidden_size, fused=bool(config.use_fused_vision_backbone)
        )
        self.language_model = LlamaForCausalLM(text)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def codec(self) -> ActionCodec:
        """Actions to tokens and back."""
        return ActionCodec.of(self.config)

    @property
    def _placeholder(self) -> int:
        assert self.config.image_token_id is not None
        return self.config.image_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language_model.lm_head
        return head

    def get_image_features(
        self, pixel_values: Tensor, return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Visual tokens of images.

        Args:
            pixel_values: float[n, 3 * towers, H, W], normalised for each tower.
            return_dict: whether to return an output object.
            **kwargs: not used.

        Returns:
            `last_hidden_state` float[n, patches, D_v] as the projector reads it, `pooler_output` n times float[patches,
            D_llm].

        Raises:
            InputError: `pixel_values` has another shape.
        """
        patches = self.vision_backbone(pixel_values.to(self.projector.fc1.weight.dtype))
        output = BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=[*self.projector(patches)])  # type: ignore[arg-type]
        return output if return_dict else output.to_tuple()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits of the language model, as `LlamaForCausalLM` returns them.

        Args:
            input_ids: int[B, L].
            pixel_values: float[images, 3 * towers, H, W], one image per row, or as many as the placeholders ask for.
            attention_mask: int[B, L], 0 on padding, left or right.
            position_ids: int[B, L].
            inputs_embeds: float[B, L, D_llm] instead of ids, placeholders embedded.
            labels: int[B, L], -100 where nothing is to be predicted.
            mm_encoder_outputs: {"image": what `get_image_features` returned} instead of pixels.
            logits_to_keep: how many of the last positions get logits; 0: all.
            **kwargs: go to the language model.

        Raises:
            InputError: placeholders and visual tokens are not equally many.
        """
        if self._bare(input_ids, pixel_values):
            assert input_ids is not None
            if position_ids is not None:
                raise InputError(
                    "position_ids do not count the visual tokens, since input_ids has no placeholders; leave them out, "
                    "or use the ids that the processor makes."
                )
            ids, mask, wanted = self.with_placeholders(input_ids, attention_mask, labels)
            # Through __call__, so that whoever listens to this module sees the places of the visual tokens.
            return self(
                input_ids=ids,
                pixel_values=pixel_values,
                attention_mask=mask,
                labels=wanted,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            encoded = self.get_image_features(pixel_values)
        return self._answer(
            input_ids,
            labels,
            inputs_embeds=self._splice(input_ids, inputs_embeds, encoded),
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _answer(self, input_ids: Tensor | None, labels: Tensor | None, **call: Any) -> Any:
        """What the language model says to spliced embeddings."""
        return self.language_model(labels=labels, **call)

    def _bare(self, input_ids: Tensor | None, pixel_values: Tensor | None) -> bool:
        """Whether images come with ids that have no place for them."""
        return input_ids is not None and pixel_values is not None and not bool(input_ids.eq(self._placeholder).any())

    def with_placeholders(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, mask and labels with one image's placeholders behind the first token of each row.

        Args:
            input_ids: int[B, L] without placeholders.
            attention_mask: int[B, L], 0 on padding, left or right; None: no padding.
            labels: int[B, L] or None; placeholders get -100.

        Returns:
            The three, patches longer.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        count = self.vision_backbone.patches
        after = mask.long().argmax(-1) + 1
        ids = insert(input_ids, after, count, self._placeholder)
        wanted = None if labels is None else insert(labels, after, count, IGNORED)
        return ids, insert(mask, after, count, 1), wanted

    def _splice(self, input_ids: Tensor | None, embeds: Tensor, encoded: Any) -> Tensor:
        """`embeds` float[B, L, D] with visual tokens, if there are any, at their placeholders."""
        if encoded is None:
            return embeds
        features = torch.cat(list(encoded.pooler_output)).to(embeds)
        token = self._placeholder
        places: Tensor
        if input_ids is None:
            placeholder = self.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            places = (embeds == placeholder).all(-1)
        else:
            places = input_ids.eq(token)
        if int(places.sum()) != len(features):
            raise InputError(
                f"input_ids has {int(places.sum())} visual placeholders (token {token}) but the images give "
                f"{len(features)} visual tokens; the prompt must hold one placeholder per visual token."
            )
        return embeds.masked_scatter(places[..., None], features)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; ids without placeholders get them first, see the class."""
        ids = kwargs.pop("input_ids", inputs)
        if self._bare(ids, kwargs.get("pixel_values")):
            expanded, mask, _ = self.with_placeholders(ids, kwargs.get("attention_mask"))
            return self.generate(expanded, *args, **{**kwargs, "attention_mask": mask})
        return super().generate(ids, *args, **kwargs)

    @torch.no_grad()
    def predict_tokens(self, *, unnorm_key: str | None = None, **inputs: Any) -> Tensor:
        """int64[B, S, A]: the action tokens of each row, S = 1 step.

        Args:
            unnorm_key: the data set whose actions have A dimensions; None: the only one.
            **inputs: what the processor returned; rows of different length may be padded on the left.

        Raises:
            ActionError: the model answered with other tokens, or stopped early.
            InputError: pixels are not finite, the prompt has no final space token, or there are no statistics.
        """
        length = self.codec.length(unnorm_key)
        ids, inputs = self._checked(inputs)
        sequences = self.generate(ids, **inputs, max_new_tokens=length, do_sample=False, num_beams=1)
        tokens: Tensor = sequences[:, ids.shape[1] :]
        if tokens.shape[1] < length:
            raise ActionError(
                f"the model stopped after {tokens.shape[1]} of {length} action tokens; check the prompt and the "
                "checkpoint."
            )
        self.codec.check(tokens)
        return tokens[:, None]

    def _checked(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """(ids with placeholders, the other arguments) of a control step.

        Raises:
            InputError: see `predict_tokens`.
        """
        ids, pixels, mask = (inputs.get(name) for name in ("input_ids", "pixel_values", "attention_mask"))
        if ids is None or pixels is None:
            raise InputError("a policy needs input_ids and pixel_values, as the processor makes them.")
        if not bool(torch.isfinite(pixels).all()):
            raise InputError("pixel_values holds NaN or infinite values; the camera image is damaged.")
        mask = torch.ones_like(ids) if mask is None else mask
        if self._bare(ids, pixels):
            ids, mask, _ = self.with_placeholders(ids, mask)
        if not bool((mask[:, -1] != 0).all()):
            raise InputError("rows are padded on the right, so their answers would follow padding; pad on the left.")
        self._check_end(ids)
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        return ids, {**rest, "attention_mask": mask}

    def _check_end(self, ids: Tensor) -> None:
        space = self.config.space_token_id
        if space is not None and not bool((ids[:, -1] == space).all()):
            raise InputError(
                f"the prompt must end with token {space} (a lone space), which OpenVLA saw before every action; the "
                "processor appends it."
            )


AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
