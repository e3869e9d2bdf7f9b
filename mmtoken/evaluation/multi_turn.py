"""A second question about the same picture, after a compressor has chosen its tokens for the first one.

Three ways to ask it: alone, with a selection of its own; later in the conversation, on the cache that the first turn
left; and on what that cache holds of the picture, the first question taken back (as servers do that keep a prefix).
Methods that look at the question have chosen for another one in the last two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from mmtoken.backbones.registry import adapt
from mmtoken.engine.compat import CACHE
from mmtoken.engine.session import compress
from mmtoken.errors import InputError, MMTokenError, UnsupportedError
from mmtoken.evaluation.benchmarks import TEST_SEED, Benchmark, Item, find
from mmtoken.evaluation.lineup import Entrant, supported
from mmtoken.evaluation.metrics import wilson
from mmtoken.evaluation.tables import Table
from mmtoken.evaluation.timing import environment, one_thread

SCHEMA_VERSION = 1

ALONE, CONVERSATION, PICTURE = "alone", "conversation", "picture"

_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
"""What a turn without pixels is made of."""


@dataclass(frozen=True)
class Pair:
    """Two questions about one picture."""

    first: Item
    second: Item


@dataclass(frozen=True)
class Turns:
    """Pairs whose prompts have the same lengths, so that nothing is padded.

    Attributes:
        index: their places in the list of pairs.
        first, alone: inputs of the first question and of the second one, each with its picture.
        conversation: text inputs of first question, expected answer and second question; the first `asked` tokens are
            those of `first`.
        asked: length of the first prompt.
        shared: how many tokens `first` and `alone` begin with in common, up to the last visual token.
    """

    index: list[int]
    first: dict[str, Tensor]
    alone: dict[str, Tensor]
    conversation: dict[str, Tensor]
    asked: int
    shared: int


def pairs_of(items: Sequence[Item]) -> list[Pair]:
    """Neighbouring questions about the same picture, each used once."""
    found, number = [], 0
    while number + 1 < len(items):
        first, second = items[number], items[number + 1]
        same = first.image is second.image
        if same:
            found.append(Pair(first, second))
        number += 2 if same else 1
    return found


def prepare_turns(
    benchmark: Benchmark, processor: Any, model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int
) -> list[Turns]:
    """The prompts of all pairs in batches of equal lengths.

    Raises:
        InputError: in this model's chat template a conversation does not begin with its first turn, or text comes
            before the picture that depends on the question.
    """
    placeholder = adapt(model).placeholder_ids("image")

    def inputs(messages: Sequence[list[dict[str, Any]]], chosen: Sequence[Pair]) -> dict[str, Tensor]:
        texts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
        images = [[Image.fromarray(pair.first.image)] for pair in chosen]
        return dict(processor(text=texts, images=images, return_tensors="pt"))

    def three(pair: Pair) -> tuple[list[dict[str, Any]], ...]:
        first = benchmark.prompt(pair.first.question)
        later = [
            {"role": "assistant", "content": [{"type": "text", "text": pair.first.answer}]},
            {"role": "user", "content": [{"type": "text", "text": pair.second.question}]},
        ]
        return first, benchmark.prompt(pair.second.question), [*first, *later]

    groups: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        lengths = tuple(inputs([message], [pair])["input_ids"].shape[1] for message in three(pair))
        groups.setdefault(lengths, []).append(number)
    turns = []
    for lengths, members in sorted(groups.items()):
        for start in range(0, len(members), batch_size):
            index = members[start : start + batch_size]
            chosen = [pairs[i] for i in index]
            made = [
                {name: value.to(model.device) for name, value in inputs(messages, chosen).items()}
                for messages in zip(*(three(pair) for pair in chosen), strict=True)
            ]
            first, alone, whole = (part["input_ids"] for part in made)
            shared = int((first[0] == placeholder).nonzero()[-1]) + 1
            if not torch.equal(first[:, :shared], alone[:, :shared]) or not torch.equal(first, whole[:, : lengths[0]]):
                raise InputError(
                    "this model's chat template does not go on from the first turn, or writes what depends on the "
                    "question before the picture; its turns cannot share a cache."
                )
            text = {name: made[2][name] for name in _TEXT if name in made[2]}
            turns.append(Turns(index, made[0], made[1], text, lengths[0], shared))
    return turns


@torch.no_grad()
def ask_twice(
    model: Any, processor: Any, benchmark: Benchmark, turns: Sequence[Turns], pairs: Sequence[Pair], entrant: Entrant
) -> dict[str, Any]:
    """Marks of the second questions, asked in the three ways; None with the reason where a way is refused."""
    marks: dict[str, list[int]] = {way: [0] * len(pairs) for way in (ALONE, CONVERSATION, PICTURE)}
    refused: dict[str, str] = {}
    tokens = 0.0

    def note(way: str, batch: Turns, inputs: dict[str, Tensor], **cache: Any) -> None:
        output = model.generate(**inputs, **cache, max_new_tokens=benchmark.max_new_tokens, do_sample=False)
        start = inputs["input_ids"].shape[1]
        texts = processor.batch_decode(output[:, start:], skip_special_tokens=True)
        for i, text in zip(batch.index, texts, strict=True):
            marks[way][i] = benchmark.score(benchmark.parse(text), pairs[i].second.answer)

    attached = compress(model, entrant.compressor) if entrant.compressor is not None else nullcontext()
    with attached as session:
        for batch in turns:
            note(ALONE, batch, batch.alone)
            visual = int((batch.alone["input_ids"] == adapt(model).placeholder_ids("image")).sum())
            tokens += visual if session is None else sum(session.report.tokens_out)
            note(CONVERSATION, batch, batch.conversation, **{CACHE: _first_turn(model, batch)})
            cache = _first_turn(model, batch)
            try:
                cache.crop(batch.shared - batch.asked)
            except UnsupportedError as error:
                refused[PICTURE] = str(error)
            else:
                text = {name: value for name, value in batch.alone.items() if name in _TEXT}
                note(PICTURE, batch, text, **{CACHE: cache})
            if session is not None:
                session.reports.clear()
    return {
        "tokens_out": tokens / len(pairs),
        **{way: None if way in refused else found for way, found in marks.items()},
        "refused": refused,
    }


def _first_turn(model: Any, batch: Turns) -> Any:
    """The cache that the first question leaves behind."""
    output = model.generate(**batch.first, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    return output[CACHE]


def multi_turn(
    model: PreTrainedModel,
    processor: Any,
    entrants: Sequence[Entrant],
    *,
    name: str,
    benchmark: str = "shapes_qa",
    pictures: int = 100,
    batch_size: int = 32,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy on second questions, and what was lost because tokens were chosen for the first one.

    Args:
        model, processor: a trained model.
        entrants: the dense model first.
        name: of the model, for the record.
        benchmark: one with several questions per picture.
        pictures: held-out pictures.
        batch_size: most pairs per call.
        progress: told about every entrant.

    Returns:
        JSON-ready results, one entry per entrant.

    Raises:
        MMTokenError: no picture is asked for, or none has two questions.
    """
    if pictures < 1:
        raise MMTokenError(f"pictures={pictures}; ask about at least 1 picture.")
    chosen = find(benchmark)
    pairs = pairs_of(chosen.load(pictures))
    if not pairs:
        raise MMTokenError(f"benchmark={benchmark!r} asks one question per picture; take one with several.")
    able, refused = supported(model, entrants)
    rows: list[dict[str, Any]] = []
    with one_thread(model.device):
        turns = prepare_turns(chosen, processor, model, pairs, batch_size)
        for number, entrant in enumerate(able, 1):
            found = ask_twice(model, processor, chosen, turns, pairs, entrant)
            dense = rows[0]["marks"] if rows else {way: found[way] for way in (ALONE, CONVERSATION, PICTURE)}
            rows.append(
                {
                    "name": entrant.key,
                    "method": entrant.method,
                    "title": entrant.title,
                    "control": entrant.control,
                    "sees_the_question": entrant.compressor is not None and not entrant.compressor.query_agnostic,
                    "compressor": None if entrant.compressor is None else entrant.compressor.to_dict(),
                    "keep": entrant.keep,
                    "tokens_out": round(found["tokens_out"], 3),
                    ALONE: score(found[ALONE]),
                    CONVERSATION: compared(found[CONVERSATION], found[ALONE], dense[CONVERSATION]),
                    PICTURE: compared(found[PICTURE], found[ALONE], dense[PICTURE]),
                    "refused": found["refused"],
                    "marks": {way: found[way] for way in (ALONE, CONVERSATION, PICTURE)},
                }
            )
            progress(f"multi-turn: {number} of {len(able)}: {entrant.key}: {rows[-1][ALONE]['accuracy']:.3f} alone")
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "multi_turn",
        "model": name,
        "weights": "trained",
        "environment": environment(model.device),
        "benchmark": benchmark,
        "split": {"seed": TEST_SEED, "pictures": pictures, "pairs": len(pairs)},
        "results": rows,
        "refused": refused,
    }


def score(marks: Sequence[int]) -> dict[str, Any]:
    """Correct answers, accuracy and its 95 % Wilson interval."""
    low, high = wilson(sum(marks), len(marks))
    return {
        "correct": sum(marks),
        "total": len(marks),
        "accuracy": round(sum(marks) / len(marks), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def compared(marks: Sequence[int] | None, alone: Sequence[int], dense: Sequence[int] | None) -> dict[str, Any] | None:
    """The score of one way to ask, and how it differs from asking alone and from the dense model asked the same way.

    `broken` and `mended` count questions that were right alone and are wrong now, and the reverse.
    """
    if marks is None or dense is None:
        return None
    total = len(marks)
    return {
        **score(marks),
        "lost_to_alone": round((sum(alone) - sum(marks)) / total, 4),
        "lost_to_dense": round((sum(dense) - sum(marks)) / total, 4),
        "broken": sum(a > m for a, m in zip(alone, marks, strict=True)),
        "mended": sum(m > a for a, m in zip(alone, marks, strict=True)),
    }


def turns_table(results: dict[str, Any]) -> Table:
    """Accuracy on second questions and what the first one cost, in points of a percent."""
    header = ["second question", "asks", "tokens", "alone", "95 %"]
    for title in ("same picture", "conversation"):
        header += [title, "lost to alone", "broken/mended", "lost to dense"]
    rows = []
    for row in results["results"]:
        alone = row[ALONE]
        cells = [row["name"], "yes" if row["sees_the_question"] else "-", f"{row['tokens_out']:.1f}"]
        cells += [f"{alone['accuracy']:.3f}", f"({alone['low']:.2f}-{alone['high']:.2f})"]
        for way in (PICTURE, CONVERSATION):
            found = row[way]
            if found is None:
                cells += ["refused", "", "", ""]
            else:
                lost = f"{100 * found['lost_to_alone']:+.1f}", f"{found['broken']}/{found['mended']}"
                cells += [f"{found['accuracy']:.3f}", *lost, f"{100 * found['lost_to_dense']:+.1f}"]
        rows.append(cells)
    return Table(header, rows)


def turns_report(results: dict[str, Any]) -> str:
    """Markdown beside the JSON."""
    split = results["split"]
    reasons = dict(results["refused"])
    for row in results["results"]:
        reasons |= {f"{row['name']}, {way}": reason for way, reason in row["refused"].items()}
    return "\n".join(
        [
            f"# Second questions to {results['model']}",
            "",
            f"{split['pairs']} pairs of questions about {split['pictures']} held-out pictures of "
            f"{results['benchmark']} (generator seed {split['seed']}), greedy generate(). Alone: the second question "
            "by itself, tokens chosen for it. Same picture: on the cache of the first question's prompt, its text "
            "taken back. Conversation: behind the first question and its expected answer, on the cache of the first "
            "turn; a model that was trained on single questions answers worse there with all tokens, too, so compare "
            "with dense. Lost: points of accuracy; negative is gained.",
            "",
            turns_table(results).markdown(),
            "",
            *(["## Refused", "", *(f"- {what}: {reason}" for what, reason in reasons.items()), ""] if reasons else []),
        ]
    )
