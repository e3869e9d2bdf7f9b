"""`mmtoken list`: compressors, backbones and models, from the facts on their classes.

Compressors in a terminal ("-" is no): keep=1: the plain model to the bit at keep=1.0; asks: sees the question; streams:
needs no question and no later frame; learned: has parts to train; parity: held against numbers of the official code, or
of an independent oracle; cost: memory of scoring grows with rows of tokens, or takes pairs in tiles.
"""

from __future__ import annotations

import json
import sys

from mmtoken.backbones import registry as backbones
from mmtoken.cli.parser import Parser
from mmtoken.compressors import registry as compressors
from mmtoken.errors import MMTokenError
from mmtoken.models.registry import list_models

Rows = list[dict[str, str]]


def main(argv: list[str]) -> int:
    """Run `mmtoken list` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: options do not go together, or cards cannot be written.
    """
    parser = Parser("mmtoken list", __doc__ or "")
    parser.add_argument("what", choices=("compressors", "backbones", "models"))
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all facts as JSON")
    form.add_argument("--markdown", action="store_true", help="all facts as a Markdown table (docs/compressors.md)")
    form.add_argument("--cards", metavar="DIR", help="write a folder per compressor: README.md and preset.yaml")
    parser.add_argument(
        "--results", nargs="+", action="extend", default=[], metavar="FILE", help="accuracy files of bench, for --cards"
    )
    options = parser.parse_args(argv)
    if options.cards is not None and options.what != "compressors":
        raise MMTokenError(f"cards={options.cards!r} are made of compressors; leave it out of `list {options.what}`.")
    if options.results and options.cards is None:
        raise MMTokenError(f"results={options.results[0]!r} go into cards; name their folder with --cards.")
    if options.cards is not None:
        from mmtoken.evaluation.cards import write_cards

        written = write_cards(options.cards, options.results)
        sys.stdout.write("".join(f"wrote {path}\n" for path in written))
        return 0
    rows = facts(options.what)
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    elif options.markdown:
        sys.stdout.write(markdown(rows))
    else:
        sys.stdout.write(aligned(short(rows) if options.what == "compressors" else rows))
    return 0


def facts(what: str) -> Rows:
    """One row per compressor, backbone or model."""
    if what == "compressors":
        return compressors.facts()
    if what == "backbones":
        return backbones.facts()
    return [{"name": entry.name, "description": entry.description, "licence": entry.licence} for entry in list_models()]


def short(rows: Rows) -> Rows:
    """The facts of compressors for a terminal and the README; the paper by its arXiv number, "-" for no, needs last."""

    def paper(row: dict[str, str]) -> str:
        _, found, number = row["paper"].partition("arXiv ")
        return number.split()[0].rstrip(",;") if found else row["kind"]

    return [
        {
            "name": row["name"],
            "year": row["year"],
            "arXiv": paper(row),
            "sites": row["sites"],
            "budget": row["budget"],
            "keep=1": "same" if row["keep=1.0"] == "bit-identical" else "-",
            "asks": row["sees the question"].replace("no", "-"),
            "streams": row["streaming-legal"].replace("no", "-"),
            "learned": row["trainable"].replace("no", "-"),
            "parity": "code" if row["parity"] == "official code" else "oracle",
            "cost": row["cost"],
            "needs": row["needs"],
        }
        for row in rows
    ]


def markdown(rows: Rows) -> str:
    """A Markdown table."""
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def aligned(rows: Rows) -> str:
    """A table for a terminal; the last column is not padded."""
    head = list(rows[0]) if rows else []
    table = [head, *([row[name] for name in head] for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    return "".join(f"{line.rstrip()}\n" for line in lines)
