"""Inverse fourth roots of symmetric positive semidefinite matrices, a stack of one side length at a time.

With Â = A + d·I, d = max(damping, relative_damping·‖A‖_F), and s an upper bound of Â's eigenvalues (``scaling``):

* ``"eigh"``: Â's eigenvalues to the power −1/4, those of A below zero shifted to zero first.
* ``"newton_db"``: Denman–Beavers as products, for the square root, and again for that one's inverse square root.
  Per pass: E ← 1.5·I − 0.5·X/s;  Y ← (X/s)·E;  Z ← E;  then  E ← 1.5·I − 0.5·Z·Y;  Y ← Y·E;  Z ← E·Z.
* ``"coupled_newton"``: X ← z^¼·I;  M ← z·Â  with z = 5/(2s);  then  T ← 1.25·I − M/4;  X ← X·T;  M ← T⁴·M,  until
  max|M − I| < tolerance in a matrix, which then rests.

A few iterations are exact for eigenvalues near s, and bounded for small ones: at 10, Newton–DB is within 1 % down to
1.1e-3·s and up to 2.1 times too large below that, coupled Newton within 1 % down to 2.0e-4·s and never too large.

A matrix of zeros gives I. One that is not finite gives NaN, and changes no other. Source: DASH, arXiv 2602.02016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["InverseRoot", "Scaling", "Solver", "alike_in_a_stack", "inverse_fourth_root", "largest_and_norm"]

Solver = Literal["eigh", "newton_db", "coupled_newton"]
Scaling = Literal["power_norm", "frobenius", "power_iteration"]

#: The start vectors of the power iteration: v[i] = frac(i·√prime) − ½.
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
_POWER_STEPS = 10


@dataclass(frozen=True)
class InverseRoot:
    """How the root is computed.

    Attributes:
        solver: ``"eigh"``, ``"newton_db"`` or ``"coupled_newton"``.
        iterations: Those of a Newton solver, at most.
        tolerance: Where coupled Newton stops.
        scaling: The s of the Newton solvers: ``"power_norm"``, (Σλ⁸)^⅛, two products, at most n^⅛·λ_max;
            ``"frobenius"``, at most √n·λ_max; ``"power_iteration"``, twice a lower bound, without guarantee.
        damping: Least d.
        relative_damping: d in units of ‖A‖_F.
    """

    solver: Solver = "newton_db"
    iterations: int = 10
    tolerance: float = 1e-6
    scaling: Scaling = "power_norm"
    damping: float = 1e-10
    relative_damping: float = 1e-6


def inverse_fourth_root(A: Tensor, how: InverseRoot) -> Tensor:
    """Return A^(−1/4) of each matrix of a stack; none depends on another.

    Args:
        A: float32 or float64 [number of matrices, n, n], symmetric positive semidefinite but for rounding; only read.
        how: Solver, scaling and damping.

    Returns:
        The roots, likewise.
    """
    n, out = A.shape[-1], torch.empty_like(A)
    entries = 1 << 18 if A.device.type == "cpu" else 1 << 23
    together = max(1, entries // n**2) if alike_in_a_stack(n, n, A.device) else 1
    for part, root in zip(torch.split(A, together), torch.split(out, together), strict=True):
        root.copy_(_scaled_root(part, how))
    return out


def alike_in_a_stack(rows: int, columns: int, device: torch.device) -> bool:
    """Return whether the products of matrices in a stack are rounded like those of each alone.

    A CPU's are where every matrix and its products begin at an aligned address. A GPU's need not be.
    """
    return device.type != "cpu" or rows % 4 == columns % 4 == 0


def largest_and_norm(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest diagonal entry, which is the largest of all, and ‖A‖_F of each matrix, [matrices, 1, 1].

    Of the quotients, so that squares neither overflow nor underflow. The norm is 0 for zeros, and NaN where a matrix is
    not finite.
    """
    largest = A.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    quotients = A / largest.masked_fill(largest == 0, 1)
    return largest, largest * _frobenius(quotients)


def _scaled_root(A: Tensor, how: InverseRoot) -> Tensor:
    """Return the roots of matrices that are divided by their largest entry first."""
    size, norm = largest_and_norm(A)
    zero, finite = size == 0, norm < torch.inf
    usable = finite & ~zero
    size = torch.where(usable, size, 1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    # eigh raises for what is not finite, and a norm of zero is no divisor
    scaled = torch.where(usable, A / size, eye)
    norm = _frobenius(scaled)
    d = torch.maximum(how.damping / size, how.relative_damping * norm)
    root = _SOLVERS[how.solver](scaled, d, how) / size.sqrt().sqrt()
    return torch.where(usable, root, torch.where(finite, eye, torch.nan))


# Fourth roots by sqrt, which rounds an entry alike wherever it stands in memory; pow does not.
def _eigh(A: Tensor, d: Tensor, how: InverseRoot) -> Tensor:
    values, Q = torch.linalg.eigh(A)
    values = values - values[:, :1].clamp(max=0) + d[:, :, 0]
    root: Tensor = (Q / values.sqrt().sqrt()[:, None, :]) @ Q.mT
    return root


def _newton_db(A: Tensor, d: Tensor, how: InverseRoot) -> Tensor:
    damped = _damped(A, d)
    s = _SCALINGS[how.scaling](damped)
    half = _denman_beavers(damped, s, how.iterations, inverse=False)
    return _denman_beavers(half, s.sqrt(), how.iterations, inverse=True)


def _denman_beavers(X: Tensor, s: Tensor, iterations: int, *, inverse: bool) -> Tensor:
    """Return X^(1/2), or X^(−1/2); the last iteration leaves out the product that only the other one needs."""
    X = X / s
    E = _affine(X, 1.5, -0.5)
    Y, Z = X @ E, E
    for i in range(iterations - 1):
        E = _affine(Z @ Y, 1.5, -0.5)
        last = i == iterations - 2
        Y, Z = (Y if last and inverse else Y @ E), (Z if last and not inverse else E @ Z)
    return Z / s.sqrt() if inverse else Y * s.sqrt()


def _coupled_newton(A: Tensor, d: Tensor, how: InverseRoot) -> Tensor:
    M = _damped(A, d)
    z = 2.5 / _SCALINGS[how.scaling](M)
    M = M * z
    X = torch.diag_embed(z[:, :, 0].sqrt().sqrt().expand(M.shape[:2]))
    active = torch.ones_like(z, dtype=torch.bool)
    for _ in range(how.iterations):
        T = _affine(M, 1.25, -0.25)
        T2 = T @ T
        X = torch.where(active, X @ T, X)
        M = torch.where(active, T2 @ T2 @ M, M)
        off = _affine(M, -1.0, 1.0).abs_().amax((1, 2), keepdim=True)
        active = active & ~(off < how.tolerance)
        # a GPU goes on rather than wait for the answer
        if A.device.type == "cpu" and not active.any():
            break
    return X


def _affine(X: Tensor, c0: float, c1: float) -> Tensor:
    """Return c0·I + c1·X."""
    result = X * c1
    result.diagonal(dim1=1, dim2=2).add_(c0)
    return result


def _damped(A: Tensor, d: Tensor) -> Tensor:
    damped = A.clone()
    damped.diagonal(dim1=1, dim2=2).add_(d[:, :, 0])
    return damped


def _frobenius(A: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(A.flatten(1), dim=1)
    return norms[:, None, None]


def _power_norm(A: Tensor) -> Tensor:
    norm = _frobenius(A)
    X = A / norm
    X = X @ X
    return norm * _frobenius(X @ X).sqrt().sqrt()


def _power_iteration(A: Tensor) -> Tensor:
    place = torch.arange(1, A.shape[-1] + 1, dtype=torch.float64)
    roots = torch.tensor(_PRIMES, dtype=torch.float64).sqrt()
    start = (place[:, None] * roots).frac() - 0.5
    V = (start / torch.linalg.vector_norm(start, dim=0)).to(A).expand(len(A), -1, -1)
    for _ in range(_POWER_STEPS):
        V = A @ V
        V = V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
    quotients: Tensor = (V * (A @ V)).sum(1)
    return 2 * quotients.amax(1)[:, None, None]


_SOLVERS = {"eigh": _eigh, "newton_db": _newton_db, "coupled_newton": _coupled_newton}
_SCALINGS = {"power_norm": _power_norm, "frobenius": _frobenius, "power_iteration": _power_iteration}
