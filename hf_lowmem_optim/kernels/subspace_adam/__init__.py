"""Adam's moments in a subspace that has moved, and the direction they give: one pass over four r × q matrices.

With the momentum and the second moment rotated into the new subspace, m̃ = R m and x = β2·(R∘R)(v − k·m²), and the
projected gradient p̃:

    v ← |x + β2·k·m̃²| + (1 − β2)·p̃²
    m ← β1·m̃ + (1 − β1)·p̃
    d ← m / (√v + δ)

In float32; backends agree to rounding, as some contract a multiplication and an addition into one rounding. NaN and Inf
are carried on.

Source: LDAdam, arXiv 2410.16103, Algorithm 1, lines 7 to 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation
from hf_lowmem_optim.kernels.block_quant.checks import check_dense

__all__ = ["subspace_adam_"]

_NAMES = ("exp_avg", "exp_avg_sq", "projected", "moved", "rotated")
_FLOAT32 = (torch.float32,)


def subspace_adam_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    projected: Tensor,
    moved: Tensor,
    rotated: Tensor,
    *,
    betas: tuple[float, float],
    correction: float,
    damping: float,
) -> None:
    """Write the new moments, and the direction in the place of the projected gradient.

    Args:
        exp_avg: m, float32, contiguous; written.
        exp_avg_sq: v, likewise; written.
        projected: p̃ before and d afterwards, likewise.
        moved: m̃, likewise; overwritten with anything.
        rotated: x, likewise; overwritten with anything.
        betas: β1 and β2.
        correction: k.
        damping: δ.

    Raises:
        ValueError: A tensor has another size, dtype or device than ``exp_avg``, or is not contiguous.
    """
    tensors = (exp_avg, exp_avg_sq, projected, moved, rotated)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        check_dense(tensor, name, numel=exp_avg.numel(), device=exp_avg.device, dtypes=_FLOAT32)
    # a Triton kernel would save a few launches on small matrices: torch's own operations serve GPUs
    backend = choose_backend("subspace_adam_", exp_avg.device)
    implementation("subspace_adam", "cpu" if backend == "cpu" else "reference").update_(
        *tensors, betas, correction, damping
    )
