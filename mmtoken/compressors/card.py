"""Cards in Markdown: what class and results say of a method, and the card of a compressor that is shared."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtoken.compressors.base import Compressor, Dims
from mmtoken.errors import InputError

_SIZES = {"tower": "tower width", "tokens": "token width", "llm": "decoder width", "blocks": "tower blocks"}


def hub_card(
    method: Compressor,
    dims: Dims | None,
    results: Mapping[str, Any] | str | os.PathLike[str] | None,
    name: str,
) -> str:
    """The README of a compressor that is shared.

    Args:
        method: the settings.
        dims: of the model that its learned parts were built for; None without such parts.
        results: an accuracy result of `mmtoken bench`, as a file or its content.
        name: where it will be: "org/name", or a folder.

    Raises:
        InputError: the results are no accuracy result, or hold none of this method.
    """
    cls = type(method)
    lines = [
        "---",
        "library_name: mmtoken",
        "tags:",
        "- visual-token-compression",
        "- vision-language-model",
        "---",
        "",
        f"# {cls.title}",
        "",
        f"A visual-token compressor for vision-language models, saved by mmtoken. {cls.paper}.",
        "",
        docstring(cls)[0],
        "",
        "## Use",
        "",
        "```python",
        "import mmtoken",
        "",
        f'model, processor = mmtoken.load("org/model", compressor="{name}")',
        "```",
        "",
    ]
    if dims is not None:
        sizes = ", ".join(f"{_SIZES[key]} {value}" for key, value in dataclasses.asdict(dims).items())
        lines += [f"Its learned parts were trained for a model of these sizes: {sizes}.", ""]
    lines += ["## Settings", "", pipe_table(("setting", "value", "meaning"), settings_rows(method))]
    if results is not None:
        lines += ["", "## Results", "", *results_lines(_entries(cls, results))]
    return "\n".join(lines) + "\n"


def docstring(cls: type[Compressor]) -> tuple[str, dict[str, str]]:
    """(the text of a class docstring, meaning of each setting in its Attributes section)."""
    text, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    settings: dict[str, str] = {}
    for line in inspect.cleandoc(attributes).splitlines():
        entry = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if entry:
            last = entry[1]
            settings[last] = entry[2]
        elif line.strip():
            settings[last] += f" {line.strip()}"
    return text.strip(), {name: meaning for both, meaning in settings.items() for name in both.split(", ")}


def settings_rows(method: Compressor) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of each setting."""
    meanings: dict[str, str] = {}
    for base in reversed(type(method).__mro__):  # settings that a method takes over from another one
        if issubclass(base, Compressor):
            meanings |= docstring(base)[1]
    values = method.settings()
    return [(f.name, f"`{values[f.name]}`", meanings.get(f.name, "")) for f in dataclasses.fields(method) if f.init]  # type: ignore[arg-type]


def results_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of what a method reached, one per model, as `mmtoken.evaluation.cards.split_results` lists them."""
    lines = []
    for model in models:
        titles = model["titles"]
        first = next(iter(titles))
        rows = []
        for row in (model["dense"], *model["results"]):
            scores = [row["accuracy"][benchmark]["all"] for benchmark in titles]
            cells = [
                f"{row['layer_average'][first]:.1f}",
                f"{row['flops'][first] / row['flops_dense'][first]:.3f}",
                f"{row['kv_share'][first]:.3f}" if "kv_share" in row else "",  # results of before it was measured
            ]
            cells += [f"{score['accuracy']:.3f} ({score['low']:.2f}-{score['high']:.2f})" for score in scores]
            rows.append([row["name"], *cells])
        header = [f"on {model['model']}", "layer-average tokens", "FLOPs of dense", "cache of dense", *titles.values()]
        asked = ", ".join(f"{count} questions of {titles[name]}" for name, count in model["split"]["questions"].items())
        lines += [
            pipe_table(header, rows, numbers=True),
            "",
            f"Accuracy with 95 % intervals on held-out pictures ({asked}), from `{model['source']}`, measured with "
            + ", ".join(f"{name} {number}" for name, number in model["environment"]["versions"].items())
            + ". Tokens and FLOPs (decoder prefill) are those of the first column of scores.",
            "",
        ]
    return lines[:-1]


def results_of(content: Mapping[str, Any], source: str, cls: type[Compressor]) -> dict[str, Any] | None:
    """What one method reached in an accuracy result of `mmtoken bench`; None if it was not measured.

    Raises:
        InputError: the content is no accuracy result.
    """
    if content.get("kind") != "accuracy":
        raise InputError(f"results={source!r} is of kind {content.get('kind')!r}; give accuracy files of bench.")
    rows = [row for row in content["results"] if row["method"] == cls.__name__]
    if not rows:
        return None
    entry = {"model": content["model"], "source": source}
    entry |= {key: content[key] for key in ("weights", "environment", "split", "titles")}
    return entry | {"dense": content["results"][0], "results": rows}


def pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A pipe table; with `numbers`, all columns but the first are aligned on the right."""
    lines = [header, ["---", *["---:" if numbers else "---"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _entries(cls: type[Compressor], results: Mapping[str, Any] | str | os.PathLike[str]) -> list[dict[str, Any]]:
    source = "results" if isinstance(results, Mapping) else Path(results).name
    try:
        content = results if isinstance(results, Mapping) else json.loads(Path(results).read_text())
        entry = results_of(content, source, cls)
        if entry is not None:
            results_lines([entry])
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"results={source!r} cannot be read as an accuracy file of bench ({type(error).__name__}: {error})."
        ) from error
    if entry is None:
        raise InputError(f"results={source!r} holds no {cls.__name__}; measure it with mmtoken bench.")
    return [entry]
