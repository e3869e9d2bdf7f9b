"""VisionZip against its official code, through the hooks of a bare tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens, compress
from mmtoken.compressors import Context, VisionZip
from mmtoken.compressors.visionzip import assign_to_anchors
from tests.golden.case import GoldenCase
from tests.golden.models import clip_tower

METHOD = "visionzip"


@pytest.mark.golden
def test_visionzip_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """What the tower pays attention to, keys, dominant tokens, anchors and their members, and the tokens put out.

    Indices of the file count CLS as 0 and patches from 1.
    """
    model, pixels = clip_tower(case), case.take("input.pixel_values")
    dominant, contextual = case.settings["dominant_patches"], case.settings["contextual"]
    keys: list[Tensor] = []

    class KeysSeen(VisionZip):
        """Notes the keys that it is given; a report does not hold them."""

        def project(
            self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
        ) -> VisualTokens:
            keys.append(ctx.tower_keys(tokens))
            return super().project(tokens, default, ctx)

    method = KeysSeen(keep=dominant + contextual + 1, contextual=contextual, variant="repo")
    projected: list[Tensor] = []
    layers = model.get_submodule("vision_model" if "vision_model" in model._modules else "").encoder.layers
    with compress(model, method) as session:
        handle = layers[-2].self_attn.k_proj.register_forward_hook(lambda *call: projected.append(call[-1]))
        outputs = model(pixel_values=pixels, output_hidden_states=True)
        report = session.report
    handle.remove()
    (site,), tokens = report.sites, report.tokens
    assert tokens is not None and site.scores is not None
    scores, rows = torch.stack(site.scores), len(pixels)

    case.compare("expected.cls_attention_sum", scores, "tokens")
    # The method reads the keys of patches; that of CLS comes from the model itself.
    heads = model.config.num_attention_heads
    cls_key = projected[0][:, :1].unflatten(-1, (heads, -1)).mean(-2)
    case.compare("expected.metric", torch.cat([cls_key, keys[0]], 1), "tokens")
    case.compare("expected.hidden_minus2", outputs.hidden_states[-2], "tokens")

    # Tokens come out as CLS, dominant ones, anchors.
    chosen, anchors = tokens.source[:, 1 : 1 + dominant], tokens.source[:, 1 + dominant :]
    best = scores.gather(1, chosen).argsort(dim=-1, descending=True, stable=True)
    cls = torch.zeros(rows, 1, dtype=torch.long)
    case.compare("expected.dominant_indices_score_order", torch.cat([cls, chosen.gather(1, best) + 1], 1))
    case.compare("expected.dominant_indices_sorted", torch.cat([cls, chosen + 1], 1))
    case.compare("expected.context_target_indices", anchors + 1)
    merged, owners = [], []
    for row in range(rows):
        rest = torch.ones(scores.shape[1], dtype=torch.bool)
        rest[chosen[row]] = False
        rest = rest.nonzero()[:, 0]
        picked, members, owner = assign_to_anchors(keys[0][row, rest], contextual)
        assert torch.equal(rest[picked], anchors[row])
        assert torch.equal(owner.bincount(minlength=contextual) + 1.0, tokens.size[row, 1 + dominant :])
        merged.append(rest[members] + 1)
        owners.append(owner)
    case.compare("expected.merged_indices", torch.stack(merged))
    case.compare("expected.merge_assignment", torch.stack(owners))
    case.compare("expected.output_tokens", tokens.features, "tokens")
    case.settle()
