"""SparseMFAC: M-FAC with a window of sparse gradients (Modoranu et al., arXiv 2306.06098, ICML 2024).

Per tensor of n entries in blocks of ``block_size``, window m; ``preconditioned.py`` has the rest of the algorithm:

1. acc ← ξ + g
2. c ← the ⌈density·block⌉ entries of largest |acc| per block, rounded to ``value_dtype``;  ξ ← acc − c
3. row (t − 1) mod m of the window ← c
5. u ← F⁻¹c with F = λI + (1/m)·Σ gᵢgᵢᵀ over the rows gᵢ of the window, over all tensors

| letter | state key | shape     | dtype            | bytes per parameter                          |
|--------|-----------|-----------|------------------|----------------------------------------------|
| c      | `indices` | (m, kept) | int16            | 2·m·density                                  |
| c      | `values`  | (m, kept) | `value_dtype`    | 2·m·density (bf16), 4·m·density (fp32)       |
| ξ      | `error`…  | (n,)      | `error_feedback` | 4 (fp32), 2 (bf16), 1.06 (8bit), 0.56 (4bit) |

What rounding cuts off the values is part of ξ. Every tensor is compressed, also small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lowmem_optim.compression.error_feedback import (
    QUANTIZATION_BLOCK_SIZE,
    error_buffer,
    error_state,
    quantized_error,
)
from hf_lowmem_optim.compression.topk import MAX_BLOCK_SIZE, kept_per_block, window_specs
from hf_lowmem_optim.compression.window import SparseRows
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.block_topk import TopK, foreach_block_topk_
from hf_lowmem_optim.kernels.sparse_steps import SparseTensor
from hf_lowmem_optim.kernels.sparse_window import SparseWindow
from hf_lowmem_optim.kernels.sparse_window.layout import product_scratch_bytes
from hf_lowmem_optim.optimizers.adamw import DenseState, adamw_state
from hf_lowmem_optim.optimizers.dense import WeightRounding
from hf_lowmem_optim.optimizers.hyperparameters import check_choice, check_fraction, check_positive_int
from hf_lowmem_optim.optimizers.pending import PendingUpdate
from hf_lowmem_optim.optimizers.preconditioned import (
    PreconditionedOptimizer,
    descent_temporaries,
    preconditioner_state,
    system_bytes,
)
from hf_lowmem_optim.preconditioners.mfac import mfac_weights
from hf_lowmem_optim.state import StepTemporaries, TensorSpec

__all__ = ["SparseMFAC", "sparse_compress_", "sparse_mfac_state", "sparse_mfac_temporaries"]

_VALUE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def sparse_mfac_state(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    window: int = 32,
    density: float | None = 0.01,
    momentum: float = 0.0,
    block_size: int = 4096,
    value_dtype: str = "bf16",
    error_feedback: str = "8bit",
    scope: str = "model",
    dense_state: str = "param",
    **_other: Any,
) -> dict[str, TensorSpec]:
    """State of one parameter; with ``preconditioner_state`` the only place where its size is written.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        window: As in :class:`SparseMFAC`.
        density: As in :class:`SparseMFAC`.
        momentum: As in :class:`SparseMFAC`.
        block_size: As in :class:`SparseMFAC`.
        value_dtype: As in :class:`SparseMFAC`.
        error_feedback: As in :class:`SparseMFAC`.
        scope: As in :class:`SparseMFAC`.
        dense_state: As in :class:`SparseMFAC`.
        **_other: Hyper-parameters that do not change the state.

    Returns:
        Specs by state key: the table at the head of this file, or dense AdamW's.
    """
    if density is None or 0 in shape:
        return adamw_state(shape, dtype, dense_state=dense_state)
    numel = math.prod(shape)
    stored = _VALUE_DTYPES[value_dtype]
    return {
        **window_specs(numel, window=window, density=density, block_size=block_size, value_dtype=stored),
        **error_state((numel,), dtype, error_feedback),
        **preconditioner_state(shape, window=window, momentum=momentum, scope=scope),
    }


def sparse_mfac_temporaries(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    device: torch.device,
    window: int,
    block_size: int,
    momentum: float,
    **_other: Any,
) -> StepTemporaries:
    """What a step allocates for one tensor, if it is contiguous.

    The torch reference, where neither Triton nor numba serve, takes some slices besides, the same for every tensor.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        device: Device of the parameter.
        window: As in :class:`SparseMFAC`.
        block_size: As in :class:`SparseMFAC`.
        momentum: As in :class:`SparseMFAC`.
        **_other: Hyper-parameters that do not matter here.

    Returns:
        First pass: the system of line 5, or on a GPU the scratch memory of line 4 if that is larger. Second pass: that
        of lines 5 and 7; with momentum u and a float32 copy of a narrower parameter, shared.
    """
    scratch = product_scratch_bytes(math.prod(shape), window, block_size) if device.type != "cpu" else 0
    own = max(scratch, system_bytes(window))
    if momentum > 0:
        return StepTemporaries(own=own, late=descent_temporaries(shape, dtype))
    return StepTemporaries(own=own, late_own=scratch)


def sparse_compress_(
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    row: int,
    step: int,
    group: Mapping[str, Any],
    workspace: Workspace,
) -> None:
    """Put the largest entries of ξ + g into a row of the window and the rest into ξ: lines 1 to 3, in one pass.

    Args:
        grad: g, any floating dtype, shape and layout; only read.
        state: As :func:`sparse_mfac_state` describes it; written.
        row: Row of the window to write.
        step: Which update of this tensor this is; does not matter here.
        group: Hyper-parameters.
        workspace: Temporary buffers.
    """
    error = state["error"] if "error" in state else quantized_error(state, grad.numel())
    how = (group["block_size"], group["density"])
    foreach_block_topk_([TopK(state["indices"], state["values"], row, grad.contiguous(), error, *how)])


def sparse_tensor(update: PendingUpdate) -> SparseTensor:
    """A tensor's gradient, and the tensors of its state that lines 1 to 7 read and write."""
    state, group = update.state, update.group
    error, fmt = error_buffer(state, update.grad.numel())
    window = (state["indices"], state["values"])
    return SparseTensor(update.param, update.grad, *window, error, fmt, group["block_size"], group["density"])


def _rows(state: Mapping[str, Tensor], shape: Sequence[int], group: Mapping[str, Any]) -> SparseRows:
    """The window of one tensor."""
    numel, block_size = math.prod(shape), group["block_size"]
    kept = kept_per_block(block_size, group["density"])
    return SparseRows(SparseWindow(state["indices"], state["values"], numel, block_size, kept))


class SparseMFAC(PreconditionedOptimizer):
    """SparseMFAC: the gradient, preconditioned by the inverse Fisher matrix of a window of sparse gradients.

    One Fisher matrix spans all parameters, small tensors included. A group with ``density=None`` takes AdamW,
    bit-equal to torch's. A tensor without a gradient in a step counts as zero in that step's row and is not moved. A
    non-finite gradient makes every parameter of the Fisher matrix non-finite, as the formula has it.

    Args:
        params: Parameters, named parameters or parameter groups, as in torch. A group may set any argument below, but
            ``window``, ``damping`` and ``scope`` must be the same in all groups that share a Fisher matrix.
        lr: Learning rate. The first step is about m·c/‖c‖² for small damping: larger for smaller gradients.
        window: m, the number of gradients in the Fisher matrix, and its divisor also while there are fewer.
        density: Fraction of the entries of each block that a gradient keeps, or None for dense AdamW.
        damping: λ > 0 in F = λI + (1/m)·Σ gᵢgᵢᵀ. The larger, the closer to gradient descent at the rate lr/λ.
        momentum: μ in [0, 1) of the heavy ball vel ← μ·vel + u; if it is not 0, four bytes per parameter.
        weight_decay: Decoupled weight decay.
        block_size: Entries of the blocks in which Top-K selects, at most 32768; a multiple of 64 for a quantized error.
        value_dtype: Storage of the kept values: ``"bf16"`` or ``"fp32"``.
        error_feedback: Storage of the error: ``"fp32"``, ``"bf16"``, ``"8bit"`` or ``"4bit"``.
        scope: ``"model"`` for one Fisher matrix over all parameters, ``"tensor"`` for one per tensor: the coupling
            between tensors is lost and each tensor has its own step size, but nothing is shared.
        betas: Decay rates of AdamW, for groups with ``density=None``.
        eps: Epsilon of AdamW, for groups with ``density=None``.
        dense_state: Storage of AdamW's moments where the dense rule applies: ``"param"`` (the parameter's dtype, as in
            torch), ``"fp32"``, or ``"8bit"``, bitsandbytes' blockwise quantization (the extra ``bitsandbytes``).
        weight_rounding: How updated bfloat16 and float16 weights are rounded: ``"nearest"``, or ``"stochastic"``, which
            keeps updates too small for the weight's dtype in the mean, seeded by step and parameter.

    Raises:
        TypeError: An argument has the wrong type, or a parameter an unsupported dtype.
        ImportError: ``dense_state="8bit"`` without bitsandbytes.
        ValueError: An argument is out of range, or groups differ in what they must share.

    Example:
        >>> optimizer = SparseMFAC(model.parameters(), lr=1e-3, window=32, density=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2306.06098, algorithm 1 with Top-K as compressor; arXiv 2107.03356 for the preconditioner.
    """

    name: ClassVar[str] = "sparse_mfac"
    dense_key: ClassVar[str] = "density"
    state_keys: ClassVar[tuple[str, ...]] = (
        "density",
        "window",
        "block_size",
        "value_dtype",
        "error_feedback",
        "scope",
        "dense_state",
    )
    state_function = staticmethod(sparse_mfac_state)
    temporaries_function = staticmethod(sparse_mfac_temporaries)
    compress_function = staticmethod(sparse_compress_)
    sparse_function = staticmethod(sparse_tensor)
    window_function = staticmethod(_rows)
    weights_function = staticmethod(mfac_weights)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        window: int = 32,
        density: float | None = 0.01,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        block_size: int = 4096,
        *,
        value_dtype: Literal["bf16", "fp32"] = "bf16",
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
                "density": density,
                "damping": damping,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "block_size": block_size,
                "value_dtype": value_dtype,
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
        """Check the sparse storage and what all preconditioned optimizers have."""
        super().check_own(hyper)
        check_fraction("density", hyper["density"], or_none="dense AdamW")
        check_positive_int("block_size", hyper["block_size"], maximum=MAX_BLOCK_SIZE)
        check_choice("value_dtype", hyper["value_dtype"], tuple(_VALUE_DTYPES))
        if hyper["error_feedback"] in ("8bit", "4bit") and hyper["block_size"] % QUANTIZATION_BLOCK_SIZE:
            raise ValueError(
                f"block_size={hyper['block_size']!r} must be a multiple of {QUANTIZATION_BLOCK_SIZE} for "
                f'error_feedback={hyper["error_feedback"]!r}, or take error_feedback="bf16"'
            )
