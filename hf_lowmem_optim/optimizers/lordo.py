"""LoRDO (arXiv 2602.04396, ICML 2026): workers take K steps of low-rank Adam in a common basis, and then average.

Per matrix W (p × q, the smaller dimension first; a tall matrix is used transposed), rank r, each worker for itself:

1.  G ← min(1, clip_norm/‖all G of the worker‖)·G
2.  t = 1: Q ← r leading left singular vectors of the mean of G over the workers
3.  a ← G + E
4.  g ← Qᵀa;  E ← a − Qg
5.  u ← β1·u + (1 − β1)·g;  v ← β2·v + (1 − β2)·g²
6.  φ_j ← √(Σ_i v̂_ij / p): the root mean square of column j of G as far as Q sees it
7.  W ← W·(1 − lr·weight_decay) − lr·[ω·Q(û/(√v̂ + eps)) + (1 − ω)·G/(μ·(φ + eps))]

Every K = `sync_every` steps all workers together:

8.  W, u, v ← their means over the workers
9.  Δ ← W − W_anchor;  Q₊ ← r leading left singular vectors of Δ;  R ← Q₊ᵀQ
10. v ← c2·|(R∘R)(v/c2 − (u/c1)²) + (Ru/c1)²| with c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ;  u ← Ru
11. W_anchor ← W;  Q ← Q₊

| letter   | state key       | shape      | dtype            | bytes per parameter     |
|----------|-----------------|------------|------------------|-------------------------|
| Q        | `basis`         | (p, r)     | float32          | 4·r/q                   |
| u        | `exp_avg`       | (r, q)     | float32          | 4·r/p, 0 where ω = 0    |
| v        | `exp_avg_sq`    | (r, q)     | float32          | 4·r/p                   |
| W_anchor | `anchor`        | (p, q)     | that of W        | 4 or 2, `"svd"`         |
| W_anchor | `anchor_sketch` | (p, r + 8) | float32          | 4·(r + 8)/q, `"sketch"` |
| E        | `error…`        | W          | `error_feedback` | 4, 2, 1.06, 0.56 or 0   |

The sketch keeps W_anchor·Ω, with a Gaussian Ω that is drawn anew for every period, seeded by the step at which it
begins. Line 9 then takes the singular vectors of ΔΩ = WΩ − W_anchor·Ω. Singular values that are rounding of WΩ count
as zero: directions of Q fill up what Δ has not. With ω = 0 there is no u, which counts as zero in line 10. Projections
are bounded as LDAdam's are. A sync sends p·q + 2·r·q + p·r numbers for a matrix (W, u and v; Q₊), and W, m and v of
what takes AdamW.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hf_lowmem_optim.engine import averaging
from hf_lowmem_optim.engine.buckets import TensorUpdate, split_stacks
from hf_lowmem_optim.engine.error_feedback import FORMATS, add_residual, error_state, save_residual_
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import COUNT, POSITIVE, UNIT, Options, Range, option
from hf_lowmem_optim.engine.workers import REPLICATED, WorkerOptimizer
from hf_lowmem_optim.ops.low_rank import bound_projection_, leading_left_singular_vectors, seeded_sketch
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights
from hf_lowmem_optim.optimizers.cosine_rows import sides
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["LoRDO", "LoRDOOptions", "lordo_state", "lordo_update_"]

_OVERSAMPLING = 8
#: Of the norm of what an anchor keeps: singular values of its change below are rounding.
_NOISE = 2.0**-23
_Gaussian = Callable[[int, int, torch.device, int], Tensor]


@dataclass(frozen=True)
class LoRDOOptions(Options):
    """The options of :class:`LoRDO`."""

    betas: tuple[float, float] = option((0.9, 0.99), "Decay rates of the moments, each in [0, 1).", within=UNIT)
    rank: int | None = option(16, "Rank r of the basis.", within=COUNT, none="dense AdamW", shapes_state=True)
    sync_every: int = option(
        16, "K: steps between two averages over the workers; one for all groups.", within=COUNT, shapes_state=True
    )
    omega: float = option(
        0.9,
        "ω: share of Adam's step in the basis; the rest is the normalized gradient of full rank. With 1 the weights "
        "never leave the span of the first basis.",
        within=Range("a float in [0, 1]", lambda x: 0 <= x <= 1),
    )
    mu: float = option(1.0, "μ: divisor of the normalized gradient.", within=POSITIVE)
    clip_norm: float | None = option(
        None,
        "Scale a worker's gradients in place down to this norm of all of them, if it is larger; one for all groups.",
        within=POSITIVE,
        none="leave gradients as they are",
    )
    error_feedback: Literal["none", "param", "fp32", "bf16", "8bit", "4bit"] = option(
        "none",
        'Storage of what the projection cuts off, per worker: ``"none"``; or ``"4bit"``, ``"8bit"``, ``"bf16"``, '
        '``"fp32"`` or ``"param"`` as for LDAdam. It cannot be saved by several workers.',
        shapes_state=True,
    )
    projection: Literal["sketch", "svd"] = option(
        "sketch",
        'What is kept of the weights of the last sync: their product with a random matrix (``"sketch"``) or a copy '
        '(``"svd"``).',
        shapes_state=True,
    )
    sync_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "Dtype in which weights and moments are sent and added up; one for all groups."
    )


def lordo_state(shape: Sequence[int], dtype: torch.dtype, o: LoRDOOptions) -> dict[str, TensorSpec] | None:
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
    state = {"basis": TensorSpec((p, r), torch.float32, "basis")}
    if o.omega > 0:
        state["exp_avg"] = TensorSpec((r, q), torch.float32, "first_moment")
    state["exp_avg_sq"] = TensorSpec((r, q), torch.float32, "second_moment")
    if o.projection == "svd":
        state["anchor"] = TensorSpec((p, q), dtype, "anchor")
    else:
        state["anchor_sketch"] = TensorSpec((p, r + _OVERSAMPLING), torch.float32, "anchor")
    return {**state, **error_state((shape[0], math.prod(shape[1:])), dtype, o.error_feedback)}


def lordo_update_(
    W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: LoRDOOptions
) -> None:
    """Take one step of a worker on n matrices of one shape, in place: lines 3 to 7.

    Args:
        W: The weights, (out, in) each, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read.
        state: As :func:`lordo_state` describes it, stacked: [n, ...], with the basis of the period; written.
        t: 1 for the first update of these tensors.
        o: The options.
    """
    (β1, β2), Q, u, v = o.betas, state["basis"], state.get("exp_avg"), state["exp_avg_sq"]
    fmt, p = FORMATS.get(o.error_feedback), Q.shape[1]
    # 3. a ← G + E
    residual = add_residual(g, state, fmt)
    a = _upright(residual)  # [n, p, q]
    # 4. g ← Qᵀa;  E ← a − Qg
    d = bound_projection_(Q.mT @ a)
    if o.error_feedback != "none":
        torch.baddbmm(a, Q, d, alpha=-1, out=a)
        save_residual_(state, residual, fmt)
    del a, residual
    # 5. u ← β1·u + (1 − β1)·g;  v ← β2·v + (1 − β2)·g²
    v.mul_(β2).addcmul_(d, d, value=1 - β2)
    c1, c2 = 1 - β1**t, 1 - β2**t
    # 6. φ_j ← √(Σ_i v̂_ij / p)
    φ = v.sum(1, keepdim=True).div_(c2 * p).sqrt_()
    # 7. W ← W·(1 − lr·weight_decay) − lr·[ω·Q(û/(√v̂ + eps)) + (1 − ω)·G/(μ·(φ + eps))]
    if u is not None:
        u.mul_(β1).add_(d, alpha=1 - β1)
        torch.div(u / c1, (v / c2).sqrt_().add_(o.eps), out=d)
    for i, weight in enumerate(W):
        wide = weight.float()
        upright = _upright(wide)
        if u is not None:
            torch.addmm(upright, Q[i], d[i], beta=1 - o.lr * o.weight_decay, alpha=-o.lr * o.omega, out=upright)
        else:
            upright.mul_(1 - o.lr * o.weight_decay)
        if o.omega < 1:
            upright.addcdiv_(_upright(g[i]).float(), φ[i] + o.eps, value=-o.lr * (1 - o.omega) / o.mu)
        if wide is not weight:
            weight.copy_(wide)


def new_basis(change: Tensor, whole: Tensor, old: Tensor) -> Tensor:
    """Return Q₊ of line 9, filled up with directions of the old basis where the change has fewer than r.

    Args:
        change: Δ or ΔΩ, float32 of p rows.
        whole: What it is the change of: W or WΩ.
        old: Q.
    """
    r = old.shape[1]
    left = leading_left_singular_vectors(change, r)
    sizes = torch.linalg.vector_norm(left.mT @ change, dim=1)
    known = int((sizes > _NOISE * torch.linalg.vector_norm(whole)).sum())
    if known in (0, r):
        return left if known else old
    kept = left[:, :known]
    rest = leading_left_singular_vectors(old - kept @ (kept.mT @ old), r - known)
    return torch.cat((kept, rest), dim=1)


def transport_(state: Mapping[str, Tensor], new: Tensor, t: int, o: Any) -> None:
    """Move the moments of a matrix to a new basis: line 10, and Q ← Q₊."""
    old, u, v, c1, c2 = (
        state["basis"],
        state.get("exp_avg"),
        state["exp_avg_sq"],
        1 - o.betas[0] ** t,
        1 - o.betas[1] ** t,
    )
    R = new.mT @ old
    if u is None:
        v.copy_(R.square() @ v)
    else:
        moved, k = R @ u, c2 / c1**2
        v.copy_((R.square() @ v.addcmul(u, u, value=-k)).addcmul_(moved, moved, value=k).abs_())
        u.copy_(moved)
    old.copy_(new)


def _seen(x: TensorUpdate, start: int, gaussian: _Gaussian) -> Tensor:
    """Return what is compared of a weight at the two ends of the period after step ``start``: W, or WΩ, in float32."""
    correction, o = x.state.get(CORRECTION), cast(LoRDOOptions, x.options)
    W = x.param if correction is None else join_weights([x.param], [correction])[0]
    upright = _upright(W.reshape(len(W), -1)).float()
    if o.projection == "svd":
        return upright
    return upright @ gaussian(upright.shape[1], _anchor(x.state).shape[1], W.device, start)


def _anchor(state: Mapping[str, Tensor]) -> Tensor:
    """Return the part of a matrix's state that keeps its anchor."""
    return state["anchor" if "anchor" in state else "anchor_sketch"]


def _upright(matrices: Tensor) -> Tensor:
    """Return matrices as (p, q): tall ones transposed."""
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def _scratch(o: LoRDOOptions, shape: Sequence[int]) -> float:
    """Return what a step takes for a moment: a or copies of narrower tensors, a singular value decomposition, Ω."""
    (p, q), r = sides(shape), o.rank or 0
    return 2 + 6 * (2 * r / p + (2 * r + _OVERSAMPLING) / q) + (r + _OVERSAMPLING) / p


class LoRDO(WorkerOptimizer):
    """LoRDO: workers that take low-rank Adam steps of their own in a common basis, and average every so many steps.

    All workers build it alike, from equal weights, and step equally often; ``step()`` averages weights and moments when
    ``sync_every`` steps are taken, so nobody else may average gradients or weights. Under DDP that is the no-op
    communication hook (:class:`~hf_lowmem_optim.trainer.local_updates.LocalUpdatesCallback` installs it). One process
    alone sends nothing: a sync then only renews the basis. A parameter without a gradient on one of several workers
    counts as one with a gradient of zero. Convolution kernels are matrices (out, rest); everything else, and every
    group with ``rank=None``, takes AdamW on each worker, averaged at the same steps.

    ``process_group`` is the workers' group; None for the default one. A state is saved at a sync, where it is that of
    all workers, and loads on any number of them.

    Example:
        >>> optimizer = LoRDO(model.parameters(), lr=1e-3, rank=16, sync_every=16)
        >>> loss.backward()  # the worker's own gradients
        >>> optimizer.step()

    Source: arXiv 2602.04396.
    """

    method = Method(
        "lordo",
        LoRDOOptions,
        lordo_state,
        lordo_update_,
        switch=("rank", None),
        scratch=_scratch,
        optional_state={"exp_avg": "omega"},
        shared_options=("sync_every", "clip_norm", "sync_dtype"),
        replicated=REPLICATED,
    )

    def _begin_(self, fresh: Sequence[TensorUpdate], start: int) -> None:
        """Give matrices that have their first gradient a basis and an anchor."""
        gaussian: _Gaussian = functools.cache(seeded_sketch)
        several = averaging.num_workers(self.process_group) > 1
        for x in split_stacks(fresh):
            # 2. Q ← r leading left singular vectors of the mean of G over the workers
            own = x.grad.reshape(len(x.grad), -1)
            mean = own.to(torch.float32, copy=several)
            self._send_([mean])
            basis = x.state["basis"]
            basis.copy_(leading_left_singular_vectors(_upright(mean), basis.shape[1]))
            _anchor(x.state).copy_(_seen(x, start, gaussian))
        self._sent_bytes += averaging.broadcast_([x.state["basis"] for x in fresh], self.process_group)

    def _renew_(self, start: int, t: int) -> None:
        """Take the basis from what all workers have done since step ``start``: lines 9 to 11."""
        group, gaussian = self.process_group, functools.cache(seeded_sketch)
        matrices, bases = list(self._matrices()), list[Tensor]()
        for x in matrices:
            # 9. Δ ← W − W_anchor;  Q₊ ← r leading left singular vectors of Δ
            if averaging.num_workers(group) == 1 or torch.distributed.get_rank(group) == 0:
                whole = _seen(x, start, gaussian)
                bases.append(new_basis(whole - _anchor(x.state), whole, x.state["basis"]))
            else:
                bases.append(torch.empty_like(x.state["basis"]))
        self._sent_bytes += averaging.broadcast_(bases, group)
        for x, basis in zip(matrices, bases, strict=True):
            # 10. and 11.
            transport_(x.state, basis, x.step, x.options)
            _anchor(x.state).copy_(_seen(x, t, gaussian))

    def _matrices(self) -> Iterator[TensorUpdate]:
        """Yield the compressed matrices that have state, those of stacks one by one."""
        for group in self.param_groups:
            options = self._options_of(group)
            for param in group["params"]:
                state, weight = self.state.get(param), param.detach()
                if state and self.method.compresses(param.shape, group):
                    yield from split_stacks([TensorUpdate(weight, weight, state, options, state["step"])])
