"""Chooses how a sharded tensor is updated, from what all its processes know alike.

- ``"local"``: AdamW entry by entry, on each process's part; nothing is sent.
- ``"aligned"``: a method that works in blocks, on each process's blocks, and any method on each process's matrices of a
  stack; nothing is sent, but for a row of a system.
- ``"collective"``: an update written as stages, between which the processes add up what is of the size of a rank.
- ``"gathered"``: everything else, as a whole on one process (``gathered.py``).

Bytes are those which all processes together send to others, in rings: of B bytes that n processes have each, a sum
takes 2·(n − 1)·B; of B bytes in parts, putting them together takes (n − 1)·B. Padding to whole words is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from hf_lowmem_optim.engine.error_feedback import FORMATS, error_state
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.sharding.layout import Split, part_of_spec, part_shape, specs_at_rest, split_of
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Path", "path_of", "path_of_shape", "sent_bytes"]

logger = logging.getLogger(__name__)

Path = Literal["local", "aligned", "collective", "gathered"]


def path_of(optimizer: Any, param: Any, options: Any, step: int) -> Path:
    """Return how a sharded parameter is updated in a step; say once of each shape that other blocks would be local.

    Args:
        optimizer: The optimizer, which remembers it.
        param: The parameter, a DTensor.
        options: Those of its group.
        step: t, 1 for its first update, for which there is no collective path.
    """
    method, split = optimizer.method, split_of(param)
    settings = [getattr(options, name) for name in method.layout_options]
    key = (param.shape, param.dtype, split, vars(options).get("stochastic_rounding"), *settings)
    path: Path | None = optimizer.paths.get(key)
    if path is None:
        path = optimizer.paths[key] = path_of_shape(method, options, param.shape, param.dtype, split)
        if path == "gathered" and (note := _misaligned(method, options, param.shape, param.dtype, split)) is not None:
            logger.warning(note)
    return "gathered" if path == "collective" and step == 1 else path


def path_of_shape(method: Method, options: Any, shape: Sequence[int], dtype: torch.dtype, split: Split) -> Path:
    """Return how a tensor is updated in a later step.

    Args:
        method: The method.
        options: Those of its group.
        shape: Shape of the whole.
        dtype: Dtype of the tensor.
        split: How it is split.
    """
    compressed = method.compressed_state(shape, dtype, options) is not None
    if options.weight_rounding != "nearest" and dtype != torch.float32:
        return "gathered"  # what is drawn goes by an entry's place in the whole
    if not compressed:
        return "gathered" if options.dense_state == "8bit" else "local"
    if not split.is_even(shape):
        return "gathered"
    if _is_aligned(method, options, shape, dtype, split):
        return "aligned"
    if options.is_stack(shape) or not _is_cut_with_error(method, options, shape, dtype, split):
        return "gathered"
    # what is added up grows with the number of processes, what is gathered does not
    tensor = method, options, shape, dtype, split
    return "collective" if sent_bytes("collective", *tensor) < sent_bytes("gathered", *tensor) else "gathered"


def sent_bytes(path: Path, method: Method, options: Any, shape: Sequence[int], dtype: torch.dtype, split: Split) -> int:
    """Return the bytes that are sent for a tensor, and for a gradient of its dtype, on a path that it can take.

    Args:
        path: The path.
        method: The method.
        options: Those of the tensor's group.
        shape: Shape of the whole.
        dtype: Dtype of the tensor.
        split: How it is split.
    """
    others = split.num_shards - 1
    if path in ("local", "aligned"):
        return 0
    if path == "collective":
        assert method.staged is not None and split.axis is not None
        whole_bytes, sums = method.staged.exchanged(shape, dtype, options, split.axis)
        return others * (whole_bytes + 2 * sum(sums))
    # gradient to the owner; weight and state to it and back, but that what is too short to be split is everywhere
    moved, copied = 3 * math.prod(shape) * dtype.itemsize, 0
    compressed = method.compressed_state(shape, dtype, options) is not None
    for spec in specs_at_rest(method.specs(shape, dtype, options)).values():
        if part_of_spec(spec, shape, split, 0, compressed=compressed) is spec:
            copied += spec.stored_bytes
        else:
            moved += 2 * spec.stored_bytes
    return moved * others // split.num_shards + copied * others


def _is_aligned(method: Method, options: Any, shape: Sequence[int], dtype: torch.dtype, split: Split) -> bool:
    """Return whether blocks end where parts do, and a part's state is the part of the state that lies there."""
    if options.is_stack(shape):
        block_entries = math.prod(shape[1:]) if method.coupled_update_ is None else None
    else:
        block_entries = None if method.block_entries is None else method.block_entries(options)
    part = part_shape(shape, split)
    if block_entries is None or split.axis != 0 or math.prod(part) % block_entries:
        return False
    own = method.compressed_state(part, dtype, options)
    return own is not None and _chunks_agree(method.specs(shape, dtype, options), own, shape, split)


def _chunks_agree(whole: dict[str, TensorSpec], own: dict[str, TensorSpec], shape: Sequence[int], split: Split) -> bool:
    """Return whether some state of a part is what a process has of that of the whole: the first as well as the last."""
    at_rest, parts = specs_at_rest(whole), specs_at_rest(own)
    return all(
        part_of_spec(at_rest[key], shape, split, rank, compressed=True) == part
        for key, part in parts.items()
        for rank in (0, split.num_shards - 1)
    )


def _is_cut_with_error(method: Method, options: Any, shape: Sequence[int], dtype: torch.dtype, split: Split) -> bool:
    """Return whether a method has stages for a matrix that is split like this, and each process the error of its part.

    A quantized one lies in blocks of the flat matrix: then that is so of whole rows, in whole blocks.
    """
    if method.staged is None or options.stochastic_rounding or (split.axis != 0 and len(shape) != 2):
        return False
    rows, *rest = part_shape(shape, split)
    part, fmt = (rows, math.prod(rest)), FORMATS.get(options.error_feedback)
    if fmt is not None and (split.axis != 0 or math.prod(part) % fmt.block_size):
        return False
    return _chunks_agree(
        method.specs(shape, dtype, options), error_state(part, dtype, options.error_feedback), shape, split
    )


def _misaligned(method: Method, options: Any, shape: Sequence[int], dtype: torch.dtype, split: Split) -> str | None:
    """Return that a tensor is gathered and which blocks would not straddle its parts, if there are such."""
    blocks = None if method.block_entries is None or options.is_stack(shape) else method.block_entries(options)
    if blocks is None or "block_size" not in vars(options) or not split.is_even(shape):
        return None
    entries, unit = math.prod(part_shape(shape, split)), math.lcm(64, vars(options).get("quant_block_size", 64))
    for size in range(options.block_size - options.block_size % unit, 0, -unit):
        other = vars(options) | {"block_size": size}
        if entries % size == 0 and path_of_shape(method, type(options)(**other), shape, dtype, split) == "aligned":
            return (
                f"blocks of {options.block_size} entries straddle the parts that {split.num_shards} processes have of "
                f"tensors of shape {tuple(shape)}: these are gathered at every step; block_size={size} would need no "
                "communication"
            )
    return None
