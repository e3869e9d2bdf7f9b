"""Second questions: on a kept cache they are answered as by a model that hides what the first question dropped."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtoken import attached, compress
from mmtoken.cli.main import main
from mmtoken.compressors import DivPrune, FastV, SnapKV
from mmtoken.engine.compat import CACHE
from mmtoken.errors import InputError, MMTokenError
from mmtoken.evaluation.benchmarks import Item, find
from mmtoken.evaluation.lineup import Entrant
from mmtoken.evaluation.multi_turn import (
    ALONE,
    CONVERSATION,
    PICTURE,
    Pair,
    ask_twice,
    compared,
    multi_turn,
    pairs_of,
    prepare_turns,
    score,
    turns_report,
    turns_table,
)
from tests import oracle
from tests.evaluation.results import shipped

BENCHMARK = find("shapes_qa")
LAYER, KEEP = 2, 4
ENTRANTS = [
    Entrant(),
    *(Entrant(method, 4) for method in (DivPrune(keep=4), FastV(keep=KEEP, layer=LAYER), SnapKV(keep=4))),
]


@functools.cache
def results() -> dict[str, Any]:
    model, processor = shipped()
    return multi_turn(model, processor, ENTRANTS, name="tiny-llava", pictures=3, batch_size=3)


@functools.cache
def pairs() -> list[Pair]:
    return pairs_of(BENCHMARK.load(3))


def rows() -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in results()["results"]}


def inputs(messages: list[dict[str, Any]], pair: Pair) -> dict[str, torch.Tensor]:
    _, processor = shipped()
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(processor(text=text, images=Image.fromarray(pair.second.image), return_tensors="pt"))


def mark(output: torch.Tensor, given: dict[str, torch.Tensor], pair: Pair) -> int:
    _, processor = shipped()
    text = processor.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return BENCHMARK.score(BENCHMARK.parse(text), pair.second.answer)


def conversation(pair: Pair) -> list[dict[str, Any]]:
    return [
        *BENCHMARK.prompt(pair.first.question),
        {"role": "assistant", "content": pair.first.answer},
        {"role": "user", "content": pair.second.question},
    ]


def test_pairs_are_neighbouring_questions_about_one_picture() -> None:
    one, other, third = (np.full((2, 2, 3), value, np.uint8) for value in (0, 0, 1))
    items = [Item(image, str(i), "", "") for i, image in enumerate([one, one, one, other, other, third])]
    assert [(p.first.question, p.second.question) for p in pairs_of(items)] == [("0", "1"), ("3", "4")]
    assert pairs_of([]) == [] == pairs_of(items[:1])


def test_results_are_data_and_nothing_stays_attached() -> None:
    found = results()
    assert json.loads(json.dumps(found)) == found
    assert (found["schema_version"], found["kind"], found["model"]) == (1, "multi_turn", "tiny-llava")
    assert found["split"] == {"seed": 2, "pictures": 3, "pairs": len(pairs())}
    assert [row["name"] for row in found["results"]] == ["dense", "DivPrune keep=4", "FastV keep=4", "SnapKV keep=4"]
    assert [row["sees_the_question"] for row in found["results"]] == [False, False, True, True]
    assert attached(shipped()[0]) is None


@pytest.mark.parametrize("entrant", ENTRANTS, ids=lambda entrant: entrant.key)
def test_alone_is_plain_generate_one_by_one(entrant: Entrant) -> None:
    model, _ = shipped()
    marks = []
    for pair in pairs():
        given = inputs(BENCHMARK.prompt(pair.second.question), pair)
        if entrant.compressor is None:
            output = model.generate(**given, max_new_tokens=4, do_sample=False)
        else:
            with compress(model, entrant.compressor):
                output = model.generate(**given, max_new_tokens=4, do_sample=False)
        marks.append(mark(output, given, pair))
    assert rows()[entrant.method]["marks"][ALONE] == marks


def test_the_dense_conversation_is_plain_generate_on_the_whole_conversation() -> None:
    model, _ = shipped()
    marks = []
    for pair in pairs():
        given = inputs(conversation(pair), pair)
        marks.append(mark(model.generate(**given, max_new_tokens=4, do_sample=False), given, pair))
    assert rows()["dense"]["marks"][CONVERSATION] == marks


@pytest.mark.parametrize("method", ["dense", "DivPrune"])
def test_whatever_ignores_the_question_loses_nothing_on_the_same_picture(method: str) -> None:
    found = rows()[method]
    assert found["marks"][PICTURE] == found["marks"][ALONE]
    assert found[PICTURE]["lost_to_alone"] == 0 == found[PICTURE]["broken"]


@pytest.mark.parametrize("way", [PICTURE, CONVERSATION])
def test_a_method_that_asks_is_held_to_what_it_kept_for_the_first_question(way: str) -> None:
    model, _ = shipped()
    marks, differs = [], 0
    for pair in pairs():
        with compress(model, FastV(keep=KEEP, layer=LAYER)) as session, torch.no_grad():
            model(**inputs(BENCHMARK.prompt(pair.first.question), pair))
            kept = session.report.kept[0].tolist()
            model(**inputs(BENCHMARK.prompt(pair.second.question), pair))
            differs += kept != session.report.kept[0].tolist()
        given = inputs(BENCHMARK.prompt(pair.second.question) if way == PICTURE else conversation(pair), pair)
        seen = torch.ones_like(given["input_ids"], dtype=torch.bool)
        places = (given["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        seen[0, [place for i, place in enumerate(places) if i not in kept]] = False
        depth = len(oracle.text_model(model).layers)
        with oracle.masked_keys(model, dict.fromkeys(range(LAYER, depth), seen)):
            output = oracle.generate_with_logits(model, given, max_new_tokens=4)
        marks.append(mark(output.sequences, given, pair))
    assert differs  # otherwise nothing is tested
    assert rows()["FastV"]["marks"][way] == marks


def test_the_cache_is_handed_on_up_to_the_picture_or_to_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = shipped()
    plain, seen = model.generate, []

    def generate(**inputs: Any) -> Any:
        if CACHE in inputs:
            length = inputs[CACHE].get_seq_length()
            seen.append((length, inputs["input_ids"][:, :length].clone(), inputs["input_ids"].shape[1]))
        return plain(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    turns = prepare_turns(BENCHMARK, processor, model, pairs()[:1], 1)
    ask_twice(model, processor, BENCHMARK, turns, pairs()[:1], Entrant(FastV(keep=KEEP), KEEP))
    (whole, first, _), (shared, picture, _) = seen
    assert torch.equal(first, turns[0].first["input_ids"]) and whole == turns[0].asked
    assert picture[0, -1] == model.config.image_token_id and torch.equal(
        picture, turns[0].alone["input_ids"][:, :shared]
    )
    assert turns[0].alone["input_ids"][0, shared] != model.config.image_token_id


def test_a_cache_that_cannot_take_the_first_question_back_is_named() -> None:
    found = rows()["SnapKV"]
    assert found[PICTURE] is None and found["marks"][PICTURE] is None
    assert "chose what stays in the cache" in found["refused"][PICTURE] and found[CONVERSATION] is not None


def test_losses_are_counted_both_ways() -> None:
    assert compared([1, 0, 0, 1], alone=[1, 1, 1, 0], dense=[1, 1, 1, 1]) == {
        **score([1, 0, 0, 1]),
        "lost_to_alone": 0.25,
        "lost_to_dense": 0.5,
        "broken": 2,
        "mended": 1,
    }
    assert score([1, 0, 0, 1])["accuracy"] == 0.5
    assert compared(None, [1], [1]) is None


def test_the_table_shows_what_was_lost_and_what_was_refused() -> None:
    shown = turns_table(results()).text().splitlines()
    assert len(shown) == 2 + len(ENTRANTS) and "lost to alone" in shown[0]
    assert "refused" in shown[-1] and "+0.0" in shown[2]
    report = turns_report(results())
    assert "SnapKV keep=4, picture: crop takes back" in report and f"{len(pairs())} pairs" in report


class Reversed:
    """A processor whose template puts the question before the picture."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
        (question,) = (part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        return f"{question}<image>"

    def __call__(self, **kwargs: Any) -> Any:
        return self.processor(**kwargs)


def test_a_template_that_cannot_share_a_cache_is_refused() -> None:
    model, processor = shipped()
    with pytest.raises(InputError, match="its turns cannot share a cache"):
        prepare_turns(BENCHMARK, Reversed(processor), model, pairs(), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pictures": 0}, "pictures=0"), ({"benchmark": "photo_digits", "pictures": 2}, "one question per picture")],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], message: str) -> None:
    model, processor = shipped()
    with pytest.raises(MMTokenError, match=message):
        multi_turn(model, processor, ENTRANTS, name="x", **options)


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--what", "multi-turn", "--pictures", "1", "--keeps", "8", "--compressors", "fastv"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"multi-turn-tiny-llava.json", "multi-turn-tiny-llava.md"}
    assert json.loads((tmp_path / "multi-turn-tiny-llava.json").read_text())["kind"] == "multi_turn"
    assert "FastV keep=8" in capsys.readouterr().out
