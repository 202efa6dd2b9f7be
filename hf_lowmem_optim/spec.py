"""What a piece of optimizer state is: its shape, its storage, and the name under which its bytes are counted.

Every method describes its state as a ``dict[str, TensorSpec]``. The engine allocates from that description, the planner
sums it and the report groups it, so that predicted and measured bytes cannot differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

__all__ = ["QuantFormat", "TensorSpec", "quantized_specs"]


@dataclass(frozen=True)
class QuantFormat:
    """How a buffer is block-quantized.

    Attributes:
        bits: 4 or 8 bits per code.
        block_size: Entries that share one pair of statistics; the last block may be shorter. Even for 4 bits, so that
            no byte is shared by two blocks.
        stat_dtype: Storage of the statistics lo and hi, bfloat16 or float32.

    Raises:
        ValueError: A field is out of range.
    """

    bits: int = 4
    block_size: int = 64
    stat_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}")
        if not 1 <= self.block_size <= 32768:
            raise ValueError(f"quantization block_size must be in [1, 32768], got {self.block_size!r}")
        if self.bits == 4 and self.block_size % 2:
            raise ValueError(f"quantization block_size must be even for 4-bit codes, got {self.block_size!r}")
        if self.stat_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"stat_dtype must be torch.bfloat16 or torch.float32, got {self.stat_dtype!r}")

    def num_blocks(self, numel: int) -> int:
        """Return the blocks, and so the entries of lo and of hi, of a buffer of ``numel`` entries."""
        return -(-numel // self.block_size)

    def num_code_bytes(self, numel: int) -> int:
        """Return the bytes of codes of ``numel`` entries; the last byte of an odd 4-bit buffer is half used."""
        return -(-numel * self.bits // 8)


@dataclass(frozen=True)
class TensorSpec:
    """Description of one state tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: Storage dtype.
        component: Name under which its bytes are counted, for example ``"basis"`` or ``"error"``.
        in_gradient: Whether it is kept in the buffer of the parameter's gradient, which counts among the gradients.
        format: How it is quantized; set for the codes of a block-quantized buffer, None for every other tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    component: str
    in_gradient: bool = False
    format: QuantFormat | None = None

    @property
    def stored_bytes(self) -> int:
        """Number of entries times the size of one."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it adds to weights and gradients: none for what is kept in a gradient's buffer."""
        return 0 if self.in_gradient else self.stored_bytes

    @property
    def in_gradient_bytes(self) -> int:
        """Bytes of a gradient's buffer that it occupies."""
        return self.stored_bytes if self.in_gradient else 0

    def allocate(self, device: torch.device | str) -> torch.Tensor:
        """Return a zero tensor of this description on ``device``."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)

    def stack(self, count: int) -> TensorSpec:
        """Return several such tensors as one, [count, ...]."""
        return replace(self, shape=(count, *self.shape))

    def shard(self, num_shards: int, rank: int = 0, *, axis: int = 0) -> TensorSpec:
        """Return a process's part when the tensor is split into equal parts, of which the last may be shorter or empty.

        Args:
            num_shards: How many parts there are.
            rank: Which part; the first is the largest.
            axis: The dimension that is split; the first is the one along which FSDP2 splits parameters.
        """
        if not self.shape:
            return self
        length = -(-self.shape[axis] // num_shards)
        left = max(0, min(length, self.shape[axis] - rank * length))
        return replace(self, shape=(*self.shape[:axis], left, *self.shape[axis + 1 :]))


def quantized_specs(numel: int, fmt: QuantFormat, *, prefix: str = "error") -> dict[str, TensorSpec]:
    """Describe a block-quantized buffer; allocated as zeros, it holds zeros.

    Args:
        numel: Entries of the buffer.
        fmt: Bits, block size and storage of the statistics. The default takes 0.5 + 2·2/64 = 0.5625 bytes an entry.
        prefix: Name of the buffer in the state dict and in the accounting.

    Returns:
        ``"{prefix}_codes"``: uint8 [⌈numel·bits/8⌉]; ``"{prefix}_lo"`` and ``"{prefix}_hi"``: ``stat_dtype`` [blocks].
    """
    statistics = TensorSpec((fmt.num_blocks(numel),), fmt.stat_dtype, f"{prefix} statistics")
    codes = TensorSpec((fmt.num_code_bytes(numel),), torch.uint8, f"{prefix} codes", format=fmt)
    return {f"{prefix}_codes": codes, f"{prefix}_lo": statistics, f"{prefix}_hi": statistics}
