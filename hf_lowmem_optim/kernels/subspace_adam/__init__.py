"""What LDAdam does with a matrix in a step: Algorithm 1 in one operation.

``a`` is the matrix with its shorter side first, (p, q), U₋ and U are its bases before and after the move, (p, r), and
m and v the moments, (r, q). ``subspace_adam_`` takes the matrices as they are stored, also those whose a is their
transpose, and does, after a ← g + ξ for a quantized error (line 1),

1. line 3: Vᵀ = s·m + (1 − ρ)·U₋ᵀa and Y = s·U₋(mV) + (1 − ρ)·aV; U has orthonormal columns that span those of Y;
2. lines 4 to 8: with R = UᵀU₋, p̃ = Uᵀa and c = β1/(1 − β1)

       m̃ = R m;  x = β2·(R∘R)(v − k·m²)
       v ← |x + β2·k·m̃²| + (1 − β2)·p̃²;  m₊ ← β1·m̃ + (1 − β1)·p̃;  d ← m₊ / (√v + δ)
       a ← a + U₋(c·m) − U(p̃ + c·m̃), where p̃ + c·m̃ is (1 + c)·m₊

   and then ξ ← a for a quantized error;
3. line 9: W ← decay·W − step·U d, rounded once to the dtype of W.

The first step, line 2, has a U of its own and moments that are zero: then s, k and U₋ do not matter.

In float32; backends agree to rounding, as their products add in different orders, and but for the signs of U's columns,
which m's rows then have, too (``kernels/orthonormalize``). NaN and Inf are carried on. Several matrices of one shape
are tensors with a batch in front; on a CPU each comes out as it would by itself, provided that their sizes are
multiples of 16.

Source: LDAdam, arXiv 2410.16103, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation
from hf_lowmem_optim.kernels.block_quant import Quantized, dequantize_add_, quantize_
from hf_lowmem_optim.kernels.block_quant.checks import check_dense
from hf_lowmem_optim.kernels.subspace_adam.layout import PIECE, Buffers, Coefficients

__all__ = ["Buffers", "Coefficients", "subspace_adam_"]

_FLOAT32 = (torch.float32,)


def subspace_adam_(
    param: Tensor,
    matrix: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    buffers: Buffers,
    coefficients: Coefficients,
    *,
    wide: Callable[[], Tensor],
    store: Callable[[], None] | None = None,
    new_basis: Tensor | None = None,
    gradient: Tensor | None = None,
    error: Quantized | None = None,
    seed: int | None = None,
) -> None:
    """Do a step on a matrix, or on several of one shape.

    Args:
        param: W or its transpose, float32, bfloat16 or float16 (n, m), any layout; or, as all that follow, a batch,
            (batch, n, m). Written.
        matrix: a or its transpose, float32 (n, m), any layout; overwritten with what is left of a if that is stored
            anywhere, else only read. If there is an ``error``, contiguous and written before all else.
        basis: U₋, float32 (p, r), contiguous; overwritten with U.
        exp_avg: m, float32 (r, q), contiguous; written.
        exp_avg_sq: v, likewise.
        buffers: Memory for what is in between.
        coefficients: The numbers of this step.
        wide: Gives a float32 buffer of the shape of ``param``, where one is needed; it may be ``matrix`` if that need
            not be kept.
        store: Called when ``matrix`` is what is left of a, before ``wide``; None if that is not to be stored so.
        new_basis: U, float32 (p, r), any layout; None to find it by power iteration.
        gradient: g, of the shape of ``matrix``, float32, bfloat16 or float16, contiguous: with an ``error``.
        error: ξ; a is g + ξ then, and what is left of a is stored in it as ``quantize_`` does it. None if ``matrix``
            is a.
        seed: As in ``quantize_``.

    Raises:
        ValueError: A tensor has another size, dtype or device than it should have, or is not contiguous.
    """
    _check_state(matrix, basis, exp_avg, exp_avg_sq, buffers)
    check_dense(param, "param", numel=matrix.numel(), device=matrix.device, any_layout=True)
    check_dense(matrix, "matrix", numel=param.numel(), device=param.device, dtypes=_FLOAT32, any_layout=error is None)
    if new_basis is not None:
        check_dense(new_basis, "new_basis", numel=basis.numel(), device=param.device, dtypes=_FLOAT32, any_layout=True)
    chosen = choose_backend("subspace_adam_", param.device)
    fast = chosen == "cpu" and param.is_contiguous() and matrix.is_contiguous()
    fused = None
    if error is not None:
        _check_error(error, gradient, matrix, store)
        # no block of a buffer may reach over two pieces of the loops
        if fast and PIECE % error.format.block_size == 0:
            fused = error
        else:
            dequantize_add_(matrix, error, onto=gradient)
            store = partial(quantize_, error, matrix, seed=seed)
    tensors = (matrix, basis, exp_avg, exp_avg_sq, buffers, coefficients)
    options = {"new_basis": new_basis, "keeps_rest": fused is not None or store is not None}
    backend = implementation("subspace_adam", "reference" if chosen == "cpu" and not fast else chosen)
    if fast:
        backend.step_(param, *tensors, **options, gradient=gradient, error=fused, seed=seed)
    else:
        move_ = implementation("subspace_adam", "reference").move_
        move_(*tensors, **options, update_moments_=backend.update_moments_)
    if store is not None:
        store()
    if not fast:
        backend.descend_(param, basis, buffers.projected, coefficients, wide)


def _check_error(error: Quantized, gradient: Tensor | None, matrix: Tensor, store: Callable[[], None] | None) -> None:
    """Refuse an error that cannot be added, or would be stored in two ways."""
    if gradient is None or store is not None:
        raise ValueError("an error is added to the gradient and stored: pass gradient, and no other way to store")
    error.check()
    for name, tensor in (("gradient", gradient), ("matrix", matrix)):
        check_dense(tensor, name, numel=error.numel, device=error.codes.device)


def _check_state(matrix: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, buffers: Buffers) -> None:
    """Refuse what is no contiguous float32 tensor of so many entries; nearly as cheap as no check."""
    device, rank, (short, long) = matrix.device, exp_avg.shape[-2], sorted(matrix.shape[-2:])
    batch = 1 if matrix.dim() == 2 else matrix.shape[0]
    if rank > short or exp_avg.shape[-1] != long:
        raise ValueError(
            f"exp_avg of a matrix {short} × {long} must have at most {short} rows, of {long} entries; got "
            f"{tuple(exp_avg.shape)}"
        )
    basis_entries, moment_entries = batch * short * rank, batch * long * rank
    for name, tensor, numel in (
        ("basis", basis, basis_entries),
        ("exp_avg", exp_avg, moment_entries),
        ("exp_avg_sq", exp_avg_sq, moment_entries),
        ("bases", buffers.bases, 2 * basis_entries),
        ("projected", buffers.projected, moment_entries),
        ("right", buffers.right, 2 * moment_entries),
    ):
        if (
            tensor.numel() != numel
            or tensor.dtype != torch.float32
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            check_dense(tensor, name, numel=numel, device=device, dtypes=_FLOAT32)
