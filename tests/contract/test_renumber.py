"""positions="renumber": the reference is the masked model whose layers rotate by compacted positions.

It reads the whole sequence, prompt and answer, in one call without a cache, so it shares no code with decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.backbones.tiny_models import QWEN, visual_mask
from tests.contract.matrix import COMPRESSORS, Cell, assert_close, batch, compress, keeps, pairs, tiny
from tests.contract.reference import given_merged, noting_merged, prompts_of, recording
from tests.contract.test_modes import loop, options, two_turns

RENUMBERED = [name for name, method in COMPRESSORS.items() if method.positions == "renumber"]


def compacted(positions: Tensor, keep: Tensor, visual: Tensor) -> Tensor:
    """Close the gaps, token by token.

    One axis: a token moves down by the tokens dropped before it. Three axes: the box of what is left of each run of
    visual tokens starts where the run started, and what follows moves down by as much as the longest side shrank.

    Args:
        positions: int[1 or 3, B, L].
        keep: bool[B, L].
        visual: bool[B, L].

    Returns:
        int[1 or 3, B, L + 1]; the last entry is where the next token goes.
    """
    axes, rows, length = positions.shape
    after = positions[..., -1:] + 1
    moved = torch.cat([positions, after], -1).clone()
    for row in range(rows):
        t, down = 0, 0
        while t <= length:
            stop = t + 1
            if axes == 1:
                moved[0, row, t] -= down
                down += int(t < length and not keep[row, t])
            elif t < length and visual[row, t]:
                while stop < length and visual[row, stop]:
                    stop += 1
                run = positions[:, row, t:stop]
                left = run[:, keep[row, t:stop]]
                start = int(run.min())
                size = 0
                if left.shape[1]:
                    corner = left.min(1, keepdim=True).values
                    moved[:, row, t:stop] = run - corner + start - down
                    size = int((left - corner).max()) + 1
                down += int(run.max()) - start + 1 - size
            else:
                moved[:, row, t] -= down
            t = stop
    return moved


@contextmanager
def rotating_by(model: nn.Module, per_layer: Mapping[int, Tensor]) -> Iterator[None]:
    """Let each layer rotate queries and keys by positions int[1 or 3, B, S] of its own."""
    decoder = oracle.text_model(model)

    def hook(number: int, positions: Tensor) -> Any:
        # Gemma 3 rotates by another base in layers with a sliding window.
        kind = decoder.config.layer_types[number : number + 1] if model.config.model_type == "gemma3" else ()

        def rotate(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tables = decoder.rotary_emb(args[0], positions[0] if len(positions) == 1 else positions, *kind)
            return args, {**kwargs, "position_embeddings": tables}

        return rotate

    handles = [
        decoder.layers[number].register_forward_pre_hook(hook(number, positions), with_kwargs=True)
        for number, positions in per_layer.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole_mask(model: nn.Module, inputs: oracle.Inputs, more: int) -> Any:
    """The mask over prompts and `more` tokens after them: int[B, S], where types of tokens count bool[B, 1, S, S]."""
    real = nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    if "token_type_ids" not in inputs:
        return real
    types = inputs["token_type_ids"]
    if model.config.model_type == "gemma3":  # each run of image tokens is a block
        start = (types == 1) & (nn.functional.pad(types, (1, 0))[:, :-1] == 0)
        block = torch.where(types == 1, start.long().cumsum(-1), -1)
    else:  # the prompt is one
        block = torch.where(types == 0, 0, -1)
    block = nn.functional.pad(block, (0, more), value=-1)
    place = torch.arange(real.shape[1])
    together = (block[:, :, None] == block[:, None]) & (block[:, None] >= 0)
    seen = ((place <= place[:, None]) | together) & real.bool()[:, None]
    if model.config.model_type == "gemma3":
        return dict.fromkeys(("full_attention", "sliding_attention"), seen[:, None])
    return seen[:, None]


@torch.no_grad()
def reference(
    model: nn.Module, inputs: oracle.Inputs, prompt: Mapping[str, Any], keep: Mapping[int, Tensor], sequences: Tensor
) -> Tensor:
    """float[B, S, V]: logits over whole sequences, prompt first, in one call of the decoder."""
    decoder = oracle.text_model(model)
    rows, length = inputs["input_ids"].shape
    more = sequences.shape[1] - length
    embeds = torch.cat([prompt["inputs_embeds"], decoder.get_input_embeddings()(sequences[:, length:])], 1)
    positions = prompt.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    positions = positions.expand(rows, -1) if positions.ndim == 2 else positions.expand(-1, rows, -1)
    ahead = torch.arange(1, more + 1)
    whole = torch.cat([positions, positions[..., -1:] + ahead], -1)
    axes = positions[None] if positions.ndim == 2 else positions[-3:]
    visual = visual_mask(model, inputs)
    moved = {}
    for layer, mask in keep.items():
        compact = compacted(axes, mask, visual)
        moved[layer] = torch.cat([compact[..., :-1], compact[..., -1:] - 1 + ahead], -1)
    deepstack = {}
    if prompt.get("visual_pos_masks") is not None:
        deepstack = {
            "visual_pos_masks": nn.functional.pad(prompt["visual_pos_masks"], (0, more)),
            "deepstack_visual_embeds": prompt["deepstack_visual_embeds"],
        }
    with oracle.masked_keys(model, keep), rotating_by(model, moved):
        hidden = decoder(
            inputs_embeds=embeds,
            attention_mask=whole_mask(model, inputs, more),
            position_ids=whole,
            use_cache=False,
            **deepstack,
        )[0]
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits


MODES = {
    "greedy": lambda model, cell, inputs: oracle.generate_with_logits(model, inputs, max_new_tokens=5),
    "sampling": lambda model, cell, inputs: oracle.generate_with_logits(
        model, inputs, max_new_tokens=5, do_sample=True
    ),
    "static cache": lambda model, cell, inputs: oracle.generate_with_logits(
        model, inputs, max_new_tokens=5, cache_implementation="static"
    ),
    "second turn": lambda model, cell, inputs: two_turns(model, inputs, static=False, **options(cell[0])),
    "loop": lambda model, cell, inputs: loop(model, inputs, mask=cell[0] not in QWEN),
}


@pairs(RENUMBERED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image", "text_row"])
def test_renumbering_equals_compacted_positions(name: str, cell: Cell, mode: str, case: str) -> None:
    if mode == "loop" and cell[0] in QWEN:
        case = "plain"  # transformers decodes padded batches of these by generate only
    model, inputs, method = tiny(cell[0]), batch(cell, case), COMPRESSORS[name]
    with recording(model) as calls, noting_merged(method) as notes, compress(model, method) as session:
        got = MODES[mode](model, cell, inputs)
    report = session.report
    (prompt,) = prompts_of(method, [report], calls) or calls[:1]
    with given_merged(model, notes, [report]):
        want = reference(model, inputs, prompt, keeps(report, cell, case), got.sequences)
    steps = got.logits.shape[1]
    unread = 0 if mode == "loop" else 1  # the last token that generate appends has no logits of its own
    stop = want.shape[1] - unread
    assert_close(got.logits, want[:, stop - steps : stop])


@pairs(RENUMBERED)
def test_beams_score_their_answers_with_compacted_positions(name: str, cell: Cell) -> None:
    model, inputs, method = tiny(cell[0]), batch(cell, "plain"), COMPRESSORS[name]
    with recording(model) as calls, noting_merged(method) as notes, compress(model, method) as session:
        out = model.generate(
            **oracle.clone(inputs),
            num_beams=3,
            do_sample=False,
            max_new_tokens=4,
            output_scores=True,
            return_dict_in_generate=True,
        )
    (prompt,) = map(dict, prompts_of(method, [session.report], calls) or calls[:1])
    for name_of in ("inputs_embeds", "position_ids", "visual_pos_masks"):
        value = prompt.get(name_of)
        if value is not None:
            prompt[name_of] = value[::3] if value.shape[0] == 6 else value[..., ::3, :]
    if prompt.get("deepstack_visual_embeds") is not None:
        prompt["deepstack_visual_embeds"] = [
            layer.view(6, -1, layer.shape[-1])[::3].flatten(0, 1) for layer in prompt["deepstack_visual_embeds"]
        ]
    keep = {layer: mask[::3] for layer, mask in keeps(session.report, cell, "plain").items()}
    with given_merged(model, notes, [session.report], beams=3):
        want = reference(model, inputs, prompt, keep, out.sequences)[:, -5:-1].log_softmax(-1)
    scores = want.gather(-1, out.sequences[:, -4:, None]).sum((1, 2)) / 4
    assert_close(out.sequences_scores, scores)
