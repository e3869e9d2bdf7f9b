"""Settings of OpenVLA under their official names."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from mmtoken.errors import InputError, UnsupportedError


@strict
class OpenVLAConfig(PreTrainedConfig):
    """The settings in an OpenVLA checkpoint's `config.json`, and four of ours that official files do not have.

    Kim et al., OpenVLA: An Open-Source Vision-Language-Action Model, arXiv 2406.09246.

    Attributes:
        vision_backbone_id, llm_backbone_id, hf_llm_id, arch_specifier: names of the parts, for people; the network is
            made from the settings below.
        use_fused_vision_backbone: whether two towers see the image; None: as many as there are `timm_model_ids`.
        timm_model_ids: timm's name of each tower.
        timm_override_act_layers: timm's name of another activation per tower, None for its own.
        timm_model_args: of ours, further arguments of `timm.create_model` per tower (None: none).
        image_sizes: pixels per side of each tower's input; all the same.
        image_resize_strategy: what the processor does, "resize-naive", "resize-crop" or "letterbox".
        text_config: the language model's, `LlamaConfig`.
        pad_to_multiple_of: rows of the embedding table beyond the tokenizer's vocabulary; action tokens end before
            them.
        n_action_bins: action tokens.
        norm_stats: per data set {"action": {"q01", "q99", "mask", ...}}.
        image_token_id: of ours, the id that stands for a visual token in `input_ids`; None: the one after the padding
            token, which no tokenizer gives.
        space_token_id: of ours, the token that a prompt must end with (29871 is Llama-2's lone space); None: any.

    Raises:
        UnsupportedError: the towers do not fit together, or the language model is no Llama.
    """

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # transformers declares it so

    vision_backbone_id: str = "dinosiglip-vit-so-224px"
    llm_backbone_id: str = "llama2-7b-pure"
    hf_llm_id: str = "meta-llama/Llama-2-7b-hf"
    arch_specifier: str = "no-align+fused-gelu-mlp"
    use_fused_vision_backbone: bool | None = None
    timm_model_ids: list[str] | None = None
    timm_override_act_layers: list[str | None] | None = None
    timm_model_args: list[dict[str, Any] | None] | None = None
    image_sizes: list[int] | None = None
    image_resize_strategy: str = "resize-naive"
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    llm_max_length: int = 2048
    pad_token_id: int | None = 32000
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    n_action_bins: int = 256
    norm_stats: dict[str, Any] | None = None
    image_token_id: int | None = None
    space_token_id: int | None = 29871
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.timm_model_ids is None:
            self.timm_model_ids = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
        towers = len(self.timm_model_ids)
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = towers == 2
        if self.image_sizes is None:
            self.image_sizes = [224] * towers
        if self.timm_override_act_layers is None:
            self.timm_override_act_layers = [None] * towers
        if self.timm_model_args is None:
            self.timm_model_args = [None] * towers
        if self.text_config is None:
            self.text_config = LlamaConfig(vocab_size=32064, pad_token_id=32000)
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **self.text_config})
        if self.image_token_id is None and self.pad_token_id is not None:
            self.image_token_id = self.pad_token_id + 1
        self._check(towers)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def _check(self, towers: int) -> None:
        if towers != 1 + bool(self.use_fused_vision_backbone):
            raise UnsupportedError(
                f"use_fused_vision_backbone={self.use_fused_vision_backbone} but timm_model_ids names {towers} towers; "
                "two towers are fused, one is not."
            )
        for name in ("image_sizes", "timm_override_act_layers", "timm_model_args"):
            if len(getattr(self, name)) != towers:
                raise UnsupportedError(f"{name}={getattr(self, name)!r} must have one entry per tower ({towers}).")
        if self.image_sizes is not None and len(set(self.image_sizes)) > 1:
            raise UnsupportedError(f"image_sizes={self.image_sizes}: fused towers must see images of the same size.")
        kind = getattr(self.text_config, "model_type", None)
        if kind != "llama":
            raise UnsupportedError(f"text_config.model_type={kind!r} is not supported by OpenVLA; use 'llama'.")
        if self.image_token_id is None or not 0 <= self.image_token_id < self.table_rows:
            raise UnsupportedError(
                f"image_token_id={self.image_token_id} is no row of the embedding table ({self.table_rows} rows); give "
                "one that the tokenizer does not use."
            )

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table."""
        text: Any = self.text_config
        return int(text.vocab_size)

    @property
    def image_size(self) -> int:
        """Pixels per side of the input."""
        assert self.image_sizes is not None
        return int(self.image_sizes[0])

    @property
    def action_queries(self) -> int:
        """Tokens at the end of a prompt that stand for actions; 0: actions are generated."""
        return 0

    def statistics(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """The action statistics of a data set.

        Args:
            unnorm_key: its name in `norm_stats`; None: the only one.

        Raises:
            InputError: there is none of this name, or the name is missing where there are several.
        """
        return statistics_of(self.norm_stats, unnorm_key)


@strict
class OpenVLAChunksConfig(OpenVLAConfig):
    """The settings of `OpenVLAForActionChunks`: OpenVLA's and these.

    Attributes:
        action_steps: S, steps that are predicted at once.
        action_dim: A, numbers of an action.
        action_token_id: the id that stands for an action query in `input_ids`; None: the one after `image_token_id`.

    Raises:
        UnsupportedError: a value is out of range.
    """

    model_type = "openvla_chunks"

    action_steps: int = 8
    action_dim: int = 7
    action_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        assert self.image_token_id is not None
        if self.action_token_id is None:
            self.action_token_id = self.image_token_id + 1
        if self.action_steps < 1 or self.action_dim < 1:
            raise UnsupportedError(
                f"action_steps={self.action_steps} and action_dim={self.action_dim}; give whole numbers from 1 on."
            )
        if self.action_token_id == self.image_token_id or not 0 <= self.action_token_id < self.table_rows:
            raise UnsupportedError(
                f"action_token_id={self.action_token_id} must be a row of the embedding table ({self.table_rows} rows) "
                f"other than image_token_id={self.image_token_id}."
            )

    @property
    def action_queries(self) -> int:
        """S * A."""
        return self.action_steps * self.action_dim


def statistics_of(norm_stats: dict[str, Any] | None, unnorm_key: str | None) -> dict[str, Any]:
    """See `OpenVLAConfig.statistics`."""
    known = norm_stats or {}
    names = ", ".join(sorted(known)) or "none"
    if not known:
        raise InputError("norm_stats is empty: the checkpoint has no action statistics, so actions have no scale.")
    if unnorm_key is None and len(known) > 1:
        raise InputError(f"unnorm_key=None but norm_stats has several data sets; choose one of: {names}.")
    key = next(iter(known)) if unnorm_key is None else unnorm_key
    if key not in known:
        raise InputError(f"unnorm_key={key!r} is not in norm_stats; choose one of: {names}.")
    entry = known[key]
    action = entry.get("action") if isinstance(entry, dict) else None
    if not isinstance(action, dict) or not {"q01", "q99"} <= action.keys():
        raise InputError(f"norm_stats[{key!r}] has no 'action' with 'q01' and 'q99'; give the statistics of OpenVLA.")
    lengths = {name: len(action[name]) for name in ("q01", "q99", "mask") if action.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise InputError(f"norm_stats[{key!r}]['action'] has entries of different lengths: {lengths}.")
    return action
