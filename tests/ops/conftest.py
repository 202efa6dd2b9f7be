"""Tests of operations: Triton's interpreter, repaired, unless the run says that kernels are to be compiled for a GPU.

``TRITON_INTERPRET=0 pytest -m gpu tests/ops`` runs the same cases on the device, and ``EMULATE=sm80 pytest tests/ops``
without one, on ``emulator``. Tests that compile kernels ahead
of time do it in a subprocess without the variable.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

if os.environ["TRITON_INTERPRET"] == "1" and "EMULATE" not in os.environ and importlib.util.find_spec("triton"):
    from tests.ops import interpreter

    interpreter.enable()


@pytest.fixture(autouse=True)
def _backend_is_installed(request: pytest.FixtureRequest) -> None:
    """Skip the cases of a backend whose package is not there; the torch version's always run."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    module = {"triton": "triton", "cpu": "numba"}.get(parameters.get("backend"))  # type: ignore[arg-type]
    if module and not importlib.util.find_spec(module):
        pytest.skip(f"{module} is not installed")


@pytest.fixture(autouse=True)
def _no_backend_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable set by whoever runs the tests must not decide which code they exercise."""
    monkeypatch.delenv("HF_LOWMEM_OPTIM_BACKEND", raising=False)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Have a backend serve what follows; returns the device of its tensors."""
    from tests.ops.backends import device_of

    def choose(backend: str) -> str:
        monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
        return device_of(backend)

    return choose
