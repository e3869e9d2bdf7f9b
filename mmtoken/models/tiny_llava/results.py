"""Measures an exported tiny LLaVA the way it is used, through its processor and `generate`, and draws its curve."""

from __future__ import annotations

import csv
import json
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmtoken.datasets.photo_digits import PHOTOGRAPHS, PhotoDigits
from mmtoken.datasets.shapes_qa import QUESTION_TYPES, Sample, ShapesQA
from mmtoken.datasets.vqa_mix import split_seed
from mmtoken.errors import MMTokenError
from mmtoken.models.tiny_llava.objective import PHOTO_NUMBER

SCHEMA_VERSION = 1


@torch.inference_mode()
def answers(model: Any, processor: Any, asked: Iterable[tuple[Sample, str]], batch_size: int = 64) -> list[str]:
    """Greedy answers to `(sample, question)` pairs, in their order, by `processor.apply_chat_template` and `generate`.

    Model and processor are transformers' own; nothing here knows that the model is a small one.
    """
    given: list[str] = []
    pairs = list(asked)
    for start in range(0, len(pairs), batch_size):
        turns = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.fromarray(sample.image)},
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for sample, question in pairs[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            turns,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        ).to(model.device)
        out = model.generate(**inputs, do_sample=False)
        given += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return given


def evaluate(folder: str | Path, *, seed: int = 0, scenes: int = 600, photos: int = 600) -> dict[str, Any]:
    """Accuracy of an exported folder on the test split of `seed`, per question type, beside the majority baseline.

    An answer counts when it equals the expected one as a string. The baseline always gives the type's most frequent
    answer among these same questions.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    test = split_seed(seed, "test")
    found: dict[str, dict[str, float | int]] = {}
    right_of_all = asked_in_all = 0
    for samples, photographs in ((ShapesQA(test, scenes), False), (PhotoDigits(test, photos), True)):
        right: Counter[str] = Counter()
        expected: dict[str, Counter[str]] = defaultdict(Counter)
        pairs = [(sample, question) for sample in samples for question in sample.questions]
        for (_, question), answer in zip(
            pairs, answers(model, processor, [(s, q.text) for s, q in pairs]), strict=True
        ):
            kind = PHOTO_NUMBER if photographs else question.type
            expected[kind][question.answer] += 1
            right[kind] += answer == question.answer
        for kind in (*QUESTION_TYPES, PHOTO_NUMBER):
            if kind in expected:
                n = expected[kind].total()
                majority = expected[kind].most_common(1)[0][1] / n
                found[kind] = {"accuracy": right[kind] / n, "n": n, "majority_baseline": majority}
        if not photographs:
            right_of_all, asked_in_all = right.total(), len(pairs)
    return {
        "schema_version": SCHEMA_VERSION,
        "accuracy": found,
        "scenes_overall": {"accuracy": right_of_all / asked_in_all, "n": asked_in_all},
        "test": {"generator_seed": test, "scenes": scenes, "photos": photos, "decoding": "greedy generate, float32"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def training_facts(metrics: Sequence[str | Path]) -> dict[str, Any]:
    """Steps and CPU minutes of a run from its metrics files, given in order where it was resumed."""
    rows = _rows(metrics)
    steps = max(int(row["step"]) for row in rows) + 1
    return {"steps": steps, "cpu_minutes": round(max(row["cpu"] for row in rows), 1)}


def plot_curves(runs: dict[str, Sequence[str | Path]], picture: str | Path) -> None:
    """Validation accuracy per question type against CPU minutes, one panel per run.

    Raises:
        MMTokenError: matplotlib (the `plot` extra) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MMTokenError(
            "plot_curves needs matplotlib, which is not installed; run: pip install mmtoken[plot]"
        ) from error
    figure = Figure(figsize=(6.4 * len(runs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for panel, (name, metrics) in zip(panels, runs.items(), strict=True):
        checks = [row for row in _rows(metrics) if row.get("val/accuracy")]
        for i, kind in enumerate((*QUESTION_TYPES, PHOTO_NUMBER)):
            values = [float(row.get(f"val/{kind}", "nan")) for row in checks]
            label = "number on photographs" if kind == PHOTO_NUMBER else kind
            panel.plot([row["cpu"] for row in checks], values, label=label, color=f"C{i}", linewidth=1.6)
        panel.set(title=name, xlabel="CPU minutes (one thread)", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy")
    panels[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(picture, dpi=110)


def result_table(results: dict[str, Any]) -> str:
    """The accuracy table of the card, in Markdown, from the content of `results.json`."""
    models: dict[str, Any] = results["models"]
    first = next(iter(models.values()))
    lines = [
        "| question type | n | majority | " + " | ".join(models) + " |",
        "|---|---|---|" + "---|" * len(models),
    ]
    for kind, row in first["accuracy"].items():
        label = "number on photographs" if kind == PHOTO_NUMBER else kind
        found = " | ".join(f"{m['accuracy'][kind]['accuracy']:.3f}" for m in models.values())
        lines.append(f"| {label} | {row['n']} | {row['majority_baseline']:.3f} | {found} |")
    found = " | ".join(f"{m['scenes_overall']['accuracy']:.3f}" for m in models.values())
    lines.append(f"| all scene questions | {first['scenes_overall']['n']} | | {found} |")
    steps = " | ".join(f"{m['training']['steps']} / {m['training']['cpu_minutes']:.0f}" for m in models.values())
    lines.append(f"| training steps / CPU minutes | | | {steps} |")
    return "\n".join(lines)


def photograph_table() -> str:
    """The photographs behind PhotoDigits with their terms, in Markdown."""
    lines = ["| photograph | from | used for | licence | source |", "|---|---|---|---|---|"]
    lines += [f"| {p.name} | {p.package} | {p.split} | {p.license} | {p.source} |" for p in PHOTOGRAPHS]
    return "\n".join(lines)


def write(results: dict[str, Any], path: str | Path) -> None:
    """Results as JSON, numbers rounded to four places."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 4))
    Path(path).write_text(json.dumps(rounded, indent=2) + "\n")


def _rows(metrics: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Rows of the CSV files, each with the CPU minutes spent by then under "cpu"."""
    rows: list[dict[str, Any]] = []
    minutes = 0.0
    for path in metrics:
        with Path(path).open(newline="") as file:
            for row in csv.DictReader(file):
                minutes = float(row["train/cpu_minutes"] or minutes)
                rows.append({**row, "cpu": minutes})
    return rows
