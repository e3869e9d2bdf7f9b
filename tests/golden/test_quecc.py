"""QueCC against its official module, forward and backward, through the site of the compressor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens
from mmtoken.compressors import Context, QueCC
from mmtoken.compressors.quecc import QueCCParts
from tests.golden.case import GoldenCase

METHOD = "quecc"

NAMES = {
    "text": "text_projection",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "pool": "q_downsample",
    "attention": "clip_attn",
}
"""Our names of the parts, and those of the file."""


@pytest.mark.golden
def test_quecc_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


class Model(Context):
    """Stands in for the tower and the language model of a case, which has no model."""

    depth, blocks = 23, 24

    def __init__(self, levels: Tensor, text: Tensor, parts: QueCCParts) -> None:
        self.levels, self.text_state, self.learned = levels, text, parts

    def tower_features(self, tokens: VisualTokens, blocks: Sequence[int]) -> Tensor:
        assert tuple(blocks) == (11, 15, 21, 22)
        return self.levels

    def question_state(self, tokens: VisualTokens) -> Tensor:
        return self.text_state


def check(case: GoldenCase) -> None:
    """The module's output, and the gradients of its three inputs."""
    settings = case.settings
    assert settings["kernel"] == settings["stride"]
    parts = QueCCParts(
        settings["width"],
        settings["multi_level_width"],
        settings["text_width"],
        settings["kernel"],
        settings["heads"],
    )
    norms = (module for module in parts.modules() if isinstance(module, torch.nn.LayerNorm))
    assert all(norm.eps == settings["layernorm_eps"] for norm in norms)
    parts.load_state_dict({name: case.take(f"w.{_official(name)}") for name in parts.state_dict()})
    features, levels, text = (
        case.take(name).clone().requires_grad_() for name in ("features", "multi_level_features", "text_vector")
    )
    side = settings["grid"]
    tokens = VisualTokens.from_features(features, grid=((1, side, side),) * len(features))
    method = QueCC(keep=1 / settings["kernel"] ** 2, heads=settings["heads"])
    left = method.project(tokens, lambda same: same, Model(levels, text[:, 0], parts))
    assert bool(left.valid.all()) and float(left.size.unique()) == settings["kernel"] ** 2
    case.compare("output", left.features)
    left.features.backward(case.take("grad_output"))
    for name, value in (("features", features), ("multi_level", levels), ("text", text)):
        assert value.grad is not None
        case.compare(f"grad_{name}", value.grad)
    case.settle()


def _official(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{NAMES[part]}.{rest}"
