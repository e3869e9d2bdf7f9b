"""Hooks on the tower and around the projector."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmtoken.backbones.base import Tower
from mmtoken.compressors.base import Context, TowerStates
from mmtoken.engine import gather
from mmtoken.engine.compat import check_checkpointing
from mmtoken.engine.encode import EncoderCall
from mmtoken.engine.measure import note_tokens
from mmtoken.engine.prompt import Prompt, known
from mmtoken.engine.report import Report
from mmtoken.engine.tower import DenseRun, PackedRun, TowerRun, restore_output
from mmtoken.errors import UnsupportedError
from mmtoken.kernels.dispatch import ran
from mmtoken.tokens import VisualTokens

if TYPE_CHECKING:
    from mmtoken.engine.session import Session


class TowerContext(Context):
    """The context of sites inside the tower and around the projector."""

    tokenwise_projector = True

    def __init__(self, run: TowerRun, counts: list[int], seeds: list[int] | None, *, inside: bool) -> None:
        self.run = run
        self.depth = run.tower.feature_block + 1
        self.blocks = len(run.tower.blocks)
        self.memory = run.memory
        self.original_counts = counts
        self._seeds = seeds
        self._inside = inside
        self.prompt: Callable[[], tuple[Prompt, Tensor]] | None = None
        self.projected: Callable[[Tensor], Tensor] | None = None

    def _of(self, values: Tensor, tokens: VisualTokens) -> Tensor:
        extra = int(tokens.source.max()) + 1 - values.shape[1] if tokens.source.numel() else 0
        if extra > 0:  # select strategy "full": CLS comes first among the projector's tokens
            values = torch.cat([values.new_zeros(values.shape[0], extra, *values.shape[2:]), values], 1)
        return values.gather(1, tokens.source) if values.ndim == 2 else gather.rows(values, tokens.source)

    def tower_attention(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        self.scores = self._of(self.run.attention(block, joint=joint), tokens)
        return self.scores

    def tower_keys(self, tokens: VisualTokens, block: int | None = None, *, joint: bool = False) -> Tensor:
        if self._inside and block is None:
            return self.run.keys_of(tokens, joint=joint)
        return self._of(self.run.mean_keys(block, joint=joint), tokens)

    def tower_states(self, tokens: VisualTokens) -> TowerStates:
        if not self._inside:
            raise UnsupportedError("tower_states exists between tower blocks only (vision_layer).")
        return self.run.states_of(tokens)

    def tower_features(self, tokens: VisualTokens, blocks: Sequence[int]) -> Tensor:
        return torch.cat([self._of(self.run.features(block), tokens) for block in blocks], -1)

    def tower_cls(self, tokens: VisualTokens) -> Tensor | None:
        return self.run.cls

    def prompt_embedding(self, tokens: VisualTokens) -> Tensor:
        prompt, rows = self._asked("prompt_embedding")
        return prompt.mean(rows)

    def question_state(self, tokens: VisualTokens) -> Tensor:
        prompt, rows = self._asked("question_state")
        return prompt.state(rows)

    def prompt_ids(self, tokens: VisualTokens) -> list[Tensor]:
        prompt, rows = self._asked("prompt_ids")
        return prompt.ids_of(rows)

    def _asked(self, name: str) -> tuple[Prompt, Tensor]:
        if self.prompt is None:
            raise self._missing(name)
        return self.prompt()

    def to_llm(self, tokens: VisualTokens) -> Tensor:
        if self.projected is None:
            raise self._missing("to_llm")
        return self.projected(tokens.features)

    def content_seed(self, tokens: VisualTokens) -> list[int]:
        if self._seeds is None:
            raise UnsupportedError("content_seed was not declared in `needs`.")
        return self._seeds


def _check_blocks(blocks: Sequence[int], total: int) -> set[int]:
    for block in blocks:
        if not 0 <= block < total:
            raise UnsupportedError(
                f"tower_layers() names block {block}, but this tower has {total} blocks; choose from 0 to {total - 1}."
            )
    return set(blocks)


class _Thread(threading.local):
    call: EncoderCall | None = None
    features: Tensor | None = None
    projecting: bool = False
    projected: VisualTokens | None = None
    length: int = 0
    mask: Tensor | None = None


@dataclass
class VisionHooks:
    """Sets the hooks that a compressor needs on one tower."""

    session: Session
    tower: Tower

    def install(self) -> Iterator[RemovableHandle]:
        """Register them; yields the handles."""
        self._thread = _Thread()
        tower, method = self.tower, self.session.compressor
        inside, last = self._cuts, tower.feature_block
        yield tower.module.register_forward_pre_hook(self._tower_pre, with_kwargs=True)
        yield tower.module.register_forward_hook(self._tower_post, always_call=True)
        blocks = len(tower.blocks)
        extra = method.tower_layers(last + 1, blocks)
        self._read = _check_blocks(extra, blocks)
        if {"tower_attention", "tower_keys"} & method.needs:
            self._read.add(last)
        later = {"tower_attention": {tower.queries, tower.keys}, "tower_keys": {tower.keys}}
        between = {"tower_keys": {tower.keys}, "tower_states": {tower.queries, tower.keys, tower.values}}
        for number, block in enumerate(tower.blocks):
            if inside or number in self._read:
                yield block.register_forward_pre_hook(functools.partial(self._block_pre, number), with_kwargs=True)
            names: set[str] = set()
            for need in method.needs:
                if number in self._read:
                    names |= later.get(need, set())
                if inside and number < last:
                    names |= between.get(need, set())
            attention = getattr(block, tower.attention)
            if inside and tower.masks_attention:
                yield attention.register_forward_pre_hook(self._mask_attention, with_kwargs=True)
            for name in sorted(names):
                hook = functools.partial(self._projected, name)
                yield getattr(attention, name).register_forward_hook(hook)
            if number in extra:
                yield block.register_forward_hook(functools.partial(self._read_block, number))
        yield tower.blocks[last].register_forward_hook(self._feature_block)
        if inside and tower.pooling is not None:
            yield tower.pooling.register_forward_pre_hook(self._pooling_pre, with_kwargs=True)
        for merger in tower.mergers if inside else ():
            yield merger.register_forward_hook(self._merger)
        pooled = self.session.backbone.pooled_projector() if "unpooled" in method.needs else None
        if pooled is not None:
            yield pooled.register_forward_hook(self._before_pooling)
        projector = self.session.backbone.projector()
        if projector is not None and "project" in method.sites:
            yield projector.register_forward_pre_hook(self._project_pre)
            yield projector.register_forward_hook(self._project_post)

    @property
    def _cuts(self) -> bool:
        return "vision_layer" in self.session.compressor.sites

    @property
    def _run(self) -> TowerRun | None:
        call = self._thread.call
        return call.runs[-1] if call is not None and call.runs else None

    def _tower_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tower, state = self.tower, self._thread
        block = tower.blocks[0]
        if block.training and getattr(block, "gradient_checkpointing", False) and self._cuts:
            check_checkpointing(block, "tower blocks")
        pixels: Any = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        call = self.session.thread.encoder
        if call is None:  # a tower by itself
            call = EncoderCall("image", {"pixel_values": pixels})
            self.session.thread.report, self.session.thread.ran = None, ran()
        # What an aborted call left is taken away here, since hooks do not run after a KeyboardInterrupt.
        state.call, state.features, state.projected, state.projecting = call, None, None, False
        call.tiles = pixels.shape[0]
        if tower.packed:
            grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            call.runs.append(PackedRun(tower, grids))
            return
        rows, columns = self.session.backbone.patch_grid(pixels)
        call.runs.append(DenseRun(tower, rows * columns, (rows, columns), pixels.shape[0], pixels.device))

    def _context(self, run: TowerRun, tokens: VisualTokens, *, inside: bool) -> TowerContext:
        call = self._thread.call
        assert call is not None
        seeds = None
        if "content_seed" in self.session.compressor.needs:
            seeds = call.seeds(self.session.backbone)
        if run.counts is None:
            run.counts = tokens.counts()
        context = TowerContext(run, run.counts, seeds, inside=inside)
        if "prompt" in self.session.compressor.needs:
            context.prompt = functools.partial(self._prompt, call, run)
        if self.session.compressor.patchwise_projector:
            context.projected = self._to_llm
        return context

    def _prompt(self, call: EncoderCall, run: TowerRun) -> tuple[Prompt, Tensor]:
        """The prompt, and which of its rows each tile or frame belongs to."""
        prompt = known(self.session.thread)
        if call.prompt_rows is None:
            call.prompt_rows = prompt.tile_rows(call, self.session.backbone, run)
        return prompt, call.prompt_rows

    @torch.no_grad()
    def _to_llm(self, features: Tensor) -> Tensor:
        projector = self.session.backbone.projector()
        assert projector is not None
        return self._project(projector, features)

    def _project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Call the projector without acting around it."""
        self._thread.projecting = True
        try:
            projected: Tensor = projector(features)
            return projected
        finally:
            self._thread.projecting = False

    def _block_pre(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        run, method = self._run, self.session.compressor
        if run is None:
            return None
        if len(args) > 1:
            kwargs = {**kwargs, "attention_mask": args[1]}
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self._cuts and 0 < number <= self.tower.feature_block:
            tokens = run.units(hidden)
            if self.tower.prefix:
                run.cls = hidden[:, 0]
            context = self._context(run, tokens, inside=True)
            left = self.session.run_site(
                "vision_layer", number, tokens, context, lambda t: method.vision_layer(t, number, context)
            )
            hidden = run.shorten(hidden, left)
        kwargs = run.block_arguments(kwargs, method.size_bias)
        run.begin(number, kwargs, read=number in self._read)
        if self.tower.masks_attention:
            self._thread.mask = kwargs.get("attention_mask")
            kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
            if self._thread.mask is not None and block.training and getattr(block, "gradient_checkpointing", False):
                raise UnsupportedError(
                    "gradient_checkpointing=True with masked patches: blocks of this tower take no mask, and the "
                    "recomputation would run without it; disable checkpointing of the tower."
                )
        return (hidden,), kwargs

    def _mask_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        mask, self._thread.mask = self._thread.mask, None
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})

    def _projected(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._run is not None:
            self._run.now.projected[name] = output.detach()

    def _read_block(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._run is not None:
            self._run.calls[number].output = output if isinstance(output, Tensor) else output[0]

    def _feature_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self._run
        if run is None:
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        self._thread.features = hidden
        if self.tower.prefix and self.session.backbone.plain_tower:
            run.cls = hidden[:, 0]

    def _pooling_pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hide the padding of short rows from the head that pools over patches."""
        run = self._run
        if not isinstance(run, DenseRun) or run.real is None:
            return None
        return args, {**kwargs, "key_padding_mask": ~run.real}

    def _merger(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        run = self._run
        return output if run is None else run.restore(output, run.back, per_unit=True)

    def _tower_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run, state = self._run, self._thread
        features, state.features = state.features, None
        if run is None or output is None:  # None: the tower raised
            state.call = None
            return None
        try:
            if self.session.backbone.decoder is None:
                self._report_bare_tower(run, features, output)
            elif "project" not in self.session.compressor.sites:
                state.call = None
            return restore_output(run, output) if run.tokens is not None else None
        finally:
            if self.session.backbone.decoder is None:
                state.call = None

    def _before_pooling(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call = self.session.thread.encoder
        if call is not None and call.modality == "video":
            call.unpooled = output

    # --- a tower by itself ------------------------------------------------------------------------------------------

    def _report_bare_tower(self, run: TowerRun, features: Tensor | None, output: Any) -> None:
        method = self.session.compressor
        assert features is not None
        if run.tokens is not None:
            last = output if isinstance(output, Tensor) else output[0]
            tokens = run.units(last)
            total = len(run.members) if isinstance(run, DenseRun) else len(tokens)
            counts = [total] * len(tokens)
        else:
            tokens = run.units(features)
            counts = tokens.counts()
        context = self._context(run, tokens, inside=False)
        if "project" in method.sites:
            tokens = self.session.run_site(
                "project", None, tokens, context, lambda t: method.project(t, lambda same: same, context)
            )
        if "llm_input" in method.sites:
            tokens = self.session.run_site("llm_input", None, tokens, context, lambda t: method.llm_input(t, context))
        report = self.session.take_report() or Report(type(method).__name__)
        report.item_rows = list(range(len(tokens)))
        report.tokens_in = counts
        note_tokens(report, tokens)
        self.session.file(report)

    # --- around a token-wise projector ------------------------------------------------------------------------------

    def _project_pre(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        state, run = self._thread, self._run
        if state.projecting or run is None:
            return None
        features = args[0]
        assert isinstance(run, DenseRun)  # packed towers have no token-wise projector
        tokens = VisualTokens.from_features(features, grid=(run.grid,) * len(features))
        extra = features.shape[1] - run.patches
        if extra:
            tokens.protected[:, :extra] = True
        if run.tokens is not None:
            tokens = _survivors(tokens, run.tokens, extra)

        def default(some: VisualTokens) -> VisualTokens:
            return some.replace(features=self._project(projector, some.features))

        context = self._context(run, tokens, inside=False)
        method = self.session.compressor
        left = self.session.run_site("project", None, tokens, context, lambda t: method.project(t, default, context))
        state.projected, state.length = left, features.shape[1]
        call = state.call
        assert call is not None
        shape = (features.shape[0], features.shape[1])
        mass, size = features.new_zeros(shape), features.new_ones(shape)
        values = left.valid.to(mass.dtype)
        call.projected_mass = mass.scatter_reduce(1, left.source, values, "amax")[:, extra:]
        call.projected_size = size.scatter(1, left.source, left.size.to(size.dtype))[:, extra:]
        # The module's own forward cannot be skipped: let it run on one token, its output is replaced.
        return (features[:, :1], *args[1:])

    def _project_post(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        state = self._thread
        if state.projecting or state.projected is None:
            return None
        left, state.projected, state.call = state.projected, None, None
        slot = torch.full((len(left), state.length), -1, device=output.device)
        order = torch.arange(left.source.shape[1], device=output.device).expand_as(left.source)
        where = left.source.masked_fill(~left.valid, 0)
        # Padding writes to slot 0 only where nothing else does.
        slot = slot.scatter_reduce(1, where, order.masked_fill(~left.valid, -1), "amax")
        place = torch.arange(state.length, device=output.device).expand_as(slot)
        place = torch.where(slot >= 0, place, 0).cummax(-1).values
        filled = slot.gather(1, place).clamp(min=0)
        return gather.rows(left.features, filled)


def _survivors(tokens: VisualTokens, left: VisualTokens, extra: int) -> VisualTokens:
    """What is left of a tower's tokens before the projector, which gets the full grid.

    Args:
        tokens: the projector's tokens, `extra` of them (CLS) before the patches.
        left: the tokens that the tower ended with.
    """
    rows = len(tokens)
    first = torch.arange(extra, device=left.source.device).expand(rows, -1)
    valid = torch.cat([torch.ones_like(first, dtype=torch.bool), left.valid], 1)
    size = torch.cat([tokens.size[:, :extra], left.size], 1)
    return tokens.take(torch.cat([first, left.source + extra], 1), valid).replace(size=size)
