"""The storage of a block-quantized buffer, and the random bits of its stochastic rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["QuantFormat", "Quantized", "rounding_keys"]


@dataclass(frozen=True)
class QuantFormat:
    """How a buffer is block-quantized.

    Attributes:
        bits: 4 or 8 bits per code.
        block_size: Entries that share one pair of statistics; the last block may be shorter. Even for 4 bits, so that
            no byte is shared by two blocks.
        stat_dtype: Storage of the statistics lo and hi, bfloat16 or float32.
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

    @property
    def levels(self) -> int:
        """The largest code, 2^bits − 1."""
        return (1 << self.bits) - 1

    def num_blocks(self, numel: int) -> int:
        """Blocks, and so entries of lo and of hi, of a buffer of ``numel`` entries."""
        return -(-numel // self.block_size)

    def num_code_bytes(self, numel: int) -> int:
        """Bytes of codes of a buffer of ``numel`` entries; the last byte of an odd 4-bit buffer is half used."""
        return -(-numel * self.bits // 8)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A block-quantized buffer of ``numel`` entries: entry i is ``code[i]·u + lo`` with u = (hi − lo)/levels.

    Attributes:
        codes: uint8 [⌈numel·bits/8⌉]. 4-bit: the entry of even index is the high nibble, the odd one the low nibble.
        lo: ``format.stat_dtype`` [blocks], at most the least entry of the block.
        hi: ``format.stat_dtype`` [blocks], at least the greatest entry of the block.
        numel: Number of entries.
        format: Bits, block size and storage of the statistics.
    """

    codes: Tensor
    lo: Tensor
    hi: Tensor
    numel: int
    format: QuantFormat

    def check(self) -> None:
        """Raise if a tensor has not the dtype, shape, device and contiguity that the format demands."""
        fmt, blocks = self.format, self.format.num_blocks(self.numel)
        self._check_one("codes", self.codes, torch.uint8, fmt.num_code_bytes(self.numel))
        self._check_one("lo", self.lo, fmt.stat_dtype, blocks)
        self._check_one("hi", self.hi, fmt.stat_dtype, blocks)

    def _check_one(self, name: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
        if tensor.dtype != dtype or tensor.shape != (length,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of {self.numel} entries at {self.format} must be contiguous, {dtype}, of shape ({length},); "
                f"got {tensor.dtype} and {tuple(tensor.shape)}"
            )
        if tensor.device != self.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, codes on {self.codes.device}")


def rounding_keys(seed: int) -> tuple[int, int]:
    """Return the two 32-bit keys (as int32 values) of the counter-based generator that all backends share.

    splitmix64 of the seed, so that neighbouring seeds give unrelated bits.
    """
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    low, high = z & 0xFFFFFFFF, z >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)
