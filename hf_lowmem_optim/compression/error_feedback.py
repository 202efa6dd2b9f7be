"""Where the compression error ξ is kept between two steps, and in which precision.

``accumulate`` gives a = g + ξ in float32, ``retain_`` stores what is left of it. A float32 buffer is used in place:
it *becomes* a, so that nothing of the gradient's size is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.compression.quantization import (
    QuantFormat,
    Quantized,
    dequantize_add_,
    quantize_,
    quantized_specs,
    quantized_state,
)
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.state import TensorSpec

__all__ = ["ERROR_FEEDBACK", "QUANTIZED_ERROR", "accumulate", "error_state", "quantized_error", "retain_"]

#: The dense storages of the error that an optimizer may offer as ``error_feedback=``.
ERROR_FEEDBACK = ("param", "fp32", "bf16", "none")

#: The block-quantized ones: blocks of 64 entries with two bfloat16 statistics.
QUANTIZED_ERROR = {"8bit": QuantFormat(bits=8), "4bit": QuantFormat(bits=4)}


def error_state(shape: Sequence[int], dtype: torch.dtype, storage: str) -> dict[str, TensorSpec]:
    """Describe the state that holds the error of one tensor.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        storage: One of :data:`ERROR_FEEDBACK` or :data:`QUANTIZED_ERROR`.

    Returns:
        Specs by state key; empty for ``"none"``.
    """
    if storage == "none":
        return {}
    if storage in QUANTIZED_ERROR:
        return quantized_specs(math.prod(shape), QUANTIZED_ERROR[storage])
    stored = {"param": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[storage]
    return {"error": TensorSpec(tuple(shape), stored, "error")}


def quantized_error(state: Mapping[str, Tensor], numel: int, storage: str) -> Quantized:
    """Return the quantized error of a tensor of ``numel`` entries, on the tensors of its state."""
    return quantized_state(state, numel, QUANTIZED_ERROR[storage])


def accumulate(grad: Tensor, state: Mapping[str, Tensor], workspace: Workspace, storage: str = "param") -> Tensor:
    """Return a = g + ξ in float32.

    Args:
        grad: Gradient, any floating dtype and layout. It is not written to.
        state: State of the tensor; its error is overwritten if it is kept in float32, until :func:`retain_`.
        workspace: Gives the buffer where a new tensor is needed.
        storage: How the error is stored; only whether and how it is quantized matters.

    Returns:
        The error's own float32 buffer; a buffer of the workspace; or, without an error and with a float32 gradient,
        ``grad`` itself, which the caller must not write to.
    """
    if storage in QUANTIZED_ERROR:
        accumulated = workspace.take("accumulated", grad.shape, grad.device).copy_(grad)
        dequantize_add_(accumulated, quantized_error(state, grad.numel(), storage))
        return accumulated
    error = state.get("error")
    if error is None:
        if grad.dtype == torch.float32:
            return grad
        return workspace.take("accumulated", grad.shape, grad.device).copy_(grad)
    if error.dtype == torch.float32:
        return error.add_(grad)
    return workspace.take("accumulated", grad.shape, grad.device).copy_(error).add_(grad)


def retain_(state: Mapping[str, Tensor], residual: Tensor, storage: str = "param") -> None:
    """Store ξ ← residual, rounded or quantized as the buffer is.

    Args:
        state: State of the tensor, with or without an error.
        residual: What the compression cut off, float32, shape of the parameter.
        storage: As in :func:`accumulate`.
    """
    if storage in QUANTIZED_ERROR:
        quantize_(quantized_error(state, residual.numel(), storage), residual)
        return
    error = state.get("error")
    if error is not None and error.data_ptr() != residual.data_ptr():
        error.copy_(residual)
