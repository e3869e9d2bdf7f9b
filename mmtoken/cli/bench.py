"""`mmtoken bench`: speed, memory and accuracy of the dense model, the controls and chosen compressors, in one run.

Speed and memory come from a LLaVA-shaped model with random weights, accuracy from a trained model: two results, two
files, never one figure. Both hold the same line-up: the dense model first, the controls, then the compressors, each at
every budget. `--what multi-turn` asks the trained model second questions after tokens were chosen for the first one.
`mmtoken bench ops` times the scoring operations by themselves; it has its own --help.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmtoken.cli.parser import Parser, find_device, quiet, read_value
from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation import accuracy, documents, multi_turn, pictures, speed, tables
from mmtoken.evaluation.lineup import KEEPS, METHODS, line_up
from mmtoken.evaluation.timing import MIN_ROUNDS
from mmtoken.hub import load
from mmtoken.models.registry import ZOO
from mmtoken.wholefile import whole_file

DEFAULT_MODEL = "tiny-llava"


def _parser() -> Parser:
    parser = Parser("mmtoken bench", __doc__ or "")
    parser.add_argument(
        "--what",
        choices=("both", "speed", "accuracy", "multi-turn", "documents"),
        default="both",
        help="both is speed and accuracy; multi-turn asks second questions about pictures; documents compares "
        "TokenCorr's adaptive ratio on a model that reads pages; default: both",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="trained model for accuracy; default: %(default)s")
    parser.add_argument(
        "--compressors", default=",".join(METHODS), metavar="A,B", help="beside the controls; default: %(default)s"
    )
    parser.add_argument(
        "--keeps",
        default=",".join(f"{keep:g}" for keep in KEEPS),
        metavar="K,K",
        help="budgets: fractions (0.25, 1/3) or counts (64); default: %(default)s",
    )
    parser.add_argument(
        "--pictures", type=int, default=100, metavar="N", help="held-out pictures per benchmark; default: %(default)s"
    )
    parser.add_argument(
        "--rounds", type=int, default=MIN_ROUNDS, metavar="N", help="interleaved rounds of timing; default: %(default)s"
    )
    parser.add_argument(
        "--shape",
        choices=tuple(speed.SHAPES),
        default="default",
        help="of the random model that speed is measured on; 7b needs a GPU with 24 GB; default: %(default)s",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of that model; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")
    return parser


def main(argv: list[str]) -> int:
    """Run `mmtoken bench` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: an argument cannot be used.
    """
    if argv[:1] == ["ops"]:
        from mmtoken.cli import bench_ops

        return bench_ops.main(argv[1:])
    options = _parser().parse_args(argv)
    for field in ("pictures", "rounds"):
        if getattr(options, field) < 1:
            raise MMTokenError(f"{field}={getattr(options, field)}; give a whole number of at least 1.")
    device = find_device(options.device)
    if options.what == "documents":
        return _documents(options, device)
    entrants = line_up(_names(options.compressors), [read_value(text.strip()) for text in options.keeps.split(",")])
    if options.what in ("both", "accuracy"):
        pictures.check_matplotlib()
    if options.what != "speed":
        with quiet():
            model, processor = load(options.model)
    folder = _folder(options.out)
    written: list[Path] = []
    shown: list[str] = []
    if options.what in ("both", "speed"):
        results = speed.measure(
            entrants,
            shape=speed.SHAPES[options.shape],
            rounds=options.rounds,
            device=device,
            dtype=getattr(torch, options.dtype),
            progress=_progress,
        )
        written += [_write_json(results, folder / "speed.json")]
        written += [_write_text(tables.speed_report(results), folder / "speed.md")]
        shown += [table(results).text() for table in (tables.speed_table, tables.hooks_table, tables.targets_table)]
        shown += [f"WARNING: {line}" for line in tables.scoring_warnings(results)]
    if options.what == "multi-turn":
        model.to(device)
        results = multi_turn.multi_turn(
            model, processor, entrants, name=options.model, pictures=options.pictures, progress=_progress
        )
        stem = f"multi-turn-{Path(options.model).name}"
        written += [_write_json(results, folder / f"{stem}.json")]
        written += [_write_text(multi_turn.turns_report(results), folder / f"{stem}.md")]
        shown += [multi_turn.turns_table(results).text()]
    if options.what in ("both", "accuracy"):
        model.to(device)
        results = accuracy.evaluate(
            model,
            processor,
            entrants,
            name=options.model,
            benchmarks=_benchmarks(options.model),
            pictures=options.pictures,
            rounds=options.rounds,
            progress=_progress,
        )
        stem = f"accuracy-{Path(options.model).name}"
        written += [_write_json(results, folder / f"{stem}.json")]
        drawn = pictures.draw_all(results, folder, stem)
        written += [_write_text(tables.accuracy_report(results, [file.name for file in drawn]), folder / f"{stem}.md")]
        written += drawn
        shown += [table(results).text() for table in (tables.accuracy_table, tables.types_table)]
    sys.stdout.write("\n\n".join(shown) + "\n\n" + "".join(f"wrote {path}\n" for path in written))
    return 0


def _benchmarks(model: str) -> tuple[str, ...]:
    """What a model of the zoo was trained for; the first entry's benchmarks for any other model.

    Raises:
        MMTokenError: it answers no questions about single pictures.
    """
    found = next((entry for entry in ZOO if entry.name == model), ZOO[0])
    if not found.benchmarks:
        raise MMTokenError(
            f"model={model!r} answers no questions about single pictures; use: python -m {found.evaluation} "
            "--out FOLDER"
        )
    return found.benchmarks


def _documents(options: Any, device: Any) -> int:
    """TokenCorr on document pages: JSON, Markdown and pictures."""
    name = "tiny-document" if options.model == DEFAULT_MODEL else options.model
    pictures.check_matplotlib()
    with quiet():
        model, processor = load(name)
    model.to(device)
    written = documents.write(
        model,
        processor,
        _folder(options.out),
        name=name,
        pages=options.pictures,
        rounds=options.rounds,
        progress=_progress,
    )
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise MMTokenError(f"compressors={text!r} has an empty name; give names with commas between: visionzip,fastv.")
    return names


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(path)!r} is no folder and none can be made there: {error.strerror}.") from error
    return path


def _write_json(results: Mapping[str, Any], path: Path) -> Path:
    return _write_text(json.dumps(results, indent=1) + "\n", path)


def _write_text(text: str, path: Path) -> Path:
    with whole_file(path) as temporary:
        temporary.write_text(text)
    return path


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
