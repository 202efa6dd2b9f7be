"""What a step of sharded tensors sends: the formulas that tests compare with what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.sharding.collective import COLLECTIVE_WAVE_BYTES
from hf_lowmem_optim.engine.sharding.gathered import GATHERED_WAVE_BYTES
from hf_lowmem_optim.engine.sharding.layout import Split
from hf_lowmem_optim.engine.sharding.owners import waves_of
from hf_lowmem_optim.engine.sharding.paths import Path, path_of_shape, sent_bytes

__all__ = ["StepTraffic", "step_traffic", "tensor_traffic"]


@dataclass(frozen=True)
class StepTraffic:
    """What a step after the first sends.

    Attributes:
        tensors: How many tensors take each path.
        sent_bytes: Bytes that all processes together send to others for the tensors of each path, and for
            ``"system"``: the rows of a system over all tensors.
        calls: Collectives of each process.
    """

    tensors: Mapping[str, int]
    sent_bytes: Mapping[str, int]
    calls: int

    @property
    def total_bytes(self) -> int:
        """All that all processes together send to others."""
        return sum(self.sent_bytes.values())


def tensor_traffic(
    method: Method, options: Any, shape: Sequence[int], dtype: torch.dtype, split: Split
) -> tuple[Path, int]:
    """Return how a tensor is updated in a step after its first, and the bytes that are sent for it.

    Args:
        method: The method.
        options: Those of its group.
        shape: Shape of the whole tensor.
        dtype: Dtype of the tensor and of its gradient.
        split: How it is split; ``Split(n)`` as FSDP2 does over n processes.
    """
    path = path_of_shape(method, options, shape, dtype, split)
    return path, sent_bytes(path, method, options, shape, dtype, split)


def step_traffic(method: Method, groups: Sequence[Mapping[str, Any]], num_shards: int) -> StepTraffic:
    """Return what a step after the first sends of parameters that FSDP2 splits, all of which have gradients.

    Args:
        method: The method.
        groups: The parameter groups, with ``"params"``, of which only shapes and dtypes matter.
        num_shards: How many processes share the parameters.
    """
    split, tensors, sent = Split(num_shards), Counter[str](), Counter[str]()
    gathered, staged, rounds, in_system = list[int](), list[int](), 0, {"rows": 0, "gathered": 0}
    for group in groups:
        options: Any = method.options_of(group)
        for param in group["params"]:
            shape, dtype = param.shape, param.dtype
            path, nbytes = tensor_traffic(method, options, shape, dtype, split)
            tensors[path] += 1
            sent[path] += nbytes
            weight_bytes, specs = param.numel() * dtype.itemsize, method.specs(shape, dtype, options).values()
            if method.compressed_state(shape, dtype, options) is not None and _in_system(method, options):
                in_system["rows"] += len(param) if options.is_stack(shape) else 1
                in_system["gathered"] += path == "gathered"
            elif path == "collective" and method.staged is not None:
                staged.append(4 * param.numel() // num_shards)
                rounds = max(rounds, 1 + len(method.staged.exchanged(shape, dtype, options, 0)[1]))
            elif path == "gathered":
                gathered.append(2 * weight_bytes + sum([spec.stored_bytes for spec in specs]))
    calls = 2 * len(list(waves_of(gathered, GATHERED_WAVE_BYTES * num_shards)))
    calls += rounds * len(list(waves_of(staged, COLLECTIVE_WAVE_BYTES)))
    if in_system["rows"]:
        assert method.shared_state is not None
        row = next(iter(method.shared_state(method.options_of(groups[0])).values())).shape[-1]
        sent["system"] = num_shards * (num_shards - 1) * in_system["rows"] * 8 * row
        calls += 1 + 2 * (in_system["gathered"] > 0)
    return StepTraffic(tensors, sent, calls)


def _in_system(method: Method, options: Any) -> bool:
    return method.shared_state is not None and options.scope == "model"
