"""QuoTA's sampler, budget and assigners against its official code: the operations that its site uses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from mmtoken import VisualTokens
from mmtoken.compressors import Context, QuoTA
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
        check_site(case, assigner, frames, newline)
        if assigner == "linspace" and case.expects("linspace_index"):
            case.compare("linspace_index", torch.cat([linspace_places(side * side, counts[n]) for n in left]))
    case.settle()


class Patches(Context):
    """A model that pools nothing."""

    def __init__(self, patches: Tensor) -> None:
        self.patches = patches

    def unpooled(self, tokens: VisualTokens) -> list[Tensor | None]:
        return [self.patches]


def check_site(case: GoldenCase, assigner: Assigner, frames: Tensor, newline: Tensor) -> None:
    """The same numbers from the compressor, on frames with and without newline tokens.

    Only where the case's budget fits into the frames' own tokens, and its cap is the one of the frames' tokens.
    """
    settings = case.settings
    budget, (count, side) = settings["budget"], frames.shape[:2]
    capped = assigner == "bilinear" or math.isclose(settings["cap"], side * side / budget)
    if budget > count * side * side or not capped:
        return
    scores = {"name": "given", "scores": case.take("frame_probability").tolist()}
    method = QuoTA(keep=1.0, most=budget, assigner=assigner, power=settings["emphasis_power"], scorer=scores)
    grid = ((count, side, side),)
    plain = VisualTokens.from_features(frames.reshape(1, -1, frames.shape[-1]), grid=grid)
    left = method.llm_input(plain, Patches(frames))
    case.compare(f"{assigner}_tokens", left.features[0])
    assert left.item.unique().tolist() == case.tensors[f"{assigner}_frame_id"].tolist()
    sequence = f"{assigner}_sequence_with_newline"
    lines = torch.cat([frames, newline.expand(count, side, 1, -1)], 2)
    if case.expects(sequence) and case.shape(sequence)[0] <= lines.shape[:3].numel():
        protected = torch.arange(lines.shape[:3].numel()) % (side + 1) == side
        rows = VisualTokens.from_features(lines.reshape(1, -1, lines.shape[-1]), protected=protected[None], grid=grid)
        case.compare(sequence, method.llm_input(rows, Patches(frames)).features[0])
