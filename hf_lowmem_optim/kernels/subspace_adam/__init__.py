"""Adam's moments carried into a subspace that has moved, their direction, and what is to be taken off the error.

With the bases U₋ and U before and after the move, R = UᵀU₋, and the projected gradient p̃:

    m̃ ← R m;  x ← β2·(R∘R)(v − k·m²)
    v ← |x + β2·k·m̃²| + (1 − β2)·p̃²
    m ← β1·m̃ + (1 − β1)·p̃
    d ← m / (√v + δ)

and, m₋ being m before all this, the factors of U₋(c·m₋) − U(p̃ + c·m̃) with c = β1/(1 − β1), where p̃ + c·m̃ is (1 + c)·m:

    left ← [U₋ U];  right ← [c·m₋; −(1 + c)·m]

In float32; backends agree to rounding, as their products add in different orders. NaN and Inf are carried on. On a CPU
the result for one matrix does not depend on the others of a batch.

Source: LDAdam, arXiv 2410.16103, Algorithm 1, lines 5 to 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation
from hf_lowmem_optim.kernels.block_quant.checks import check_dense

__all__ = ["subspace_adam_"]

_FLOAT32 = (torch.float32,)


def subspace_adam_(
    old_basis: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    projected: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    betas: tuple[float, float],
    correction: float,
    damping: float,
) -> None:
    """Write the new moments, the direction in the place of the projected gradient, and the two factors.

    Args:
        old_basis: U₋, float32 (p, r), contiguous; or, as all that follow, a batch of equal ones, (batch, p, r).
        basis: U, likewise.
        exp_avg: m, float32 (r, q), contiguous; written.
        exp_avg_sq: v, likewise; written.
        projected: p̃ before and d afterwards, likewise.
        left: float32 (p, 2·r), contiguous; written.
        right: float32 (2·r, q), contiguous; written.
        betas: β1 and β2.
        correction: k.
        damping: δ.

    Raises:
        ValueError: A tensor has another size, dtype or device than it should have, or is not contiguous.
    """
    basis_entries, moment_entries = basis.numel(), exp_avg.numel()
    for name, tensor, numel in (
        ("old_basis", old_basis, basis_entries),
        ("basis", basis, basis_entries),
        ("exp_avg", exp_avg, moment_entries),
        ("exp_avg_sq", exp_avg_sq, moment_entries),
        ("projected", projected, moment_entries),
        ("left", left, 2 * basis_entries),
        ("right", right, 2 * moment_entries),
    ):
        check_dense(tensor, name, numel=numel, device=basis.device, dtypes=_FLOAT32)
    # a Triton kernel would save a few launches on small matrices: torch's own operations serve GPUs
    backend = choose_backend("subspace_adam_", basis.device)
    implementation("subspace_adam", "cpu" if backend == "cpu" else "reference").update_(
        old_basis, basis, exp_avg, exp_avg_sq, projected, left, right, betas, correction, damping
    )
