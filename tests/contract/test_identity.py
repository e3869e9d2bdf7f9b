"""keep=1.0 is the plain model to the bit, with every hook installed and every score computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmtoken.compressors import VisionZip
from tests import oracle
from tests.contract.matrix import COMPRESSORS, Cell, batch, compress, dense, dense_logits, logits, pairs, tiny
from tests.contract.reference import assert_items_are_the_placeholders

IDENTICAL = [name for name, method in COMPRESSORS.items() if method.identity_at_full is True and "repo" not in name]


@pairs(IDENTICAL)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "padded_ragged", "multi_image"])
def test_keeping_everything_is_the_plain_model_to_the_bit(name: str, cell: Cell, attn: str, case: str) -> None:
    settings = {"shares": (1.0, 1.0)} if name == "pyramiddrop-shares" else {}
    method = dataclasses.replace(COMPRESSORS[name], keep=1.0, **settings)
    model, inputs = tiny(cell[0], attn), batch(cell, case)
    want = dense(cell, case, attn)
    with compress(model, method) as session:
        forward = logits(model, inputs)
        got = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    assert torch.equal(forward, dense_logits(cell, case, attn))
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)
    assert len(session.reports) == 2
    for report in session.reports:
        assert report.calls > 0
        assert report.tokens_out == report.tokens_in
        assert all(site.tokens_out == site.tokens_in for site in report.sites)
        assert_items_are_the_placeholders(report, model, inputs)


@pairs(["fastv", "pyramiddrop", "visionzip", "tome"])
def test_scores_are_computed_even_if_everything_stays(name: str, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    method = dataclasses.replace(COMPRESSORS[name], keep=1.0)
    seen: list[torch.Tensor] = []
    context = _contexts(name)

    for kind, question in context:
        original = getattr(kind, question)

        def ask(self, *args, original=original, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(original(self, *args, **kwargs))
            return seen[-1]

        monkeypatch.setattr(kind, question, ask)
    with compress(tiny(cell[0]), method):
        logits(tiny(cell[0]), batch(cell, "plain"))
    assert seen
    assert all(bool(answer.isfinite().all()) and float(answer.std()) > 0 for answer in seen)


def _contexts(name: str) -> list[tuple[type, str]]:
    from mmtoken.engine.context import CallContext
    from mmtoken.engine.vision import TowerContext

    question = {
        "fastv": "text_attention",
        "pyramiddrop": "next_attention",
        "visionzip": "tower_attention",
        "tome": "tower_keys",
    }[name]
    return [(CallContext, question), (TowerContext, question)]


def test_the_repo_variant_of_visionzip_says_that_cls_takes_a_place() -> None:
    model, inputs = tiny("llava"), batch(("llava", "image"), "plain")
    with compress(model, VisionZip(keep=1.0, variant="repo")) as session:
        got = logits(model, inputs)
    assert session.report.tokens_out == session.report.tokens_in
    assert not torch.equal(got, dense_logits(("llava", "image"), "plain"))
