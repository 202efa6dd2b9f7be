"""What other optimizers keep, as formulas: to compare with in a plan. The tests hold each against the class itself.

They are described as the Trainer sets them up: every trainable parameter, with the settings that
``TrainingArguments(optim=...)`` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hf_lowmem_optim.memory.measure import Piece, StateReport, add_up
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["BASELINES", "Baseline", "ParameterFacts", "plan_baseline"]

Specs = dict[str, TensorSpec]

#: The Trainer's.
_GALORE_RANK = 128


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

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return self.numel * self.dtype.itemsize

    @property
    def is_projected(self) -> bool:
        """Whether GaLore projects it: the weight of a linear layer."""
        return self.matrix and len(self.shape) == 2


@dataclass(frozen=True)
class Baseline:
    """An optimizer that is not ours.

    Attributes:
        name: Its name in plans.
        trainer_string: The value of ``TrainingArguments.optim`` that it stands for.
        summary: What it keeps.
        state: State of one parameter.
        temporaries: Bytes that ``step()`` allocates for a moment, at most, given all parameters, without workspaces of
            libraries. None where that is up to a compiler (torchao).
        shared: State kept once if any parameter has a state key of that name.
    """

    name: str
    trainer_string: str
    summary: str
    state: Callable[[ParameterFacts], Specs]
    temporaries: Callable[[Sequence[ParameterFacts]], int] | None = None
    shared: Mapping[str, TensorSpec] = field(default_factory=dict)


def plan_baseline(
    baseline: Baseline, groups: Sequence[Sequence[ParameterFacts]], *, num_shards: int = 1
) -> StateReport:
    """Sum the state of a baseline.

    Args:
        baseline: The optimizer.
        groups: Its parameters by group.
        num_shards: As in :func:`~hf_lowmem_optim.memory.plan.plan_groups`.

    Returns:
        The report; components are the keys of the state, as in what is measured.
    """
    members = [(index, parameter) for index, group in enumerate(groups) for parameter in group]
    specs = [(index, key, spec) for index, parameter in members for key, spec in baseline.state(parameter).items()]
    pieces = [Piece(index, s.component, s.dtype, s.shard(num_shards).nbytes) for index, _, s in specs]
    used = {key for _, key, _ in specs}
    pieces += [Piece(None, s.component, s.dtype, s.nbytes) for key, s in baseline.shared.items() if key in used]
    return add_up(pieces, len(groups), sum(parameter.numel for _, parameter in members))


def _moments(parameter: ParameterFacts, dtype: torch.dtype) -> Specs:
    return {key: TensorSpec(parameter.shape, dtype, key) for key in ("exp_avg", "exp_avg_sq")}


def _adamw_fp32(parameter: ParameterFacts) -> Specs:
    """Describe two float32 moments and torch's step count: AdamW on float32 weights, or on float32 copies of them."""
    return {**_moments(parameter, torch.float32), "step": TensorSpec((), torch.float32, "step")}


def _adamw_torch(parameter: ParameterFacts) -> Specs:
    """Describe two moments in the parameter's dtype, a float32 step count per tensor (torch.optim.AdamW)."""
    return {**_moments(parameter, parameter.dtype), "step": TensorSpec((), torch.float32, "step")}


def _adamw_8bit(parameter: ParameterFacts) -> Specs:
    """Describe one byte per moment and entry, a float32 maximum per 256 entries (bitsandbytes.optim.AdamW8bit).

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
    """Describe half a byte per moment and entry, a float32 scale per 128 entries, a table of 16 (torchao's AdamW4bit).

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
    """Describe projector and two projected moments at rank 128 in the gradient's dtype (galore_torch.GaLoreAdamW).

    The smaller dimension is projected. Everything that is no linear layer keeps two whole moments. For float32 models
    galore-torch keeps the projector as a view that holds the whole SVD factor; only the view is counted.
    """
    if not parameter.is_projected:
        return _moments(parameter, parameter.dtype)
    p, q = parameter.shape
    rank = min(_GALORE_RANK, p, q)
    projector, projected = ((rank, q), (p, rank)) if p >= q else ((p, rank), (rank, q))
    moments = {key: TensorSpec(projected, parameter.dtype, key) for key in ("exp_avg", "exp_avg_sq")}
    return {"projector": TensorSpec(projector, parameter.dtype, "projector"), **moments}


def _adafactor(parameter: ParameterFacts) -> Specs:
    """Describe row and column means of the squared gradient, float32 (transformers.Adafactor, no first moment)."""
    shape = parameter.shape
    shapes: dict[str, tuple[int, ...]] = {"RMS": ()}
    if len(shape) < 2:
        shapes["exp_avg_sq"] = shape
    else:
        shapes.update(exp_avg_sq_row=shape[:-1], exp_avg_sq_col=shape[:-2] + shape[-1:])
    return {key: TensorSpec(of_key, torch.float32, key) for key, of_key in shapes.items()}


def _nothing(_: Sequence[ParameterFacts]) -> int:
    """Return 0: one kernel updates in place (torch's fused AdamW, bitsandbytes on GPUs)."""
    return 0


def _roots(parameters: Sequence[ParameterFacts]) -> int:
    """Bound torch's foreach AdamW: it takes the root of all second moments at once."""
    return sum(parameter.nbytes for parameter in parameters)


def _squares(parameters: Sequence[ParameterFacts]) -> int:
    """Bound Adafactor: the gradient's square, its sum, the update before; float32 copies of W and g where narrower."""
    copies = (3 if parameter.dtype == torch.float32 else 5 for parameter in parameters)
    return max(4 * parameter.numel * count for parameter, count in zip(parameters, copies, strict=True))


def _svd(parameters: Sequence[ParameterFacts]) -> int:
    """Bound GaLore: three updates of the largest tensor; or two, and four float32 copies of a matrix around its SVD."""
    largest = max(parameter.nbytes for parameter in parameters)
    matrix = max((4 * parameter.numel for parameter in parameters if parameter.is_projected), default=0)
    return max(3 * largest, 2 * largest + 4 * matrix)


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("adamw_fp32", "adamw_torch_fused", "two float32 moments (fused)", _adamw_fp32, _nothing),
        Baseline(
            "adamw_torch_fused",
            "adamw_torch_fused",
            "two moments in the parameter's dtype (fused)",
            _adamw_torch,
            _nothing,
        ),
        Baseline("adamw_torch", "adamw_torch", "two moments in the parameter's dtype (foreach)", _adamw_torch, _roots),
        Baseline(
            "adamw_8bit",
            "adamw_bnb_8bit",
            "two moments in 8 bits; embeddings float32",
            _adamw_8bit,
            _nothing,
            shared={f"qmap{number}": TensorSpec((256,), torch.float32, f"qmap{number}") for number in ("1", "2")},
        ),
        Baseline("adamw_4bit", "adamw_torch_4bit", "two moments in 4 bits", _adamw_4bit),
        Baseline("galore_adamw", "galore_adamw", "moments projected to rank 128", _galore, _svd),
        Baseline("adafactor", "adafactor", "row and column means of the squared gradient", _adafactor, _squares),
    )
}
