"""Dropping tokens is hiding them: the compressed model equals the whole model in which later layers cannot see them.

What the reference hides is what the report says was dropped; `test_selections` checks that this is what the method's
formulas drop. The reference of merging methods starts from the merged features; `test_merging` checks those.
"""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.backbones.tiny_models import CASES
from tests.contract.matrix import COMPRESSORS, Cell, assert_close, batch, compress, drops, keeps, logits, pairs, tiny
from tests.contract.reference import (
    alone,
    as_entered,
    assert_items_are_the_placeholders,
    evicted_by_layer,
    given_merged,
    given_prompts,
    noting_merged,
    prompts_of,
    recording,
)

KEEPING = [name for name, method in COMPRESSORS.items() if method.positions == "keep"]


@pairs(KEEPING)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_dropping_equals_masking(name: str, cell: Cell, case: str, attn: str) -> None:
    model, inputs, method = tiny(cell[0], attn), batch(cell, case), COMPRESSORS[name]
    with (
        recording(model) as calls,
        noting_merged(method) as notes,
        compress(model, method) as session,
        recording(model) as shortened,
    ):
        forward = logits(model, inputs)
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    report = session.report
    assert len(session.reports) == 2
    assert_items_are_the_placeholders(report, model, inputs)
    evicts = "cache" in method.sites
    assert (sum(report.tokens_out) < sum(report.tokens_in)) == drops(name, cell)
    assert (report.kv_bytes < report.kv_bytes_dense) >= evicts
    prompts, reports = prompts_of(method, session.reports, calls), session.reports
    # Padding moves positions in a plain call but not in `generate`, and scores may depend on them: a mask per call.
    keep, first = keeps(report, cell, case), keeps(reports[0], cell, case)
    if {"refresh", "vision_layer"} & method.sites or (method.merges and {"project", "llm_input"} & method.sites):
        # Fewer patches in the tower give other features, and so does merging.
        real = inputs["attention_mask"].bool()
        entered = real if method.hides() else first[0] & real
        prompts = [as_entered(*both, entered) for both in zip(calls[:2], shortened[:2], strict=True)]
    evicted = evicted_by_layer(report, keep)
    assert bool(evicted) == evicts
    with given_prompts(model, prompts), given_merged(model, notes, reports):
        with oracle.masked_keys(model, first):
            want_forward = logits(model, inputs)
        with oracle.masked_keys(model, evicted, decode_only=True), oracle.masked_keys(model, keep):
            want = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    left = first[max(first)] & inputs["attention_mask"].bool()
    assert_close(forward[left], want_forward[left])
    assert_close(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)


@pairs()
@pytest.mark.parametrize("case", ["left_padded", "padded_ragged", "text_row"])
def test_mask_mode_answers_like_drop_mode(name: str, cell: Cell, case: str) -> None:
    model, inputs, method = tiny(cell[0]), batch(cell, case), COMPRESSORS[name]
    with compress(model, method) as session:
        dropped_forward = logits(model, inputs)
        dropped = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
        report = session.report
    with compress(model, method, mode="mask") as session:
        forward = logits(model, inputs)
        masked = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    left = inputs["attention_mask"].bool()
    assert_close(forward[left], dropped_forward[left])
    assert_close(masked.logits, dropped.logits)
    assert torch.equal(masked.sequences, dropped.sequences)
    assert [kept.tolist() for kept in session.report.kept] == [kept.tolist() for kept in report.kept]
    assert all(lengths == report.prompt_lengths for lengths in session.report.layer_lengths)
    leaves = drops(name, cell) and name != "regionmask-mask"
    assert any(lengths != report.prompt_lengths for lengths in report.layer_lengths) == leaves
    if "cache" in method.sites:
        assert report.kv_bytes < session.report.kv_bytes


@pairs()
@pytest.mark.parametrize("case", ["left_padded", "padded_ragged", "multi_image", "text_row"])
def test_a_batch_equals_its_rows(name: str, cell: Cell, case: str) -> None:
    model, inputs = tiny(cell[0]), batch(cell, case)
    length = inputs["input_ids"].shape[1]
    with compress(model, COMPRESSORS[name]) as session:
        together = oracle.generate_with_logits(model, inputs)
        whole = session.report
        for row in range(len(inputs["input_ids"])):
            single = alone(model, cell, inputs, row)
            by_itself = oracle.generate_with_logits(model, single)
            start = single["input_ids"].shape[1]
            assert torch.equal(together.sequences[row, length:], by_itself.sequences[0, start:])
            assert_close(by_itself.logits[0], together.logits[row])
            if row in whole.item_rows:
                mine = [kept for kept, of in zip(whole.kept, whole.item_rows, strict=True) if of == row]
                assert [kept.tolist() for kept in session.report.kept] == [kept.tolist() for kept in mine]
