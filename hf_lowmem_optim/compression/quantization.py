"""Block-quantized state, as the optimizers use it: sizes, access through the state dict, and the operations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant import QuantFormat, Quantized, dequantize_, dequantize_add_, quantize_
from hf_lowmem_optim.state import TensorSpec

__all__ = [
    "QuantFormat",
    "Quantized",
    "dequantize_",
    "dequantize_add_",
    "quantize_",
    "quantized_specs",
    "quantized_state",
]


def quantized_specs(numel: int, fmt: QuantFormat, *, prefix: str = "error") -> dict[str, TensorSpec]:
    """Describe the state of a quantized buffer of ``numel`` entries; allocated as zeros, it holds zeros.

    Args:
        numel: Entries of the buffer.
        fmt: Bits, block size and storage of the statistics. The default takes 0.5 + 2·2/64 = 0.5625 bytes an entry.
        prefix: Name of the buffer in the state dict and in the accounting.

    Returns:
        ``"{prefix}_codes"``: uint8 [⌈numel·bits/8⌉]; ``"{prefix}_lo"`` and ``"{prefix}_hi"``: ``stat_dtype`` [blocks].
    """
    blocks = (fmt.num_blocks(numel),)
    return {
        f"{prefix}_codes": TensorSpec((fmt.num_code_bytes(numel),), torch.uint8, f"{prefix} codes"),
        f"{prefix}_lo": TensorSpec(blocks, fmt.stat_dtype, f"{prefix} statistics"),
        f"{prefix}_hi": TensorSpec(blocks, fmt.stat_dtype, f"{prefix} statistics"),
    }


def quantized_state(state: Mapping[str, Tensor], numel: int, fmt: QuantFormat, *, prefix: str = "error") -> Quantized:
    """Return the buffer that :func:`quantized_specs` described, on the tensors of ``state`` (shared, not copied)."""
    return Quantized(state[f"{prefix}_codes"], state[f"{prefix}_lo"], state[f"{prefix}_hi"], numel, fmt)
