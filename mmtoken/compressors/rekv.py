"""ReKV: frames that left a stream's memory come back for a question, those whose keys fit it best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmtoken.compressors.base import Budget, Compressor, Context, Positions, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.tokens import kept_count, refuse_nan


@dataclass(frozen=True)
class ReKV(Compressor):
    """Retrieval of old frames' keys and values per question, in every decoder layer by itself.

    A block is a temporal step. In each layer it stands for the mean of its keys, and the question for the mean of its
    queries, both before the rotary embedding; the score is their dot product, summed over the heads. The question then
    sees the text before the video and the retrieved blocks in the order of time. Acts in streams only (site
    `retrieve`): what enters and leaves the memory is the stream's own affair.

    `keep` is how many blocks come back, a count (64 in the official code) or a share of all that could. If there are no
    more than that, all of them do.

    The official code does not show the local window, what the stream still holds, to a question unless it is
    retrieved; window=True shows it always and retrieves only among what has left.

    Differs from the code that this was read from: while frames are encoded, the rows in the window keep their places
    (there, positions count from the window's start, and the text before it stands at one distance); blocks are stored
    when they leave the window, not at once; and the query is the question's words, without the chat template.

    Attributes:
        chunk: neighbouring blocks that come back together, by their mean score; must divide a count `keep`.
        window: whether a question also sees all that is held.
    """

    keep: int | float = 64
    positions: Positions = "keep"
    chunk: int = 1
    window: bool = False

    title: ClassVar[str] = "ReKV"
    paper: ClassVar[str] = (
        "Di et al., Streaming Video Question-Answering with In-context Video KV-Cache Retrieval, ICLR 2025, "
        "arXiv 2503.00540"
    )
    year: ClassVar[int] = 2025
    query_agnostic: ClassVar[bool] = False
    budget: ClassVar[Budget] = "at_most"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("chunk", self.chunk, lowest=1)
        if isinstance(self.keep, int) and self.keep % self.chunk:
            raise MMTokenError(
                f"chunk={self.chunk} does not divide keep={self.keep}; give a multiple, since chunks come back whole."
            )
        if not isinstance(self.window, bool):
            raise MMTokenError(f"window={self.window!r} is no bool; give true or false.")

    def sees_window(self) -> bool:
        return self.window

    def retrieve(self, blocks: Tensor, queries: Tensor, layer: int, ctx: Context) -> Tensor:
        scores = block_scores(blocks, queries)
        refuse_nan(scores[None], torch.ones_like(scores[None], dtype=torch.bool), "block scores")
        return best_chunks(scores, kept_count(self.keep, len(blocks)), self.chunk)


def block_scores(blocks: Tensor, queries: Tensor) -> Tensor:
    """float32[S]: how well each block fits the question, the dot product of mean keys and mean query over all heads.

    Args:
        blocks: float[S, G, d], mean keys.
        queries: float[H, q, d], G dividing H.
    """
    mean = queries.detach().float().mean(1)
    groups = blocks.shape[1]
    # A key head answers to several query heads: their dot products with it add up.
    return torch.einsum("sgd,gd->s", blocks.detach().float(), mean.view(groups, -1, mean.shape[-1]).sum(1))


def best_chunks(scores: Tensor, count: int, chunk: int) -> Tensor:
    """int[K], ascending: the blocks of the best chunks; ties go to the earlier one.

    Args:
        scores: float[S].
        count: blocks that may come back; all of them if there are no more.
        chunk: neighbouring blocks of a chunk; the last one may be short.
    """
    total = len(scores)
    if total <= count:
        return torch.arange(total, device=scores.device)
    means = torch.stack([part.mean() for part in scores.split(chunk)])
    best = means.argsort(descending=True, stable=True)[: max(1, count // chunk)]
    return torch.cat([torch.arange(b * chunk, min(total, (b + 1) * chunk)) for b in sorted(best.tolist())]).to(
        scores.device
    )
