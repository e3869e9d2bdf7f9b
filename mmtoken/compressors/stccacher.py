"""STC-Cacher: in most frames of a video, a vision tower computes only the patches that changed most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from mmtoken.compressors.base import Budget, Compressor, Context, Parity, Positions, check_whole
from mmtoken.errors import MMTokenError
from mmtoken.kernels.frame_delta import Similarity, frame_delta


@dataclass(frozen=True)
class STCCacher(Compressor):
    """Reuse of a reference frame inside every tower block (the first half of STC; the pruner is a method of its own).

    Every `interval`-th frame is computed in full and becomes the reference. In the frames between, each block projects
    the keys of all patches, and computes queries, values, attention and MLP anew only for the patches whose keys differ
    most from those of the reference frame at the same place; the others take the values and what attention and MLP
    added from the reference. Attention sees the fresh keys. No token is dropped, so everything behind the tower runs as
    it did, and references do not drift: frames between leave them as they are.

    `keep` is the share of patches that a frame between computes anew (the paper's reuse ratio is 1 - keep), rounded
    down as in the official code, or their number. Images, and tiles of a picture, are computed in full. keep=1.0 or
    interval=1 is the plain tower.

    Differs from the official code: its CLIP tower ignores the setting and always takes interval=2.

    Attributes:
        interval: every how many chunks one is computed in full.
        share_selection: patches are chosen in the first block only, and taken over by the others.
        similarity: of a key and its reference: "cosine", "dot", or the negative distance "l1" or "l2".
        chunk: frames that are computed in full together; the last one of a chunk is the reference.
    """

    keep: int | float = 0.25
    positions: Positions = "keep"
    interval: int = 2
    share_selection: bool = False
    similarity: Similarity = "cosine"
    chunk: int = 1

    title: ClassVar[str] = "STC-Cacher"
    paper: ClassVar[str] = (
        "Wang et al., Accelerating Streaming Video Large Language Models via Hierarchical Token Compression, "
        "CVPR 2026, arXiv 2512.00891"
    )
    year: ClassVar[int] = 2026
    parity: ClassVar[Parity] = "official code"
    budget: ClassVar[Budget] = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("interval", self.interval, 1)
        check_whole("chunk", self.chunk, 1)
        if not isinstance(self.share_selection, bool):
            raise MMTokenError(f"share_selection={self.share_selection!r} is no bool; give true or false.")
        if self.similarity not in get_args(Similarity):
            raise MMTokenError(f"similarity={self.similarity!r} is unknown; use 'cosine', 'dot', 'l1' or 'l2'.")

    def references(self, number: int) -> bool:
        return number // self.chunk % self.interval == 0

    def refresh_count(self, patches: int) -> int:
        wanted = int(patches * self.keep) if isinstance(self.keep, float) else self.keep
        return min(max(wanted, 1), patches)

    def refresh(self, keys: Tensor, reference: Tensor, block: int, ctx: Context) -> Tensor:
        if self.share_selection and block:
            chosen: Tensor = ctx.memory["chosen"]
            return chosen
        chosen = least_similar(keys, reference, self.refresh_count(keys.shape[1]), self.similarity)
        if self.share_selection:
            ctx.memory["chosen"] = chosen
        return chosen

    def encoder_keep(self) -> float:
        return 1.0


def key_similarity(keys: Tensor, reference: Tensor, similarity: Similarity = "cosine") -> Tensor:
    """float32[F, T]: how similar each key float[F, T, C] is to the one at the same place of `reference` float[F, T, C].

    Higher is more similar, whichever measure is taken.
    """
    return frame_delta(keys, reference, similarity)


def least_similar(keys: Tensor, reference: Tensor, count: int, similarity: Similarity = "cosine") -> Tensor:
    """int[F, count], ascending: the patches of each frame that changed most; ties go to the lower index.

    A key that is not a number counts as changed most, so that NaN comes out where it would without reuse.
    """
    close = key_similarity(keys, reference, similarity)
    close = torch.where(close.isnan(), -torch.inf, close)
    return close.argsort(dim=-1, stable=True)[:, :count].sort(dim=-1).values
