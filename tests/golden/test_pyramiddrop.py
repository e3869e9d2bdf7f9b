"""PyramidDrop against its official code, through the hooks of a bare decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken import compress
from mmtoken.compressors import PyramidDrop
from tests.golden.case import GoldenCase
from tests.golden.models import llama

METHOD = "pyramiddrop"


@pytest.mark.golden
def test_pyramiddrop_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Per stage: candidates, their scores, who is kept, and the positions of what is left; then the outputs."""
    model, embeds = llama(case), case.take("input.inputs_embeds")
    rows, length, _ = embeds.shape
    starts, lengths = (case.take(f"input.{name}").expand(rows) for name in ("image_start", "image_len"))
    # The official list counts layers from 1 and drops behind them: the layer that sees fewer tokens is the next one.
    layers = tuple(case.settings["drop_after_layers_1based"])
    shares = tuple(float(share) for share in case.settings["keep_share_of_original_count"])
    places = torch.arange(length)
    visual = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    method = PyramidDrop(keep=shares[-1], positions="renumber", layers=layers, shares=shares, variant="repo")

    positions: dict[int, Tensor] = {}
    with compress(model, method, visual=visual) as session:
        handles = [
            model.model.layers[number].register_forward_pre_hook(
                lambda _, args, kwargs, number=number: positions.update({number: kwargs["position_ids"]}),
                with_kwargs=True,
            )
            for number in layers
        ]
        logits = model(inputs_embeds=embeds).logits
        hidden = model.model(inputs_embeds=embeds).last_hidden_state
        report = session.reports[0]
    for handle in handles:
        handle.remove()
    candidates = [torch.arange(int(count)) for count in lengths]
    for stage, (site, layer) in enumerate(zip(report.sites, layers, strict=True)):
        assert site.layer == layer and site.scores is not None
        name = f"expected.stage{stage}."
        case.compare(name + "candidates", batch(case, name + "candidates", candidates))
        case.compare(name + "score", batch(case, name + "score", site.scores), "scores")
        case.compare(name + "kept", batch(case, name + "kept", site.kept))
        after = list(positions[layer].expand(rows, -1))
        case.compare(name + "position_ids_after", batch(case, name + "position_ids_after", after))
        candidates = site.kept
    left = ~visual
    for row, where, kept in zip(report.item_rows, report.places, report.kept, strict=True):
        left[row, where[kept]] = True
    for name, values in (("logits", logits), ("last_hidden_state", hidden)):
        answers = [row[where] for row, where in zip(values, left, strict=True)]
        case.compare("expected." + name, batch(case, "expected." + name, answers), "logits")
    case.settle()


def batch(case: GoldenCase, name: str, values: list[Tensor]) -> Tensor:
    """One tensor of a value per prompt row; files of a single row leave the first dimension out."""
    single = len(values) == 1 and values[0].ndim == len(case.shape(name))
    return values[0] if single else torch.stack(values)
