"""MicroAdam (Modoranu et al., arXiv 2405.15593, NeurIPS 2024): Adam over a window of sparse gradients.

Per tensor, flattened to d entries and cut into blocks of `block_size`, Q the block quantizer of `ops/block_quant`:

1.  W ← W − lr·alpha·Q⁻¹(e)                                        only if alpha > 0
2.  a ← g + (1 − alpha)·Q⁻¹(e)
3.  I, V ← the ⌈density·n⌉ entries of largest |a| of each block;  a[I] ← a[I] − V  (what V's storage cuts off)
4.  e ← Q(a)
5.  store (I, V) in row (t − 1) mod m of the window
6.  z1 ← (1 − β1)/(1 − β1^T)·Σ_rows β1^age·V;  z2 ← (1 − β2)/(1 − β2^T)·Σ_rows β2^age·V²
7.  W ← W·(1 − lr·weight_decay) − lr·z1/(√z2 + eps)               the second term at touched entries only

T = t with `bias_correction="step"`, min(t, m) with `"window"`; age is the number of steps since a row was written.

| letter | state key                | shape                | dtype         | bytes per parameter                |
|--------|--------------------------|----------------------|---------------|------------------------------------|
| I      | `indices`                | (m, kept)            | int16         | 2·m·density; with V if 4bit        |
| V      | `values`                 | (m, kept)            | `value_dtype` | m·density·(4 fp32, 2 bf16, 1 8bit) |
| V      | `value_lo`, `value_step` | (m, ⌈d/block_size⌉)  | float32       | 8·m/block_size (8bit, 4bit)        |
| e      | `error_codes`            | ⌈d·bits/8⌉           | uint8         | 0.5 (4 bit), 1 (8 bit)             |
| e      | `error_lo`, `error_hi`   | ⌈d/quant_block_size⌉ | bfloat16      | 4/quant_block_size                 |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, FRACTION, UNIT, Options, count_up_to, option
from hf_lowmem_optim.ops.block_quant import dequantize_add_
from hf_lowmem_optim.ops.block_topk import fault_of_window, foreach_block_topk_, window_specs
from hf_lowmem_optim.ops.constants import to_device
from hf_lowmem_optim.ops.sparse_window import foreach_window_update_
from hf_lowmem_optim.ops.step_numbers import Number
from hf_lowmem_optim.ops.weight_correction import CORRECTION
from hf_lowmem_optim.ops.window import (
    MAX_BLOCK_SIZE,
    VALUES_HELP,
    ValueDtype,
    check_block_and_values,
    errors_of,
    windows_of,
)
from hf_lowmem_optim.spec import QuantFormat, TensorSpec, quantized_specs

__all__ = ["MicroAdam", "MicroAdamOptions", "microadam_state", "microadam_update_"]


@dataclass(frozen=True)
class MicroAdamOptions(Options):
    """The options of :class:`MicroAdam`."""

    window: int = option(10, "m, how many sparse gradients are kept.", within=COUNT, shapes_state=True)
    density: float | None = option(
        0.01, "Share of each block's entries that a step keeps.", within=FRACTION, none="dense AdamW", shapes_state=True
    )
    block_size: int = option(
        4096,
        "Entries of a block, a multiple of ``quant_block_size``.",
        within=count_up_to(MAX_BLOCK_SIZE),
        shapes_state=True,
    )
    quant_block_size: int = option(
        64,
        "Entries that share one minimum and maximum in the quantized error; even for 4 bits.",
        within=count_up_to(MAX_BLOCK_SIZE),
        shapes_state=True,
    )
    value_dtype: ValueDtype = option("4bit", VALUES_HELP, shapes_state=True)
    bits: Literal[4, 8] = option(4, "Bits of the quantized error.", shapes_state=True)
    bias_correction: Literal["step", "window"] = option(
        "step", '``"step"`` (the paper) or ``"window"``: 1 − βᵗ or 1 − β^min(t, window).'
    )
    alpha: float = option(
        0.0, "Share of the error that is added to the update at once instead of being fed back.", within=UNIT
    )
    min_compress_size: int = option(4096, "Tensors with fewer entries take AdamW.", within=COUNT, shapes_state=True)
    stochastic_rounding: bool = option(
        False,
        "Round the error stochastically (unbiased, as the paper's proofs assume), seeded by the step, instead of to "
        "nearest.",
    )

    def check(self) -> None:
        """Check that quantization blocks fit into blocks, and pairs of codes into bytes."""
        if self.bits == 4 and self.quant_block_size % 2:
            raise ValueError(f"quant_block_size={self.quant_block_size} must be even with bits=4")
        if self.block_size % self.quant_block_size:
            raise ValueError(
                f"block_size={self.block_size} must be a multiple of quant_block_size={self.quant_block_size}"
            )
        check_block_and_values(self.block_size, self.value_dtype)


def microadam_state(shape: Sequence[int], dtype: torch.dtype, o: MicroAdamOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file.

    Args:
        shape: Shape of the parameter, any number of dimensions.
        dtype: Dtype of the parameter; does not matter.
        o: The options.

    Returns:
        Specs by state key; None for a tensor of fewer than ``min_compress_size`` entries.
    """
    numel = math.prod(shape)
    if o.density is None or numel < o.min_compress_size:
        return None
    return {
        **window_specs(numel, window=o.window, density=o.density, block_size=o.block_size, value_dtype=o.value_dtype),
        **quantized_specs(numel, _format(o.bits, o.quant_block_size)),
    }


def microadam_update_(
    W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Any], t: int, o: MicroAdamOptions
) -> None:
    """Take one step of MicroAdam on tensors of any shapes, in place; nothing of their size is allocated.

    Args:
        W: The weights, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read.
        state: As :func:`microadam_state` describes it, by key a list of each tensor's own; written. And ``"memo"``.
        t: 1 for the first update of these tensors.
        o: The options.
    """
    assert o.density is not None
    row, fmt = (t - 1) % o.window, _format(o.bits, o.quant_block_size)
    numels = [weight.numel() for weight in W]
    windows = windows_of(state, numels, o.block_size, o.density)
    errors = errors_of(state, numels, fmt)
    # 1. W ← W − lr·alpha·Q⁻¹(e); line 7 will decay what is added here, so that it is added undecayed
    if o.alpha > 0:
        for weight, e in zip(W, errors, strict=True):
            dequantize_add_(weight, e, scale=-o.lr * o.alpha / (1 - o.lr * o.weight_decay))
    # 2. a ← g + (1 − alpha)·Q⁻¹(e)   3. I, V ← largest entries of a;  a[I] ← a[I] − V   4. e ← Q(a)   5. I, V → row
    seed, memo = t if o.stochastic_rounding else None, state["memo"]
    foreach_block_topk_(g, windows, errors, row=row, density=o.density, error_scale=1 - o.alpha, seed=seed, memo=memo)
    # 6. z1, z2 ← sums over the rows, each with its weight   7. W ← W·(1 − lr·weight_decay) − lr·z1/(√z2 + eps)
    row_weights = _row_weights if type(t) is int else _row_weights.__wrapped__
    weights = row_weights(t, o.window, o.betas, o.bias_correction, W[0].device)
    corrections = state.get(CORRECTION)
    foreach_window_update_(
        W, windows, weights, lr=o.lr, weight_decay=o.weight_decay, eps=o.eps, memo=memo, corrections=corrections
    )


@functools.cache
def _format(bits: int, block_size: int) -> QuantFormat:
    return QuantFormat(bits, block_size)


@functools.lru_cache(maxsize=16)
def _row_weights(t: Any, window: int, betas: tuple[float, float], bias_correction: str, device: torch.device) -> Tensor:
    """Return (1 − β)/(1 − β^T)·β^age of every row for both moments, float32 [2, window]; the same for all tensors."""
    T = t if bias_correction == "step" else min(t, window)
    ages = [(t - 1 - row) % window for row in range(window)]
    weights = [(1 - β) / (1 - β**T) * β**age if age < t else 0.0 for β in betas for age in ages]
    if isinstance(t, Number):
        return t.table(weights).view(2, window)
    return to_device(torch.tensor([weights[:window], weights[window:]], dtype=torch.float32), device)


class MicroAdam(LowMemoryOptimizer):
    """MicroAdam: Adam's statistics from a window of Top-K gradients, the rest fed back from a 4-bit error.

    Tensors of at least ``min_compress_size`` entries are compressed, whatever their shape; smaller ones, and every
    group with ``density=None``, take AdamW, bit-equal to torch's. A non-finite gradient propagates into the
    parameter, as in AdamW.

    With ``bias_correction="step"`` the step of an entry that is selected every time, with a constant gradient, grows
    from lr while t ≤ window to lr·(1 − β1^window)/√(1 − β2^window) as t → ∞, 6.5·lr at the defaults: the window forgets
    what the bias correction still counts. Start 3 to 10 times below Adam's learning rate, or use ``"window"``.

    Example:
        >>> optimizer = MicroAdam(model.parameters(), lr=1e-4)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2405.15593, algorithm 1.
    """

    method = Method(
        "microadam",
        MicroAdamOptions,
        microadam_state,
        microadam_update_,
        switch=("density", None),
        scratch=0,
        whole=True,
        captured=True,
        corrected={"alpha": 0.0},
        serves_flat=True,
        # what is rounded at random goes by an entry's place
        block_entries=lambda o: None if o.stochastic_rounding else o.block_size,
        check_loaded=lambda state, shape, o: fault_of_window(state, math.prod(shape), o.block_size, o.density),
    )
