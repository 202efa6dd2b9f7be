"""LowRankMFAC: M-FAC with a window of low-rank gradients (Modoranu et al., arXiv 2306.06098, ICML 2024).

Per matrix (p × q), rank r, window m; ``preconditioned.py`` has the rest of the algorithm:

1. acc ← ξ + g
2. P ← orthonormalize(acc·Q₋);  Q ← accᵀP;  c = P·Qᵀ;  ξ ← acc − c       one warm-started power iteration (PowerSGD)
3. row (t − 1) mod m of the window ← (P, Q)
5. u ← F⁻¹c with F = λI + (1/m)·Σ gᵢgᵢᵀ over the rows gᵢ of the window, over all tensors

| letter  | state key | shape     | dtype            | bytes per parameter                           |
|---------|-----------|-----------|------------------|-----------------------------------------------|
| P       | `left`    | (m, r, p) | fp32             | 4·m·r/q                                       |
| Q       | `right`   | (m, r, q) | fp32             | 4·m·r/p                                       |
| ξ       | `error`…  | W         | `error_feedback` | 4 (fp32), 2 (bf16), 1.06 (8bit), 0.56 (4bit)  |
| g       | `rows`    | (m, n)    | fp32             | 4·m: tensors that are not compressed, no ξ    |

Q₋ is the right factor of the row before. Vectors, and matrices whose factors would take more than themselves, have
their gradients in the window as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lowmem_optim.compression.error_feedback import accumulate, error_state, retain_
from hf_lowmem_optim.compression.lowrank import seeded_sketch
from hf_lowmem_optim.compression.window import DenseRows, LowRankRows, widened_entries
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.orthonormalize import orthonormalize, orthonormalize_entries
from hf_lowmem_optim.optimizers.adamw import DenseState, adamw_state
from hf_lowmem_optim.optimizers.dense import WeightRounding
from hf_lowmem_optim.optimizers.hyperparameters import check_positive_int
from hf_lowmem_optim.optimizers.preconditioned import (
    PreconditionedOptimizer,
    descent_temporaries,
    preconditioner_state,
    system_bytes,
)
from hf_lowmem_optim.preconditioners.mfac import mfac_weights
from hf_lowmem_optim.state import StepTemporaries, TensorSpec

__all__ = ["LowRankMFAC", "lowrank_mfac_compress_", "lowrank_mfac_state", "lowrank_mfac_temporaries"]


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The tensor as (out, rest); a vector has one column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _has_factors(shape: Sequence[int], rank: int) -> bool:
    """Whether the factors of this rank are smaller than the tensor."""
    p, q = _matrix(shape)
    return rank * (p + q) < p * q


def lowrank_mfac_state(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    window: int = 32,
    rank: int | None = 4,
    momentum: float = 0.0,
    error_feedback: str = "8bit",
    scope: str = "model",
    dense_state: str = "param",
    **_other: Any,
) -> dict[str, TensorSpec]:
    """State of one parameter; with ``preconditioner_state`` the only place where its size is written.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        window: As in :class:`LowRankMFAC`.
        rank: As in :class:`LowRankMFAC`.
        momentum: As in :class:`LowRankMFAC`.
        error_feedback: As in :class:`LowRankMFAC`.
        scope: As in :class:`LowRankMFAC`.
        dense_state: As in :class:`LowRankMFAC`.
        **_other: Hyper-parameters that do not change the state.

    Returns:
        Specs by state key: the table at the head of this file, or dense AdamW's.
    """
    if rank is None or 0 in shape:
        return adamw_state(shape, dtype, dense_state=dense_state)
    rest = preconditioner_state(shape, window=window, momentum=momentum, scope=scope)
    if not _has_factors(shape, rank):
        return {"rows": TensorSpec((window, math.prod(shape)), torch.float32, "rows"), **rest}
    p, q = _matrix(shape)
    return {
        "left": TensorSpec((window, rank, p), torch.float32, "factors"),
        "right": TensorSpec((window, rank, q), torch.float32, "factors"),
        **error_state((p, q), dtype, error_feedback),
        **rest,
    }


def lowrank_mfac_temporaries(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    first: bool,
    device: torch.device,
    rank: int,
    window: int,
    error_feedback: str,
    **_other: Any,
) -> StepTemporaries:
    """What a step allocates for one tensor.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        first: Whether it is the first update, which draws the factor to start from.
        device: Device of the parameter.
        rank: As in :class:`LowRankMFAC`.
        window: As in :class:`LowRankMFAC`.
        error_feedback: As in :class:`LowRankMFAC`.
        **_other: Hyper-parameters that do not matter here.

    Returns:
        First pass: acc, unless the error's own buffer becomes it, and the largest of the factors of line 2, the part of
        the window that is widened to float64 in line 4, and the system of line 5. Second pass: u, a float32 copy of a
        narrower parameter, and the weighted factors.
    """
    late, system, numel = descent_temporaries(shape, dtype), system_bytes(window), math.prod(shape)
    if not _has_factors(shape, rank):
        return StepTemporaries(own=max(8 * (widened_entries(window, numel) + numel), system), late=late)
    p, q = _matrix(shape)
    shared = {} if error_feedback == "fp32" else {"accumulated": 4 * numel}
    factors = 4 * (rank * (p + q + (q if first else 0)) + orthonormalize_entries(p, rank, device))
    widened = 8 * max(widened_entries(window, rank * size) + rank * size for size in (p, q))
    return StepTemporaries(shared, max(factors, widened, system), late, 4 * window * rank * p)


def lowrank_mfac_compress_(
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    row: int,
    step: int,
    group: Mapping[str, Any],
    workspace: Workspace,
) -> None:
    """Put the low-rank part of ξ + g into a row of the window and the rest into ξ: lines 1 to 3.

    Args:
        grad: g, any floating dtype, shape and layout; only read.
        state: As :func:`lowrank_mfac_state` describes it; written.
        row: Row of the window to write; the row before has the factor to start from.
        step: Which update of this tensor this is, 1 for the first.
        group: Hyper-parameters.
        workspace: Temporary buffers.
    """
    if "rows" in state:
        state["rows"][row] = grad.reshape(-1)
        return
    left, right = state["left"], state["right"]
    # line 1: acc ← ξ + g
    acc = accumulate(grad.reshape(grad.shape[0], -1), state, workspace)
    # line 2: P ← orthonormalize(acc·Q₋);  Q ← accᵀP;  ξ ← acc − P·Qᵀ
    start = right[row - 1] if step > 1 else seeded_sketch(right.shape[2], right.shape[1], right.device).T
    P = orthonormalize(acc @ start.T)  # [p, r]
    Qt = P.T @ acc  # [r, q]
    retain_(state, acc.addmm_(P, Qt, alpha=-1))
    # line 3
    left[row] = P.T
    right[row] = Qt


def _rows(state: Mapping[str, Tensor], shape: Sequence[int], group: Mapping[str, Any]) -> DenseRows | LowRankRows:
    """The window of one tensor."""
    return DenseRows(state["rows"]) if "rows" in state else LowRankRows(state["left"], state["right"])


class LowRankMFAC(PreconditionedOptimizer):
    """LowRankMFAC: the gradient, preconditioned by the inverse Fisher matrix of a window of low-rank gradients.

    One Fisher matrix spans all parameters, vectors included. A group with ``rank=None`` takes AdamW, bit-equal to
    torch's. A tensor without a gradient in a step counts as zero in that step's row and is not moved. A non-finite
    gradient makes every parameter of the Fisher matrix non-finite, as the formula has it.

    Args:
        params: Parameters, named parameters or parameter groups, as in torch. A group may set any argument below, but
            ``window``, ``damping`` and ``scope`` must be the same in all groups that share a Fisher matrix.
        lr: Learning rate. The first step is about m·c/‖c‖² for small damping: larger for smaller gradients.
        window: m, the number of gradients in the Fisher matrix, and its divisor also while there are fewer.
        rank: Rank of the compressed gradients, or None for dense AdamW.
        damping: λ > 0 in F = λI + (1/m)·Σ gᵢgᵢᵀ. The larger, the closer to gradient descent at the rate lr/λ.
        momentum: μ in [0, 1) of the heavy ball vel ← μ·vel + u; if it is not 0, four bytes per parameter.
        weight_decay: Decoupled weight decay.
        error_feedback: Storage of the error: ``"fp32"``, ``"bf16"``, ``"8bit"`` or ``"4bit"``.
        scope: ``"model"`` for one Fisher matrix over all parameters, ``"tensor"`` for one per tensor: the coupling
            between tensors is lost and each tensor has its own step size, but nothing is shared.
        betas: Decay rates of AdamW, for groups with ``rank=None``.
        eps: Epsilon of AdamW, for groups with ``rank=None``.
        dense_state: Storage of AdamW's moments where the dense rule applies: ``"param"`` (the parameter's dtype, as in
            torch), ``"fp32"``, or ``"8bit"``, bitsandbytes' blockwise quantization (the extra ``bitsandbytes``).
        weight_rounding: How updated bfloat16 and float16 weights are rounded: ``"nearest"``, or ``"stochastic"``, which
            keeps updates too small for the weight's dtype in the mean, seeded by step and parameter.

    Raises:
        TypeError: An argument has the wrong type, or a parameter an unsupported dtype.
        ImportError: ``dense_state="8bit"`` without bitsandbytes.
        ValueError: An argument is out of range, or groups differ in what they must share.

    Example:
        >>> optimizer = LowRankMFAC(model.parameters(), lr=1e-3, window=32, rank=4)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2306.06098, algorithm 1 with PowerSGD (arXiv 1905.13727) as compressor.
    """

    name: ClassVar[str] = "lowrank_mfac"
    dense_key: ClassVar[str] = "rank"
    state_keys: ClassVar[tuple[str, ...]] = ("rank", "window", "error_feedback", "scope", "dense_state")
    state_function = staticmethod(lowrank_mfac_state)
    temporaries_function = staticmethod(lowrank_mfac_temporaries)
    compress_function = staticmethod(lowrank_mfac_compress_)
    window_function = staticmethod(_rows)
    weights_function = staticmethod(mfac_weights)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        window: int = 32,
        rank: int | None = 4,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        error_feedback: Literal["fp32", "bf16", "8bit", "4bit"] = "8bit",
        scope: Literal["model", "tensor"] = "model",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        dense_state: DenseState = "param",
        weight_rounding: WeightRounding = "nearest",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "window": window,
                "rank": rank,
                "damping": damping,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "error_feedback": error_feedback,
                "scope": scope,
                "betas": betas,
                "eps": eps,
                "dense_state": dense_state,
                "weight_rounding": weight_rounding,
            },
        )

    @classmethod
    def check_own(cls, hyper: Mapping[str, Any]) -> None:
        """Check ``rank`` and what all preconditioned optimizers have."""
        super().check_own(hyper)
        check_positive_int("rank", hyper["rank"], or_none="dense AdamW")
