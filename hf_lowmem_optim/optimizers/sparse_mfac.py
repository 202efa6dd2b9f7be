"""SparseMFAC: M-FAC with a window of sparse gradients (Modoranu et al., arXiv 2306.06098, ICML 2024).

Over all compressed tensors of the optimizer as one vector (``scope="model"``) or over each by itself (``"tensor"``),
window m, with the window's rows as the matrix G:

1. acc ← ξ + g
2. c ← the ⌈density·block⌉ entries of largest |acc| per block, as ``value_dtype`` stores them;  ξ ← acc − c
3. row (t − 1) mod m of G ← c
4. row and column (t − 1) mod m of GGᵀ ← G c
5. u ← F⁻¹c = Gᵀw with F = λI + (1/m)·Σ gᵢgᵢᵀ over the rows gᵢ of G, and the weights w from GGᵀ alone
6. vel ← μ·vel + u                                            if μ > 0
7. W ← W·(1 − lr·weight_decay) − lr·(vel or u)

| letter | state key                | shape               | dtype            | bytes per parameter                  |
|--------|--------------------------|---------------------|------------------|--------------------------------------|
| c      | `indices`                | (m, kept)           | int16            | 2·m·density; with the values if 4bit |
| c      | `values`                 | (m, kept)           | `value_dtype`    | m·density·(4 fp32, 2 bf16, 1 8bit)   |
| c      | `value_lo`, `value_step` | (m, ⌈n/block_size⌉) | float32          | 8·m/block_size (8bit, 4bit)          |
| ξ      | `error`…                 | (n,)                | `error_feedback` | 4 fp32, 2 bf16, 1.06 8bit, 0.56 4bit |

and GGᵀ and vel as in ``preconditioned.py``. Every tensor is compressed, also small ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import Batch
from hf_lowmem_optim.engine.error_feedback import FORMATS, error_state
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import FRACTION, count_up_to, option
from hf_lowmem_optim.ops.block_topk import fault_of_window, foreach_block_topk_, window_specs
from hf_lowmem_optim.ops.gram import mfac_weights, update_systems_
from hf_lowmem_optim.ops.sparse_window import foreach_window_descend_, foreach_window_gram_rows, window_combine_
from hf_lowmem_optim.ops.weight_correction import CORRECTION
from hf_lowmem_optim.ops.window import (
    MAX_BLOCK_SIZE,
    VALUES_HELP,
    SparseWindow,
    ValueDtype,
    check_block_and_values,
    errors_of,
    windows_of,
)
from hf_lowmem_optim.optimizers.preconditioned import (
    PreconditionedOptions,
    add_momentum_,
    descend_,
    gram_state,
    own_state,
)
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["SparseMFAC", "SparseMFACOptions", "clear_sparse_row_", "sparse_mfac_state", "sparse_update_"]


@dataclass(frozen=True)
class SparseMFACOptions(PreconditionedOptions):
    """The options of :class:`SparseMFAC` and of :class:`~hf_lowmem_optim.optimizers.sparse_ggt.SparseGGT`."""

    density: float | None = option(
        0.01,
        "Fraction of the entries of each block that a gradient keeps.",
        within=FRACTION,
        none="dense AdamW",
        shapes_state=True,
    )
    block_size: int = option(
        4096,
        "Entries of the blocks in which Top-K selects; a multiple of 64 for a quantized error.",
        within=count_up_to(MAX_BLOCK_SIZE),
        shapes_state=True,
    )
    value_dtype: ValueDtype = option("bf16", VALUES_HELP, shapes_state=True)

    def check(self) -> None:
        """Check that quantization blocks fit into blocks."""
        fmt = FORMATS.get(self.error_feedback)
        if fmt is not None and self.block_size % fmt.block_size:
            raise ValueError(
                f"block_size={self.block_size!r} must be a multiple of {fmt.block_size} for "
                f'error_feedback={self.error_feedback!r}, or take error_feedback="bf16"'
            )
        check_block_and_values(self.block_size, self.value_dtype)


def sparse_mfac_state(shape: Sequence[int], dtype: torch.dtype, o: SparseMFACOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        o: The options.

    Returns:
        Specs by state key; None with ``density=None``.
    """
    if o.density is None:
        return None
    numel = math.prod(shape)
    return {
        **window_specs(numel, window=o.window, density=o.density, block_size=o.block_size, value_dtype=o.value_dtype),
        **error_state((numel,), dtype, o.error_feedback),
        **own_state(shape, o),
    }


def sparse_update_(
    tensors: Sequence[Batch],
    shared: Mapping[str, Sequence[Tensor]],
    t: int,
    everywhere: Callable[[Tensor], Tensor] | None = None,
    *,
    row_weights: Callable[..., Tensor] = mfac_weights,
) -> None:
    """Take one step on the tensors of one system, or of one each, in place.

    Without momentum nothing of their size is allocated.

    Args:
        tensors: The tensors; their state as :func:`sparse_mfac_state` describes it.
        shared: ``"gram"``, GGᵀ of the system of all tensors, or of each tensor's, float64 [m, m]; written.
        t: 1 for the first step of the systems.
        everywhere: Adds the rows of the tensors that other processes update to those of Gc.
        row_weights: ``(gram, row, *, damping) -> w``, which line 5 is.
    """
    o = tensors[0].options
    row = (t - 1) % o.window
    numels = [[g.numel() for g in x.g] for x in tensors]
    windows = [
        windows_of(x.state, n, x.options.block_size, x.options.density) for x, n in zip(tensors, numels, strict=True)
    ]
    # 1. acc ← ξ + g   2. c ← largest entries of acc;  ξ ← acc − c   3. row of G ← c
    for x, n, each in zip(tensors, numels, windows, strict=True):
        fmt = FORMATS.get(x.options.error_feedback)
        errors = x.state["error"] if fmt is None else errors_of(x.state, n, fmt)
        foreach_block_topk_(x.g, each, errors, row=row, density=x.options.density, memo=x.state["memo"])
    # 4. row and column of GGᵀ ← G c
    products = [
        foreach_window_gram_rows(each, row, memo=x.state["memo"]) for x, each in zip(tensors, windows, strict=True)
    ]
    # 5. u ← Gᵀw
    weights = functools.partial(row_weights, damping=o.damping)
    w = update_systems_(shared["gram"], row, products, everywhere, weights)
    for x, each in zip(tensors, windows, strict=True):
        _descend_(x, each, w.to(x.g[0].device))


def _descend_(x: Batch, windows: Sequence[SparseWindow], w: Tensor) -> None:
    """Move the tensors of a batch: u ← Gᵀw with w for all or for each, and lines 6 and 7."""
    o = x.options
    with x.weights() as W:
        if o.momentum == 0:
            # 7. W ← W·(1 − lr·weight_decay) − lr·u, without ever forming u
            memo, corrections = x.state["memo"], x.state.get(CORRECTION)
            foreach_window_descend_(
                W, windows, w, lr=o.lr, weight_decay=o.weight_decay, memo=memo, corrections=corrections
            )
            return
        for weight, G, velocity, each in zip(W, windows, x.state["velocity"], w.expand(len(W), -1), strict=True):
            _descend_with_momentum_(weight, G, velocity, each, o)


def _descend_with_momentum_(weight: Tensor, G: SparseWindow, velocity: Tensor, w: Tensor, o: SparseMFACOptions) -> None:
    u = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
    window_combine_(u, G, w)
    # 6. vel ← μ·vel + u   7. W ← W·(1 − lr·weight_decay) − lr·vel
    descend_(weight, add_momentum_(velocity, u, o.momentum), o)


def clear_sparse_row_(state: Mapping[str, Tensor], t: int) -> None:
    """Set a tensor's row of G to zero in a step without a gradient."""
    for key in ("values", "value_lo", "value_step"):  # with a grid of zeros every code is zero
        if key in state:
            state[key][(t - 1) % len(state[key])] = 0


class SparseMFAC(LowMemoryOptimizer):
    """SparseMFAC: the gradient, preconditioned by the inverse Fisher matrix of a window of sparse gradients.

    One Fisher matrix spans all parameters, small tensors included. A group with ``density=None`` takes AdamW,
    bit-equal to torch's. A tensor without a gradient in a step counts as zero in that step's row and is not moved. A
    non-finite gradient makes every parameter of the Fisher matrix non-finite, as the formula has it. ``window``,
    ``damping`` and ``scope`` must be the same in all groups that share a Fisher matrix. The first step is about
    m·c/‖c‖² for small damping: larger for smaller gradients.

    Example:
        >>> optimizer = SparseMFAC(model.parameters(), lr=1e-3, window=32, density=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2306.06098, algorithm 1 with Top-K as compressor; arXiv 2107.03356 for the preconditioner.
    """

    method = Method(
        "sparse_mfac",
        SparseMFACOptions,
        sparse_mfac_state,
        switch=("density", None),
        scratch=lambda o, shape: 1.0 if o.momentum > 0 else 0.0,  # u
        whole=True,
        captured=True,
        corrected={"momentum": 0.0},
        adam_like=False,
        optional_state={"velocity": "momentum"},
        coupled_update_=sparse_update_,
        shared_state=gram_state,
        shared_options=("scope", "window", "damping"),
        absent_=clear_sparse_row_,
        block_entries=lambda o: o.block_size if o.scope == "model" else None,
        check_loaded=lambda state, shape, o: fault_of_window(state, math.prod(shape), o.block_size, o.density),
    )
