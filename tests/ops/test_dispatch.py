"""Choice of backend: by device, by the environment variable, and clear errors for what cannot be served."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops import dispatch
from hf_lowmem_optim.ops.dispatch import ENVIRONMENT_VARIABLE, Op, chosen_backend, register
from tests.ops.backends import FAST

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
Installed = Callable[..., None]
Which = Op[[Sequence[Tensor], int], str]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Say which of triton and numba are installed."""

    def say(*modules: str) -> None:
        def loaded(backend: str) -> str | None:
            package = dispatch._PACKAGE[backend]
            return None if package in modules else f"{package} is not installed"

        monkeypatch.setattr(dispatch, "_loaded", loaded)
        dispatch._resolve.cache_clear()

    yield say
    dispatch._resolve.cache_clear()


def test_choice_by_device_and_by_the_variable_at_each_call(installed: Installed, monkeypatch: Any) -> None:
    installed()
    assert chosen_backend(CPU) == chosen_backend(CUDA) == "reference"
    installed("triton", "numba")
    assert [chosen_backend(device) for device in (CPU, CUDA, MPS)] == ["cpu", "triton", "reference"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert chosen_backend(CPU) == chosen_backend(CUDA) == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, " triton ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen_backend(CPU) == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert chosen_backend(CPU) == "cpu"


@pytest.mark.parametrize(
    ("value", "device", "modules", "says"),
    [
        ("cuda", CPU, ("numba",), "names no backend: set it to one of reference, triton, cpu"),
        ("cpu", CPU, (), r"needs the package numba.*pip install 'hf-lowmem-optim\[cpu\]'"),
        ("triton", CUDA, (), r"needs the package triton.*pip install 'hf-lowmem-optim\[gpu\]'"),
        ("triton", CPU, ("triton",), "cannot serve tensors on cpu.*TRITON_INTERPRET=1"),
        ("cpu", CUDA, ("numba",), "cannot serve tensors on cuda"),
    ],
)
def test_unservable_request_raises(
    value: str, device: torch.device, modules: Sequence[str], says: str, installed: Installed, monkeypatch: Any
) -> None:
    installed(*modules)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises((ValueError, ImportError), match=rf"(?s){ENVIRONMENT_VARIABLE}='{value}'.*{says}"):
        chosen_backend(device)


@pytest.fixture
def which(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> Which:
    """An operation that returns which version served the call; numba's has no time for odd numbers."""
    installed("triton", "numba")
    monkeypatch.setattr(dispatch, "_VERSIONS", {})

    @Op
    def which(tensors: Sequence[Tensor], number: int) -> str:
        """Return it."""
        return "torch"

    @register(which, "cpu", why_not=lambda tensors, number: "odd number" if number % 2 else None)
    def on_cpu(tensors: Sequence[Tensor], number: int) -> str:
        return "numba"

    return which


def test_an_operation_takes_the_version_that_serves_the_call(which: Which, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(1)]
    assert which(tensors, 2) == which(tensors[0], 2) == "numba"
    assert which(tensors, 3) == "torch"
    assert which(tensors, number=3) == "torch"
    assert which([torch.zeros(1, device="meta")], 2) == "torch"
    assert which.__doc__ == "Return it." and which.name == "which"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    assert which(tensors, 2) == "numba"
    with pytest.raises(ValueError, match=r"BACKEND='cpu' cannot serve this call of which: odd number; set 'reference'"):
        which(tensors, 3)
    # one that has no version for an operation is no reason to refuse it
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert which(tensors, 3) == "torch"
    register("which", "triton")(lambda tensors, number: "by name")
    assert which(tensors, 3) == "by name"


def test_a_torch_version_of_parts_serves_what_was_asked_of_their_backend(
    which: Which, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_COMPOSED", set())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    whole = register(which, "triton", why_not=lambda tensors, number: "odd" if number % 2 else None, composed=True)
    whole(lambda tensors, number: "whole")
    assert [which([torch.zeros(1)], number) for number in (2, 3)] == ["whole", "torch"]


@pytest.mark.parametrize("backend", FAST)
def test_every_operation_has_its_faster_versions(backend: str) -> None:
    """Or the tests that compare backends would compare torch with itself."""
    files = ("block_quant", "block_topk", "low_rank", "sparse_window")
    modules = [importlib.import_module(f"hf_lowmem_optim.ops.{file}") for file in files]
    found = [(module, value) for module in modules for value in vars(module).values() if isinstance(value, Op)]
    ops = {value.name for module, value in found if value.torch_version.__module__ == module.__name__}
    assert len(ops) == 8
    assert dispatch._loaded(backend) is None
    without = {"_orthonormal_columns"} if backend == "cpu" else set()
    assert {name for name in ops if (name, backend) not in dispatch._VERSIONS} == without


def test_a_package_that_cannot_be_imported_is_told_and_done_without(monkeypatch: Any, caplog: Any) -> None:
    def fail(name: str) -> None:
        raise ImportError("no driver")

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    problem = dispatch._loaded.__wrapped__("triton")
    assert problem == "triton cannot be imported (no driver)"
    assert "compute with plain torch" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch._loaded.__wrapped__("cpu") == "numba is not installed"
