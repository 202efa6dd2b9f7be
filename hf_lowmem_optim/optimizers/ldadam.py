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

Where a gradient has a rank below r, the spare columns of U project it to rounding noise, which m̂/√v̂ would turn into
full steps: an entry of p̃ below 2⁻²⁰ of the largest of its column counts as zero. One beyond 2⁵⁶ counts as 2⁵⁶, so that
gradients of any size leave the weights finite, as AdamW does.

Six products of p·q·r multiplications a step. Besides a itself, and a float32 copy of a narrower W, nothing of the size
of W is allocated; by the fused version of a later step on a GPU (``ops/triton/ldadam_step.py``), not even those.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import most_tensors
from hf_lowmem_optim.engine.error_feedback import (
    FORMATS,
    ErrorFeedback,
    add_residual,
    check_rounding,
    error_state,
    save_residual_,
)
from hf_lowmem_optim.engine.method import Method, StagedUpdate
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, UNIT, Options, option
from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.low_rank import (
    Coefficients,
    bound_projection_,
    leading_left_singular_vectors,
    of_safe_size,
    orthonormalize,
    orthonormalize_rows,
)
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["LDAdam", "LDAdamOptions", "ldadam_state", "ldadam_update_"]


@dataclass(frozen=True)
class LDAdamOptions(Options):
    """The options of :class:`LDAdam`; the defaults of ``betas`` and ``rho`` are the paper's."""

    betas: tuple[float, float] = option((0.908, 0.99), "Decay rates of the moments, each in [0, 1).", within=UNIT)
    rank: int | None = option(16, "Rank r of the projection.", within=COUNT, none="dense AdamW", shapes_state=True)
    rho: float = option(0.908, "ρ: share of the old momentum in the matrix whose subspace is tracked.", within=UNIT)
    state_dtype: Literal["fp32", "param"] = option(
        "fp32",
        'Storage of moments and basis: ``"fp32"``, or ``"param"`` for the parameter\'s dtype (half the bytes for bf16 '
        "models, and a visible loss in the second moment).",
        shapes_state=True,
    )
    error_feedback: ErrorFeedback = option(
        "4bit",
        'Storage of the error: ``"4bit"`` or ``"8bit"`` (block-quantized, 0.56 and 1.06 bytes an entry), ``"bf16"``, '
        '``"fp32"``, ``"param"`` (the parameter\'s dtype), ``"grad"`` (in the gradient\'s buffer, at no bytes; see '
        ':mod:`~hf_lowmem_optim.engine.gradient_error` for what it rules out), or ``"none"`` (no error feedback). The '
        'default is the smallest that loses nothing against ``"fp32"``.',
        shapes_state=True,
    )
    stochastic_rounding: bool = option(
        False, "Round a quantized error stochastically (unbiased), seeded by the step, instead of to nearest."
    )

    def check(self) -> None:
        """Refuse a rounding that rounds nothing."""
        check_rounding(self.stochastic_rounding, self.error_feedback)


def ldadam_state(shape: Sequence[int], dtype: torch.dtype, o: LDAdamOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file.

    Args:
        shape: Shape of the parameter; three and more dimensions count as the matrix (out, rest).
        dtype: Dtype of the parameter.
        o: The options.

    Returns:
        Specs by state key; None for a tensor that is no matrix, or of which a dimension does not exceed the rank.
    """
    r, rows, columns = o.rank, shape[0] if len(shape) >= 2 else 0, math.prod(shape[1:])
    if r is None or min(rows, columns) <= r:
        return None
    p, q = sorted((rows, columns))
    stored = dtype if o.state_dtype == "param" else torch.float32
    return {
        "basis": TensorSpec((p, r), stored, "basis"),
        "exp_avg": TensorSpec((r, q), stored, "first_moment"),
        "exp_avg_sq": TensorSpec((r, q), stored, "second_moment"),
        **error_state((rows, columns), dtype, o.error_feedback),
    }


@Op
def ldadam_update_(
    W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: LDAdamOptions
) -> None:
    """Take one step of LDAdam on n matrices of one shape, in place.

    Args:
        W: The weights, (out, in) each, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read. With ``error_feedback="grad"`` a gradient is ``state["error"]`` itself,
            which then holds g + ξ.
        state: As :func:`ldadam_state` describes it, stacked: [n, ...]; written. And the corrections of
            compensated weights.
        t: 1 for the first update of these tensors.
        o: The options.
    """
    if len(W) > 1 and len(W) > (most := most_tensors(W[0].numel(), W[0].device)):  # on a GPU: a is of their size
        for start in range(0, len(W), most):
            part = slice(start, start + most)
            ldadam_update_.torch_version(W[part], g[part], {key: value[part] for key, value in state.items()}, t, o)
        return
    tall = W[0].shape[0] > W[0].shape[1]
    m, v, old = (state[key].float().contiguous() for key in ("exp_avg", "exp_avg_sq", "basis"))  # [n, r, q], [n, p, r]
    numbers = Coefficients.of_step(t, o)
    # 1. a ← g + ξ
    fmt = FORMATS.get(o.error_feedback)
    residual = add_residual(g, state, fmt)
    a = residual.mT if tall else residual  # [n, p, q]
    if t == 1:
        # 2. U ← r leading left singular vectors of a; R will be 0, because U₋ is
        U = torch.stack([leading_left_singular_vectors(each, m.shape[1]) for each in a])
    else:
        # 3. V ← bᵀU₋;  Y ← bV;  U ← orthonormalize(Y), with b = s·U₋m + (1 − ρ)·a
        s = numbers.momentum_weight
        V = of_safe_size(torch.baddbmm(m, old.mT, a, beta=s, alpha=1 - o.rho).mT)
        U = orthonormalize((old @ (m @ V)).baddbmm_(a, V, beta=s, alpha=1 - o.rho))
    # 4. p̃ ← Uᵀa
    p = U.mT @ a
    # 6. ξ ← a + c·U₋m − U(p̃ + c·m̃), of which p̃ + c·m̃ is m / (1 − β1) after line 8
    if o.error_feedback != "none":
        a.baddbmm_(old, m, alpha=numbers.beta1 / (1 - numbers.beta1))
    # 5., 7. and 8. m̃, v, m; p becomes the direction of line 9
    ldadam_moments_(U.mT @ old, m, v, p, numbers)
    if o.error_feedback != "none":
        a.baddbmm_(U, m, alpha=-1 / (1 - numbers.beta1))
        save_residual_(state, residual, fmt, seed=t if o.stochastic_rounding else None)
    del a, residual
    # 9. W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]
    corrections = state.get(CORRECTION)
    wide = W if corrections is None else join_weights(W, list(corrections))
    ldadam_descend_([weight.mT if tall else weight for weight in wide], U, p, numbers.decay, numbers.step_size)
    if corrections is not None:
        split_weights_(W, list(corrections), wide)
    for key, value in (("basis", U), ("exp_avg", m), ("exp_avg_sq", v)):
        if state[key] is not value:
            state[key].copy_(value)


@Op
def ldadam_moments_(R: Tensor, m: Tensor, v: Tensor, p: Tensor, numbers: Coefficients) -> None:
    """Move the moments to the new basis and update them: lines 5, 7 and 8.

    Args:
        R: UᵀU₋, float32 [n, r, r].
        m: First moments, float32 [n, r, q], contiguous; written.
        v: Second moments, likewise.
        p: p̃, likewise. Overwritten with the direction m/(√v + δ).
        numbers: The numbers of this step.
    """
    β1, β2, k = numbers.beta1, numbers.beta2, numbers.correction
    bound_projection_(p)
    # 5. m̃ ← R m
    m_moved = R @ m
    # 7. v ← c2·|(R∘R)(v/c2 − (m/c1)²) + (m̃/c1)²|, times the β2 of line 8: with k = c2/c1², c1 and c2 cancel
    v_moved = m.baddbmm_(R * R, v.addcmul_(m, m, value=-k), beta=0, alpha=β2)  # in m's place, which has had its turn
    v_moved.addcmul_(m_moved, m_moved, value=β2 * k).abs_()
    # 8. v ← β2·v + (1 − β2)·p̃²;  m ← β1·m̃ + (1 − β1)·p̃
    torch.addcmul(v_moved, p, p, value=1 - β2, out=v)
    torch.lerp(p, m_moved, β1, out=m)
    torch.div(m, torch.sqrt(v, out=m_moved).add_(numbers.damping), out=p)


@Op
def ldadam_descend_(W: Sequence[Tensor], U: Tensor, direction: Tensor, decay: float, step_size: float) -> None:
    """Write W ← decay·W − step_size·U·direction for each of n weights, rounded once: line 9.

    Args:
        W: Matrices [p, q] or transposes of such, of one shape and dtype.
        U: float32 [n, p, r].
        direction: float32 [n, r, q].
        decay: Factor of the weights.
        step_size: Factor of the product.
    """
    for weight, left, right in zip(W, U, direction, strict=True):
        wide = weight.float()
        torch.addmm(wide, left, right, beta=decay, alpha=-step_size, out=wide)
        if wide is not weight:
            weight.copy_(wide)


def ldadam_stages_(
    W: Sequence[Tensor],
    g: Sequence[Tensor],
    state: Mapping[str, Tensor],
    t: int,
    o: LDAdamOptions,
    shape: Sequence[int],
    axis: int,
) -> Generator[Any, Any, bool]:
    """Take a step after the first on a process's part of a matrix: the ``Stages`` of ``engine/method.py``.

    Where the larger dimension is cut, U is whole, and what has q columns is this process's; where the smaller one is,
    U has this process's rows, and every process computes what has q columns.
    """
    tall = shape[0] > shape[1]
    cuts_columns = (axis == 0) == tall
    whole = yield (["basis"] if cuts_columns else ["exp_avg", "exp_avg_sq"])
    kept = {key: whole[key][None] if key in whole else state[key] for key in ("exp_avg", "exp_avg_sq", "basis")}
    m, v, old = (tensor.float().contiguous() for tensor in kept.values())
    numbers, fmt = Coefficients.of_step(t, o), FORMATS.get(o.error_feedback)
    # 1. a ← g + ξ, not in the error's own buffer: the step may not be taken
    residual = add_residual(g, {key: part.clone() for key, part in state.items() if key == "error"} or state, fmt)
    a = residual.mT if tall else residual
    # 3. V ← bᵀU₋ = s·mᵀ + (1 − ρ)·aᵀU₋;  Y ← bV
    s = numbers.momentum_weight
    Vt = old.mT @ a
    if not cuts_columns:
        yield [Vt]
    V = Vt.mul_(1 - o.rho).add_(m, alpha=s).mT
    V = V if cuts_columns else of_safe_size(V)
    Y = (old @ (m @ V)).baddbmm_(a, V, beta=s, alpha=1 - o.rho)
    if cuts_columns:
        yield [Y]
        if not bool(torch.isfinite(Y).all()):  # on all processes: what is added up has the same bits
            return False
        # U ← orthonormalize(Y);  R ← UᵀU₋   4. p̃ ← Uᵀa
        U = orthonormalize(Y)
        R, p = U.mT @ old, U.mT @ a
    else:
        found = yield from orthonormalize_rows(Y, (old, a))
        if found is None:
            return False
        U, products = found
        R, p = (part.contiguous() for part in products.tensor_split([old.shape[2]], dim=2))
    # 5. to 8.
    if o.error_feedback != "none":
        a.baddbmm_(old, m, alpha=numbers.beta1 / (1 - numbers.beta1))
    ldadam_moments_(R, m, v, p, numbers)
    if o.error_feedback != "none":
        a.baddbmm_(U, m, alpha=-1 / (1 - numbers.beta1))
        save_residual_(state, residual, fmt)
    # 9. W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]
    ldadam_descend_([weight.mT if tall else weight for weight in W], U, p, numbers.decay, numbers.step_size)
    for stored, value in zip(kept.values(), (m, v, U), strict=True):
        stored.copy_(value)
    return True


def ldadam_exchanged(shape: Sequence[int], dtype: torch.dtype, o: LDAdamOptions, axis: int) -> tuple[int, list[int]]:
    """Return the bytes that the stages of :func:`ldadam_stages_` put together, and those of each of their sums."""
    assert o.rank is not None
    rows, columns, r = shape[0], math.prod(shape[1:]), o.rank
    p, q = sorted((rows, columns))
    stored = dtype.itemsize if o.state_dtype == "param" else 4
    if (axis == 0) == (rows > columns):
        return stored * p * r, [4 * p * r]
    return 2 * stored * r * q, [4 * r * q, 8 * r * r, 4 * (r * (2 * r + q) + 1)]


class LDAdam(LowMemoryOptimizer):
    """LDAdam: Adam with low-rank states, error feedback and a subspace tracked at every step.

    Matrices whose two dimensions exceed ``rank`` are compressed, convolution kernels as (out, rest); everything
    else, and every group with ``rank=None``, takes AdamW, bit-equal to torch's. A non-finite gradient propagates
    into state and parameters, as in AdamW.

    Example:
        >>> optimizer = LDAdam(model.parameters(), lr=1e-3, rank=16)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2410.16103, algorithm 1.
    """

    method = Method(
        "ldadam",
        LDAdamOptions,
        ldadam_state,
        ldadam_update_,
        switch=("rank", None),
        scratch=1.0,  # a; fused on a GPU, later steps have none
        whole="gpu",
        captured=True,
        corrected={},
        # The first step's exact SVD, at most 6 if not for a rank below 4: of fewer than 24 rows, it takes 2 matrices,
        # which the constant of every step covers up to 1.5 million entries. A later step's factors are fewer.
        scratch_state=6.0,
        staged=StagedUpdate(ldadam_stages_, ldadam_exchanged),
    )
