"""Dash (DASH, arXiv 2602.02016): Shampoo by blocks with Adam's step sizes, here in 3.2 bytes per parameter.

W is cut into blocks of at most `block_size` rows and columns, each a parameter of its own. Per block (a × b):

1. L ← βs·L + (1 − βs)·GGᵀ;  R ← βs·R + (1 − βs)·GᵀG                  sums without weights for βs = 1
2. v ← β2·v + (1 − β2)·G²;  `adafactor`: the same of G²'s row sums ρ and column sums τ, v = ρτᵀ/Σρ
3. L̄ ← L^(−1/4);  R̄ ← R^(−1/4)                                          every `precondition_frequency` steps
4. m ← β1·m + (1 − β1)·G
5. D ← (m/c1) / (eps + √(v/c2)) with c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ
6. U ← L̄ m R̄;  P ← U·‖D‖/(‖U‖ + 1e-16); P ← D as long as there are no roots
7. M ← μ·M + P;  P ← M, or P + μ·M with `nesterov`                      if μ > 0
8. W ← W·(1 − lr·weight_decay) − lr·P

| letter | state key                          | per block | dtype              | bytes per parameter             |
|--------|------------------------------------|-----------|--------------------|---------------------------------|
| L, R   | `left…`, `right…`                  | a², b²    | `statistics_dtype` | 8 (fp32), 1.06 (8bit), 0.56     |
| L̄, R̄   | `left_root…`, `right_root…`        | a², b²    | `root_dtype`       | 8, 2 (bf16), 1.06 (8bit), 0.56  |
| m      | `exp_avg…`                         | a·b       | `moment_dtype`     | 4, 2 (bf16), 1.06 (8bit)        |
| v      | `exp_avg_sq`                       | a·b       | fp32               | 4                               |
| ρ, τ   | `exp_avg_sq_row`, `exp_avg_sq_col` | a, b      | fp32               | 8/block_size, instead of v      |
| M      | `velocity`                         | a·b       | fp32               | 4 if μ > 0                      |

The paper's own method, 24 bytes per parameter, is `statistics_dtype="fp32", root_dtype="fp32", moment_dtype="fp32",
grafting="adam", spread=False`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, NOT_NEGATIVE, UNIT, Options, Range, option
from hf_lowmem_optim.ops.block_grid import FirstMoment, Piece, Region, Squares, Vectors, grid, piece_entries, pieces
from hf_lowmem_optim.ops.inverse_root import InverseRoot, Scaling, inverse_fourth_root
from hf_lowmem_optim.ops.packed_triangles import Semidefinite, Symmetric
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Dash", "DashOptions", "dash_state", "dash_update_"]

_COPIES = 18  # in float32, of a piece, that a step takes at most


@dataclass(frozen=True)
class DashOptions(Options):
    """The options of :class:`Dash`."""

    betas: tuple[float, float] = option((0.9, 0.95), "β1 of m and β2 of v, each in [0, 1).", within=UNIT)
    block_size: int | None = option(
        1024, "Largest number of rows and columns of a block.", within=COUNT, none="dense AdamW", shapes_state=True
    )
    shampoo_beta: float = option(
        0.95, "βs, decay rate of L and R; 1 for sums.", within=Range("a float in [0, 1]", lambda x: 0 <= x <= 1)
    )
    solver: Literal["auto", "eigh", "newton_db", "coupled_newton"] = option(
        "auto", "Of the roots; newton_db is the paper's, auto is eigh on a CPU, where that is fastest, else newton_db."
    )
    iterations: int = option(10, "Those of a Newton solver, at most.", within=COUNT)
    tolerance: float = option(1e-6, "Where coupled_newton stops.", within=NOT_NEGATIVE)
    scaling: Scaling = option("power_norm", "Bound of the eigenvalues in the Newton solvers.")
    damping: float = option(1e-10, "Least multiple of I that is added to L and R for their roots.", within=NOT_NEGATIVE)
    relative_damping: float = option(1e-6, "The same relative to ‖L‖, ‖R‖; 1e-3 for 4 bits.", within=NOT_NEGATIVE)
    precondition_frequency: int = option(10, "Steps from one root of a block to its next.", within=COUNT)
    spread: bool = option(
        True, "Spread the roots over the steps, with Adam's direction until a block's turn; else all at the same step."
    )
    start_step: int = option(1, "First step with roots; Adam's direction before.", within=COUNT)
    grafting: Literal["adafactor", "adam", "none"] = option(
        "adafactor",
        "Whose norm an update has: Adam's, that from row and column sums alone (adafactor), or its own.",
        shapes_state=True,
    )
    momentum: float = option(0.0, "μ of the heavy ball; if it is not 0, four bytes per parameter.", within=UNIT)
    nesterov: bool = option(False, "Whether that looks ahead.")
    bias_correction: bool = option(True, "Divide the moments by 1 − βᵗ.")
    statistics_dtype: Literal["fp32", "8bit", "4bit"] = option(
        "8bit", "Storage of L and R, quantized as Cholesky factors.", shapes_state=True
    )
    root_dtype: Literal["fp32", "bf16", "8bit", "4bit"] = option("8bit", "Storage of the roots.", shapes_state=True)
    moment_dtype: Literal["fp32", "bf16", "8bit"] = option("8bit", "Storage of m, 8 bits of m/√v.", shapes_state=True)

    def check(self) -> None:
        """Refuse what overflows: rounding makes eigenvalues negative, and many iterations let those grow."""
        if "newton" in self.solver and self.iterations > 15 and self.damping == self.relative_damping == 0:
            raise ValueError(f"iterations={self.iterations} need relative_damping=1e-6, or take at most 15")


class _Stored(NamedTuple):
    """Where the state of blocks is, by the letters of the paper."""

    L: Semidefinite
    R: Semidefinite
    L_root: Symmetric
    R_root: Symmetric
    m: FirstMoment
    v: Squares
    M: Vectors

    @classmethod
    def of(cls, o: DashOptions) -> _Stored:
        return cls(
            Semidefinite("left", "statistics", lambda a, b: a, o.statistics_dtype),
            Semidefinite("right", "statistics", lambda a, b: b, o.statistics_dtype),
            Symmetric("left_root", "roots", lambda a, b: a, o.root_dtype),
            Symmetric("right_root", "roots", lambda a, b: b, o.root_dtype),
            FirstMoment("exp_avg", o.moment_dtype),
            Squares("exp_avg_sq", o.grafting == "adafactor"),
            Vectors("velocity", "velocity", lambda a, b: a * b),
        )


def _regions(shape: Sequence[int], o: DashOptions) -> list[Region]:
    return grid(shape[0], math.prod(shape[1:]), o.block_size or 1)


def dash_state(shape: Sequence[int], dtype: torch.dtype, o: DashOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter, one flat tensor per key: the table at the head of this file.

    Of three and more dimensions as the matrix (out, rest); None for a tensor that is no matrix.
    """
    if o.block_size is None or len(shape) < 2:
        return None
    parts = _Stored.of(o)[: None if o.momentum > 0 else -1]
    return {key: spec for part in parts for key, spec in part.specs(_regions(shape, o)).items()}


def dash_update_(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Any], t: int, o: DashOptions) -> None:
    """Take one step of Dash on n matrices of one shape, in place, a bounded number of blocks at a time.

    Args:
        W: The weights, (out, in) each, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read.
        state: As :func:`dash_state` describes it, stacked: [n, ...]; written. ``"places"`` spread the roots.
        t: 1 for the first update of these tensors.
        o: The options.
    """
    stored = _Stored.of(o)
    for piece in pieces(_regions(W[0].shape, o), len(W), W[0].device):
        P = _direction(piece, piece.gather(g), state, stored, t, o)
        # 8. W ← W·(1 − lr·weight_decay) − lr·P, in float32
        for view, step in zip(piece.views(W), P.mul_(o.lr).view(len(piece.tensors), -1), strict=True):
            wide = view if view.dtype == torch.float32 else view.float()
            wide.mul_(1 - o.lr * o.weight_decay).sub_(step.view(view.shape))
            if wide is not view:
                view.copy_(wide)


def _direction(piece: Piece, G: Tensor, state: Mapping[str, Any], at: _Stored, t: int, o: DashOptions) -> Tensor:
    """Update the state of a piece's blocks, and return P: lines 1 to 7. G is overwritten."""
    (β1, β2), βs = o.betas, o.shampoo_beta
    # 1. L ← βs·L + (1 − βs)·GGᵀ;  R ← βs·R + (1 − βs)·GᵀG
    L, R = (S.update_(state, piece, A, βs, 1 - βs if βs < 1 else 1.0) for S, A in ((at.L, G), (at.R, G.mT)))
    # 2. v ← β2·v + (1 − β2)·G², after m is read, whose unit in 8 bits is √v
    m = at.m.read(state, piece, at.v.root(state, piece))
    root_v = at.v.update_(state, piece, G, β2)
    # 3. L̄ ← L^(−1/4);  R̄ ← R^(−1/4)
    if due := _due(piece, state["places"], t, o):
        _write_roots_(piece, state, at, (L, R), due, o)
    del L, R
    # 4. m ← β1·m + (1 − β1)·G
    m.mul_(β1).add_(G.mul_(1 - β1))
    at.m.write_(state, piece, m, root_v)
    # 5. D ← (m/c1) / (eps + √(v/c2)), both sides of the fraction times c1
    c1, c2 = (1 - β1**t, 1 - β2**t) if o.bias_correction else (1.0, 1.0)
    P = m / reduce(torch.mul, root_v).mul_(c1 / math.sqrt(c2)).add_(c1 * o.eps)
    if t >= o.start_step:
        # 6. U ← L̄ m R̄;  P ← U·‖D‖/(‖U‖ + 1e-16); P ← D as long as there are no roots, only zeros
        U = at.L_root.read(state, piece) @ m @ at.R_root.read(state, piece)
        norm_D, norm_U = (torch.linalg.vector_norm(x.flatten(1), dim=1)[:, None, None] for x in (P, U))
        P = torch.where(norm_U == 0, P, U if o.grafting == "none" else U.mul_(norm_D / (norm_U + 1e-16)))
    if o.momentum > 0:
        # 7. M ← μ·M + P;  P ← M, or P + μ·M
        M = (at.M.read(state, piece) * o.momentum).view_as(P).add_(P)
        at.M.write_(state, piece, M.flatten(1))
        P = P.add_(M * o.momentum) if o.nesterov else M
    return P


def _due(piece: Piece, places: Sequence[int], t: int, o: DashOptions) -> list[int]:
    """Return which blocks of a piece have their roots computed in this step."""
    blocks, every = piece.numbers(), o.precondition_frequency
    if t < o.start_step:
        return []
    if not o.spread:
        return list(range(len(blocks))) if t == o.start_step or t % every == 0 else []
    # multiples of the golden ratio spread also matrices of one block, whatever lies between them
    phases = [int(places[i] * (math.sqrt(5) - 1) / 2 % 1 * every) + number for i, number in blocks]
    return [j for j, phase in enumerate(phases) if (t - o.start_step - phase) % every == 0]


def _write_roots_(
    piece: Piece, state: Mapping[str, Tensor], at: _Stored, S: Sequence[Tensor], due: Sequence[int], o: DashOptions
) -> None:
    """Compute and store the roots of some blocks of a piece; one stack has all statistics of one side length."""
    all_due = len(due) == len(S[0])
    solver = o.solver if o.solver != "auto" else "eigh" if S[0].device.type == "cpu" else "newton_db"
    how = InverseRoot(solver, o.iterations, o.tolerance, o.scaling, o.damping, o.relative_damping)
    L, R = S if all_due else (x[torch.tensor(due, device=x.device)] for x in S)
    if L.shape == R.shape:
        L, R = torch.chunk(inverse_fourth_root(torch.cat((L, R)), how), 2)
    else:
        L, R = (inverse_fourth_root(x, how) for x in (L, R))
    for roots, stored in ((L, at.L_root), (R, at.R_root)):
        for j, root in [(None, roots)] if all_due else zip(due, torch.split(roots, 1), strict=True):
            stored.write_(state, piece if j is None else piece.only(j), root)


def _scratch_entries(shape: Sequence[int], o: DashOptions, device: torch.device) -> int:
    """Return the float32 numbers that the largest piece takes, at most."""
    return _COPIES * max(piece_entries(device), *[max(r.a, r.b) ** 2 for r in _regions(shape, o)])


class Dash(LowMemoryOptimizer):
    """Dash: Shampoo on the blocks of a matrix, with Adam's step sizes.

    Tensors of two and more dimensions are preconditioned, convolution kernels as (out, rest); all others, and groups
    with ``block_size=None``, take AdamW, bit-equal to torch's. A non-finite gradient stays in its block.

    Example:
        >>> optimizer = Dash(model.parameters(), lr=1e-3, block_size=256)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2602.02016, algorithm 1; the storage, and the spread of the roots, are ours.
    """

    method = Method(
        "dash",
        DashOptions,
        dash_state,
        dash_update_,
        switch=("block_size", None),
        scratch=0,
        adam_like=False,
        uses_betas=True,
        scratch_entries=_scratch_entries,
        optional_state={"velocity": "momentum"},
    )
