"""A tensor that a sparse rule updates, and how it is treated in a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import QuantFormat

__all__ = ["SparseSteps", "SparseTensor", "StepRule"]


class SparseTensor(NamedTuple):
    """A tensor in a step, on the tensors of its state.

    Attributes:
        param: float32, bfloat16 or float16, contiguous, any shape; changed in place.
        grad: Likewise, of the parameter's size; only read.
        indices: int16 [window, kept], contiguous; a row is written.
        values: bfloat16 or float32 [window, kept], contiguous; a row is written.
        error: Codes, lo and hi of a quantized error; or a dense one, float32, bfloat16 or float16. Written.
        error_format: How the error is quantized; None for a dense one.
        block_size: Entries of a block.
        density: Share of each block's entries that is kept.
    """

    param: Tensor
    grad: Tensor
    indices: Tensor
    values: Tensor
    error: tuple[Tensor, ...]
    error_format: QuantFormat | None
    block_size: int
    density: float


class StepRule(NamedTuple):
    """How tensors are treated in a step; the same object for all that are treated alike.

    Attributes:
        row: The row of the window that is written.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        eps: Added to the root of MicroAdam's second moment.
        weights: MicroAdam's weights of the rows, float32 [2, window].
        error_scale: Factor of the error that is added to the gradient.
        seed: Seed of the stochastic rounding of a quantized error; None rounds to nearest.
    """

    row: int
    lr: float
    weight_decay: float = 0.0
    eps: float = 0.0
    weights: Tensor | None = None
    error_scale: float = 1.0
    seed: int | None = None


class SparseSteps(ABC):
    """One step of several tensors of one device: see :func:`hf_lowmem_optim.kernels.sparse_steps.sparse_steps`."""

    def __init__(self, calls: Sequence[tuple[SparseTensor, StepRule]]) -> None:
        # held until the end: a compiled loop has only addresses
        self._calls = calls
        self._has_row = False

    def _check_order(self) -> None:
        """Raise RuntimeError if there is no new row yet to descend along."""
        if not self._has_row:
            raise RuntimeError("descend_() before topk_gram_row_(): there is no new row in the windows")

    @abstractmethod
    def topk_update_(self) -> None:
        """Take MicroAdam's step: ``block_topk_``, then ``window_update_``, for each tensor.

        Raises:
            TypeError: As the two operations. Earlier tensors may have been updated then, and likewise below.
            ValueError: As the two operations, or the tensors are on several devices.
        """

    @abstractmethod
    def topk_gram_row_(self, window: int) -> Tensor:
        """Do ``block_topk_``, and then ``window_gram_row`` with the row just written, for each tensor.

        Args:
            window: Rows of every window.

        Returns:
            float64 [window]: the inner products of all rows with the newest one, over all tensors.

        Raises:
            ValueError: As the two operations, or the tensors are on several devices, or a window has other rows.
        """

    @abstractmethod
    def descend_(self, weights: Tensor) -> None:
        """Do ``window_descend_`` for each tensor, after :meth:`topk_gram_row_`.

        Args:
            weights: float32 [window], contiguous, on the device of the tensors.

        Raises:
            TypeError: As the operation.
            ValueError: As the operation.
            RuntimeError: The other one was not called.
        """
