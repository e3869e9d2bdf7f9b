"""Set before anything imports triton, which reads it then: without a GPU, kernels are interpreted on the CPU.

Nothing else changes by it: `impl="auto"` never chooses Triton for CPU tensors.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
