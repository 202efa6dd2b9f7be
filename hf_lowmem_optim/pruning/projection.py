"""The OBS projection: the closest point, in the metric of a Fisher matrix, at which chosen entries are zero.

θ⁺ are the entries of all tensors of a system as one vector, S those to prune, Q the others, and F = λI + GᵀG/m with the
m gradients of a window as the rows of G. The minimizer of ½(x − θ⁺)ᵀF(x − θ⁺) over x_S = 0 is, without a matrix that
is larger than m × m:

1. h ← G_S θ⁺_S
2. K ← G_Q G_Qᵀ                                  from the kept entries: GGᵀ − G_S G_Sᵀ would cancel
3. w ← (mλI + K)⁻¹ h
4. θ_Q ← θ⁺_Q + G_Qᵀ w;  θ_S ← 0
5. loss increase ← ½λ·(‖θ⁺_S‖² + hᵀw)

Without the correction θ_Q stays and the loss increases by ½(λ‖θ⁺_S‖² + ‖h‖²/m). All sums are float64; new weights are
computed in float64 from their float32 value and rounded once.

Source: arXiv 2408.17163; the m × m form is Woodbury's identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem_optim.ops.weight_correction import join_weights, split_weights_
from hf_lowmem_optim.pruning.rows import Rows

__all__ = ["Member", "Projection", "Sums", "gram_of", "move_", "saliency_of", "sums_of", "weights_of_rows"]

#: The least 1 − gᵢᵀ(mλI + GGᵀ)⁻¹gᵢ that counts: beyond, it is a rounding error.
_LEAST = 1e-6
#: Directions of K below this part of its largest are rounding errors, unless λ is larger than they are.
_DROPPED = 1e-13


@dataclass(frozen=True)
class Member:
    """A tensor of a system, or a matrix of a stack.

    Attributes:
        name: For errors.
        param: Its weights, detached.
        rows: Its part of the window; None if it has none.
        correction: What compensated weights have beside them.
        prunable: Whether its entries may be pruned; if not, they are only corrected.
    """

    name: str
    param: Tensor
    rows: Rows | None
    correction: Tensor | None
    prunable: bool

    def load(self) -> Tensor:
        """Return the weights, float32 and flat: the memory of the parameter itself where it is that."""
        if self.correction is not None:
            return join_weights([self.param], [self.correction])[0].view(-1)
        return self.param.float().reshape(-1)

    def store_(self, weights: Tensor) -> None:
        """Write weights back, rounded to nearest."""
        if self.correction is not None:
            split_weights_([self.param], [self.correction], [weights.view(self.param.shape)])
        elif weights.data_ptr() != self.param.data_ptr():
            self.param.copy_(weights.view(self.param.shape))

    def clear_(self, pruned: Tensor) -> None:
        """Set entries to zero."""
        for tensor in (self.param,) if self.correction is None else (self.param, self.correction):
            tensor.masked_fill_(pruned.view(tensor.shape), 0)


@dataclass(frozen=True)
class Projection:
    """What a projection did.

    Attributes:
        step: The call of ``step()`` that made it.
        sparsity: Pruned entries over prunable ones.
        num_pruned: How many are pruned.
        kept_changed: Entries that are kept now and were pruned before.
        loss_increase: What the quadratic model predicts, over all systems; None without a window.
    """

    step: int
    sparsity: float
    num_pruned: int
    kept_changed: int
    loss_increase: float | None


@dataclass
class Sums:
    """What the m × m form needs of a system, on the CPU.

    Attributes:
        h: G_S θ⁺_S, float64 [m].
        K: G_Q G_Qᵀ, float64 [m, m].
        squares: ‖G‖², of pruned and kept entries.
        pruned_squares: ‖θ⁺_S‖².
        numel: Entries of the system.
    """

    h: Tensor
    K: Tensor
    squares: float = 0.0
    pruned_squares: float = 0.0
    numel: int = 0


def sums_of(members: Sequence[Member], pruned: Sequence[Tensor | None], num_rows: int) -> Sums:
    """Return the sums over a system, for masks of what is pruned: flat, None for nothing."""
    sums = Sums(torch.zeros(num_rows, dtype=torch.float64), torch.zeros(num_rows, num_rows, dtype=torch.float64))
    for member, mask in zip(members, pruned, strict=True):
        weights = member.load()
        sums.numel += weights.numel()
        if mask is not None:
            sums.pruned_squares += float((weights[mask].double() ** 2).sum())
        for entries, piece in () if member.rows is None else member.rows.pieces():
            sums.squares += float((piece**2).sum())
            if mask is not None:
                sums.h += (piece @ torch.where(mask[entries], weights[entries], 0.0).double()).cpu()
                piece.masked_fill_(mask[entries], 0.0)
            sums.K += (piece @ piece.T).cpu()
    return sums


def gram_of(members: Sequence[Member], num_rows: int) -> Tensor:
    """Return GGᵀ of a system, float64 [m, m], on the CPU."""
    return sums_of(members, [None] * len(members), num_rows).K


def saliency_of(member: Member, factor: Tensor | None) -> Tensor:
    """Return the saliency of the entries of a tensor, float32 and flat.

    Args:
        member: The tensor.
        factor: None for |θᵢ|. Or L with LLᵀ = mλI + GGᵀ, for |θᵢ|/√[F⁻¹]ᵢᵢ but for a common factor: [F⁻¹]ᵢᵢ =
            (1 − ‖L⁻¹gᵢ‖²)/λ for column gᵢ of G.
    """
    saliency = member.load().abs()
    if factor is None or member.rows is None:
        return saliency
    on_device = factor.to(saliency.device)
    for entries, piece in member.rows.pieces():
        explained = torch.linalg.solve_triangular(on_device, piece, upper=False).square_().sum(dim=0)
        saliency[entries] = (saliency[entries].double() / (1 - explained).clamp_(min=_LEAST).sqrt_()).float()
    return saliency


def weights_of_rows(sums: Sums, damping: float) -> Tensor:
    """Return w, float64 [m]: line 3.

    By eigendecomposition, so that gradients that repeat and a small λ leave no direction of nothing but rounding.
    """
    values, vectors = torch.linalg.eigh(sums.K)
    total = values.clamp(min=0) + len(values) * damping
    inverse = torch.where(total > _DROPPED * values.amax(), total.reciprocal(), 0.0)
    result: Tensor = vectors @ (inverse * (vectors.T @ sums.h))
    return result


def move_(members: Sequence[Member], pruned: Sequence[Tensor | None], w: Tensor | None) -> None:
    """Move the weights of a system: line 4; without ``w`` the kept ones stay."""
    for member, mask in zip(members, pruned, strict=True):
        if w is not None and member.rows is not None:
            weights, on_device = member.load(), w.to(member.param.device)
            for entries, piece in member.rows.pieces():
                weights[entries] = (weights[entries].double() + on_device @ piece).float()
            member.store_(weights)
        if mask is not None:
            member.clear_(mask)
