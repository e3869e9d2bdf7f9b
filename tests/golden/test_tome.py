"""ToMe's matching and merging against the official code: the operations that its site uses."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtoken.compressors.tome import Matching, bipartite_soft_matching, merge_weighted
from tests.golden.case import GoldenCase

METHOD = "tome"


@pytest.mark.golden
def test_tome_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def check(case: GoldenCase) -> None:
    """Rounds of merging, each on the output of the one before with a metric of its own."""
    settings = case.settings
    x = case.take("input.x")
    rows, tokens = x.shape[:2]
    size = torch.ones(rows, tokens, 1)
    source = torch.eye(tokens).expand(rows, -1, -1)
    for number in itertools.count():
        name, metric = f"expected.round{number}.", f"input.round{number}.metric"
        if not case.expects(metric):
            break
        matching = bipartite_soft_matching(
            case.take(metric),
            settings["r_later" if number else "r_round0"],
            class_token=settings["class_token"],
            distill_token=settings["distill_token"],
        )
        case.compare(name + "unmerged_idx", matching.unmerged)
        case.compare(name + "src_idx", matching.source)
        case.compare(name + "dst_idx", matching.destination)
        if case.expects(name + "x_mean"):
            case.compare(name + "x_mean", matching.merge(x, "mean"), "values")
        x, size = merge_weighted(matching, x, size)
        source = matching.merge(source)
        case.compare(name + "x_wavg", x, "values")
        case.compare(name + "size", size, "values")
        case.compare(name + "x_unmerged_back", unmerge_as_official(matching, x), "values")
    case.compare("expected.source", source, "values")
    case.settle()


def unmerge_as_official(matching: Matching, merged: Tensor) -> Tensor:
    """`Matching.unmerge`, fed as the official one feeds itself.

    With a distillation token the official merge puts the first odd token second, and its unmerge does not take that
    back: it reads the tokens as unmerged even ones, then odd ones. The product's `unmerge` inverts its `merge`.
    """
    if not matching.distill_token:
        return matching.unmerge(merged)
    stay = matching.unmerged.shape[1]
    even, odd = merged[:, :stay], merged[:, stay:]
    return matching.unmerge(torch.cat([even[:, :1], odd[:, :1], even[:, 1:], odd[:, 1:]], 1))
