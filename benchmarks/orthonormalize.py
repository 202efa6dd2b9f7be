"""Why LDAdam uses Householder QR: time and accuracy of ways to orthonormalize a tall matrix.

    python benchmarks/orthonormalize.py

Needs numba (extra ``cpu``). Per shape and method: best milliseconds of interleaved rounds, ‖UᵀU − I‖₂ for a
well-conditioned matrix and for one whose columns span eight orders of magnitude and are nearly dependent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numba
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.householder import orthonormalize_rows


# numba has no annotations for its arrays: what it compiles is untyped here as in the package
@numba.njit(nogil=True)
def _orthonormalize_rows(address, r, p):  # type: ignore[no-untyped-def]
    orthonormalize_rows(address, r, p)


def loops(matrix: Tensor) -> Tensor:
    """Householder QR with numba's loops, which LDAdam's step has on a CPU."""
    rows = matrix.mT.contiguous()
    _orthonormalize_rows(rows.data_ptr(), *rows.shape)
    return rows.mT


def householder(matrix: Tensor) -> Tensor:
    """LAPACK's QR."""
    return torch.linalg.qr(matrix)[0]


def cholesky_twice(matrix: Tensor) -> Tensor:
    """CholeskyQR2: Q ← Y·L⁻ᵀ with LLᵀ = YᵀY, two times."""
    identity = torch.eye(matrix.shape[1])
    for _ in range(2):
        factor, _ = torch.linalg.cholesky_ex(matrix.T @ matrix)
        matrix = matrix @ torch.linalg.solve_triangular(factor, identity, upper=False).T
    return matrix


def cholesky_float64(matrix: Tensor) -> Tensor:
    """One CholeskyQR in float64."""
    wide = matrix.double()
    factor, _ = torch.linalg.cholesky_ex(wide.T @ wide)
    return torch.linalg.solve_triangular(factor.T, wide, upper=True, left=False).float()


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "Householder, numba": loops,
    "Householder, LAPACK": householder,
    "CholeskyQR2": cholesky_twice,
    "CholeskyQR in float64": cholesky_float64,
}


def deviation(basis: Tensor) -> float:
    """‖UᵀU − I‖₂, NaN if the method failed."""
    wide = basis.double()
    gram = wide.T @ wide - torch.eye(wide.shape[1], dtype=torch.float64)
    return float(torch.linalg.matrix_norm(gram, 2)) if torch.isfinite(gram).all() else float("nan")


def main() -> None:
    """Time all methods in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| p × r | method | best ms | ‖UᵀU − I‖ | same, ill-conditioned |")
    print("|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for rows, rank in ((384, 16), (384, 128), (512, 16), (512, 128), (4096, 16), (4096, 128)):
        matrix = torch.randn(rows, rank, generator=generator)
        ill = (matrix[:, :1] + 1e-4 * matrix) * torch.logspace(0, -8, rank)
        best = dict.fromkeys(METHODS, float("inf"))
        for _ in range(rounds):
            for name, method in METHODS.items():
                start = time.perf_counter()
                method(matrix)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
        for name, method in METHODS.items():
            good, bad = deviation(method(matrix)), deviation(method(ill))
            print(f"| {rows} × {rank} | {name} | {best[name]:.3f} | {good:.1e} | {bad:.1e} |")


if __name__ == "__main__":
    main()
