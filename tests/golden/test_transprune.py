"""TransPrune against its official code, through the hooks of a bare decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens, compress
from mmtoken.compressors import Context, TransPrune
from mmtoken.compressors.transprune import transition_value
from tests.golden.case import GoldenCase
from tests.golden.models import llama

METHOD = "transprune"


@pytest.mark.golden
def test_transprune_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """The official code with its signed cosine, and with the absolute one of the paper in its place."""
    run(case, "expected", None)
    run(case, "paper_abs", "absolute")
    case.settle()


def run(case: GoldenCase, prefix: str, cosine: Any) -> None:
    """Per layer what it changed, per stage who was there, the parts of the score and who is left; then the outputs."""
    model, embeds = llama(case), case.take("input.inputs_embeds")
    start, count = (int(case.take(f"input.{name}")) for name in ("image_start", "image_len"))
    # The official lists count layers from 1 and drop behind them: the layer that sees fewer tokens is the next one.
    cuts = tuple(case.settings["prune_layers_1based"])
    watched = tuple(layer - 1 for layer in case.settings["accumulate_layers_1based"] if layer <= cuts[-1])
    shares = tuple(float(share) for share in case.settings["keep_share_of_original_count"])
    places = torch.arange(embeds.shape[1])
    visual = (places >= start) & (places < start + count)

    changes: dict[int, Tensor] = {}
    sums: list[Tensor] = []
    scores: list[Tensor] = []

    class Seen(TransPrune):
        """Notes what a report does not hold."""

        def transition_values(self, tokens: VisualTokens, layer: int, ctx: Context) -> Tensor:
            seen = [ctx.transition(tokens, layer, module) for module in ("attention", "mlp")]  # type: ignore[arg-type]
            parts = [
                transition_value(part.magnitude, part.cosine, part.valid, absolute=cosine == "absolute")
                for part in seen
            ]
            changes[layer] = sum(parts)  # type: ignore[assignment]
            values = super().transition_values(tokens, layer, ctx)
            assert torch.equal(values, changes[layer].gather(1, seen[0].index))
            return values

        def accumulated(self, tokens: VisualTokens, start: int, stop: int, ctx: Context) -> Tensor:
            sums.append(super().accumulated(tokens, start, stop, ctx))
            return sums[-1]

        def combine(self, change: Tensor, attention: Tensor, eligible: Tensor) -> Tensor:
            scores.append(super().combine(change, attention, eligible))
            return scores[-1]

    method = Seen(
        keep=shares[-1],
        positions="renumber",
        layers=cuts,
        accumulate=watched,
        shares=shares,
        cosine=cosine,
        variant="repo",
    )
    positions: dict[int, Tensor] = {}
    with compress(model, method, visual=visual[None]) as session:
        handles = [
            model.model.layers[number].register_forward_pre_hook(
                lambda _, args, kwargs, number=number: positions.update({number: kwargs["position_ids"]}),
                with_kwargs=True,
            )
            for number in cuts
        ]
        logits = model(inputs_embeds=embeds).logits[0]
        report = session.report
        hidden = model.model(inputs_embeds=embeds).last_hidden_state[0]
    for handle in handles:
        handle.remove()

    candidates = torch.arange(count)
    for stage, (site, layer) in enumerate(zip(report.sites, cuts, strict=True)):
        assert site.layer == layer and site.scores is not None
        name = f"{prefix}.stage{stage}."
        case.compare(name + "candidates", candidates)
        case.compare(name + "ttv_accumulated_image", sums[stage][0], "scores")
        case.compare(name + "iga", site.scores[0], "scores")
        case.compare(name + "score", scores[stage][0], "scores")
        case.compare(name + "kept", site.kept[0])
        case.compare(name + "position_ids_after", positions[layer][0])
        candidates = site.kept[0]
    for layer, values in changes.items():
        if case.expects(f"{prefix}.layer{layer}.ttv_all_tokens"):
            case.compare(f"{prefix}.layer{layer}.ttv_all_tokens", values[0], "scores")
    left = ~visual
    left[report.places[0][report.kept[0]]] = True
    case.compare(f"{prefix}.logits", logits[left], "logits")
    case.compare(f"{prefix}.last_hidden_state", hidden[left], "logits")
