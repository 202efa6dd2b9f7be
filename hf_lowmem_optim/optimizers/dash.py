"""Dash (DASH, arXiv 2602.02016): Shampoo by blocks with Adam's step sizes, here in 3.2 bytes per parameter.

W is cut into blocks of at most `block_size` rows and columns, each a parameter of its own. Per block (a × b):

1. L ← βs·L + (1 − βs)·GGᵀ;  R ← βs·R + (1 − βs)·GᵀG                  sums without weights for βs = 1
2. v ← β2·v + (1 − β2)·G²;  `adafactor`: the same of G²'s row sums ρ and column sums τ, v = ρτᵀ/Σρ
3. L̄ ← L^(−1/4);  R̄ ← R^(−1/4)                                          every `precondition_frequency` steps
4. m ← β1·m + (1 − β1)·G
5. D ← (m/c1) / (eps + √(v/c2)) with c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ
6. U ← L̄ m R̄;  P ← U·‖D‖/(‖U‖ + 1e-16), and D as long as there are no roots
7. M ← μ·M + P;  P ← M, or P + μ·M with `nesterov`                      if μ > 0
8. W ← W·(1 − lr·weight_decay) − lr·P

| letter | state key                           | per block  | dtype              | bytes per parameter            |
|--------|-------------------------------------|------------|--------------------|--------------------------------|
| L, R   | `left…`, `right…`                   | a², b²     | `statistics_dtype` | 8 (fp32), 1.07 (8bit), 0.57    |
| L̄, R̄   | `left_root…`, `right_root…`         | a², b²     | `root_dtype`       | 8, 2 (bf16), 1.07, 0.57 (4bit) |
| m      | `exp_avg…`                          | a·b        | `moment_dtype`     | 4, 2 (bf16), 1.06 (8bit)       |
| v      | `exp_avg_sq`                        | a·b        | fp32               | 4                              |
| ρ, τ   | `exp_avg_sq_row`, `exp_avg_sq_col`  | a, b       | fp32               | 8/block_size, instead of v     |
| M      | `velocity`                          | a·b        | fp32               | 4 if μ > 0                     |

The paper's own storage is 24 bytes per parameter: `statistics_dtype="fp32", root_dtype="fp32", moment_dtype="fp32",
grafting="adam", spread=False`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, NOT_NEGATIVE, UNIT, Options, Range, option
from hf_lowmem_optim.ops.block_grid import Piece, Region, Vectors, grid, piece_entries, pieces
from hf_lowmem_optim.ops.inverse_root import InverseRoot, Scaling, inverse_fourth_root
from hf_lowmem_optim.ops.packed_triangles import Semidefinite, Symmetric
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Dash", "DashOptions", "dash_state", "dash_update_"]

_GOLDEN = (math.sqrt(5) - 1) / 2
#: float32 copies of a piece that a step takes at most.
_COPIES = 16


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
        "auto",
        'Of the roots: ``"eigh"``, ``"newton_db"`` (the paper\'s), ``"coupled_newton"``, or ``"auto"``: eigh on a CPU, '
        "where it is several times faster, newton_db elsewhere.",
    )
    iterations: int = option(10, "Those of a Newton solver, at most.", within=COUNT)
    tolerance: float = option(1e-6, "Where coupled_newton stops.", within=NOT_NEGATIVE)
    scaling: Scaling = option(
        "power_norm", 'Bound of the eigenvalues: ``"power_norm"``, ``"frobenius"`` or ``"power_iteration"``.'
    )
    damping: float = option(1e-10, "Least multiple of I that is added to L and R for their roots.", within=NOT_NEGATIVE)
    relative_damping: float = option(
        1e-6, "The same in units of ‖L‖ and ‖R‖; 1e-3 suits 4-bit statistics.", within=NOT_NEGATIVE
    )
    precondition_frequency: int = option(10, "Steps from one root of a block to its next.", within=COUNT)
    spread: bool = option(
        True,
        "Spread the roots of the blocks over the steps, so that no step computes all of them; a block takes Adam's "
        "direction until its turn comes. False: all at the first step, and whenever the frequency divides the step.",
    )
    start_step: int = option(1, "First step with roots; Adam's direction before.", within=COUNT)
    grafting: Literal["adafactor", "adam", "none"] = option(
        "adafactor",
        'Whose norm an update has: ``"adam"``, four bytes per parameter; ``"adafactor"``, Adam\'s from row and column '
        'sums; or ``"none"``, its own.',
        shapes_state=True,
    )
    momentum: float = option(0.0, "μ of the heavy ball; if it is not 0, four bytes per parameter.", within=UNIT)
    nesterov: bool = option(False, "Whether that looks ahead.")
    bias_correction: bool = option(True, "Divide the moments by 1 − βᵗ.")
    statistics_dtype: Literal["fp32", "8bit", "4bit"] = option(
        "8bit", "Storage of L and R, quantized as Cholesky factors.", shapes_state=True
    )
    root_dtype: Literal["fp32", "bf16", "8bit", "4bit"] = option(
        "8bit", "Storage of the roots, triangles unless fp32.", shapes_state=True
    )
    moment_dtype: Literal["fp32", "bf16", "8bit"] = option("8bit", "Storage of m.", shapes_state=True)

    def check(self) -> None:
        """Refuse what overflows in float32: rounding makes eigenvalues negative, and iterations let these grow."""
        if self.solver in ("newton_db", "coupled_newton") and self.iterations > 15 and not self.damping + self.relative_damping:
            raise ValueError(
                f"iterations={self.iterations} of {self.solver} need damping: set relative_damping=1e-6, or at most 15"
            )


@dataclass(frozen=True)
class _Stored:
    """Where a block's state is, by the letters of the paper."""

    L: Semidefinite
    R: Semidefinite
    L_root: Symmetric
    R_root: Symmetric
    m: Vectors
    v: Sequence[Vectors]
    M: Vectors

    @classmethod
    def of(cls, o: DashOptions) -> _Stored:
        rows, columns = (lambda a, b: a), (lambda a, b: b)
        factored = [Vectors("exp_avg_sq_row", rows), Vectors("exp_avg_sq_col", columns)]
        return cls(
            Semidefinite("left", rows, o.statistics_dtype),
            Semidefinite("right", columns, o.statistics_dtype),
            Symmetric("left_root", rows, o.root_dtype),
            Symmetric("right_root", columns, o.root_dtype),
            Vectors("exp_avg", lambda a, b: a * b, o.moment_dtype),
            factored if o.grafting == "adafactor" else [Vectors("exp_avg_sq", lambda a, b: a * b)],
            Vectors("velocity", lambda a, b: a * b),
        )


def _regions(shape: Sequence[int], o: DashOptions) -> list[Region]:
    assert o.block_size is not None
    return grid(shape[0], math.prod(shape[1:]), o.block_size)


def dash_state(shape: Sequence[int], dtype: torch.dtype, o: DashOptions) -> dict[str, TensorSpec] | None:
    """Describe the state of one parameter: the table at the head of this file, one flat tensor per key.

    Args:
        shape: Shape of the parameter; three and more dimensions count as the matrix (out, rest).
        dtype: Dtype of the parameter; does not matter.
        o: The options.

    Returns:
        Specs by state key; None for a tensor that is no matrix.
    """
    if o.block_size is None or len(shape) < 2:
        return None
    regions, stored = _regions(shape, o), _Stored.of(o)
    specs: dict[str, TensorSpec] = {}
    for matrices, component in ((stored.L, "statistics"), (stored.R, "statistics"), (stored.L_root, "roots"), (stored.R_root, "roots")):
        specs |= matrices.specs(regions, component)
    specs |= stored.m.specs(regions, "first_moment")
    for vectors in stored.v:
        specs |= vectors.specs(regions, "second_moment")
    return specs | (stored.M.specs(regions, "velocity") if o.momentum > 0 else {})


def dash_update_(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Any], t: int, o: DashOptions) -> None:
    """Take one step of Dash on n matrices of one shape, in place, a bounded number of blocks at a time.

    Args:
        W: The weights, (out, in) each, contiguous; float32, bfloat16 or float16.
        g: Their gradients, likewise; only read.
        state: As :func:`dash_state` describes it, stacked: [n, ...]; written. And ``"places"``, a list of the matrices'
            places among all parameters, which spread their roots over the steps.
        t: 1 for the first update of these tensors.
        o: The options.
    """
    stored = _Stored.of(o)
    for piece in pieces(_regions(W[0].shape, o), len(W), W[0].device):
        P = _direction(piece, g, state, stored, t, o)
        # 8. W ← W·(1 − lr·weight_decay) − lr·P, in float32
        parts = (P * o.lr).unflatten(0, (len(piece.tensors), len(piece.rows), len(piece.columns)))
        for i, step in zip(piece.tensors, parts, strict=True):
            view = piece.blocks(W[i])
            wide = view if view.dtype == torch.float32 else view.float()
            wide.mul_(1 - o.lr * o.weight_decay).sub_(step)
            if wide is not view:
                view.copy_(wide)


def _direction(
    piece: Piece, g: Sequence[Tensor], state: Mapping[str, Any], at: _Stored, t: int, o: DashOptions
) -> Tensor:
    """Update the state of a piece's blocks, and return P: lines 1 to 7."""
    (β1, β2), βs = o.betas, o.shampoo_beta
    G = piece.gather(g)  # [blocks, a, b]
    # 1. L ← βs·L + (1 − βs)·GGᵀ;  R ← βs·R + (1 − βs)·GᵀG
    share = 1 - βs if βs < 1 else 1.0
    L = torch.baddbmm(at.L.read(state, piece), G, G.mT, beta=βs, alpha=share)
    R = torch.baddbmm(at.R.read(state, piece), G.mT, G, beta=βs, alpha=share)
    at.L.write_(state, piece, L)
    at.R.write_(state, piece, R)
    # 3. L̄ ← L^(−1/4);  R̄ ← R^(−1/4)
    if due := _due(piece, state, t, o):
        _precondition_(piece, state, at, (L, R), due, o)
    del L, R
    # 2. v ← β2·v + (1 − β2)·G²
    v = _second_moment(piece, state, at.v, G.square(), β2)
    # 4. m ← β1·m + (1 − β1)·G
    m = (at.m.read(state, piece) * β1).view_as(G).add_(G.mul_(1 - β1))
    at.m.write_(state, piece, m.flatten(1))
    # 5. D ← (m/c1) / (eps + √(v/c2))
    c1, c2 = (1 - β1**t, 1 - β2**t) if o.bias_correction else (1.0, 1.0)
    P = (m / c1).div_(v.div_(c2).sqrt_().add_(o.eps))
    if t >= o.start_step:
        # 6. U ← L̄ m R̄;  P ← U·‖D‖/(‖U‖ + 1e-16), and D as long as there are no roots
        U = at.L_root.read(state, piece) @ m @ at.R_root.read(state, piece)
        size_D, size_U = (torch.linalg.vector_norm(x.flatten(1), dim=1)[:, None, None] for x in (P, U))
        scale = size_D / (size_U + 1e-16) if o.grafting != "none" else 1.0
        P = torch.where(size_U == 0, P, U.mul_(scale))
    if o.momentum > 0:
        # 7. M ← μ·M + P;  P ← M, or P + μ·M
        M = (at.M.read(state, piece) * o.momentum).view_as(P).add_(P)
        at.M.write_(state, piece, M.flatten(1))
        P = P.add_(M * o.momentum) if o.nesterov else M
    return P


def _second_moment(
    piece: Piece, state: Mapping[str, Tensor], at: Sequence[Vectors], squares: Tensor, β2: float
) -> Tensor:
    """Update v, or its row and column sums, and return v, which may be written to."""
    new = [squares.flatten(1)] if len(at) == 1 else [squares.sum(2), squares.sum(1)]
    new = [(part.read(state, piece) * β2).add_(value * (1 - β2)) for part, value in zip(at, new, strict=True)]
    for part, value in zip(at, new, strict=True):
        part.write_(state, piece, value)
    if len(at) == 1:
        return new[0].view_as(squares)
    total = new[0].sum(1, keepdim=True)
    return new[0][:, :, None] * (new[1] / total.masked_fill(total == 0, 1))[:, None, :]


def _due(piece: Piece, state: Mapping[str, Any], t: int, o: DashOptions) -> list[int]:
    """Return which blocks of a piece have their roots computed in this step."""
    places, every = piece.places(), o.precondition_frequency
    if t < o.start_step:
        return []
    if not o.spread:
        return list(range(len(places))) if t == o.start_step or t % every == 0 else []
    # multiples of the golden ratio spread also matrices of one block, whatever lies between them
    phases = [int(state["places"][i] * _GOLDEN % 1 * every) + block for i, block in places]
    return [j for j, phase in enumerate(phases) if (t - o.start_step - phase) % every == 0]


def _precondition_(
    piece: Piece, state: Mapping[str, Tensor], at: _Stored, statistics: Sequence[Tensor], due: Sequence[int], o: DashOptions
) -> None:
    """Compute and store the roots of some blocks of a piece, in one stack where the blocks are square."""
    solver = o.solver
    if solver == "auto":
        solver = "eigh" if statistics[0].device.type == "cpu" else "newton_db"
    how = InverseRoot(solver, o.iterations, o.tolerance, o.scaling, o.damping, o.relative_damping)
    every = len(due) == len(statistics[0])
    L, R = statistics if every else (x[torch.tensor(due, device=x.device)] for x in statistics)
    if L.shape == R.shape:
        L, R = inverse_fourth_root(torch.cat((L, R)), how).chunk(2)
    else:
        L, R = (inverse_fourth_root(x, how) for x in (L, R))
    for roots, where in ((L, at.L_root), (R, at.R_root)):
        if every:
            where.write_(state, piece, roots)
        else:
            for j, root in zip(due, roots.split(1), strict=True):
                where.write_(state, piece.only(j), root)


def _scratch_entries(shape: Sequence[int], o: DashOptions, device: torch.device) -> int:
    """Return the float32 numbers that a piece takes at most, that of the largest blocks."""
    side = max([max(r.a, r.b) for r in _regions(shape, o)])
    return _COPIES * max(side**2, piece_entries(device))


class Dash(LowMemoryOptimizer):
    """Dash: Shampoo on the blocks of a matrix, with Adam's step sizes.

    Every tensor of two and more dimensions is preconditioned, convolution kernels as (out, rest); the others, and every
    group with ``block_size=None``, take AdamW, bit-equal to torch's. A non-finite gradient makes its block non-finite,
    and no other. A block without gradients stays where it is.

    Example:
        >>> optimizer = Dash(model.parameters(), lr=1e-3, block_size=256)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2602.02016, algorithm 1; the storage is ours.
    """

    method = Method(
        "dash",
        DashOptions,
        dash_state,
        dash_update_,
        switch=("block_size", None),
        scratch=0,
        scratch_entries=_scratch_entries,
        optional_state={"velocity": "momentum"},
    )
