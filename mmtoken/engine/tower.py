"""Compresses inside a vision tower: shortens the sequence and restores the full grid at its output.

Everything after the tower (pixel shuffle, 2x2 mergers, un-padding, pooling) needs the full grid, so the output holds
at every dropped patch a copy of the last kept one before it; the engine drops those again before the decoder.

A sequence gets shorter as a block begins, or between a block's attention and its MLP. A block holds its hidden states
for the residual there, out of reach of hooks: the new features are written into those, the MLP runs on the short
sequence, its output comes back on the long one for the addition, and the block's output is cut.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from mmtoken.backbones.base import Tower
from mmtoken.compressors.base import TowerStates
from mmtoken.engine.attention import dense
from mmtoken.errors import UnsupportedError
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.tokens import VisualTokens

PARTS = ("query", "key", "value")


@dataclass
class BlockCall:
    """One call of a block: what its projections put out, its own output, and the sequence that it ran on.

    Attributes:
        projected: outputs of the attention's projections by the name of their module.
        output: the block's output; only kept for blocks that are read.
        mask: attention mask of dense blocks, None without one.
        rotary: (cosine, sine) float[S, d] of packed blocks.
        attention: the block's attention, and `entered` what entered it, for towers with `Tower.split`.
        tables: rotary tables that dense blocks were handed, None without.
        guests: how many tokens attend in this block only, behind the others.
        back: index into the sequence of every place of the grid, None while the sequence is the grid.
        real: bool[tiles, S], False on the padding of short rows; None without padding.
        lengths: int[frames], patches per frame of packed sequences.
        output_back: the same as `back` for what the block puts out.
    """

    projected: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    attention: Any = None
    entered: Tensor | None = None
    tables: Tensor | None = None
    guests: int = 0
    back: Tensor | None = None
    real: Tensor | None = None
    lengths: Tensor | None = None
    output_back: Tensor | None = None


class TowerRun(ABC):
    """One call of a tower.

    Rows of tokens are what attends to itself: a tile or an image for dense towers, a frame for packed ones. A token is
    the square of patches that becomes one projected token, with the features of its patches side by side.

    Attributes:
        now: the block that is running or has run last.
        calls: the blocks that are read after the tower has run.
        backs: per block number, see `BlockCall.output_back`.
        came: where each place of the current sequence was in the one before the last cut.
        cls: float[tiles, D], CLS features where the method acts, None without CLS.
        tokens: what a method left, None before it acted.
        counts: tokens per row before any cut.
        memory: what the method remembers during this call.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.now = BlockCall()
        self.calls: dict[int, BlockCall] = {}
        self.backs: dict[int, Tensor | None] = {}
        self.back: Tensor | None = None
        self.came: Tensor | None = None
        self.cls: Tensor | None = None
        self.tokens: VisualTokens | None = None
        self.counts: list[int] | None = None
        self.memory: dict[str, Any] = {}

    def begin(self, number: int, kwargs: dict[str, Any], *, read: bool) -> None:
        """Note that block `number` starts with these arguments; `read`: what it computes is asked for later."""
        self.now = self.record(kwargs)
        self.backs[number] = self.now.output_back = self.back
        if read:
            self.calls[number] = self.now

    def call(self, block: int | None) -> BlockCall:
        """What was noted of a block, by default of the one that the projector reads.

        Raises:
            UnsupportedError: nothing was, or it has not run yet.
        """
        number = self.tower.feature_block if block is None else block
        found = self.calls.get(number)
        if found is None:
            raise UnsupportedError(
                f"Nothing of tower block {number} is known here: it has not run yet, or was not declared in "
                "tower_layers()."
            )
        return found

    def projection(self, call: BlockCall, name: str) -> Tensor:
        """What the block's projection of this name put out.

        Raises:
            UnsupportedError: it was not noted.
        """
        if name not in call.projected:
            raise UnsupportedError(
                "Attention, keys or states of this tower block were not noted: declare tower_attention, tower_keys or "
                "tower_states in `needs`."
            )
        return call.projected[name]

    @abstractmethod
    def record(self, kwargs: dict[str, Any]) -> BlockCall:
        """An empty record of a block that is called with these arguments on the current sequence."""

    def note_cut(self, number: int) -> None:
        """Note that block `number` puts out the sequence as the last cut left it."""
        self.backs[number] = self.now.output_back = self.back

    @abstractmethod
    def units(self, hidden: Tensor) -> VisualTokens:
        """The tokens of a block's input."""

    @abstractmethod
    def shorten(self, hidden: Tensor, tokens: VisualTokens) -> Tensor:
        """The block's input that holds `tokens` only."""

    @abstractmethod
    def write(self, into: Tensor, values: Tensor) -> Tensor:
        """Write what a sequence holds after a cut into one as it was before the cut, in place, and return that."""

    @abstractmethod
    def left_of(self, values: Tensor) -> Tensor:
        """What is left of a sequence after the last cut."""

    @abstractmethod
    def block_arguments(self, kwargs: dict[str, Any], size_bias: bool) -> dict[str, Any]:
        """The block's other arguments for the current sequence."""

    @abstractmethod
    def restore(self, output: Tensor, back: Tensor | None, per_unit: bool = False) -> Tensor:
        """A tensor over a sequence (of patches, or of units) that `back` leads back from, on the full grid."""

    def fill(self, output: Any) -> Any:
        """The output of a tower with `Tower.last`: sequences, with or without CLS and registers, on the full grid."""
        raise UnsupportedError("Only towers on dense sequences put out pooled features.")

    @abstractmethod
    def representatives(self) -> Tensor:
        """float[tiles, patches, 1] or float[units, 1]: 1 where a patch or unit is left after the last block."""

    @abstractmethod
    def keys_of(self, tokens: VisualTokens, *, joint: bool) -> Tensor:
        """float[rows, U, M * d]: head-averaged keys of the block that ran last, or those of all heads."""

    @abstractmethod
    def states_of(self, tokens: VisualTokens) -> TowerStates:
        """Queries, keys and values of the block that ran last."""

    @abstractmethod
    def attention(self, block: int | None, *, joint: bool) -> Tensor:
        """float[tiles, patches] or float[units]: attention received in a block, summed over heads."""

    @abstractmethod
    def mean_keys(self, block: int | None, *, joint: bool) -> Tensor:
        """float[tiles, patches, d] or float[units, d]: head-averaged keys of a block, or those of all heads."""

    @abstractmethod
    def features(self, block: int) -> Tensor:
        """float[tiles, patches, D] or float[units, D]: output of a block, averaged over the patches of a unit."""


def _head_mean(projected: Tensor, heads: int) -> Tensor:
    return projected.view(*projected.shape[:-1], heads, -1).mean(-2)


class DenseRun(TowerRun):
    """Hidden states [tiles, prefix + patches, D]; rows of which less is left than of others are padded on the right."""

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
        # The patch at each place of the body of the current sequence, and how many places of a row hold one.
        self.kept = self.where
        self.real: Tensor | None = None

    def record(self, kwargs: dict[str, Any]) -> BlockCall:
        return BlockCall(
            mask=None if self.tower.mask_per_head else dense(kwargs.get(self.tower.mask)),
            tables=None if self.tower.rotate is None else kwargs.get("rope"),
            back=self.back,
            real=self.real,
        )

    def units(self, hidden: Tensor) -> VisualTokens:
        body = hidden[:, self.tower.prefix :]
        tiles = body.shape[0]
        if self.tokens is None:
            features = body[:, self.members.flatten()].reshape(tiles, len(self.members), -1)
            return VisualTokens.from_features(features, grid=(self.grid,) * tiles)
        places = self._places(self.tokens)
        features = body.gather(1, places[..., None].expand(-1, -1, body.shape[-1]))
        return self.tokens.replace(features=features.view(tiles, self.tokens.source.shape[1], -1))

    def _places(self, tokens: VisualTokens) -> Tensor:
        """int[tiles, U * M]: places of the patches of tokens in the body of the current sequence."""
        return self.where.gather(1, self.members[tokens.source].flatten(1))

    def shorten(self, hidden: Tensor, tokens: VisualTokens) -> Tensor:
        tiles, width = hidden.shape[0], hidden.shape[-1]
        prefix, whole = self.tower.prefix, bool(tokens.valid.all())
        members = self.members[tokens.source].flatten(1)
        features = tokens.features.reshape(tiles, -1, width)
        valid = tokens.valid.repeat_interleave(self.members.shape[1], 1)
        if not whole:
            # Padding goes behind the last patch, and holds zeros.
            members = members.masked_fill(~valid, self.patches)
            features = features.masked_fill(~valid[..., None], 0.0)
        order = members.argsort(dim=-1, stable=True)
        body = features.gather(1, order[..., None].expand(-1, -1, width))
        kept = members.gather(1, order)
        first = torch.arange(prefix, device=kept.device).expand(tiles, -1)
        self.came = torch.cat([first, self.where.gather(1, kept.clamp(max=self.patches - 1)) + prefix], 1)
        rank = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        spare = torch.zeros(tiles, self.patches + 1, dtype=torch.long, device=kept.device)
        self.where = spare.scatter(1, kept, rank)[:, : self.patches]
        self.left = spare.bool().scatter(1, kept, True)[:, : self.patches]
        self.kept = kept.clamp(max=self.patches - 1)
        self.real = None if whole else nn.functional.pad(valid.gather(1, order), (prefix, 0), value=True)
        self.tokens = tokens
        filled = (self.left.long().cumsum(-1) - 1).clamp(min=0) + prefix
        self.back = torch.cat([first, filled], 1)
        return torch.cat([hidden[:, :prefix], body], 1)

    def write(self, into: Tensor, values: Tensor) -> Tensor:
        assert self.came is not None
        if self.real is None:
            return into.scatter_(1, self.came[..., None].expand_as(values), values)
        rows, places = self.real.nonzero(as_tuple=True)
        into[rows, self.came[rows, places]] = values[rows, places]
        return into

    def left_of(self, values: Tensor) -> Tensor:
        assert self.came is not None
        return values.gather(1, self.came[..., None].expand(-1, -1, values.shape[-1]))

    def block_arguments(self, kwargs: dict[str, Any], size_bias: bool) -> dict[str, Any]:
        if self.tokens is None or (self.real is None and self.tokens.source.shape[1] == len(self.members)):
            return kwargs
        changed = dict(kwargs)
        tiles, prefix = len(self.kept), self.tower.prefix
        if self.tower.rotate is not None and kwargs.get("rope") is not None:
            changed["rope"] = self._tables(kwargs["rope"])
        mask = kwargs.get(self.tower.mask)
        if mask is not None:
            kept = torch.cat([torch.arange(prefix, device=mask.device).expand(tiles, -1), self.kept + prefix], 1)
            mask = mask.expand(tiles, -1, -1, -1)
            mask = mask.gather(2, kept[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = mask.gather(3, kept[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        bias = self._bias(size_bias)
        if bias is not None:
            bias = bias.expand(-1, -1, bias.shape[-1], -1)
            lowest = torch.finfo(bias.dtype).min
            if mask is not None and mask.dtype == torch.bool:
                mask = bias.masked_fill(~mask, lowest)
            else:
                # A sum of two lowest numbers would be infinite, and a row of them not a number.
                mask = bias if mask is None else (bias + mask).clamp(min=lowest)
        if mask is not None and self.tower.mask_per_head:
            mask = mask.expand(-1, self.tower.heads, -1, -1).flatten(0, 1)
        changed[self.tower.mask] = mask
        return changed

    def _tables(self, tables: Tensor) -> Tensor:
        """Rotary tables of the patches that are left of each tile, float[tiles, H or 1, K, d].

        Args:
            tables: float[patches, d], or float[H, patches, d] where heads differ.
        """
        if tables.ndim == 2:
            return tables[self.kept][:, None]
        return tables[:, self.kept].transpose(0, 1)

    def _bias(self, size_bias: bool) -> Tensor | None:
        """float[tiles, 1, 1, S]: what is added to the scores of every key, None if nothing is."""
        assert self.tokens is not None
        if not size_bias and self.real is None:
            return None
        dtype = self.tokens.features.dtype
        bias = torch.zeros(self.kept.shape, dtype=dtype, device=self.kept.device)
        if size_bias:
            # ToMe, equation 1: a merged token weighs in as often as the tokens it stands for.
            per_patch = self.tokens.size.repeat_interleave(self.members.shape[1], 1)
            sizes = torch.ones_like(self.left, dtype=per_patch.dtype)
            where = self.members[self.tokens.source].flatten(1)
            valid = self.tokens.valid.repeat_interleave(self.members.shape[1], 1)
            spare = nn.functional.pad(sizes, (0, 1), value=1.0)
            sizes = spare.scatter(1, where.masked_fill(~valid, self.patches), per_patch)[:, : self.patches]
            bias = sizes.gather(1, self.kept).log().to(dtype)
        bias = nn.functional.pad(bias, (self.tower.prefix, 0))
        if self.real is not None:
            self._check_mask()
            bias = bias.masked_fill(~self.real, torch.finfo(dtype).min)
        return bias[:, None, None, :]

    def _check_mask(self) -> None:
        if self.tower.any_mask:
            return
        kind = self.tower.module.config._attn_implementation  # type: ignore[union-attr]
        if kind not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"The method left different numbers of tokens per tile, which attn_implementation={kind!r} of this "
                "tower cannot hide from each other; load the model with 'sdpa' or 'eager'."
            )

    def restore(self, output: Tensor, back: Tensor | None, per_unit: bool = False) -> Tensor:
        if back is None:
            return output
        return output.gather(1, back[..., None].expand(-1, -1, output.shape[-1]))

    def fill(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self.fill(part) for part in output)
        if not isinstance(output, Tensor) or output.ndim != 3 or self.back is None:
            return output
        prefix, patches = self.tower.prefix, self.kept.shape[1]
        if output.shape[1] == prefix + patches:
            return self.restore(output, self.back)
        return self.restore(output, self.back[:, prefix:] - prefix) if output.shape[1] == patches else output

    def representatives(self) -> Tensor:
        return self.left.float()[..., None]

    def _part(self, call: BlockCall, place: int) -> Tensor:
        """float[tiles, S, H * d]: queries (0), keys (1) or values (2) of a block, before rotation."""
        tower = self.tower
        if tower.split is not None:
            if call.entered is not None and not call.projected:
                with torch.no_grad():
                    call.projected = dict(zip(PARTS, tower.split(call.attention, call.entered), strict=True))
            return self.projection(call, PARTS[place])
        states = self.projection(call, (tower.queries, tower.keys, tower.values)[place])
        return states.chunk(3, -1)[place] if tower.queries == tower.keys else states

    def _heads(self, call: BlockCall, place: int) -> Tensor:
        """float[tiles, H, S, d]: the same per head, queries and keys rotated."""
        tower = self.tower
        states: Tensor = self._part(call, place).unflatten(-1, (tower.heads, -1)).transpose(1, 2)
        if tower.rotate is None or call.tables is None or place == 2:
            return states
        end = states.shape[2] - call.guests
        body = tower.rotate(call.attention, states[:, :, tower.prefix : end], call.tables).to(states.dtype)
        return torch.cat([states[:, :, : tower.prefix], body, states[:, :, end:]], 2)

    def keys_of(self, tokens: VisualTokens, *, joint: bool) -> Tensor:
        keys = self._keys(self.now, joint=joint)[:, self.tower.prefix :]
        places = self._places(tokens)
        return keys.gather(1, places[..., None].expand(-1, -1, keys.shape[-1])).reshape(*tokens.source.shape, -1)

    def states_of(self, tokens: VisualTokens) -> TowerStates:
        tower, places = self.tower, self._places(tokens)
        parts = {}
        for place, name in enumerate(PARTS):
            states = self._heads(self.now, place)
            body, end = states[:, :, tower.prefix :], states.shape[2] - self.now.guests
            index = places[:, None, :, None].expand(-1, tower.heads, -1, body.shape[-1])
            per_token = (tokens.source.shape[1], self.members.shape[1])
            parts[name] = body.gather(2, index).unflatten(2, per_token)
            parts[f"prefix_{name}"] = torch.cat([states[:, :, : tower.prefix], states[:, :, end:]], 2)
        return TowerStates(**parts)

    def attention(self, block: int | None, *, joint: bool) -> Tensor:
        call = self.call(block)
        prefix = self.tower.prefix
        query, key = (self._heads(call, place).float() for place in (0, 1))
        if joint:
            query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
        seen = self._seen(call)
        # Without CLS all patches ask, but not padding.
        received = _received(query[:, :, :1], key, seen=seen) if prefix else _received(query, key, seen, seen)
        return self.restore(received[..., None], call.back)[:, prefix:, 0]

    @staticmethod
    def _seen(call: BlockCall) -> Tensor | None:
        """bool[tiles, S]: keys that the block could see at all, None if all."""
        if call.mask is None:
            return call.real
        # Masks of these towers are the same for every head and query; flash attention takes them per key.
        row = call.mask if call.mask.ndim == 2 else call.mask[:, 0, 0]
        if not row.is_floating_point():
            return row.bool()
        return row > torch.finfo(row.dtype).min / 2

    def _keys(self, call: BlockCall, *, joint: bool) -> Tensor:
        keys = self._part(call, 1)
        return keys if joint else _head_mean(keys, self.tower.heads)

    def mean_keys(self, block: int | None, *, joint: bool) -> Tensor:
        call = self.call(block)
        return self.restore(self._keys(call, joint=joint), call.back)[:, self.tower.prefix :]

    def features(self, block: int) -> Tensor:
        call = self.call(block)
        assert call.output is not None
        return self.restore(call.output, call.output_back)[:, self.tower.prefix :]


def _received(query: Tensor, key: Tensor, asking: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """float32[B, k], attention each key receives: mean over queries, sum over heads.

    Args:
        query: float[B, H, q, d].
        key: float[B, H, k, d].
        asking: bool[B, q], the queries that count; None: all.
        seen: bool[B, k], the keys that may be looked at; None: all.
    """
    mask = None if seen is None else seen[:, None]
    return attention_rows(query, key, mask=mask, valid=asking, mean="queries") * query.shape[1]


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

    def record(self, kwargs: dict[str, Any]) -> BlockCall:
        left = self.left[self.slot] & self.valid
        rotary = kwargs["position_embeddings"]
        return BlockCall(rotary=rotary, back=self.back, lengths=left.sum(-1) * self.members)

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
        rows = torch.arange(self.members, device=slots.device)
        self.came = (self._rank()[slots[order]][:, None] * self.members + rows).flatten()
        self.left = torch.zeros_like(self.left).scatter(0, slots, True)
        self.tokens = tokens
        self.back = self._rank()
        return values[order].view(-1, hidden.shape[-1])

    def write(self, into: Tensor, values: Tensor) -> Tensor:
        assert self.came is not None
        return into.index_copy_(0, self.came, values)

    def left_of(self, values: Tensor) -> Tensor:
        assert self.came is not None
        return values[self.came]

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

    def restore(self, output: Tensor, back: Tensor | None, per_unit: bool = False) -> Tensor:
        size = 1 if per_unit else self.members
        if back is None or output.shape[0] == len(self.raster) * size:
            return output
        return output.view(-1, size, output.shape[-1])[back].flatten(0, 1)

    def representatives(self) -> Tensor:
        return self.left.float()[self.inverse][:, None]

    def _on_grid(self, values: Tensor, back: Tensor | None) -> Tensor:
        """Values per unit of a sequence that `back` leads back from, in raster order of all units."""
        return (values if back is None else values[back])[self.inverse]

    def keys_of(self, tokens: VisualTokens, *, joint: bool) -> Tensor:
        return self._unit_keys(self.now, joint=joint).flatten(1)[self._rank()[self._slots(tokens)]]

    def states_of(self, tokens: VisualTokens) -> TowerStates:
        query, key, value = self._split(self.now)
        assert self.now.rotary is not None
        index = self._rank()[self._slots(tokens)]
        parts = {}
        for name, states in (
            ("query", rotate(query, *self.now.rotary).to(query.dtype)),
            ("key", rotate(key, *self.now.rotary).to(key.dtype)),
            ("value", value),
        ):
            per_unit = states.unflatten(0, (-1, self.members))
            parts[name] = per_unit[index].permute(0, 3, 1, 2, 4)
            parts[f"prefix_{name}"] = states.new_zeros(len(index), states.shape[1], 0, states.shape[2])
        return TowerStates(**parts)

    def _split(self, call: BlockCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [S, H, d], before rotation."""
        query, key, value = self.projection(call, self.tower.keys).unflatten(-1, (3, self.tower.heads, -1)).unbind(1)
        return query, key, value

    def _unit_keys(self, call: BlockCall, *, joint: bool) -> Tensor:
        """float[units, M, d]."""
        split = self._split(call)[1]
        keys = split.flatten(1) if joint else split.mean(1)
        return keys.view(-1, self.members, keys.shape[-1])

    def attention(self, block: int | None, *, joint: bool) -> Tensor:
        call = self.call(block)
        assert call.rotary is not None and call.lengths is not None
        query, key = (rotate(x.float(), *call.rotary).transpose(0, 1) for x in self._split(call)[:2])
        if joint:
            query, key = (x.transpose(0, 1).flatten(1)[None] for x in (query, key))
        bounds = nn.functional.pad(call.lengths.cumsum(0), (1, 0)).tolist()
        parts = [_received(query[None, :, a:b], key[None, :, a:b])[0] for a, b in itertools.pairwise(bounds)]
        return self._on_grid(torch.cat(parts).view(-1, self.members).mean(-1), call.back)

    def mean_keys(self, block: int | None, *, joint: bool) -> Tensor:
        call = self.call(block)
        return self._on_grid(self._unit_keys(call, joint=joint).mean(1), call.back)

    def features(self, block: int) -> Tensor:
        call = self.call(block)
        assert call.output is not None
        return self._on_grid(call.output.unflatten(0, (-1, self.members)).mean(1), call.output_back)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [S, H, d] by tables [S, d], in float32: x cos + (-x2, x1) sin, halves x1, x2 of x."""
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
    if run.tower.last is not None:
        return run.fill(output)
    if isinstance(output, Tensor):
        return run.restore(output, run.back)
    if isinstance(output, ModelOutput):
        if output.get("last_hidden_state") is not None:
            output["last_hidden_state"] = run.restore(output["last_hidden_state"], run.back)
        if output.get("hidden_states") is not None:
            # Entry i is what block i - 1 put out; transformers keeps only those that it was asked for, None for others.
            output["hidden_states"] = tuple(
                None if state is None else run.restore(state, run.backs.get(number - 1))
                for number, state in enumerate(output["hidden_states"])
            )
        return output
    return (run.restore(output[0], run.back), *output[1:])
