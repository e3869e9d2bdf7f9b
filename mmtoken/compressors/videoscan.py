"""VideoScan: every frame of a video becomes one token that carries what the frame said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmtoken.compressors.base import Compressor, Context, HeldFrame, Parity, Positions, StreamFrame, check_whole
from mmtoken.errors import InputError, KeepError, MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens, refuse_nan

Carrier = Literal["block", "visual"]

_THINNING = ((1280.0, 5), (900.0, 4), (600.0, 3), (300.0, 2))
"""(seconds, n): videos longer than that are read at 1/n of the rate."""


@dataclass(frozen=True)
class VideoScan(Compressor):
    """One semantic carrier per frame: the mean of the frame's tokens, and in streams the keys and values it gathers.

    In a stream the carrier stands at the end of the frame's tokens, so under causal attention its keys and values in
    every decoder layer take in the frame and all earlier carriers. After the step only those are held: one row per
    frame, plus `extra_kv` rows of raw tokens. When the list reaches `bank` frames, the older one of the most similar
    pair of neighbours leaves (cosine of the carriers as they entered the decoder), so `bank` - 1 stay. A question sees
    the text before the video and the carriers, never raw tokens.

    In `generate()` no token may be added, so a frame's last place holds its carrier and nothing else is left of it:
    the form in which the first training stage shows frames to the language model. Images are videos of one frame.

    Without fine-tuning a decoder has never seen such tokens, and the authors' weights are not published: both stages of
    their training are in `mmtoken.models.tiny_llava_video.videoscan`.

    `keep` is 1, a carrier per frame, or 1.0, the plain model; there is nothing in between. Carriers follow each other
    without gaps (positions="renumber"), as in training.

    Differs from the official code: evicts with `extra_kv`, too, and before a question as at any other time; a
    stream's text after the video is not fed with every frame (by causality it cannot matter).

    Attributes:
        bank: frames at which one leaves; None: only the stream's own bound counts.
        extra_kv: raw rows held of each frame, those that the carrier attends to most (VideoScan+; the authors' demo has
            16, their evaluation 8).
        kv_select_layer: the decoder layer whose attention chooses the raw rows of all layers; None: each its own.
        carrier: "block": the mean over all tokens of the frame's block, newlines included (official code); "visual":
            over the visual tokens (paper). The same where rows do not end in newlines.
        without: for ablations. "kv": carriers are embeddings only: a stream, too, feeds them alone. "embedding": the
            carrier enters the decoder as zeros, and only gathers; with nothing to compare, the oldest frame leaves.
    """

    keep: int | float = 1
    positions: Positions = "renumber"
    bank: int | None = 64
    extra_kv: int = 0
    kv_select_layer: int | None = None
    carrier: Carrier = "block"
    without: Literal["kv", "embedding"] | None = None

    title: ClassVar[str] = "VideoScan"
    paper: ClassVar[str] = (
        "Li et al., VideoScan: Enabling Efficient Streaming Video Understanding via Frame-level Semantic Carriers, "
        "2025, arXiv 2503.09387"
    )
    year: ClassVar[int] = 2025
    parity: ClassVar[Parity] = "official code"
    licence: ClassVar[str] = (
        "written from the formulas, Apache-2.0; the official code says Apache-2.0 without a licence file, unused"
    )
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep != 1:
            raise KeepError(
                f"keep={self.keep!r}: VideoScan makes one carrier of a frame; give 1 (an int, one token per frame), or "
                "1.0 for the plain model."
            )
        if self.bank is not None:
            check_whole("bank", self.bank, lowest=2)
        check_whole("extra_kv", self.extra_kv, lowest=0)
        if self.kv_select_layer is not None:
            check_whole("kv_select_layer", self.kv_select_layer, lowest=0)
        if self.carrier not in ("block", "visual"):
            raise MMTokenError(f"carrier={self.carrier!r} is unknown; use 'block' or 'visual'.")
        if self.without not in (None, "kv", "embedding"):
            raise MMTokenError(f"without={self.without!r} is unknown; use None, 'kv' or 'embedding'.")
        if self.without == "kv" and self.extra_kv:
            raise MMTokenError(
                f"extra_kv={self.extra_kv} cannot be with without='kv', where no raw token enters the decoder; use "
                "extra_kv=0."
            )

    @property
    def whole(self) -> bool:
        """Whether frames stay as they are."""
        return isinstance(self.keep, float)

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        if self.whole:
            return tokens
        refuse_nan(tokens.features.detach().float(), tokens.eligible, "features")
        if ctx.streaming and self.without != "kv":
            return self._with_carrier(tokens, ctx)
        features, size, mask = tokens.features.clone(), tokens.size.clone(), tokens.protected.clone()
        for row in range(len(tokens)):
            for places, block in frame_blocks(tokens, row):
                features[row, places[-1]] = self._carrier(tokens, row, places, block)
                size[row, places[-1]] = tokens.size[row, places].sum()
                mask[row, block] = False
                mask[row, places[-1]] = True
        return tokens.replace(features=features, size=size).where(mask)

    def _carrier(self, tokens: VisualTokens, row: int, places: Tensor, block: Tensor) -> Tensor:
        return mean_token(tokens.features[row, block if self.carrier == "block" else places])

    def _with_carrier(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        """The step of a stream with its carrier behind it."""
        end = {
            name: getattr(tokens, name).new_zeros(len(tokens), 1) for name in ("source", "size", "protected", "item")
        }
        end["valid"] = torch.zeros_like(end["protected"])
        end["features"] = torch.zeros_like(tokens.features[:, :1])
        for row in range(len(tokens)):
            blocks = frame_blocks(tokens, row)
            if not blocks:
                continue
            places, block = blocks[-1]
            if self.without != "embedding":
                end["features"][row, 0] = self._carrier(tokens, row, places, block)
            # Behind the whole step, also where an earlier method has left some of it only.
            separators = int((tokens.protected[row] & tokens.valid[row]).sum())
            end["source"][row] = ctx.encoded_counts[row] + separators
            end["size"][row] = tokens.size[row, places].sum()
            end["item"][row] = tokens.item[row, places[-1]]
            end["valid"][row] = True
        joined = {name: torch.cat([getattr(tokens, name), last], 1) for name, last in end.items()}
        return tokens.replace(**joined).where(joined["valid"])

    # --- in a stream -------------------------------------------------------------------------------------------------

    def retain(self, frame: StreamFrame, ctx: Context) -> Tensor | Sequence[Tensor]:
        rows = torch.arange(len(frame.embeddings), device=frame.embeddings.device)
        if self.whole or not self.extra_kv:
            return rows if self.whole else rows[-1:]
        depth = len(frame.keys)
        if self.kv_select_layer is not None:
            if self.kv_select_layer >= depth:
                raise UnsupportedError(
                    f"kv_select_layer={self.kv_select_layer} but this decoder has {depth} layers; choose from 0 to "
                    f"{depth - 1}."
                )
            return torch.cat([attended(frame.attention(self.kv_select_layer, -1)[:-1], self.extra_kv), rows[-1:]])
        return [
            torch.cat([attended(frame.attention(layer, -1)[:-1], self.extra_kv), rows[-1:]]) for layer in range(depth)
        ]

    def held_steps(self) -> int | None:
        return None if self.whole else self.bank

    def evict(self, held: Sequence[HeldFrame], over: bool, ctx: Context) -> int | None:
        full = self.bank is not None and len(held) >= self.bank and not self.whole
        if self.whole or not (full or over):
            return 0 if over else None
        return duplicate(torch.stack([frame.embedding for frame in held]))


def frame_blocks(tokens: VisualTokens, row: int) -> list[tuple[Tensor, Tensor]]:
    """Per frame of an item (int[n] places of its visual tokens, int[m] places of its block), first frame first.

    The block also has the newlines that end the rows of the frame, where there are as many of them as rows. Frames of
    which nothing is left are passed over. Images, and items that are no grid, count as one frame.
    """
    grid = tokens.grid[row]
    places = tokens.eligible[row].nonzero()[:, 0]
    newlines = (tokens.protected[row] & tokens.valid[row]).nonzero()[:, 0]
    if grid is None or len(newlines) != grid[0] * grid[1]:
        newlines = newlines[:0]
    every = torch.cat([places, newlines]).sort().values
    if grid is None or grid[0] == 1:
        return [(places, every)] if len(places) else []
    mine, all_mine = tokens.item[row, places], tokens.item[row, every]
    return [(places[mine == f], every[all_mine == f]) for f in range(grid[0]) if bool((mine == f).any())]


def mean_token(tokens: Tensor) -> Tensor:
    """float[..., D], the mean of tokens float[..., S, D], added up in float32: a frame's carrier."""
    return tokens.float().mean(-2).to(tokens.dtype)


def duplicate(embeddings: Tensor) -> int:
    """Which carrier leaves a full bank: the older one of the two neighbours with the highest cosine, the first on ties.

    Args:
        embeddings: float[n, D], carriers as they entered the decoder, oldest first; n is at least 2.

    Raises:
        InputError: there are fewer than two, or one of them holds NaN.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise InputError(f"embeddings has shape {tuple(embeddings.shape)}; give [n, width] with n of at least 2.")
    values = embeddings.detach().float()
    if bool(values.isnan().any()):
        raise InputError("embeddings contains NaN; every carrier needs numbers. Check the pixels and the weights.")
    similarity = cosine_similarity(values[:-1], values[1:], dim=-1)
    return int((similarity == similarity.max()).nonzero()[0, 0])


def attended(attention: Tensor, count: int) -> Tensor:
    """int[K], ascending: the `count` rows of float[n] with the highest attention, fewer if there are not as many."""
    top = attention.detach().float().argsort(descending=True, stable=True)[:count]
    return top.sort().values


def thinned_rate(seconds: float, rate: float = 1.0) -> float:
    """Frames per second at which a video of this length is read: long ones less often (official streaming script).

    Up to 300 s `rate`; beyond 300 s a half of it, beyond 600 s a third, beyond 900 s a quarter, beyond 1280 s a fifth.
    """
    return rate / next((n for limit, n in _THINNING if seconds > limit), 1)


def semantic_mask(segment: Tensor, shared: Tensor) -> Tensor:
    """bool[..., 1, L, L]: which tokens each token sees under semantic-aware causal attention, True where it does.

    Of the tokens up to itself, a token sees those that are shared (text before the video, carriers) and those of its
    own segment. So a frame's tokens see their frame and earlier carriers, and text never sees raw tokens.

    Args:
        segment: int[..., L], numbers the parts of a sequence that see themselves: a frame, or a question.
        shared: bool[..., L], what everybody behind it sees.
    """
    length = segment.shape[-1]
    before = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    same = segment[..., :, None] == segment[..., None, :]
    return ((same | shared[..., None, :]) & before)[..., None, :, :]


def stage_mask(system: int, frames: int, block: int, text: int) -> Tensor:
    """bool[1, 1, L, L]: the mask of the second training stage, for [system | (frame, carrier) ... | text].

    Eager attention adds its mask: hand it `additive(mask, dtype)`.

    Args:
        system: tokens before the video.
        frames: number of frames.
        block: tokens of a frame, its carrier included.
        text: tokens behind the video.
    """
    counts = torch.tensor([system, *[block] * frames, text])
    segment = torch.arange(-1, frames + 1).repeat_interleave(counts)
    shared = segment < 0
    shared[system + block - 1 : system + frames * block : block] = True
    return semantic_mask(segment, shared)[None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as numbers that are added to the attention scores: 0, or the lowest number of `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
