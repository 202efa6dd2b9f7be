"""A column of the damped inverse of a Gram matrix, against its definition and on what could break it."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowmem_optim.kernels import gram_solve
from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE, Backend, implementation
from hf_lowmem_optim.kernels.gram_solve import CPU_MAX_SIZE, damped_inverse_column

BACKENDS = ["reference", "cpu"]


def gram_of(size: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(size, 2 * size + 3)) * 10.0 ** generator.integers(-6, 6, size=(size, 1))
    return torch.tensor(rows @ rows.T)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    size=st.integers(1, 40) | st.sampled_from([CPU_MAX_SIZE, CPU_MAX_SIZE + 1]),
    shift=st.sampled_from([0.0, 1e-9, 1e-3, 1e3]),
    zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_a_column_of_the_inverse(backend: str, size: int, shift: float, zero: bool, seed: int) -> None:
    gram, column = gram_of(size, seed), seed % size
    if zero:  # a row that was not written yet
        gram[0] = gram[:, 0] = 0
    before = gram.clone()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        found, pivot = damped_inverse_column(gram, column, shift)
    assert torch.equal(gram, before)
    alive = gram.diagonal() > 0
    assert not found[~alive].any()
    # scaled to a diagonal of ones, or the definition itself would lose digits
    scale = torch.where(alive, gram.diagonal(), 1.0).rsqrt()
    unit = gram * scale * scale[:, None] + torch.diag(torch.where(alive, shift * scale**2, 1.0))
    expected = scale * torch.linalg.inv(unit)[:, column] * scale[column] * alive * alive[column]
    # in units of the scaled system, whose entries are of size 1
    inside, wanted = (torch.where(alive, each / scale / scale[column], 0.0) for each in (found, expected))
    torch.testing.assert_close(inside, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    unit = gram * scale * scale[:, None] + torch.diag((~alive).double())
    assert pivot == pytest.approx(float(torch.linalg.cholesky(unit).diagonal().min()), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 20])
def test_rows_that_depend_on_each_other_show(backend: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    rows = torch.randn(size, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[1] = -3 * rows[0]
    _, pivot = damped_inverse_column(rows @ rows.T, 0, 1e-5)
    assert math.isnan(pivot) or pivot < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [1, 5])
def test_what_is_not_finite_shows(backend: str, bad: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other rows have nothing in common with the one that is not."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    gram = torch.eye(size, dtype=torch.float64)
    gram[-1, -1] = bad
    assert math.isnan(damped_inverse_column(gram, 0, 1.0)[1])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"contiguous, float64 \[m, m\], got torch.float32 \[2, 2\]"):
        damped_inverse_column(torch.eye(2), 0, 0.0)
    with pytest.raises(ValueError, match=r"got torch.float64 \[2, 3\]"):
        damped_inverse_column(torch.zeros(2, 3, dtype=torch.float64), 0, 0.0)
    with pytest.raises(ValueError, match="column 2 is not one of 2"):
        damped_inverse_column(torch.eye(2, dtype=torch.float64), 2, 0.0)


def test_numba_serves_small_systems_of_a_cpu_and_is_never_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gram matrix lies where it must: a backend that was requested for tensors elsewhere is no error."""
    pytest.importorskip("numba")
    used: list[str] = []

    def note(kernel: str, backend: Backend) -> ModuleType:
        used.append(backend)
        return implementation(kernel, backend)

    monkeypatch.setattr(gram_solve, "implementation", note)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for size in (CPU_MAX_SIZE, CPU_MAX_SIZE + 1):
        damped_inverse_column(torch.eye(size, dtype=torch.float64), 0, 0.0)
    for requested in ("cpu", "triton", "reference"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, requested)
        damped_inverse_column(torch.eye(2, dtype=torch.float64), 0, 0.0)
    assert used == ["cpu", "reference", "cpu", "reference", "reference"]
