"""How the last compressed gradients of one tensor lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "GRAM_ROWS",
    "MAX_BLOCK_SIZE",
    "SparseWindow",
    "WindowStep",
    "num_programs",
    "product_scratch_bytes",
    "sorted_slots",
    "update_scratch_bytes",
]

MAX_BLOCK_SIZE = 32768
"""Indices are relative to their block and stored as int16."""

#: Scratch memory of a GPU's kernel at most, which stays in the second-level cache.
_SCRATCH_BYTES = 1 << 25
#: Rows that a program of a GPU multiplies with one of them, in scratch memory of its own.
GRAM_ROWS = 32
#: What a GPU's kernel sorts: 12 bits of index, 4 bits of row (row 15 marks padding), and keys of one program.
_SORTED_BLOCK_SIZE, _SORTED_WINDOW, _SORTED_SLOTS = 4096, 15, 2048
VALUE_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class SparseWindow:
    """The last compressed gradients of one tensor of ``numel`` entries, one per row.

    The tensor is cut into blocks of ``block_size`` entries, the last one shorter. Block ``b`` owns the columns from
    ``b * kept_per_block`` on; the last block owns what is left, at most ``kept_per_block``. Within a row the indices of
    a block ascend strictly. A row that was not written yet may hold anything that is in range (zeros, for example):
    the operations skip a row whose weights are all zero.

    Attributes:
        indices: int16 ``[window, kept]``, contiguous; positions relative to the start of the block.
        values: bfloat16 or float32 ``[window, kept]``, contiguous.
        numel: Number of entries of the tensor.
        block_size: Entries per block, 1 to 32768.
        kept_per_block: Kept entries of a full block, 1 to ``block_size``.

    Raises:
        TypeError: For a dtype that is not listed above.
        ValueError: For shapes that contradict each other, or tensors that are not contiguous or not on one device.
    """

    indices: Tensor
    values: Tensor
    numel: int
    block_size: int
    kept_per_block: int

    def __post_init__(self) -> None:
        """Check everything that can be checked without reading the tensors."""
        indices, values = self.indices, self.values
        if indices.dtype != torch.int16:
            raise TypeError(f"indices must be int16, got {indices.dtype}")
        if values.dtype not in VALUE_DTYPES:
            raise TypeError(f"values must be bfloat16 or float32, got {values.dtype}")
        if indices.ndim != 2 or indices.shape != values.shape:
            raise ValueError(
                f"indices and values must both be [window, kept], got {[*indices.shape]} and {[*values.shape]}"
            )
        if not (indices.is_contiguous() and values.is_contiguous()):
            raise ValueError("indices and values must be contiguous")
        if indices.device != values.device:
            raise ValueError(f"indices are on {indices.device}, values on {values.device}")
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size must be between 1 and {MAX_BLOCK_SIZE}, got {self.block_size}")
        if not 1 <= self.kept_per_block <= self.block_size:
            raise ValueError(f"kept_per_block must be between 1 and block_size, got {self.kept_per_block}")
        before = (self.numel - 1) // self.block_size  # blocks before the last one
        last = self.numel - before * self.block_size
        if not 1 <= indices.shape[1] - before * self.kept_per_block <= min(self.kept_per_block, last):
            raise ValueError(
                f"{self.numel} entries in blocks of {self.block_size} with {self.kept_per_block} kept per block "
                f"cannot give rows of {self.kept} entries"
            )

    @property
    def window(self) -> int:
        """Number of rows."""
        return self.indices.shape[0]

    @property
    def kept(self) -> int:
        """Number of entries of a row."""
        return self.indices.shape[1]

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the short one included."""
        return -(-self.numel // self.block_size)


class WindowStep(NamedTuple):
    """One tensor of ``foreach_window_update_`` or ``foreach_window_descend_``, and their arguments for it.

    Attributes:
        param: float32, bfloat16 or float16, contiguous; changed in place.
        rows: The compressed gradients.
        weights: float32 ``[2, window]`` for the update, ``[window]`` for the descent.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        eps: Added to the root of z2; for the update only.
    """

    param: Tensor
    rows: SparseWindow
    weights: Tensor
    lr: float
    weight_decay: float = 0.0
    eps: float = 0.0


def product_scratch_bytes(numel: int, window: int, block_size: int) -> int:
    """Scratch memory and partial sums that products of the rows of a window take on a GPU, in bytes.

    Args:
        numel: Number of entries of the tensor.
        window: Number of rows.
        block_size: Entries of a block.
    """
    parts = -(-window // GRAM_ROWS)
    programs = num_programs(numel, block_size, parts)
    return programs * (4 * parts * block_size + 8 * window)


def num_programs(numel: int, block_size: int, blocks: int = 1) -> int:
    """Programs on a GPU with so many float32 blocks of scratch memory each that all stay in the second-level cache."""
    return max(1, min(-(-numel // block_size), _SCRATCH_BYTES // (4 * block_size * blocks)))


def sorted_slots(window: int, kept_per_block: int, block_size: int, values: torch.dtype) -> int | None:
    """Keys that a GPU's kernel sorts for a block, None where the rows are added up in scratch memory.

    Args:
        window: Number of rows.
        kept_per_block: Kept entries of a full block.
        block_size: Entries of a block.
        values: Dtype of the values.
    """
    slots = max(128, 1 << (window * kept_per_block - 1).bit_length())
    fits = block_size <= _SORTED_BLOCK_SIZE and window <= _SORTED_WINDOW and slots <= _SORTED_SLOTS
    return slots if fits and values == torch.bfloat16 else None


def update_scratch_bytes(numel: int, window: int, kept_per_block: int, block_size: int, values: torch.dtype) -> int:
    """Scratch memory that Adam's statistics take on a GPU, in bytes; arguments as above."""
    if sorted_slots(window, kept_per_block, block_size, values) is not None:
        return 0
    return 8 * block_size * num_programs(numel, block_size, 2)
