"""Forward of tower blocks on frames that compute some patches and take the rest from another frame of their video.

What is taken are results of the same block on an earlier frame, the reference: the values of attention, and what
attention and MLP added to the residual stream. References of one call do not depend on the frames between them, so all
of them go through a block together, and then all frames between, each with its own reference.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtoken.backbones.base import Tower
from mmtoken.compressors.base import Context
from mmtoken.engine.flops import TowerShape, block_multiply_adds
from mmtoken.engine.report import SiteReport
from mmtoken.engine.reuse import Group, Reference, ReuseRun, Segments, Video, plan
from mmtoken.engine.tower import rotate
from mmtoken.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from mmtoken.engine.session import Session


class RefreshContext(Context):
    """The context of `refresh`: sizes and memory."""

    def __init__(self, tower: Tower, group: Group) -> None:
        self.depth = tower.feature_block + 1
        self.blocks = len(tower.blocks)
        self.original_counts = [group.patches] * len(group.selective)
        self.memory = group.memory


@dataclass
class BlockCall:
    """A block that is called on some frames.

    Attributes:
        number: of the block.
        block: the module.
        dense: its own forward.
        kwargs: what it is called with besides the hidden states.
    """

    number: int
    block: nn.Module
    dense: Callable[..., Any]
    kwargs: dict[str, Any]


class _Thread(threading.local):
    run: ReuseRun | None = None


@dataclass
class ReuseHooks:
    """Puts the selective forward in the place of that of every tower block."""

    session: Session
    tower: Tower

    def install(self, undo: ExitStack) -> None:
        """Set everything up until `undo` closes."""
        self._thread = _Thread()
        tower = self.tower
        self._fused = tower.keys == tower.values
        self._shape = _shape(tower)
        undo.callback(tower.module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        undo.callback(tower.module.register_forward_hook(self._after, always_call=True).remove)
        for number, block in enumerate(tower.blocks):
            attention = getattr(block, tower.attention)
            noted = {"attention": attention, "mlp": getattr(block, tower.mlp), "keys": getattr(attention, tower.keys)}
            if not self._fused:
                noted["values"] = getattr(attention, tower.values)
            for name, module in noted.items():
                undo.callback(module.register_forward_hook(functools.partial(self._note, name)).remove)
            # Hooks change what goes into a block and what comes out of it, but cannot keep it from running.
            held = block.__dict__.get("forward")
            ours = functools.partial(self._forward, number, block, block.forward)
            object.__setattr__(block, "forward", ours)
            undo.callback(_put_back, block, ours, held)

    # --- the call of the tower --------------------------------------------------------------------------------------

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._thread.run = None  # what an aborted call left
        method = self.session.compressor
        pixels: Any = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        videos = self._videos(module, pixels, args, kwargs)
        run = plan(videos, self.tower.prefix, method.references, method.refresh_count, pixels.device)
        if run.selective or run.stores:
            self._check(module, kwargs)
        self._thread.run = run

    def _videos(self, module: Any, pixels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Video]:
        """The videos of this call; pictures, and tiles of pictures, are videos of one frame."""
        call, states = self.session.thread.encoder, self.session.thread.videos
        moving = states is not None if call is None else call.modality == "video"
        if self.tower.packed:
            grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            shapes = [(t, (h, w)) for t, h, w in grids.tolist()]
        else:
            tiles, grid = len(pixels), self.session.backbone.patch_grid(pixels)
            if call is not None and moving:
                lengths = [len(clip) for clip in self.session.backbone.clips(call.arguments)]
            elif states and tiles % len(states) == 0:  # a tower by itself
                lengths = [tiles // len(states)] * len(states)
            else:
                lengths = [1] * tiles
            shapes = [(length, grid) for length in lengths]
        if not moving:
            return [Video(1, grid, None) for frames, grid in shapes for _ in range(frames)]
        if states is None:
            return [Video(frames, grid, None) for frames, grid in shapes]
        if len(states) != len(shapes):
            raise InputError(
                f"continuing() was given {len(states)} states, but this call has {len(shapes)} videos; give one state "
                "per video, in their order."
            )
        return [Video(frames, grid, state) for (frames, grid), state in zip(shapes, states, strict=True)]

    def _check(self, module: Any, kwargs: dict[str, Any]) -> None:
        name, first = type(self.session.compressor).__name__, self.tower.blocks[0]
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                f"{name} decides per frame which patches a tower computes, which torch.compile cannot trace; leave the "
                "vision tower uncompiled."
            )
        if first.training and getattr(first, "gradient_checkpointing", False):
            raise UnsupportedError(
                f"gradient_checkpointing=True with {name}: the recomputation of a tower block knows nothing of the "
                "frames that it refers to; disable checkpointing in the vision tower."
            )
        if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise UnsupportedError(
                f"output_attentions=True with {name}: there is no attention of patches that are not computed; leave it "
                "out."
            )

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        run, self._thread.run = self._thread.run, None
        if run is not None and output is not None:  # None: the tower raised
            run.commit()

    # --- a block ----------------------------------------------------------------------------------------------------

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self._thread.run
        if run is not None and run.captured is not None:
            run.captured[name] = output if isinstance(output, Tensor) else output[0]

    def _forward(self, number: int, block: nn.Module, dense: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._thread.run
        if run is None:
            return dense(*args, **kwargs)
        chosen: dict[int, Tensor] = {}
        seconds = 0.0
        if run.selective:
            if len(args) > 1:
                kwargs["attention_mask"] = args[1]
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if kwargs.get("attention_mask") is not None:
                raise UnsupportedError(
                    f"{type(self.session.compressor).__name__} computes frames whose patches all see each other, and "
                    "this tower was given an attention mask; leave it out."
                )
            call = BlockCall(number, block, dense, kwargs)
            parts = []
            for group in run.groups:
                part, index, spent = self._group(run, group, call, self._frames(run, group, hidden))
                parts.append(part)
                seconds += spent
                if index is not None:
                    chosen.update(zip(group.selective_frames, index, strict=True))
            output = self._together(run, parts, hidden)
        else:
            # Nothing is left out, so the block runs as it does without a compressor, to the bit.
            with _capturing(run, run.stores) as captured:
                output = dense(*args, **kwargs)
            for group in run.groups if captured else ():
                self._keep(run, group, number, self._reference(captured, functools.partial(self._full, run, group)))
        self._report(run, number, chosen, seconds)
        return output

    def _group(
        self, run: ReuseRun, group: Group, call: BlockCall, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None, float]:
        """float[G, T, C], a block's output for frames of equal size; which patches were chosen; seconds spent on that.

        Args:
            run: the call of the tower.
            group: the frames.
            call: the block.
            hidden: float[G, T, C].
        """
        done, pool = torch.empty_like(hidden), []
        if len(group.full):
            with _capturing(run, bool(group.selective_frames or group.last)) as captured:
                whole = self._dense(run, group, call, hidden[group.full])
            if captured:
                made = self._reference(captured, lambda x: x.reshape(len(group.full), group.patches, -1))
                self._keep(run, group, call.number, made)
                pool.append(made)
            if not group.selective_frames:
                return whole, None, 0.0
            done.index_copy_(0, group.full, whole)
        pool += [state.blocks[call.number].map(lambda x: x[None]) for state in group.carried]
        together = pool[0] if len(pool) == 1 else Reference.cat(pool)
        reference = together.map(lambda x: x[group.source])
        some, index, seconds = self._selective(run, group, call, hidden[group.selective], reference)
        return done.index_copy_(0, group.selective, some), index, seconds

    def _dense(self, run: ReuseRun, group: Group, call: BlockCall, hidden: Tensor) -> Tensor:
        """float[m, T, C]: the block's own output for the frames that are computed in full."""
        kwargs = call.kwargs
        if self.tower.packed:
            segments = self._segments(run, group, kwargs["cu_seqlens"])
            steps = torch.arange(len(hidden), device=hidden.device)[:, None] * group.patches
            inner = torch.tensor(segments.bounds[1:], device=hidden.device)
            lengths = nn.functional.pad((steps + inner).flatten(), (1, 0)).to(kwargs["cu_seqlens"].dtype)
            tables = tuple(self._full(run, group, table).flatten(0, 1) for table in kwargs["position_embeddings"])
            kwargs = {**kwargs, "cu_seqlens": lengths, "position_embeddings": tables}
        output = call.dense(hidden.flatten(0, 1) if self.tower.packed else hidden, **kwargs)
        output = output if isinstance(output, Tensor) else output[0]
        return output.view_as(hidden)

    def _selective(
        self, run: ReuseRun, group: Group, call: BlockCall, hidden: Tensor, reference: Reference
    ) -> tuple[Tensor, Tensor, float]:
        """The block's output for frames float[F, T, C] that take what they do not compute from float[F, T, C]."""
        tower, block = self.tower, call.block
        attention: Any = getattr(block, tower.attention)
        first, second = (getattr(block, name) for name in tower.norms)
        mlp = getattr(block, tower.mlp)
        normed = first(hidden)
        keys = self._project(attention, 1, normed)
        index, seconds = self._choose(group, call.number, keys, reference.keys)
        rows = _Rows(index, group.patches)
        some = rows.take(normed)
        values = rows.put(reference.values, self._project(attention, 2, some))
        mixed = self._attend(run, group, call, attention, rows, self._project(attention, 0, some), keys, values)
        hidden = hidden + rows.put(reference.attention, getattr(attention, tower.output)(mixed))
        return hidden + rows.put(reference.mlp, mlp(second(rows.take(hidden)))), index, seconds

    def _choose(self, group: Group, number: int, keys: Tensor, reference: Tensor) -> tuple[Tensor, float]:
        session, method = self.session, self.session.compressor
        context = RefreshContext(self.tower, group)
        context.learned = None if session.trained is None else session.trained.module
        started = session.clock()
        index = method.refresh(keys, reference, number, context)
        seconds = session.clock() - started
        wanted = (len(keys), method.refresh_count(group.patches))
        if tuple(index.shape) != wanted or index.dtype != torch.long:
            raise InputError(
                f"refresh chose {index.dtype}{list(index.shape)} in block {number}; give int64{list(wanted)}, which is "
                "refresh_count patches of each frame."
            )
        return index, seconds

    def _project(self, attention: Any, part: int, hidden: Tensor) -> Tensor:
        """Queries (part 0), keys (1) or values (2) of float[F, n, C], all heads side by side."""
        tower = self.tower
        module = getattr(attention, (tower.queries, tower.keys, tower.values)[part])
        if not self._fused:
            projected: Tensor = module(hidden)
            return projected
        if type(module) is nn.Linear and "forward" not in vars(module):
            width = module.out_features // 3
            rows = slice(part * width, (part + 1) * width)
            return nn.functional.linear(hidden, module.weight[rows], None if module.bias is None else module.bias[rows])
        # Adapters, quantised weights and the like know how to do all three only.
        return module(hidden).chunk(3, -1)[part]  # type: ignore[no-any-return]

    def _attend(
        self,
        run: ReuseRun,
        group: Group,
        call: BlockCall,
        attention: Any,
        rows: _Rows,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """float[F, K, C]: attention of queries float[F, K, C] at `rows` to all patches of their frame and segment."""
        heads = self.tower.heads
        query, key, value = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))
        mask = None
        if self.tower.packed:
            tables = [self._frames(run, group, table)[group.selective] for table in call.kwargs["position_embeddings"]]
            key = _rotated(key, *tables)
            query = _rotated(query, *(rows.take(table) for table in tables))
            segment = self._segments(run, group, call.kwargs["cu_seqlens"]).of
            if segment is not None:
                mask = (segment[rows.index][..., None] == segment)[:, None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        dropout = getattr(attention, "dropout", getattr(attention, "attention_dropout", 0.0))
        dropout = dropout if attention.training else 0.0
        if self.tower.module.config._attn_implementation == "eager":  # type: ignore[union-attr]
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            mixed = nn.functional.dropout(weights, dropout) @ value
        else:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout)
        return mixed.transpose(1, 2).flatten(2)

    # --- frames of a call -------------------------------------------------------------------------------------------

    def _frames(self, run: ReuseRun, group: Group, values: Tensor) -> Tensor:
        """float[G, T, ...]: what belongs to the frames of a group, of values over the whole call."""
        if self.tower.packed:
            if len(run.groups) == 1:
                return values.view(-1, group.patches, *values.shape[1:])
            return values[group.rows]
        return values if len(run.groups) == 1 else values[group.frames]

    def _full(self, run: ReuseRun, group: Group, values: Tensor) -> Tensor:
        """float[m, T, ...]: of its frames that are computed in full."""
        return self._frames(run, group, values)[group.full]

    def _together(self, run: ReuseRun, parts: list[Tensor], hidden: Tensor) -> Tensor:
        """Outputs of the groups in the order of the call."""
        if len(parts) == 1:
            return parts[0].view_as(hidden)
        order = torch.cat([group.rows.flatten() for group in run.groups]).argsort()
        return torch.cat([part.flatten(0, 1) for part in parts])[order]

    def _segments(self, run: ReuseRun, group: Group, lengths: Tensor) -> Segments:
        """Where attention segments lie within the frames of a group; windows never reach over a frame's end."""
        key = (id(group), id(lengths))
        if key not in run.segments:
            start = run.starts[group.first]
            bounds = [bound - start for bound in lengths.tolist() if start <= bound <= start + group.patches]
            of = None
            if len(bounds) > 2:
                sizes = torch.tensor(bounds, device=lengths.device).diff()
                of = torch.arange(len(sizes), device=lengths.device).repeat_interleave(sizes)
            run.segments[key] = Segments(lengths, bounds, of)
        return run.segments[key]

    def _reference(self, captured: dict[str, Tensor], shape: Callable[[Tensor], Tensor]) -> Reference:
        """What was noted of a block, as `shape` makes it float[m, T, ...]."""
        keys, values = captured["keys"], captured.get("values")
        if values is None:
            _, keys, values = keys.chunk(3, -1)
        return Reference(*(shape(part) for part in (keys, values, captured["attention"], captured["mlp"])))

    def _keep(self, run: ReuseRun, group: Group, number: int, made: Reference) -> None:
        """Note references that outlive the call, as copies: a part of a tensor holds on to all of it."""
        for state, index in group.last:
            own = made.map(lambda x, i=index: x[i].detach().clone())  # type: ignore[misc]
            run.made.setdefault(id(state), {})[number] = own

    def _report(self, run: ReuseRun, number: int, chosen: dict[int, Tensor], seconds: float) -> None:
        kept = [chosen.get(frame, run.every[size]) for frame, size in enumerate(run.sizes)]
        done = [len(index) for index in kept]
        report = SiteReport("refresh", number, list(run.sizes), done, kept, seconds)
        report.multiply_adds = sum(map(functools.partial(block_multiply_adds, self._shape), run.sizes, done))
        report.multiply_adds_dense = sum(block_multiply_adds(self._shape, size, size) for size in run.sizes)
        self.session.note(report)


class _Rows:
    """Some patches of every frame, int[F, K] of T."""

    def __init__(self, index: Tensor, patches: int) -> None:
        self.index = index
        # Whole rows of one long sequence are copied many times as fast as by gather and scatter.
        self._flat = (index + torch.arange(len(index), device=index.device)[:, None] * patches).flatten()

    def take(self, values: Tensor) -> Tensor:
        """float[F, K, C] of float[F, T, C]."""
        rows = values.flatten(0, 1).index_select(0, self._flat)
        return rows.view(*self.index.shape, values.shape[-1])

    def put(self, values: Tensor, some: Tensor) -> Tensor:
        """`values` float[F, T, C] with these patches replaced by `some` float[F, K, C]; writes into `values`."""
        return values.flatten(0, 1).index_copy_(0, self._flat, some.flatten(0, 1).to(values.dtype)).view_as(values)


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of float[F, n, H, d] by tables float[F, n, d]."""
    turned = rotate(states.flatten(0, 1), cosine.flatten(0, 1), sine.flatten(0, 1))
    return turned.to(states.dtype).view_as(states)


@contextmanager
def _capturing(run: ReuseRun, wanted: bool) -> Iterator[dict[str, Tensor]]:
    """Note what a block's projections and branches put out, if that is wanted."""
    captured: dict[str, Tensor] = {}
    run.captured = captured if wanted else None
    try:
        yield captured
    finally:
        run.captured = None


def _shape(tower: Tower) -> TowerShape:
    first = tower.blocks[0]
    linears: Any = [part for part in getattr(first, tower.mlp).modules() if hasattr(part, "in_features")]
    width = getattr(getattr(first, tower.attention), tower.output).in_features
    return TowerShape(width, sum(part.in_features * part.out_features for part in linears))


def _put_back(block: nn.Module, ours: Any, held: Any) -> None:
    if block.__dict__.get("forward") is not ours:
        return  # another library has wrapped it since, and without the hooks on the tower it does nothing
    block.__dict__.pop("forward", None)
    if held is not None:
        object.__setattr__(block, "forward", held)
