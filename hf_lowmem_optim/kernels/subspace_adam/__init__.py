"""What LDAdam does with a matrix between the QR of one step and that of the next: Algorithm 1 without line 2.

``a`` is the matrix with its shorter side first, (p, q), U₋ and U are its bases before and after the move, (p, r), and
m and v the moments, (r, q). The operations take the matrices as they are stored, also those whose a is their transpose:

1. ``power_iteration``, line 3: Vᵀ = s·m + (1 − ρ)·U₋ᵀa and Y = s·U₋(mV) + (1 − ρ)·aV. A QR of Y gives U. Before that
   a ← g + ξ for a quantized error, which is line 1.
2. ``subspace_adam_``, lines 4 to 9, and then ξ ← a for a quantized error: with R = UᵀU₋, p̃ = Uᵀa and c = β1/(1 − β1)

       m̃ = R m;  x = β2·(R∘R)(v − k·m²)
       v ← |x + β2·k·m̃²| + (1 − β2)·p̃²;  m₊ ← β1·m̃ + (1 − β1)·p̃;  d ← m₊ / (√v + δ)
       a ← a + U₋(c·m) − U(p̃ + c·m̃), where p̃ + c·m̃ is (1 + c)·m₊

3. ``descend_``, line 9: W ← decay·W − step·U d.

In float32; backends agree to rounding, as their products add in different orders. NaN and Inf are carried on. Several
matrices of one shape are tensors with a batch in front; on a CPU each comes out as it would by itself, provided that
their sizes are multiples of 16.

Source: LDAdam, arXiv 2410.16103, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation
from hf_lowmem_optim.kernels.block_quant import Quantized, dequantize_add_, quantize_
from hf_lowmem_optim.kernels.block_quant.checks import check_dense
from hf_lowmem_optim.kernels.subspace_adam.layout import PIECE

__all__ = ["descend_", "power_iteration", "subspace_adam_"]

_FLOAT32 = (torch.float32,)


def power_iteration(
    matrix: Tensor,
    old_basis: Tensor,
    exp_avg: Tensor,
    bases: Tensor,
    projected: Tensor,
    *,
    momentum_weight: float,
    gradient_weight: float,
    gradient: Tensor | None = None,
    error: Quantized | None = None,
) -> Tensor:
    """Return Y, whose columns are to be orthonormalized.

    Args:
        matrix: a or its transpose, float32 (n, m), any layout; or, as all that follow, a batch, (batch, n, m).
            Contiguous and written before all else if there is an ``error``.
        old_basis: U₋, float32 (p, r), contiguous.
        exp_avg: m, float32 (r, q), contiguous.
        bases: float32 (2·r, p), contiguous; U₋ᵀ is written to its first half for :func:`subspace_adam_`, anything to
            the second.
        projected: Float32 (r, q), contiguous; overwritten with anything.
        momentum_weight: s.
        gradient_weight: 1 − ρ.
        gradient: g, of the shape of ``matrix``, float32, bfloat16 or float16, contiguous: with an ``error``.
        error: ξ; a is g + ξ then. None if ``matrix`` is a.

    Returns:
        Y, float32 (p, r); it may lie in ``bases``.

    Raises:
        ValueError: A tensor has another size, dtype or device than it should have, or is not contiguous.
    """
    if error is not None and gradient is None:
        raise ValueError("error needs the gradient to which it is added: pass gradient")
    basis_entries, moment_entries = _entries(matrix, exp_avg)
    device = matrix.device
    check_dense(matrix, "matrix", numel=matrix.numel(), device=device, dtypes=_FLOAT32, any_layout=error is None)
    for name, tensor, numel in (
        ("old_basis", old_basis, basis_entries),
        ("exp_avg", exp_avg, moment_entries),
        ("bases", bases, 2 * basis_entries),
        ("projected", projected, moment_entries),
    ):
        _check(tensor, name, numel, device)
    fast = _is_fast("power_iteration", matrix)
    if error is not None and not (fast and _fits(error)):
        dequantize_add_(matrix, error, onto=gradient)
        error = gradient = None
    tensors, weights = (matrix, old_basis, exp_avg, bases, projected), (momentum_weight, gradient_weight)
    fused = {"gradient": gradient, "error": error} if fast else {}
    if error is not None and gradient is not None:
        error.check()
        for name, tensor in (("gradient", gradient), ("matrix", matrix)):
            check_dense(tensor, name, numel=error.numel, device=error.codes.device)
    backend = implementation("subspace_adam", "cpu" if fast else "reference")
    sketched: Tensor = backend.sketch(*tensors, *weights, **fused)
    return sketched


def subspace_adam_(
    matrix: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bases: Tensor,
    projected: Tensor,
    right: Tensor,
    *,
    betas: tuple[float, float],
    correction: float,
    damping: float,
    keeps_rest: bool,
    error: Quantized | None = None,
    seed: int | None = None,
) -> None:
    """Write the new moments, the direction, and a without what the momentum takes from it.

    Args:
        matrix: As in :func:`power_iteration`; written if ``keeps_rest``.
        basis: U, float32 (p, r), any layout.
        exp_avg: m, float32 (r, q), contiguous; written.
        exp_avg_sq: v, likewise.
        bases: As :func:`power_iteration` left it; then Uᵀ is in its second half.
        projected: Float32 (r, q), contiguous; d is written to it.
        right: Float32 (2·r, q), contiguous; overwritten with anything.
        betas: β1 and β2.
        correction: k.
        damping: δ.
        keeps_rest: Whether there is a place for what is left of a.
        error: Where that is stored in the end, as ``quantize_`` does it; None for nowhere. Needs ``keeps_rest``.
        seed: As in ``quantize_``.

    Raises:
        ValueError: A tensor has another size, dtype or device than it should have, or is not contiguous.
    """
    if error is not None and not keeps_rest:
        raise ValueError("error is to hold what is left of the matrix: pass keeps_rest=True")
    basis_entries, moment_entries = _entries(matrix, exp_avg)
    device = matrix.device
    check_dense(matrix, "matrix", numel=matrix.numel(), device=device, dtypes=_FLOAT32, any_layout=error is None)
    check_dense(basis, "basis", numel=basis_entries, device=device, dtypes=_FLOAT32, any_layout=True)
    for name, tensor, numel in (
        ("exp_avg", exp_avg, moment_entries),
        ("exp_avg_sq", exp_avg_sq, moment_entries),
        ("bases", bases, 2 * basis_entries),
        ("projected", projected, moment_entries),
        ("right", right, 2 * moment_entries),
    ):
        _check(tensor, name, numel, device)
    tensors, hyper = (matrix, basis, exp_avg, exp_avg_sq, bases, projected, right), (betas, correction, damping)
    fast = _is_fast("subspace_adam_", matrix)
    fused = error if fast and error is not None and _fits(error) else None
    if fast:
        if fused is not None:
            fused.check()
            check_dense(matrix, "matrix", numel=fused.numel, device=fused.codes.device)
        implementation("subspace_adam", "cpu").update_(*tensors, *hyper, keeps_rest=keeps_rest, error=fused, seed=seed)
    else:
        implementation("subspace_adam", "reference").update_(*tensors, *hyper, keeps_rest=keeps_rest)
    if error is not None and fused is None:
        quantize_(error, matrix, seed=seed)


def descend_(
    param: Tensor,
    basis: Tensor,
    direction: Tensor,
    *,
    decay: float,
    step_size: float,
    wide: Callable[[], Tensor],
) -> None:
    """Write W ← decay·W − step_size·U d, rounded once to the dtype of W.

    Args:
        param: W or its transpose, float32, bfloat16 or float16 (n, m), any layout; or, as all that follow, a batch.
        basis: U, float32 (p, r), any layout.
        direction: d, float32 (r, q), contiguous.
        decay: Factor of W.
        step_size: Factor of the direction.
        wide: Gives a float32 buffer of the shape of ``param``, where one is needed.

    Raises:
        ValueError: A tensor has another size, dtype or device than it should have, or is not contiguous.
    """
    basis_entries, moment_entries = _entries(param, direction)
    check_dense(param, "param", numel=param.numel(), device=param.device, any_layout=True)
    check_dense(basis, "basis", numel=basis_entries, device=param.device, dtypes=_FLOAT32, any_layout=True)
    check_dense(direction, "direction", numel=moment_entries, device=param.device, dtypes=_FLOAT32)
    backend = "cpu" if _is_fast("descend_", param) else "reference"
    implementation("subspace_adam", backend).descend_(param, basis, direction, decay, step_size, wide)


def _check(tensor: Tensor, name: str, numel: int, device: torch.device) -> None:
    """Refuse what is no contiguous float32 tensor of so many entries; nearly as cheap as no check."""
    if (
        tensor.numel() != numel
        or tensor.dtype != torch.float32
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        check_dense(tensor, name, numel=numel, device=device, dtypes=_FLOAT32)


def _entries(matrix: Tensor, moment: Tensor) -> tuple[int, int]:
    """Entries that the bases and the moments of the matrix, or of the batch, should have."""
    r, (short, long) = moment.shape[-2], sorted(matrix.shape[-2:])
    batch = 1 if matrix.dim() == 2 else matrix.shape[0]
    return batch * short * r, batch * long * r


def _is_fast(operation: str, matrix: Tensor) -> bool:
    """Whether the loops for CPUs serve a call: those of contiguous matrices."""
    # a Triton kernel would save a few launches on small matrices: torch's own operations serve GPUs
    return choose_backend(operation, matrix.device) == "cpu" and matrix.is_contiguous()


def _fits(error: Quantized) -> bool:
    """Whether no block of a buffer reaches over two pieces of the loops."""
    return PIECE % error.format.block_size == 0
