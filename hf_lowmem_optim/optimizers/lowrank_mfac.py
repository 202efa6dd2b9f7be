"""LowRankMFAC: M-FAC with a window of low-rank gradients (Modoranu et al., arXiv 2306.06098, ICML 2024).

Over all compressed tensors of the optimizer as one vector (``scope="model"``) or over each by itself (``"tensor"``),
window m, with the window's rows as the matrix G. Per matrix (p × q), rank r:

1. acc ← ξ + g
2. P ← orthonormalize(acc·Q₋);  Q ← accᵀP;  c = P·Qᵀ;  ξ ← acc − c       one warm-started power iteration (PowerSGD)
3. row (t − 1) mod m of the window ← (P, Q)
4. row and column (t − 1) mod m of GGᵀ ← G c, from the factors: ⟨P₁Q₁ᵀ, P₂Q₂ᵀ⟩ = Σ (P₁ᵀP₂)∘(Q₁ᵀQ₂)
5. u ← F⁻¹c = Gᵀw with F = λI + (1/m)·Σ gᵢgᵢᵀ over the rows gᵢ of G, and the weights w from GGᵀ alone
6. vel ← μ·vel + u                                            if μ > 0
7. W ← W·(1 − lr·weight_decay) − lr·(vel or u)

| letter  | state key | shape     | dtype            | bytes per parameter                           |
|---------|-----------|-----------|------------------|-----------------------------------------------|
| P       | `left`    | (m, r, p) | fp32             | 4·m·r/q                                       |
| Q       | `right`   | (m, r, q) | fp32             | 4·m·r/p                                       |
| ξ       | `error`…  | W         | `error_feedback` | 4 (fp32), 2 (bf16), 1.06 (8bit), 0.56 (4bit)  |
| g       | `rows`    | (m, n)    | fp32             | 4·m: tensors that are not compressed, no ξ    |

and GGᵀ and vel as in ``preconditioned.py``. Q₋ is the right factor of the row before. Vectors, and matrices whose
factors would take more than themselves, have their gradients in the window as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import Batch, most_tensors
from hf_lowmem_optim.engine.error_feedback import FORMATS, add_residual, error_state, save_residual_
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, option
from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.gram import mfac_weights, update_systems_
from hf_lowmem_optim.ops.low_rank import of_safe_size, orthonormalize, seeded_sketch
from hf_lowmem_optim.ops.step_numbers import select, selected
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_
from hf_lowmem_optim.optimizers.preconditioned import (
    PreconditionedOptions,
    add_momentum_,
    descend_,
    gram_state,
    own_state,
)
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["LowRankMFAC", "LowRankMFACOptions", "lowrank_mfac_state", "lowrank_mfac_update_"]

#: Devices on which each tensor is computed by itself, so that it is rounded as it is alone.
_ALONE: tuple[str, ...] = ("cpu",)
#: Entries of a window that are widened to float64 at a time, on a CPU and on other devices.
_CPU_CHUNK_ENTRIES, _DEVICE_CHUNK_ENTRIES = 1 << 20, 1 << 25


@dataclass(frozen=True)
class LowRankMFACOptions(PreconditionedOptions):
    """The options of :class:`LowRankMFAC`."""

    rank: int | None = option(
        4, "Rank of the compressed gradients.", within=COUNT, none="dense AdamW", shapes_state=True
    )


def lowrank_mfac_state(shape: Sequence[int], dtype: torch.dtype, o: LowRankMFACOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file.

    Args:
        shape: Shape of the parameter; three and more dimensions count as the matrix (out, rest).
        dtype: Dtype of the parameter.
        o: The options.

    Returns:
        Specs by state key; None with ``rank=None``.
    """
    if o.rank is None:
        return None
    p, q, rest = shape[0] if shape else 1, math.prod(shape[1:]), own_state(shape, o)
    if _is_kept_whole(shape, o):
        return {"rows": TensorSpec((o.window, p * q), torch.float32, "rows"), **rest}
    return {
        "left": TensorSpec((o.window, o.rank, p), torch.float32, "factors"),
        "right": TensorSpec((o.window, o.rank, q), torch.float32, "factors"),
        **error_state((p, q), dtype, o.error_feedback),
        **rest,
    }


def _is_kept_whole(shape: Sequence[int], o: LowRankMFACOptions) -> bool:
    """Return whether the factors of a gradient would not be smaller than itself."""
    p, q = shape[0] if shape else 1, math.prod(shape[1:])
    return o.rank is not None and o.rank * (p + q) >= p * q


def _scratch(o: LowRankMFACOptions, shape: Sequence[int]) -> float:
    """Count acc, or u, which are fused on a GPU; beside u the float32 weights that the update itself joins."""
    joins = o.weight_rounding == "compensated" and o.momentum == 0 and _is_kept_whole(shape, o)
    return 2.0 if joins else 1.0


def lowrank_mfac_update_(
    tensors: Sequence[Batch],
    shared: Mapping[str, Sequence[Tensor]],
    t: int,
    everywhere: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Take one step of LowRankMFAC on the tensors of one system, or of one each, in place.

    Args:
        tensors: The tensors; their state as :func:`lowrank_mfac_state` describes it.
        shared: ``"gram"``, GGᵀ of the system of all tensors, or of each tensor's; written.
        t: 1 for the first step of the systems.
        everywhere: Adds the rows of the tensors that other processes update to those of Gc.
    """
    o = tensors[0].options
    row = (t - 1) % o.window
    # 1. to 3.
    for x in tensors:
        _compress_(x, row)
    # 4. row and column of GGᵀ ← G c
    products = [_products(x.state, row) for x in tensors]
    # 5. u ← Gᵀw
    weights = functools.partial(mfac_weights, damping=o.damping)
    w = update_systems_(shared["gram"], row, products, everywhere, weights)
    for x in tensors:
        _descend_(x, w.to(x.g[0].device))


def _descend_(x: Batch, w: Tensor) -> None:
    """Move the tensors of a batch: u ← Gᵀw with w for all or for each, and lines 6 and 7."""
    with x.weights() as W:
        each = w.expand(len(W), -1)
        if x.options.momentum == 0:
            lowrank_descend_(W, x.state, each, x.options)
            return
        for i, weight in enumerate(W):
            _descend_one_(weight, {key: part[i] for key, part in x.state.items()}, each[i], x.options)


@Op
def lowrank_descend_(W: Sequence[Tensor], state: Mapping[str, Tensor], w: Tensor, o: LowRankMFACOptions) -> None:
    """Write W ← W·(1 − lr·weight_decay) − lr·Gᵀw: line 7 without momentum.

    Args:
        W: n matrices, or vectors, of one shape and dtype.
        state: Their stacked windows, ``"left"`` and ``"right"``, or ``"rows"``; and corrections of compensated weights.
        w: Of each, float32 [n, m], on the device of the weights.
        o: The options.
    """
    most = most_tensors(W[0].numel(), W[0].device)
    if "left" in state or W[0].device.type in _ALONE or min(most, len(W)) == 1:
        most = 1
    for part in [slice(start, start + most) for start in range(0, len(W), most)]:
        corrections = list(state[CORRECTION][part]) if CORRECTION in state else []
        weights = join_weights(W[part], corrections) if corrections else W[part]
        if most == 1:
            keys = [key for key in ("left", "right", "rows") if key in state]
            _descend_one_(weights[0], {key: state[key][part.start] for key in keys}, w[part.start], o)
        else:
            flat = [weight.view(-1) for weight in weights]
            stepped = torch.stack(flat).float()
            descend_(stepped, (w[part, None] @ state["rows"][part]).squeeze(1), o)
            torch._foreach_copy_(flat, stepped.unbind())
        if corrections:
            split_weights_(W[part], corrections, weights)


def _descend_one_(weight: Tensor, state: Mapping[str, Tensor], w: Tensor, o: LowRankMFACOptions) -> None:
    u = _combination(state, w)
    if o.momentum > 0:
        # 6. vel ← μ·vel + u
        u = add_momentum_(state["velocity"], u, o.momentum)
    # 7. W ← W·(1 − lr·weight_decay) − lr·(vel or u)
    descend_(weight, u, o)


def _compress_(x: Batch, row: int) -> None:
    """Put the low-rank part of ξ + g into a row of the window and the rest into ξ: lines 1 to 3."""
    if "rows" in x.state:
        with selected(x.state["rows"], 1, row) as written:
            torch._foreach_copy_(list(written.unbind()), [g.view(-1) for g in x.g])
        return
    right = x.state["right"]
    if x.step > 1:
        start = select(right, 1, (row - 1) % x.options.window)
    else:
        start = seeded_sketch(right.shape[3], right.shape[2], right.device).T.expand(len(right), -1, -1)
    lowrank_compress_(x.g, x.state, start, row, x.options.error_feedback)


@Op
def lowrank_compress_(
    g: Sequence[Tensor], state: Mapping[str, Tensor], start: Tensor, row: int, error_feedback: str
) -> None:
    """Compress n gradients of one shape: lines 1 to 3.

    Args:
        g: The gradients, contiguous; only read.
        state: Their stacked state, ``"left"``, ``"right"`` and the error; written.
        start: Q₋, float32 [n, r, q]; may be another row of ``"right"``.
        row: Of the window, to be written.
        error_feedback: How the error is stored.
    """
    most = most_tensors(g[0].numel(), g[0].device)
    if len(g) > most:  # on a GPU: acc is of their size
        for first in range(0, len(g), most):
            part = slice(first, first + most)
            parts = {key: value[part] for key, value in state.items()}
            lowrank_compress_.torch_version(g[part], parts, start[part], row, error_feedback)
        return
    # 1. acc ← ξ + g
    fmt = FORMATS.get(error_feedback)
    acc = add_residual(g, state, fmt)  # [n, p, q]
    # 2. P ← orthonormalize(acc·Q₋);  Q ← accᵀP;  ξ ← acc − P·Qᵀ
    P = orthonormalize(acc @ of_safe_size(start.mT))  # [n, p, r]
    Qt = P.mT @ acc  # [n, r, q]
    save_residual_(state, acc.baddbmm_(P, Qt, alpha=-1), fmt)
    # 3. row of the window ← (P, Q)
    state["left"][:, row] = P.mT
    state["right"][:, row] = Qt


def _products(state: Mapping[str, Tensor], row: int) -> Tensor:
    """Return ⟨gᵢ, g_row⟩ for every row i of each tensor, float64 [n, m]: gradients that resemble each other."""
    # a gradient that is kept as it is counts as one factor of rank 1
    factors = [state["rows"][:, :, None]] if "rows" in state else [state["left"], state["right"]]
    count, window = factors[0].shape[:2]
    together = 1 if factors[0].device.type in _ALONE else count
    parts = zip(*[torch.split(factor, together) for factor in factors], strict=True)
    overlaps = [torch.stack([_overlaps(each, row) for each in part]).prod(dim=0) for part in parts]
    return torch.cat(overlaps).view(count, window, -1).sum(2)


def _overlaps(factors: Tensor, row: int) -> Tensor:
    """Return the products of all vectors of factors [n, m, r, p] with those of a row, float64 [n, m·r, r]."""
    newest, vectors = select(factors, 1, row).double().mT, factors.flatten(1, 2)
    entries = _CPU_CHUNK_ENTRIES if factors.device.type == "cpu" else _DEVICE_CHUNK_ENTRIES
    most = max(1, entries // max(1, vectors[:, 0].numel()))
    return torch.cat([piece.double() @ newest for piece in torch.split(vectors, most, dim=1)], dim=1)


def _combination(state: Mapping[str, Tensor], w: Tensor) -> Tensor:
    """Return Gᵀw of one tensor, float32; of factors one product over all rows, [p, m·r] by [m·r, q]."""
    if "rows" in state:
        return torch.zeros_like(state["rows"][0]).addmv_(state["rows"].T, w)
    weighted = (state["left"] * w[:, None, None]).flatten(0, 1)
    return weighted.T @ state["right"].flatten(0, 1)


def clear_lowrank_row_(state: Mapping[str, Tensor], t: int) -> None:
    """Set a tensor's row of G to zero in a step without a gradient; the next one starts from its right factor."""
    if "rows" in state:
        state["rows"][(t - 1) % len(state["rows"])] = 0
        return
    row = (t - 1) % len(state["left"])
    state["left"][row] = 0
    state["right"][row] = state["right"][row - 1]


class LowRankMFAC(LowMemoryOptimizer):
    """LowRankMFAC: the gradient, preconditioned by the inverse Fisher matrix of a window of low-rank gradients.

    One Fisher matrix spans all parameters, vectors included. A group with ``rank=None`` takes AdamW, bit-equal to
    torch's. A tensor without a gradient in a step counts as zero in that step's row and is not moved. A non-finite
    gradient makes every parameter of the Fisher matrix non-finite, as the formula has it. ``window``, ``damping`` and
    ``scope`` must be the same in all groups that share a Fisher matrix. The first step is about m·c/‖c‖² for small
    damping: larger for smaller gradients.

    Example:
        >>> optimizer = LowRankMFAC(model.parameters(), lr=1e-3, window=32, rank=4)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2306.06098, algorithm 1 with PowerSGD (arXiv 1905.13727) as compressor.
    """

    method = Method(
        "lowrank_mfac",
        LowRankMFACOptions,
        lowrank_mfac_state,
        switch=("rank", None),
        scratch=_scratch,
        whole="gpu",
        captured=True,
        corrected={"momentum": 0.0},
        scratch_state=1.0,
        adam_like=False,
        optional_state={"velocity": "momentum"},
        coupled_update_=lowrank_mfac_update_,
        shared_state=gram_state,
        shared_options=("scope", "window", "damping"),
        absent_=clear_lowrank_row_,
    )
