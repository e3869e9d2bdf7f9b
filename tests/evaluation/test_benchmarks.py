"""What is asked, how an answer is read, and when it counts."""

from __future__ import annotations

import pytest

from mmtoken.errors import MMTokenError
from mmtoken.evaluation.benchmarks import BENCHMARKS, ask, begins_with, exact_match, find, first_line


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("red", "red"),
        (" Red.\nBecause it is.", "red"),
        ("\n\n  two   circles \n", "two circles"),
        ("3 .", "3"),
        ("a.b..", "a.b."),
        ("\t", ""),
        ("", ""),
    ],
)
def test_an_answer_is_the_first_line_with_something_on_it(text: str, answer: str) -> None:
    assert first_line(text) == answer


def test_an_exact_match_is_equality() -> None:
    assert exact_match("red", "red") == 1
    assert exact_match("red ", "red") == exact_match("Red", "red") == exact_match("", "red") == 0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("white", "white", 1),
        ("white orange", "white", 1),
        ("white, orange", "white", 1),
        ("whitewash", "white", 0),
        ("off white", "white", 0),
        ("7", "7", 1),
        ("73", "7", 1),  # digit by digit: the model did not stop
        ("37", "7", 0),
        ("419", "41", 1),
        ("4", "41", 0),
        ("", "white", 0),
        ("", "7", 0),
    ],
)
def test_an_answer_counts_by_how_it_begins(answer: str, expected: str, score: int) -> None:
    assert begins_with(answer, expected) == score


def test_a_prompt_is_one_user_turn_with_the_picture_first() -> None:
    (turn,) = ask("read the number.")
    assert turn["role"] == "user"
    assert turn["content"] == [{"type": "image"}, {"type": "text", "text": "read the number."}]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_gives_the_same_held_out_items_every_time(name: str) -> None:
    benchmark = find(name)
    items, again = benchmark.load(2), benchmark.load(2)
    assert benchmark.name == name and len(items) >= 2
    for item, other in zip(items, again, strict=True):
        assert (item.question, item.answer, item.type) == (other.question, other.answer, other.type)
        assert (item.image == other.image).all()
        assert item.image.dtype == "uint8" and item.image.shape[2] == 3
        # The right answer, as a model writes it, counts.
        assert benchmark.score(benchmark.parse(f"{item.answer.capitalize()}."), item.answer) == 1
    assert len({item.image.tobytes() for item in items}) == 2


def test_more_pictures_begin_with_the_same_ones() -> None:
    few, many = (find("shapes_qa").load(count) for count in (1, 2))
    assert [item.question for item in many[: len(few)]] == [item.question for item in few]


def test_an_unknown_benchmark_is_refused_with_near_names() -> None:
    with pytest.raises(MMTokenError, match="benchmark='shapes-qa' is unknown; did you mean 'shapes_qa'"):
        find("shapes-qa")
