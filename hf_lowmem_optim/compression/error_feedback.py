"""Where the compression error ξ is kept between two steps, and in which precision.

``accumulate`` gives a = g + ξ in float32, ``retain_`` stores what is left of it. A float32 buffer is used in place:
it *becomes* a, so that nothing of the gradient's size is allocated. A quantized error is dequantized into the
workspace of the step, and not kept so between steps. With ``"grad"`` the buffer is the gradient's own and g has been
added to ξ in it before the step (``optimizers/gradient_error.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.compression.quantization import (
    QuantFormat,
    Quantized,
    dequantize_,
    dequantize_add_,
    quantize_,
    quantized_specs,
    quantized_state,
)
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.block_quant.checks import FLOAT_DTYPES
from hf_lowmem_optim.state import TensorSpec

__all__ = [
    "ERROR_FEEDBACK",
    "QUANTIZATION_BLOCK_SIZE",
    "accumulate",
    "error_buffer",
    "error_state",
    "fused_error",
    "keeps_error",
    "quantized_error",
    "retain_",
]

#: The storages of the error that an optimizer may offer as ``error_feedback=``.
ERROR_FEEDBACK = ("param", "fp32", "bf16", "8bit", "4bit", "grad", "none")

_SLICE_ENTRIES = 1 << 16
#: Entries that share the two statistics of a quantized error.
QUANTIZATION_BLOCK_SIZE = 64

_FORMATS = {"8bit": QuantFormat(8, QUANTIZATION_BLOCK_SIZE), "4bit": QuantFormat(4, QUANTIZATION_BLOCK_SIZE)}


def error_state(shape: Sequence[int], dtype: torch.dtype, storage: str) -> dict[str, TensorSpec]:
    """Describe the state that holds the error of one tensor.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        storage: One of :data:`ERROR_FEEDBACK`.

    Returns:
        Specs by state key; empty for ``"none"``.
    """
    if storage == "none":
        return {}
    if storage in _FORMATS:
        return quantized_specs(math.prod(shape), _FORMATS[storage])
    stored = {"param": dtype, "grad": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[storage]
    return {"error": TensorSpec(tuple(shape), stored, "error", in_gradient=storage == "grad")}


def keeps_error(state: Mapping[str, Tensor]) -> bool:
    """Whether the state has a place for the error."""
    return "error" in state or "error_codes" in state


def accumulate(grad: Tensor, state: Mapping[str, Tensor], workspace: Workspace) -> Tensor:
    """Return a = g + ξ in float32.

    Args:
        grad: Gradient, any floating dtype and layout. It is not written to, unless it is the error's own buffer, which
            then holds g + ξ already, or the workspace's buffer for a.
        state: State of the tensor; its error is overwritten if it is kept in float32, until :func:`retain_`.
        workspace: Gives the buffer where a new tensor is needed.

    Returns:
        The error's own float32 buffer; a buffer of the workspace; or, without an error and with a float32 gradient,
        ``grad`` itself, which the caller must not write to.
    """
    error = state.get("error")
    if error is not None and error.data_ptr() == grad.data_ptr():
        is_wide = error.dtype == torch.float32
        return error if is_wide else workspace.take("accumulated", error.shape, error.device).copy_(error)
    if error is not None and error.dtype == torch.float32:
        return _add_(error, grad)
    if not keeps_error(state) and grad.dtype == torch.float32:
        return grad
    accumulated = workspace.take("accumulated", grad.shape, grad.device)
    if error is not None:
        in_buffer = accumulated.data_ptr() == grad.data_ptr()
        return _add_(accumulated, error) if in_buffer else _add_(accumulated.copy_(error), grad)
    if (quantized := fused_error(grad, state)) is not None:  # in one pass
        dequantize_add_(accumulated, quantized, onto=grad)
        return accumulated
    if "error_codes" in state:
        dequantize_(accumulated, quantized_error(state, grad.numel()))
        return _add_(accumulated, grad)
    return accumulated.copy_(grad)


def fused_error(grad: Tensor, state: Mapping[str, Tensor]) -> Quantized | None:
    """Return a quantized error that can be added to the gradient in one pass, by :func:`accumulate` or by a kernel.

    Args:
        grad: Gradient.
        state: State of the tensor.

    Returns:
        None where there is no quantized error, or the gradient is not contiguous or of another dtype.
    """
    if "error_codes" not in state or not grad.is_contiguous() or grad.dtype not in FLOAT_DTYPES:
        return None
    return quantized_error(state, grad.numel())


def retain_(state: Mapping[str, Tensor], residual: Tensor, *, seed: int | None = None) -> None:
    """Store ξ ← residual in the precision of the buffer.

    Args:
        state: State of the tensor, with or without an error.
        residual: What the compression cut off, float32, shape of the parameter.
        seed: For a quantized error: an integer rounds stochastically with that seed, None to nearest.
    """
    error = state.get("error")
    if error is not None and error.data_ptr() != residual.data_ptr():
        error.copy_(residual)
    elif "error_codes" in state:
        quantize_(quantized_error(state, residual.numel()), residual, seed=seed)


def _add_(out: Tensor, other: Tensor) -> Tensor:
    """``out.add_(other)`` for a float32 ``out``, in slices where torch would first convert all of ``other``."""
    if other.dtype == torch.float32 or other.device.type != "cpu":
        return out.add_(other)
    rows = max(1, _SLICE_ENTRIES // max(1, other[0].numel()))
    for start in range(0, len(out), rows):
        out[start : start + rows].add_(other[start : start + rows])
    return out


def quantized_error(state: Mapping[str, Tensor], numel: int) -> Quantized:
    """Return the quantized error of a tensor of ``numel`` entries."""
    return quantized_state(state, numel, _format(state["error_codes"], numel))


def error_buffer(state: Mapping[str, Tensor], numel: int) -> tuple[tuple[Tensor, ...], QuantFormat | None]:
    """Return the tensors that hold the error of a tensor of ``numel`` entries, and how they are quantized.

    Args:
        state: State of a tensor that keeps an error.
        numel: Entries of the tensor.

    Returns:
        Codes, lo and hi, and their format; or the dense buffer, and None.
    """
    if "error" in state:
        return (state["error"],), None
    codes = state["error_codes"]
    return (codes, state["error_lo"], state["error_hi"]), _format(codes, numel)


def _format(codes: Tensor, numel: int) -> QuantFormat:
    """A code a byte is 8 bit (so is a single entry)."""
    return _FORMATS["8bit" if codes.numel() == numel else "4bit"]
