"""Calibrated attention: a merged token of size s weighs as much as s copies of its key and value.

The reference is the unmodified model on a longer sequence, in which every merged token stands s times at its position
and all copies see each other, so that they stay equal through all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mmtoken import MMTokenError, compress
from mmtoken.compressors import Compressor, Context, FastV, Knorm, Schedule, Sequential, VisionZip
from mmtoken.compressors.base import Positions
from mmtoken.compressors.registry import resolve
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.contract.matrix import assert_close, batch, dense_logits, logits, tiny

LENGTH, FIRST, LAST = 14, 3, 10  # a prompt, and where its seven visual tokens are
KEPT, SIZES = [0, 3, 5, 6], [3.0, 2.0, 1.0, 1.0]


@dataclass(frozen=True)
class Merges(Compressor):
    """Leaves four of seven tokens, made-up features in two of them, and says how many each stands for."""

    keep: int | float = 4
    positions: Positions = "keep"

    merges: ClassVar[bool] = True

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        rows = len(tokens)
        left = tokens.take(torch.tensor([KEPT]).expand(rows, -1))
        features = left.features.clone()
        features[:, 0], features[:, 1] = tokens.features[:, :3].mean(1), tokens.features[:, 3:5].mean(1)
        return left.replace(features=features, size=torch.tensor([SIZES]).expand(rows, -1))


IDS = torch.arange(LENGTH)[None] * 7 % 90 + 5
ANSWER = torch.tensor([[11, 42, 63]])
VISUAL = torch.zeros(1, LENGTH, dtype=torch.bool)
VISUAL[:, FIRST:LAST] = True


@torch.no_grad()
def in_steps(model: Any, method: Compressor, mode: Any = "drop") -> tuple[Tensor, Any]:
    """float[4, V]: logits of the prompt's last token and of three tokens fed one by one; the report."""
    with compress(model, method, visual=VISUAL, mode=mode) as session:
        out = model(input_ids=IDS, use_cache=True)
        rows, cache = [out.logits[0, -1]], out[oracle.CACHE]
        for step in range(3):
            out = model(input_ids=ANSWER[:, step : step + 1], use_cache=True, **{oracle.CACHE: cache})
            rows.append(out.logits[0, -1])
    return torch.stack(rows), session.report


@torch.no_grad()
def with_copies(model: Any, gone: dict[int, list[int]] | None = None) -> Tensor:
    """The same from the longer sequence, in one call; `gone`: per layer, kept tokens that it does not see."""
    embeds = model.get_input_embeddings()(torch.cat([IDS, ANSWER], 1))[0]
    merged = embeds.clone()
    merged[FIRST], merged[FIRST + 3] = embeds[FIRST : FIRST + 3].mean(0), embeds[FIRST + 3 : FIRST + 5].mean(0)
    sizes = dict(zip([FIRST + i for i in KEPT], map(int, SIZES), strict=True))
    places = [
        place
        for place in range(LENGTH + 3)
        if not (FIRST <= place < LAST and place not in sizes)
        for _ in range(sizes.get(place, 1))
    ]
    at = torch.tensor(places)
    mask = (at[:, None] >= at[None])[None, None]
    hidden = {
        layer: torch.tensor([[place - FIRST not in lost or place < FIRST for place in places]])
        for layer, lost in (gone or {}).items()
    }
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with oracle.masked_keys(model, hidden):
        out = model(inputs_embeds=merged[at][None], attention_mask=mask, position_ids=at[None], use_cache=False)
    return out.logits[0, -4:]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_a_merged_token_weighs_as_much_as_copies_of_it(attn: str, mode: Any) -> None:
    model = tiny("llama", attn)
    got, report = in_steps(model, Sequential(parts=(Merges(),), calibrate=True), mode)
    assert report.kept[0].tolist() == KEPT
    want = with_copies(model)
    assert_close(got, want)
    plain, _ = in_steps(model, Sequential(parts=(Merges(),)), mode)
    assert oracle.max_error(plain, want) > 1e-3  # or there would be nothing to calibrate


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_cuts_between_layers_take_the_copies_along(attn: str, mode: Any) -> None:
    model = tiny("llama", attn)
    got, report = in_steps(model, Sequential(parts=(Merges(), FastV(keep=2, layer=2)), calibrate=True), mode)
    lost = sorted({*KEPT} - {*report.kept[0].tolist()})
    assert len(lost) == 2
    assert_close(got, with_copies(model, {2: lost, 3: lost}))


def test_eviction_takes_weights_along() -> None:
    model = tiny("llama")
    dropped, report = in_steps(model, Sequential(parts=(Merges(), Knorm(keep=2)), calibrate=True))
    hidden, _ = in_steps(model, Sequential(parts=(Merges(), Knorm(keep=2)), calibrate=True), "mask")
    assert report.sites[-1].tokens_out == [2]
    assert_close(dropped, hidden)
    assert_close(dropped[0], with_copies(model)[0])
    assert oracle.max_error(dropped[1:], with_copies(model)[1:]) > 1e-3


def test_beams_and_padding_agree_with_mask_mode() -> None:
    for cell in (("llava", "image"), ("qwen3_vl", "image")):
        model, inputs = tiny(cell[0]), batch(cell, "padded_ragged")
        method = Schedule(keep=0.4, parts=(VisionZip(contextual=3), Knorm()), ratios=(2.0, 1.0), calibrate=True)
        results = []
        for mode in ("drop", "mask"):
            with compress(model, method, mode=mode):
                results.append(oracle.generate_with_logits(model, inputs, max_new_tokens=4, num_beams=2))
        assert torch.equal(results[0].sequences, results[1].sequences)
        assert_close(results[0].logits, results[1].logits)
        with compress(model, Schedule(keep=1.0, parts=(VisionZip(contextual=3), Knorm()), calibrate=True)):
            assert torch.equal(logits(model, inputs), dense_logits(cell, "padded_ragged"))


def test_the_setting_is_checked_and_survives_as_data() -> None:
    with pytest.raises(MMTokenError, match="calibrate='yes' is no bool"):
        Sequential(parts=(VisionZip(),), calibrate="yes")  # type: ignore[arg-type]
    method = Schedule(keep=0.4, parts=(VisionZip(),), calibrate=True)
    assert resolve(method.to_dict()) == method and method.calibrates()
    assert not Sequential(parts=(VisionZip(),)).calibrates() and not VisionZip().calibrates()
