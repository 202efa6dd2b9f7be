"""What other optimizers keep, as formulas: to compare with in a plan. The tests hold each against the class itself.

They are described as the Trainer sets them up: every trainable parameter, with the settings that
``TrainingArguments(optim=...)`` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from hf_lowmem_optim.memory.measure import StateReport, StateTally
from hf_lowmem_optim.memory.reference_steps import (
    GALORE_RANK,
    adafactor_step,
    foreach_step,
    galore_step,
    in_place_step,
    is_projected,
)
from hf_lowmem_optim.state import TensorSpec

__all__ = ["REFERENCES", "ParameterFacts", "Reference", "plan_reference"]

Specs = dict[str, TensorSpec]


@dataclass(frozen=True)
class ParameterFacts:
    """What a formula may depend on.

    Attributes:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        matrix: Whether it is the weight of a linear layer that is neither an embedding nor the output head.
        embedding: Whether it is an embedding.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: bool = False
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Reference:
    """An optimizer that is not ours.

    Attributes:
        name: Its name in plans.
        trainer_string: The value of ``TrainingArguments.optim`` that it stands for.
        summary: What it keeps.
        state: State of one parameter.
        shared: State kept once if any parameter has a state key of that name.
        temporaries: Bytes that ``step()`` allocates at most beside the state, on the device that the optimizer is
            made for, given its parameters in order. None where that is up to a compiler (torchao).
    """

    name: str
    trainer_string: str
    summary: str
    state: Callable[[ParameterFacts], Specs]
    shared: Mapping[str, TensorSpec] = field(default_factory=dict)
    temporaries: Callable[[Iterable[ParameterFacts]], int] | None = None


def plan_reference(
    reference: Reference, groups: Iterable[Iterable[ParameterFacts]], *, num_shards: int = 1
) -> StateReport:
    """Sum the state of a reference.

    Args:
        reference: The optimizer.
        groups: Its parameters by group.
        num_shards: As in :func:`~hf_lowmem_optim.memory.plan.plan_groups`.

    Returns:
        The report; components are the keys of the state, as in what is measured.
    """
    tally, used, entries = StateTally(), set[str](), 0
    for group in groups:
        tally.start_group()
        for parameter in group:
            entries += parameter.numel
            for key, spec in reference.state(parameter).items():
                used.add(key)
                tally.add(spec.component, spec.dtype, spec.shard(num_shards).nbytes)
    tally.end_groups()
    for key, spec in reference.shared.items():
        if key in used:
            tally.add(spec.component, spec.dtype, spec.nbytes)
    return tally.report(entries)


def _moments(parameter: ParameterFacts, dtype: torch.dtype) -> Specs:
    return {key: TensorSpec(parameter.shape, dtype, key) for key in ("exp_avg", "exp_avg_sq")}


def _adamw_fp32(parameter: ParameterFacts) -> Specs:
    """Two float32 moments and torch's step count: AdamW on float32 weights, or on float32 copies of them."""
    return {**_moments(parameter, torch.float32), "step": TensorSpec((), torch.float32, "step")}


def _adamw_torch(parameter: ParameterFacts) -> Specs:
    """Two moments in the parameter's dtype, a float32 step count per tensor (torch.optim.AdamW)."""
    return {**_moments(parameter, parameter.dtype), "step": TensorSpec((), torch.float32, "step")}


def _adamw_8bit(parameter: ParameterFacts) -> Specs:
    """One byte per moment and entry, a float32 maximum per 256 entries (bitsandbytes.optim.AdamW8bit).

    Tensors under 4096 entries keep float32 moments, and so do embeddings, for which the Trainer asks.
    """
    if parameter.embedding or parameter.numel < 4096:
        return {key: TensorSpec(parameter.shape, torch.float32, key) for key in ("state1", "state2")}
    specs = {}
    for number in ("1", "2"):
        specs[f"state{number}"] = TensorSpec(parameter.shape, torch.uint8, f"state{number}")
        specs[f"absmax{number}"] = TensorSpec((-(-parameter.numel // 256),), torch.float32, f"absmax{number}")
    # The tables belong to the optimizer; naming them here says that this tensor needs them.
    return {**specs, **{f"qmap{number}": TensorSpec((0,), torch.float32, f"qmap{number}") for number in ("1", "2")}}


def _adamw_4bit(parameter: ParameterFacts) -> Specs:
    """Half a byte per moment and entry, a float32 scale per 128 entries, a table of 16 (torchao.optim.AdamW4bit).

    Tensors under 4096 entries, or of a size that 128 does not divide, keep moments in the parameter's dtype.
    """
    specs: Specs = {"step": TensorSpec((), torch.float32, "step")}
    if parameter.numel < 4096 or parameter.numel % 128:
        return {**specs, **_moments(parameter, parameter.dtype)}
    for key in ("exp_avg", "exp_avg_sq"):
        specs[f"{key} codes"] = TensorSpec((parameter.numel // 2,), torch.uint8, key)
        specs[f"{key} scale"] = TensorSpec((parameter.numel // 128,), torch.float32, key)
        specs[f"{key} qmap"] = TensorSpec((16,), torch.float32, key)
    return specs


def _galore(parameter: ParameterFacts) -> Specs:
    """Projector and two projected moments at rank 128 in the gradient's dtype (galore_torch.GaLoreAdamW).

    The smaller dimension is projected. Everything that is no linear layer keeps two whole moments. For float32 models
    galore-torch keeps the projector as a view that holds the whole SVD factor; only the view is counted.
    """
    if not is_projected(parameter):
        return _moments(parameter, parameter.dtype)
    p, q = parameter.shape
    rank = min(GALORE_RANK, p, q)
    projector, projected = ((rank, q), (p, rank)) if p >= q else ((p, rank), (rank, q))
    moments = {key: TensorSpec(projected, parameter.dtype, key) for key in ("exp_avg", "exp_avg_sq")}
    return {"projector": TensorSpec(projector, parameter.dtype, "projector"), **moments}


def _adafactor(parameter: ParameterFacts) -> Specs:
    """Row and column means of the squared gradient, float32 (transformers.Adafactor, no first moment)."""
    shape = parameter.shape
    shapes: dict[str, tuple[int, ...]] = {"RMS": ()}
    if len(shape) < 2:
        shapes["exp_avg_sq"] = shape
    else:
        shapes.update(exp_avg_sq_row=shape[:-1], exp_avg_sq_col=shape[:-2] + shape[-1:])
    return {key: TensorSpec(of_key, torch.float32, key) for key, of_key in shapes.items()}


_TABLES = {f"qmap{number}": TensorSpec((256,), torch.float32, f"qmap{number}") for number in ("1", "2")}

REFERENCES: dict[str, Reference] = {
    reference.name: reference
    for reference in (
        Reference(
            "adamw_fp32", "adamw_torch_fused", "two float32 moments (fused)", _adamw_fp32, temporaries=in_place_step
        ),
        Reference(
            "adamw_torch_fused",
            "adamw_torch_fused",
            "two moments in the parameter's dtype (fused)",
            _adamw_torch,
            temporaries=in_place_step,
        ),
        Reference(
            "adamw_torch",
            "adamw_torch",
            "two moments in the parameter's dtype (foreach)",
            _adamw_torch,
            temporaries=foreach_step,
        ),
        Reference(
            "adamw_8bit",
            "adamw_bnb_8bit",
            "two moments in 8 bits; embeddings float32",
            _adamw_8bit,
            _TABLES,
            temporaries=in_place_step,
        ),
        Reference("adamw_4bit", "adamw_torch_4bit", "two moments in 4 bits", _adamw_4bit),
        Reference("galore_adamw", "galore_adamw", "moments projected to rank 128", _galore, temporaries=galore_step),
        Reference(
            "adafactor",
            "adafactor",
            "row and column means of the squared gradient",
            _adafactor,
            temporaries=adafactor_step,
        ),
    )
}
