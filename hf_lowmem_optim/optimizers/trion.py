"""Trion (Modoranu et al., arXiv 2505.17967, ICLR 2026): Muon's update from the largest rows of a cosine transform.

Per matrix W (p × q, the smaller dimension first; a tall or square matrix is used transposed), r = min(`rank`, p), and a
fixed orthonormal B (p × p) of the cosine transform that all matrices of its size share:

1.  N ← N + Bᵀg
2.  I ← the r rows of N with the largest norms, ties to the lowest index;  b ← N_I
3.  N_I ← μ·b
4.  O ← NS(b): five steps of Newton–Schulz, nearly orthonormal rows
5.  W ← W·(1 − lr·weight_decay) − lr·c·B_I O

| letter | state key  | shape  | dtype         | bytes per parameter |
|--------|------------|--------|---------------|---------------------|
| N      | `momentum` | (p, q) | `state_dtype` | 4 (fp32), 2 (bf16)  |

c for W (out × in) by `scaling`: `"muon"` √max(1, out/in), `"dion"` √(out/in), `"kimi"` 0.2·√max(out, in), `"none"` 1.

N is Bᵀ of the paper's momentum, whose error feedback is line 3 there: the rows that were not chosen stay whole. With
r = p all rows are chosen, B cancels and counts as the identity: the rule is Muon without Nesterov.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import NOT_NEGATIVE, POSITIVE, UNIT, option
from hf_lowmem_optim.ops.cosine_basis import Basis, add_coefficients_, largest_rows
from hf_lowmem_optim.ops.newton_schulz import Polynomials, newton_schulz
from hf_lowmem_optim.optimizers.cosine_rows import BasisOptions, basis_state, descend_, one_by_one, sides, upright
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Trion", "TrionOptions", "trion_state", "trion_update_"]


@dataclass(frozen=True)
class TrionOptions(BasisOptions):
    """The options of :class:`Trion`; ``betas`` and ``eps`` are AdamW's, where the dense rule applies."""

    lr: float = option(0.02, "Learning rate.", within=NOT_NEGATIVE)
    betas: tuple[float, float] = option((0.9, 0.95), "Decay rates of AdamW's moments, each in [0, 1).", within=UNIT)
    eps: float = option(1e-10, "Added to the root of AdamW's second moment.", within=POSITIVE)
    momentum: float = option(0.95, "μ: what a chosen row of the momentum keeps.", within=UNIT)
    scaling: Literal["muon", "dion", "kimi", "none"] = option(
        "muon", 'c, by the shape of a weight; with ``"kimi"`` and a full rank AdamW\'s learning rates fit.'
    )
    newton_schulz: Polynomials = option(
        "muon",
        'Polynomials of Newton–Schulz: ``"muon"`` (singular values end in [0.68, 1.13]) or ``"polar"`` ([0.98, 1.03]).',
    )
    ns_dtype: Literal["fp32", "bf16"] = option(
        "fp32", 'Dtype of its products; ``"bf16"`` (as released) is faster on a GPU, and coarse.'
    )
    dense_lr_ratio: float = option(
        0.015, "Learning rate of the dense rule (AdamW), relative to ``lr``; a scheduler scales both.", within=POSITIVE
    )

    def basis_of(self, p: int, device: torch.device) -> Basis:
        """Return the basis for a dimension: the identity where all rows are chosen."""
        return Basis("identity", p, False) if self.rank is None or p <= self.rank else super().basis_of(p, device)

    @property
    def dense_lr(self) -> float:
        """The learning rate of the dense rule."""
        return self.lr * self.dense_lr_ratio


def trion_state(shape: Sequence[int], dtype: torch.dtype, o: TrionOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file.

    Args:
        shape: Shape of the parameter; three and more dimensions count as the matrix (out, rest).
        dtype: Dtype of the parameter.
        o: The options.

    Returns:
        Specs by state key; None for a tensor that is no matrix.
    """
    if o.rank is None or len(shape) < 2:
        return None
    return {"momentum": TensorSpec(sides(shape), dtype if o.state_dtype == "param" else torch.float32, "momentum")}


def trion_update_(
    W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: TrionOptions
) -> None:
    """Take one step of Trion on n matrices of one shape, in place.

    Args:
        W: The weights, (out, in) each, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read.
        state: As :func:`trion_state` describes it, stacked: [n, ...]; written.
        t: 1 for the first update of these tensors; does not matter.
        o: The options.
    """
    if one_by_one(W):
        for i in range(len(W)):
            trion_update_(W[i : i + 1], g[i : i + 1], {"momentum": state["momentum"][i : i + 1]}, t, o)
        return
    assert o.rank is not None
    p, device = sides(W[0].shape)[0], W[0].device
    r, which = min(o.rank, p), torch.arange(len(W), device=device)[:, None]
    # 1. N ← N + Bᵀg
    N = _accumulate(g, state, o)
    # 2. I ← the r rows of N with the largest norms;  b ← N_I
    rows = largest_rows(N, r, o.ranking) if r < p else torch.arange(p, device=device).expand(len(W), p)
    b = N[which, rows]
    # 3. N_I ← μ·b
    N[which, rows] = o.momentum * b
    if N is not state["momentum"]:
        state["momentum"].copy_(N)
    del N
    # 4. O ← NS(b)
    update = newton_schulz(b, o.newton_schulz, torch.bfloat16 if o.ns_dtype == "bf16" else torch.float32)
    del b
    # 5. W ← W·(1 − lr·weight_decay) − lr·c·B_I O
    step_size = o.lr * _scale(W[0].shape, o.scaling)
    descend_(upright(W), update, o.basis_of(p, device), rows, 1 - o.lr * o.weight_decay, step_size)


def _accumulate(g: Sequence[Tensor], state: Mapping[str, Tensor], o: TrionOptions) -> Tensor:
    """Return N + Bᵀg, float32: the momentum's own buffer where that is float32."""
    N = state["momentum"].float()
    add_coefficients_(N, upright(g), o.basis_of(N.shape[1], N.device))
    return N


def put_aside_(g: Sequence[Tensor], state: Mapping[str, Tensor], seed: int | None, o: TrionOptions) -> None:
    """Add a part of a step's gradients to the momentum."""
    N = _accumulate(g, state, o)
    if N is not state["momentum"]:
        state["momentum"].copy_(N)


def _scale(shape: Sequence[int], scaling: str) -> float:
    """Return c."""
    out, inner = shape
    factors = {"muon": max(1.0, out / inner), "dion": out / inner, "kimi": 0.04 * max(out, inner), "none": 1.0}
    return math.sqrt(factors[scaling])


def _scratch(o: TrionOptions, shape: Sequence[int]) -> float:
    """Return what a step takes for a moment: narrower momentum and two of b; or in Newton–Schulz three, and of G."""
    p, q = sides(shape)
    share = min(o.rank or 0, p) / p
    return max(1 + 2 * share, 3 * share + 3 * share**2 * p / q)


class Trion(LowMemoryOptimizer):
    """Trion: Muon's orthogonalized update, from the rows of the cosine-transformed momentum that are largest.

    Every matrix takes it, convolution kernels as (out, rest); one with a dimension that does not exceed ``rank`` takes
    Muon. Everything else, and every group with ``rank=None`` (embeddings, output head), takes AdamW with ``betas``,
    ``eps`` and the learning rate ``lr·dense_lr_ratio``. The momentum is all of its state: Muon's memory. A non-finite
    gradient makes the whole matrix non-finite.

    Example:
        >>> optimizer = Trion([{"params": matrices}, {"params": embeddings, "rank": None}], lr=0.02, rank=128)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2505.17967.
    """

    method = Method(
        "trion",
        TrionOptions,
        trion_state,
        trion_update_,
        switch=("rank", None),
        scratch=_scratch,
        adam_like=False,
        constants=basis_state,
        put_aside_=put_aside_,
    )
