"""How the entries that Top-K keeps are counted and laid out.

A tensor of ``numel`` entries is cut into blocks of ``block_size`` (the last one shorter). A block of n entries keeps
⌈density·n⌉ of them. One step's selection is one row: block b's entries start at ``b * kept_per_block(...)``, in
ascending order of their index, which is relative to the block so that int16 holds it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import Quantized

__all__ = ["MAX_BLOCK_SIZE", "Selection", "check_block_size", "kept_per_block", "num_kept"]

MAX_BLOCK_SIZE = 32768  # int16 indices hold 0 … 32767


@functools.lru_cache(maxsize=4096)
def kept_per_block(num_entries: int, density: float) -> int:
    """Return ⌈density·num_entries⌉, the entries kept of a block of ``num_entries``.

    ``density`` counts as the decimal that it prints as: 7% of 100 entries are 7, although 0.07 * 100 > 7 in float64.

    Raises:
        ValueError: The density is not in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    return math.ceil(Fraction(repr(float(density))) * num_entries)


def num_kept(numel: int, block_size: int, density: float) -> int:
    """Return how many entries one step keeps of a tensor of ``numel`` entries, over all of its blocks.

    Raises:
        ValueError: The block size is not in [1, 32768], or the density not in (0, 1].
    """
    check_block_size(block_size)
    num_full, rest = divmod(numel, block_size)
    kept = num_full * kept_per_block(block_size, density)
    return kept + (kept_per_block(rest, density) if rest else 0)


def check_block_size(block_size: int) -> None:
    """Raise ValueError if int16 indices cannot address a block of this size."""
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size must be in [1, {MAX_BLOCK_SIZE}] (indices are int16), got {block_size!r}")


@dataclass(slots=True, eq=False)
class Selection:
    """One tensor of a call, its arguments checked, for the backends.

    Attributes:
        indices: int16 [window, kept].
        values: bfloat16 or float32 [window, kept].
        row: The row of both that is written.
        kept: Entries of a row.
        grad: The gradient.
        error: The error's buffer, dense or quantized, or None.
        block_size: Entries of a full block.
        k: Entries kept of a full block.
        k_last: Entries kept of the last block, which may be shorter.
        error_scale: Factor of the error that is added to the gradient.
        seed: Seed of the stochastic rounding of a quantized error; None rounds to nearest.
    """

    indices: Tensor
    values: Tensor
    row: int
    kept: int
    grad: Tensor
    error: Quantized | Tensor | None
    block_size: int
    k: int
    k_last: int
    error_scale: float
    seed: int | None

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the short one included."""
        return -(-self.grad.numel() // self.block_size)
