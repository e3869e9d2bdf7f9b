"""The same compressor keeps the same tokens on a GPU as on the CPU, and the model answers the same."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import oracle
from tests.backbones.tiny_models import CASES
from tests.contract.matrix import COMPRESSORS, Cell, batch, compress, pairs, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pairs()
@pytest.mark.parametrize("case", CASES[-1:])
def test_a_gpu_keeps_what_the_cpu_keeps(name: str, cell: Cell, case: str) -> None:
    model, inputs, method = tiny(cell[0]), batch(cell, case), COMPRESSORS[name]
    with compress(model, method) as session:
        want = oracle.generate_with_logits(model, inputs, max_new_tokens=4)
    there = copy.deepcopy(model).cuda()
    with compress(there, method) as other:
        moved = {key: value.cuda() for key, value in inputs.items()}
        got = oracle.generate_with_logits(there, moved, max_new_tokens=4)
    assert [kept.tolist() for kept in other.report.kept] == [kept.tolist() for kept in session.report.kept]
    torch.testing.assert_close(got.logits.cpu(), want.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(got.sequences.cpu(), want.sequences)
