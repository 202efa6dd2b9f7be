"""Choice of backend: by device, by the environment variable, and clear errors for what cannot be served."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hf_lowmem_optim.kernels import backend
from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE, choose_backend

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def installed(monkeypatch):
    """Say which of triton and numba are installed."""

    def say(*modules: str) -> None:
        monkeypatch.setattr(backend, "_importable", lambda module: module in modules)

    return say


def test_choice_by_device(installed):
    installed("triton", "numba")
    assert choose_backend("op", CPU) == "cpu"
    assert choose_backend("op", CUDA) == "triton"
    assert choose_backend("op", MPS) == "reference"
    assert choose_backend("op", CPU, unsupported={"cpu": "why"}) == "reference"
    assert choose_backend("op", CUDA, unsupported={"triton": "why"}) == "reference"
    installed()
    assert choose_backend("op", CPU) == choose_backend("op", CUDA) == "reference"


def test_override_is_read_at_each_call(installed, monkeypatch):
    installed("triton", "numba")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose_backend("op", CPU) == choose_backend("op", CUDA) == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("op", CPU) == "triton"
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert choose_backend("op", CPU) == "cpu"


@pytest.mark.parametrize(
    ("value", "device", "modules", "says"),
    [
        ("cuda", CPU, ("numba",), "names no backend: set it to one of reference, triton, cpu"),
        ("cpu", CPU, (), r"needs the package numba.*pip install 'hf-lowmem-optim\[cpu\]'"),
        ("triton", CUDA, (), r"needs the package triton.*pip install 'hf-lowmem-optim\[gpu\]'"),
        ("triton", CPU, ("triton",), "cannot serve my_op on tensors on cpu.*TRITON_INTERPRET=1"),
        ("cpu", CUDA, ("numba",), "cannot serve my_op on tensors on cuda"),
        ("cpu", CPU, ("numba",), "cannot serve this call of my_op: odd blocks"),
    ],
)
def test_unservable_request_raises(installed, monkeypatch, value, device, modules, says):
    installed(*modules)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises((ValueError, ImportError), match=rf"(?s){ENVIRONMENT_VARIABLE}='{value}'.*{says}"):
        choose_backend("my_op", device, unsupported={"cpu": "odd blocks"})


def test_importing_the_kernels_imports_neither_triton_nor_numba():
    code = (
        "import sys, hf_lowmem_optim.kernels.backend, hf_lowmem_optim.kernels\n"
        "assert not {'triton', 'numba'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numba_leaves_torchs_number_of_threads_alone():
    pytest.importorskip("numba")
    code = """
import torch
from hf_lowmem_optim.optimizers import MicroAdam
for threads in (1, 2):
    torch.set_num_threads(threads)
    weight = torch.nn.Parameter(torch.ones(300, 300))
    weight.grad = torch.ones(300, 300)
    MicroAdam([weight]).step()
    assert torch.get_num_threads() == threads, torch.get_num_threads()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_LOWMEM_OPTIM_BACKEND": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
