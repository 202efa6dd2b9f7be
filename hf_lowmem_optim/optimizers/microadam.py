"""MicroAdam (Modoranu et al., arXiv 2405.15593, NeurIPS 2024): Adam over a window of sparse gradients.

Per tensor, flattened to d entries and cut into blocks of `block_size`, Q the block quantizer of `kernels/block_quant`:

1.  W ← W − lr·alpha·Q⁻¹(e)                                        only if alpha > 0
2.  a ← g + (1 − alpha)·Q⁻¹(e)
3.  I, V ← the ⌈density·n⌉ entries of largest |a| of each block;  a[I] ← a[I] − V  (what bfloat16 cuts off)
4.  e ← Q(a)
5.  store (I, V) in row (t − 1) mod m of the window
6.  z1 ← (1 − β1)/(1 − β1^T)·Σ_rows β1^age·V;  z2 ← (1 − β2)/(1 − β2^T)·Σ_rows β2^age·V²
7.  W ← W·(1 − lr·weight_decay) − lr·z1/(√z2 + eps)               the second term at touched entries only

T = t with `bias_correction="step"`, min(t, m) with `"window"`; age is the number of steps since a row was written.

| letter | state key                 | shape                 | dtype    | bytes per parameter          |
|--------|---------------------------|-----------------------|----------|------------------------------|
| I      | `indices`                 | (m, kept)             | int16    | 2·m·density                  |
| V      | `values`                  | (m, kept)             | bfloat16 | 2·m·density                  |
| e      | `error_codes`             | ⌈d·bits/8⌉            | uint8    | 0.5 (4 bit), 1 (8 bit)       |
| e      | `error_lo`, `error_hi`    | ⌈d/quant_block_size⌉  | bfloat16 | 4/quant_block_size           |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lowmem_optim.compression.quantization import (
    QuantFormat,
    dequantize_add_,
    quantize_,
    quantized_specs,
    quantized_state,
)
from hf_lowmem_optim.compression.topk import MAX_BLOCK_SIZE, kept_per_block, window_specs
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.sparse_steps import SparseTensor, StepRule, sparse_steps
from hf_lowmem_optim.kernels.sparse_window.layout import update_scratch_bytes
from hf_lowmem_optim.optimizers.adamw import DenseState, adamw_state
from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.dense import WeightRounding
from hf_lowmem_optim.optimizers.hyperparameters import (
    check_bool,
    check_choice,
    check_fraction,
    check_positive_int,
    check_unit_interval,
)
from hf_lowmem_optim.optimizers.pending import PendingUpdate
from hf_lowmem_optim.optimizers.side_by_side import Job
from hf_lowmem_optim.optimizers.together import split_together
from hf_lowmem_optim.state import StepTemporaries, TensorSpec

__all__ = [
    "MicroAdam",
    "microadam_accumulate_",
    "microadam_compresses",
    "microadam_state",
    "microadam_temporaries",
    "microadam_update_",
]


def microadam_compresses(shape: Sequence[int], *, density: float | None, min_compress_size: int) -> bool:
    """Whether a tensor of this shape takes the sparse rule rather than dense AdamW.

    Args:
        shape: Shape of the parameter, any number of dimensions.
        density: Share of the entries that a step keeps, None for dense.
        min_compress_size: The least number of entries that is compressed.

    Returns:
        True for tensors of at least ``min_compress_size`` entries (and at least one).
    """
    return density is not None and math.prod(shape) >= max(min_compress_size, 1)


def microadam_state(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    window: int = 10,
    density: float | None = 0.01,
    block_size: int = 4096,
    quant_block_size: int = 64,
    bits: int = 4,
    min_compress_size: int = 4096,
    dense_state: str = "param",
    **_other: Any,
) -> dict[str, TensorSpec]:
    """State of one parameter; the only place where its size is written.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter; matters for the dense rule only.
        window: As in :class:`MicroAdam`.
        density: As in :class:`MicroAdam`.
        block_size: As in :class:`MicroAdam`.
        quant_block_size: As in :class:`MicroAdam`.
        bits: As in :class:`MicroAdam`.
        min_compress_size: As in :class:`MicroAdam`.
        dense_state: As in :class:`MicroAdam`.
        **_other: Hyper-parameters that do not change the state.

    Returns:
        Specs by state key: the table at the head of this file, or dense AdamW's.
    """
    if density is None or not microadam_compresses(shape, density=density, min_compress_size=min_compress_size):
        return adamw_state(shape, dtype, dense_state=dense_state)
    numel = math.prod(shape)
    return {
        **window_specs(numel, window=window, density=density, block_size=block_size),
        **quantized_specs(numel, QuantFormat(bits, quant_block_size)),
    }


def microadam_temporaries(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    device: torch.device,
    window: int,
    density: float,
    block_size: int,
    **_other: Any,
) -> StepTemporaries:
    """What :func:`microadam_update_` allocates for one tensor: the kernels work in place.

    The torch reference, where neither Triton nor numba serve, takes some slices of 2^19 entries, the same for every
    tensor and not counted.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        device: Device of the parameter.
        window: As in :class:`MicroAdam`.
        density: As in :class:`MicroAdam`.
        block_size: As in :class:`MicroAdam`.
        **_other: Hyper-parameters that do not matter here.

    Returns:
        The float32 weights of the rows in both moments; on a GPU, for windows too wide to sort, scratch memory.
    """
    kept = kept_per_block(block_size, density)
    on_cpu = device.type == "cpu"
    own = 0 if on_cpu else update_scratch_bytes(math.prod(shape), window, kept, block_size, torch.bfloat16)
    return StepTemporaries({"weights": 4 * 2 * window}, own)


@functools.lru_cache(maxsize=16)
def _row_weights(
    step: int, window: int, betas: tuple[float, float], bias_correction: str, device: torch.device
) -> Tensor:
    """Weights of the window's rows in both moments, float32 [2, window]; cached, because all tensors share them."""
    last = step if bias_correction == "step" else min(step, window)
    weights = [
        [
            (1 - beta) / (1 - beta**last) * beta**age if age < step else 0.0
            for age in ((step - 1 - row) % window for row in range(window))
        ]
        for beta in betas
    ]
    return torch.tensor(weights, dtype=torch.float32, device=device)


def microadam_update_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    density: float,
    block_size: int,
    quant_block_size: int,
    bits: int,
    bias_correction: str,
    alpha: float,
    stochastic_rounding: bool,
    workspace: Workspace | None = None,
) -> None:
    """One step of MicroAdam on one tensor, in place.

    Args:
        param: W, contiguous, any shape; float32, bfloat16 or float16.
        grad: g, likewise; only read.
        state: As :func:`microadam_state` describes it; written.
        step: t, 1 for the first update of this tensor.
        lr: Learning rate.
        betas: β1 and β2.
        eps: Added to √z2.
        weight_decay: Decoupled weight decay.
        density: Share of each block's entries that is kept.
        block_size: Entries of a block.
        quant_block_size: Entries that share the statistics of the quantized error.
        bits: Bits of the quantized error.
        bias_correction: ``"step"`` or ``"window"``.
        alpha: Share of the error that is applied at once.
        stochastic_rounding: Round the error stochastically, seeded by the step, instead of to nearest.
        workspace: Not needed; nothing of the gradient's size is allocated.
    """
    hyper = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "density": density,
        "block_size": block_size,
        "quant_block_size": quant_block_size,
        "bits": bits,
        "bias_correction": bias_correction,
        "alpha": alpha,
        "stochastic_rounding": stochastic_rounding,
    }
    # line 1; line 7 will decay what is added here, so that it is added undecayed
    if alpha > 0:
        error = quantized_state(state, param.numel(), _error_format(bits, quant_block_size))
        dequantize_add_(param, error, scale=-lr * alpha / (1 - lr * weight_decay))
    sparse_steps([(_tensor(param, grad, state, hyper), _rule(step, hyper, state["indices"]))]).topk_update_()


def _tensor(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> SparseTensor:
    """A tensor, and the tensors of its state that lines 2 to 7 read and write."""
    fmt = _error_format(hyper["bits"], hyper["quant_block_size"])
    error = (state["error_codes"], state["error_lo"], state["error_hi"])
    window = (state["indices"], state["values"])
    return SparseTensor(param, grad, *window, error, fmt, hyper["block_size"], hyper["density"])


def _rule(step: int, hyper: Mapping[str, Any], indices: Tensor) -> StepRule:
    """What lines 2 to 7 are in a step, for windows as that of ``indices``."""
    window = indices.shape[0]
    return StepRule(
        row=(step - 1) % window,
        lr=hyper["lr"],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        weights=_row_weights(step, window, tuple(hyper["betas"]), hyper["bias_correction"], indices.device),
        error_scale=1 - hyper["alpha"],
        seed=step if hyper["stochastic_rounding"] else None,
    )


@functools.lru_cache(maxsize=16)
def _error_format(bits: int, block_size: int) -> QuantFormat:
    return QuantFormat(bits, block_size)


def microadam_accumulate_(
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    seed: int,
    quant_block_size: int,
    bits: int,
    stochastic_rounding: bool,
    workspace: Workspace,
) -> None:
    """Add a gradient to the error, e ← Q(g + Q⁻¹(e)): the next update's a is then that of the sum of both gradients.

    Args:
        grad: g, contiguous, any shape; only read.
        state: As :func:`microadam_state` describes it; written.
        seed: For stochastic rounding.
        quant_block_size: As in :class:`MicroAdam`.
        bits: As in :class:`MicroAdam`.
        stochastic_rounding: As in :class:`MicroAdam`.
        workspace: Gives the float32 buffer for the sum.
    """
    error = quantized_state(state, grad.numel(), QuantFormat(bits, quant_block_size))
    wide = workspace.take("accumulated", grad.shape, grad.device).copy_(grad)
    dequantize_add_(wide, error)
    quantize_(error, wide, seed=seed if stochastic_rounding else None)


class MicroAdam(LowMemoryOptimizer):
    """MicroAdam: Adam's statistics from a window of Top-K gradients, the rest fed back from a 4-bit error.

    Tensors of at least ``min_compress_size`` entries are compressed, whatever their shape; smaller ones, and every
    group with ``density=None``, take AdamW, bit-equal to torch's. A non-finite gradient propagates into the
    parameter, as in AdamW.

    With ``bias_correction="step"`` the step of an entry that is selected every time, with a constant gradient, grows
    from lr while t ≤ window to lr·(1 − β1^window)/√(1 − β2^window) as t → ∞, 6.5·lr at the defaults: the window forgets
    what the bias correction still counts. Start 3 to 10 times below Adam's learning rate, or use ``"window"``.

    Args:
        params: Parameters, named parameters or parameter groups, as in torch. A group may set any argument below.
        lr: Learning rate.
        betas: Decay rates of the first and the second moment, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled weight decay.
        window: m, how many sparse gradients are kept.
        density: Share of each block's entries that a step keeps, in (0, 1], or None for dense AdamW.
        block_size: Entries of a block, a multiple of ``quant_block_size``, at most 32768.
        quant_block_size: Entries that share one minimum and maximum in the quantized error; even for 4 bits.
        bits: Bits of the quantized error, 4 or 8.
        bias_correction: ``"step"`` (the paper) or ``"window"``: 1 − βᵗ or 1 − β^min(t, window).
        alpha: In [0, 1): share of the error that is added to the update at once instead of being fed back.
        min_compress_size: Tensors with fewer entries take AdamW.
        stochastic_rounding: Round the error stochastically (unbiased, as the paper's proofs assume), seeded by the
            step, instead of to nearest.
        dense_state: Storage of AdamW's moments where the dense rule applies: ``"param"`` (the parameter's dtype, as in
            torch), ``"fp32"``, or ``"8bit"``, bitsandbytes' blockwise quantization (the extra ``bitsandbytes``).
        weight_rounding: How updated bfloat16 and float16 weights are rounded: ``"nearest"``, or ``"stochastic"``, which
            keeps updates too small for the weight's dtype in the mean, seeded by step and parameter.

    Raises:
        TypeError: An argument has the wrong type, or a parameter an unsupported dtype.
        ImportError: ``dense_state="8bit"`` without bitsandbytes.
        ValueError: An argument is out of range.

    Example:
        >>> optimizer = MicroAdam(model.parameters(), lr=1e-4)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2405.15593, algorithm 1.
    """

    name: ClassVar[str] = "microadam"
    dense_key: ClassVar[str] = "density"
    state_keys: ClassVar[tuple[str, ...]] = (
        "window",
        "density",
        "block_size",
        "quant_block_size",
        "bits",
        "min_compress_size",
        "dense_state",
    )
    state_function = staticmethod(microadam_state)
    temporaries_function = staticmethod(microadam_temporaries)
    update_function = staticmethod(microadam_update_)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        window: int = 10,
        density: float | None = 0.01,
        block_size: int = 4096,
        quant_block_size: int = 64,
        bits: Literal[4, 8] = 4,
        bias_correction: Literal["step", "window"] = "step",
        alpha: float = 0.0,
        min_compress_size: int = 4096,
        stochastic_rounding: bool = False,
        dense_state: DenseState = "param",
        weight_rounding: WeightRounding = "nearest",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "window": window,
                "density": density,
                "block_size": block_size,
                "quant_block_size": quant_block_size,
                "bits": bits,
                "bias_correction": bias_correction,
                "alpha": alpha,
                "min_compress_size": min_compress_size,
                "stochastic_rounding": stochastic_rounding,
                "dense_state": dense_state,
                "weight_rounding": weight_rounding,
            },
        )

    def _update_compressed_(self, updates: Sequence[PendingUpdate], beside: Sequence[Job]) -> None:
        """Apply the compressed rule, as far as possible to all tensors together."""
        # with line 1 a tensor is not only what the loops know
        plain = [update for update in updates if update.group["alpha"] == 0]
        together, others = split_together(plain)
        rest = [update for update in updates if update.group["alpha"] > 0]
        super()._update_compressed_([*rest, *(plain[index] for index in others)], beside)
        if together:
            rules: dict[tuple[int, int, int], StepRule] = {}
            calls = []
            for update in (plain[index] for index in together):
                group, step, indices = update.group, update.state["step"], update.state["indices"]
                key = (id(group), step, indices.shape[0])
                if key not in rules:
                    rules[key] = _rule(step, group, indices)
                calls.append((_tensor(update.param, update.grad, update.state, group), rules[key]))
            sparse_steps(calls).topk_update_()

    @classmethod
    def compresses(cls, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
        """Whether a tensor of this shape takes the sparse rule in this group."""
        return microadam_compresses(shape, density=group["density"], min_compress_size=group["min_compress_size"])

    @classmethod
    def view_for_update(cls, tensor: Tensor) -> Tensor:
        """The rule knows blocks of consecutive entries only, whatever the shape."""
        return tensor if tensor.is_contiguous() else tensor.reshape(-1).contiguous()

    @classmethod
    def check_own(cls, hyper: Mapping[str, Any]) -> None:
        """Check everything that AdamW does not have."""
        check_positive_int("window", hyper["window"])
        check_fraction("density", hyper["density"], or_none="dense AdamW")
        check_positive_int("block_size", hyper["block_size"], maximum=MAX_BLOCK_SIZE)
        check_positive_int("quant_block_size", hyper["quant_block_size"], maximum=MAX_BLOCK_SIZE)
        check_choice("bits", hyper["bits"], (4, 8))
        if hyper["bits"] == 4 and hyper["quant_block_size"] % 2:
            raise ValueError(f"quant_block_size={hyper['quant_block_size']} must be even with bits=4")
        if hyper["block_size"] % hyper["quant_block_size"]:
            raise ValueError(
                f"block_size={hyper['block_size']} must be a multiple of quant_block_size={hyper['quant_block_size']}"
            )
        check_choice("bias_correction", hyper["bias_correction"], ("step", "window"))
        check_unit_interval("alpha", hyper["alpha"])
        check_positive_int("min_compress_size", hyper["min_compress_size"])
        check_bool("stochastic_rounding", hyper["stochastic_rounding"])
