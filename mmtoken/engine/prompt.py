"""The text of the prompt as it is known before anything is encoded: `generate` encodes images before the forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtoken.backbones.base import Backbone, Layout, Modality
from mmtoken.engine import gather, masks
from mmtoken.engine.compat import cache_in
from mmtoken.engine.encode import EncoderCall
from mmtoken.engine.prefill import Prefill, assign, check_counts, without_last
from mmtoken.engine.tower import DenseRun, PackedRun, TowerRun
from mmtoken.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from mmtoken.engine.session import Session, ThreadState

IGNORED = -100
"""The label of tokens that are not to be predicted: those of the prompt."""


class Prompt:
    """The text tokens of each prompt row: all that is neither padding, nor visual, nor to be predicted (`labels`).

    A row whose text is to be predicted as a whole counts as a prompt as a whole.

    Args:
        embeds: gives the rows as they enter the decoder, float[B, L, D]; asked only if it is needed.
        text: bool[B, L], real tokens that are not visual.
        visual: per modality bool[B, L].
        labels: int[B, L] or None.
        decode: runs the decoder over embeddings float[B, n, D], of which bool[B, n] are real, without hooks acting.
        ids: int[B, L], None where the prompt came as embeddings.
    """

    def __init__(
        self,
        embeds: Callable[[], Tensor],
        text: Tensor,
        visual: Mapping[str, Tensor],
        labels: Tensor | None,
        decode: Callable[[Tensor, Tensor], Tensor],
        ids: Tensor | None = None,
    ) -> None:
        if labels is not None and labels.shape == text.shape:
            asked = text & (labels.to(text.device) == IGNORED)
            text = torch.where(asked.any(-1, keepdim=True), asked, text)
        self.text = text
        self.visual = visual
        self._embeds = embeds
        self._decode = decode
        self._ids = ids

    @functools.cached_property
    def _packed(self) -> tuple[Tensor, Tensor]:
        """(float[B, T, D], bool[B, T]): the text alone, shorter rows padded with zeros on the right."""
        counts = self.text.sum(-1)
        longest = int(counts.max())
        order = torch.argsort((~self.text).to(torch.uint8), dim=-1, stable=True)[:, :longest]
        real = torch.arange(longest, device=order.device) < counts[:, None]
        with torch.no_grad():
            return gather.rows(self._embeds(), order).masked_fill(~real[..., None], 0.0), real

    @functools.cached_property
    def _mean(self) -> Tensor:
        embeds, real = self._packed
        total = embeds.float().sum(1) / real.sum(-1, keepdim=True).clamp(min=1)
        return total.to(embeds.dtype)

    @functools.cached_property
    def _state(self) -> Tensor:
        embeds, real = self._packed
        hidden = self._decode(embeds, real)
        last = (real.sum(-1) - 1).clamp(min=0)
        return hidden[torch.arange(len(last), device=last.device), last]

    def mean(self, rows: Tensor) -> Tensor:
        """float[n, D]: mean input embedding of the text of rows int[n]."""
        return self._of(rows, "_mean")

    def state(self, rows: Tensor) -> Tensor:
        """float[n, D]: the decoder's last hidden state at the last text token of rows int[n], from the text alone."""
        return self._of(rows, "_state")

    def ids_of(self, rows: Tensor) -> list[Tensor]:
        """int[T] for each of rows int[n]: the ids of its text.

        Raises:
            UnsupportedError: the prompt came as embeddings.
        """
        if self._ids is None:
            raise UnsupportedError("The method reads the prompt's text, which came as embeddings; call with input_ids.")
        return [self._ids[row][self.text[row]] for row in rows.tolist()]

    def item_rows(self, modality: Modality, layout: Layout) -> Tensor:
        """int[items]: the prompt row of each item of a call with this layout; of beams the first copy.

        Raises:
            InputError: the placeholders do not fit.
        """
        mask = self.visual[modality]
        check_counts(mask, modality, layout)
        per_row = mask.sum(-1).tolist()
        copies = sum(per_row) // sum(layout.counts)
        rows = [0] * len(layout.counts)
        for row, item, _ in reversed(assign(per_row, layout.counts, copies, modality)):
            rows[item] = row
        return torch.tensor(rows, device=self.text.device)

    def _of(self, rows: Tensor, name: str) -> Tensor:
        rows = rows.to(self.text.device)
        empty = ~self.text.any(-1)[rows]
        if bool(empty.any()):
            raise InputError(f"row {int(rows[empty][0])} of the prompt holds no text, but the method reads it.")
        values: Tensor = getattr(self, name)
        return values[rows]

    def tile_rows(self, call: EncoderCall, backbone: Backbone, run: TowerRun) -> Tensor:
        """int[rows of tokens]: the prompt row of each tile or frame that the tower is processing.

        Beams may have repeated the rows already; then it is the first copy.

        Raises:
            InputError: the placeholders do not fit what is encoded.
        """
        if isinstance(run, PackedRun):
            areas = torch.tensor([rows * columns for _, rows, columns in run.frame_grids])
            total = len(areas)
            tiles = torch.arange(total).repeat_interleave(areas)[:, None]
        else:
            assert isinstance(run, DenseRun)
            total = call.tiles
            tiles = torch.arange(total)[:, None, None].expand(-1, run.patches, 1)
        device = self.text.device
        layout = backbone.layout(call.modality, call.arguments, call.tiles)
        carried = backbone.to_prompt(call.modality, call.arguments, tiles.to(device).float())[:, 0]
        # Crops of an image are re-sampled into each other, but its first tile is always carried as it is.
        carried = carried.round().long().masked_fill(layout.protected.to(device), total)
        first = torch.stack([part.min() for part in carried.split(layout.counts)])
        rows = self.item_rows(call.modality, layout)
        item_of = torch.searchsorted(first, torch.arange(total, device=device), right=True) - 1
        return rows[item_of.clamp(min=0)]


def placeholders(session: Session, ids: Tensor | None, embeds: Tensor | None) -> dict[str, Tensor]:
    """Per modality bool[B, L]: the places of visual tokens, found by id, or by embedding where there are no ids."""
    found: dict[str, Tensor] = {}
    for modality in session.backbone.modalities:
        token = session.backbone.placeholder_ids(modality)
        if ids is not None:
            found[modality] = ids == token
        elif embeds is not None:
            placeholder = session.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            found[modality] = (embeds == placeholder).all(-1)
    return found


def read_prompt(
    session: Session, ids: Tensor | None, embeds: Tensor | None, mask: Any, labels: Tensor | None, past: int = 0
) -> Prompt | None:
    """The prompt of a call with these arguments; None if it has neither ids nor embeddings.

    Args:
        session: its owner.
        ids: int[B, L] or None.
        embeds: float[B, L, D] or None.
        mask: attention mask of any kind, or None.
        labels: int[B, L] or None.
        past: tokens that the cache holds already.
    """
    given = ids if ids is not None else embeds
    if given is None:
        return None
    everything = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    visual = placeholders(session, ids, embeds)
    text = without_last(masks.real_tokens(mask, everything, past), session.backbone.action_queries)
    for places in visual.values():
        text = text & ~places

    def embed() -> Tensor:
        if ids is None:
            assert embeds is not None
            return embeds.detach()
        # Ids of placeholders may lie beyond the table.
        looked_up: Tensor = session.model.get_input_embeddings()(ids.masked_fill(~text, 0))
        return looked_up

    return Prompt(embed, text, visual, labels, functools.partial(decode, session), ids)


def decode(session: Session, embeds: Tensor, real: Tensor) -> Tensor:
    """float[B, n, D]: last hidden states of a decoder call in the middle of another one; no hook acts on it."""
    decoder = session.backbone.decoder
    mask = real.long() if masks.causal(decoder) else masks.everything_real(decoder, real)
    with torch.no_grad(), aside(session.thread):
        output = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    hidden: Tensor = output[0]
    return hidden


@contextmanager
def aside(state: ThreadState) -> Iterator[None]:
    """Hide the call in progress from the hooks, so that they take the decoder for one that nothing is attached to."""
    names = ("prefill", "visual", "encoded", "input_ids", "decode_masks", "decode_positions")
    saved = {name: getattr(state, name) for name in names}
    for name in names:
        setattr(state, name, None)
    state.aside = True
    try:
        yield
    finally:
        state.aside = False
        for name, value in saved.items():
            setattr(state, name, value)


def listen(session: Session, undo: ExitStack) -> None:
    """Note the prompts of `generate` and of forward calls of this instance until `undo` closes."""
    model, root, state = session.model, session.backbone.root, session.thread
    generate = getattr(model, "generate", None)
    if generate is not None:  # models without a head have none
        object.__setattr__(model, "generate", _noting(session, generate))
        undo.callback(model.__dict__.pop, "generate", None)

    def note_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.labels = kwargs.get("labels")

    def forget_labels(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state.labels = None

    signature = inspect.signature(type(root).forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind_partial(module, *args, **kwargs).arguments
        call = {**bound, **bound.get("kwargs", {})}
        cache = cache_in(call)
        past = 0 if cache is None else int(cache.get_seq_length())
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        state.prompt = None
        if state.visual is not None:
            state.prompt = read_prompt(session, ids, embeds, call.get("attention_mask"), state.labels, past)

    def forget(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state.prompt = None

    handles = [
        model.register_forward_pre_hook(note_labels, with_kwargs=True),
        model.register_forward_hook(forget_labels, always_call=True),
        root.register_forward_pre_hook(note, with_kwargs=True),
        root.register_forward_hook(forget, always_call=True),
    ]
    for handle in handles:
        undo.callback(handle.remove)


def _noting(session: Session, generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` that notes its prompt while it runs."""
    state = session.thread

    @functools.wraps(generate)
    def noted(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        cache = cache_in(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        if ids is not None:
            ids = ids[:, past:]  # `generate` gets the whole conversation, the encoders its new images
        before = state.asked
        state.asked = read_prompt(session, ids, kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), None, past)
        try:
            return generate(*args, **kwargs)
        finally:
            state.asked = before

    return noted


def prompt_of(session: Session, call: Prefill) -> Prompt | None:
    """The prompt of a decoder call with visual tokens, for methods that read it."""
    if "prompt" not in session.compressor.needs:
        return None
    text = call.said & ~call.visual
    decoder = functools.partial(decode, session)
    return Prompt(lambda: call.embeds, text, {}, session.thread.labels, decoder, call.input_ids)


def known(state: ThreadState) -> Prompt:
    """The prompt of the call in progress.

    Raises:
        UnsupportedError: images are encoded by themselves.
    """
    prompt: Prompt | None = state.prompt if state.prompt is not None else state.asked
    if prompt is None:
        raise UnsupportedError(
            "The method reads the prompt, which is not known where images are encoded by themselves; call generate(), "
            "the model's forward, or compress_inputs()."
        )
    return prompt
