"""The cards of the compressors at the root say what the classes and results say, and their presets load."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmtoken.cli.parser import Parser, add_compressor, take_compressor
from mmtoken.compressors.registry import names, resolve
from mmtoken.evaluation import kernel_cards
from mmtoken.evaluation.cards import CONTROL, CONTROL_KEEP, contents
from mmtoken.kernels.cases import operations

CARDS = Path(__file__).parents[1] / "compressors"

every = pytest.mark.parametrize("name", names())


def test_every_compressor_has_a_folder_and_every_folder_a_compressor() -> None:
    assert {place.name for place in CARDS.iterdir()} == set(names())


@every
def test_cards_are_generated(name: str) -> None:
    """Out of date? Run `mmtoken list compressors --cards compressors`."""
    for file, text in contents(name, names()[name], CARDS / name).items():
        assert (CARDS / name / file).read_text() == text, file


@every
def test_folders_hold_nothing_but_their_card_preset_and_results(name: str) -> None:
    files = {file.name for file in (CARDS / name).iterdir()}
    always = {"README.md", "preset.yaml"}
    assert (
        always <= files <= {*always, "results.json", "video.md", "video.png", "control.json", "control.png", *CONTROL}
    )


@every
def test_presets_are_the_defaults_and_load_by_the_registry_and_the_command_line(name: str) -> None:
    cls, file = names()[name], CARDS / name / "preset.yaml"
    default = resolve(name, keep=CONTROL_KEEP) if cls.control else cls()
    assert resolve(yaml.safe_load(file.read_text())) == default
    parser = Parser("test", "")
    add_compressor(parser)
    assert take_compressor(parser, ["--compressor", str(file)])[1] == default
    if cls.sites != {"cache"}:  # whose entries have their positions already
        other = "keep" if default.positions == "renumber" else "renumber"
        changed = take_compressor(parser, ["--compressor", str(file), "--compressor.positions", other])[1]
        assert changed == resolve(default, positions=other) != default


def test_every_operation_has_a_card_as_generated() -> None:
    """Out of date? Run `python -m mmtoken.evaluation.kernel_cards kernels`."""
    root = CARDS.parent / "kernels"
    found = {place.relative_to(root).as_posix(): place.read_text() for place in root.rglob("*") if place.is_file()}
    assert found == {f"{name}/README.md": kernel_cards.card(operation) for name, operation in operations().items()}
