"""FastV's own rules; its numbers are held against the official code in tests/golden."""

from __future__ import annotations

import pytest
import torch

from mmtoken.compressors import FastV
from mmtoken.errors import UnsupportedError
from tests.compressors.batches import make


@pytest.mark.parametrize("layer", [1, 2, 7])
def test_the_cut_is_at_the_layer_and_its_score_from_the_layer_before(layer):
    method = FastV(layer=layer)
    assert method.cut_layers(8) == (layer,) and method.score_layers(8) == (layer - 1,)


@pytest.mark.parametrize("layer", [8, 9, 1000])
def test_a_layer_that_the_decoder_does_not_have_is_refused(layer):
    with pytest.raises(UnsupportedError, match=rf"layer={layer} but this decoder has 8 layers; choose from 1 to 7"):
        FastV(layer=layer).cut_layers(8)


def test_the_best_attended_tokens_of_each_item_are_kept_in_order():
    tokens, context = make([6, 4])
    context.received[:] = torch.tensor([[0.3, 0.1, 0.6, 0.2, 0.5, 0.4], [0.1, 0.4, 0.2, 0.3, torch.nan, torch.nan]])
    left = FastV(keep=0.5).llm_layer(tokens, 2, context)
    assert [kept.tolist() for kept in left.kept()] == [[2, 4, 5], [1, 3]]
    assert context.asked == ("text_attention",)


def test_defaults_are_the_papers():
    assert (FastV().keep, FastV().layer, FastV().positions) == (0.5, 2, "keep")
