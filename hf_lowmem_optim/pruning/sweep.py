"""Pruning one layer by the Hessian of its own squared error: SparseGPT's sweep over the columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.pruning.support import count_to_prune, lowest_of_all, lowest_of_each

__all__ = ["newton_point", "solve_rows_", "sweep_"]

#: Numbers of the matrices that are solved at a time.
_SOLVED_NUMBERS = 1 << 22


def newton_point(W: Tensor, H: Tensor, H0: Tensor, C: Tensor) -> Tensor:
    """Return W⁺ ← W − (W·XᵀX/n − (X₀W₀ᵀ)ᵀX/n)·H⁻¹, a Newton step on ‖XWᵀ − X₀W₀ᵀ‖².

    Args:
        W: float64 [out, in].
        H: H0 and damping, float64 [in, in].
        H0: XᵀX/n.
        C: (X₀W₀ᵀ)ᵀX/n, float64 [out, in].
    """
    factor = torch.linalg.cholesky(H)
    return W - torch.cholesky_solve((W @ H0 - C).T, factor).T


def sweep_(W: Tensor, H: Tensor, sparsity: float, pattern: Sequence[int] | None, block_size: int) -> Tensor:
    """Prune columns from left to right, and let the later ones make up for it.

    1. U ← upper Cholesky factor of H⁻¹
    2. in a block of columns: prune the entries of smallest w²/U_jj², of all rows together; N:M per M columns
    3. for column j: e ← (pruned ? w_j : 0)/U_jj;  W[:, j:] −= e·U[j, j:];  w_j ← 0 where pruned

    Args:
        W: float64 [out, in]; written.
        H: float64 [in, in], positive definite.
        sparsity: Of all entries; each block gets its share.
        pattern: (N, M): N of each M neighbouring columns are kept, instead.
        block_size: Columns of a block.

    Returns:
        Which entries are pruned, bool [out, in].

    Source: arXiv 2301.00774, algorithm 1.
    """
    out, columns = W.shape
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    if pattern is not None:
        block_size = -(-block_size // pattern[1]) * pattern[1]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, within = W[:, start:end], U[start:end, start:end]
        mask, errors, diagonal = pruned[:, start:end], torch.zeros_like(block), within.diagonal()
        if pattern is None:
            # shares that add up to ⌊s·n⌋
            count = count_to_prune(sparsity, out * end) - count_to_prune(sparsity, out * start)
            mask.copy_(_lowest((block / diagonal).abs(), count))
        for j in range(end - start):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                saliency = (block[:, group] / diagonal[group]).abs()
                mask[:, group] = lowest_of_each(saliency, pattern[1] - pattern[0], pattern[1])
            errors[:, j] = torch.where(mask[:, j], block[:, j], 0.0) / diagonal[j]
            block[:, j:] -= errors[:, j : j + 1] * within[j, j:]
            block[:, j].masked_fill_(mask[:, j], 0.0)
        W[:, end:] -= errors @ U[start:end, end:]
    return pruned


def _lowest(saliency: Tensor, count: int) -> Tensor:
    return lowest_of_all([lambda: saliency.float().reshape(-1)], count)[0].view(saliency.shape)


def solve_rows_(W: Tensor, target: Tensor, H: Tensor, pruned: Tensor) -> None:
    """Write the minimizer of (x − target)ᵀH(x − target) over x = 0 where pruned, of each row by itself.

    Args:
        W: float64 [out, in]; written.
        target: float64 [out, in].
        H: float64 [in, in], positive definite.
        pruned: bool [out, in].
    """
    right, size = target @ H, len(H)
    identity = torch.eye(size, dtype=H.dtype, device=H.device)
    length = max(1, _SOLVED_NUMBERS // size**2)
    for start in range(0, len(W), length):
        kept = (~pruned[start : start + length]).to(H.dtype)
        # H_QQ x_Q = (H·target)_Q, with rows and columns of the identity for S
        systems = H * kept[:, :, None] * kept[:, None, :] + identity * (1 - kept)[:, None, :]
        solved = torch.cholesky_solve((right[start : start + length] * kept)[..., None], torch.linalg.cholesky(systems))
        W[start : start + length] = solved[..., 0] * kept
