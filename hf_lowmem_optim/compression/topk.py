"""Block Top-K with error feedback, as the optimizers use it: sizes of its state, and the compression itself."""

from __future__ import annotations

import torch

from hf_lowmem_optim.kernels.block_topk.layout import MAX_BLOCK_SIZE, kept_per_block, num_kept
from hf_lowmem_optim.state import TensorSpec

__all__ = ["MAX_BLOCK_SIZE", "kept_per_block", "num_kept", "window_specs"]


def window_specs(
    numel: int,
    *,
    window: int,
    density: float,
    block_size: int,
    value_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, TensorSpec]:
    """Describe the window of the last ``window`` selections of a tensor of ``numel`` entries.

    Row (t − 1) mod window is written at step t. In each row, block b's entries start at
    ``b * kept_per_block(block_size, density)``, ascending; an index is relative to its block.

    Args:
        numel: Entries of the tensor.
        window: Number of rows.
        density: Fraction of each block's entries that one step keeps, rounded up.
        block_size: Entries of a block, at most 32768.
        value_dtype: Storage of the values.

    Returns:
        ``"indices"``: int16 [window, kept]; ``"values"``: ``value_dtype`` [window, kept].

    Raises:
        ValueError: An argument is out of range.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window!r}")
    shape = (window, num_kept(numel, block_size, density))
    return {
        "indices": TensorSpec(shape, torch.int16, "indices"),
        "values": TensorSpec(shape, value_dtype, "values"),
    }
