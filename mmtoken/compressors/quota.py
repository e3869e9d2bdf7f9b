"""QuoTA: every frame of a video gets as many tokens as it has to do with the question."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from mmtoken.compressors.base import Budget, Compressor, Context, Need, Parity, Positions, check_whole
from mmtoken.compressors.framebudget import (
    Assigner,
    assign_tokens,
    capped_shares,
    frame_budgets,
    frame_shares,
    linspace_places,
)
from mmtoken.compressors.framequestion import Planner, TextPlanner, decoupling_prompt, parsed_entities
from mmtoken.compressors.framescorer import Clip, FrameScorer, resolve_scorer
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.tokens import Grid, VisualTokens, refuse_nan


@dataclass(frozen=True)
class QuoTA(Compressor):
    """Frames in another size each: a scorer says how much a frame has to do with the question, and shares follow.

    A frame's share of the budget is its score squared over the sum of squares. Its projected patches, before the model
    pools them, are resized to the nearly square grid of at most that many tokens. A frame whose share is below one
    token is gone, and one that matters much more than the rest may become larger than the patches it comes from. The
    prompt's text stays as it is, also the times of frames that are gone.

    The budget is that of the tokens as the model would pool them: `keep` of them, and `most` at most. With keep=196,
    most=12544 and 64 or more frames that is the paper's budget. It is never exceeded; shares and grids are rounded
    down, so that a little of it is left over. Single pictures are one frame; pictures in crops, which lie on no grid,
    keep tokens evenly spaced in their sequence.

    The new tokens need places in the prompt. A frame's take those of the same frame nearest to their centres, or, if it
    is larger than the model would have pooled it, as many in a row as it needs, and later frames move behind it. What
    positions="keep" means is so approximate; "renumber" closes the gaps, as in the paper. Models that add features of
    the tower to deeper layers (Qwen3-VL) add those of the places; cap=True keeps every frame in its own there.

    Where rows end in newline tokens (LLaVA-Video) every row of a resized frame gets one, on top of the budget, as long
    as the video has places left; in the official code assigners "linspace" and "merge" do not fit that, so here one
    newline follows each frame of theirs. A single newline at the end (LLaVA-OneVision) stays.

    Differs from the official code: equal shares if all scores are 0 (it divides by zero), one token for each of the
    best frames if all shares are below one, and grids that are not square keep their shape at full budget.

    Attributes:
        assigner: see `assign_tokens`. "merge" starts from what the model has pooled, the others from before.
        cap: whether no frame gets more tokens than the assigner starts from, see `capped_shares`; None: as in the
            paper, for all assigners but "bilinear".
        power: of the scores.
        most: most tokens of a video, whatever its length; None: no limit but `keep`.
        scorer: a `FrameScorer`; or "vlm", "clip", "given", "random", "uniform"; or {"name": ..., settings}.
        planner: finds the things to look for in the question: a function from text to text, or the name or folder of a
            language model. None: the question is asked as it is.
        question: what the scorer and the planner read; None: the prompt's text, which `tokenizer` decodes.
        tokenizer: of the model that is compressed, or its name or folder.
    """

    keep: int | float = 196
    positions: Positions = "renumber"
    assigner: Assigner = "bilinear"
    cap: bool | None = None
    power: float = 2.0
    most: int | None = 12544
    scorer: FrameScorer | str | Mapping[str, Any] = "vlm"
    planner: Planner | str | None = None
    question: str | None = None
    tokenizer: Any = None

    title: ClassVar[str] = "QuoTA"
    paper: ClassVar[str] = (
        "Luo et al., QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension, "
        "AAAI 2026, arXiv 2503.08689"
    )
    year: ClassVar[int] = 2026
    parity: ClassVar[Parity] = "official code"
    needs: ClassVar[frozenset[Need]] = frozenset({"unpooled", "pixels", "prompt"})
    merges: ClassVar[bool] = True
    query_agnostic: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    budget: ClassVar[Budget] = "at_most"
    identity_at_full: ClassVar[bool | str] = (
        "resizes frames by their scores; the plain model only if these are equal and it pools bilinearly or not at all"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assigner not in get_args(Assigner):
            raise MMTokenError(f"assigner={self.assigner!r} is unknown; use one of {', '.join(get_args(Assigner))}.")
        if self.cap is not None and not isinstance(self.cap, bool):
            raise MMTokenError(f"cap={self.cap!r} is no bool; give true, false or null.")
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not 0 <= self.power < math.inf:
            raise MMTokenError(f"power={self.power!r} is no exponent; give a finite number of at least 0, such as 2.0.")
        if self.most is not None:
            check_whole("most", self.most, lowest=1)
        scorer = resolve_scorer(self.scorer)
        object.__setattr__(self, "scorer", scorer)
        if self.planner is not None and not isinstance(self.planner, str) and not callable(self.planner):
            raise MMTokenError(
                f"planner={self.planner!r} cannot be called; give a function from text to text, or a name."
            )
        if self.question is not None and not isinstance(self.question, str):
            raise MMTokenError(f"question={self.question!r} is no text; give a str, or null for the prompt's text.")
        needs: set[Need] = {"unpooled"}
        if "pixels" in scorer.reads:
            needs.add("pixels")
        if "seed" in scorer.reads:
            needs.add("content_seed")
        if "question" in scorer.reads and self.question is None:
            needs.add("prompt")
        object.__setattr__(self, "needs", frozenset(needs))

    # --- at the language model's input --------------------------------------------------------------------------------

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        features = tokens.features.detach().float()
        refuse_nan(features - features, tokens.eligible, "features")  # infinities become NaN
        videos = [_video(tokens, row) for row in range(len(tokens))]
        whole = ctx.unpooled(tokens)
        scores = self._scores(tokens, videos, ctx)
        rows = []
        for row, (video, budget) in enumerate(zip(videos, tokens.budget(self.keep), strict=True)):
            budget = budget if self.most is None else min(budget, self.most)
            if video is None:
                rows.append(_thinned(tokens, row, budget))
            else:
                rows.append(self._resized(tokens, row, video, whole[row], scores[row], budget))
        return _joined(tokens, rows)

    def _resized(
        self, tokens: VisualTokens, row: int, video: _Video, whole: Tensor | None, scores: Tensor, budget: int
    ) -> _Row:
        """One video, or a picture on a grid, with every frame at its budget."""
        given = tokens.features[row, video.eligible].view(len(video.frames), video.rows, video.columns, -1)
        if self.assigner != "merge":
            if whole is None:
                raise UnsupportedError(f"item {row} has no patches before pooling; pass pixels to the attached model.")
            given = whole[video.frames.to(whole.device)].to(given)
            if not bool(given.isfinite().all()):
                raise InputError(
                    f"patches before pooling contain NaN for item {row}; every token needs numbers. Check the pixels "
                    "and the weights for NaN or infinities (in float16, try bfloat16)."
                )
        shares = frame_shares(scores, self.power)
        if self.assigner != "bilinear" if self.cap is None else self.cap:
            shares = capped_shares(shares, given.shape[1] * given.shape[2] / budget)
        counts = frame_budgets(shares, budget)
        parts = [
            assign_tokens(frame, count, self.assigner) if count else given.new_zeros(0, given.shape[-1])
            for frame, count in zip(given, counts, strict=True)
        ]
        numbers = [part.shape[:-1].numel() for part in parts]
        room = len(video.slots) - sum(numbers)  # for newline tokens
        blocks, newline, size = [], [], []
        for part, number in zip(parts, numbers, strict=True):
            block, flags = with_newlines(part, video.newline if number else None, room)
            room -= int(flags.sum())
            blocks.append(block)
            newline.append(flags)
            size.append(torch.where(flags, 1.0, video.rows * video.columns / max(number, 1)))
        nearest = [part.shape[:2] if part.ndim == 3 and video.newline is None else None for part in parts]
        slots = frame_places([len(block) for block in blocks], nearest, (video.rows, video.columns), video.block)
        frame = torch.cat([number.expand(len(block)) for number, block in zip(video.frames, blocks, strict=True)])
        index = video.slots[torch.cat(slots).to(video.slots.device)]
        return _Row(
            torch.cat([index, video.stay]),
            torch.cat([*blocks, tokens.features[row, video.stay]]),
            torch.cat([*newline, tokens.protected[row, video.stay]]),
            torch.cat([*size, tokens.size[row, video.stay]]),
            torch.cat([frame if video.many else tokens.item[row, index], tokens.item[row, video.stay]]),
        )

    # --- scores -------------------------------------------------------------------------------------------------------

    def _scores(self, tokens: VisualTokens, videos: list[_Video | None], ctx: Context) -> list[Tensor]:
        """Per item float[K], of the frames that are there; a single frame is not looked at."""
        scorer = self.scorer
        assert isinstance(scorer, FrameScorer)
        found = [torch.ones(1, dtype=torch.float64)] * len(tokens)
        asked = [row for row, video in enumerate(videos) if video is not None and len(video.frames) > 1]
        if not asked:
            return found
        started = time.perf_counter()
        pixels = ctx.pixels(tokens) if "pixels" in scorer.reads else None
        seeds = ctx.content_seed(tokens) if "seed" in scorer.reads else None
        questions = self._questions(tokens, ctx) if "question" in scorer.reads else None
        shown = torch.zeros_like(tokens.source, dtype=torch.float32)
        planning = 0.0
        for row in asked:
            video = videos[row]
            assert video is not None
            entities: tuple[str, ...] = ()
            if questions is not None and self.planner is not None:
                before = time.perf_counter()
                entities = self._entities(questions[row])
                planning += time.perf_counter() - before
            pictures = None if pixels is None else pixels[row]
            if pixels is not None and pictures is None:
                raise UnsupportedError(
                    f"item {row} has several frames but no pixels; pass pixels to the attached model."
                )
            kept = tuple(video.frames.tolist())
            clip = Clip(
                frames=len(kept),
                number=row,
                pixels=None if pictures is None else pictures[list(kept)],
                question="" if questions is None else questions[row],
                entities=entities,
                seed=0 if seeds is None else seeds[row],
                total=video.total,
                kept=kept,
            )
            scores = scorer.score(clip)
            if scores.shape != (len(kept),):
                raise InputError(
                    f"scorer {type(scorer).__name__} gave scores of shape {tuple(scores.shape)} for {len(kept)} frames "
                    f"of item {row}; it must give one number per frame."
                )
            found[row] = scores
            values = scores.detach().to(shown).repeat_interleave(video.rows * video.columns)
            shown[row, video.eligible] = values
        ctx.scores = shown
        ctx.timings = {"planner": planning, "scorer": time.perf_counter() - started - planning}
        return found

    def _questions(self, tokens: VisualTokens, ctx: Context) -> list[str]:
        if self.question is not None:
            return [self.question] * len(tokens)
        if self.tokenizer is None:
            raise UnsupportedError(
                "question=None and tokenizer=None: the scorer reads the question, and the prompt's token ids cannot be "
                "turned into text; give the question, or the tokenizer of the model that is compressed."
            )
        tokenizer = _tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer
        ids = ctx.prompt_ids(tokens)
        return [tokenizer.decode(row.tolist(), skip_special_tokens=True).strip() for row in ids]

    def _entities(self, question: str) -> tuple[str, ...]:
        planner = _planner(self.planner) if isinstance(self.planner, str) else self.planner
        assert planner is not None
        return parsed_entities(planner(decoupling_prompt(question)))

    # --- as data ------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The settings by name, JSON-ready but for live objects, which stay what they are."""
        values = super().settings()
        with suppress(MMTokenError):
            values["scorer"] = values["scorer"].settings()
        return values

    def to_dict(self) -> dict[str, Any]:
        """As every compressor's.

        Raises:
            MMTokenError: scorer, planner or tokenizer is a live object.
        """
        data = super().to_dict()
        scorer = self.scorer
        assert isinstance(scorer, FrameScorer)
        data["init_args"]["scorer"] = scorer.settings()
        for name, what in (("planner", "language model"), ("tokenizer", "model")):
            if data["init_args"][name] is not None and not isinstance(data["init_args"][name], str):
                raise MMTokenError(
                    f"{name}=<{type(data['init_args'][name]).__name__}> is a live object and cannot be saved; give the "
                    f"name or folder of a {what} instead, or save the settings without it."
                )
        return data


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


@functools.lru_cache(maxsize=1)
def _planner(name: str) -> TextPlanner:
    return TextPlanner.load(name)


# ------------------------------------------------------------------------------------------------------------- assembly


@dataclass(frozen=True)
class _Video:
    """Where the tokens of an item on a grid are in its row.

    Attributes:
        total: F, frames of the item; `many`: more than one.
        frames: int[K], those that are left.
        rows, columns: of the grid of a frame, as the model pools it.
        eligible: int[K * rows * columns], positions of the tokens.
        slots: int[K * block], positions that new tokens may take.
        block: of one frame.
        newline: float[D], the token that ends rows; None where rows do not end in one.
        stay: int[S], positions of separators that stay as they are.
    """

    total: int
    frames: Tensor
    rows: int
    columns: int
    eligible: Tensor
    slots: Tensor
    block: int
    newline: Tensor | None
    stay: Tensor

    @property
    def many(self) -> bool:
        return self.total > 1


@dataclass(frozen=True)
class _Row:
    """What is left of an item: positions int[M] in its row, and what is there."""

    index: Tensor
    features: Tensor
    protected: Tensor
    size: Tensor
    item: Tensor


def _video(tokens: VisualTokens, row: int) -> _Video | None:
    """How an item lies in its row; None if it is on no grid, or empty.

    Raises:
        InputError: a frame has lost tokens already.
    """
    grid: Grid | None = tokens.grid[row]
    eligible = tokens.eligible[row].nonzero()[:, 0]
    if grid is None or not len(eligible):
        return None
    total, rows, columns = grid
    area = rows * columns
    item = tokens.item[row, eligible] if total > 1 else torch.zeros_like(eligible)
    frames, counts = item.unique(return_counts=True)
    if bool((counts != area).any()):
        raise InputError(
            f"grid={grid} of item {row} has {area} tokens per frame but {counts.tolist()} came; QuoTA resizes whole "
            "frames: use it before methods that drop tokens."
        )
    separators = (tokens.protected & tokens.valid)[row].nonzero()[:, 0]
    if not _rows_end(tokens.source[row, separators], tokens.source[row, eligible], grid):
        return _Video(total, frames, rows, columns, eligible, eligible, area, None, separators)
    block = rows * (columns + 1)
    # Newline tokens of frames that were left out before the tower go, too.
    slots = torch.isin(tokens.source[row] // block, frames) & tokens.valid[row]
    newline = tokens.features[row, separators[0]]
    return _Video(total, frames, rows, columns, eligible, slots.nonzero()[:, 0], block, newline, separators[:0])


def _rows_end(separators: Tensor, others: Tensor, grid: Grid) -> bool:
    """Whether every row of every frame ends in a separator; places int[n] in the item."""
    pitch = grid[2] + 1
    return (
        len(separators) == grid[0] * grid[1]
        and bool((separators % pitch == grid[2]).all())
        and bool((others % pitch != grid[2]).all())
    )


def with_newlines(part: Tensor, newline: Tensor | None, room: int) -> tuple[Tensor, Tensor]:
    """(float[m, D], bool[m]): a frame's tokens in order, and which are newline tokens.

    Args:
        part: float[h, w, D], or float[n, D] with one newline behind all.
        newline: float[D], None: none.
        room: most newline tokens; the first rows get theirs.
    """
    width = part.shape[-1]
    if newline is None:
        flat = part.reshape(-1, width)
        return flat, torch.zeros(len(flat), dtype=torch.bool, device=part.device)
    lines = part if part.ndim == 3 else part[None]
    lines = torch.cat([lines, newline.to(lines).expand(len(lines), 1, width)], 1)
    flags = torch.zeros(lines.shape[:2], dtype=torch.bool, device=part.device)
    flags[:, -1] = True
    stays = ~flags
    stays[:room, -1] = True
    return lines[stays], flags[stays]


def frame_places(
    lengths: list[int], shapes: Sequence[tuple[int, ...] | None], grid: tuple[int, int], block: int
) -> list[Tensor]:
    """Which of a video's places the tokens of each resized frame take: int[n] per frame, ascending over the video.

    A frame that fits into its own places takes those nearest to the centres of its cells, or evenly spaced ones where
    it has no grid or a wider one. One that does not fit takes as many in a row as it needs, from its own first place if
    it can, and pushes later frames back.

    Args:
        lengths: tokens of each frame, together at most as many as there are places.
        shapes: per frame (h, w) of its tokens, None where they have no grid.
        grid: (rows, columns) of a frame's own places, if it has no others.
        block: places of a frame.
    """
    total, left, cursor = len(lengths) * block, sum(lengths), 0
    found = []
    for number, (length, shape) in enumerate(zip(lengths, shapes, strict=True)):
        own = number * block
        left -= length
        if length <= block and cursor <= own and total - own - block >= left:
            if shape is not None and shape[0] <= grid[0] and shape[1] <= grid[1]:
                rows = (2 * torch.arange(shape[0]) + 1) * grid[0] // (2 * shape[0])
                columns = (2 * torch.arange(shape[1]) + 1) * grid[1] // (2 * shape[1])
                inside = (rows[:, None] * grid[1] + columns).flatten()
            else:
                inside = torch.arange(length) * block // max(length, 1)
            found.append(own + inside)
        else:
            first = min(max(cursor, own), total - left - length)
            found.append(torch.arange(first, first + length))
        if length:
            cursor = int(found[-1][-1]) + 1
    return found


def _thinned(tokens: VisualTokens, row: int, budget: int) -> _Row:
    """An item on no grid: evenly spaced tokens of its sequence, and all separators."""
    eligible = tokens.eligible[row].nonzero()[:, 0]
    separators = (tokens.protected & tokens.valid)[row].nonzero()[:, 0]
    if len(eligible):
        eligible = eligible[linspace_places(len(eligible), budget).to(eligible.device)]
    index = torch.cat([eligible, separators])
    return _Row(
        index,
        tokens.features[row, index],
        tokens.protected[row, index],
        tokens.size[row, index],
        tokens.item[row, index],
    )


def _joined(tokens: VisualTokens, rows: list[_Row]) -> VisualTokens:
    """The items as one batch, tokens by rising position, shorter rows padded on the right."""

    def padded(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    orders = [row.index.argsort() for row in rows]
    counts = torch.tensor([len(order) for order in orders], device=tokens.source.device)
    fields = {
        name: padded([getattr(row, name)[order] for row, order in zip(rows, orders, strict=True)])
        for name in ("index", "features", "protected", "size", "item")
    }
    index = fields.pop("index")
    valid = torch.arange(index.shape[1], device=index.device) < counts[:, None]
    return tokens.take(index, valid).replace(**fields)
