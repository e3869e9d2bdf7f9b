"""mmtoken beside a peer: the same tiny model, prompts and budget through both, each in its own environment.

`python -m mmtoken.evaluation.peers --peer kvpress --out benchmarks/peers.json --page docs/peers.md` makes the peer's
environment with pip where there is none yet, runs both sides in turns, holds their outputs against plain formulas, and
writes results and page; for a peer that has no release with what is compared, `--source` names a clone of it. What a
side refuses, or crashes on, is recorded with its own words.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmtoken
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.peer_formulas import DENSE, Reference
from mmtoken.evaluation.peer_subjects import PEERS, Methods, Subject
from mmtoken.evaluation.tables import Table
from mmtoken.evaluation.timing import Summary, environment, paired
from mmtoken.wholefile import check_target, whole_file

SCHEMA_VERSION = 1
OURS = "mmtoken"
SIDE = Path(__file__).with_name("peer_side.py")

TIMED = ("row 0", "padded")
BATCHES = {"alone": "batch 1", "even": "batch 4, no padding", "padded": "batch 4, padded"}


# ------------------------------------------------------------------------------------------------------------ running


def write_task(folder: Path, task: Mapping[str, Any], rows: Sequence[int], subject: Subject, seed: int = 0) -> None:
    """The model, the inputs and task.json in `folder`; no global generator is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = subject.model(), subject.inputs(rows)
    subject.save(model, folder / "model")
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "task.json").write_text(json.dumps(task))


def beyond_range(python: Path, folder: Path, transformers: str, source: Path | None = None) -> dict[str, Any]:
    """Whether the task's library runs one prompt with another version of transformers, which pip lays over its own.

    Args:
        python: the library's interpreter.
        folder: of the task.
        transformers: the version.
        source: checkout of the library, if it is not installed.
    """
    overlay = folder / "overlay"
    _pip(python, "--target", str(overlay), f"transformers=={transformers}")
    changes = {"compare": True, "probes": ["one prompt"], "equality": False, "timed": [], "rounds": 0}
    try:
        found, _ = run_side(python, folder, overlay, *([] if source is None else [source]), **changes)
    except MMTokenError as error:
        return {"transformers": transformers, "found": {"error": str(error)}}
    return {"transformers": found["versions"]["transformers"], "found": found["probes"]["one prompt"]}


def make_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """A virtual environment in `folder` with `requirements`, by plain pip; one that is there is used as it is.

    Returns:
        Its interpreter.

    Raises:
        MMTokenError: pip failed.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists():
        return python
    venv.create(folder, with_pip=True)
    _pip(python, *requirements)
    return python


def _pip(python: Path, *what: str) -> None:
    done = subprocess.run([python, "-m", "pip", "install", "-q", *what], capture_output=True, text=True)
    if done.returncode:
        raise MMTokenError(
            f"pip install {' '.join(what)} failed in the environment of {str(python)!r}; remove that environment and "
            f"try again. It said: {done.stderr[-600:]}"
        )


def run_side(python: Path, folder: Path, *first: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Let one side do the task in `folder` with `changes` to it; packages in the folders `first` go before others.

    Returns:
        What it found, and its tensors.

    Raises:
        MMTokenError: its script failed as a whole.
    """
    task = {**json.loads((folder / "task.json").read_text()), **changes}
    (folder / "task.json").write_text(json.dumps(task))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    paths = [Path(mmtoken.__file__).parents[1]] if task["library"] == OURS else [path.absolute() for path in first]
    variables["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run([python, "-P", SIDE, folder], capture_output=True, text=True, env=variables)
    if done.returncode:
        raise MMTokenError(f"library={task['library']!r}: its run failed. It said: {done.stderr[-600:]}")
    return json.loads((folder / "found.json").read_text()), load_file(folder / "found.safetensors")


def measure(
    peer: str,
    python: Path,
    *,
    turns: int = 4,
    rounds: int = 2,
    subject: Subject,
    methods: Methods,
    rows: Sequence[int],
    keep: float,
    probes: Sequence[str],
    requirements: Sequence[str] = (),
    distributions: Sequence[str] = (),
    source: Path | None = None,
    commit: str = "",
    own: bool = False,
    beyond: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run both sides in turns and compare.

    Args:
        peer: name of the other library.
        python: interpreter that has it.
        turns: how often each side is started, one after the other.
        rounds: measured rounds per start, after one that is thrown away.
        subject: the model and its formulas.
        methods: name -> settings, of what is compared.
        rows: lengths of the prompts.
        keep: share that stays.
        probes: further cases.
        requirements: what its environment was made of.
        distributions: whose versions the peer's side tells.
        source: checkout of the peer, where it is not installed.
        commit: what this checkout is.
        own: the peer's formulas differ from the published ones; it is held against both.
        beyond: another version of transformers that the peer is tried on.
        progress: told about every turn.

    Returns:
        JSON-ready results.
    """
    load = [round(os.getloadavg()[0], 2)]
    task: dict[str, Any] = {
        "library": OURS, "methods": dict(methods), "keep": keep, "new_tokens": 8, "timed_tokens": 16,
        "equality": True, "timed": list(TIMED), "probes": list(probes), "rounds": rounds, "distributions": [],
    }  # fmt: skip
    checkout = [] if source is None else [source]
    sides = {OURS: (Path(sys.executable), [], []), peer: (python, checkout, list(distributions))}
    found: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, task, rows, subject)
        for turn in range(turns):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                interpreter, first, told = sides[side]
                more, values = run_side(
                    interpreter, folder, *first, library=side, distributions=told, compare=turn == 0
                )
                if turn == 0:
                    found[side], tensors[side] = more, values
                else:
                    found[side]["seconds"] += more["seconds"]
            progress(f"peers: turn {turn + 1} of {turns}")
        outside = None if beyond is None else beyond_range(python, folder, beyond, source)
        model = type(subject.model()).from_pretrained(folder / "model").eval()
        inputs = load_file(folder / "inputs.safetensors")

    def formulas(own: bool) -> dict[str, dict[str, list[Reference]]]:
        return {
            name: {
                what: [
                    subject.reference(model, inputs, row, length, (name, settings), keep, task["new_tokens"], own)
                    for row, length in enumerate(lengths)
                ]
                for what, lengths in (("rows", rows), ("even", [min(rows)] * len(rows)))
            }
            for name, settings in {DENSE: {}, **methods}.items()
        }

    wanted = formulas(own=False)
    theirs = formulas(own=True) if own else {}

    def compared(side: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: equality(name, wanted[name], wanted[DENSE], tensors[side], found[side]["errors"], subject.first_read)
            for name in methods
        }

    load.append(round(os.getloadavg()[0], 2))
    where = environment(torch.device("cpu"))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "peers",
        "peer": peer,
        "requirements": list(requirements),
        "beyond": outside,
        "commit": commit,
        "weights": "random and tiny; says nothing about accuracy",
        "environment": {name: where[name] for name in ("device", "clock", "platform")},
        "load_average": load,
        "size": asdict(subject),  # type: ignore[call-overload]
        "rows": list(rows),
        "keep": task["keep"],
        "new_tokens": task["new_tokens"],
        "methods": dict(methods),
        "turns": turns,
        "rounds": turns * rounds,
        "sides": {
            side: {
                "versions": found[side]["versions"],
                "python": found[side]["python"],
                "equality": compared(side, wanted),
                "own": compared(side, theirs) if theirs and side == peer else {},
                "probes": found[side]["probes"],
                "cost": cost(found[side]),
            }
            for side in sides
        },
    }


# ---------------------------------------------------------------------------------------------------------- comparing


def equality(
    name: str,
    wanted: Mapping[str, Sequence[Reference]],
    dense: Mapping[str, Sequence[Reference]],
    tensors: Mapping[str, Tensor],
    errors: Mapping[str, Mapping[str, str]],
    first: int = 1,
) -> dict[str, Any]:
    """How the outputs of one side with one method compare with the formula.

    Args:
        name: of the method.
        wanted: what the formula gives, for the "rows" and for those cut to one length ("even").
        dense: what the unmodified model gives: how much there is to get wrong.
        tensors, errors: what the side found.
        first: the first token whose logits read what was kept.

    Returns:
        For each of `BATCHES`: rows, rows whose tokens are equal, the largest difference of the logits that first read
        what was kept; or the error. "kept": cached entries that are the formula's. "dense": the largest such
        difference between the formula and the unmodified model.
    """
    alone = [f"row {number}" for number in range(len(wanted["rows"]))]
    result: dict[str, Any] = {"dense": _apart(wanted["rows"], [row.logits for row in dense["rows"]], first)}
    failed = errors.get(name, {})
    for what, names in (("alone", alone), ("even", ["even"]), ("padded", ["padded"])):
        broken = [failed[batch] for batch in names if batch in failed]
        if broken:
            result[what] = {"error": broken[0]}
            continue
        rows = wanted["even" if what == "even" else "rows"]
        logits = [row for batch in names for row in tensors[f"{name}.{batch}.logits"]]
        tokens = [row for batch in names for row in tensors[f"{name}.{batch}.tokens"]]
        same = sum(torch.equal(got, row.tokens) for got, row in zip(tokens, rows, strict=True))
        result[what] = {"rows": len(rows), "rows_equal": same, "logits": _apart(rows, logits, first)}
    if "error" not in result["alone"]:
        pairs = [(tensors[f"{name}.{batch}.kept"], row.kept) for batch, row in zip(alone, wanted["rows"], strict=True)]
        result["kept"] = {
            "equal": sum(_shared(got, want) for got, want in pairs),
            "of": sum(want.numel() for _, want in pairs),
        }
    return result


def _apart(wanted: Sequence[Reference], logits: Sequence[Tensor], token: int) -> float:
    """Largest difference of the logits of one generated token."""
    return max(float((got[token] - want.logits[token]).abs().max()) for got, want in zip(logits, wanted, strict=True))


def _shared(got: Tensor, want: Tensor) -> int:
    """Entries that both have, over layers and heads, of int[layers, G, K]."""
    heads = zip(got.flatten(0, 1).tolist(), want.flatten(0, 1).tolist(), strict=True)
    return sum(len(set(one) & set(other)) for one, other in heads)


def cost(found: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and bytes per batch and method; the ratio to the dense model is taken within a round."""
    result: dict[str, Any] = {}
    for batch, sizes in found["bytes"].items():
        series: dict[str, list[dict[str, Any]]] = {
            name: [seconds[batch][name] for seconds in found["seconds"]] for name in sizes
        }
        result[batch] = {}
        for name, size in sizes.items():
            broken = [one["error"] for one in (size, *series[name]) if "error" in one]
            if broken:
                result[batch][name] = {"error": broken[0]}
                continue
            row: dict[str, Any] = {"bytes": size}
            for stage in ("first_token", "each_further_token"):
                mine, dense = ([one[stage] for one in series[which]] for which in (name, DENSE))
                row[stage] = {
                    "milliseconds": Summary.of(mine).to_dict(1e3),
                    "of_dense": Summary.of(paired(mine, dense)).to_dict(),
                }
            result[batch][name] = row
    return result


# ------------------------------------------------------------------------------------------------------------ writing


def page(results: Mapping[str, Any]) -> str:
    """The Markdown of a peer's page, from the results file alone."""
    peer = results["peer"]
    about, where = PEERS[peer], results["environment"]
    title = about.title
    sides: dict[str, Any] = results["sides"]
    own = {f"{peer}, its own": {"equality": sides[peer]["own"]}} if sides[peer].get("own") else {}
    versions = "; ".join(
        f"{side}: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f", Python {found['python']}"
        for side, found in sides.items()
    )  # fmt: skip
    return (
        f"# Beside {title}\n\n"
        f"What mmtoken and {title} give for the same model, prompts and budget. Written by\n\n"
        f"```bash\n{_command(peer)}\n```\n\n"
        f"which makes an environment for {title} with `pip install {' '.join(results['requirements'])}` in "
        f"`.peers/{peer}`, if there is none, and runs the sides in turns, each in a process of its own. "
        + (
            f"No release of {title} has what is compared, so CHECKOUT is a clone of {about.source}; here: "
            f"{results['commit']}. "
            if about.source
            else ""
        )
        + f"{title} declares transformers {about.accepts}; mmtoken at least 5.17: no environment has both. "
        f"Outside its range, on {results['beyond']['transformers']}: {_words(results['beyond']['found'])}.\n\n"
        f"{about.subject.describe()} Prompts of {', '.join(map(str, results['rows']))} tokens; "
        f"int({results['keep']:g} n) {about.kept}. Settings: "
        + "; ".join(
            f"{name} {', '.join(f'{key} {value}' for key, value in settings.items())}".strip()
            for name, settings in results["methods"].items()
            if settings
        )
        + f". Nothing here says anything about accuracy.\n\n{versions}. {where['device']} ({where['clock']}), load "
        f"average {' to '.join(map(str, results['load_average']))}.\n\n"
        f"{summary_table({**sides, **own}).markdown()}\n\n"
        "Rows of all methods; costs as shares of the dense model's on the same side, least to most over methods.\n\n"
        "## Output\n\n"
        "Both sides against the formula, written a second time in plain loops "
        f"(`mmtoken/evaluation/{about.formulas}`). Kept: {about.counted}. "
        f"For each batch, the largest difference of logits at the first token that depends on "
        f"what was kept, and the rows whose {results['new_tokens']} greedy tokens are the formula's; last, how far "
        "the logits of the uncompressed model are from the formula. Batch 1: each prompt alone. Batch 4: all of them "
        "through `generate()`, cut to the shortest, or padded on the left with their attention mask; every row is held "
        "against the formula on this prompt alone.\n\n"
        + (
            f'{title} departs from the published code. "{peer}, its own": the same outputs, held against '
            f"formulas as its source has them. {about.departs}\n\n"
            if own
            else ""
        )
        + f"{equality_table({**sides, **own}).markdown()}\n\n"
        + "".join(
            f"{side}, {', '.join(names)}: `{_one_line(error)}`\n\n"
            for side, found in sides.items()
            for error, names in _errors(found["equality"]).items()
        )
        + "## Time and memory\n\n"
        f"Medians of {results['rounds']} rounds ({results['turns']} starts of each side, in turns) with quartiles; "
        "ratios to the dense model are taken within a round on the same side, for the sides run on different "
        "versions of transformers. Prefill: `generate()` of one token, attaching included. Peak: most bytes of tensors "
        "alive during two tokens, on top of weights and inputs; cache: keys and values after the prefill.\n\n"
        + "\n\n".join(
            f"### {title}\n\n{cost_table(sides, batch).markdown()}"
            for batch, title in zip(TIMED, (f"Batch 1, {results['rows'][0]} tokens", "Batch 4, padded"), strict=True)
        )
        + "\n\n## Refused, or otherwise\n\n"
        f"{next(iter(results['methods']))}, batch 1, in the words of each side:\n\n"
        f"{probe_table(sides).markdown()}\n\n"
        "## What this does not show\n\n"
        f"- {title} has what mmtoken does not: {about.more}\n"
        f"- mmtoken has what {title} does not: {about.less}\n"
        + "".join(
            f"- Beside {one.title}: [{one.page}.md]({one.page}.md).\n" for name, one in PEERS.items() if name != peer
        )
        + "- GPUs, half precision, flash attention and trained weights were not run here.\n"
    )


def _command(peer: str) -> str:
    """What writes the page of a peer."""
    about = PEERS[peer]
    source = " --source CHECKOUT" if about.source else ""
    return (
        f"python -m mmtoken.evaluation.peers --peer {peer}{source} "
        f"--out benchmarks/{about.page}.json --page docs/{about.page}.md"
    )


def _errors(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Error -> the methods and batches that it came from."""
    errors: dict[str, list[str]] = {}
    for name, row in found.items():
        for what, title in BATCHES.items():
            if "error" in row[what]:
                errors.setdefault(row[what]["error"], []).append(f"{name} ({title})")
    return errors


def summary_table(sides: Mapping[str, Any]) -> Table:
    """One column per side: rows that are the formula's, and the span of the costs over the methods."""
    rows = [
        (f"{title}: rows that are the formula's", *(_rows_equal(found["equality"], what) for found in sides.values()))
        for what, title in BATCHES.items()
    ]
    for batch, title in zip(TIMED, (BATCHES["alone"], BATCHES["padded"]), strict=True):
        for cell, what in (("first_token", "prefill time"), ("peak", "peak memory"), ("cache", "cache")):
            spans = (_span(found["cost"][batch], cell) if "cost" in found else "" for found in sides.values())
            rows.append((f"{title}: {what} over dense", *spans))
    return Table(("", *sides), rows)


def _rows_equal(found: Mapping[str, Any], what: str) -> str:
    """Over all methods, or that one of them raised."""
    if any("error" in row[what] for row in found.values()):
        return "error"
    return " of ".join(str(sum(row[what][count] for row in found.values())) for count in ("rows_equal", "rows"))


def _span(found: Mapping[str, Any], cell: str) -> str:
    """Least and most over the methods, as shares of the dense model; for a time, of medians of ratios."""
    shares = [
        row[cell]["of_dense"]["median"] if cell in row else row["bytes"][cell] / found[DENSE]["bytes"][cell]
        for name, row in found.items()
        if name != DENSE and "error" not in row
    ]
    return f"{min(shares):.2f} to {max(shares):.2f}" if shares else "error"


def equality_table(sides: Mapping[str, Any]) -> Table:
    """One line per method and side."""
    rows = []
    for name in next(iter(sides.values()))["equality"]:
        for side, found in sides.items():
            row = found["equality"][name]
            kept = row.get("kept")
            rows.append(
                (
                    f"{name}, {side}",
                    f"{kept['equal']} of {kept['of']}" if kept else "",
                    *(cell for what in BATCHES for cell in _agreement(row[what])),
                    f"{row['dense']:.2g}",
                )
            )
    titles = [cell for title in BATCHES.values() for cell in (title, "rows")]
    return Table(("", "kept", *titles, "uncompressed"), rows)


def _agreement(found: Mapping[str, Any]) -> tuple[str, str]:
    if "error" in found:
        return "error", "-"
    return f"{found['logits']:.2g}", f"{found['rows_equal']} of {found['rows']}"


def cost_table(sides: Mapping[str, Any], batch: str) -> Table:
    """One line per method and side."""
    rows = []
    for name in next(iter(sides.values()))["cost"][batch]:
        for side, found in sides.items():
            row = found["cost"][batch][name]
            if "error" in row:
                rows.append((f"{name}, {side}", "error", *[""] * 5))
                continue
            stages = [row[stage] for stage in ("first_token", "each_further_token")]
            rows.append(
                (
                    f"{name}, {side}",
                    *(
                        cell
                        for stage in stages
                        for cell in (_spread(stage["milliseconds"]), f"{stage['of_dense']['median']:.2f}")
                    ),
                    f"{row['bytes']['peak'] / 2**20:.2f}",
                    f"{row['bytes']['cache'] / 2**20:.2f}",
                )
            )
    return Table(("", "prefill ms", "of dense", "further token ms", "of dense", "peak MiB", "cache MiB"), rows)


def _spread(summary: Mapping[str, float]) -> str:
    return f"{summary['median']:.1f} ({summary['q1']:.1f}-{summary['q3']:.1f})"


def probe_table(sides: Mapping[str, Any]) -> Table:
    """One line per case, one column per side."""
    cases = next(iter(sides.values()))["probes"]
    rows = [(case, *(_words(found["probes"][case]) for found in sides.values())) for case in cases]
    return Table(("", *sides), rows)


def _words(found: str | Mapping[str, str]) -> str:
    """An outcome, or an error in its own words."""
    return found if isinstance(found, str) else f"`{_one_line(found['error'])}`"


def _one_line(text: str) -> str:
    """For a cell: no line breaks, bars or backticks, and cut where it gets long."""
    flat = re.sub(r"\s+", " ", text).replace("|", "/").replace("`", "'")
    return flat if len(flat) <= 300 else f"{flat[:300].rstrip()}..."


def commit_of(source: Path) -> str:
    """The commit that a checkout stands at; "of no known commit" where git does not say."""
    done = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "of no known commit"


def main(argv: Sequence[str]) -> int:
    """Measure and write the JSON and the page; 0 on success.

    Raises:
        MMTokenError: an argument cannot be used, or a side failed as a whole.
    """
    parser = argparse.ArgumentParser("python -m mmtoken.evaluation.peers", description=__doc__)
    parser.add_argument("--peer", choices=list(PEERS), default="kvpress", help="default: %(default)s")
    parser.add_argument("--source", type=Path, help="checkout of the peer, where no release has what is compared")
    parser.add_argument("--commit", help="what the page says of the checkout; default: its commit")
    parser.add_argument("--environment", type=Path, help="folder of the peer's environment; default: .peers/PEER")
    parser.add_argument("--out", type=Path, default=Path("peers.json"), help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=Path("peers.md"), help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=4, help="starts of each side; default: %(default)s")
    options = parser.parse_args(argv)
    if options.turns < 1:
        raise MMTokenError(f"turns={options.turns}; give a whole number of at least 1.")
    peer = PEERS[options.peer]
    if bool(peer.source) != (options.source is not None):
        fix = f"clone {peer.source} and give its folder" if peer.source else "leave it out, pip installs this peer"
        raise MMTokenError(f"source={str(options.source)!r} for {options.peer}; {fix}.")
    if options.source is not None and not (options.source / options.peer).is_dir():
        raise MMTokenError(
            f"source={str(options.source)!r} has no folder {options.peer!r}; give a clone of {peer.source}."
        )
    targets = check_target(options.out, "out", ".json"), check_target(options.page, "page", ".md")
    results = measure(
        options.peer,
        make_environment(options.environment or Path(".peers") / options.peer, peer.requirements),
        turns=options.turns,
        subject=peer.subject,
        methods=peer.methods,
        rows=peer.rows,
        keep=peer.keep,
        probes=peer.probes,
        requirements=peer.requirements,
        distributions=peer.distributions,
        source=options.source,
        commit=options.commit or (commit_of(options.source) if options.source else ""),
        own=bool(peer.departs),
        beyond=version("transformers"),
        progress=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    for target, text in zip(targets, (json.dumps(results, indent=1) + "\n", page(results)), strict=True):
        with whole_file(target) as temporary:
            temporary.write_text(text)
    sys.stdout.write(f"{equality_table(results['sides']).text()}\n\nwrote {targets[0]} and {targets[1]}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MMTokenError as error:
        sys.exit(f"error: {error}")
