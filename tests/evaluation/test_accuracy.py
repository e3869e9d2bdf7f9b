"""Accuracy comes from plain generate(), with what the engine measured beside it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from PIL import Image

from mmtoken import attached, compress
from mmtoken.errors import MMTokenError
from mmtoken.evaluation import accuracy
from mmtoken.evaluation.accuracy import ALL, baselines, evaluate, prepare, scores
from mmtoken.evaluation.benchmarks import Item, ask, begins_with, exact_match, find, first_line
from mmtoken.evaluation.lineup import DENSE, Entrant, line_up
from mmtoken.evaluation.metrics import majority, wilson
from tests.evaluation.results import ENTRANTS, NAMES, accuracy_results, shipped

CPU = torch.device("cpu")
PICTURES = {"shapes_qa": 2, "photo_digits": 4}


def items(benchmark: str) -> list[Item]:
    return find(benchmark).load(PICTURES[benchmark])


def generated(item: Item) -> str:
    """What a user of transformers gets for one question."""
    model, processor = shipped()
    text = processor.apply_chat_template(ask(item.question), add_generation_prompt=True)
    inputs = processor(text=text, images=Image.fromarray(item.image), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return first_line(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def row(name: str) -> dict[str, Any]:
    return next(row for row in accuracy_results()["results"] if row["name"] == name)


def test_results_are_data_with_versions_split_and_titles() -> None:
    results = accuracy_results()
    assert json.loads(json.dumps(results)) == results
    assert (results["schema_version"], results["kind"], results["model"]) == (1, "accuracy", "tiny-llava")
    assert results["weights"] == "trained"
    assert results["split"] == {
        "seed": 2,
        "pictures": PICTURES,
        "questions": {name: len(items(name)) for name in PICTURES},
    }
    assert results["titles"] == {"shapes_qa": "Shapes and numbers", "photo_digits": "Digits on photographs"}
    assert results["environment"]["versions"].keys() == {"mmtoken", "torch", "transformers"}
    assert results["refused"] == {}
    assert [row["name"] for row in results["results"]] == NAMES


@pytest.mark.parametrize("benchmark", PICTURES)
def test_the_dense_row_is_what_plain_generate_answers(benchmark: str) -> None:
    asked = items(benchmark)
    given = [generated(item) for item in asked]
    found = row(DENSE)
    right = [begins_with(answer, item.answer) for answer, item in zip(given, asked, strict=True)]
    assert found["accuracy"][benchmark] == scores(asked, right)
    assert found["accuracy"][benchmark][ALL]["total"] == len(asked)
    assert sum(right) > 0, "a model that answers nothing right tells nothing"
    exact = sum(exact_match(answer, item.answer) for answer, item in zip(given, asked, strict=True)) / len(asked)
    assert found["exact_match"][benchmark] == round(exact, 3)
    assert found["compressor"] is None and found["control"] and found["keep"] == 1.0


def test_a_compressed_row_is_what_generate_answers_with_it_attached() -> None:
    asked = items("shapes_qa")
    fastv = next(entrant for entrant in ENTRANTS if entrant.key == "FastV keep=16")
    with compress(shipped()[0], fastv.compressor) as session:
        right = [begins_with(generated(item), item.answer) for item in asked]
    found = row(fastv.key)
    assert found["accuracy"]["shapes_qa"] == scores(asked, right)
    reports = session.reports
    for field in ("flops", "flops_dense", "layer_average"):
        mean = sum(getattr(report, field) for report in reports) / len(reports)
        assert found[field]["shapes_qa"] == pytest.approx(mean, rel=1e-4), field
    assert found["compressor"] == fastv.compressor.to_dict()


def test_tokens_and_flops_are_those_that_were_measured() -> None:
    dense = row(DENSE)
    assert dense["tokens_in"] == dense["tokens_out"] == dense["layer_average"] == dict.fromkeys(PICTURES, 64.0)
    assert dense["flops"] == dense["flops_dense"]
    for name, left in (("Random keep=16", 16), ("DivPrune keep=0.125", 8), ("FastV keep=0.125", 8)):
        found = row(name)
        assert found["tokens_out"] == dict.fromkeys(PICTURES, left)
        assert found["flops_dense"] == dense["flops"], name
        assert all(found["flops"][key] < dense["flops"][key] for key in PICTURES)
    # FastV reads everything in its first 2 of 8 layers.
    assert row("FastV keep=0.125")["layer_average"] == dict.fromkeys(PICTURES, (2 * 64 + 6 * 8) / 8)


def test_exact_match_stands_beside_and_never_exceeds_the_score() -> None:
    for found in accuracy_results()["results"]:
        for benchmark in PICTURES:
            assert 0 <= found["exact_match"][benchmark] <= found["accuracy"][benchmark][ALL]["accuracy"] + 1e-3


def test_every_row_is_timed_on_the_same_model() -> None:
    results = accuracy_results()
    assert results["timing"]["rounds"] == 1
    assert results["timing"]["batch"] == results["split"]["questions"]["shapes_qa"]
    for found in results["results"]:
        assert found["first_token_ms"]["count"] == found["first_token_speedup"]["count"] == 1
        assert found["first_token_ms"]["median"] > 0
    assert row(DENSE)["first_token_speedup"]["median"] == 1.0


def test_nothing_stays_attached_and_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lines: list[str] = []
        results = evaluate(
            *shipped(),
            ENTRANTS[:2],
            name="x",
            benchmarks=["photo_digits"],
            pictures=1,
            rounds=0,
            batch_size=1,
            progress=lines.append,
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert attached(shipped()[0]) is None
    assert "first_token_ms" not in results["results"][0] and results["timing"]["rounds"] == 0
    assert lines[0].startswith("accuracy: 1 of 2: dense: photo_digits ")


def test_the_size_of_a_batch_changes_no_answer() -> None:
    model, processor = shipped()
    for entrant in (ENTRANTS[0], ENTRANTS[-1]):
        one, many = (
            accuracy.answer(model, processor, entrant, prepare(find("shapes_qa"), processor, 1, size, CPU))
            for size in (3, 64)
        )
        assert one.correct == many.correct and one.exact == many.exact
        assert one.flops == pytest.approx(many.flops) and one.tokens_out == many.tokens_out


def test_every_question_is_in_exactly_one_batch_padded_on_the_left() -> None:
    prepared = prepare(find("shapes_qa"), shipped()[1], 2, 5, CPU)
    assert sorted(i for batch in prepared.batches for i in batch.index) == list(range(len(prepared.items)))
    assert max(len(batch.index) for batch in prepared.batches) == 5
    for batch in prepared.batches:
        assert (batch.inputs["attention_mask"][:, -1] == 1).all()
        assert len(batch.inputs["input_ids"]) == len(batch.index) == len(batch.inputs["pixel_values"])


def test_scores_are_counted_per_type_with_intervals() -> None:
    template = items("shapes_qa")[0]
    asked = [dataclasses.replace(template, type=kind) for kind in ("b", "a", "b", "b")]
    table = scores(asked, [1, 0, 0, 1])
    assert list(table) == [ALL, "a", "b"]
    assert (table[ALL]["correct"], table[ALL]["total"], table[ALL]["accuracy"]) == (2, 4, 0.5)
    assert (table["a"]["correct"], table["a"]["total"]) == (0, 1)
    assert table["b"]["accuracy"] == 0.6667
    assert (table["b"]["low"], table["b"]["high"]) == pytest.approx(wilson(2, 3), abs=1e-4)


def test_baselines_know_the_type_and_nothing_else() -> None:
    template = items("shapes_qa")[0]
    answers = [("a", "red"), ("a", "red"), ("a", "blue"), ("b", "1")]
    asked = [dataclasses.replace(template, type=kind, answer=answer) for kind, answer in answers]
    assert baselines(asked) == {ALL: 0.75, "a": 0.6667, "b": 1.0}
    assert majority([item.answer for item in asked]) < 0.75
    assert accuracy_results()["baselines"]["shapes_qa"] == baselines(items("shapes_qa"))


@pytest.mark.parametrize("pictures", [0, -1, {"shapes_qa": 0, "photo_digits": 3}])
def test_no_picture_is_refused(pictures: Any) -> None:
    with pytest.raises(MMTokenError, match="ask about at least 1 picture"):
        evaluate(*shipped(), [Entrant()], name="x", pictures=pictures)


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(MMTokenError, match="did you mean 'photo_digits'"):
        evaluate(*shipped(), [Entrant()], name="x", benchmarks=["photo-digits"], pictures=1)


def test_a_compressor_that_the_model_cannot_host_is_listed_with_the_reason() -> None:
    entrants = line_up([], keeps=[4], controls=["random"])
    entrants.append(Entrant(dataclasses.replace(ENTRANTS[-1].compressor, keep=4), 4))
    fastv = next(entrant.compressor for entrant in ENTRANTS if entrant.method == "FastV")
    entrants.append(Entrant(dataclasses.replace(fastv, layer=99), 16))
    results = evaluate(*shipped(), entrants, name="x", benchmarks=["photo_digits"], pictures=1, rounds=0)
    assert [found["method"] for found in results["results"]] == [DENSE, "Random", "DivPrune"]
    assert "layer=99 but this decoder has 8 layers" in results["refused"]["FastV keep=16"]
