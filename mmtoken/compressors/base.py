"""What a compressor is: settings in a frozen dataclass, facts on the class, one method per site."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, check_keep

Positions = Literal["keep", "renumber"]
Budget = Literal["exact", "at_most", "adaptive"]

SITES = ("prepare", "frames", "vision_layer", "project", "llm_input", "llm_layer")
"""Methods of a compressor that the engine calls, in the order in which a model reaches them."""

Need = Literal["tower_attention", "tower_keys", "text_attention", "next_attention", "content_seed"]
"""What a method reads besides the tokens: attention that patches receive in the tower, tower keys, the attention of
the last prompt token in a decoder layer, the same in the layer about to run, and a seed made from the pixels."""


class Context(ABC):
    """What a compressor may ask of the model during one call. Everything is aligned with the tokens handed in."""

    depth: int
    """Blocks of the tower (vision site) or layers of the decoder (other sites)."""

    tokenwise_projector: bool
    """Whether the projector maps every patch by itself, so that fewer patches may be projected."""

    original_counts: list[int]
    """Eligible tokens per item before any cut of this call."""

    scores: Tensor | None = None
    """float[B, N]: the attention that the method read last, for the report; None if it read none."""

    @abstractmethod
    def content_seed(self, tokens: VisualTokens) -> list[int]:
        """An integer per item from the exact bits of its pixels: equal for the same image in any batch or beam."""

    @abstractmethod
    def tower_attention(self, tokens: VisualTokens) -> Tensor:
        """float[B, N]: attention that each token receives from CLS in the tower block whose output is projected.

        Summed over heads. Towers without a CLS token: the mean over all patches as queries (VisionZip, section 3.1).
        Averaged over the patches of a token where the projector merges several.
        """

    @abstractmethod
    def tower_keys(self, tokens: VisualTokens) -> Tensor:
        """float[B, N, d]: head-averaged keys of the tokens in the same block (vision site: in the block just run)."""

    @abstractmethod
    def tower_cls(self, tokens: VisualTokens) -> Tensor | None:
        """float[B, D] the CLS token's features at the same place as `tokens.features`, or None without one."""

    @abstractmethod
    def text_attention(self, tokens: VisualTokens, layer: int) -> Tensor:
        """float[B, N]: head-mean attention that the prompt's last token pays to each token in decoder layer `layer`."""

    @abstractmethod
    def next_attention(self, tokens: VisualTokens) -> Tensor:
        """float[B, N]: the same in the layer about to run, from its own norm, query and key projections."""


class Compressor(ABC):
    """Base of all visual-token compressors.

    A subclass is a frozen dataclass whose first field is `keep`, and overrides the method of each site where it acts.
    It never sees a backbone: tokens come in rows of items (one image or video each) and go out the same way.

    Attributes:
        keep: budget per item: a fraction in (0, 1] as a float, a count as an int (per temporal step for videos).
        positions: "keep" leaves the surviving tokens their position ids; "renumber" compacts them.
        title, paper, licence: for people.
        needs: what the method reads besides the tokens.
        merges: whether surviving tokens' features change.
        size_bias: whether towers that take a mask add log(size) to their attention scores (ToMe, equation 1).
        query_agnostic, causal: whether it ignores the question, and needs no later frame.
        trainable: whether it has learned parts.
        control: whether it is a baseline that any method must beat.
        budget: how closely `keep` is met.
        identity_at_full: True if keep=1.0 is the plain model to the bit, else the reason why not.
        sites: names of the site methods that the class overrides.
    """

    keep: int | float
    positions: Positions

    title: ClassVar[str]
    paper: ClassVar[str]
    licence: ClassVar[str] = "written from the formulas; Apache-2.0"
    needs: ClassVar[frozenset[Need]] = frozenset()
    merges: ClassVar[bool] = False
    size_bias: ClassVar[bool] = False
    query_agnostic: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    trainable: ClassVar[bool] = False
    control: ClassVar[bool] = False
    budget: ClassVar[Budget] = "exact"
    identity_at_full: ClassVar[bool | str] = True
    sites: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.sites = frozenset(site for site in SITES if getattr(cls, site) is not getattr(Compressor, site))

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.positions not in ("keep", "renumber"):
            raise MMTokenError(f"positions={self.positions!r} is unknown; use 'keep' or 'renumber'.")

    # --- sites: override those where the method acts -------------------------------------------------------------

    def prepare(self, media: Any) -> Any:
        """Before the processor: images or frames (PIL images, or a sequence of them) in, the same out."""
        return media

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        """Before the tower: frames of one video float[F, ...] in, indices of those to encode int[K] out, ascending."""
        raise NotImplementedError

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        """Between tower blocks: tokens entering block `layer` (1 .. depth - 1) in, those that enter it out."""
        raise NotImplementedError

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        """Around the projector: patch features in, projected tokens out; call `default` to project, or never."""
        raise NotImplementedError

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        """Before the language model: projected tokens in, those that are spliced into the text out."""
        raise NotImplementedError

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        """Between decoder layers during prefill: hidden states entering layer `layer` in, the surviving ones out."""
        raise NotImplementedError

    # --- declarations that depend on the settings ------------------------------------------------------------------

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (0-based, ascending) for which `llm_layer` is called, for a decoder of `depth` layers."""
        return ()

    def score_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers whose `text_attention` is read."""
        return ()

    # --- as data -----------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The settings by name, JSON-ready."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"class_path": ..., "init_args": ...}`, the form of YAML files, hub JSON and the command line."""
        module = type(self).__module__
        # mmtoken's own are named where they are public, so that files outlive a move; others where they are.
        package = "mmtoken.compressors" if module.startswith("mmtoken.compressors.") else module
        return {"class_path": f"{package}.{type(self).__name__}", "init_args": self.settings()}


def check_whole(field: str, value: object, lowest: int) -> None:
    """Refuse a setting that is not a whole number of at least `lowest`.

    Raises:
        MMTokenError: it is a bool, another type, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise MMTokenError(f"{field}={value!r} is a {type(value).__name__}; give an int of at least {lowest}.")
    if value < lowest:
        raise MMTokenError(f"{field}={value!r} is too small; give an int of at least {lowest}.")


def check_layers(field: str, layers: Sequence[int], depth: int, lowest: int) -> None:
    """Refuse decoder layers that a model of `depth` layers does not have.

    Raises:
        UnsupportedError: a layer is below `lowest` or not below `depth`.
    """
    for layer in layers:
        if not lowest <= layer < depth:
            raise UnsupportedError(
                f"{field}={layer} but this decoder has {depth} layers; choose from {lowest} to {depth - 1}."
            )
