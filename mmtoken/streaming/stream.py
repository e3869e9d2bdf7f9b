"""A model that watches a stream: frames come in one at a time, a bounded memory is held, questions come at any time."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmtoken.backbones.registry import adapt
from mmtoken.compressors.base import Compressor, Context, StreamFrame, check_whole
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained, settings_of
from mmtoken.engine import attention
from mmtoken.engine.reuse import VideoState
from mmtoken.engine.session import Session, attached
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.streaming.checks import check_ascending, check_frame, check_streams, check_time
from mmtoken.streaming.framing import Framing, Rows, framing_of
from mmtoken.streaming.memory import Memory, Step, StreamPositions, longest
from mmtoken.streaming.passes import LayerCache, Passes, Ran, Seen
from mmtoken.streaming.report import StreamReport, WatchedStep
from mmtoken.streaming.store import Store, block
from mmtoken.streaming.view import View
from mmtoken.tokens import VisualTokens

FIRST_STEPS = 32
"""Steps that a stream holds by default, as large as the first one."""

STORED = 32
"""How many times as much as it holds a stream stores by default, for methods that bring something back."""

RECENT = 64
"""Pushes over which frames per second are measured."""

_ENCODER_SITES = {"refresh", "vision_layer", "project", "llm_input"}


class StreamContext(Context):
    """The context of the sites retain, evict and retrieve."""

    streaming = True

    def __init__(self, depth: int, memory: dict[str, Any], learned: Any) -> None:
        self.depth = depth
        self.memory = memory
        self.learned = learned
        self.steps = [1]
        self.original_counts = self.encoded_counts = []


class Stream(AbstractContextManager["Stream"]):
    """A stream in progress; made by `mmtoken.stream`. Not for use from several threads at once.

    Until it is closed, a compressor that acts before the decoder is attached to the model.

    Attributes:
        model, processor: as handed in.
        compressor: the settings of what was handed in, or None.
        memory_tokens: the bound on held positions of frames; None until the first step has set it.
        clock: seconds, what times are measured with; wall time unless a benchmark sets another one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        compressor: Compressor | Trained | None,
        memory_tokens: int | None,
        store_tokens: int | None,
        positions: StreamPositions,
    ) -> None:
        for field, value in (("memory_tokens", memory_tokens), ("store_tokens", store_tokens)):
            if value is not None:
                check_whole(field, value, 1)
        if positions not in get_args(StreamPositions):
            raise MMTokenError(f"positions={positions!r} is unknown; use 'contiguous', 'true' or 'repo'.")
        self.model, self.processor = model, processor
        self.compressor = None if compressor is None else settings_of(compressor)
        self.sites: frozenset[str] = frozenset() if self.compressor is None else self.compressor.sites
        backbone = adapt(model)
        if self.compressor is not None:
            check_streams(self.compressor)
        if attached(model) is not None:
            raise MMTokenError("model already has a compressor attached; detach it, and hand it to the stream instead.")
        closed = self.compressor is not None and self.compressor.positions == "renumber"
        self._framing: Framing = framing_of(model, processor, backbone, closed=closed)
        self._learned = compressor.module if isinstance(compressor, Trained) else None
        self._given_limit, self._given_store = memory_tokens, store_tokens
        self.clock: Callable[[], float] = time.perf_counter
        self._memory = Memory(self._framing.axes, positions)
        self._session: Session | None = None
        with ExitStack() as undo:
            self._passes = Passes(backbone.decoder)
            undo.callback(self._passes.close)
            if compressor is not None and self.sites & _ENCODER_SITES:
                self._session = Session(model, compressor, None)
                undo.callback(self._session.detach)
            self._memory.init = self._opening()
            self.reset()
            self._undo: ExitStack | None = undo.pop_all()

    # --- the stream's life --------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every frame: another stream begins."""
        self._memory.clear()
        self._remembered: dict[str, Any] = {}
        self._video = VideoState()
        self._store: Store | None = None
        self._pending: list[tuple[Tensor, float]] = []
        self._shape: tuple[int, ...] | None = None
        self._first = self._last = -math.inf
        self._seen = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._ttft: float | None = None
        self._entered: tuple[tuple[int, int], tuple[int, ...]] = ((0, 0), ())
        self._watched: WatchedStep | None = None
        if self._session is not None:
            self._session.reset()

    def close(self) -> None:
        """Take every hook off the model; safe to repeat. The stream cannot be used afterwards."""
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        raise UnsupportedError("A stream cannot be copied; make another one with mmtoken.stream.")

    def __reduce__(self) -> Any:
        raise UnsupportedError("A stream cannot be pickled.")

    def _check_open(self) -> None:
        if self._undo is None:
            raise MMTokenError("the stream is closed; make another one with mmtoken.stream.")

    @property
    def memory_tokens(self) -> int | None:
        return self._given_limit if self._memory.limit is None else self._memory.limit

    @property
    def report(self) -> StreamReport:
        """Measurements up to now."""
        frames, seconds = (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0, 0.0)
        store = self._store
        return StreamReport(
            fps=frames / seconds if seconds > 0 else 0.0,
            ttft_ms=self._ttft,
            kv_tokens=self._memory.tokens(),
            kv_bytes=self._memory.bytes(),
            frames_held=sum(step.frames for step in self._memory.held),
            frames_seen=self._seen,
            stored_tokens=0 if store is None else store.tokens,
            stored_bytes=0 if store is None else store.bytes,
        )

    @property
    def last_step(self) -> WatchedStep | None:
        """What became of the last step that was watched, for pictures of it; None before the first."""
        return self._watched

    # --- frames -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self, frame: np.ndarray[Any, Any] | Tensor, t: float) -> None:
        """Watch a frame.

        Models that join two frames in a temporal step (Qwen) compute a step with every second frame.

        Args:
            frame: uint8[H, W, 3], red, green, blue; all frames of a stream have one size.
            t: its time in seconds, later than that of the frame before.

        Raises:
            InputError: the frame or its time cannot be used; the stream goes on as if it had not come. Or the bound
                `memory_tokens` is too small for a single step.
            MMTokenError: the stream is closed.
        """
        self._check_open()
        started = self.clock()
        image = check_frame(frame, self._shape)
        seconds = check_time(t, self._last if self._seen else None)
        if self._shape is None:
            # A size that the processor refuses is refused with the first frame, not with the step.
            self._framing.pixels([self._prepared([image])[0]] * self._framing.frames)
        pending = [*self._pending, (image, seconds)]
        if len(pending) == self._framing.frames:
            first = self._first if self._seen else seconds
            self._watch(pending, first)
            pending = []
        if not self._seen:
            self._first = seconds
        self._pending, self._shape, self._last = pending, tuple(image.shape), seconds
        self._seen += 1
        self._finish()
        self._recent.append((1, self.clock() - started))

    def _finish(self) -> None:
        """Wait for the device, so that times are those of the work."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _prepared(self, images: list[Tensor]) -> list[Tensor]:
        """Frames after the compressor's `prepare`."""
        if self.compressor is None or "prepare" not in self.sites:
            return images
        from PIL import Image

        made = self.compressor.prepare([Image.fromarray(image.numpy()) for image in images])
        if len(made) != len(images):
            name = type(self.compressor).__name__
            raise UnsupportedError(
                f"{name}.prepare makes {len(made)} of {len(images)} frames; a stream needs them all."
            )
        return [torch.tensor(np.asarray(image.convert("RGB"))) for image in made]

    def _watch(self, frames: Sequence[tuple[Tensor, float]], first: float) -> None:
        """Let a step pass the decoder and hold what is retained of it."""
        memory = self._memory
        # What is remembered is taken over with the step, or not at all.
        remembered, video = _unchanged(self._remembered), self._video.copy()
        step = self._step(frames, first, remembered, video)
        limit = memory.limit
        if limit is None:
            steps = FIRST_STEPS if self.compressor is None else self.compressor.held_steps() or FIRST_STEPS
            limit = steps * step.length if self._given_limit is None else self._given_limit
        if step.length > limit:
            raise InputError(
                f"memory_tokens={limit} is less than the {step.length} positions that a single step holds; give at "
                f"least {step.length} (by default {FIRST_STEPS} times what the first step holds), or a smaller keep."
            )
        left = memory.hold(step, lambda steps: self._leave(steps, limit, remembered))
        memory.limit, self._remembered, self._video = limit, remembered, video
        held = {one.number: one.length for one in memory.held}
        self._watched = WatchedStep(step.number, step.time, *self._entered, held)
        if "retrieve" in self.sites:
            if self._store is None:
                self._store = Store(STORED * limit if self._given_store is None else self._given_store)
            for one in left:
                self._store.add(one)

    def _step(
        self, frames: Sequence[tuple[Tensor, float]], first: float, remembered: dict[str, Any], video: VideoState
    ) -> Step:
        """What would be held of a step that comes now; changes nothing but `remembered` and `video`."""
        memory = self._memory
        images, times = self._prepared([image for image, _ in frames]), [seconds for _, seconds in frames]
        call = self._framing.pixels(images)
        with nullcontext() if self._session is None else self._session.continuing(video):
            rows = self._framing.encode(call, times, first, functools.partial(self._choose, remembered))
        sequence = memory.everything()
        ran = self._passes.run(rows, self._view(sequence, rows), LayerCache(), queries="retain" in self.sites)
        places = self._retained(rows, ran, sequence, times[0], remembered)
        return self._made(rows, ran, places, memory.steps, times[0], memory.written(rows), memory.lead(rows))

    def _view(self, sequence: Sequence[Step], rows: Rows) -> View:
        """What a step that comes now sees."""
        return View(self._memory, self._passes, sequence, self._memory.cursor, step=rows)

    def _choose(
        self, remembered: dict[str, Any], output: Any, tokens: VisualTokens, tail: int
    ) -> tuple[VisualTokens, VisualTokens]:
        """A step's tokens as encoded, and those that enter the decoder."""
        before = after = tokens
        if self._session is not None:
            assert self._session.hooks is not None
            before, after = self._session.hooks.step_tokens(output, tokens.features[0], tail, remembered)
        self._entered = _places(before, after)
        return before, after

    def _made(
        self,
        rows: Rows,
        ran: Ran,
        places: Sequence[Tensor],
        number: int,
        seconds: float,
        start: tuple[int, ...],
        lead: int,
    ) -> Step:
        whole = [len(chosen) == len(rows) for chosen in places]

        def held(states: list[Tensor]) -> list[Tensor]:
            # A selection is a copy, so that what is let go does not stay in memory.
            return [
                state if all_of_it else state.index_select(1, chosen)
                for state, chosen, all_of_it in zip(states, places, whole, strict=True)
            ]

        last = rows.embeddings[-1:] if len(rows) else rows.embeddings.new_zeros(1, rows.embeddings.shape[-1])
        return Step(
            number=number,
            time=seconds,
            frames=self._framing.frames if number >= 0 else 0,
            keys=held(ran.keys),
            values=held(ran.values),
            places=places,
            relative=rows.relative,
            extent=rows.extent,
            advance=rows.advance,
            start=start,
            lead=lead,
            stamp=rows.stamp,
            embedding=last[0].detach().clone(),
        )

    @torch.no_grad()
    def _opening(self) -> Step | None:
        """The text before the video, which is computed once and never leaves; None if there is none."""
        rows = self._framing.prefix()
        if not len(rows):
            return None
        axes = self._framing.axes
        ran = self._passes.run(rows, View(self._memory, self._passes, [], self._memory.cursor, text=rows), LayerCache())
        everything = torch.arange(len(rows), device=rows.relative.device)
        return self._made(rows, ran, [everything] * len(ran.keys), -1, -math.inf, (0,) * axes, 0)

    # --- what stays ---------------------------------------------------------------------------------------------------

    def _context(self, remembered: dict[str, Any]) -> StreamContext:
        return StreamContext(len(self._passes.layers), remembered, self._learned)

    def _retained(
        self, rows: Rows, ran: Ran, sequence: Sequence[Step], seconds: float, remembered: dict[str, Any]
    ) -> Sequence[Tensor]:
        """Per layer int[k]: which rows of a step are held."""
        depth = len(self._passes.layers)
        everything = torch.arange(len(rows), device=rows.relative.device)
        if self.compressor is None or "retain" not in self.sites:
            return [everything] * depth

        def received(layer: int, row: int) -> Tensor:
            return self._attention(rows, ran, sequence, range(depth)[layer], range(len(rows))[row])

        frame = StreamFrame(self._memory.steps, seconds, rows.embeddings, ran.keys, ran.values, received)
        chosen = self.compressor.retain(frame, self._context(remembered))
        per_layer = [chosen] * depth if isinstance(chosen, Tensor) else list(chosen)
        name = type(self.compressor).__name__
        if len(per_layer) != depth:
            raise MMTokenError(f"{name}.retain chose rows for {len(per_layer)} layers; this decoder has {depth}.")
        checked: dict[int, Tensor] = {}
        for one in per_layer:
            if id(one) not in checked:
                checked[id(one)] = check_ascending(one, len(rows), f"{name}.retain", least=1).to(everything.device)
        return [checked[id(one)] for one in per_layer]

    def _attention(self, rows: Rows, ran: Ran, sequence: Sequence[Step], layer: int, row: int) -> Tensor:
        """float32[n]: attention that a row of a step paid to each of them, mean over heads."""
        seen = self._view(sequence, rows)(layer, rows.embeddings[None])
        tables = seen.tables
        keys = tables.rotate(ran.keys[layer])[None]
        if seen.keys is not None:
            keys = torch.cat([seen.keys, keys], 2)
        query = tables.rotate(ran.queries[layer])[None]
        index = torch.tensor([[row]], device=keys.device)
        paid = attention.attention_of(query, keys, None, self._passes.scaling(layer), index, seen.length, mean="heads")
        return paid[0, 0, seen.length :]

    def _leave(self, steps: list[Step], limit: int, remembered: dict[str, Any]) -> list[Step]:
        """Those of all steps that stay."""
        stay = list(steps)
        decides = self.compressor is not None and "evict" in self.sites
        while len(stay) > 1:
            over = longest(stay) > limit
            if not decides:
                if not over:
                    break
                stay.pop(0)
                continue
            assert self.compressor is not None
            name = type(self.compressor).__name__
            leaves = self.compressor.evict([one.frame() for one in stay], over, self._context(remembered))
            if leaves is None and not over:
                break
            if isinstance(leaves, bool) or not isinstance(leaves, int) or not 0 <= leaves < len(stay):
                raise MMTokenError(
                    f"{name}.evict returned {leaves!r} for {len(stay)} steps, over={over}; give the place of one."
                )
            stay.pop(leaves)
        return stay

    # --- questions ----------------------------------------------------------------------------------------------------

    def ask(self, question: str, max_new_tokens: int = 64) -> str:
        """Answer a question about what has been seen, greedily. It leaves nothing behind in the memory.

        A frame that waits for the second one of its step counts as a step with its copy, as in a video of that length.

        Args:
            question: text.
            max_new_tokens: most tokens of the answer.

        Returns:
            The answer without special tokens.

        Raises:
            InputError: no frame has come yet, or the question cannot be used.
            MMTokenError: the stream is closed.
        """
        check_whole("max_new_tokens", max_new_tokens, 1)
        ends = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        stop = set(ends) if isinstance(ends, list | tuple) else {ends}
        ids: list[int] = []
        for token, _ in self.answer(question):
            if token in stop:
                break
            ids.append(token)
            if len(ids) == max_new_tokens:
                break
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def answer(self, question: str) -> Iterator[tuple[int, Tensor]]:
        """The answer token by token without end: (token id, float[V] its logits); `ask` makes text of it.

        Raises:
            InputError, MMTokenError: as `ask`.
        """
        self._check_open()
        started = self.clock()
        if not self._seen:
            raise InputError("no frame has come yet; push one before asking.")
        rows, words = self._framing.question(question)
        return self._tokens(rows, words, started)

    @torch.no_grad()
    def _tokens(self, rows: Rows, words: slice, started: float) -> Iterator[tuple[int, Tensor]]:
        memory, passes = self._memory, self._passes
        ahead, window = memory.cursor, list(memory.held)
        if self._pending:
            window.append(self._half_step())
            ahead = memory.after(window[-1])
        cache = LayerCache(grows=True)
        view = View(memory, passes, self._sequence(window, words), ahead, text=rows)
        ran = passes.run(rows, view, cache)
        head: Any = self.model.get_output_embeddings()
        norm: Any = passes.decoder.norm
        made = 0
        while True:
            logits: Tensor = head(norm(ran.hidden[:, -1:]))[0, -1].float()
            token = int(logits.argmax())
            if not made:
                self._ttft = (self.clock() - started) * 1000
            yield token, logits
            word = self._framing.text(self._framing.embed([token]))
            ran = passes.run(word, functools.partial(self._grown, cache, view, len(rows) + made), cache)
            made += 1

    def _grown(self, cache: LayerCache, view: View, written: int, layer: int, hidden: Tensor) -> Seen:
        """What a layer sees of the question and the answer so far, and of what these saw."""
        at = self._framing.count(view.text_at[layer] + written, 1)
        return Seen(cache.keys[layer], cache.values[layer], self._passes.tables(at, hidden))

    def _half_step(self) -> Step:
        """The frame that waits, as a step with its copy; what compressors remember stays as it is."""
        frame = self._pending[0]
        remembered, video = _unchanged(self._remembered), self._video.copy()
        return self._step([frame] * self._framing.frames, self._first, remembered, video)

    def _sequence(self, window: list[Step], words: slice) -> Sequence[Step] | Callable[[int, Tensor], Sequence[Step]]:
        """What a question sees: the text before the video, what is brought back, and the held steps."""
        before = [] if self._memory.init is None else [self._memory.init]
        method = self.compressor
        if method is None or "retrieve" not in self.sites:
            return [*before, *window]
        stored = [] if self._store is None else list(self._store.blocks)
        blocks = stored if method.sees_window() else [*stored, *map(block, window)]
        behind = window if method.sees_window() else []
        if not blocks:
            return [*before, *behind]
        means = torch.stack([one.means for one in blocks], 1)
        name = f"{type(method).__name__}.retrieve"

        def sequence(layer: int, hidden: Tensor) -> Sequence[Step]:
            queries = self._passes.queries(layer, hidden[:, words])
            chosen = method.retrieve(means[layer], queries, layer, self._context(_unchanged(self._remembered)))
            back = check_ascending(chosen, len(blocks), name, least=0).tolist()
            return [*before, *(blocks[number].step for number in back), *behind]

        return sequence


def _places(before: VisualTokens, after: VisualTokens) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(rows, columns) of a step's tokens, and raster indices of those that are left; separators do not count."""
    grid = before.grid[0]
    separator = before.protected[0]
    visual = torch.cumsum(~separator, 0) - 1
    source = after.source[0][after.valid[0]]
    source = source[source < len(separator)]  # what was added has no place
    kept = visual[source[~separator[source]]].sort().values
    return (0, 0) if grid is None else (grid[1], grid[2]), tuple(kept.tolist())


def _unchanged(memory: dict[str, Any]) -> dict[str, Any]:
    """A copy of what compressors remember that later steps do not reach: new dictionaries, the same values.

    Compressors put new values into their memory and change none in place.
    """
    return {name: _unchanged(value) if isinstance(value, dict) else value for name, value in memory.items()}


def stream(
    model: PreTrainedModel,
    processor: Any,
    compressor: Compressor | Trained | str | dict[str, Any] | None = None,
    *,
    memory_tokens: int | None = None,
    store_tokens: int | None = None,
    positions: StreamPositions = "contiguous",
) -> Stream:
    """Begin a stream.

    `with mmtoken.stream(model, processor, STCPruner(keep=64)) as live: live.push(frame, t); live.ask("What happens?")`

    Args:
        model: a transformers VLM that reads videos, in eval mode.
        processor: its processor.
        compressor: an instance, a name, or {"class_path": ..., "init_args": {...}}; None: every token is held.
        memory_tokens: most decoder positions of frames that are held, in any layer; None: 32 times what is held of the
            first step (`Compressor.held_steps` if the compressor says so).
        store_tokens: most positions of frames that have left that are stored in main memory, for methods that bring
            them back for a question; None: 32 times `memory_tokens`. The oldest leave for good.
        positions: where held rows stand, see `StreamPositions`.

    Raises:
        UnsupportedError: the model has no streams, or the compressor cannot work in one; the message says why.
        MMTokenError: a setting is wrong, or the model has a compressor attached.
    """
    given = None if compressor is None else resolve(compressor)
    return Stream(model, processor, given, memory_tokens, store_tokens, positions)
