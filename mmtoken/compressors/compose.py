"""Several methods as one compressor: a list of parts, and a list whose budgets follow from a single `keep`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtoken.compressors.base import (
    SITES,
    Budget,
    CacheEntry,
    Compressor,
    Context,
    Dims,
    HeldFrame,
    Positions,
    Recording,
    StreamFrame,
)
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, check_keep, kept_count

_TOWER = ("vision_layer", "project")
_SINGLE = {
    "refresh": "inside tower blocks",
    "project": "around the projector",
    "cache": "on the cache",
    "retain": "on what a stream holds of a frame",
    "evict": "on which frame of a stream leaves",
    "retrieve": "on what a stream brings back",
}
_BUDGETS: tuple[Budget, ...] = ("exact", "at_most", "adaptive")


class Composition(Compressor):
    """What `Sequential` and `Schedule` share: every part acts at its own sites, in the order of the list.

    Attributes:
        chain: the parts with the budgets and positions that they run with.
    """

    chain: tuple[Compressor, ...]
    calibrate: bool
    nested: ClassVar[tuple[str, ...]] = ("parts",)
    year: ClassVar[int] = 2026
    paper: ClassVar[str] = "composition"

    def _compose(self, chain: tuple[Compressor, ...]) -> None:
        """Check the order, and take over what the parts declare."""
        if not isinstance(self.calibrate, bool):
            raise MMTokenError(f"calibrate={self.calibrate!r} is no bool; give true or false.")
        for before, after in itertools.pairwise(chain):
            _check_order(before, after)
        for before, after in itertools.combinations(chain, 2):
            _check_room(before, after)
        positions = {part.positions for part in chain if part.sites != {"cache"}} or {"keep"}
        if len(positions) > 1:
            raise MMTokenError(
                f"positions of the parts are {[part.positions for part in chain]}; give all the same, since the "
                "surviving tokens have one position each."
            )
        cuts = {part.tower_cut for part in chain if "vision_layer" in part.sites} or {"block"}
        if len(cuts) > 1:
            raise MMTokenError(
                "parts act in the tower at two places, as a block begins and between its attention and its MLP; "
                "combine methods that act at the same one."
            )
        kept_whole = [part for part in chain if part.identity_at_full is not True]
        pairs = any(part.cost == "pairs" for part in chain)
        facts: dict[str, Any] = {
            "chain": chain,
            "positions": positions.pop(),
            "sites": frozenset().union(*(part.sites for part in chain)),
            "needs": frozenset().union(*(part.needs for part in chain)),
            "merges": any(part.merges for part in chain),
            "tower_cut": cuts.pop(),
            "size_bias": any(part.size_bias for part in chain),
            "query_agnostic": all(part.query_agnostic for part in chain),
            "causal": all(part.causal for part in chain),
            "trainable": any(part.trainable for part in chain),
            "patchwise_projector": any(part.patchwise_projector for part in chain),
            "budget": max((part.budget for part in chain), key=_BUDGETS.index),
            "cost": "pairs" if pairs else "rows",
            "parity": "official code" if all(part.parity == "official code" for part in chain) else "oracle only",
            "identity_at_full": str(kept_whole[0].identity_at_full) if kept_whole else True,
        }
        for name, value in facts.items():
            # The instance has these facts, not the class: they are those of the parts.
            object.__setattr__(self, name, value)

    # --- sites --------------------------------------------------------------------------------------------------------

    def _at(self, site: str) -> list[tuple[int, Compressor]]:
        return [(number, part) for number, part in enumerate(self.chain) if site in part.sites]

    def prepare(self, media: Any) -> Any:
        for _, part in self._at("prepare"):
            media = part.prepare(media)
        return media

    def frames(self, clip: Tensor, ctx: Context) -> Tensor:
        left = torch.arange(len(clip), device=clip.device)
        for _, part in self._at("frames"):
            left = left[part.frames(clip[left], ctx).to(left.device)]
        return left

    def refresh(self, keys: Tensor, reference: Tensor, block: int, ctx: Context) -> Tensor:
        ((number, part),) = self._at("refresh")
        with self._as_part(ctx, number, None):
            return part.refresh(keys, reference, block, ctx)

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return self._in_turn(self._at("vision_layer"), tokens, ctx, lambda part, t: part.vision_layer(t, layer, ctx))

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        ((number, part),) = self._at("project")
        with self._as_part(ctx, number, tokens):
            return part.project(tokens, default, ctx)

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        return self._in_turn(self._at("llm_input"), tokens, ctx, lambda part, t: part.llm_input(t, ctx))

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        acting = [(number, part) for number, part in self._at("llm_layer") if layer in part.cut_layers(ctx.depth)]
        return self._in_turn(acting, tokens, ctx, lambda part, t: part.llm_layer(t, layer, ctx))

    def cache(self, entry: CacheEntry, layer: int, ctx: Context) -> Tensor:
        ((number, part),) = self._at("cache")
        with self._as_part(ctx, number, None):
            return part.cache(entry, layer, ctx)

    def retain(self, frame: StreamFrame, ctx: Context) -> Tensor | Sequence[Tensor]:
        ((number, part),) = self._at("retain")
        with self._as_part(ctx, number, None):
            return part.retain(frame, ctx)

    def evict(self, held: Sequence[HeldFrame], over: bool, ctx: Context) -> int | None:
        ((number, part),) = self._at("evict")
        with self._as_part(ctx, number, None):
            return part.evict(held, over, ctx)

    def retrieve(self, blocks: Tensor, queries: Tensor, layer: int, ctx: Context) -> Tensor:
        ((number, part),) = self._at("retrieve")
        with self._as_part(ctx, number, None):
            return part.retrieve(blocks, queries, layer, ctx)

    def _in_turn(
        self,
        acting: list[tuple[int, Compressor]],
        tokens: VisualTokens,
        ctx: Context,
        act: Callable[[Compressor, VisualTokens], VisualTokens],
    ) -> VisualTokens:
        for place, (number, part) in enumerate(acting):
            read = ctx.scores
            with self._as_part(ctx, number, tokens):
                tokens = act(part, tokens)
            if place:  # reports show scores of the tokens that the site was handed, not of fewer ones
                ctx.scores = read
        return tokens

    @contextmanager
    def _as_part(self, ctx: Context, number: int, tokens: VisualTokens | None) -> Iterator[None]:
        """Show a part its own memory and weights; the tokens it is handed first at a stage are its original ones."""
        shared, learned, counts = ctx.memory, ctx.learned, ctx.original_counts
        mine = shared.setdefault(f"part {number}", {"memory": {}})
        ctx.memory = mine["memory"]
        ctx.learned = learned[str(number)] if self.chain[number].trainable and learned is not None else None
        if number and tokens is not None:
            if ctx.streaming:  # memory outlives the step, its counts do not
                mine.pop("counts", None)
            ctx.original_counts = mine.setdefault("counts", tokens.counts())
        try:
            yield
        finally:
            ctx.memory, ctx.learned, ctx.original_counts = shared, learned, counts

    # --- declarations -------------------------------------------------------------------------------------------------

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        cuts = [(part, part.cut_layers(depth)) for part in self.chain]
        cuts = [(part, layers) for part, layers in cuts if layers]
        for (before, early), (after, late) in itertools.pairwise(cuts):
            if late[0] < early[-1]:
                raise UnsupportedError(
                    f"parts: {_name(after)} cuts before layer {late[0]}, which is before {_name(before)} has made its "
                    f"last cut (layer {early[-1]}); change their layers, or their order."
                )
        return _union(layers for _, layers in cuts)

    def score_layers(self, depth: int) -> tuple[int, ...]:
        return _union(part.score_layers(depth) for part in self.chain)

    def watched_layers(self, depth: int) -> tuple[int, ...]:
        return _union(part.watched_layers(depth) for part in self.chain)

    def recording(self, depth: int) -> Recording | None:
        found = [recording for part in self.chain if (recording := part.recording(depth)) is not None]
        if len(found) > 1:
            raise UnsupportedError("parts: more than one of them records generated tokens; keep one.")
        return found[0] if found else None

    def tower_layers(self, depth: int, blocks: int) -> tuple[int, ...]:
        return _union(part.tower_layers(depth, blocks) for part in self.chain)

    def sees_window(self) -> bool:
        return all(part.sees_window() for part in self.chain)

    def held_steps(self) -> int | None:
        return max((part.held_steps() or 0 for part in self.chain), default=0) or None

    def encoder_keep(self) -> int | float:
        inside = [part for part in self.chain if "vision_layer" in part.sites]
        around = [part for part in self.chain if "project" in part.sites]
        return _together([part.encoder_keep() for part in inside or around])

    def vision_keep(self) -> int | float:
        around = [part for part in self.chain if "project" in part.sites]
        inside = [part for part in self.chain if "vision_layer" in part.sites and part not in around]
        return _together([part.encoder_keep() for part in inside])

    def references(self, number: int) -> bool:
        return all(part.references(number) for _, part in self._at("refresh"))

    def refresh_count(self, patches: int) -> int:
        return min((part.refresh_count(patches) for _, part in self._at("refresh")), default=patches)

    def calibrates(self) -> bool:
        return self.calibrate

    def hides(self) -> bool:
        return any(part.hides() for part in self.chain)

    def build(self, dims: Dims) -> nn.Module:
        """A module with an entry per trainable part, named by its place in the list."""
        return nn.ModuleDict({str(i): part.build(dims) for i, part in enumerate(self.chain) if part.trainable})

    def settings(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            if entry.init:
                value = getattr(self, entry.name)
                nested = entry.name in self.nested
                values[entry.name] = [part.to_dict() for part in value] if nested else value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Sequential(Composition):
    """Methods one after the other: VisionZip in the tower, then FastV between decoder layers, then SnapKV.

    Every part acts at its own sites, and a fraction that it keeps is one of the tokens that it is handed: two parts
    with keep=0.5 leave a quarter. (A part on the cache counts the tokens that entered the decoder, in every layer.)
    Parts that act at the same site run one after the other; no part may act before an earlier one of the list.

    What a class declares as facts (sites, needs, budget, ...) an instance has from its parts: the loosest of them.

    Attributes:
        parts: compressors, in the order in which they act.
        calibrate: add log(size) of merged tokens to their attention scores in every decoder layer, so that each weighs
            as much as the tokens it stands for (RESTORE, ICML 2026).
    """

    parts: tuple[Compressor, ...]
    calibrate: bool = False
    keep: int | float = field(init=False, repr=False, compare=False)
    positions: Positions = field(init=False, repr=False, compare=False)

    title: ClassVar[str] = "Sequential"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", check_parts(self.parts))
        object.__setattr__(self, "keep", self.parts[-1].keep)
        self._compose(self.parts)
        super().__post_init__()


@dataclass(frozen=True)
class Schedule(Composition):
    """Methods one after the other whose budgets follow from one: `keep` is what is left at the end.

    `Schedule(keep=64, parts=(FlowCut(), FastV()), ratios=(2.0, 1.0))` leaves 128 tokens after FlowCut and 64 after
    FastV, `Schedule(keep=0.1, ...)` a fifth and a tenth of the tokens. The budgets that the parts were made with do not
    count. Fractions are rounded at every part, so the end may be a token off `keep` times the number of tokens.

    Attributes:
        parts: compressors, in the order in which they act; see `Sequential`.
        ratios: how many times `keep` each part leaves, falling to 1.0; None: all of them 1.0.
        calibrate: see `Sequential`.
    """

    keep: int | float
    positions: Positions = "keep"
    parts: tuple[Compressor, ...] = ()
    ratios: tuple[float, ...] | None = None
    calibrate: bool = False

    title: ClassVar[str] = "Schedule"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", check_parts(self.parts))
        ratios = check_ratios(self.ratios, len(self.parts))
        object.__setattr__(self, "ratios", None if self.ratios is None else ratios)
        self._compose(self._budgets(ratios, positions := self.positions))
        if self.positions != positions:
            raise MMTokenError(f"positions={positions!r}, but no part moves tokens of a prompt; use 'keep'.")

    def _budgets(self, ratios: tuple[float, ...], positions: Positions) -> tuple[Compressor, ...]:
        """The parts with their own budgets: counts, or fractions of what each of them is handed."""
        chain: list[Compressor] = []
        handed = entered = 1.0
        for part, ratio in zip(self.parts, ratios, strict=True):
            on_cache = part.sites == {"cache"}
            changes: dict[str, Any] = {} if on_cache else {"positions": positions}
            if part.sites == {"refresh"}:
                raise MMTokenError(
                    f"parts: {_name(part)} leaves every token, so that no budget can be shared with it; use Sequential."
                )
            share = min(1.0, self.keep * ratio)
            if isinstance(self.keep, int):
                changes["keep"] = max(1, math.floor(self.keep * ratio + 0.5))
            else:
                changes["keep"] = min(1.0, share / (entered if on_cache else handed))
            if not any(entry.name == "keep" and entry.init for entry in dataclasses.fields(part)):  # type: ignore[arg-type]
                raise MMTokenError(f"parts: {_name(part)} has no keep of its own; list its parts in the Schedule.")
            chain.append(dataclasses.replace(part, **changes))  # type: ignore[type-var]
            if part.sites - {"llm_layer", "cache"}:
                # Some cut in the tower and once more in the decoder.
                inside = chain[-1].encoder_keep()
                entered = handed * inside if isinstance(inside, float) and part.budget != "adaptive" else share
            handed = share
        return tuple(chain)


def check_parts(parts: object) -> tuple[Compressor, ...]:
    """The parts of a composition as a tuple.

    Raises:
        MMTokenError: they are no list of compressors, or empty.
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
        raise MMTokenError(f"parts={parts!r} is no list of compressors; give for example [VisionZip(), FastV()].")
    for part in parts:
        if not isinstance(part, Compressor):
            raise MMTokenError(
                f"parts: {part!r} is a {type(part).__name__}; give compressors (names and dicts go through resolve())."
            )
        if not part.sites:
            raise MMTokenError(f"parts: {_name(part)} acts nowhere; leave it out.")
    return tuple(parts)


def check_ratios(ratios: object, count: int) -> tuple[float, ...]:
    """Ratios of a schedule as a tuple, one per part.

    Raises:
        MMTokenError: they are no numbers, not one per part, grow, or do not end at 1.0.
    """
    if ratios is None:
        return (1.0,) * count
    if isinstance(ratios, str) or not isinstance(ratios, Sequence):
        raise MMTokenError(f"ratios={ratios!r} is a {type(ratios).__name__}; give a list with a number per part.")
    values = tuple(ratios)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MMTokenError(f"ratios={values!r}: {value!r} is no number; give for example [2.0, 1.0].")
    if len(values) != count or values[-1] != 1 or any(a < b for a, b in itertools.pairwise(values)):
        raise MMTokenError(
            f"ratios={values!r} for {count} parts: give one number per part, falling to 1.0 at the last one."
        )
    return tuple(float(value) for value in values)


def _check_order(before: Compressor, after: Compressor) -> None:
    last = max(before.sites, key=SITES.index)
    first = min(after.sites, key=SITES.index)
    if SITES.index(first) < SITES.index(last):
        raise MMTokenError(
            f"parts: {_name(after)} acts at {first}, which comes before {last}, where {_name(before)} acts; put "
            f"{_name(after)} first, or leave one out."
        )


def _check_room(before: Compressor, after: Compressor) -> None:
    for site in sorted(before.sites & after.sites & set(_SINGLE), key=SITES.index):
        raise MMTokenError(
            f"parts: {_name(before)} and {_name(after)} both act {_SINGLE[site]}, where there is room for one."
        )


def _name(part: Compressor) -> str:
    return type(part).__name__


def _union(layers: Any) -> tuple[int, ...]:
    return tuple(sorted({number for some in layers for number in some}))


def _together(keeps: Sequence[int | float]) -> int | float:
    """The budget after several cuts in a row."""
    left: int | float = 1.0
    for keep in keeps:
        check_keep(keep)
        if isinstance(keep, int):
            left = min(left, keep) if isinstance(left, int) else keep
        else:
            left = left * keep if isinstance(left, float) else kept_count(keep, left)
    return left
