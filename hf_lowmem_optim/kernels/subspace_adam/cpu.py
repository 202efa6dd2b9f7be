"""The operation with numba: one pass instead of seven."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_floats import num_pieces
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["update_"]


_loop: Callable[..., Callable[..., None]] = numba.njit(cache=True, nogil=True, error_model="numpy")


@_loop
def _update(m, v, projected, moved, rotated, scalars, begin, end):
    beta1, rest1, rest2, factor, damping = scalars
    # unsigned: an index that could be negative for all that the compiler knows would not be vectorized
    for i in range(np.uint64(begin), np.uint64(end)):
        p, m_moved = projected[i], moved[i]
        second = np.abs(rotated[i] + factor * (m_moved * m_moved)) + rest2 * (p * p)
        first = beta1 * m_moved + rest1 * p
        v[i] = second
        m[i] = first
        projected[i] = first / (np.sqrt(second) + damping)


def update_(
    m: Tensor,
    v: Tensor,
    projected: Tensor,
    moved: Tensor,
    rotated: Tensor,
    betas: tuple[float, float],
    correction: float,
    damping: float,
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`."""
    beta1, beta2 = betas
    scalars = (
        np.float32(beta1),
        np.float32(1 - beta1),
        np.float32(1 - beta2),
        np.float32(beta2 * correction),
        np.float32(damping),
    )
    arrays = [tensor.numpy().reshape(-1) for tensor in (m, v, projected, moved, rotated)]
    numel = m.numel()
    run_pieces(lambda _, begin, end: _update(*arrays, scalars, begin, end), numel, num_pieces(numel, block_size=1))
