"""`mmtoken bench ops`: the scoring operations, checked and then timed.

Every implementation of an operation is first held against its float32 reference; one that disagrees gets no figures,
and the command ends with 1. Writes kernels.json and kernels.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from mmtoken.cli.parser import Parser, find_device
from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation import op_speed
from mmtoken.wholefile import whole_file


def _parser() -> Parser:
    parser = Parser("mmtoken bench ops", __doc__ or "")
    parser.add_argument("--operations", default="", metavar="A,B", help="default: all of mmtoken/kernels")
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds, nothing compiled: some minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds of timing; default: 7, on GPUs 25")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")
    return parser


def main(argv: list[str]) -> int:
    """Run `mmtoken bench ops` with the arguments after these words; 1 if an operation failed its check.

    Raises:
        MMTokenError: an argument cannot be used.
    """
    options = _parser().parse_args(argv)
    device = find_device(options.device)
    limits = op_speed.QUICK if options.quick else op_speed.GPU if device.type == "cuda" else op_speed.CPU
    if options.rounds is not None:
        if options.rounds < 1:
            raise MMTokenError(f"rounds={options.rounds}; give a whole number of at least 1.")
        limits = dataclasses.replace(limits, rounds=options.rounds)
    names = [name.strip() for name in options.operations.split(",")] if options.operations else []
    op_speed.find(names)
    folder: Path = options.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(folder)!r} is no folder and none can be made there: {error.strerror}.") from error
    results = op_speed.measure(names, device=device, limits=limits, progress=_progress)
    for file, text in (
        ("kernels.json", json.dumps(results, indent=1) + "\n"),
        ("kernels.md", op_speed.report(results)),
    ):
        with whole_file(folder / file) as temporary:
            temporary.write_text(text)
    sys.stdout.write(f"{op_speed.speed_table(results).text()}\n\n")
    for name, said in results["failed"].items():
        sys.stdout.write("".join(f"FAILED {name}: {line}\n" for line in said))
    sys.stdout.write(f"wrote {folder / 'kernels.json'}\nwrote {folder / 'kernels.md'}\n")
    return bool(results["failed"])


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
