"""SparseVLM and SparseVLM+ against their official code, through the hooks of a bare decoder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens, compress
from mmtoken.compressors import Compressor, Context, SparseVLM, SparseVLMPlus
from mmtoken.compressors.sparsevlm import cluster, cluster_means
from tests.golden.case import GoldenCase
from tests.golden.models import llama

METHOD = "sparsevlm"


@pytest.mark.golden
def test_sparsevlm_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


class Stage(NamedTuple):
    """What a report does not hold: who is kept of the tokens, what they were, and what came out."""

    kept: Tensor
    features: Tensor
    recycled: Tensor
    merged: Tensor


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Raters; per stage scores, kept tokens, recycled ones, clusters and their means; then the output."""
    model, embeds = llama(case), case.take("input.inputs_embeds")
    start, count = (int(case.take(f"input.{name}")) for name in ("image_start", "image_len"))
    places = torch.arange(embeds.shape[1])
    visual = (places >= start) & (places < start + count)
    # The official code drops behind a layer: the layer that sees fewer tokens is the next one.
    cuts = tuple(layer + 1 for layer in case.settings["prune_after_layers_0based"])
    counts = tuple(int(kept) for kept in case.settings["keep_counts"])
    assert len(counts) == len(cuts)
    raters: list[Tensor] = []
    stages: list[Stage] = []
    method = method_of(case, cuts, counts, raters, stages)

    with compress(model, method, visual=visual[None]) as session:
        model(inputs_embeds=embeds)
        report, made = session.report, list(stages)
        hidden = model.model(inputs_embeds=embeds).last_hidden_state[0]
    # Text tokens before the image come first.
    case.compare("expected.text_rater_offsets", raters[0][0].nonzero()[:, 0] - start)
    reasons = {}
    candidates = torch.arange(count)
    for number, (site, cut) in enumerate(zip(report.sites, cuts, strict=True)):
        assert site.layer == cut and site.scores is not None
        name = f"expected.stage{number}."
        case.compare(name + "visual_score", site.scores[0], "scores")
        if isinstance(method, SparseVLMPlus):
            case.compare(name + "kept_positions", torch.searchsorted(candidates, site.kept[0]))
            candidates = site.kept[0]
            continue
        stage = made[number]
        case.compare(name + "kept_positions", stage.kept)
        case.compare(name + "recycled_positions_score_order", stage.recycled)
        inputs = stage.features[stage.recycled]
        case.compare(name + "cluster_input", inputs, "hidden")
        case.compare(name + "merged_tokens", stage.merged, "merged")
        total = case.shape(name + "merged_tokens")[0]
        centres, owner = cluster(inputs, total)
        assert torch.equal(cluster_means(inputs, owner, total), stage.merged)
        case.compare(name + "cluster_label_of_recycled", owner)
        if total > 2:
            case.compare(name + "cluster_center_of_recycled", centres)
        else:
            reasons[name + "cluster_center_of_recycled"] = (
                "one cluster: all densities are equal; two: those of mutual neighbours are. Which one is called the "
                "centre is then noise in the official code; its members and their mean are compared"
            )
    left = ~visual
    left[report.places[0][report.kept[0]]] = True
    case.compare("expected.last_hidden_state", hidden[left], "hidden")
    case.settle(reasons)


def method_of(
    case: GoldenCase, cuts: tuple[int, ...], counts: tuple[int, ...], raters: list[Tensor], stages: list[Stage]
) -> Compressor:
    """The version of the case, noting raters and stages."""
    settings = case.settings

    class Seen(SparseVLM):
        def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
            left = super().llm_layer(tokens, layer, ctx)
            raters.append(ctx.memory["raters"])
            return left

        def merge(self, tokens: VisualTokens, scores: Tensor, kept: Tensor, clusters: list[int]) -> VisualTokens:
            left = super().merge(tokens, scores, kept, clusters)
            recycled = self.best_pruned(scores[0], ~kept[0])
            merged = left.features[0, len(left.source[0]) - clusters[0] :]
            stages.append(Stage(kept[0].nonzero()[:, 0], tokens.features[0], recycled, merged))
            return left

    class SeenPlus(SparseVLMPlus):
        def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
            left = super().llm_layer(tokens, layer, ctx)
            raters.append(ctx.memory["raters"])
            return left

    if settings["version"] == "2.0":
        heads = settings["heads_selected"]
        return SeenPlus(keep=counts[-1], layers=cuts, stages=counts, heads=heads, variant="repo")
    share = settings["recycle_share"]
    return Seen(
        keep=counts[-1], positions="renumber", layers=cuts, stages=counts, recycle=share, members=10, variant="repo"
    )
