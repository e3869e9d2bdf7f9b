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
from mmtoken.compressors.base import Compressor, Context, TowerStates
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


def _check_block_call(tower: Tower, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a tower from outside transformers may hand its blocks besides hidden states.

    Raises:
        UnsupportedError: a mask, or arguments by place, as gradient checkpointing gives them.
    """
    if len(args) > 1 or kwargs.get(tower.mask) is not None or kwargs.get("is_causal"):
        raise UnsupportedError(
            f"{tower.mask} was given to the blocks of this tower, or gradient checkpointing is on; a compressor needs "
            "calls without either."
        )


def _check_recomputation(method: Compressor, block: nn.Module, hidden: Tensor) -> None:
    """Refuse to cut inside a block that is computed again for gradients, at a time when the call is over.

    Raises:
        UnsupportedError: the block is checkpointed, and it or its input gets gradients.
    """
    checkpointed = block.training and getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled()
    if checkpointed and (hidden.requires_grad or any(weight.requires_grad for weight in block.parameters())):
        raise UnsupportedError(
            f"gradient_checkpointing=True with {type(method).__name__}, which acts between attention and MLP of a "
            "tower block: the recomputation would run without it; disable checkpointing of the tower."
        )


class _Thread(threading.local):
    call: EncoderCall | None = None
    features: Tensor | None = None
    inside: bool = False
    pools: bool = False
    projecting: bool = False
    projected: VisualTokens | None = None
    length: int = 0
    long: tuple[int, ...] = ()
    last: Tensor | None = None
    mask: Tensor | None = None


class Replaced:
    """A method of one module, replaced on the instance until `remove`: there are no hooks for methods but forward."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.original = getattr(module, name)
        self.before = module.__dict__.get(name)

        @functools.wraps(self.original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return self.call(*args, **kwargs)

        object.__setattr__(module, name, replacement)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def remove(self) -> None:
        if self.before is None:
            self.module.__dict__.pop(self.name, None)
        else:
            object.__setattr__(self.module, self.name, self.before)


class Entry(Replaced):
    """A method that runs the tower; the outermost one that is called puts out the full grid."""

    def __init__(self, hooks: VisionHooks, module: nn.Module, name: str) -> None:
        self.hooks = hooks
        super().__init__(module, name)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.hooks.enter(self, args, kwargs)


class Closed(Replaced):
    """A method that runs the blocks by itself, and puts out what lies between them."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            f"{type(self.module).__name__}.{self.name} puts out what lies between the blocks, which has no full grid "
            "while a compressor is attached; call forward, or detach the compressor."
        )


@dataclass
class VisionHooks:
    """Sets the hooks that a compressor needs on one tower."""

    session: Session
    tower: Tower

    def install(self) -> Iterator[RemovableHandle | Replaced]:
        """Register them; yields the handles."""
        self._thread = _Thread()
        tower, method = self.tower, self.session.compressor
        inside, last = self._cuts, tower.feature_block
        between = inside and method.tower_cut == "mlp"
        if tower.entries:
            yield from (Entry(self, tower.module, name) for name in tower.entries)
            yield from (Closed(tower.module, name) for name in tower.closed)
        else:
            yield tower.module.register_forward_pre_hook(self._tower_pre, with_kwargs=True)
            yield tower.module.register_forward_hook(self._tower_post, always_call=True)
        blocks = len(tower.blocks)
        extra = method.tower_layers(last + 1, blocks)
        self._read = _check_blocks(extra, blocks)
        if {"tower_attention", "tower_keys"} & method.needs:
            self._read.add(last)
        later = {"tower_attention": {tower.queries, tower.keys}, "tower_keys": {tower.keys}}
        then = {"tower_keys": {tower.keys}, "tower_states": {tower.queries, tower.keys, tower.values}}
        for number, block in enumerate(tower.blocks):
            if inside or number in self._read:
                yield block.register_forward_pre_hook(functools.partial(self._block_pre, number), with_kwargs=True)
            names: set[str] = set()
            for need in method.needs:
                if number in self._read:
                    names |= later.get(need, set())
                if inside and number < last + between:
                    names |= then.get(need, set())
            attention = getattr(block, tower.attention)
            if names and tower.split is not None:
                yield attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
                names = set()
            if inside and tower.masks_attention:
                yield attention.register_forward_pre_hook(self._mask_attention, with_kwargs=True)
            for name in sorted(names):
                hook = functools.partial(self._projected, name)
                yield getattr(attention, name).register_forward_hook(hook)
            if between and number <= last:
                # Ahead of hooks that note what a block puts out.
                yield block.register_forward_hook(self._leave_block, prepend=True)
                norm, mlp = getattr(block, tower.norms[1]), getattr(block, tower.mlp)
                yield norm.register_forward_pre_hook(functools.partial(self._before_mlp, number))
                yield mlp.register_forward_hook(self._after_mlp)
            if number in extra:
                yield block.register_forward_hook(functools.partial(self._read_block, number))
        yield tower.blocks[last].register_forward_hook(self._feature_block)
        if tower.last is not None:
            yield tower.last.register_forward_hook(self._note_last)
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
        """This tower's run in the call in progress; None in calls of another tower, after one of this was aborted."""
        call, now = self._thread.call, self.session.thread.encoder
        if call is None or not call.runs or not (now is None or now is call):
            return None
        return call.runs[-1]

    def _tower_pre(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tower, state = self.tower, self._thread
        refusal = self.session.backbone.tower_refusal()
        if refusal is not None and self._cuts:
            raise UnsupportedError(refusal)
        block = tower.blocks[0]
        if block.training and getattr(block, "gradient_checkpointing", False) and self._cuts:
            check_checkpointing(block, "tower blocks")
        names = ("pixel_values", "hidden_states", "x")
        pixels: Any = args[0] if args else next(kwargs[name] for name in names if name in kwargs)
        call = self.session.thread.encoder
        if call is None:  # a tower by itself
            call = EncoderCall("image", {"pixel_values": pixels})
            self.session.thread.report, self.session.thread.ran = None, ran()
        # What an aborted call left is taken away here, since hooks do not run after a KeyboardInterrupt.
        state.call, state.features, state.projected, state.projecting = call, None, None, False
        state.last = None
        call.tiles = pixels.shape[0]
        if tower.packed:
            grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            call.runs.append(PackedRun(tower, grids))
        else:
            rows, columns = self.session.backbone.patch_grid(pixels)
            call.runs.append(DenseRun(tower, rows * columns, (rows, columns), pixels.shape[0], pixels.device))
        if self.session.thread.memory is not None:
            call.runs[-1].memory = self.session.thread.memory

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
        if self.tower.last is not None:
            _check_block_call(self.tower, args, kwargs)
        elif len(args) > 1:
            kwargs = {**kwargs, "attention_mask": args[1]}
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self._cuts and method.tower_cut == "block" and 0 < number <= self.tower.feature_block:
            hidden = run.shorten(hidden, self._choose(run, number, hidden))
        kwargs = run.block_arguments(kwargs, method.size_bias)
        run.begin(number, kwargs, read=number in self._read)
        if self._cuts and method.tower_cut == "mlp" and number <= self.tower.feature_block:
            _check_recomputation(method, block, hidden)
            hidden = self._with_guests(run, number, hidden, kwargs)
        if self.tower.masks_attention:
            self._thread.mask = kwargs.get("attention_mask")
            kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
            if self._thread.mask is not None and block.training and getattr(block, "gradient_checkpointing", False):
                raise UnsupportedError(
                    "gradient_checkpointing=True with masked patches: blocks of this tower take no mask, and the "
                    "recomputation would run without it; disable checkpointing of the tower."
                )
        return (hidden,), kwargs

    def _choose(self, run: TowerRun, number: int, hidden: Tensor) -> VisualTokens:
        """What the method leaves of the tokens at a block."""
        method, tokens = self.session.compressor, run.units(hidden)
        if self.tower.prefix:
            run.cls = hidden[:, 0]
        context = self._context(run, tokens, inside=True)
        return self.session.run_site(
            "vision_layer", number, tokens, context, lambda t: method.vision_layer(t, number, context)
        )

    def _with_guests(self, run: TowerRun, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The block's input with the tokens that only attend in it, behind the others."""
        method = self.session.compressor
        cls = hidden[:, 0] if self.tower.prefix else None
        context = TowerContext(run, run.counts or [], None, inside=True)
        guests = method.guests(cls, number, context)
        if guests is None:
            return hidden
        if not isinstance(run, DenseRun) or kwargs.get(self.tower.mask) is not None or kwargs.get("rope") is not None:
            raise UnsupportedError(
                f"{type(method).__name__} lets other tokens attend in tower blocks, which takes a tower of dense "
                "sequences without masks and rotary embeddings."
            )
        run.now.guests = guests.shape[1]
        return torch.cat([hidden, guests.to(hidden)], 1)

    def _enter_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._run is not None:
            run = self._run
            run.now.attention, run.now.entered = module, (args[0] if args else kwargs["hidden_states"]).detach()

    def _before_mlp(self, number: int, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        run, hidden = self._run, args[0]
        if run is None:
            return None
        self._thread.long = hidden.shape[:-1]
        # What the method computes from a copy, it may need unchanged for gradients.
        seen = hidden.clone()
        short = run.shorten(seen, self._choose(run, number, seen))
        run.write(hidden, short)
        run.note_cut(number)
        return (short, *args[1:])

    def _after_mlp(self, mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        run, long = self._run, self._thread.long
        return None if run is None else run.write(output.new_zeros(*long, output.shape[-1]), output)

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._run
        if run is None:
            return None
        return run.left_of(output) if isinstance(output, Tensor) else (run.left_of(output[0]), *output[1:])

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

    def _note_last(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        run = self._run
        if run is None:
            return
        if self._thread.pools and isinstance(run, DenseRun) and run.real is not None:
            raise UnsupportedError(
                "The method left different numbers of tokens per image, and the head of this tower pools over all "
                "places; call it with one image at a time, or a tower that pools by CLS."
            )
        self._thread.last = output

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

    def enter(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method of a tower that has `Tower.entries`."""
        state = self._thread
        if state.inside:
            return entry.original(*args, **kwargs)
        output = None
        state.inside, state.pools = True, self.tower.pools and entry.name == "forward"
        try:
            self._tower_pre(entry.module, args, kwargs)
            output = entry.original(*args, **kwargs)
        finally:
            state.inside = False
            filled = self._tower_post(entry.module, args, output)
        return output if filled is None else filled

    def _tower_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run, state = self._run, self._thread
        features, state.features = state.features, None
        if run is None or output is None:  # None: the tower raised
            state.call = None
            return None
        try:
            if self.session.backbone.decoder is None:
                self._report_bare_tower(run, features, output if state.last is None else state.last)
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
