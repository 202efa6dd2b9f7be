"""Where the compression error ξ is kept between two steps, and in which precision.

``add_residual`` gives a = g + ξ in float32, ``save_residual_`` stores what is left of it. A float32 buffer is used in
place: it *becomes* a, so that nothing of the gradient's size is allocated. With ``"grad"`` the buffer is the gradient's
own, and g has been added to ξ in it before the step (``engine/backward.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import FLOAT_DTYPES, Quantized, dequantize_, dequantize_add_, quantize_
from hf_lowmem_optim.spec import QuantFormat, TensorSpec, quantized_specs

__all__ = [
    "FORMATS",
    "CompressedErrorFeedback",
    "ErrorFeedback",
    "add_residual",
    "check_rounding",
    "error_state",
    "load_residual",
    "quantized_errors",
    "save_residual_",
]

ErrorFeedback = Literal["param", "fp32", "bf16", "8bit", "4bit", "grad", "none"]
"""The storages of the error."""

CompressedErrorFeedback = Literal["fp32", "bf16", "8bit", "4bit"]
"""Those of a method that stores the error apart from parameter and gradient."""

_SLICE_ENTRIES = 1 << 16

FORMATS = {"8bit": QuantFormat(8, 64), "4bit": QuantFormat(4, 64)}
"""How a quantized error is quantized."""


def check_rounding(stochastic: bool, storage: str) -> None:
    """Raise ValueError if stochastic rounding is asked for where nothing is rounded."""
    if stochastic and storage not in FORMATS:
        raise ValueError(
            f"stochastic_rounding=True needs a quantized error, error_feedback='8bit' or '4bit', not {storage!r}"
        )


def error_state(shape: Sequence[int], dtype: torch.dtype, storage: str) -> dict[str, TensorSpec]:
    """Describe the state that holds the error of one tensor; ``storage`` is one of :data:`ErrorFeedback`."""
    if storage == "none":
        return {}
    if storage in FORMATS:
        return quantized_specs(math.prod(shape), FORMATS[storage])
    stored = {"param": dtype, "grad": dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[storage]
    return {"error": TensorSpec(tuple(shape), stored, "error", in_gradient=storage == "grad")}


def add_residual(g: Sequence[Tensor], state: Mapping[str, Tensor], fmt: QuantFormat | None) -> Tensor:
    """Return a = g + ξ in float32.

    Args:
        g: Gradients of one shape, contiguous, any floating dtype; only read, unless one is the error's own buffer,
            which then holds g + ξ already.
        state: The stacked state of the tensors; a float32 error is overwritten, until :func:`save_residual_`.
        fmt: How the error is quantized; None where it is not.

    Returns:
        [number of tensors, *shape of g]: the error's own float32 buffer; or, of one float32 gradient without an error,
        the gradient itself, which the caller must not write to; or a new tensor.
    """
    error = state.get("error")
    if error is None and fmt is None and len(g) == 1:
        return g[0].float()[None]
    if error is not None:
        a = error.float().view(len(g), *g[0].shape)
        if error.data_ptr() != g[0].data_ptr():
            for part, grad in zip(a.unbind(), g, strict=True):
                _add_(part, grad)
        return a
    a = torch.empty((len(g), *g[0].shape), dtype=torch.float32, device=g[0].device)
    if fmt is not None and len(g) == 1 and g[0].dtype in FLOAT_DTYPES:  # in one pass
        dequantize_add_(a, quantized_errors(state, fmt, 1, a.numel())[0], onto=g[0])
        return a
    torch._foreach_copy_(list(a.unbind()), list(g))
    if fmt is not None:
        for buffer, part in _pairs(state, fmt, a):
            dequantize_add_(part, buffer)
    return a


def load_residual(
    state: Mapping[str, Tensor], fmt: QuantFormat | None, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return ξ in float32, for an update that works in coordinates of its own: a float32 error's buffer, or a copy.

    Args:
        state: The stacked state of the tensors.
        fmt: How the error is quantized; None where it is not.
        shape: That of all the tensors' errors, [number of tensors, ...].
        device: Where they lie.

    Returns:
        float32 of this shape; zeros without an error.
    """
    if (error := state.get("error")) is not None:
        return error.float()
    residual = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
    if fmt is not None:
        for buffer, part in _pairs(state, fmt, residual):
            dequantize_(part, buffer)
    return residual


def _add_(out: Tensor, grad: Tensor) -> None:
    """Add a gradient in slices where it is narrower: a CPU would first copy the whole of it to float32."""
    length = _SLICE_ENTRIES if grad.device.type == "cpu" and grad.dtype != out.dtype else max(1, out.numel())
    for into, part in zip(torch.split(out.view(-1), length), torch.split(grad.view(-1), length), strict=True):
        into.add_(part)


def save_residual_(
    state: Mapping[str, Tensor], residual: Tensor, fmt: QuantFormat | None, *, seed: int | None = None
) -> None:
    """Store ξ ← residual in the precision of the buffer; nothing without one.

    Args:
        state: The stacked state of the tensors, with or without an error.
        residual: What the compression cut off, float32, [number of tensors, ...].
        fmt: How the error is quantized; None where it is not.
        seed: For a quantized error: an integer rounds stochastically with that seed, None to nearest.
    """
    error = state.get("error")
    if error is not None and error.data_ptr() != residual.data_ptr():
        error.copy_(residual.view(error.shape))
    elif fmt is not None:
        for buffer, part in _pairs(state, fmt, residual, one_by_one=seed is not None):
            quantize_(buffer, part, seed=seed)


def quantized_errors(state: Mapping[str, Tensor], fmt: QuantFormat, count: int, numel: int) -> list[Quantized]:
    """Return the quantized errors of a batch of ``count`` tensors of ``numel`` entries each."""
    parts = [state[f"error_{part}"].unbind() for part in ("codes", "lo", "hi")]
    return [Quantized(parts[0][i], parts[1][i], parts[2][i], numel, fmt) for i in range(count)]


def _pairs(
    state: Mapping[str, Tensor], fmt: QuantFormat, dense: Tensor, *, one_by_one: bool = False
) -> Iterator[tuple[Quantized, Tensor]]:
    """Yield quantized errors with their parts of a float32 tensor: all as one buffer where no block spans two tensors.

    Not ``one_by_one``: what is drawn at random goes by an entry's place in the buffer.
    """
    count, numel = len(dense), dense[0].numel()
    stacked = [state[f"error_{part}"] for part in ("codes", "lo", "hi")]
    if numel % fmt.block_size == 0 and not one_by_one and all(part.is_contiguous() for part in stacked):
        codes, lo, hi = (part.view(-1) for part in stacked)
        yield Quantized(codes, lo, hi, count * numel, fmt), dense
        return
    yield from zip(quantized_errors(state, fmt, count, numel), dense.unbind(), strict=True)
