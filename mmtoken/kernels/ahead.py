"""Every kernel compiled ahead of time for GPUs that are not there: registers, shared memory and spills.

The operations run on CPU tensors of real sizes, under a Triton driver that has no device: what is launched is compiled
by Triton for the target, and loaded and run by nobody. So exactly those variants are compiled that a GPU would get.

`python -m mmtoken.kernels.ahead --out benchmarks/kernels-compiled.json`; not with TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from mmtoken.errors import InputError
from mmtoken.kernels.cases import Case, Inputs, Operation, changed, made, operations

SCHEMA_VERSION = 1
CAPABILITIES = (80, 90)
"""A100 and H100."""
MAX_REGISTERS = 255
"""Of a thread: what the hardware has; a kernel that needs more spills."""
MAX_SHARED = 100 * 1024
"""Bytes of shared memory of a program: under the 163 KiB that sm_80 gives one block, and all of a GPU with sm_86."""
MAX_GRID = (2**31 - 1, 65535, 65535)
"""Programs along each axis of a grid."""
TOKENS = 2880
TOKENS_BACKWARD = 576
"""Fewer, for what a backward pass does in plain torch is really computed."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Compiled:
    """One variant of a kernel for one target.

    Attributes:
        operation, kernel: names.
        case: that launched it first, with its dtype.
        capability: 90 for sm_90.
        constants: compile-time arguments, block sizes among them.
        warps: of a program.
        registers: of a thread.
        stack_bytes: of a thread, spilled registers among them; 0 where everything fits.
        shared_bytes: of a program.
    """

    operation: str
    kernel: str
    case: str
    capability: int
    constants: dict[str, Any]
    warps: int
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0

    def faults(self) -> list[str]:
        """What keeps the variant from running well; nothing if it is all right."""
        what = f"{self.operation}: {self.kernel} ({self.case}) for sm_{self.capability}, {self.constants}"
        found = []
        if self.registers > MAX_REGISTERS:
            found.append(f"{what}: {self.registers} registers, more than {MAX_REGISTERS}.")
        if self.stack_bytes:
            found.append(f"{what}: registers spill to a stack of {self.stack_bytes} bytes.")
        if self.shared_bytes > MAX_SHARED:
            found.append(f"{what}: {self.shared_bytes} bytes of shared memory, more than {MAX_SHARED}.")
        return found


class Absent(DriverBase):  # type: ignore[misc]
    """A driver of a GPU that is not there: launches are compiled, and that is all.

    Args:
        capability: 90 for sm_90.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: list[Compiled] = []
        self.launched: set[str] = set()
        self.case = ("", "")
        self.kept: set[int] = set()
        self.utils = self  # Triton asks this for what it needs of the device

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise InputError("A kernel that tunes itself by timing cannot be compiled ahead of time; fix its block sizes.")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled variants are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**31}  # `faults` judges it

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        entry = self.compiled[-1]
        entry.registers, entry.stack_bytes = resources(binary)
        entry.shared_bytes = shared
        return name, name, entry.registers, entry.stack_bytes, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        constants = {names[place[0]]: value for place, value in source.constants.items()}
        self.compiled.append(
            Compiled(
                *(self.case[0], source.fn.__name__, self.case[1], self.capability),
                {
                    name: value if isinstance(value, int | float | bool | None) else str(value)
                    for name, value in constants.items()
                },
                metadata.num_warps,
            )
        )

        def launch(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            now = triton.runtime.driver.active  # compiled variants outlive the driver that they were compiled under
            now.launched.add(source.fn.__name__)
            if any(size < 1 or size > most for size, most in zip((x, y, z), MAX_GRID, strict=True)):
                raise InputError(
                    f"{source.fn.__name__}: a grid of {(x, y, z)} programs; at most {MAX_GRID}, at least 1."
                )
            # Whoever reads what the kernel would have written reads zeros.
            for value in rest:
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in now.kept:
                    value.zero_()

        return launch


def resources(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread, of a cubin with one kernel.

    Raises:
        InputError: Triton's cuobjdump says nothing of it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise InputError(f"{tool} did not say what a kernel needs: {(said.stdout + said.stderr).strip()!r}.")
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def sized(operation: Operation) -> Iterator[tuple[Case, str | None]]:
    """Every case with the name of one real size of it, None where it has none; real sizes that differ, all of them."""
    for case in operation.cases:
        yield from ((case, name) for name in case.real or (None,))


def compile_operation(
    operation: Operation, capability: int, tokens: int = TOKENS, backward: int = TOKENS_BACKWARD
) -> list[Compiled]:
    """Compile all that an operation launches, forward and backward, in its cases.

    Args:
        operation: one of mmtoken/kernels.
        capability: 90 for sm_90.
        tokens: N of the inputs.
        backward: N where the backward pass is run too, at the first real size of a case.

    Raises:
        InputError: kernels are interpreted, a grid is too large, or a kernel of its module was never launched.
    """
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET=1: interpreted kernels are not compiled; unset it.")
    driver = Absent(capability)
    triton.runtime.driver.set_active(driver)
    for case, size in sized(operation):
        for dtype in DTYPES:
            driver.case = (operation.name, f"{case.name}, {size or 'small'}, {str(dtype).removeprefix('torch.')}")
            first = size is None or size == next(iter(case.real))
            for n, differentiable in ((tokens, ()), *([(backward, case.differentiable)] if first else [])):
                inputs = changed(made(case, n, dtype, size=size), lambda x: x.requires_grad_(), differentiable)
                driver.kept = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
                _launch(operation, inputs)
    unused = sorted(set(kernels(operation)) - driver.launched)
    if unused:
        raise InputError(f"{operation.name}: no case launches {', '.join(unused)}; add one to its cases.")
    return driver.compiled


def kernels(operation: Operation) -> list[str]:
    """Names of the kernels of an operation's Triton module; functions that kernels call are none."""
    module = importlib.import_module(f"mmtoken.kernels.{operation.name}.triton")
    found = {
        name: x for name, x in vars(module).items() if isinstance(x, JITFunction) and x.__module__ == module.__name__
    }
    called = {
        name for name in found for other in found.values() if other.fn.__name__ != name and f"{name}(" in other.src
    }
    return sorted(set(found) - called)


def _launch(operation: Operation, inputs: Inputs) -> None:
    for operator, arguments in operation.operators(inputs):
        found = operator(*arguments)
        found = (found,) if isinstance(found, Tensor) else found
        roots = [x for x in found if x.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(x) for x in roots])


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, write JSON and print what is wrong; 1 if anything is."""
    known = operations()
    parser = argparse.ArgumentParser("python -m mmtoken.kernels.ahead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operation", choices=sorted(known), help="default: all of them")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="80 for sm_80; default: all of these")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the JSON")
    options = parser.parse_args(argv)
    targets = [options.capability] if options.capability else CAPABILITIES
    chosen = [known[options.operation]] if options.operation else list(known.values())
    rows = [row for op in chosen for capability in targets for row in compile_operation(op, capability)]
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "kernels-compiled",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "tokens": TOKENS,
        "limits": {"registers": MAX_REGISTERS, "shared_bytes": MAX_SHARED, "stack_bytes": 0},
        "results": [asdict(row) for row in rows],
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    faults = [fault for row in rows for fault in row.faults()]
    sys.stdout.write("".join(f"{fault}\n" for fault in faults) or f"{len(rows)} variants compiled, all within limits\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
