"""A file appears whole or not at all, and a place where none can be written is refused before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmtoken.errors import InputError
from mmtoken.wholefile import check_target, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_takes_its_name_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    with whole_file(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".json"
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert names(tmp_path) == ["result.json"]


def test_others_may_read_the_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "page.html") as temporary:
        temporary.write_text("hello")
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(failure), whole_file(str(target)) as temporary:
        temporary.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_a_finished_block_replaces_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old and longer than the new one")
    with target.open() as reader:
        with whole_file(target) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old and longer than the new one"  # whoever reads meanwhile sees no mixture
    assert target.read_text() == "new"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    with whole_file(target) as first, whole_file(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # it ended last
    assert names(tmp_path) == ["result.json"]


def test_a_place_that_can_be_written_to_comes_back_as_a_path(tmp_path: Path) -> None:
    target = tmp_path / "overlay.png"
    assert check_target(str(target), "overlay", ".png") == target
    target.write_bytes(b"old")
    assert check_target(target, "overlay", ".png") == target
    assert target.read_bytes() == b"old"
    assert check_target(tmp_path / "any", "out") == tmp_path / "any"


def test_a_place_that_cannot_be_written_to_is_refused_with_field_value_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(path: Path, suffix: str = "") -> str:
        with pytest.raises(InputError) as caught:
            check_target(path, "overlay", suffix)
        assert f"overlay={str(path)!r}" in str(caught.value)
        return str(caught.value)

    assert "give a name that ends in .png" in message(tmp_path / "overlay.jpg", ".png")
    assert "is a directory; give the name of a file" in message(tmp_path)
    assert "does not exist; make it first" in message(tmp_path / "no" / "overlay.png")
    (tmp_path / "file").write_text("")
    assert "does not exist" in message(tmp_path / "file" / "overlay.png")
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    assert "cannot be written to; give another one" in message(tmp_path / "overlay.png")
    assert names(tmp_path) == ["file"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deeper" / "model"
    for text in ("first", "second"):
        with whole_folder(target) as whole:
            (whole / f"{text}.txt").write_text(text)
            assert not (target / f"{text}.txt").exists()
        assert names(target) == [f"{text}.txt"]
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_folder(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(failure), whole_folder(target) as whole:
        (whole / "new.txt").write_text("half")
        raise failure
    assert names(target) == ["old.txt"] and names(tmp_path) == ["model"]
