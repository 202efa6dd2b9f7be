"""What an optimizer says that a step allocates, against what the allocator saw, in the first step and in later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from temporaries import peak_bytes
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, plan_optimizer
from hf_lowmem_optim.kernels import gram_solve, subspace_adam
from hf_lowmem_optim.memory.plan import plan_temporaries
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.preconditioned import system_bytes
from hf_lowmem_optim.preconditioners.ggt import ggt_weights
from hf_lowmem_optim.preconditioners.mfac import mfac_weights

#: Slices of constant size that rounding and mixed dtypes need on the CPU.
SLICES = 2**18
#: Without numba the reference works, in slices.
WITH_NUMBA = ("ldadam", "microadam", "sparse_mfac", "sparse_ggt")
#: What differs on a GPU besides.
ON_GPU = (("microadam", {"density": 0.04, "window": 20}), ("ldadam", {"error_feedback": "fp32"}))
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ldadam": [
        {},
        {"rank": 64},
        {"error_feedback": "4bit"},
        {"error_feedback": "grad"},
        {"error_feedback": "none"},
        {"state_dtype": "param"},
        {"weight_rounding": "stochastic"},
        {"rank": None, "dense_state": "8bit"},
        {"rank": None, "dense_state": "8bit", "weight_rounding": "stochastic"},
        {"rank": None, "dense_state": "param", "weight_rounding": "stochastic"},
        {"rank": None, "dense_state": "fp32", "weight_rounding": "stochastic"},
    ],
    "ldadam_layerwise": [{"rank": None, "dense_state": "fp32"}],
    "microadam": [{}, {"weight_rounding": "stochastic"}],
    "lowrank_mfac": [
        {},
        {"weight_rounding": "stochastic"},
        {"rank": 16},
        {"error_feedback": "fp32"},
        {"momentum": 0.9},
        {"window": 200},
    ],
    "sparse_mfac": [{}, {"weight_rounding": "stochastic"}, {"momentum": 0.9, "weight_decay": 0.1}, {"window": 200}],
    "sparse_ggt": [{}, {"momentum": 0.9}, {"window": 200}],
}


def with_dtypes(*cases: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Each case, which begins with name and settings, in either dtype; float32 weights take no rounding."""
    dtypes = (torch.float32, torch.bfloat16)
    return [
        (*case, dtype) for case in cases for dtype in dtypes if dtype.itemsize < 4 or "weight_rounding" not in case[1]
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's profiler sees what the calling thread allocates; with one thread, that is all there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "hyper", "backend", "dtype"),
    with_dtypes(
        *((name, hyper, None) for name in OPTIMIZERS for hyper in SETTINGS.get(name, [{}])),
        *(("ldadam", hyper, "reference") for hyper in SETTINGS["ldadam"] if hyper.get("rank", 0) is not None),
    ),
)
@pytest.mark.parametrize(
    "shapes", [((256, 512), (1024, 256), (1024, 256)), ((1024, 2048),), ((40, 200), (30,)), ((160, 192),) * 7], ids=str
)
def test_the_description_bounds_what_is_allocated_closely(
    name: str,
    hyper: dict[str, Any],
    backend: str | None,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in WITH_NUMBA:
        pytest.importorskip("numba")
    if hyper.get("dense_state") == "8bit":
        pytest.importorskip("bitsandbytes")
    if backend is not None:  # torch's own operations
        monkeypatch.setattr(subspace_adam, "choose_backend", lambda *_: backend)
    # numba's takes two matrices, which the last test of this file bounds
    monkeypatch.setattr(gram_solve, "serves", lambda *_: False)
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = OPTIMIZERS[name].optimizer_class(weights, **hyper)
    gradient_bytes = sum(weight.nbytes for weight in weights)

    def set_gradients() -> None:
        for weight in weights:
            weight.grad = torch.randn_like(weight)

    def step() -> None:
        # here, so that the count knows the gradients that a step frees
        set_gradients()
        optimizer.step()

    first = peak_bytes(step) - gradient_bytes - plan_optimizer(optimizer).total_bytes
    for weight in weights:
        weight.grad = None
    if hyper.get("error_feedback") == "grad":
        # the buffers of the gradients are there, and fresh gradients are gone before the updates begin
        set_gradients()
        later = peak_bytes(optimizer.step)
    else:
        later = peak_bytes(step) - gradient_bytes
    peaks = [first, later]
    planned = plan_temporaries(type(optimizer), optimizer.param_groups)
    assert planned is not None
    assert max(peaks) <= planned + SLICES
    # Numba spares what torch's operations need, and an eigendecomposition allocates for itself, which torch does not
    # see: there it bounds, but not closely. Else, rows of weights are kept from call to call.
    if (name != "ldadam" or backend is not None) and not (name == "sparse_ggt" and "window" in hyper):
        assert planned <= 1.2 * max(peaks) + 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "hyper", "dtype"),
    with_dtypes(
        *((name, hyper) for name in SETTINGS for hyper in SETTINGS[name] if hyper.get("rank", 0) is not None), *ON_GPU
    ),
)
@pytest.mark.parametrize("shapes", [((1024, 512),) * 6, ((2048, 4096),)], ids=str)
def test_the_description_is_what_a_gpu_allocates(
    name: str, hyper: dict[str, Any], dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> None:
    def build() -> LowMemoryOptimizer:
        weights = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        return OPTIMIZERS[name].optimizer_class(weights, **hyper)

    warm = build()  # libraries take their workspaces once
    for _ in range(2):
        warm.step()
    optimizer = build()
    planned = plan_temporaries(type(optimizer), optimizer.param_groups)
    assert planned is not None
    first = peak_bytes(optimizer.step, "cuda") - plan_optimizer(optimizer).total_bytes
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.randn_like(weight)
    peak = max(first, peak_bytes(optimizer.step, "cuda"))
    # libraries' workspaces do not count; nor do gradients that a step frees before it begins
    workspaces = 2**21
    assert peak <= 1.02 * planned + workspaces
    assert planned <= 1.2 * peak + workspaces or hyper.get("error_feedback") == "grad"


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("solver", [mfac_weights, ggt_weights])
@pytest.mark.parametrize("window", [100, 200])
def test_solving_a_system_stays_within_its_bound(
    solver: Callable[..., torch.Tensor], dependent: bool, window: int
) -> None:
    """Also where gradients repeat, which M-FAC solves otherwise, and where numba does; there are some vectors, too."""
    rows = torch.randn(window, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[0] if dependent else rows[1]
    gram = rows @ rows.T
    peak = peak_bytes(lambda: solver(gram, 3, damping=1e-5))
    assert gram.nbytes < peak <= system_bytes(window) + 12 * 8 * window
