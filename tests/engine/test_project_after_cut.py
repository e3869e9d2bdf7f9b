"""A method that cuts inside the tower and acts around the projector is handed what it left, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmtoken import VisualTokens, compress, learnable
from mmtoken.compressors import Compressor, Context, QueCC
from mmtoken.compressors.base import Positions
from tests import oracle
from tests.backbones.tiny_models import build, inputs
from tests.engine.agreement import tiny

LEFT = (1, 4, 6, 7, 11, 14)


@dataclass(frozen=True)
class CutTwice(Compressor):
    """Leaves some tokens of each tile inside the tower, and every second one of those before the projector."""

    keep: int | float = 3
    positions: Positions = "keep"

    title: ClassVar[str] = "CutTwice"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026
    merges: ClassVar[bool] = True

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        if layer != 1:
            return tokens
        left = tokens.where(torch.isin(tokens.source, torch.tensor(LEFT)))
        return left.replace(size=left.size * 2)

    def project(
        self, tokens: VisualTokens, default: Callable[[VisualTokens], VisualTokens], ctx: Context
    ) -> VisualTokens:
        GIVEN.append(tokens)
        order = tokens.eligible.long().cumsum(-1)
        return default(tokens.where((order % 2 == 1) | tokens.protected))


GIVEN: list[VisualTokens] = []


@pytest.fixture(autouse=True)
def nothing_given() -> None:
    GIVEN.clear()


@torch.no_grad()
def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**oracle.clone(batch))


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_around_a_patchwise_projector(strategy: str) -> None:
    model = build("llava")
    batch = inputs(model, "llava", "image", "plain")
    full = strategy == "full"
    if full:  # CLS is projected as well
        model.config.vision_feature_select_strategy = "full"
        image = batch["input_ids"] == model.config.image_token_id
        first = image & (image.long().cumsum(-1) == 1)
        for name in ("input_ids", "attention_mask"):
            rows = [
                torch.cat([row[: int(at) + 1], row[int(at) :]])
                for row, at in zip(batch[name], first.long().argmax(-1), strict=True)
            ]
            batch[name] = torch.stack(rows)
    entered: list[Tensor] = []
    with compress(model, CutTwice()) as session:
        handle = model.model.vision_tower.register_forward_hook(
            lambda module, args, output: entered.append(output.hidden_states[-2])
        )
        forward(model, batch)
        handle.remove()
    (given,) = GIVEN
    places = [0, *(place + 1 for place in LEFT)] if full else list(LEFT)
    assert given.source.tolist() == [places] * 2 and bool(given.valid.all())
    assert given.protected.tolist() == [[full, *[False] * 6] if full else [False] * 6] * 2
    assert given.size.tolist() == [[1.0, *[2.0] * 6] if full else [2.0] * 6] * 2
    patches = entered[0] if full else entered[0][:, 1:]
    assert torch.equal(given.features, patches[:, places])
    kept = [place + full for place in LEFT[::2]]
    assert [row.tolist() for row in session.report.kept] == [kept] * 2
    assert session.report.tokens is not None
    for row in range(2):
        tokens = session.report.tokens
        sizes = dict(zip(tokens.source[row].tolist(), tokens.size[row].tolist(), strict=True))
        assert [sizes[place] for place in kept] == [2.0] * 3


def test_behind_a_projector_that_merges_patches() -> None:
    model = tiny("idefics3")
    batch = inputs(model, "idefics3", "image", "plain")
    with compress(model, CutTwice()) as session:
        forward(model, batch)
    (given,) = GIVEN
    assert given.source.tolist() == [list(LEFT)] * len(given)
    assert [row.tolist() for row in session.report.kept] == [list(LEFT[::2])] * len(given)


def test_windows_over_the_border_all_stay() -> None:
    """4 x 4 patches in windows of 3 x 3 are four tokens, though a ninth of sixteen is two."""
    model = tiny("llava")
    with compress(model, learnable(model, QueCC(keep=1 / 9))) as session:
        forward(model, inputs(model, "llava", "image", "plain"))
    assert session.report.tokens_out == [4, 4]
    assert [row.tolist() for row in session.report.kept] == [[5, 7, 13, 15]] * 2
