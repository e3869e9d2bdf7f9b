"""LLaVA-PruMerge against its official code, through the hooks of a bare tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens, compress
from mmtoken.compressors import Context, PruMerge
from mmtoken.compressors.prumerge import merge_neighbours, official_centres, others, outlier_ratio
from tests.golden.case import GoldenCase
from tests.golden.models import clip_tower

METHOD = "prumerge"


@pytest.mark.golden
def test_prumerge_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Attention, centres in the official order, and the tokens put out; then the same tokens from the product's site.

    The official code takes the outliers' share over the whole batch, and its plus variant may have a centre twice. The
    product does neither: an image's own outliers decide, and tokens are distinct.
    """
    model, pixels, settings = clip_tower(case), case.take("input.pixel_values"), case.settings
    adaptive, plus, neighbours = settings["adaptive"], settings["plus"], settings["neighbours"]
    keys: list[Tensor] = []
    features: list[Tensor] = []

    class Seen(PruMerge):
        """Notes the keys and features that it is given; a report does not hold them."""

        def project(
            self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
        ) -> VisualTokens:
            keys.append(ctx.tower_keys(tokens, block=ctx.blocks - 1, joint=True))
            features.append(tokens.features)
            return super().project(tokens, default, ctx)

    keep = 1.0 if adaptive else settings["ratio"]
    method = Seen(keep=keep, adaptive=adaptive, plus=plus, neighbours=neighbours, variant="repo")
    with compress(model, method) as session:
        outputs = model(pixel_values=pixels, output_hidden_states=True)
        report = session.report
    (site,), left = report.sites, report.tokens
    assert site.scores is not None and left is not None
    attention = torch.stack(site.scores)
    case.compare("expected.cls_attention", attention, "tokens")
    case.compare("expected.patch_features", features[0], "tokens")
    assert torch.equal(outputs.hidden_states[-2][:, 1:], features[0])

    ratio = outlier_ratio(attention) if adaptive else settings["ratio"]
    assert ratio == pytest.approx(settings["ratio"], abs=1e-12)
    total = attention.shape[1]
    top = torch.stack([official_centres(row, ratio, adaptive=adaptive, plus=False) for row in attention])
    case.compare("expected.topk_indices_score_order", top)
    centres = torch.stack([official_centres(row, ratio, adaptive=adaptive, plus=plus) for row in attention])
    case.compare("expected.all_center_indices", centres)
    tokens = []
    for row in range(len(pixels)):
        rest = others(centres[row], total, official=True)
        merged, extra = merge_neighbours(features[0][row], attention[row], keys[0][row], centres[row], rest, neighbours)
        tokens.append(torch.cat([merged, extra[None]]))
    case.compare("expected.output_tokens", torch.stack(tokens), "tokens")
    assert len(tokens[0]) == settings["output_tokens"]

    for row in range(len(pixels)):
        own = official_centres(
            attention[row],
            outlier_ratio(attention[row]) if adaptive else ratio,
            adaptive=adaptive,
            plus=plus,
        )
        if own.tolist() != centres[row].tolist() or len(own.unique()) < len(own):
            continue  # another image of the batch, or a centre that is there twice, made the official tokens
        # The product has them at their places; the extra token is at the most attended patch that is no centre.
        rest = others(own, total)
        extra_at = rest[attention[row][rest].argmax()]
        source, order = torch.cat([own, extra_at[None]]).sort()
        valid = left.valid[row]
        assert torch.equal(left.source[row, valid], source)
        assert torch.equal(left.features[row, valid], tokens[row][order])
    case.settle()
