"""Bytes of a model's weights and gradients, for one of the processes that train it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import Tensor, nn

from hf_lowmem_optim.engine.options import COUNT, check_number, shown

__all__ = ["Processes", "WeightReport", "nf4_bytes", "plan_weights"]

SHARDINGS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """Among how many GPUs the training is shared, a process each, and how.

    ``"ddp"``: every process holds everything, and the buckets in which gradients are exchanged beside them. ``"fsdp"``:
    weights, gradients and state are split along their first dimension (fully sharded).
    """

    gpus: int = 1
    sharding: str = "ddp"

    def __post_init__(self) -> None:
        check_number("gpus", self.gpus, COUNT)
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding={shown(self.sharding)} is not one of {', '.join(map(repr, SHARDINGS))}")

    @property
    def num_shards(self) -> int:
        """Into how many parts each tensor is split."""
        return self.gpus if self.sharding == "fsdp" else 1


@dataclass(frozen=True)
class WeightReport:
    """What a process holds besides optimizer state and activations."""

    weight_bytes: Mapping[str, int]  # by kind: "trainable", "frozen", "frozen 4-bit", "frozen 8-bit", "buffers"
    gradient_bytes: Mapping[str, int]  # by kind: "gradients", and "DDP buckets" under DDP
    num_parameters: int  # entries of all parameters of the model, on all processes
    num_trainable: int
    dtypes: Mapping[str, int]  # entries by dtype, quantized weights under "4-bit" and "8-bit"

    @property
    def total_bytes(self) -> int:
        """Weights and gradients together."""
        return sum(self.weight_bytes.values()) + sum(self.gradient_bytes.values())


def plan_weights(model: nn.Module, processes: Processes, quantized: Set[int] = frozenset()) -> WeightReport:
    """Count the bytes of a model's weights, buffers and gradients, for the process with the largest parts.

    Args:
        model: The model, on any device, the meta device too.
        processes: How the training is shared.
        quantized: Ids of the parameters that will be stored in 4 bits.
    """
    weights, dtypes, trainable = Counter[str](), Counter[str](), 0
    for parameter in model.parameters():
        numel, nbytes, dtype = _stored(parameter)
        if id(parameter) in quantized:
            nbytes, dtype = nf4_bytes(numel), "4-bit"
        dtypes[dtype] += numel
        kind = "frozen"
        if parameter.requires_grad:
            kind, trainable = "trainable", trainable + numel
        elif dtype in ("4-bit", "8-bit"):
            kind = f"frozen {dtype}"
        weights[kind] += _largest_part(parameter.shape, nbytes, processes.num_shards)
    weights["buffers"] = sum(buffer.nbytes for buffer in model.buffers())
    gradients = {"gradients": weights["trainable"]}
    if processes.sharding == "ddp" and processes.gpus > 1:
        gradients["DDP buckets"] = weights["trainable"]
    return WeightReport(dict(+weights), gradients, dtypes.total(), trainable, dict(dtypes))


def nf4_bytes(numel: int) -> int:
    """Return the bytes of a weight in bitsandbytes' 4-bit formats without double quantization.

    Half a byte per entry, a float32 maximum per 64 entries, and the table of 16 float32 values.
    """
    return -(-numel // 2) + 4 * -(-numel // 64) + 4 * 16


def _stored(parameter: Tensor) -> tuple[int, int, str]:
    """Return entries, bytes and dtype of a parameter, also of one that bitsandbytes has quantized already."""
    quant_state, row_maxima = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    if row_maxima is not None:
        return parameter.numel(), parameter.nbytes + row_maxima.nbytes, "8-bit"
    if quant_state is None:
        return parameter.numel(), parameter.nbytes, str(parameter.dtype).removeprefix("torch.")
    nested = getattr(quant_state, "state2", None)
    statistics = [value for state in (quant_state, nested) if state is not None for value in vars(state).values()]
    nbytes = parameter.nbytes + sum(value.nbytes for value in statistics if isinstance(value, Tensor))
    return math.prod(quant_state.shape), nbytes, "4-bit"


def _largest_part(shape: tuple[int, ...], nbytes: int, num_shards: int) -> int:
    """Return the bytes of the largest of the parts into which the first dimension is split."""
    if num_shards == 1 or not shape:
        return nbytes
    return -(-shape[0] // num_shards) * -(-nbytes // shape[0]) if shape[0] else 0
