"""VLA-Pruner against its official code, through the hooks of a bare decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens, compress
from mmtoken.compressors import Context, VLAPruner
from mmtoken.compressors.vlapruner import diverse, smooth
from mmtoken.engine.recorder import Recorder
from mmtoken.tokens import top_mask
from tests.golden.case import HOME, GoldenCase
from tests.golden.models import llama

METHOD = "vla_pruner"


@pytest.mark.golden
def test_vla_pruner_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def test_the_papers_decay_would_choose_other_tokens_than_the_official_one() -> None:
    case = GoldenCase.load(HOME / METHOD / "case2")
    history = case.take("input.history_oldest_to_newest")[:, None]
    everyone = torch.ones(1, history.shape[-1], dtype=torch.bool)
    paper, repo = (
        top_mask(smooth(history, case.settings["gamma"], everyone, variant=variant), [64], everyone)
        for variant in ("paper", "repo")
    )
    assert int((paper & repo).sum()) == 54


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """The smoothed history, both scores and their best tokens, the union, the order of picks, and the outputs."""
    model, embeds = llama(case), case.take("input.inputs_embeds")
    history, guide = case.take("input.history_oldest_to_newest"), case.take("input.past_action_guide")
    settings = case.settings
    gamma, window = settings["gamma"], settings["history_w"]
    smoothed = smooth(history[:, None], gamma, torch.ones_like(history[:1], dtype=torch.bool), variant="repo")[0]
    case.compare("expected.smoothed_guide_repo", smoothed.bfloat16(), "smoothed")
    case.compare("expected.smoothed_guide_repo_as_fp32", smoothed, "smoothed")

    actions: list[Tensor] = []

    class Seen(VLAPruner):
        """Notes the action scores; a report holds the semantic ones."""

        def action(self, tokens: VisualTokens, ctx: Context) -> Tensor | None:
            found = super().action(tokens, ctx)
            assert found is not None
            actions.append(found[0])
            return found

    common = {
        "keep": settings["keep_count"],
        "layer": settings["cut_before_layer_0based"],
        "rows": settings["semantic_rows"],
        "gamma": gamma,
    }
    if settings["guide_is_smoothed_history"]:
        method, calls = Seen(**common, window=window, variant="repo"), list(history[:, None])
    else:
        # A history of one call is its own estimate.
        method, calls = Seen(**common, window=1), [guide[None]]

    places = torch.arange(embeds.shape[1])
    first, count = settings["visual_start"], settings["visual_len"]
    visual = (places >= first) & (places < first + count)
    recording = method.recording(len(model.model.layers))
    with compress(model, method, visual=visual[None]) as session:
        session.thread.recorder = Recorder(recording)
        session.thread.recorder.calls = list(calls)
        logits = model(inputs_embeds=embeds).logits[0]
        report = session.report
        hidden = model.model(inputs_embeds=embeds).last_hidden_state[0]
    assert torch.allclose(actions[0], guide.float(), rtol=4e-3, atol=0)
    (site,) = report.sites
    assert site.scores is not None and site.layer == settings["cut_before_layer_0based"]
    case.compare("expected.semantic_score", site.scores[0], "scores")
    everyone = torch.ones(1, count, dtype=torch.bool)
    semantic = top_mask(site.scores[0][None], [settings["keep_count"]], everyone)[0]
    action = top_mask(actions[0][None], [settings["keep_count"]], everyone)[0]
    case.compare("expected.semantic_topk", semantic.nonzero()[:, 0])
    case.compare("expected.action_topk", action.nonzero()[:, 0])
    case.compare("expected.union", (semantic | action).nonzero()[:, 0])
    order = diverse(embeds[0, visual], semantic | action, settings["keep_count"])
    case.compare("expected.diversity_pick_order", order)
    assert torch.equal(order.sort().values, report.kept[0])
    case.compare("expected.kept_visual", report.kept[0])
    left = ~visual
    left[report.places[0][report.kept[0]]] = True
    case.compare("expected.kept_sequence_indices", places[left])
    case.compare("expected.logits", logits[left], "logits")
    case.compare("expected.last_hidden_state", hidden[left], "logits")
    case.settle()
