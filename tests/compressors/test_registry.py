"""Compressors by name, as a dict, and by class path."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

from mmtoken.compressors import Compressor, DivPrune, FastV, PyramidDrop, Random, VisionZip
from mmtoken.compressors.registry import COMPRESSORS, facts, facts_of, names, resolve
from mmtoken.errors import KeepError, MMTokenError, UnknownNameError
from mmtoken.tokens import VisualTokens


@dataclass(frozen=True)
class Outsider(Compressor):
    """A compressor of somebody else."""

    keep: int | float = 0.5
    positions: str = "keep"
    layers: tuple[int, ...] = (1, 2)

    def llm_input(self, tokens: VisualTokens, ctx: object) -> VisualTokens:
        return tokens


class NoDataclass(Compressor):
    """Has no settings to be made from."""


HERE = __name__


@pytest.mark.parametrize("cls", COMPRESSORS, ids=lambda cls: cls.__name__)
def test_every_compressor_is_found_by_its_name_however_it_is_written(cls):
    name = cls.__name__
    dashed = "".join(f"-{letter}" if letter.isupper() and i else letter for i, letter in enumerate(name)).lower()
    for spec in (name, name.lower(), name.upper(), dashed, dashed.replace("-", "_"), f"mmtoken.compressors.{name}"):
        assert type(resolve(spec, keep=1.0)) is cls


def test_names_are_the_class_names_in_lower_case():
    assert list(names()) == [cls.__name__.lower() for cls in COMPRESSORS]


def test_an_instance_is_passed_through_and_settings_go_on_top():
    method = PyramidDrop(keep=0.3, layers=(1, 3), shares=(0.6, 0.3))
    assert resolve(method) is method
    assert resolve(method, positions="renumber") == dataclasses.replace(method, positions="renumber")


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "FastV", "init_args": {"keep": 7, "layer": 3}},
        {"class_path": "fastv", "init_args": {"keep": 7, "layer": 3}},
        {"class_path": "mmtoken.compressors.FastV", "init_args": {"keep": 7, "layer": 3}},
        {"class_path": "mmtoken.compressors.fastv.FastV", "init_args": {"keep": 7, "layer": 3}},
    ],
)
def test_the_form_of_yaml_files_is_read(spec):
    assert resolve(spec) == FastV(keep=7, layer=3)
    assert resolve(spec, keep=9) == FastV(keep=9, layer=3)


def test_no_arguments_mean_the_defaults():
    assert (
        resolve({"class_path": "visionzip"}) == resolve({"class_path": "visionzip", "init_args": None}) == VisionZip()
    )


@pytest.mark.parametrize("cls", COMPRESSORS, ids=lambda cls: cls.__name__)
def test_settings_go_to_a_dict_and_back(cls):
    method = cls(keep=1.0)
    assert resolve(method.to_dict()) == method


def test_lists_of_yaml_become_hashable_settings():
    spec = {"class_path": "pyramiddrop", "init_args": {"keep": 0.3, "layers": [1, 3], "shares": [0.6, 0.3]}}
    method = resolve(spec)
    assert method == PyramidDrop(keep=0.3, layers=(1, 3), shares=(0.6, 0.3)) and hash(method)


@pytest.mark.parametrize(
    ("name", "near"), [("fastvv", "fastv"), ("vision zip", "visionzip"), ("divprun", "divprune"), ("Tome2", "tome")]
)
def test_an_unknown_name_lists_near_ones_and_all(name, near):
    with pytest.raises(UnknownNameError, match=f"did you mean .*'{near}'") as error:
        resolve(name)
    assert f"compressor={name!r}" in str(error.value)
    assert all(known in str(error.value) for known in names())


@pytest.mark.parametrize("name", ["", "qwertz", "mmtoken.compressors.Nothing", "ABC123", "mmtoken.compressors."])
def test_a_name_like_no_other_lists_all(name):
    with pytest.raises(UnknownNameError, match=r"Known: .*fastv") as error:
        resolve(name)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "spec", [None, 3, [], {}, {"init_args": {}}, {"class_path": None}, {"class_path": FastV}, FastV]
)
def test_what_names_no_compressor_at_all_is_refused(spec):
    with pytest.raises(MMTokenError, match="give an instance, a name, or a dict with 'class_path'"):
        resolve(spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "fastv", "keep": 3},
        {"class_path": "fastv", "init_args": [3]},
        {"class_path": "fastv", "init_args": "keep"},
    ],
)
def test_a_dict_with_other_entries_is_refused(spec):
    with pytest.raises(MMTokenError, match="has entries other than 'class_path' and 'init_args'"):
        resolve(spec)


def test_an_unknown_setting_lists_near_ones():
    for settings in ({"kep": 3}, {"Keep": 3}):
        with pytest.raises(MMTokenError, match=r"(kep|Keep)=3 is no setting of FastV; did you mean 'keep'.*layer"):
            resolve("fastv", **settings)
    with pytest.raises(MMTokenError, match=r"7=3 is no setting of FastV"):
        resolve({"class_path": "fastv", "init_args": {7: 3}})
    with pytest.raises(MMTokenError, match=r"layr=3 is no setting of FastV; did you mean 'layer'"):
        resolve(FastV(), layr=3)


@pytest.mark.parametrize("name", ["random", "uniformgrid", "downscale"])
def test_a_control_without_a_budget_is_told_to_give_one(name):
    with pytest.raises(MMTokenError, match=r"keep is missing: .* give for example keep=0\.25"):
        resolve(name)


def test_a_bad_budget_of_a_file_is_an_error_of_its_field():
    with pytest.raises(KeepError, match="keep='16'"):
        resolve({"class_path": "fastv", "init_args": {"keep": "16"}})


def test_a_class_of_an_imported_module_is_found_and_round_trips():
    method = Outsider(keep=3, layers=[4, 5])
    assert method.to_dict()["class_path"] == f"{HERE}.Outsider"
    made = resolve(method.to_dict())
    assert type(made) is Outsider and made.keep == 3 and list(made.layers) == [4, 5]


@pytest.mark.parametrize("name", ["NoDataclass", "HERE", "Nothing", "Compressor", "DivPruneX"])
def test_what_is_no_finished_compressor_of_an_imported_module_is_refused(name):
    with pytest.raises(UnknownNameError, match=rf"class_path='{HERE}\.{name}' is no Compressor"):
        resolve(f"{HERE}.{name}")


def test_a_module_that_is_not_imported_is_refused_and_stays_unimported(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('was imported')\n")
    code = (
        "import sys\n"
        "from mmtoken.compressors.registry import resolve\n"
        "from mmtoken.errors import UnknownNameError\n"
        "try:\n"
        "    resolve({'class_path': 'evil.Compressor'})\n"
        "except UnknownNameError as error:\n"
        "    print('import it first' in str(error), 'evil' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"},
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_a_module_that_loads_its_parts_lazily_is_not_asked_for_them(monkeypatch):
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = lambda name: pytest.fail(f"{name} would be imported")
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    with pytest.raises(UnknownNameError, match=r"class_path='lazy\.DivPrune' is no Compressor"):
        resolve({"class_path": "lazy.DivPrune"})


def test_facts_have_a_full_row_per_compressor():
    rows = facts()
    assert [row["name"] for row in rows] == list(names())
    assert len({tuple(row) for row in rows}) == 1
    assert all(isinstance(value, str) and value for row in rows for value in row.values())
    by_name = {row["name"]: row for row in rows}
    assert by_name["fastv"]["sees the question"] == "yes" and by_name["divprune"]["sees the question"] == "no"
    assert by_name["random"]["kind"] == "control" and by_name["tome"]["kind"] == "method"
    assert by_name["downscale"]["budget"] == "at most" and by_name["downscale"]["keep=1.0"] != "bit-identical"
    assert by_name["divprune"]["needs"] == "features only"
    fastv = by_name["fastv"]
    assert fastv["year"] == "2024" and fastv["parity"] == "official code" and fastv["positions"] == "keep or renumber"
    assert by_name["downscale"]["sites"] == "prepare, llm_input"  # in the order in which a model reaches them
    assert by_name["tome"]["cost"] == "pairs" and "CC-BY-NC" in by_name["tome"]["licence"]


@pytest.mark.parametrize(
    ("facts_of_class", "expected"),
    [
        ({}, {"streaming-legal": "yes", "sees the question": "no", "trainable": "no", "cost": "rows"}),
        ({"causal": False}, {"streaming-legal": "no", "sees the question": "no"}),
        ({"query_agnostic": False}, {"streaming-legal": "no", "sees the question": "yes"}),
        ({"trainable": True, "cost": "pairs"}, {"trainable": "yes", "cost": "pairs"}),
        (
            {"identity_at_full": "merges always", "budget": "at_most"},
            {"keep=1.0": "merges always", "budget": "at most"},
        ),
        ({"parity": "official code", "licence": "MIT"}, {"parity": "official code", "licence": "MIT"}),
    ],
)
def test_a_row_says_what_the_class_says(facts_of_class, expected):
    about = {"title": "X", "paper": "Y", "year": 2026, **facts_of_class}
    row = facts_of("x", dataclass(frozen=True)(type("X", (Outsider,), about)))
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("name", names())
def test_the_positions_of_a_row_are_those_that_the_class_takes(name):
    cls = names()[name]
    default = resolve(name, keep=0.25) if cls.control else cls()
    for choice in ("keep", "renumber"):
        if choice in facts_of(name, cls)["positions"].split(" or "):
            assert dataclasses.replace(default, positions=choice).positions == choice
        else:
            with pytest.raises(MMTokenError, match="positions="):
                dataclasses.replace(default, positions=choice)


def test_the_default_positions_come_first():
    about = {"__annotations__": {"positions": str}, "positions": "renumber", "title": "", "paper": "", "year": 2026}
    assert facts_of("x", dataclass(frozen=True)(type("X", (Outsider,), about)))["positions"] == "renumber or keep"


def test_instances_serve_as_keys():
    assert len({DivPrune(keep=4), DivPrune(keep=4), DivPrune(keep=5), Random(keep=4)}) == 3
