"""QuoTA's sampler, budget and assigners against its official code: the operations that its site uses."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from mmtoken.compressors.framebudget import (
    ON_GRID,
    Assigner,
    assign_tokens,
    capped_shares,
    frame_budgets,
    frame_shares,
    linspace_places,
    sampled_count,
    sampled_frames,
)
from mmtoken.compressors.quota import with_newlines
from tests.golden.case import GoldenCase

METHOD = "quota"


@pytest.mark.golden
def test_quota_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def check(case: GoldenCase) -> None:
    """Frames that are sampled, shares and budgets, and every assigner that the file holds."""
    settings = case.settings
    sampler, budget, side = settings["sampler"], settings["budget"], settings["side"]
    count = sampled_count(sampler["duration_s"], sampler["base"], sampler["alpha"])
    case.compare("sampled_frame_count", torch.tensor(count))
    case.compare("sampled_frame_index", sampled_frames(sampler["video_frames"], count))
    shares = frame_shares(case.take("frame_probability"), settings["emphasis_power"])
    capped = capped_shares(shares, settings["cap"])
    case.compare("emphasised_weight", shares)
    case.compare("capped_weight", capped)
    free, bound = frame_budgets(shares, budget), frame_budgets(capped, budget)
    case.compare("tokens_uncapped", torch.tensor(free))
    case.compare("tokens_capped", torch.tensor(bound))
    frames = case.take("features").unflatten(1, (side, side))
    newline = case.take("newline")
    for assigner in get_args(Assigner):
        if not case.expects(f"{assigner}_tokens"):
            continue
        counts = free if assigner == "bilinear" else bound
        left = [number for number, tokens in enumerate(counts) if tokens]
        parts = [assign_tokens(frames[number], counts[number], assigner) for number in left]
        case.compare(f"{assigner}_frame_id", torch.tensor(left))
        shapes = [part.shape[:2] if assigner in ON_GRID else (len(part), 1) for part in parts]
        case.compare(f"{assigner}_shape_per_frame", torch.tensor(shapes))
        case.compare(f"{assigner}_tokens", torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
        if case.expects(f"{assigner}_sequence_with_newline"):
            lines = [with_newlines(part, newline, len(part))[0] for part in parts]
            case.compare(f"{assigner}_sequence_with_newline", torch.cat(lines))
        if assigner == "linspace" and case.expects("linspace_index"):
            case.compare("linspace_index", torch.cat([linspace_places(side * side, counts[n]) for n in left]))
    case.settle()
