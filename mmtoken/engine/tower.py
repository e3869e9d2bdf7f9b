"""Compresses inside a vision tower: shortens the sequence between blocks and restores the full grid at its output.

Everything after the tower (pixel shuffle, 2x2 mergers, un-padding, pooling) needs the full grid, so the output holds
at every dropped patch a copy of the last kept one before it; the engine drops those again before the decoder.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from mmtoken.backbones.base import Tower
from mmtoken.errors import UnsupportedError
from mmtoken.tokens import VisualTokens


class TowerRun(ABC):
    """One call of a tower.

    Rows of tokens are what attends to itself: a tile or an image for dense towers, a frame for packed ones. A token is
    the square of patches that becomes one projected token, with the features of its patches side by side.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.cls: Tensor | None = None
        self.tokens: VisualTokens | None = None
        self.counts: list[int] | None = None
        self._restore: dict[int, Tensor] = {}

    @abstractmethod
    def units(self, hidden: Tensor) -> VisualTokens:
        """The tokens of a block's input."""

    @abstractmethod
    def shorten(self, hidden: Tensor, tokens: VisualTokens) -> Tensor:
        """The block's input that holds `tokens` only."""

    @abstractmethod
    def block_arguments(self, kwargs: dict[str, Any], size_bias: bool) -> dict[str, Any]:
        """The block's other arguments for the current sequence."""

    @abstractmethod
    def restore(self, output: Tensor, per_unit: bool = False) -> Tensor:
        """A tensor over the current or an earlier sequence (of patches, or of units), back on the full grid."""

    @abstractmethod
    def representatives(self) -> Tensor:
        """float[tiles, patches, 1] or float[units, 1]: 1 where a patch or unit is left after the last block."""

    @abstractmethod
    def keys_of(self, tokens: VisualTokens) -> Tensor:
        """float[rows, U, d]: head-averaged keys of the block that ran last."""

    @abstractmethod
    def attention(self) -> Tensor:
        """float[tiles, patches] or float[units]: attention received in the feature block, summed over heads."""

    @abstractmethod
    def mean_keys(self) -> Tensor:
        """float[tiles, patches, d] or float[units, d]: head-averaged keys of the feature block."""


def _head_mean(projected: Tensor, heads: int) -> Tensor:
    return projected.view(*projected.shape[:-1], heads, -1).mean(-2)


class DenseRun(TowerRun):
    """Hidden states [tiles, prefix + patches, D]."""

    def __init__(self, tower: Tower, patches: int, grid: tuple[int, int], tiles: int, device: torch.device) -> None:
        super().__init__(tower)
        rows, columns = grid
        unit = tower.unit
        raster = torch.arange(patches, device=device).view(rows // unit, unit, columns // unit, unit)
        self.members = raster.permute(0, 2, 1, 3).reshape(-1, unit * unit)
        self.patches = patches
        self.grid = (1, rows // unit, columns // unit)
        self.where = torch.arange(patches, device=device).expand(tiles, -1)
        self.left = torch.ones(tiles, patches, dtype=torch.bool, device=device)

    def units(self, hidden: Tensor) -> VisualTokens:
        body = hidden[:, self.tower.prefix :]
        tiles = body.shape[0]
        if self.tokens is None:
            features = body[:, self.members.flatten()].reshape(tiles, len(self.members), -1)
            return VisualTokens.from_features(features, grid=(self.grid,) * tiles)
        places = self.where.gather(1, self.members[self.tokens.source].flatten(1))
        features = body.gather(1, places[..., None].expand(-1, -1, body.shape[-1]))
        return self.tokens.replace(features=features.view(tiles, self.tokens.source.shape[1], -1))

    def shorten(self, hidden: Tensor, tokens: VisualTokens) -> Tensor:
        if not bool(tokens.valid.all()):
            raise UnsupportedError("The method left different numbers of tokens per tile; this tower needs equal ones.")
        tiles, width = hidden.shape[0], hidden.shape[-1]
        members = self.members[tokens.source].flatten(1)
        order = members.argsort(-1)
        body = tokens.features.reshape(tiles, -1, width).gather(1, order[..., None].expand(-1, -1, width))
        kept = members.gather(1, order)
        rank = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        self.where = torch.zeros(tiles, self.patches, dtype=torch.long, device=kept.device).scatter(1, kept, rank)
        self.left = torch.zeros(tiles, self.patches, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
        self.tokens = tokens
        short = torch.cat([hidden[:, : self.tower.prefix], body], 1)
        filled = (self.left.long().cumsum(-1) - 1).clamp(min=0) + self.tower.prefix
        prefix = torch.arange(self.tower.prefix, device=kept.device).expand(tiles, -1)
        self._restore[short.shape[1]] = torch.cat([prefix, filled], 1)
        return short

    def block_arguments(self, kwargs: dict[str, Any], size_bias: bool) -> dict[str, Any]:
        if self.tokens is None or self.tokens.source.shape[1] == len(self.members):
            return kwargs
        changed = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kept = self.left.nonzero()[:, 1].view(self.left.shape[0], -1)
            mask = mask.expand(kept.shape[0], -1, -1, -1)
            mask = mask.gather(2, kept[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = mask.gather(3, kept[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        if size_bias:
            # ToMe, equation 1: a merged token weighs in as often as the tokens it stands for.
            per_patch = self.tokens.size.repeat_interleave(self.members.shape[1], 1)
            order = self.members[self.tokens.source].flatten(1).argsort(-1)
            sizes = nn.functional.pad(per_patch.gather(1, order), (self.tower.prefix, 0), value=1.0)
            bias = sizes.log()[:, None, None, :].to(self.tokens.features.dtype)
            bias = bias.expand(-1, -1, bias.shape[-1], -1)
            if mask is not None and mask.dtype == torch.bool:
                mask = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
            else:
                mask = bias if mask is None else bias + mask
        changed["attention_mask"] = mask
        return changed

    def restore(self, output: Tensor, per_unit: bool = False) -> Tensor:
        index = self._restore.get(output.shape[1])
        if index is None or output.shape[1] == self.tower.prefix + self.patches:
            return output
        return output.gather(1, index[..., None].expand(-1, -1, output.shape[-1]))

    def representatives(self) -> Tensor:
        return self.left.float()[..., None]

    def keys_of(self, tokens: VisualTokens) -> Tensor:
        assert self.keys is not None
        keys = _head_mean(self.keys, self.tower.heads)[:, self.tower.prefix :]
        places = self.where.gather(1, self.members[tokens.source].flatten(1))
        return keys.gather(1, places[..., None].expand(-1, -1, keys.shape[-1])).reshape(*tokens.source.shape, -1)

    def attention(self) -> Tensor:
        assert self.queries is not None and self.keys is not None
        heads, prefix = self.tower.heads, self.tower.prefix
        query = self.queries.detach().float().unflatten(-1, (heads, -1)).transpose(1, 2)
        key = self.keys.detach().float().unflatten(-1, (heads, -1)).transpose(1, 2)
        received = _received(query[:, :, :1] if prefix else query, key)
        return self.restore(received[..., None])[:, prefix:, 0]

    def mean_keys(self) -> Tensor:
        assert self.keys is not None
        return self.restore(_head_mean(self.keys, self.tower.heads))[:, self.tower.prefix :]


def _received(query: Tensor, key: Tensor, chunk: int = 256) -> Tensor:
    """Attention each key receives: mean over queries, sum over heads; [.., H, q, d] and [.., H, k, d] give [.., k].

    Chunks of queries bound the memory by chunk x keys.
    """
    total = query.new_zeros(*key.shape[:-3], key.shape[-2])
    for part in query.split(chunk, -2):
        scores = part @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        total += scores.softmax(-1).sum((-3, -2))
    return total / query.shape[-2]


class PackedRun(TowerRun):
    """Hidden states [patches of all frames, D], frames kept apart by cumulative lengths (Qwen)."""

    def __init__(self, tower: Tower, grids: Tensor) -> None:
        super().__init__(tower)
        side = tower.unit
        shapes = [(t, h // side, w // side) for t, h, w in grids.tolist()]
        self.members = side * side
        frames = [h * w for t, h, w in shapes for _ in range(t)]
        self.frame_grids = tuple((1, h, w) for t, h, w in shapes for _ in range(t))
        device = grids.device
        self.raster = torch.cat([_window_order(*shape, tower.window) for shape in shapes]).to(device)
        starts = torch.tensor([0, *frames], device=device).cumsum(0)
        # `raster` counts within an image; make it count within the whole sequence.
        lengths = [t * h * w for t, h, w in shapes]
        offsets = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
        self.raster = self.raster + offsets.repeat_interleave(torch.tensor(lengths, device=device))
        longest = max(frames)
        counts = torch.tensor(frames, device=device)
        self.frame_start = starts[:-1]
        inside = torch.arange(longest, device=device)
        self.valid = inside < counts[:, None]
        self.slot = (self.frame_start[:, None] + inside).clamp(max=len(self.raster) - 1)
        self.source = (self.raster[self.slot] - self.frame_start[:, None]).masked_fill(~self.valid, 0)
        self.inverse = torch.empty_like(self.raster).scatter_(
            0, self.raster, torch.arange(len(self.raster), device=device)
        )
        self.left = torch.ones(len(self.raster), dtype=torch.bool, device=device)
        self.rotary: tuple[Tensor, Tensor] | None = None

    def _rank(self) -> Tensor:
        return (self.left.long().cumsum(0) - 1).clamp(min=0)

    def units(self, hidden: Tensor) -> VisualTokens:
        body = hidden.view(-1, self.members * hidden.shape[-1])
        if self.tokens is None:
            tokens = VisualTokens.from_features(body[self.slot], valid=self.valid, grid=self.frame_grids)
            return tokens.replace(source=self.source)
        return self.tokens.replace(features=body[self._rank()[self._slots(self.tokens)]])

    def _slots(self, tokens: VisualTokens) -> Tensor:
        """Places of tokens in the original sequence of units."""
        return self.inverse[(tokens.source + self.frame_start[:, None]).clamp(max=len(self.inverse) - 1)]

    def shorten(self, hidden: Tensor, tokens: VisualTokens) -> Tensor:
        slots = self._slots(tokens)[tokens.valid]
        values = tokens.features[tokens.valid]
        order = slots.argsort()
        self.left = torch.zeros_like(self.left).scatter(0, slots, True)
        self.tokens = tokens
        short = values[order].view(-1, hidden.shape[-1])
        self._restore[short.shape[0] // self.members] = self._rank()
        return short

    def block_arguments(self, kwargs: dict[str, Any], size_bias: bool) -> dict[str, Any]:
        if self.tokens is None:
            return kwargs
        rows = self.left.repeat_interleave(self.members)
        before = nn.functional.pad(rows.long().cumsum(0), (1, 0))
        lengths = kwargs["cu_seqlens"]
        # Windows of which nothing is left vanish.
        lengths = torch.unique_consecutive(before[lengths.long()]).to(lengths.dtype)
        changed = {
            **kwargs,
            "cu_seqlens": lengths,
            "position_embeddings": tuple(table[rows] for table in kwargs["position_embeddings"]),
        }
        if kwargs.get("max_seqlen") is not None:
            changed["max_seqlen"] = int(lengths.diff().max())
        return changed

    def restore(self, output: Tensor, per_unit: bool = False) -> Tensor:
        size = 1 if per_unit else self.members
        rank = self._restore.get(output.shape[0] // size)
        if rank is None or output.shape[0] == len(self.raster) * size:
            return output
        return output.view(-1, size, output.shape[-1])[rank].flatten(0, 1)

    def representatives(self) -> Tensor:
        return self.left.float()[self.inverse][:, None]

    def keys_of(self, tokens: VisualTokens) -> Tensor:
        return self._unit_keys(concatenate=True)[self._rank()[self._slots(tokens)]]

    def _split(self) -> tuple[Tensor, Tensor]:
        """Queries and keys [S, H, d] of the block that ran last, before rotation."""
        assert self.keys is not None
        fused = self.keys.unflatten(-1, (3, self.tower.heads, -1))
        return fused[:, 0], fused[:, 1]

    def _unit_keys(self, *, concatenate: bool) -> Tensor:
        keys = self._split()[1].mean(1).view(-1, self.members, self._split()[1].shape[-1])
        return keys.flatten(1) if concatenate else keys.mean(1)

    def attention(self) -> Tensor:
        assert self.rotary is not None
        query, key = (_rotate(x.detach().float(), *self.rotary).transpose(0, 1) for x in self._split())
        bounds = nn.functional.pad(self._frame_lengths().cumsum(0), (1, 0)).tolist()
        parts = [_received(query[:, a:b], key[:, a:b]) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts).view(-1, self.members).mean(-1)[self._rank()][self.inverse]

    def _frame_lengths(self) -> Tensor:
        left = self.left[self.slot] & self.valid
        return left.sum(-1) * self.members

    def mean_keys(self) -> Tensor:
        return self._unit_keys(concatenate=False)[self._rank()][self.inverse]


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [S, H, d] by tables [S, d]: x cos + (-x2, x1) sin, halves x1, x2 of x."""
    first, second = states.chunk(2, -1)
    return states * cosine[:, None].float() + torch.cat([-second, first], -1) * sine[:, None].float()


def _window_order(frames: int, rows: int, columns: int, window: int | None) -> Tensor:
    """int[frames * rows * columns]: raster index of each unit in the order in which a windowed tower holds them.

    Windows of `window` x `window` units go row by row through a frame, units row by row through a window.
    """
    raster = torch.arange(frames * rows * columns).view(frames, rows, columns)
    if window is None:
        return raster.flatten()
    parts = [tile.flatten(1) for band in raster.split(window, 1) for tile in band.split(window, 2)]
    return torch.cat(parts, 1).flatten()


def restore_output(run: TowerRun, output: Any) -> Any:
    """Every token-wise tensor of a tower's output on the full grid."""
    if isinstance(output, Tensor):
        return run.restore(output)
    if isinstance(output, ModelOutput):
        if output.get("last_hidden_state") is not None:
            output["last_hidden_state"] = run.restore(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            # transformers keeps only the states that it was asked for and None for the others.
            states = output["hidden_states"]
            output["hidden_states"] = tuple(None if state is None else run.restore(state) for state in states)
        return output
    return (run.restore(output[0]), *output[1:])
