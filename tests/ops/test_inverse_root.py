"""Inverse fourth roots against eigenvalues in float64, and the triangles that are kept of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_grid import Piece, grid, pieces
from hf_lowmem_optim.ops.inverse_root import InverseRoot, inverse_fourth_root
from hf_lowmem_optim.ops.packed_triangles import Semidefinite, Symmetric, semidefinite_factor
from tests.reference import dash as reference

SOLVERS = ("eigh", "newton_db", "coupled_newton")


def with_condition(n: int, condition: float, rank: int | None = None, seed: int = 0) -> Tensor:
    """Return a float64 matrix with eigenvalues from 1 down to 1/condition, or of a rank below n."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    values = torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)
    values[n if rank is None else rank :] = 0
    return (Q * values) @ Q.T


def distance(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found.double() - expected) / torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("n", [1, 5, 48])
@pytest.mark.parametrize("scaling", ["power_norm", "frobenius", "power_iteration"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_a_function_of_the_eigenvalues(solver: str, scaling: str, n: int) -> None:
    """Of ten iterations, far from converged for the smallest."""
    for condition in (1e2, 1e6):
        A = with_condition(n, condition) * 3.7
        settings: dict[str, Any] = {"solver": solver, "scaling": scaling, "relative_damping": 1e-9}
        expected = torch.from_numpy(reference.inverse_fourth_root(A.numpy(), **settings))
        assert distance(inverse_fourth_root(A[None], InverseRoot(**settings))[0], expected) <= 1e-10


@pytest.mark.parametrize("rank", [None, 25])
@pytest.mark.parametrize("condition", [1e2, 1e8])
@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_solvers_are_the_root(solver: str, condition: float, rank: int | None) -> None:
    A = with_condition(100, condition, rank)
    for relative_damping, double, single in ((1e-4, 2e-11, 5e-4), (1e-6, 8e-11, 3e-2)):
        how = InverseRoot(solver, iterations=25, tolerance=1e-14, relative_damping=relative_damping)
        root = reference.inverse_fourth_root(A.numpy(), solver="eigh", relative_damping=relative_damping)
        assert distance(inverse_fourth_root(A[None], how)[0], torch.from_numpy(root)) <= double
        assert distance(inverse_fourth_root(A.float()[None], how)[0], torch.from_numpy(root)) <= single


@pytest.mark.parametrize(
    "how", [InverseRoot(s, scaling=k) for s in SOLVERS for k in ("power_norm", "frobenius")], ids=str
)
def test_no_matrix_depends_on_another(how: InverseRoot) -> None:
    """To the bit. Zeros give I, what is not finite gives NaN, and entries of any size roots in proportion."""
    for n in (7, 32):
        A = torch.stack([with_condition(n, 10.0**k, seed=k).float() for k in range(6)])
        expected = torch.cat([inverse_fourth_root(each[None], how) for each in A])
        assert torch.equal(inverse_fourth_root(A, how), expected)
        assert torch.equal(inverse_fourth_root(A[:3], how), expected[:3])
        A[1], A[2, 3, 3], A[4, n - 1, 0] = 0, torch.inf, torch.nan
        A[3] *= 1e30
        A[5] *= 1e-30
        found = inverse_fourth_root(A, InverseRoot(how.solver, scaling=how.scaling, damping=0.0))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], torch.eye(n))
        assert found[2].isnan().all() and found[4].isnan().all()
        assert distance(found[3] * 10**7.5, expected[3].double()) <= 1e-2
        assert distance(found[5] * 10**-7.5, expected[5].double()) <= 1e-2


def test_float32_does_not_explode_where_eigenvalues_are_zero() -> None:
    A = with_condition(64, 1e2, rank=8).float()[None]
    for solver in ("newton_db", "coupled_newton"):
        for iterations in (10, 20, 40, 80):
            root = inverse_fourth_root(A, InverseRoot(solver, iterations=iterations, tolerance=0.0))
            assert root.isfinite().all() and root.abs().max() <= 60


# --------------------------------------------------------------------------------------------------- triangles


def whole(shape: tuple[int, int]) -> Piece:
    (piece,) = pieces(grid(*shape, 64), 2, torch.device("cpu")) if shape[0] % 4 == 0 else _first(shape)
    return piece


def _first(shape: tuple[int, int]) -> list[Piece]:
    return [next(iter(pieces(grid(*shape, 64), 1, torch.device("cpu"))))]


@pytest.mark.parametrize("storage", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("shape", [(40, 24), (7, 5), (1, 3)], ids=str)
def test_symmetric_matrices_come_back(storage: Any, shape: tuple[int, int]) -> None:
    """The diagonal to the bit, the rest to half a step of its quantizer; and every entry in its mirror."""
    piece = whole(shape)
    count, n = len(piece.tensors), shape[0]
    stored = Symmetric("root", "roots", lambda a, b: a, storage)
    state = {k: torch.stack([s.allocate("cpu")] * count) for k, s in stored.specs(grid(*shape, 64)).items()}
    A = torch.randn(count, n, n, generator=torch.Generator().manual_seed(0))
    A = A + A.mT
    stored.write_(state, piece, A)
    found = stored.read(state, piece)
    assert torch.equal(found, found.mT)
    assert torch.equal(found.diagonal(dim1=1, dim2=2), A.diagonal(dim1=1, dim2=2))
    if storage == "fp32":
        assert torch.equal(found, A)
    elif storage == "bf16":
        assert torch.equal(found.tril(-1), A.bfloat16().float().tril(-1))
    else:
        levels = 255 if storage == "8bit" else 15
        for each, back in zip(A, found, strict=True):
            row, column = torch.tril_indices(n, n, -1)
            for part, off in zip(each[row, column].split(64), (back - each)[row, column].split(64), strict=True):
                if len(part):
                    span = (part.amax() - part.amin()) * 1.01 + 2 * part.abs().amax() / 128
                    assert off.abs().amax() <= 0.51 * span / levels


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_statistics_stay_semidefinite_and_close(storage: Any) -> None:
    piece = whole((40, 24))
    stored = Semidefinite("left", "statistics", lambda a, b: a, storage)
    state = {k: torch.stack([s.allocate("cpu")] * 2) for k, s in stored.specs(grid(40, 24, 64)).items()}
    assert torch.equal(stored.read(state, piece), torch.zeros(2, 40, 40))
    S = torch.stack([with_condition(40, 1e4).float(), torch.zeros(40, 40)])
    stored.write_(state, piece, S)
    found = stored.read(state, piece)
    assert torch.equal(found[1], S[1])
    assert torch.linalg.eigvalsh(found[0]).amin() >= -1e-6
    assert distance(found[0], S[0].double()) <= (6e-3 if storage == "8bit" else 0.1)
    S[1] = torch.nan
    stored.write_(state, piece, S)
    assert torch.equal(stored.read(state, piece)[0], found[0]) and stored.read(state, piece)[1].isnan().all()


def test_what_rounding_made_indefinite_has_a_factor() -> None:
    """With as little added as that takes, and nothing added to the other matrices of the stack."""
    good, bad = with_condition(20, 1e2).float(), with_condition(20, 1e2, seed=1).float()
    bad -= (torch.linalg.eigvalsh(bad)[0] + 1e-4) * torch.eye(20)
    C = semidefinite_factor(torch.stack((good, bad)))
    assert torch.equal(C[0], semidefinite_factor(good[None])[0])
    assert distance(C[1] @ C[1].T, bad.double()) <= 5e-3
    assert torch.equal(C, C.tril())
