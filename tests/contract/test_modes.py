"""Every way of decoding with a compressed model equals the same way of decoding with the masked reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

from mmtoken.engine.session import Session
from tests import oracle
from tests.backbones.tiny_models import CELLS, GEMMA, QWEN, STACKED, TILES, build, roles
from tests.contract.matrix import COMPRESSORS, Cell, assert_close, batch, compress, keeps, pairs, tiny
from tests.contract.reference import given_merged, given_prompts, masked_per_call, noting_merged, prompts_of, recording

METHODS = (
    "divprune",
    "uniformgrid",
    "random",
    "fastv",
    "pyramiddrop",
    "sparsevlm",
    "visionzip",
    "tome",
    "downscale",
    "cdpruner",
    "prumerge",
)
BATCHED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling with beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "static cache with beams": {"cache_implementation": "static", "num_beams": 2},
    "without cache": {"use_cache": False},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


def options(family: str) -> dict[str, Any]:
    """No placeholder is ever generated: where no cache holds the prompt, transformers would want pixels for it."""
    role = roles(family)
    return {"suppress_tokens": [role[kind] for kind in ("image", "video") if role[kind] is not None]}


def compare(name: str, cell: Cell, case: str, run: Callable[[nn.Module], oracle.Generated]) -> Session:
    """Run a model compressed and masked; the mask of every call is what its own report says was dropped."""
    model, method = tiny(cell[0]), COMPRESSORS[name]
    with recording(model) as calls, noting_merged(method) as notes, compress(model, method) as session:
        got = run(model)
    prompts, reports = prompts_of(method, session.reports, calls), session.reports
    masks = [keeps(report, cell, case) for report in session.reports]
    assert not any(bool(mask[max(mask)].all()) for mask in masks)
    with given_prompts(model, prompts), given_merged(model, notes, reports), masked_per_call(model, masks):
        want = run(model)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.logits, want.logits)
    return session


@pairs(METHODS)
@pytest.mark.parametrize("mode", BATCHED)
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
def test_generate_agrees_with_the_masked_model(name: str, cell: Cell, mode: str, case: str) -> None:
    if mixes_images(cell) and "num_beams" in BATCHED[mode]:
        case = "left_padded"  # one image per row
    inputs, how = batch(cell, case), {**BATCHED[mode], **options(cell[0])}
    session = compare(name, cell, case, lambda m: oracle.generate_with_logits(m, inputs, max_new_tokens=5, **how))
    assert len(session.reports) == (5 if mode == "without cache" else 1)


def mixes_images(cell: Cell) -> bool:
    """Whether transformers repeats single images for beams, not rows: rows of several images then get wrong ones."""
    return not oracle.ENCODES_APART and (cell in STACKED or cell[0] in TILES)


@pytest.mark.lowest
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_beams_of_a_row_start_equal_unless_transformers_mixes_their_images(cell: Cell) -> None:
    model = tiny(cell[0])
    beams = oracle.generate_with_logits(model, batch(cell, "padded_ragged"), max_new_tokens=1, num_beams=2)
    first, second = beams.logits[0], beams.logits[1]
    assert (oracle.max_error(first, second) > 0.1) == mixes_images(cell)


SPECULATIVE = {
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda family: {"assistant_model": build(family, seed=3, layers=2)},
}


@pairs(METHODS)
@pytest.mark.parametrize("mode", SPECULATIVE)
def test_speculative_decoding_agrees_with_the_masked_model(name: str, cell: Cell, mode: str) -> None:
    # transformers speculates for single rows only
    inputs, how = batch(cell, "single"), {**SPECULATIVE[mode](cell[0]), **options(cell[0])}
    compare(name, cell, "single", lambda m: oracle.generate_with_logits(m, inputs, max_new_tokens=12, **how))


def text_assistant(cell: Cell) -> dict[str, Any]:
    return {"assistant_model": build("llama", seed=3, layers=2), **options(cell[0])}


# Before transformers encoded pixels apart from the forward, an assistant was handed them too; it still is handed the
# types of tokens.
TAKES_TEXT_ASSISTANT = [cell for cell in CELLS if oracle.ENCODES_APART and cell[0] not in (*QWEN, *GEMMA)]


@pairs(METHODS, TAKES_TEXT_ASSISTANT)
def test_an_assistant_that_reads_only_text_agrees(name: str, cell: Cell) -> None:
    inputs, how = batch(cell, "single"), text_assistant(cell)
    compare(name, cell, "single", lambda m: oracle.generate_with_logits(m, inputs, max_new_tokens=12, **how))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in TAKES_TEXT_ASSISTANT], ids="-".join)
def test_transformers_itself_refuses_an_assistant_that_reads_only_text(cell: Cell) -> None:
    model, inputs, how = tiny(cell[0]), batch(cell, "single"), text_assistant(cell)
    with pytest.raises(ValueError, match="not used by the model"):
        oracle.generate_with_logits(model, inputs, **how)
    with compress(model, COMPRESSORS["fastv"]), pytest.raises(ValueError, match="not used by the model"):
        oracle.generate_with_logits(model, inputs, **how)


@pairs(METHODS)
@pytest.mark.parametrize("case", ["plain", "padded_ragged"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_second_turn_on_the_returned_cache_agrees(name: str, cell: Cell, case: str, static: bool) -> None:
    inputs = batch(cell, case)
    session = compare(name, cell, case, lambda m: two_turns(m, inputs, static=static, **options(cell[0])))
    assert len(session.reports) == 1  # the second turn brings no pixels


def two_turns(model: nn.Module, inputs: oracle.Inputs, *, static: bool, **how: Any) -> oracle.Generated:
    """Generate, append a question to everything so far, generate again on the returned cache."""
    cache = {oracle.CACHE: new_static_cache(model)} if static else {}
    first = oracle.generate_with_logits(model, inputs, max_new_tokens=4, **how, **cache)
    question = torch.tensor([[104, 105, 106]]).expand(len(first.sequences), -1)
    ids = torch.cat([first.sequences, question], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    more = {"input_ids": ids, "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
    return oracle.generate_with_logits(model, more, max_new_tokens=4, **{oracle.CACHE: first.cache}, **how)


def new_static_cache(model: nn.Module) -> StaticCache:
    """One with room for the longest tiny prompt, an answer and a second turn."""
    return StaticCache(config=oracle.text_model(model).config, max_cache_len=256)


FIXED = [cell for cell in CELLS if cell[0] not in QWEN]


@pairs(METHODS, FIXED)
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_loop_of_forward_calls_with_a_growing_mask_agrees(name: str, cell: Cell, case: str, static: bool) -> None:
    inputs = batch(cell, case)
    compare(name, cell, case, lambda m: loop(m, inputs, mask=True, static=static))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0] in QWEN], ids="-".join)
def test_transformers_itself_refuses_such_a_loop_for_qwen(cell: Cell) -> None:
    model, inputs = tiny(cell[0]), batch(cell, "plain")
    with pytest.raises(RuntimeError):
        loop(model, inputs, mask=True)
    with compress(model, COMPRESSORS["fastv"]), pytest.raises(RuntimeError):
        loop(model, inputs, mask=True)


@pairs(METHODS)
@pytest.mark.parametrize("case", ["plain", "single"])
def test_a_loop_of_forward_calls_without_a_mask_agrees(name: str, cell: Cell, case: str) -> None:
    inputs = batch(cell, case)
    compare(name, cell, case, lambda m: loop(m, inputs, mask=False))


@pairs(METHODS)
def test_a_loop_of_forward_calls_without_cache_agrees(name: str, cell: Cell) -> None:
    inputs = batch(cell, "padded_ragged")
    session = compare(name, cell, "padded_ragged", lambda m: loop_without_cache(m, inputs))
    assert len(session.reports) == 4  # each step is a prompt with a selection of its own


@torch.no_grad()
def loop(model: nn.Module, inputs: oracle.Inputs, *, mask: bool, static: bool = False) -> oracle.Generated:
    """Greedy decoding by forward calls without position ids; with `mask` every call gets the two-dimensional mask."""
    first = oracle.clone(inputs)
    seen = first["attention_mask"]
    if not mask:
        del first["attention_mask"]
    if static:
        first[oracle.CACHE] = new_static_cache(model)
    out = model(**first, use_cache=True)
    tokens, logits = [], [out.logits[:, -1]]
    for _ in range(4):
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        seen = torch.cat([seen, torch.ones_like(tokens[-1])], 1)
        more = {"attention_mask": seen} if mask else {}
        out = model(input_ids=tokens[-1], use_cache=True, **{oracle.CACHE: out[oracle.CACHE]}, **more)
        logits.append(out.logits[:, -1])
    return oracle.Generated(torch.cat([inputs["input_ids"], *tokens], 1), torch.stack(logits, 1))


@torch.no_grad()
def loop_without_cache(model: nn.Module, inputs: oracle.Inputs) -> oracle.Generated:
    """Greedy decoding that feeds the whole sequence with its pixels every time."""
    grown, logits = oracle.clone(inputs), []
    for _ in range(4):
        logits.append(model(**oracle.clone(grown), use_cache=False).logits[:, -1])
        best = logits[-1].argmax(-1, keepdim=True)
        grown["input_ids"] = torch.cat([grown["input_ids"], best], 1)
        grown["attention_mask"] = nn.functional.pad(grown["attention_mask"], (0, 1), value=1)
        if "mm_token_type_ids" in grown:
            grown["mm_token_type_ids"] = nn.functional.pad(grown["mm_token_type_ids"], (0, 1))
    return oracle.Generated(grown["input_ids"], torch.stack(logits, 1))
