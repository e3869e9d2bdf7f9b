"""One of two processes that torchrun starts: its share of generation, and a training step of both.

`python -m torch.distributed.run --nproc-per-node=2 -m tests.ecosystem.rank FOLDER` writes what each process found.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mmtoken import compress
from mmtoken.compressors import FastV
from tests import oracle
from tests.backbones.tiny_models import build, inputs
from tests.ecosystem.test_placement import labelled, share


def step(*, before: bool) -> dict[str, Any]:
    """Loss and gradients of one step, attached to the model before DDP wraps it or to the wrapper."""
    model: Any = build("llava").train()
    batch = share(labelled(model), distributed.get_rank())
    if before:
        with compress(model, FastV(keep=0.4)):
            wrapper = DistributedDataParallel(model, find_unused_parameters=True)
            loss = wrapper(**batch, use_cache=False).loss
            loss.backward()
    else:
        wrapper = DistributedDataParallel(model, find_unused_parameters=True)
        with compress(wrapper, FastV(keep=0.4)):
            loss = wrapper(**batch, use_cache=False).loss
            loss.backward()
    used = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "grads": used}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = build("llava")
    batch = share(inputs(model, "llava", "image", "plain"), rank)
    with compress(model, FastV(keep=0.4)) as session:
        out = oracle.generate_with_logits(model, batch, max_new_tokens=3)
    found = {
        "sequences": out.sequences,
        "logits": out.logits,
        "kept": [kept.tolist() for kept in session.report.kept],
        "attached before": step(before=True),
        "attached after": step(before=False),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
