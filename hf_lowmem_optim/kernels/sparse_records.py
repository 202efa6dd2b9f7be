"""What the compiled loops of Top-K and of the sparse window know of a tensor: one record for all of them.

It has a part that is the same in every step (:data:`LAYOUT`: where the state lies and how it is cut up) and one that
tensors share in a step (:data:`RULE`), so that neither is made anew for every tensor in every step.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.cpu import buffer_arguments, random_argument
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.cpu_calls import ARGUMENTS, FLOAT, INT, QUEUE, Record, record
from hf_lowmem_optim.kernels.cpu_floats import array_at, float64_at, floats, int64_at
from hf_lowmem_optim.kernels.native_loops import NativeLoop

__all__ = [
    "DENSE",
    "FORM",
    "LAYOUT",
    "QUANTIZED",
    "RULE",
    "layout_fields",
    "loop_arguments",
    "rule_fields",
    "sparse_loop",
    "sparse_record",
]

#: ``error`` of a layout.
_NO_ERROR, DENSE, QUANTIZED = 0, 1, 2

#: Addresses and kinds as :func:`~hf_lowmem_optim.kernels.cpu_floats.floats` gives them. The window is ``indices`` and
#: ``values``, of ``window`` rows of ``kept`` entries; the error is ``error_at``, or ``codes``, ``lows`` and ``highs``.
LAYOUT = np.dtype(
    [
        (name, INT)
        for name in (
            "indices",
            "values",
            "value_kind",
            "window",
            "kept",
            "numel",
            "block_size",
            "kept_per_block",
            "grad_kind",
            "dense_kind",
            "error",
            "error_at",
            "error_kind",
            "codes",
            "lows",
            "highs",
            "stat_kind",
            "quant_block",
            "bits",
        )
    ]
)

#: ``row`` is the one that is written, or with which all others are multiplied; ``weights`` an address, float32.
RULE = np.dtype(
    [
        *((name, INT) for name in ("row", "stochastic", "key0", "key1", "weights")),
        *((name, FLOAT) for name in ("error_scale", "lr", "eps", "decay")),
    ]
)

#: ``grad`` is read, ``dense`` the parameter, or another vector; addresses.
FORM = record(layout=LAYOUT, rule=RULE, grad=INT, dense=INT)

_records_at = array_at(numba.from_dtype(FORM))
#: For the key of numba's cache the records, too, which lie elsewhere.
_ARGUMENTS = np.dtype([("arguments", ARGUMENTS), ("record", FORM)])


def sparse_loop(function: Callable[..., None]) -> NativeLoop:
    """Make a loop for :func:`~hf_lowmem_optim.kernels.cpu_calls.run_calls` over records of :data:`FORM`."""
    return NativeLoop(function, numba.from_dtype(_ARGUMENTS))


@numba.njit(inline="always")
def loop_arguments(pointer):
    """What such a loop finds at its pointer: records, queue, threads, blocks of a group, largest block, sums."""
    there = numba.carray(pointer, 1)[0].arguments
    calls, queue = _records_at(there.calls, there.tensors), int64_at(there.queue, QUEUE)
    sums = float64_at(there.sums, (there.groups, there.num_sums))
    return calls, queue, there.threads, there.group, there.largest, sums


def layout_fields(
    indices: Tensor,
    values: Tensor,
    *,
    numel: int,
    block_size: int,
    kept_per_block: int,
    grad: Tensor | None = None,
    dense: Tensor | None = None,
    error: Quantized | Tensor | None = None,
) -> tuple[Any, ...]:
    """The fields of :data:`LAYOUT`.

    Args:
        indices: int16 [window, kept], contiguous.
        values: bfloat16 or float32 [window, kept], contiguous.
        numel: Entries of the tensor, in any shape.
        block_size: Entries of a block.
        kept_per_block: Kept entries of a full block.
        grad: Only its dtype matters.
        dense: Likewise.
        error: The buffer of the error.
    """
    shape = (*indices.shape, numel, block_size, kept_per_block)
    kinds = (floats(grad)[1], floats(dense)[1])
    if isinstance(error, Quantized):
        codes, lows, highs, stat_kind, _, quant_block, bits = buffer_arguments(error)
        buffer = (QUANTIZED, 0, 0, codes, lows, highs, stat_kind, quant_block, bits)
    else:
        # no codes of 8 bits, in blocks of two entries
        buffer = (_NO_ERROR if error is None else DENSE, *floats(error), 0, 0, 0, 0, 2, 8)
    return (indices.data_ptr(), *floats(values), *shape, *kinds, *buffer)


def rule_fields(
    *,
    row: int = 0,
    seed: int | None = None,
    weights: Tensor | None = None,
    error_scale: float = 1.0,
    lr: float = 0.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Any, ...]:
    """The fields of :data:`RULE`; arguments as those of the operations."""
    decay = 1 - lr * weight_decay if weight_decay != 0 else 1.0
    address = 0 if weights is None else weights.data_ptr()
    return (row, *random_argument(seed), address, error_scale, lr, eps, decay)


def sparse_record(layout: Any, rule: Any, num_blocks: int, grad: Tensor | None, dense: Tensor | None) -> Record:
    """The fields of :data:`FORM`.

    Args:
        layout: A record of :data:`LAYOUT`, or its fields.
        rule: Likewise.
        num_blocks: Blocks of the tensor.
        grad: As the layout has it.
        dense: Likewise.
    """
    return (
        layout,
        rule,
        0 if grad is None else grad.data_ptr(),
        0 if dense is None else dense.data_ptr(),
        num_blocks,
    )
