"""TCA against the official code: a block of a tower through the hooks, and the reservoir that corrects logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

from mmtoken import compress
from mmtoken.classify.tca import Correction, Reservoir
from mmtoken.compressors import TCA
from mmtoken.compressors.tca import CENTRES, condense, split_by_rate
from mmtoken.engine.class_states import class_states
from tests.golden.case import GoldenCase

METHOD = "tca"


@pytest.mark.golden
def test_tca_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


def check(case: GoldenCase) -> None:
    check_block(case)
    check_stream(case)
    case.settle({"stream_features": "the reservoir compares states of CLS, never the final features"})


def check_block(case: GoldenCase) -> None:
    """One block in which tokens are condensed, image by image, since each has a first centre of its own."""
    settings = case.settings
    assert settings["clusters"] == CENTRES
    tokens, first = case.take("tokens"), case.take("first_centre")
    bank = case.take("anchor_bank") if settings["with_anchor"] else None
    weights = {name.removeprefix("w."): case.take(name) for name in case.tensors if name.startswith("w.")}
    rows = [condensed_block(tokens[:, row], weights, settings, int(first[row]), bank) for row in range(tokens.shape[1])]
    kept, outputs = zip(*rows, strict=True)
    case.compare("kept_index", torch.stack(kept))
    case.compare("output", torch.stack(outputs, 1))


@torch.no_grad()
def condensed_block(
    tokens: Tensor, weights: dict[str, Tensor], settings: dict[str, int], first: int, bank: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(int[k] patches that stay, float[M, D] output) in the order of the official code.

    Args:
        tokens: float[N, D], what enters the block.
        weights: of the block, by open_clip's names.
        settings: of the case.
        first: the first centre.
        bank: float[C, D], anchors that may enter.
    """
    patches, width = len(tokens) - 1, tokens.shape[1]
    tower = VisionTransformer(
        image_size=(patches, 1),
        patch_size=1,
        width=width,
        layers=1,
        heads=settings["heads"],
        mlp_ratio=len(weights["mlp.c_fc.bias"]) / width,
        act_layer=QuickGELU,
        no_ln_pre=True,
    ).eval()
    block = tower.transformer.resblocks[0]
    block.load_state_dict(weights)
    # A tower whose embeddings are these tokens, whatever the image.
    tower.conv1.weight.zero_()
    tower.class_embedding.zero_()
    tower.positional_embedding.copy_(tokens)
    before: list[Tensor] = []
    block.ln_2.register_forward_pre_hook(lambda _, args: before.append(args[0].clone()))
    method = TCA(drop=settings["drop_rate"], layers=(0,), variant="repo", first=first)
    memory = {} if bank is None else {"anchors": {0: bank}}
    with compress(tower, method) as session, session.remembering(memory), class_states(tower) as cls:
        tower(torch.zeros(1, 3, patches, 1))
    report = session.report
    assert report.tokens is not None and report.sites[0].scores is not None
    order = report.sites[0].scores[0].argsort(descending=True, stable=True)
    split = split_by_rate(patches, settings["drop_rate"])
    middle = order[split.stay : split.stay + split.condensed]
    # The official code puts out what stays by falling attention, the clusters as centres were found, and the sum.
    centres = middle[condense(before[0][0, 1:][middle], CENTRES, first)[0]]
    rest = order[split.stay + split.condensed :]
    places = torch.cat([order[: split.stay], centres, rest[:1]])
    left = {int(source): number for number, source in enumerate(report.tokens.source[0])}
    features = report.tokens.features[0, [left[int(place)] for place in places]]
    return order[: split.stay], torch.cat([cls[0], features])


def check_stream(case: GoldenCase) -> None:
    """A reservoir that images arrive at one by one."""
    settings = case.settings
    reservoir = Reservoir(
        settings["classes"],
        Correction(
            size=settings["reservoir_size"],
            scale=settings["scale"],
            strength=settings["lam"],
            sharpness=settings["beta"],
        ),
    )
    logits, sizes = [], []
    arriving = (case.take(f"stream_{name}") for name in ("logits", "pred", "entropy", "layer_cls"))
    for plain, label, entropy, states in zip(*arriving, strict=True):
        reservoir.add(int(label), float(entropy), states)
        logits.append(plain + reservoir.correction(states))
        sizes.append([len(images) for images in reservoir.held])
    case.compare("stream_reservoir_sizes", torch.tensor(sizes))
    case.compare("stream_final_logits", torch.stack(logits))
