"""Picks rows and columns out of hidden states, masks and positions. Indices out of range raise."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtoken.tokens import pick_rows


def right_aligned(keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Indices of the kept positions per row, shorter rows padded on the left.

    Args:
        keep: bool[B, L].

    Returns:
        (int[B, n] in ascending order, bool[B, n] or None if no row is padded).
    """
    counts = keep.sum(-1)
    longest = int(counts.max())
    index = torch.argsort(keep.to(torch.uint8), dim=-1, stable=True)[:, keep.shape[1] - longest :]
    if int(counts.min()) == longest:
        return index, None
    return index, keep.gather(1, index)


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[b, index[b]]: [B or 1, L, ...] and int[B, n] give [B, n, ...]."""
    return pick_rows(tensor.expand(index.shape[0], *tensor.shape[1:]), index)


def last(tensor: Tensor, index: Tensor) -> Tensor:
    """Pick along the last dimension: [B or 1, L] or [A, B or 1, L] and int[B, n] give [(A,) B, n]."""
    batch = index.shape[0]
    if tensor.ndim == 2:
        return tensor.expand(batch, -1).gather(1, index)
    return tensor.expand(-1, batch, -1).gather(2, index.expand(tensor.shape[0], -1, -1))


def mask_columns(mask: Tensor, columns: Tensor) -> Tensor:
    """Columns of a mask [B or 1, H, q, k] at int[B, n]; a column of -1 is hidden from every query."""
    picked = mask.expand(columns.shape[0], -1, -1, -1)
    index = columns.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    picked = picked.gather(3, index)
    return picked.masked_fill((columns < 0)[:, None, None, :], hidden_value(mask))


def mask_rows(mask: Tensor, index: Tensor) -> Tensor:
    """Rows of a mask [B or 1, H, q, k] at int[B, n]."""
    picked = mask.expand(index.shape[0], -1, -1, -1)
    return picked.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def hidden_value(mask: Tensor) -> bool | float:
    """What a mask of this type holds for a key that must not be seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def let_padding_see_itself(mask: Tensor, valid: Tensor, past: int) -> Tensor:
    """Give padded queries (bool[B, n] False) their own key, since softmax over no key is NaN."""
    n = valid.shape[1]
    own = torch.zeros(n, mask.shape[-1], dtype=torch.bool, device=mask.device)
    own[:, past : past + n].fill_diagonal_(True)
    return mask.masked_fill(own & ~valid[:, None, :, None], True if mask.dtype == torch.bool else 0.0)
