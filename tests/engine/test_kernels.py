"""The report names the implementation of every operation that ran for its prefill, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmtoken import compress
from mmtoken.compressors import FastV, Random, Sequential, SnapKV, VisionZip, VLAPruner
from mmtoken.compressors.base import Compressor
from mmtoken.kernels.attention_rows import attention_rows
from mmtoken.kernels.dispatch import using
from tests.backbones.tiny_models import inputs
from tests.engine.agreement import tiny

ROWS = {"attention_rows": "torch"}


def prefill(model: nn.Module, batch: dict[str, Any], compressor: Compressor, impl: Any = "auto") -> Any:
    with compress(model, compressor) as session, using(impl), torch.no_grad():
        model(**batch)
    return session.report


@pytest.mark.parametrize(
    ("compressor", "wanted"),
    [
        (FastV(keep=0.5, layer=1), ROWS),
        (SnapKV(keep=0.5, window=2), ROWS),
        (Random(keep=0.5), {}),
        (Sequential([Random(keep=0.5), FastV(keep=0.5, layer=1)]), ROWS),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_report_names_what_ran(compressor: Compressor, wanted: dict[str, str]) -> None:
    model = tiny("llava", "sdpa")
    batch = inputs(model, "llava", "image", "padded_ragged")
    report = prefill(model, batch, compressor)
    assert report.kernels == wanted == report.to_dict()["kernels"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("compressor", [FastV(keep=0.5, layer=1), VisionZip(keep=0.5)], ids=lambda x: type(x).__name__)
def test_interpreted_kernels_keep_the_same_tokens(family: str, compressor: Compressor) -> None:
    model = tiny(family, "sdpa")
    batch = inputs(model, family, "image", "padded_ragged")
    torch_report, triton_report = (prefill(model, batch, compressor, impl) for impl in ("torch", "triton"))
    assert torch_report.kernels["attention_rows"] == "torch"
    assert set(triton_report.kernels.values()) == {"triton"}
    for ours, wanted in zip(triton_report.kept, torch_report.kept, strict=True):
        assert torch.equal(ours, wanted)


def test_what_ran_outside_a_prefill_is_not_in_its_report() -> None:
    """Operations of the caller and of decoding steps are not; those of the encoder are, whenever it ran."""
    model = tiny("llava", "sdpa")
    batch = inputs(model, "llava", "image", "padded_ragged")
    x = torch.zeros(1, 1, 1, 1)
    with compress(model, Random(keep=0.5)) as session, torch.no_grad():
        for _ in range(2):
            attention_rows(x, x)
            model(**batch)
            assert session.report.kernels == {}
    with compress(model, VLAPruner(keep=0.5, layer=1)) as session, using("torch"):
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        first = dict(session.report.kernels)
        with using("triton"):
            attention_rows(x, x)
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert set(session.report.kernels.values()) == set(first.values()) == {"torch"}


def test_a_bare_tower_s_report_names_them_too() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=24, patch_size=6)).eval()
    attention_rows(*[torch.zeros(1, 1, 1, 1)] * 2)
    with compress(tower, VisionZip(keep=0.5)) as session, torch.no_grad():
        for impl in ("triton", "torch"):
            with using(impl):  # type: ignore[arg-type]
                tower(torch.randn(1, 3, 24, 24))
            assert session.report.kernels["attention_rows"] == impl
