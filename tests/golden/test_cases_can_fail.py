"""The golden tests turn red when a single number of a case is wrong, and when a tensor is passed over."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch

from tests.golden.case import HOME, METHODS, GoldenCase, find_cases

MODULES = [importlib.import_module(f"tests.golden.test_{method}") for method in METHODS]
CHECKS: dict[str, Callable[[GoldenCase], None]] = {module.METHOD: module.check for module in MODULES}
CASES = [(method, path) for method in CHECKS for path in find_cases(HOME, method)]


def fresh(case: GoldenCase) -> GoldenCase:
    """The same case with an empty ledger."""
    return dataclasses.replace(case, tensors=dict(case.tensors), read=set(), compared={}, unused=set())


def spoil(case: GoldenCase, name: str, kind: str, seed: int) -> GoldenCase:
    """The case with one index changed, or one float off by ten times its tolerance (by a millionth if exact)."""
    spoilt = fresh(case)
    value = spoilt.tensors[name] = case.tensors[name].clone()
    place = int(torch.randint(value.numel(), (), generator=torch.Generator().manual_seed(seed)))
    if value.is_floating_point():
        value.view(-1)[place] += 10 * float(case.tolerance(kind, value.view(-1)[place])) or 1e-6
    elif value.dtype == torch.bool:
        value.view(-1)[place] = ~value.view(-1)[place]
    else:
        value.view(-1)[place] += 1 if seed % 2 else -1
    return spoilt


@pytest.mark.parametrize(("method", "path"), CASES, ids=lambda value: getattr(value, "name", value))
def test_one_wrong_number_in_any_expected_tensor_turns_a_case_red(method, path):
    case = GoldenCase.load(path)
    clean = fresh(case)
    CHECKS[method](clean)
    assert set(clean.compared) == {name for name in case.tensors if case.is_expected(name)} - clean.unused
    for seed, name in enumerate(clean.compared):
        if not case.tensors[name].numel():
            continue  # nothing is merged in this round: there is no number to change
        with pytest.raises(AssertionError, match=name):
            CHECKS[method](spoil(case, name, clean.compared[name], seed))


@pytest.mark.parametrize("method", CHECKS)
def test_a_tensor_that_a_test_does_not_know_turns_a_case_red(method):
    case = GoldenCase.load(find_cases(HOME, method)[0])
    for name in ("expected.more", "input.more"):
        spoilt = fresh(case)
        spoilt.tensors[name] = torch.zeros(1)
        with pytest.raises(AssertionError, match=f"neither read nor compared: .*{name}"):
            CHECKS[method](spoilt)


def test_a_tensor_that_is_left_out_needs_a_reason():
    case = GoldenCase({"tensors": {"input.a": {}}}, {"input.a": torch.zeros(1)})
    with pytest.raises(AssertionError, match="neither read nor compared"):
        case.settle()
    with pytest.raises(AssertionError, match="needs a reason"):
        case.settle({"input.a": ""})
    case.settle({"input.a": "a remark of the file's maker"})


def test_an_expected_value_cannot_be_taken_as_an_input():
    case = GoldenCase({}, {"expected.kept": torch.zeros(1)})
    with pytest.raises(AssertionError, match="expected value"):
        case.take("expected.kept")


def test_a_not_a_number_on_either_side_turns_a_case_red():
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    for expected, value in ((nan, one), (one, nan), (nan, nan)):
        case = GoldenCase({"tolerance": {"values": "atol 1e-5"}}, {"expected.a": expected})
        with pytest.raises(AssertionError, match=r"expected\.a"):
            case.compare("expected.a", value, "values")
