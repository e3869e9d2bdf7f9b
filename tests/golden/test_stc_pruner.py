"""STC-Pruner against its official code: scores, choices and outputs of every chunk, and the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmtoken.compressors import STCPruner
from mmtoken.compressors.stcpruner import History, lowest, with_newlines
from mmtoken.tokens import kept_count
from tests.compressors.videos import VideoContext, video
from tests.golden.case import GoldenCase

METHOD = "stc_pruner"


@pytest.mark.golden
def test_stc_pruner_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def check(case: GoldenCase) -> None:
    """Chunk after chunk with one memory; indices in the official order, newlines behind a frame's kept tokens."""
    settings = case.settings
    keep, area, chunks = settings["keep_per_frame"], settings["tokens_per_frame"], settings["frames_per_chunk"]
    method = STCPruner(
        keep=keep, score=settings["form"], channel_ratio=settings["channel_keep_ratio"], chunk_frames=max(chunks)
    )
    layout = re.fullmatch(r"grid_(\d+)x(\d+)", settings["layout"])
    rows, columns = map(int, layout.groups()) if layout else (1, area)
    history, context = History(), VideoContext()
    for number, frames in enumerate(chunks):
        features = case.take(f"chunk{number}_features").view(frames, area, -1)
        scores = method.read(list(features), history)
        history = scores.history
        case.compare(f"chunk{number}_channels_rising_variance", scores.channels)
        case.compare(f"chunk{number}_frame_score", torch.stack(scores.frame))
        case.compare(f"chunk{number}_memory_score", torch.stack(scores.memory))
        case.compare(f"chunk{number}_total_score", torch.stack(scores.total))
        kept = [lowest(total, kept_count(keep, area)) for total in scores.total]
        if layout:
            raw, step = case.take(f"chunk{number}_raw_with_newline"), rows * (columns + 1)
            kept = [with_newlines(index, rows, columns, "append") for index in kept]
        else:
            raw, step = features.flatten(0, 1), area
        index = torch.cat([first * step + frame for first, frame in enumerate(kept)])
        case.compare(f"chunk{number}_kept_index", index)
        case.compare(f"chunk{number}_output", raw[index])
        # The file's newline tensor is filled with numbers of its own, so the site is given the scored tokens.
        left = method.llm_input(video(features, rows, "rows" if layout else "none"), context)
        assert torch.equal(left.source[0, left.valid[0]], index.sort().values)
    case.settle()
