"""Sums over a window of sparse rows: MicroAdam's statistics and update, and the two products that M-FAC needs.

A :class:`SparseWindow` holds the last ``window`` block-Top-K compressed gradients of one tensor. These operations read
it, none of them changes it:

- :func:`window_update_` — Adam's statistics from the window, and the step at the entries that it touches;
- :func:`window_dots` — G·x, the inner product of every row with a dense vector;
- :func:`window_combine_` — out ← out + Gᵀ·w;
- :func:`window_gram_row` — G·g for a row g of G;
- :func:`window_descend_` — W ← W·(1 − lr·wd) − lr·Gᵀ·w.

``foreach_…`` does an update or descent for several tensors in one call.

``reference.py`` is the specification. Rows are added in float32 in the order of their storage, so that the backends
``reference``, ``triton`` and ``cpu`` agree bit for bit in :func:`window_update_`, :func:`window_combine_` and
:func:`window_descend_`; where a device's division or square root is not correctly rounded, the update (not the
parameter) may differ in its last place. :func:`window_dots` and :func:`window_gram_row` add in float64, in an order
that depends on the backend.

NaN and infinity propagate as in AdamW: an infinite value gives z1/√z2 = Inf/Inf = NaN, and a NaN value gives NaN, at
the entry that it touches and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import Backend, choose_backend, flat, implementation
from hf_lowmem_optim.kernels.sparse_window.layout import MAX_BLOCK_SIZE, SparseWindow, WindowStep

__all__ = [
    "MAX_BLOCK_SIZE",
    "SparseWindow",
    "WindowStep",
    "check_param",
    "check_weights",
    "foreach_window_descend_",
    "foreach_window_update_",
    "window_combine_",
    "window_descend_",
    "window_dots",
    "window_gram_row",
    "window_update_",
]

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def window_update_(
    param: Tensor,
    window: SparseWindow,
    weights: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Take MicroAdam's step from the statistics of a window (arXiv 2405.15593, algorithm 1; ALGORITHMS.md section 2).

    With V the window's rows scattered to the size of the tensor::

        z1 ← Σ_rows weights[0, row]·V_row
        z2 ← Σ_rows weights[1, row]·(V_row·V_row)
        W  ← W·(1 − lr·weight_decay) − lr·(z1/(√z2 + eps))      the second term at touched entries only

    An entry is touched if it occurs in a row that counts; a row counts if one of its two weights is not zero. Without
    weight decay the untouched entries are left as they are, bit for bit. Everything is computed in float32 and each
    new entry is rounded once to the dtype of ``param``.

    Args:
        param: float32, bfloat16 or float16, contiguous, ``window.numel`` entries in any shape; changed in place.
        window: The compressed gradients.
        weights: float32 ``[2, window]``, not negative, on the device of ``param``: for the first and the second
            moment, the weight of each row with the bias correction in it. Zero for a row that was not written yet.
        lr: Learning rate.
        eps: Added to the root of z2.
        weight_decay: Decoupled weight decay.

    Raises:
        TypeError: For a dtype that is not listed above.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous.
        ImportError: If the requested backend is not installed.
    """
    foreach_window_update_([WindowStep(param, window, weights, lr, weight_decay, eps)])


def foreach_window_update_(steps: Sequence[WindowStep]) -> None:
    """Do :func:`window_update_` for several tensors of one device; to the bit what it does for each.

    Args:
        steps: The tensors, with the arguments for each.

    Raises:
        TypeError: As :func:`window_update_`. Earlier tensors may have been changed then.
        ValueError: As :func:`window_update_`, or the tensors are on several devices.
        ImportError: If the requested backend is not installed.
    """
    _run("window_update_", "update_all_", steps, (2,))


def window_dots(window: SparseWindow, dense: Tensor) -> Tensor:
    """Return the inner products G·x of the window's rows with a dense vector (M-FAC, arXiv 2107.03356).

    Rows that were not written yet must hold zeros as values.

    Args:
        window: The compressed gradients, as rows of G.
        dense: float32, contiguous, ``window.numel`` entries in any shape.

    Returns:
        float64 ``[window]``.

    Raises:
        TypeError: If ``dense`` is not float32.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous.
        ImportError: If the requested backend is not installed.
    """
    if dense.dtype != torch.float32:
        raise TypeError(f"dense must be float32, got {dense.dtype}")
    dense = _check_dense("dense", dense, window)
    backend = choose_backend("window_dots", dense.device)
    products: Tensor = implementation("sparse_window", backend).dots(window, flat(dense, backend))
    return products


def window_combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """Add a linear combination of the window's rows: out ← out + Gᵀ·weights (M-FAC, arXiv 2107.03356).

    Args:
        out: float32, contiguous, ``window.numel`` entries in any shape; changed in place.
        window: The compressed gradients, as rows of G.
        weights: float32 ``[window]`` on the device of ``out``. A row of weight zero is skipped.

    Raises:
        TypeError: If ``out`` is not float32.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous.
        ImportError: If the requested backend is not installed.
    """
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, got {out.dtype}")
    out = _check_dense("out", out, window)
    check_weights(weights, (window.window,), window.indices.device)
    backend = choose_backend("window_combine_", out.device)
    implementation("sparse_window", backend).combine_(flat(out, backend), window, weights)


def window_gram_row(window: SparseWindow, row: int) -> Tensor:
    """Return the inner products of all rows with one of them: a row of the Gram matrix GGᵀ.

    Rows that were not written yet must hold zeros as values.

    Args:
        window: The compressed gradients, as rows of G.
        row: Which row.

    Returns:
        float64 ``[window]``.

    Raises:
        IndexError: There is no such row.
        ImportError: If the requested backend is not installed.
    """
    if not 0 <= row < window.window:
        raise IndexError(f"row {row} is not one of the window's {window.window}")
    backend = choose_backend("window_gram_row", window.indices.device)
    products: Tensor = implementation("sparse_window", backend).gram_row(window, row)
    return products


def window_descend_(
    param: Tensor, window: SparseWindow, weights: Tensor, *, lr: float, weight_decay: float = 0.0
) -> None:
    """Descend along a linear combination of the window's rows: W ← W·(1 − lr·weight_decay) − lr·(Gᵀ·weights).

    Gᵀ·weights and the new entries are computed in float32; each entry is rounded once to the dtype of ``param``.

    Args:
        param: float32, bfloat16 or float16, contiguous, ``window.numel`` entries in any shape; changed in place.
        window: The compressed gradients, as rows of G.
        weights: float32 ``[window]`` on the device of ``param``. A row of weight zero is skipped.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.

    Raises:
        TypeError: For a dtype that is not listed above.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous.
        ImportError: If the requested backend is not installed.
    """
    foreach_window_descend_([WindowStep(param, window, weights, lr, weight_decay)])


def foreach_window_descend_(steps: Sequence[WindowStep]) -> None:
    """Do :func:`window_descend_` for several tensors of one device; to the bit what it does for each.

    Args:
        steps: The tensors, with the arguments for each.

    Raises:
        TypeError: As :func:`window_descend_`. Earlier tensors may have been changed then.
        ValueError: As :func:`window_descend_`, or the tensors are on several devices.
        ImportError: If the requested backend is not installed.
    """
    _run("window_descend_", "descend_all_", steps, ())


def _run(operation: str, function: str, steps: Sequence[WindowStep], leading: tuple[int, ...]) -> None:
    """Run a backend's function on steps, which are checked one by one. ``leading``: as for :func:`_check_step`."""
    if not steps:
        return
    device = steps[0].param.device
    backend = choose_backend(operation, device)
    checked = (_check_step(step, leading, device, backend) for step in steps)
    getattr(implementation("sparse_window", backend), function)([step.rows for step in steps], checked)


def _check_step(step: WindowStep, leading: tuple[int, ...], device: torch.device, backend: Backend) -> WindowStep:
    """Check a step, and return it as the backend takes it.

    Args:
        step: The step.
        leading: Dimensions of the weights before that of the rows.
        device: Where its tensors have to be.
        backend: Which one.
    """
    param, rows, weights, lr, weight_decay, eps = step
    param = check_param(param, rows, device)
    check_weights(weights, (*leading, rows.window), device)
    return WindowStep(flat(param, backend), rows, weights, float(lr), float(weight_decay), float(eps))


def check_param(param: Tensor, rows: SparseWindow, device: torch.device) -> Tensor:
    """Check the parameter of a window, and return it, detached."""
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"param must be float32, bfloat16 or float16, got {param.dtype}")
    _check_device("param", param.device, device)
    return _check_dense("param", param, rows)


def _check_device(name: str, device: torch.device, other: torch.device) -> None:
    if device != other:
        raise ValueError(f"{name} is on {device}, that of another tensor on {other}")


def _check_dense(name: str, dense: Tensor, window: SparseWindow) -> Tensor:
    """Check a dense tensor against the window and return it, detached."""
    if dense.numel() != window.numel:
        raise ValueError(f"{name} has {dense.numel()} entries, the window is of {window.numel}")
    if not dense.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if dense.device != window.indices.device:
        raise ValueError(f"{name} is on {dense.device}, the window on {window.indices.device}")
    return dense.detach() if dense.requires_grad else dense


def check_weights(weights: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Check the weights of the rows of windows on a device."""
    if weights.dtype != torch.float32:
        raise TypeError(f"weights must be float32, got {weights.dtype}")
    if tuple(weights.shape) != shape or not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous and of shape {[*shape]}, got {[*weights.shape]}")
    if weights.device != device:
        raise ValueError(f"weights are on {weights.device}, the window on {device}")
