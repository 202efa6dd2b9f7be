"""DCT-AdamW (Modoranu et al., arXiv 2505.17967, ICLR 2026): AdamW on the largest rows of a cosine transform.

Per matrix W (p × q, the smaller dimension first; a tall or square matrix is used transposed), rank r, T =
`update_interval`, and a fixed orthonormal B (p × p) that all matrices of its size share:

1.  S ← Bᵀg + E
2.  t = 1 or t mod T = 0: I₋ ← I; I ← the r rows of S with the largest norms, ties to the lowest index, ascending
3.  then: m, v ← their rows in the order of I, zero where an index is new
4.  p̃ ← S_I
5.  E ← S with rows I set to 0
6.  m ← β1·m + (1 − β1)·p̃;  v ← β2·v + (1 − β2)·p̃²
7.  W ← W·(1 − lr·weight_decay) − lr·B_I[m̂ / (√v̂ + eps)]

| letter | state key    | shape  | dtype            | bytes per parameter         |
|--------|--------------|--------|------------------|-----------------------------|
| I      | `indices`    | r      | int16 or int32   | 2·r/(p·q)                   |
| m      | `exp_avg`    | (r, q) | `state_dtype`    | 4·r/p                       |
| v      | `exp_avg_sq` | (r, q) | `state_dtype`    | 4·r/p                       |
| E      | `error…`     | (p, q) | `error_feedback` | 4, 2, 1.06, 0.56 or 0       |

Line 3 is the paper's m ← Rm, v ← |Rv| with R = B_Iᵀ·B_I₋: columns of one orthonormal matrix are compared, so R holds
zeros and ones. E is the paper's error in the basis, Bᵀξ: there is one transform a step, and rows I are exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.error_feedback import FORMATS, check_rounding, error_state, load_residual, save_residual_
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, option
from hf_lowmem_optim.ops.cosine_basis import Basis, add_coefficients_, largest_rows
from hf_lowmem_optim.optimizers.cosine_rows import BasisOptions, basis_state, descend_, one_by_one, sides, upright
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["DCTAdamW", "DCTAdamWOptions", "dct_adamw_state", "dct_adamw_update_"]

#: Rows that int16 numbers.
_MAX_INT16 = 32768


@dataclass(frozen=True)
class DCTAdamWOptions(BasisOptions):
    """The options of :class:`DCTAdamW`."""

    update_interval: int = option(1, "T, how many steps a choice of rows lasts.", within=COUNT)
    basis: Literal["dct", "identity", "random"] = option(
        "dct",
        'B: ``"dct"`` (the paper), ``"identity"`` (rows of the gradient itself, no transform), or ``"random"`` (an '
        "orthogonal matrix from a fixed seed).",
        shapes_state=True,
    )
    error_feedback: Literal["param", "fp32", "bf16", "8bit", "4bit", "none"] = option(
        "4bit",
        'Storage of the error: ``"4bit"`` or ``"8bit"`` (block-quantized, 0.56 and 1.06 bytes an entry), ``"bf16"``, '
        '``"fp32"``, ``"param"`` (the parameter\'s dtype), or ``"none"`` (no error feedback, the released default).',
        shapes_state=True,
    )
    stochastic_rounding: bool = option(
        False, "Round a quantized error stochastically (unbiased), seeded by the step, instead of to nearest."
    )

    def check(self) -> None:
        """Refuse settings without effect."""
        check_rounding(self.stochastic_rounding, self.error_feedback)
        if self.basis != "dct" and (self.dct_type != 3 or self.transform != "auto"):
            raise ValueError(f"dct_type and transform are of basis='dct', and have no effect with {self.basis!r}")

    def basis_of(self, p: int, device: torch.device) -> Basis:
        """Return the basis for a dimension."""
        return super().basis_of(p, device) if self.basis == "dct" else Basis(self.basis, p, False)


def dct_adamw_state(shape: Sequence[int], dtype: torch.dtype, o: DCTAdamWOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file.

    Args:
        shape: Shape of the parameter; three and more dimensions count as the matrix (out, rest).
        dtype: Dtype of the parameter.
        o: The options.

    Returns:
        Specs by state key; None for a tensor that is no matrix, or of which a dimension does not exceed the rank.
    """
    r, (p, q) = o.rank, sides(shape)
    if r is None or p <= r:
        return None
    stored = dtype if o.state_dtype == "param" else torch.float32
    return {
        "indices": TensorSpec((r,), torch.int16 if p <= _MAX_INT16 else torch.int32, "indices"),
        "exp_avg": TensorSpec((r, q), stored, "first_moment"),
        "exp_avg_sq": TensorSpec((r, q), stored, "second_moment"),
        **error_state((p, q), dtype, o.error_feedback),
    }


def dct_adamw_update_(
    W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: DCTAdamWOptions
) -> None:
    """Take one step of DCT-AdamW on n matrices of one shape, in place.

    Args:
        W: The weights, (out, in) each, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read.
        state: As :func:`dct_adamw_state` describes it, stacked: [n, ...]; written.
        t: 1 for the first update of these tensors.
        o: The options.
    """
    if one_by_one(W):
        for i in range(len(W)):
            dct_adamw_update_(W[i : i + 1], g[i : i + 1], {k: v[i : i + 1] for k, v in state.items()}, t, o)
        return
    assert o.rank is not None
    (p, q), device, (β1, β2) = sides(W[0].shape), W[0].device, o.betas
    fmt, which = FORMATS.get(o.error_feedback), torch.arange(len(W), device=device)[:, None]
    m, v, rows = state["exp_avg"].float(), state["exp_avg_sq"].float(), state["indices"].long()
    # 1. S ← Bᵀg + E
    basis, S = o.basis_of(p, device), load_residual(state, fmt, (len(W), p, q), device)
    add_coefficients_(S, upright(g), basis)
    if t == 1 or t % o.update_interval == 0:
        # 2. I₋ ← I; I ← the r rows of S with the largest norms
        old, rows = rows, largest_rows(S, o.rank, o.ranking)
        state["indices"].copy_(rows)
        # 3. m, v ← their rows in the order of I, zero where an index is new
        place = torch.searchsorted(old, rows).clamp_(max=o.rank - 1)
        new = (old.gather(1, place) != rows)[:, :, None]
        for moment in (m, v):
            moment.copy_(moment[which, place].masked_fill_(new, 0.0))
    # 4. p̃ ← S_I
    d = S[which, rows]
    # 5. E ← S with rows I set to 0
    if o.error_feedback != "none":
        S[which, rows] = 0.0
        save_residual_(state, S, fmt, seed=t if o.stochastic_rounding else None)
    del S
    # 6. m ← β1·m + (1 − β1)·p̃;  v ← β2·v + (1 − β2)·p̃²
    m.mul_(β1).add_(d, alpha=1 - β1)
    v.mul_(β2).addcmul_(d, d, value=1 - β2)
    # 7. W ← W·(1 − lr·weight_decay) − lr·B_I[m̂ / (√v̂ + eps)]; m̂/(√v̂ + eps) is m/(√v + eps·root)·root/(1 − β1ᵗ)
    root = math.sqrt(1 - β2**t)
    torch.div(m, v.sqrt().add_(o.eps * root), out=d)
    descend_(upright(W), d, basis, rows, 1 - o.lr * o.weight_decay, o.lr * root / (1 - β1**t))
    for key, moment in (("exp_avg", m), ("exp_avg_sq", v)):
        if state[key] is not moment:
            state[key].copy_(moment)


def put_aside_(g: Sequence[Tensor], state: Mapping[str, Tensor], seed: int | None, o: DCTAdamWOptions) -> None:
    """Add a part of a step's gradients to the error: E ← E + Bᵀg."""
    (p, q), device, fmt = sides(g[0].shape), g[0].device, FORMATS.get(o.error_feedback)
    S = load_residual(state, fmt, (len(g), p, q), device)
    add_coefficients_(S, upright(g), o.basis_of(p, device))
    save_residual_(state, S, fmt, seed=seed)


def fault_of_rows(state: Mapping[str, Any], shape: Sequence[int], o: DCTAdamWOptions) -> str | None:
    """Return why loaded indices cannot be used, as a clause; None if they are ascending, or all 0 before a step."""
    rows, p = state["indices"].long(), sides(shape)[0]
    if not 0 <= int(rows.min()) <= int(rows.max()) < p:
        return f"'indices' holds {int(rows.min())} … {int(rows.max())} for {p} rows"
    return "'indices' does not ascend" if bool(rows.any()) and bool((rows.diff() <= 0).any()) else None


def _scratch(o: DCTAdamWOptions, shape: Sequence[int]) -> float:
    """Return what a step takes for a moment: narrower moments, d, and S or a narrower weight, or B_I as it is made."""
    (p, q), r = sides(shape), o.rank or 0
    return (2 * r / p if o.state_dtype == "param" else 0.0) + r / p + r / q + max(1.0, 2 * r / q)


class DCTAdamW(LowMemoryOptimizer):
    """DCT-AdamW: AdamW on the largest rows of the gradient's cosine transform, the rest fed back from a 4-bit error.

    No basis is computed or stored for a layer: its subspace is ``rank`` integers. Matrices whose two dimensions exceed
    ``rank`` are compressed, convolution kernels as (out, rest); everything else, and every group with ``rank=None``,
    takes AdamW, bit-equal to torch's. A non-finite gradient propagates into state and parameters, as in AdamW.

    The bias correction counts the tensor's steps: a row that is chosen anew at step t moves by
    lr·(1 − β1)/√(1 − β2)·√(1 − β2ᵗ)/(1 − β1ᵗ), lr at t = 1 and 3.15·lr at t = 5000, whatever the gradient's size.
    With error feedback and ``update_interval=1`` the choice wanders, as rows that were not chosen grow.

    Example:
        >>> optimizer = DCTAdamW(model.parameters(), lr=1e-3, rank=128)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2505.17967.
    """

    method = Method(
        "dct_adamw",
        DCTAdamWOptions,
        dct_adamw_state,
        dct_adamw_update_,
        switch=("rank", None),
        scratch=_scratch,
        check_loaded=fault_of_rows,
        constants=basis_state,
        put_aside_=put_aside_,
    )
