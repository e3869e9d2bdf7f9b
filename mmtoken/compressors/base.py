"""What a compressor is: settings in a frozen dataclass, facts on the class, one method per site."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mmtoken.compressors.pretrained import Pretrained
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, check_keep

Positions = Literal["keep", "renumber"]
Budget = Literal["exact", "at_most", "adaptive"]

Parity = Literal["official code", "oracle only"]
Cost = Literal["rows", "pairs"]
TowerCut = Literal["block", "mlp"]

SITES = (
    "prepare",
    "frames",
    "refresh",
    "vision_layer",
    "project",
    "llm_input",
    "llm_layer",
    "cache",
    "retain",
    "evict",
    "retrieve",
)
"""Methods of a compressor that the engine calls, in the order in which a model reaches them."""

STREAM_SITES = ("retain", "evict", "retrieve")
"""Those that only a stream has: what is held of a frame, which frame leaves, and what comes back for a question."""

Need = Literal[
    "tower_attention",
    "tower_keys",
    "tower_states",
    "tower_features",
    "text_attention",
    "next_attention",
    "decoder_states",
    "transitions",
    "text",
    "prompt",
    "history",
    "content_seed",
    "unpooled",
    "pixels",
]
"""What a method reads besides the tokens, named as the `Context` methods that give it.

Attention that patches receive in the tower, and tower keys; queries, keys and values of the tower block that has just
run; outputs of several tower blocks; attention of prompt tokens in a decoder layer, and in the layer about to run;
queries, keys and values of a decoder layer; how a decoder layer changes its tokens; the prompt's text tokens (at the
decoder), and its text before anything is encoded; attention of generated tokens in earlier calls; a seed made from the
pixels; patches of a video before the model pools them; a video's frames as pictures.
"""

Rows = Literal["last", "after", "text", "all"] | Tensor
"""Whose attention is meant: the prompt's last token; all text tokens after the item's last token; all text tokens;
every token of the prompt; or bool[B, T], a choice among the tokens of `Context.text`."""


@dataclasses.dataclass(frozen=True)
class TextTokens:
    """The text tokens of the prompt row of each item, in order.

    Attributes:
        features: float[B, T, D], at the place where the method acts.
        embeddings: float[B, T, D], as they entered the decoder.
        valid: bool[B, T], False on padding.
        after: bool[B, T], whether the token comes after the item's last token.
    """

    features: Tensor
    embeddings: Tensor
    valid: Tensor
    after: Tensor


@dataclasses.dataclass(frozen=True)
class States:
    """Queries, keys and values of tokens in one decoder layer, detached.

    Attributes:
        query: float[B, H, N, d], rotated.
        key: float[B, G, N, d], rotated.
        value: float[B, G, N, d].
        cosine, sine: float[B, N, d], the rotary tables at the tokens' positions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cosine: Tensor
    sine: Tensor


@dataclasses.dataclass(frozen=True)
class TowerStates:
    """Queries, keys and values of tokens in the tower block that has just run, detached; rotated where it rotates.

    Attributes:
        query, key, value: float[B, H, N, M, d]; a token is M patches (1 where every patch is projected by itself).
        prefix_query, prefix_key, prefix_value: float[B, H, P, d] of CLS and registers, CLS first, and behind them of
            `guests`; P is 0 without any.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_query: Tensor
    prefix_key: Tensor
    prefix_value: Tensor


@dataclasses.dataclass(frozen=True)
class Transition:
    """How one module of a decoder layer changed the tokens of each item's prompt row.

    x is what enters the module (after its norm), y what it puts out (before the residual is added).

    Attributes:
        magnitude: float32[B, n], |y| / |x|, of every token of the row as that layer saw it.
        cosine: float32[B, n], cos(x, y).
        valid: bool[B, n], False on padding.
        index: int[B, N], where in the row the item's tokens are.
    """

    magnitude: Tensor
    cosine: Tensor
    valid: Tensor
    index: Tensor


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """One decoder layer's keys and values right after the prefill.

    Attributes:
        keys, values: float[B, G, n, d]; keys are rotated.
        queries: float[B, H, q, d], rotated, of the prompt tokens fed in this call; the last q of the n entries.
        unrotated: float[B, H, q, d], the same before the rotary embedding.
        valid: bool[B, n], False on padding.
        item: int[B, n], number of the item within its row (0, 1, ...) for visual tokens that may be dropped, -1 for
            text, separators and padding.
        length: int[B], position id that the next token of each row will have.
        scaling: factor on the dot products of the attention.
        rotary: (cosine, sine) float[B, p, d] of positions int[B, p]; 1 and 0 where the layer does not rotate.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    unrotated: Tensor
    valid: Tensor
    item: Tensor
    length: Tensor
    scaling: float
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class StreamFrame:
    """A temporal step of a stream that has just passed the decoder.

    Attributes:
        number: 0, 1, ... in the stream.
        time: seconds.
        embeddings: float[n, D], as they entered the decoder (separators included).
        keys, values: per decoder layer float[G, n, d]; keys before the rotary embedding.
        attention: of a layer and a row (negative: from the end), float32[n]: attention that the row paid to each row
            of the step, mean over heads.
    """

    number: int
    time: float
    embeddings: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    attention: Callable[[int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class HeldFrame:
    """What a stream holds of an earlier step.

    Attributes:
        number: 0, 1, ... in the stream.
        time: seconds.
        rows: decoder positions that are held of it, in every layer.
        embedding: float[D], the last of its rows as it entered the decoder.
    """

    number: int
    time: float
    rows: int
    embedding: Tensor


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a model that learned parts depend on.

    Attributes:
        tower: width of the tower's patch features.
        tokens: width of the tokens that `project` is handed (`tower`, or `llm` where the projector is not token-wise).
        llm: width of the decoder.
        blocks: tower blocks up to the one that the projector reads.
    """

    tower: int
    tokens: int
    llm: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Recording:
    """What the engine records of generated tokens for `Context.history`.

    Attributes:
        layers: decoder layers whose attention is recorded, averaged over them.
        tokens: how many of the last generated tokens count.
        calls: how many calls back the history reaches.
    """

    layers: tuple[int, ...]
    tokens: int
    calls: int


class Context:
    """What a compressor may ask of the model during one call. Everything is aligned with the tokens handed in.

    Each site offers what exists there; the rest raises `UnsupportedError`.
    """

    depth: int
    """Tower blocks up to the one that the projector reads (tower and projector sites), or layers of the decoder."""

    blocks: int = 0
    """All blocks of the tower (tower and projector sites)."""

    tokenwise_projector: bool = False
    """Whether the projector maps every patch by itself, so that fewer patches may be projected."""

    original_counts: list[int]
    """Eligible tokens per item before any cut at this stage (the tower, or the decoder)."""

    encoded_counts: list[int]
    """Eligible tokens per item before any cut at all, also those in the tower (decoder sites)."""

    steps: list[int]
    """Temporal grid steps per item (1 for images), over which an int budget is pooled (decoder sites)."""

    memory: dict[str, Any]
    """What the method wants to remember until the next call of one of its sites in the same pass (running scores).

    In a stream it lives as long as the stream. Put new values in, and change none in place: a stream goes back to an
    earlier copy of the dictionary where a step is not to count."""

    cropped: list[bool] | None = None
    """Per item, whether it is, or belongs to, a picture that is cut into crops: `tokens.item` then numbers them, 0 is
    the thumbnail. None where pictures are not cut."""

    streaming: bool = False
    """Whether the tokens are one step of a stream: `llm_input` may then append tokens behind those that came."""

    scores: Tensor | None = None
    """float[B, N]: the attention that the method read last, for the report; None if it read none."""

    timings: dict[str, float] | None = None
    """Seconds of parts of its work that the method wants to see in the report, by name; part of the call's seconds."""

    learned: Any = None
    """The module that `Compressor.build` made, with its trained weights; None for methods without learned parts."""

    def _missing(self, name: str) -> UnsupportedError:
        return UnsupportedError(f"{name} does not exist at this site, or was not declared in `needs`.")

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        """An integer per item from the exact bits of its pixels: equal for the same image in any batch or beam."""
        raise self._missing("content_seed")

    def pixels(self, tokens: VisualTokens) -> list[Tensor | None]:
        """Per item uint8[F, H, W, 3]: the frames of a video as the model is shown them (of each temporal grid step the
        first one); None for images.

        Un-normalised with the mean and deviation that the family's processors use, so a processor with others gives
        other colours.
        """
        raise self._missing("pixels")

    # --- the tower --------------------------------------------------------------------------------------------------

    def tower_attention(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        """float[B, N]: attention that each token receives from CLS in a tower block.

        Softmax over CLS and patches, summed over heads. Towers without a CLS token: the mean over all patches as
        queries (VisionZip, section 3.1). Averaged over the patches of a token where the projector merges several.

        Args:
            tokens: the tokens.
            block: one of `tower_layers`; None: the block whose output is projected.
            joint: one softmax of the full-width dot product / sqrt(width) instead of one per head.
        """
        raise self._missing("tower_attention")

    def tower_keys(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        """float[B, N, d]: head-averaged keys in a block (vision site: in the block just run); `joint`: all heads'."""
        raise self._missing("tower_keys")

    def tower_cls(self, tokens: VisualTokens) -> Tensor | None:
        """float[B, D] the CLS token's features at the same place as `tokens.features`, or None without one."""
        return None

    def tower_states(self, tokens: VisualTokens) -> TowerStates:
        """Queries, keys and values in the tower block that has just run (vision site)."""
        raise self._missing("tower_states")

    def tower_features(self, tokens: VisualTokens, blocks: Sequence[int]) -> Tensor:
        """float[B, N, len(blocks) * D]: outputs of the tower blocks in `tower_layers`, side by side (project site)."""
        raise self._missing("tower_features")

    # --- the prompt before anything is encoded ----------------------------------------------------------------------

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        """float[B, D_llm]: mean input embedding of the text tokens of each item's prompt row."""
        raise self._missing("prompt_embedding")

    def question_state(self, tokens: VisualTokens) -> Tensor:
        """float[B, D_llm]: the decoder's last hidden state at the last text token, from a pass over the text alone."""
        raise self._missing("question_state")

    def prompt_ids(self, tokens: VisualTokens) -> list[Tensor]:
        """Per item int[T]: the token ids of the text of its prompt row, chat template included, in order."""
        raise self._missing("prompt_ids")

    def to_llm(self, tokens: VisualTokens) -> Tensor:
        """float[B, N, D_llm]: patch features as the model's own projector maps them, where it maps patch by patch."""
        raise self._missing("to_llm")

    # --- before the model pools -------------------------------------------------------------------------------------

    def unpooled(self, tokens: VisualTokens) -> list[Tensor | None]:
        """Per item float[F, h, w, D]: its projected patches before the model pools them (LLaVA-OneVision's videos).

        Frame by frame as in `grid`, also frames whose tokens are gone; with gradients. Where nothing is pooled, the
        tokens of the grid as they enter the decoder. None for items on no grid.
        """
        raise self._missing("unpooled")

    # --- the decoder ------------------------------------------------------------------------------------------------

    def text(self, tokens: VisualTokens) -> TextTokens:
        """The text tokens of each item's prompt row."""
        raise self._missing("text")

    def embeddings(self, tokens: VisualTokens) -> Tensor:
        """float[B, N, D]: the tokens as they entered the decoder."""
        raise self._missing("embeddings")

    def text_attention(self, tokens: VisualTokens, layer: int, rows: Rows = "last") -> Tensor:
        """float[B, N]: attention that `rows` pay to each token in decoder layer `layer`, mean over heads and rows."""
        raise self._missing("text_attention")

    def next_attention(self, tokens: VisualTokens, rows: Rows = "last") -> Tensor:
        """float[B, N]: the same in the layer about to run, from its own norm, query and key projections."""
        raise self._missing("next_attention")

    def head_attention(self, tokens: VisualTokens, layer: int, rows: Tensor) -> Tensor:
        """float[B, H, R, N]: the same per head and row; `rows` bool[B, T], R the most rows of an item, 0 beyond."""
        raise self._missing("head_attention")

    def decoder_states(self, tokens: VisualTokens, layer: int) -> States:
        """Queries, keys and values of the tokens in decoder layer `layer`."""
        raise self._missing("decoder_states")

    def text_states(self, tokens: VisualTokens, layer: int) -> States:
        """The same of the tokens of `text`."""
        raise self._missing("text_states")

    def final_norm(self, features: Tensor) -> Tensor:
        """The decoder's last norm applied to hidden states float[..., D]."""
        raise self._missing("final_norm")

    def transition(self, tokens: VisualTokens, layer: int, module: Literal["attention", "mlp"]) -> Transition:
        """How a module of a layer in `watched_layers` changed the tokens."""
        raise self._missing("transition")

    def history(self, tokens: VisualTokens) -> Tensor:
        """float32[h, B, N]: attention of the action tokens of earlier calls to each token, oldest call first."""
        raise self._missing("history")


class Compressor(Pretrained, ABC):
    """Base of all visual-token compressors.

    A subclass is a frozen dataclass whose first field is `keep`, and overrides the method of each site where it acts.
    It never sees a backbone: tokens come in rows of items (one image or video each) and go out the same way.

    Attributes:
        keep: budget per item: a fraction in (0, 1] as a float, a count as an int (per temporal step for videos).
        positions: "keep" leaves the surviving tokens their position ids; "renumber" compacts them.
        title, paper, year, licence: for people.
        parity: whether it is held against numbers of the official code, or only against an independent oracle of ours.
        cost: whether scoring needs memory for single rows of attention and similarity, or for pairs, taken in tiles.
        needs: what the method reads besides the tokens.
        merges: whether surviving tokens' features change.
        size_bias: whether towers that take a mask add log(size) to their attention scores (ToMe, equation 1).
        tower_cut: where in a tower block `vision_layer` acts: as the "block" begins, or between its attention and its
            "mlp".
        query_agnostic, causal: whether it ignores the question, and needs no later frame.
        trainable: whether it has learned parts.
        patchwise_projector: whether it works only where the projector maps every patch by itself.
        control: whether it is a baseline that any method must beat.
        budget: how closely `keep` is met.
        identity_at_full: True if keep=1.0 is the plain model to the bit, else the reason why not.
        sites: names of the site methods that the class overrides.
        nested: names of the settings that hold other compressors.
    """

    keep: int | float
    positions: Positions

    title: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    parity: ClassVar[Parity] = "oracle only"
    cost: ClassVar[Cost] = "rows"
    licence: ClassVar[str] = "written from the formulas; Apache-2.0"
    needs: ClassVar[frozenset[Need]] = frozenset()
    merges: ClassVar[bool] = False
    size_bias: ClassVar[bool] = False
    tower_cut: ClassVar[TowerCut] = "block"
    query_agnostic: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    trainable: ClassVar[bool] = False
    patchwise_projector: ClassVar[bool] = False
    control: ClassVar[bool] = False
    budget: ClassVar[Budget] = "exact"
    identity_at_full: ClassVar[bool | str] = True
    sites: ClassVar[frozenset[str]] = frozenset()
    nested: ClassVar[tuple[str, ...]] = ()

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

    def refresh(self, keys: Tensor, reference: Tensor, block: int, ctx: Context) -> Tensor:
        """Inside a tower block: which patches of a frame are computed anew, the others taken from its reference frame.

        Frames are handed in side by side (F of them, of one or several videos), and each must get what it would get
        alone. `references` says which frames come here at all, `refresh_count` how many patches of each are computed.

        Args:
            keys: float[F, T, C], the frames' key projections in this block, all heads side by side, before any rotary
                embedding. CLS and registers count as patches.
            reference: float[F, T, C], those of the reference frame of each.
            block: 0, 1, ... of all blocks of the tower; a call starts at 0.
            ctx: gives `memory`, which lives as long as these frames are in the tower.

        Returns:
            int[F, K], K = `refresh_count(T)`, without repetitions.
        """
        raise NotImplementedError

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        """Inside the tower: tokens at block `layer` in, those that are left of them out.

        With `tower_cut` "block" they are what enters a block (1 .. depth - 1), with "mlp" what its attention leaves
        (0 .. depth - 1). What the context says of "the block that has just run" is block `layer` itself then.
        """
        raise NotImplementedError

    def guests(self, cls: Tensor | None, layer: int, ctx: Context) -> Tensor | None:
        """Tokens float[B, E, D] that attend in tower block `layer` with its own and leave before its MLP; None: none.

        Only asked of methods that cut there (`tower_cut` "mlp"), also in blocks where `vision_layer` changes nothing.

        Args:
            cls: float[B, D], the CLS token that enters the block, None without one.
            layer: 0 .. depth - 1.
            ctx: gives `memory`.
        """
        return None

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

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        """After a layer's prefill: bool[B, G, n], which entries stay; of each row the same number for every head."""
        raise NotImplementedError

    # --- sites that only a stream has --------------------------------------------------------------------------------

    def retain(self, frame: StreamFrame, ctx: Context) -> Tensor | Sequence[Tensor]:
        """After a step has passed the decoder: int[K], which of its rows are held; or one int[K] per layer."""
        raise NotImplementedError

    def evict(self, held: Sequence[HeldFrame], over: bool, ctx: Context) -> int | None:
        """Which of the held steps leaves, oldest first in `held`; the newest is its last. None: none does.

        Args:
            held: at least two steps.
            over: whether more is held than the stream may hold; None is no answer then.
            ctx: gives `memory`.
        """
        raise NotImplementedError

    def retrieve(self, blocks: Tensor, queries: Tensor, layer: int, ctx: Context) -> Tensor:
        """Which steps that have left come back for a question in this decoder layer: int[K], ascending.

        Args:
            blocks: float[S, G, d], mean key of each stored step before the rotary embedding, oldest first.
            queries: float[H, q, d], of the question's tokens before the rotary embedding.
            layer: decoder layer.
            ctx: gives `memory`.
        """
        raise NotImplementedError

    # --- declarations that depend on the settings ------------------------------------------------------------------

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (0-based, ascending) for which `llm_layer` is called, for a decoder of `depth` layers."""
        return ()

    def score_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers whose attention or states are read."""
        return ()

    def watched_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers whose `transition` is read."""
        return ()

    def recording(self, depth: int) -> Recording | None:
        """What to record of generated tokens for `history`; None: nothing."""
        return None

    def sees_window(self) -> bool:
        """Whether a question in a stream sees all held steps; if not, they are among the blocks of `retrieve`."""
        return True

    def held_steps(self) -> int | None:
        """How many times what the first step holds a stream may hold, where nobody says; None: as usual for streams."""
        return None

    def encoder_keep(self) -> int | float:
        """Budget of tokens that enter the decoder, for methods that cut in the tower and again in the decoder.

        Methods that decide how many to keep have decided already when this is asked.
        """
        return 1.0 if self.budget == "adaptive" else self.keep

    def vision_keep(self) -> int | float:
        """Budget of what `vision_layer` leaves for `project`, where the projector joins patches."""
        return 1.0

    def references(self, number: int) -> bool:
        """Whether frame `number` of a video (0, 1, ...) is computed in full and is the reference of those after it.

        A frame before which there is none, or only one of another size, is one in any case.
        """
        return True

    def refresh_count(self, patches: int) -> int:
        """How many patches of a frame of `patches` patches `refresh` chooses; all of them: it is never asked."""
        return patches

    def calibrates(self) -> bool:
        """Whether merged tokens get log(size) on their attention scores in every decoder layer."""
        return False

    def hides(self) -> bool:
        """Whether tokens that are let go stay in the decoder's sequence, unseen by the others (as mode="mask")."""
        return False

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        """Tower blocks besides the one that the projector reads whose attention, keys or features are read.

        Args:
            depth: blocks up to the one that the projector reads.
            blocks: all blocks of the tower; those beyond run too, and may be read.
        """
        return ()

    # --- learned parts -----------------------------------------------------------------------------------------------

    def build(self, dims: Dims) -> nn.Module:
        """A fresh module with the learned parts, for a model of these sizes."""
        raise MMTokenError(f"{type(self).__name__} has no learned parts.")

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
