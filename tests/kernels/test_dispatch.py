"""Which implementation is chosen, and the tally of what ran."""

from __future__ import annotations

import threading

import pytest
import torch

from mmtoken.errors import InputError, UnsupportedError
from mmtoken.kernels import dispatch
from mmtoken.kernels.dispatch import choose, ran, ran_since, using

X = torch.zeros(3)


def test_auto_is_torch_on_the_cpu_even_where_kernels_can_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("op", X, None) == "torch"


@pytest.mark.parametrize("present", [True, False])
def test_auto_on_a_device_depends_on_the_package(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON", present)
    assert dispatch._decide("auto", True) == ("triton" if present else "torch")


def test_one_tensor_off_the_device_is_enough_for_torch() -> None:
    class OnDevice:
        is_cuda = True

    assert choose("op", OnDevice(), None) == "triton"  # type: ignore[arg-type]
    assert choose("op", OnDevice(), X) == "torch"  # type: ignore[arg-type]


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match=r"impl='triton'.*TRITON_INTERPRET=1"):
        choose("op", X, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("op", X, impl="triton") == "triton"


def test_triton_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON", False)
    with pytest.raises(UnsupportedError, match="triton is not installed"):
        choose("op", X, impl="triton")


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(InputError, match=r"impl='cuda'.*'auto', 'torch', 'triton'"):
        choose("op", X, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="impl='cuda'"), using("cuda"):  # type: ignore[arg-type]
        pass


def test_using_decides_for_auto_only_and_ends_with_the_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with using("triton"):
        assert choose("op", X) == "triton"
        assert choose("op", X, impl="torch") == "torch"
        with using("torch"):
            assert choose("op", X) == "torch"
        assert choose("op", X) == "triton"
    with pytest.raises(RuntimeError), using("triton"):
        raise RuntimeError
    assert choose("op", X) == "torch"


def test_using_and_the_tally_are_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = ran()
    found = []

    def other() -> None:
        start = ran()
        found.extend([choose("other", X), ran_since(start)])

    with using("triton"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == ["torch", {"other": "torch"}]
    assert ran_since(before) == {}


def test_the_tally_names_every_implementation_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choose("earlier", X)
    before = ran()
    choose("one", X)
    choose("both", X, impl="triton")
    choose("both", X)
    choose("both", X)
    assert ran_since(before) == {"one": "torch", "both": "torch+triton"}
    assert ran()["both", "torch"] - before["both", "torch"] == 2


def test_what_torch_compile_traces_is_not_counted_and_does_not_break_the_graph() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if choose("traced", x) == "torch" else 3)

    before = ran()
    assert torch.equal(torch.compile(double, fullgraph=True, backend="eager")(X + 1), X + 2)
    assert ran_since(before) == {}
