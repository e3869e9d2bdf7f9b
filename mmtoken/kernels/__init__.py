"""Scoring operations, each with a plain torch reference and Triton kernels.

One folder per operation:

- `__init__.py`: the public function, with `impl="auto"`.
- `reference.py`: plain torch, the specification. It tiles, so that its memory is linear in the number of tokens.
- `triton.py`: the kernels and the custom operator `mmtoken::<operation>`; imported only when it is chosen.
- `cases.py`: `OPERATION`, made-up inputs for the one generic test and the one generic benchmark.

`dispatch` decides which of the two runs and counts what ran.
"""

from __future__ import annotations
