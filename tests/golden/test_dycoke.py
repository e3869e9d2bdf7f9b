"""DyCoke's temporal stage against its official code: the operation that its site uses, and the site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtoken import VisualTokens
from mmtoken.compressors import DyCoke
from mmtoken.compressors.dycoke import changed_tokens
from tests.compressors.videos import VideoContext
from tests.golden.case import GoldenCase

METHOD = "dycoke"


@pytest.mark.golden
def test_dycoke_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def check(case: GoldenCase) -> None:
    """Rows that are left, in the official order, and where each comes from."""
    features, settings = case.take("input.features"), case.settings
    frames, places = settings["frames"], settings["tokens_per_frame"]
    keep = 1 - settings["merging_ratio"]
    index = changed_tokens(features.view(frames, places, -1), keep, "repo")
    case.compare("expected.output_tokens", features[index], "output")
    case.compare("expected.frame_of_output", index // places)
    case.compare("expected.token_of_output", index % places)
    assert int((index // places == 1).sum()) == settings["kept_per_reduced_frame"]
    tokens = VisualTokens.from_features(features[None], grid=((frames, 1, places),))
    left = DyCoke(keep=keep, variant="repo").llm_input(tokens, VideoContext())
    assert torch.equal(left.kept()[0], index.sort().values)
    case.settle()
