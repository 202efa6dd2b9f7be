"""What other optimizers keep, as formulas: to compare with in a plan. The tests hold each against the class itself.

They are described as the Trainer sets them up: every trainable parameter, with the settings that
``TrainingArguments(optim=...)`` gives them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hf_lowmem_optim.memory.measure import Piece, StateReport, add_up
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["BASELINES", "Baseline", "ParameterFacts", "plan_baseline"]

Specs = dict[str, TensorSpec]

_GALORE_RANK = 128  # the Trainer's


@dataclass(frozen=True)
class ParameterFacts:
    """What a formula may depend on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: bool = False  # the weight of a linear layer that is neither an embedding nor the output head
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Baseline:
    """An optimizer that is not ours, and the state that it keeps for one parameter."""

    name: str
    summary: str
    state: Callable[[ParameterFacts], Specs]
    # Bytes that step() allocates for a moment, at most, given all parameters, without workspaces of libraries. None
    # where that is up to a compiler (torchao).
    temporaries: Callable[[Sequence[ParameterFacts]], int] | None = None
    # Kept once if any parameter has a state key of that name.
    shared: Mapping[str, TensorSpec] = field(default_factory=dict)


def plan_baseline(
    baseline: Baseline, groups: Sequence[Sequence[ParameterFacts]], *, num_shards: int = 1
) -> StateReport:
    """Sum the state of a baseline, as :func:`~hf_lowmem_optim.memory.plan.plan_groups` does for our optimizers.

    Components are the keys of the state, as in what is measured.
    """
    pieces, used = list[Piece](), set[str]()
    for index, group in enumerate(groups):
        for parameter, count in Counter(group).items():
            specs = baseline.state(parameter)
            used |= specs.keys()
            pieces += [Piece(index, s.component, s.dtype, count * s.shard(num_shards).nbytes) for s in specs.values()]
    pieces += [Piece(None, s.component, s.dtype, s.nbytes) for key, s in baseline.shared.items() if key in used]
    return add_up(pieces, len(groups), sum(parameter.numel for group in groups for parameter in group))


def _specs(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Specs:
    """Describe tensors of one dtype; each is a component of its own."""
    return {key: TensorSpec(shape, dtype, key) for key, shape in shapes.items()}


def _moments(p: ParameterFacts) -> Specs:
    return _specs(p.dtype, exp_avg=p.shape, exp_avg_sq=p.shape)


def _adamw_fp32(p: ParameterFacts) -> Specs:
    """Describe two float32 moments and torch's step count: AdamW on float32 weights, or on float32 copies of them."""
    return _specs(torch.float32, exp_avg=p.shape, exp_avg_sq=p.shape, step=())


def _adamw_torch(p: ParameterFacts) -> Specs:
    """Describe two moments in the parameter's dtype, a float32 step count per tensor (torch.optim.AdamW)."""
    return {**_moments(p), **_specs(torch.float32, step=())}


def _adamw_8bit(p: ParameterFacts) -> Specs:
    """Describe one byte per moment and entry, a float32 maximum per 256 entries (bitsandbytes.optim.AdamW8bit).

    Tensors under 4096 entries keep float32 moments, and so do embeddings, for which the Trainer asks.
    """
    if p.embedding or p.numel < 4096:
        return _specs(torch.float32, state1=p.shape, state2=p.shape)
    blocks = (-(-p.numel // 256),)
    # The tables belong to the optimizer; naming them here says that this tensor needs them.
    statistics = _specs(torch.float32, absmax1=blocks, absmax2=blocks, qmap1=(0,), qmap2=(0,))
    return {**_specs(torch.uint8, state1=p.shape, state2=p.shape), **statistics}


def _adamw_4bit(p: ParameterFacts) -> Specs:
    """Describe half a byte per moment and entry, a float32 scale per 128 entries, a table of 16 (torchao's AdamW4bit).

    Tensors under 4096 entries, or of a size that 128 does not divide, keep moments in the parameter's dtype.
    """
    if p.numel < 4096 or p.numel % 128:
        return _adamw_torch(p)
    specs = _specs(torch.float32, step=())
    for key in ("exp_avg", "exp_avg_sq"):
        specs[f"{key} codes"] = TensorSpec((p.numel // 2,), torch.uint8, key)
        specs[f"{key} scale"] = TensorSpec((p.numel // 128,), torch.float32, key)
        specs[f"{key} qmap"] = TensorSpec((16,), torch.float32, key)
    return specs


def _is_projected(p: ParameterFacts) -> bool:
    return p.matrix and len(p.shape) == 2


def _galore(p: ParameterFacts) -> Specs:
    """Describe projector and two projected moments at rank 128 in the gradient's dtype (galore_torch.GaLoreAdamW).

    The smaller dimension is projected. Everything that is no linear layer keeps two whole moments. For float32 models
    galore-torch keeps the projector as a view that holds the whole SVD factor; only the view is counted.
    """
    if not _is_projected(p):
        return _moments(p)
    rows, columns = p.shape
    rank = min(_GALORE_RANK, rows, columns)
    projector, projected = ((rank, columns), (rows, rank)) if rows >= columns else ((rows, rank), (rank, columns))
    return _specs(p.dtype, projector=projector, exp_avg=projected, exp_avg_sq=projected)


def _adafactor(p: ParameterFacts) -> Specs:
    """Describe row and column means of the squared gradient, float32 (transformers.Adafactor, no first moment)."""
    if len(p.shape) < 2:
        return _specs(torch.float32, RMS=(), exp_avg_sq=p.shape)
    return _specs(torch.float32, RMS=(), exp_avg_sq_row=p.shape[:-1], exp_avg_sq_col=p.shape[:-2] + p.shape[-1:])


def _nothing(_: Sequence[ParameterFacts]) -> int:
    """Return 0: one kernel updates in place (torch's fused AdamW, bitsandbytes on GPUs)."""
    return 0


def _roots(parameters: Sequence[ParameterFacts]) -> int:
    """Bound torch's foreach AdamW: it takes the root of all second moments at once."""
    return sum(p.nbytes for p in parameters)


def _squares(parameters: Sequence[ParameterFacts]) -> int:
    """Bound Adafactor: the gradient's square, its sum, the update before; float32 copies of W and g where narrower."""
    return max(4 * p.numel * (3 if p.dtype == torch.float32 else 5) for p in parameters)


def _svd(parameters: Sequence[ParameterFacts]) -> int:
    """Bound GaLore: three updates of the largest tensor; or two, and four float32 copies of a matrix around its SVD."""
    largest = max(p.nbytes for p in parameters)
    matrix = max((4 * p.numel for p in parameters if _is_projected(p)), default=0)
    return max(3 * largest, 2 * largest + 4 * matrix)


_TABLES = _specs(torch.float32, qmap1=(256,), qmap2=(256,))
_IN_DTYPE = "two moments in the parameter's dtype"

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("adamw_fp32", "two float32 moments (fused)", _adamw_fp32, _nothing),
        Baseline("adamw_torch_fused", f"{_IN_DTYPE} (fused)", _adamw_torch, _nothing),
        Baseline("adamw_torch", f"{_IN_DTYPE} (foreach)", _adamw_torch, _roots),
        Baseline("adamw_8bit", "two moments in 8 bits; embeddings float32", _adamw_8bit, _nothing, _TABLES),
        Baseline("adamw_4bit", "two moments in 4 bits", _adamw_4bit),
        Baseline("galore_adamw", "moments projected to rank 128", _galore, _svd),
        Baseline("adafactor", "row and column means of the squared gradient", _adafactor, _squares),
    )
}
