"""LDAdam (Robert et al., arXiv 2410.16103, ICLR 2025): Adam in a low-rank subspace that follows the gradient.

Per matrix W (p × q, the smaller dimension first; a tall matrix is used transposed), rank r:

1.  a ← g + ξ
2.  t = 1: U ← r leading left singular vectors of a, R ← 0
3.  t > 1: b = s·U₋m + (1 − ρ)·a with s = ρ / (1 − β1^(t−1));  V ← bᵀU₋;  Y ← bV;  U ← orthonormalize(Y);  R ← UᵀU₋
4.  p̃ ← Uᵀa
5.  m̃ ← R m
6.  ξ ← a − U(p̃ + c·m̃) + c·U₋m with c = β1 / (1 − β1)
7.  t > 1: v ← c2·|(R∘R)(v/c2 − (m/c1)²) + (m̃/c1)²| with c1 = 1 − β1^(t−1), c2 = 1 − β2^(t−1)
8.  m ← β1·m̃ + (1 − β1)·p̃;  v ← β2·v + (1 − β2)·p̃²
9.  W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]

| letter | state key    | shape  | dtype            | bytes per parameter      |
|--------|--------------|--------|------------------|--------------------------|
| U      | `basis`      | (p, r) | `state_dtype`    | 4·r/q                    |
| m      | `exp_avg`    | (r, q) | `state_dtype`    | 4·r/p                    |
| v      | `exp_avg_sq` | (r, q) | `state_dtype`    | 4·r/p                    |
| ξ      | `error…`     | W      | `error_feedback` | 4, 2, 1.06, 0.56 or 0    |

Six products of p·q·r multiplications a step. Besides a itself, nothing of the size of W is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lowmem_optim.compression.error_feedback import (
    ERROR_FEEDBACK,
    QUANTIZATION_BLOCK_SIZE,
    accumulate,
    error_state,
    fused_error,
    keeps_error,
    retain_,
)
from hf_lowmem_optim.compression.lowrank import leading_left_singular_vectors, svd_entries
from hf_lowmem_optim.compression.rounding import rounding_bytes
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.orthonormalize import orthonormalize_entries
from hf_lowmem_optim.kernels.subspace_adam import Buffers, Coefficients, subspace_adam_
from hf_lowmem_optim.kernels.subspace_adam.layout import FEW_TERMS
from hf_lowmem_optim.optimizers.adamw import DenseState, adamw_state
from hf_lowmem_optim.optimizers.batches import (
    batch_entries,
    chunks_by_key,
    is_aligned,
    matrix_entries,
    update_stacked_,
)
from hf_lowmem_optim.optimizers.dense import WeightRounding, rounds_stochastically
from hf_lowmem_optim.optimizers.gradient_error import ErrorInGradient
from hf_lowmem_optim.optimizers.hyperparameters import check_bool, check_choice, check_positive_int, check_unit_interval
from hf_lowmem_optim.optimizers.pending import PendingUpdate
from hf_lowmem_optim.optimizers.side_by_side import Job
from hf_lowmem_optim.state import StepTemporaries, TensorSpec

__all__ = ["LDAdam", "ldadam_accumulate_", "ldadam_compresses", "ldadam_state", "ldadam_temporaries", "ldadam_update_"]

_STATE_DTYPES = ("fp32", "param")


def ldadam_compresses(shape: Sequence[int], *, rank: int | None) -> bool:
    """Whether a tensor of this shape takes the low-rank rule rather than dense AdamW.

    Args:
        shape: Shape of the parameter; three and more dimensions count as the matrix (out, rest).
        rank: Rank of the projection, None for dense.

    Returns:
        True for matrices both of whose dimensions exceed ``rank``.
    """
    return rank is not None and len(shape) >= 2 and min(shape[0], math.prod(shape[1:])) > rank


def ldadam_state(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    rank: int | None = 16,
    state_dtype: str = "fp32",
    error_feedback: str = "4bit",
    dense_state: str = "param",
    **_other: Any,
) -> dict[str, TensorSpec]:
    """State of one parameter; the only place where its size is written.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        rank: As in :class:`LDAdam`.
        state_dtype: As in :class:`LDAdam`.
        error_feedback: As in :class:`LDAdam`.
        dense_state: As in :class:`LDAdam`.
        **_other: Hyper-parameters that do not change the state.

    Returns:
        Specs by state key: the table at the head of this file, or dense AdamW's.
    """
    if rank is None or not ldadam_compresses(shape, rank=rank):
        return adamw_state(shape, dtype, dense_state=dense_state)
    small, large = sorted((shape[0], math.prod(shape[1:])))
    stored = dtype if state_dtype == "param" else torch.float32
    return {
        "basis": TensorSpec((small, rank), stored, "basis"),
        "exp_avg": TensorSpec((rank, large), stored, "first_moment"),
        "exp_avg_sq": TensorSpec((rank, large), stored, "second_moment"),
        **error_state((shape[0], math.prod(shape[1:])), dtype, error_feedback),
    }


def ldadam_temporaries(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    first: bool,
    rank: int,
    state_dtype: str,
    error_feedback: str,
    device: torch.device,
    **_other: Any,
) -> StepTemporaries:
    """What :func:`ldadam_update_` allocates for one matrix, float32 throughout.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        first: Whether it is the first update, which has the SVD instead of the power iteration.
        rank: As in :class:`LDAdam`.
        state_dtype: As in :class:`LDAdam`.
        error_feedback: As in :class:`LDAdam`.
        device: Device of the parameter; on a GPU with Triton, and contiguous.
        **_other: Hyper-parameters that do not matter here.

    Returns:
        Shared: a and the wide copy of W, which take turns in one buffer; p̃, the bases and the two factors of line 6.
        Own: the wide copies of U, m and v; then the four (p, r) matrices of line 3 and R, or Y and what it takes to
        orthonormalize it. In the first update p̃, bases and factors are the matrix's own, after the factors of the SVD.
    """
    p, q = sorted((shape[0], math.prod(shape[1:])))
    a_has_place = error_feedback == "fp32" or (dtype == torch.float32 and error_feedback in ("param", "grad", "none"))
    weight_has_place = dtype == torch.float32 or (device.type != "cpu" and rank <= FEW_TERMS)
    shared, buffers = {}, {"projected": rank * q, "bases": 2 * rank * p, "right": 2 * rank * q}
    if not (a_has_place and weight_has_place):
        shared["accumulated"] = p * q
    copies = 0 if state_dtype == "fp32" or dtype == torch.float32 else rank * (p + 2 * q)
    if first:
        own = max(svd_entries(p, q, rank, device), sum(buffers.values()) + rank * (2 * p + 2 * rank))
    else:
        shared.update(buffers)
        own = max(rank * (4 * p + rank), rank * p + orthonormalize_entries(p, rank, device))
    shared_bytes, own_bytes = {name: 4 * entries for name, entries in shared.items()}, 4 * (copies + own)
    if first and error_feedback == "grad":
        # before all that: the error's buffer is there beside the gradient that becomes it
        own_bytes = max(own_bytes, p * q * dtype.itemsize - sum(shared_bytes.values()))
    return StepTemporaries(shared_bytes, own_bytes)


def ldadam_update_(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rho: float,
    stochastic_rounding: bool = False,
    workspace: Workspace | None = None,
) -> None:
    """One step of LDAdam on one matrix, in place; or on several of one shape, each by itself.

    Args:
        param: W, shape (out, in), any layout; float32, bfloat16 or float16. Several: (batch, out, in), t > 1.
        grad: g, same shape; only read, unless it is the workspace's buffer for a, ``"accumulated"``. It may be
            ``state["error"]`` itself, which then holds g + ξ.
        state: As :func:`ldadam_state` describes it; written. Several: each tensor stacked, (batch, ...).
        step: t, 1 for the first update of this tensor.
        lr: Learning rate.
        betas: β1 and β2.
        eps: Added to √v̂.
        weight_decay: Decoupled weight decay.
        rho: ρ, the share of the old momentum in the matrix whose subspace is tracked.
        stochastic_rounding: Round a quantized error stochastically, seeded by the step, instead of to nearest; not for
            several, as the draws go by an entry's place in the buffer.
        workspace: Temporary buffers shared with other matrices of the same step.
    """
    space = Workspace() if workspace is None else workspace
    # line 1: a ← g + ξ, or where that is to come
    error = fused_error(grad, state) if step > 1 else None
    residual = accumulate(grad, state, space) if error is None else space.take("accumulated", grad.shape, grad.device)
    m, v, U = (
        kept if kept.dtype == torch.float32 else kept.float()
        for kept in (state["exp_avg"], state["exp_avg_sq"], state["basis"])
    )
    rank = m.shape[-2]
    new_basis = None
    if step == 1:
        # line 2; the moments are zero, and lines 4 to 8 as they are with R = 0
        new_basis = leading_left_singular_vectors(residual.mT if grad.shape[0] > grad.shape[1] else residual, rank)
    # in the first step they are not there beside what the next matrix's decomposition takes
    small = Workspace() if step == 1 else space
    batch, (p, q) = m.shape[:-2], (U.shape[-2], m.shape[-1])
    buffers = Buffers(
        small.take("bases", (*batch, 2 * rank, p), m.device),
        small.take("projected", m.shape, m.device),
        small.take("right", (*batch, 2 * rank, q), m.device),
    )
    seed = step if stochastic_rounding else None
    store = partial(retain_, state, residual, seed=seed) if error is None and keeps_error(state) else None

    def wide() -> Tensor:
        # a is free now, unless it is the gradient or the error
        free = residual is not grad and not ("error" in state and residual.data_ptr() == state["error"].data_ptr())
        return residual if free else space.take("accumulated", param.shape, param.device)

    numbers = _coefficients(step, lr, betas, eps, weight_decay, rho)
    fused: dict[str, Any] = {"gradient": None if error is None else grad, "error": error, "seed": seed}
    # lines 3 to 9
    subspace_adam_(param, residual, U, m, v, buffers, numbers, wide=wide, store=store, new_basis=new_basis, **fused)
    for key, value in (("basis", U), ("exp_avg", m), ("exp_avg_sq", v)):
        if state[key] is not value:
            state[key].copy_(value)


def _coefficients(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, rho: float
) -> Coefficients:
    """The numbers of a step: c1 and c2 are of the old moments, and zero in the first step, where nothing needs them."""
    beta1, beta2 = betas
    c1, c2 = 1 - beta1 ** (step - 1), 1 - beta2 ** (step - 1)
    # line 9: m̂/(√v̂ + eps) is m/(√v + eps·√(1 − β2ᵗ)) up to a factor that joins the step size
    root = math.sqrt(1 - beta2**step)
    return Coefficients(
        momentum_weight=rho / c1 if step > 1 else 0.0,
        gradient_weight=1 - rho,
        beta1=beta1,
        beta2=beta2,
        correction=c2 / c1**2 if step > 1 else 0.0,
        damping=eps * root,
        decay=1 - lr * weight_decay,
        step_size=lr * root / (1 - beta1**step),
    )


def ldadam_accumulate_(
    grad: Tensor, state: Mapping[str, Tensor], *, seed: int, stochastic_rounding: bool, workspace: Workspace
) -> None:
    """Add a gradient to the error, ξ ← ξ + g: the next update's a is then that of the sum of both gradients.

    Args:
        grad: g, shape (out, in); only read.
        state: As :func:`ldadam_state` describes it, with an error; written.
        seed: For stochastic rounding.
        stochastic_rounding: As in :class:`LDAdam`.
        workspace: As in :func:`ldadam_update_`.
    """
    retain_(state, accumulate(grad, state, workspace), seed=seed if stochastic_rounding else None)


def _batch_key(param: Tensor, group: Mapping[str, Any], step: int) -> Hashable:
    """What matrices must have in common to be updated together, None for one that is updated alone."""
    p, q = sorted(_matrix_shape(param))
    r = group["rank"]
    fits = p * q <= matrix_entries(param.device) and p * q % QUANTIZATION_BLOCK_SIZE == 0
    if step == 1 or not (fits and is_aligned((p, r), (r, q), (r, r))) or group["stochastic_rounding"]:
        return None
    return id(group), param.shape, param.dtype, param.device, step


def _matrix_shape(param: Tensor) -> tuple[int, int]:
    return param.shape[0], math.prod(param.shape[1:])


class LDAdam(ErrorInGradient):
    """LDAdam: Adam with low-rank states, error feedback and a subspace tracked at every step.

    Matrices whose two dimensions exceed ``rank`` are compressed, convolution kernels as (out, rest); everything
    else, and every group with ``rank=None``, takes AdamW, bit-equal to torch's. A non-finite gradient propagates
    into state and parameters, as in AdamW.

    Args:
        params: Parameters, named parameters or parameter groups, as in torch. A group may set any argument below.
        lr: Learning rate.
        betas: Decay rates of the first and the second moment, each in [0, 1). The defaults are the paper's.
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled weight decay.
        rank: Rank r of the projection, or None for dense AdamW.
        rho: ρ in [0, 1): share of the old momentum in the matrix whose subspace is tracked.
        state_dtype: Storage of moments and basis: ``"fp32"``, or ``"param"`` for the parameter's dtype (half the
            bytes for bf16 models, and a visible loss in the second moment).
        error_feedback: Storage of the error: ``"4bit"`` or ``"8bit"`` (block-quantized, 0.56 and 1.06 bytes an entry),
            ``"bf16"``, ``"fp32"``, ``"param"`` (the parameter's dtype), ``"grad"`` (in the gradient's buffer, at no
            bytes; see :class:`~hf_lowmem_optim.optimizers.gradient_error.ErrorInGradient` for what it rules out), or
            ``"none"`` (no error feedback). The default is the smallest that loses nothing against ``"fp32"`` (README,
            "What the error may cost").
        stochastic_rounding: Round a quantized error stochastically (unbiased), seeded by the step, instead of to
            nearest.
        dense_state: Storage of AdamW's moments where the dense rule applies: ``"param"`` (the parameter's dtype, as in
            torch), ``"fp32"``, or ``"8bit"``, bitsandbytes' blockwise quantization (the extra ``bitsandbytes``).
        weight_rounding: How updated bfloat16 and float16 weights are rounded: ``"nearest"``, or ``"stochastic"``, which
            keeps updates too small for the weight's dtype in the mean, seeded by step and parameter.

    Raises:
        TypeError: An argument has the wrong type, or a parameter an unsupported dtype.
        ImportError: ``dense_state="8bit"`` without bitsandbytes.
        ValueError: An argument is out of range.

    Example:
        >>> optimizer = LDAdam(model.parameters(), lr=1e-3, rank=16)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2410.16103, algorithm 1.
    """

    name: ClassVar[str] = "ldadam"
    dense_key: ClassVar[str] = "rank"
    state_keys: ClassVar[tuple[str, ...]] = ("rank", "state_dtype", "error_feedback", "dense_state")
    state_function = staticmethod(ldadam_state)
    temporaries_function = staticmethod(ldadam_temporaries)
    update_function = staticmethod(ldadam_update_)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 16,
        rho: float = 0.908,
        state_dtype: Literal["fp32", "param"] = "fp32",
        error_feedback: Literal["param", "fp32", "bf16", "8bit", "4bit", "grad", "none"] = "4bit",
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
                "rank": rank,
                "rho": rho,
                "state_dtype": state_dtype,
                "error_feedback": error_feedback,
                "stochastic_rounding": stochastic_rounding,
                "dense_state": dense_state,
                "weight_rounding": weight_rounding,
            },
        )

    def _jobs(self, updates: Sequence[PendingUpdate]) -> list[Job]:
        """A job for each large matrix, and one for several small ones of one shape."""
        chunks = chunks_by_key(
            updates,
            lambda u: _batch_key(u.param, u.group, u.state["step"]),
            lambda u: u.param.numel(),
            lambda u: batch_entries(u.param.device),
        )
        alone = super()._jobs([chunk[0] for chunk in chunks if len(chunk) == 1])
        together = [chunk for chunk in chunks if len(chunk) > 1]
        shapes = [_matrix_shape(chunk[0].param) for chunk in together]
        return alone + [
            Job([u.param for u in chunk], partial(update_stacked_, ldadam_update_, chunk, shape))
            for chunk, shape in zip(together, shapes, strict=True)
        ]

    @classmethod
    def batch_temporaries(cls, groups: Sequence[Mapping[str, Any]]) -> StepTemporaries:
        """Describe what a step allocates for the tensors that are updated together.

        Args:
            groups: The parameter groups, with ``"params"``.

        Returns:
            What the dense tensors share, and what the worst batch of a later step needs: its stacks and, for each
            matrix, what one alone needs.
        """
        together = super().batch_temporaries(groups)
        if cls.layerwise:  # each matrix is updated when its gradient comes
            return together
        for group in groups:
            matrices = [param for param in group["params"] if cls.compresses(param.shape, group)]
            chunks = chunks_by_key(
                matrices, partial(_batch_key, group=group, step=2), Tensor.numel, lambda p: batch_entries(p.device)
            )
            for chunk in chunks:
                if len(chunk) > 1:
                    together = together.largest(cls._one_batch_temporaries(chunk, group))
        return together

    @classmethod
    def _one_batch_temporaries(cls, chunk: Sequence[Tensor], group: Mapping[str, Any]) -> StepTemporaries:
        """What :func:`update_stacked_` allocates: the stacks, and what each matrix by itself needs."""
        one = chunk[0]
        hyper = {key: group[key] for key in cls.state_keys}
        alone = ldadam_temporaries(one.shape, one.dtype, first=False, device=one.device, **hyper)
        in_gradient = group["error_feedback"] == "grad"
        if not in_gradient:  # the gradients are put together where the error is added to them
            alone = replace(alone, shared={**alone.shared, "accumulated": 4 * one.numel()})
        state = sum(spec.nbytes for spec in cls.state_specs(one, group).values())
        stacks = (1 + in_gradient) * one.numel() * one.dtype.itemsize + state
        if not rounds_stochastically(one, group):
            return alone.times(len(chunk), beside=stacks)
        stacks += 4 * one.numel()
        batch = alone.times(len(chunk), beside=stacks)
        # the weights are rounded one after the other, when what the update took is free again
        return replace(batch, own=max(batch.own, len(chunk) * stacks + rounding_bytes(one.numel(), one.device)))

    @classmethod
    def compresses(cls, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
        """Whether a tensor of this shape takes the low-rank rule in this group."""
        return ldadam_compresses(shape, rank=group["rank"])

    @classmethod
    def check_own(cls, hyper: Mapping[str, Any]) -> None:
        """Check ``rank``, ``rho``, ``state_dtype`` and ``error_feedback``."""
        check_positive_int("rank", hyper["rank"], or_none="dense AdamW")
        check_unit_interval("rho", hyper["rho"])
        check_choice("state_dtype", hyper["state_dtype"], _STATE_DTYPES)
        check_choice("error_feedback", hyper["error_feedback"], ERROR_FEEDBACK)
        check_bool("stochastic_rounding", hyper["stochastic_rounding"])
        if hyper["stochastic_rounding"] and hyper["error_feedback"] not in ("8bit", "4bit"):
            raise ValueError(
                f"stochastic_rounding=True needs a quantized error, error_feedback='8bit' or '4bit', not "
                f"{hyper['error_feedback']!r}"
            )
