"""Benchmark results as tables, for a terminal and for a Markdown report that is read beside the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtoken.evaluation.accuracy import ALL

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a name, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Aligned columns."""
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([aligned[0], "-" * (sum(widths) + 2 * len(widths) - 2), *aligned[1:]])

    def markdown(self) -> str:
        """A pipe table."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(results: Results) -> Table:
    """What every entrant cost on the random model."""
    header = (
        "random weights", "tokens", "layer avg", "vision ms", "scoring ms", "of prefill", "prefill ms", "(q1-q3)",
        "decode ms/token", "speed-up", "(q1-q3)", "of tokens", "of FLOPs", "peak MiB", "KV MiB", "GFLOPs",
    )  # fmt: skip
    rows = []
    for row in results["results"]:
        ms, gain = row["milliseconds"], row["speedup"]["prefill_with_scoring"]
        decode = ms.get("decode_per_token")
        rows.append(
            (
                row["name"],
                str(row["tokens_out"]),
                f"{row['layer_average']:.0f}",
                f"{ms['vision']['median']:.1f}",
                f"{ms['scoring']['median']:.1f}",
                f"{100 * row['scoring']['share_of_prefill']:.1f} %" if row.get("scoring") else "",
                f"{ms['prefill']['median']:.1f}",
                _spread(ms["prefill"], 1),
                f"{decode['median']:.2f}" if decode else "",
                f"{gain['median']:.2f}",
                _spread(gain, 2),
                f"{row['share_of_token_ratio']:.2f}",
                f"{row['share_of_flop_ratio']:.2f}",
                f"{row['peak_mib']:.1f}",
                f"{row['kv_bytes'] / 2**20:.1f}",
                f"{row['flops'] / 1e9:.1f}",
            )
        )
    return Table(header, rows)


def scoring_warnings(results: Results) -> list[str]:
    """A line for every entrant whose scoring costs more than it saves."""
    found = []
    for row in results["results"]:
        scoring = row.get("scoring")  # files of before it was measured have none
        if scoring and scoring["costs_more_than_it_saves"]:
            cost, saved = row["milliseconds"]["scoring"]["median"], scoring["saved_ms"]["median"]
            found.append(
                f"{row['name']}: scoring costs more than it saves here, {cost:.1f} ms for {saved:.1f} ms of prefill."
            )
    return found


def targets_table(results: Results) -> Table:
    """What was aimed at and what was reached."""
    rows = [
        (row["target"], f"{row['value']:.3f}", f"{row['wanted']:g}", "yes" if row["met"] else "NO")
        for row in results["targets"]
    ]
    return Table(("target", "measured", "wanted", "met"), rows)


def hooks_table(results: Results) -> Table:
    """Cost of attached hooks on a model small enough to show it."""
    rows = []
    for row in results["hook_overhead"]:
        prefill, whole, decode = (
            row[name] for name in ("prefill_ms", "with_scoring_ms", "decode_us_per_layer_and_token")
        )
        rows.append(
            (
                row["name"],
                f"{prefill['median']:.2f}",
                _spread(prefill, 2),
                f"{whole['median']:.2f}",
                f"{decode['median']:.1f}",
                _spread(decode, 1),
            )
        )
    header = ("hooks", "ms per prefill", "(q1-q3)", "with scoring", "us per layer and token", "(q1-q3)")
    return Table(header, rows)


def accuracy_table(results: Results) -> Table:
    """Accuracy of every entrant over all questions of each benchmark, with 95 % intervals and exact matches."""
    titles: Mapping[str, str] = results["titles"]
    first = next(iter(titles))
    header = ["trained model", "tokens", "layer avg", "MFLOPs", "cache", "scoring ms", "first token ms", "speed-up"]
    for title in titles.values():
        header += [title, "95 %", "exact"]
    rows = []
    for row in results["results"]:
        cells = [
            row["name"],
            f"{row['tokens_out'][first]:.1f}",
            f"{row['layer_average'][first]:.1f}",
            f"{row['flops'][first] / 1e6:.1f}",
            f"{100 * row['kv_share'][first]:.0f} %",
            f"{row['scoring_ms'][first]:.2f}",
            f"{row['first_token_ms']['median']:.2f}",
            f"{row['first_token_speedup']['median']:.2f}",
        ]
        for benchmark in titles:
            cells += [*_score(row["accuracy"][benchmark][ALL]), f"{row['exact_match'][benchmark]:.3f}"]
        rows.append(cells)
    baseline = ["most frequent answer", *[""] * 7]
    for benchmark in titles:
        baseline += [f"{results['baselines'][benchmark][ALL]:.3f}", "", ""]
    return Table(header, [*rows, baseline])


def types_table(results: Results) -> Table:
    """Accuracy of every entrant per question type."""
    kinds = [
        (benchmark, kind, kind if len(table) > 2 else results["titles"][benchmark].lower())
        for benchmark, table in results["baselines"].items()
        for kind in table
        if kind != ALL
    ]
    dense = results["results"][0]["accuracy"]
    rows = [["questions", *(str(dense[benchmark][kind]["total"]) for benchmark, kind, _ in kinds)]]
    rows += [
        [row["name"], *(f"{row['accuracy'][benchmark][kind]['accuracy']:.3f}" for benchmark, kind, _ in kinds)]
        for row in results["results"]
    ]
    baseline = [f"{results['baselines'][benchmark][kind]:.3f}" for benchmark, kind, _ in kinds]
    return Table(["trained model", *(title for *_, title in kinds)], [*rows, ["most frequent answer", *baseline]])


def speed_report(results: Results) -> str:
    """Markdown beside `speed.json`."""
    shape = results["shape"]
    missed = [row["target"] for row in results["targets"] if not row["met"]]
    return "\n".join(
        [
            "# Speed and memory",
            "",
            f"LLaVA-shaped model with random weights: hidden {shape['hidden']}, {shape['layers']} layers, "
            f"{shape['visual_tokens']} visual + {shape['text_tokens']} text tokens, batch 1, {results['dtype']}. "
            f"{_measured(results)} Medians of {results['rounds']} interleaved rounds; speed-ups are ratios taken "
            "within a round, over the dense model, scoring included. Weights do not change how long a layer takes; "
            "nothing here says anything about accuracy.",
            "",
            speed_table(results).markdown(),
            "",
            'The "of" columns are the share reached of the token ratio (N + T) / (K + T) and of the FLOP ratio (dense '
            "over compressed, attention included); that of prefill is scoring's.",
            "",
            *(f"WARNING: {line}\n" for line in scoring_warnings(results)),
            "## Targets",
            "",
            targets_table(results).markdown(),
            "",
            "Missed: " + "; ".join(missed) + "." if missed else "All met.",
            "",
            "## Cost of the hooks",
            "",
            "Everything kept, on a model so small (16 + 9 tokens, width 64, 8 layers) that little else is left; paired "
            "differences to the plain model.",
            "",
            hooks_table(results).markdown(),
            "",
            *_refused(results),
        ]
    )


def accuracy_report(results: Results, pictures: Sequence[str]) -> str:
    """Markdown beside `accuracy-<model>.json`; `pictures` are file names next to it."""
    asked = ", ".join(
        f"{results['split']['questions'][benchmark]} questions about {results['split']['pictures'][benchmark]} "
        f"pictures ({title})"
        for benchmark, title in results["titles"].items()
    )
    return "\n".join(
        [
            f"# Accuracy of {results['model']}",
            "",
            f"Held-out pictures that training never drew (generator seed {results['split']['seed']}): {asked}. Greedy "
            "generate(); an answer counts when it begins with the expected one, exact ones stop there. Tokens and "
            "FLOPs (decoder prefill, per "
            f"question, first benchmark) are measured. Time is {results['timing']['what']}, median of "
            f"{results['timing']['rounds']} interleaved rounds in batches of {results['timing']['batch']}. "
            f"{_measured(results)}",
            "",
            *(f"![accuracy]({name})" for name in pictures),
            "",
            accuracy_table(results).markdown(),
            "",
            "## By type of question",
            "",
            types_table(results).markdown(),
            "",
            *_refused(results),
        ]
    )


def _measured(results: Results) -> str:
    where = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return f"Measured on {where['device']} ({where['clock']}), {versions}, Python {where['python']}."


def _refused(results: Results) -> list[str]:
    if not results["refused"]:
        return []
    return ["## Refused", "", *(f"- {name}: {reason}" for name, reason in results["refused"].items()), ""]


def _spread(summary: Mapping[str, float], digits: int) -> str:
    return f"({summary['q1']:.{digits}f}-{summary['q3']:.{digits}f})"


def _score(score: Mapping[str, float]) -> list[str]:
    return [f"{score['accuracy']:.3f}", f"({score['low']:.2f}-{score['high']:.2f})"]
