"""What the engine needs to know about a family of models: where its parts are and how its tokens are laid out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmtoken.errors import UnsupportedError
from mmtoken.tokens import Grid

Modality = Literal["image", "video"]


_CLIP_SCALE = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF_SCALE = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Tower:
    """A vision transformer and where its parts are.

    Attributes:
        module: the module that takes pixels.
        blocks: its transformer blocks, in order.
        feature_block: index of the block whose output the projector reads.
        prefix: tokens before the patches (CLS, registers).
        unit: side of the square of patches that become one projected token.
        heads: attention heads.
        packed: whether patches of all images form one sequence [S, D] (Qwen) instead of [tiles, patches, D].
        attention: attribute of a block that holds its attention.
        queries, keys, values: attributes of the attention that project them; the same name if they are fused, which
            means one linear map with the rows of all queries, then all keys, then all values.
        output: attribute of the attention that projects what it mixed.
        norms: attributes of a block that hold the norms before attention and MLP.
        mlp: attribute of a block that holds its MLP.
        sequential: whether a block is attention and then MLP, each behind its norm and added to what it was given.
        mergers: modules that turn a packed sequence into projected tokens.
        window: side of an attention window in projected tokens, None without window attention.
        masks_attention: whether a block's attention takes a mask but the block itself does not hand one on.
        pooling: the `nn.MultiheadAttention` that pools the output over all patches (SigLIP's head), None without one.
        split: queries, keys and values float[tiles, S, H * d], before rotation, of an attention and of what enters it,
            where it has no module for each; None: what `queries`, `keys` and `values` put out.
        rotate: an attention, queries or keys float[tiles, H, P, d] of patches and its rotary tables to rotated ones,
            for dense towers that hand each block `rope`; None: they do not.
        mask: the argument of a block that takes an attention mask.
        mask_per_head: whether it wants one per tile and head, float[tiles * H, S, S].
        any_mask: whether its attention takes masks whatever computes it; else with transformers' sdpa and eager only.
        last: the module whose output is the sequence that the tower ends with; None: its own output is.
        entries: methods of `module` that run it from the pixels up to `last`, apart from forward.
        closed: methods of `module` that run its blocks and put out what lies between them.
        pools: whether the output is made of all patches that are left, without a mask.
        opaque: whether its blocks run on a sequence that is neither of those under `packed`, so that nothing can act in
            it or read from it.
    """

    module: nn.Module
    blocks: nn.ModuleList
    feature_block: int
    prefix: int
    unit: int
    heads: int
    packed: bool = False
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    output: str = "out_proj"
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    mlp: str = "mlp"
    sequential: bool = True
    mergers: tuple[nn.Module, ...] = ()
    window: int | None = None
    pooling: nn.Module | None = None
    split: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    rotate: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    mask: str = "attention_mask"
    mask_per_head: bool = False
    any_mask: bool = False
    last: nn.Module | None = None
    entries: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    pools: bool = False
    masks_attention: bool = False
    opaque: bool = False


@dataclass(frozen=True)
class Layout:
    """How the encoded items of one call lie in the language model's input.

    Attributes:
        counts: tokens per item, separators included.
        grids: (frames, rows, columns) per item, None where its tokens are not one grid.
        protected: bool[sum(counts)], separators such as newline tokens.
        crops: int[sum(counts)], for each token of a picture that is cut into crops the number of its crop (1, 2, ... in
            reading order), 0 for its thumbnail and for pictures that are not cut; None: the call does not tell.
    """

    counts: list[int]
    grids: tuple[Grid | None, ...]
    protected: Tensor
    crops: Tensor | None = None


class Backbone(ABC):
    """One family of models. Adapters know no method; they hold no state besides the model."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    module_types: ClassVar[tuple[str, ...]] = ()
    """Classes from outside transformers that the adapter serves, by their full names."""
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    dynamic_resolution: ClassVar[bool] = False
    """Whether the number of visual tokens follows the size of the image, so that down-scaling before the processor
    saves tokens."""
    whole: ClassVar[bool] = True
    """Whether these are vision-language models, and not one half of one."""
    tokenwise_projector: ClassVar[bool] = False
    """Whether the projector maps patch by patch, gets an item per row, and nothing re-samples its output."""
    plain_tower: ClassVar[bool] = True
    """Whether the projector reads the tower's states alone. Where it reads several towers side by side, no patch may
    leave between their blocks, and the CLS of one of them means nothing to the projector."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def root(self) -> Any:
        """The module whose forward splices visual features into the text and calls the decoder.

        Typed `Any`, as are the modules below it: they are reached by attribute, which `nn.Module` types too widely.
        """
        return self.model.base_model

    @property
    def decoder(self) -> Any:
        """The text model: has `layers`, `rotary_emb` and `config`. None for a bare tower."""
        return self.root.language_model

    @abstractmethod
    def tower(self) -> Tower | None:
        """The vision tower, None for a bare decoder."""

    def tower_refusal(self) -> str | None:
        """Why the tower cannot be compressed in its present state, None if it can; asked before each call of it."""
        return None

    def video_tower(self) -> Tower | None:
        """The tower that encodes videos: `tower()`, unless the family has another one of the same shape for them."""
        return self.tower()

    def towers(self) -> list[Tower]:
        """Every vision tower once, but for opaque ones."""
        towers = (self.tower(), self.video_tower())
        found = {id(tower.module): tower for tower in towers if tower is not None and not tower.opaque}
        return list(found.values())

    def projector(self) -> nn.Module | None:
        """The module that maps patches to the decoder's width; only needed where `tokenwise_projector` holds."""
        return None

    def pooled_projector(self) -> nn.Module | None:
        """The module whose output float[frames, patches, D] the model pools for videos; None: videos are not pooled."""
        return None

    def unpooled(self, call: Mapping[str, Any], projected: Tensor) -> list[Tensor]:
        """The output of `pooled_projector` in a `get_video_features` call, per video as float[frames, h, w, D]."""
        raise UnsupportedError(f"{self.name} does not pool videos.")

    def pictures(self, call: Mapping[str, Any]) -> list[Tensor]:
        """The videos of a `get_video_features` call as normalised pictures float[F, 3, H, W], one per grid step."""
        raise UnsupportedError(f"{self.name} encodes no videos, so there are no frames to look at.")

    def pixel_scale(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation per colour with which the family's processors normalise pictures."""
        kind = str(self.model.config.vision_config.model_type)
        return _CLIP_SCALE if kind.startswith(("clip", "qwen2")) else _HALF_SCALE

    @property
    def action_queries(self) -> int:
        """How many tokens at the end of each prompt row are action queries of a policy that answers in one forward.

        Methods that ask for the prompt's text or its rows do not see them, and what they look at is recorded in the
        place of generated tokens.
        """
        return 0

    @property
    def feature_layers(self) -> int:
        """How many tower layers the projector reads side by side."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        return len(layers) if isinstance(layers, list | tuple) else 1

    def patch_grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of pictures float[tiles, C, H, W]."""
        tower = self.tower()
        assert tower is not None
        module: Any = tower.module
        patch = module.config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        return pixels.shape[-2] // rows, pixels.shape[-1] // columns

    def widths(self) -> tuple[int, int]:
        """Channels of the tower's states, and of what the projector reads."""
        width = int(self.model.config.vision_config.hidden_size)
        return width, width * self.feature_layers

    def placeholder_ids(self, modality: Modality) -> int:
        """The token id that marks the place of visual tokens in the prompt."""
        return int(getattr(self.model.config, f"{modality}_token_id"))

    @abstractmethod
    def layout(self, modality: Modality, call: Mapping[str, Any], tiles: int) -> Layout:
        """Lay out the items of one `get_{modality}_features` call.

        Args:
            modality: "image" or "video".
            call: the arguments of that call by name.
            tiles: rows that the tower processed.
        """

    def prompt_crops(self, ids: Tensor, places: list[Tensor]) -> list[tuple[int, bool]] | None:
        """Which items of one prompt are crops of a picture, for families whose crops are items of their own.

        Args:
            ids: int[L], the token ids of the prompt.
            places: int[n] positions of each item, in order.

        Returns:
            Per item (number of the crop, whether its picture is cut): (1, True), (2, True), ... for crops, (0, True)
            for the thumbnail behind them, (0, False) for a picture that is not cut. None: crops are no items.
        """
        return None

    @abstractmethod
    def to_prompt(self, modality: Modality, call: Mapping[str, Any], values: Tensor) -> Tensor:
        """Carry per-patch values the way the model carries its features into the prompt.

        Args:
            modality: "image" or "video".
            call: the arguments of the `get_{modality}_features` call.
            values: float[tiles, patches, C], or float[units, C] for packed towers.

        Returns:
            float[tokens, C]: averaged, re-sampled and re-ordered like the features; 0 at separators.
        """

    @abstractmethod
    def item_pixels(self, modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        """The pixel values of each item, without padding that depends on the batch."""

    def clips(self, call: Mapping[str, Any]) -> list[Tensor]:
        """The videos of a `get_video_features` call, each float[frames, ...] (Qwen: temporal steps)."""
        raise UnsupportedError(f"{self.name} encodes no videos, so no frames can be left out.")

    def with_frames(self, call: Mapping[str, Any], picks: list[Tensor]) -> dict[str, Any]:
        """The same call with frames `picks` int[K] of each video only."""
        raise UnsupportedError(f"{self.name} encodes no videos, so no frames can be left out.")


def hidden_state_block(layer: int | list[int], blocks: int) -> int:
    """Index of the block that produces `hidden_states[layer]` (entry 0 are the embeddings).

    Of several layers (multi-layer features) the last one counts.
    """
    last = layer if isinstance(layer, int) else layer[-1]
    return (last if last >= 0 else blocks + 1 + last) - 1


def feature_tower(model: Any, module: Any) -> Tower:
    """A CLIP- or SigLIP-like tower in front of a projector that reads `vision_feature_layer` of the configuration.

    Args:
        model: the whole model.
        module: its tower.
    """
    vision, blocks = model.config.vision_config, module.encoder.layers
    return Tower(
        module=module,
        blocks=blocks,
        feature_block=hidden_state_block(model.config.vision_feature_layer, len(blocks)),
        # SigLIP has no CLS; a CLIP tower has one, which the select strategy "default" drops.
        prefix=int(vision.model_type == "clip_vision_model"),
        unit=1,
        heads=vision.num_attention_heads,
    )


def numbered_crops(last: list[bool]) -> list[tuple[int, bool]]:
    """What `Backbone.prompt_crops` returns, where a picture's tiles follow each other.

    Args:
        last: per tile of a prompt, whether it is the last one of its picture, the thumbnail if that is cut.
    """
    found: list[tuple[int, bool]] = []
    crop = 0
    for end in last:
        cut = not end or crop > 0
        crop = 0 if end else crop + 1
        found.append((crop, cut))
    return found


def patch_side(model: Any) -> int:
    """Rows, and columns, of patches that the tower makes of a square picture."""
    vision = model.config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def unit_mean(values: Tensor, rows: int, columns: int, unit: int) -> Tensor:
    """Average float[tiles, rows * columns, C] over squares of unit x unit patches: float[tiles, R * C / unit^2, C]."""
    tiles, _, width = values.shape
    blocks = values.reshape(tiles, rows // unit, unit, columns // unit, unit, width)
    return blocks.mean((2, 4)).flatten(1, 2)


def prefix_flags(length: int, device: torch.device) -> Tensor:
    """bool[length], all False: no separators."""
    return torch.zeros(length, dtype=torch.bool, device=device)
