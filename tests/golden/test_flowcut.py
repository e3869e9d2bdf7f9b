"""FlowCut against its official code, through the hooks of a bare tower."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens, compress
from mmtoken.compressors import Context, FlowCut
from mmtoken.compressors.flowcut import Flow, tower_flow
from tests.golden.case import GoldenCase
from tests.golden.models import clip_tower

METHOD = "flowcut"


@pytest.mark.golden
def test_flowcut_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@dataclass
class Place:
    """What was seen of one block: its number, the flow through its patches, the running score, and what was left."""

    block: int
    flow: Flow
    running: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Watched(FlowCut):
    """Notes what happens at every place; a report does not hold all of it."""

    places: list[Place] = field(default_factory=list, compare=False)

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        flow = tower_flow(ctx.tower_states(tokens), tokens.eligible, self.variant)
        left = super().vision_layer(tokens, layer, ctx)
        assert ctx.scores is not None
        self.places.append(Place(layer - 1, flow, ctx.scores[0], tokens.source[0], left.source[0]))
        return left


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Scores and their parts in every block that still has more than the target, cuts, and the tower's output.

    The official code looks no further once the target is reached. A tower of n blocks is read after block n - 2.
    """
    model, pixels = clip_tower(case), case.take("input.pixel_values")
    target = int(case.take("input.target_patches"))
    settings = case.settings
    assert target == settings["target_patches"] == settings["repo_target_including_cls"] - 1
    method = Watched(keep=target, history=settings["history_weight"], variant=case.description["variant"])
    last: list[Tensor] = []
    layers = model.get_submodule("vision_model" if "vision_model" in model._modules else "").encoder.layers

    def note(*call: object) -> None:
        last.append(call[-1] if isinstance(call[-1], Tensor) else call[-1][0])  # type: ignore[index]

    with compress(model, method) as session:
        handle = layers[-1].register_forward_hook(note)
        outputs = model(pixel_values=pixels, output_hidden_states=True)
        kept = session.report.kept[0]
    handle.remove()
    depth = settings["num_hidden_layers"]
    assert [place.block for place in method.places] == list(range(depth - 2))

    counts, blocks = [], []
    for place in method.places:
        name = f"expected.layer{place.block}."
        if not case.expects(f"{name}score"):
            assert len(place.before) == target
            continue
        assert place.flow.similarity is not None
        case.compare(f"{name}cls_attention", place.flow.attention[0, :, 0], "scores")
        case.compare(f"{name}value_similarity", place.flow.similarity[0, :, 0], "scores")
        case.compare(f"{name}value_density", place.flow.density[0, :, 0], "scores")
        case.compare(f"{name}score", place.flow.scores[0], "scores")
        case.compare(f"{name}cumulative_score_before_cut", place.running, "scores")
        if case.expects(f"{name}kept_patches"):
            case.compare(f"{name}kept_patches", place.after)
            counts.append(len(place.after))
            blocks.append(place.block)
        else:
            assert torch.equal(place.after, place.before)
    case.compare("expected.pruning_layers", torch.tensor(blocks))
    case.compare("expected.patches_after_each_pruning_layer", torch.tensor(counts))
    case.compare("expected.final_kept_patches", kept)

    rows = torch.cat([torch.zeros(1, dtype=torch.long), kept + 1])
    case.compare("expected.final_hidden_minus2", outputs.hidden_states[-2][0, rows], "hidden")
    case.compare("expected.features_to_projector", outputs.hidden_states[-2][0, rows[1:]], "hidden")
    case.compare("expected.last_hidden_state", last[0][0], "hidden")
    case.settle()
