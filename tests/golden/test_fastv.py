"""FastV against its official code, through the hooks of a bare decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mmtoken import compress
from mmtoken.compressors import FastV
from tests.golden.case import GoldenCase
from tests.golden.models import llama

METHOD = "fastv"


@pytest.mark.golden
def test_fastv_gives_the_official_numbers(case_path: Path) -> None:
    check(GoldenCase.load(case_path))


@torch.no_grad()
def check(case: GoldenCase) -> None:
    """Scores, kept tokens, drop variant, mask variant and the uncompressed model."""
    model, embeds = llama(case), case.take("input.inputs_embeds")
    settings = case.settings
    places = torch.arange(embeds.shape[1])
    visual = (places >= settings["image_start"]) & (places < settings["image_start"] + settings["image_len"])
    method = FastV(keep=settings["keep_count"], layer=settings["K"])

    with compress(model, method, visual=visual[None]) as session:
        logits = model(inputs_embeds=embeds).logits[0]
        hidden = model.model(inputs_embeds=embeds).last_hidden_state[0]
        report = session.reports[0]
    (site,) = report.sites
    assert site.scores is not None
    case.compare("expected.image_score", site.scores[0], "scores")
    case.compare("expected.kept_image", report.kept[0])
    left = ~visual
    left[report.places[0][report.kept[0]]] = True
    kept = places[left]
    case.compare("expected.kept_sequence_indices", kept)
    case.compare("expected.drop.logits", logits[kept], "logits")
    case.compare("expected.drop.last_hidden_state", hidden[kept], "logits")

    with compress(model, method, visual=visual[None], mode="mask"):
        masked = model(inputs_embeds=embeds).logits[0]
    # The product answers for the tokens that are left; what the official mask variant computes at the others means
    # nothing, but it is in the file, so it is held against the plain model under the product's choice.
    official = official_mask_variant(case, embeds, left, settings["K"])
    case.compare("expected.mask.logits", torch.where(left[:, None], masked, official), "logits")

    with compress(model, FastV(keep=1.0, layer=settings["K"]), visual=visual[None]):
        case.compare("expected.dense.logits", model(inputs_embeds=embeds).logits[0], "logits")
    case.settle()


def official_mask_variant(case: GoldenCase, embeds: Tensor, left: Tensor, first: int) -> Tensor:
    """float[L, V]: from layer `first` on nobody sees the tokens that are gone, not even they themselves.

    A large negative number for the future and another one for what is gone are added up, as the official code does.
    """
    model: LlamaForCausalLM = llama(case, attention="eager")
    lowest = torch.finfo(embeds.dtype).min
    mask = torch.full((len(left), len(left)), lowest).triu(1) + torch.where(left, 0.0, lowest)

    def hide(layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "attention_mask": mask[None, None]}

    for layer in model.model.layers[first:]:
        layer.register_forward_pre_hook(hide, with_kwargs=True)
    return model(inputs_embeds=embeds).logits[0]
