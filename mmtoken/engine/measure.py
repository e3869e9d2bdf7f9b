"""Fills in reports from what a prefill did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mmtoken.engine.cache import cache_bytes
from mmtoken.engine.encode import Encoded
from mmtoken.engine.flops import DecoderShape
from mmtoken.engine.prefill import Cut, Prefill
from mmtoken.engine.report import Report
from mmtoken.kernels.dispatch import ran
from mmtoken.tokens import VisualTokens

if TYPE_CHECKING:
    from mmtoken.engine.session import Session


def start_report(session: Session, call: Prefill, shape: DecoderShape, encoded: Mapping[str, Encoded]) -> None:
    """Note what came in."""
    state = session.thread
    sites = [site for record in encoded.values() for site in record.sites]
    report = state.report = Report(type(session.compressor).__name__, sites)
    report.item_rows = list(call.items.rows)
    report.places = [places for _, places in call.items.spans()]
    report.tokens_in = call.tokens.counts()
    report.prompt_lengths = [int(n) for n in call.real.sum(-1).tolist()]
    report.decoder = shape
    state.ran = ran()
    for record in encoded.values():
        state.ran.subtract(record.ran)  # they ran before, but belong to this report
    report.vision_seconds = sum(record.seconds for record in encoded.values())
    keep = session.compressor.keep
    if isinstance(keep, int) and session.compressor.sites != {"refresh"}:  # patches of the tower there
        for item, (count, steps) in enumerate(zip(report.tokens_in, call.tokens.steps, strict=True)):
            if keep * steps > count:
                report.notes.append(f"keep={keep} is above the {count} tokens of item {item}: all were kept.")
    if call.embeds.is_cuda:
        torch.cuda.reset_peak_memory_stats(call.embeds.device)


def finish_report(session: Session, call: Prefill, cuts: list[Cut]) -> None:
    """Note what is left, and file the report.

    Args:
        session: its owner.
        call: the prefill that ended.
        cuts: the cut that each decoder layer ran under.
    """
    report = session.take_report()
    assert report is not None
    report.prefill_seconds = session.clock() - call.started
    lengths: dict[int, list[int]] = {}
    for cut in cuts:
        if cut.group not in lengths:
            lengths[cut.group] = cut.lengths(report.prompt_lengths)
        report.layer_lengths.append(lengths[cut.group])
    note_tokens(report, call.tokens)
    if call.cache is not None:
        report.kv_bytes = cache_bytes(call.cache)
        report.kv_bytes_dense = _dense_bytes(call)
    if call.embeds.is_cuda:
        report.peak_memory_bytes = torch.cuda.max_memory_allocated(call.embeds.device)
    session.file(report)


def note_tokens(report: Report, tokens: VisualTokens) -> None:
    """The surviving tokens, as tokens and as indices per item."""
    report.tokens = tokens.replace(features=tokens.features.detach())
    report.kept = tokens.kept()
    left = tokens.valid & tokens.protected
    report.separators = [source[where] for source, where in zip(tokens.source, left, strict=True)]


def _dense_bytes(call: Prefill) -> int:
    total = 0
    for layer in call.cache.layers:
        for tensor in (layer.keys, layer.values):
            total += tensor.numel() // tensor.shape[-2] * (call.past + call.length) * tensor.element_size()
    return total
