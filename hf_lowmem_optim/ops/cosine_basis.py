"""Fixed orthonormal bases of R^n, the cosine transform's above all: coefficients, columns, and the largest rows.

    C[k, i] = s_k·cos(π·k·(2i + 1)/(2n)),   s_0 = √(1/n), s_k = √(2/n)                            CᵀC = CCᵀ = I

B is C (type 3), Cᵀ (type 2), the identity, or a random orthogonal matrix from a fixed seed; its columns are the basis
vectors. Bᵀx is the orthonormal DCT-III of x for type 3, the DCT-II for type 2.

The table T[j] = √(2/n)·cos(π·j/(2n)), j < 4n, is made in float64 on the CPU and rounded once; C[k, i] is
T[k·(2i + 1) mod 4n] for k ≥ 1. So its bits are those of n alone, on every device. By product the matrix is held, 4n²
bytes; by FFT (Makhoul, IEEE TASSP 28, 1980) the table, 16n bytes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.constants import constant
from hf_lowmem_optim.spec import TensorSpec

__all__ = [
    "Basis",
    "Ranking",
    "Transform",
    "add_coefficients_",
    "basis_columns",
    "basis_constants",
    "basis_matrix",
    "by_fft",
    "largest_rows",
]

Kind = Literal["dct2", "dct3", "identity", "random"]
Transform = Literal["auto", "matmul", "fft"]
Ranking = Literal["l1", "l2"]

_SEED = 0
#: From this n on the FFT is the faster on a CPU; on other devices, beyond this one.
_FFT_FROM_ON_CPU, _PRODUCT_UP_TO = 256, 2048


class Basis(NamedTuple):
    """An orthonormal basis.

    Attributes:
        kind: Which one.
        n: Its dimension.
        fft: Whether the cosine transform goes by FFT.
    """

    kind: Kind
    n: int
    fft: bool


def by_fft(n: int, transform: Transform, device: torch.device) -> bool:
    """Return whether a transform of dimension n goes by FFT: by n and the kind of device alone, as a resume needs it.

    The meta device counts as a GPU. Where torch may have no FFT, ``"auto"`` is the product.
    """
    if transform != "auto":
        return transform == "fft"
    if device.type in ("cuda", "meta"):
        return n > _PRODUCT_UP_TO
    return device.type == "cpu" and n >= _FFT_FROM_ON_CPU


def basis_constants(basis: Basis, device: torch.device) -> dict[Hashable, TensorSpec]:
    """Describe what a basis holds on a device for the whole process, by the key of the constant."""
    key, spec = _key_and_spec(basis, device)
    return {} if basis.kind == "identity" else {key: spec}


def _key_and_spec(basis: Basis, device: torch.device) -> tuple[Hashable, TensorSpec]:
    kind = "random" if basis.kind == "random" else "dct"  # both types share their matrix
    shape = (4 * basis.n,) if basis.fft else (basis.n, basis.n)
    return (kind, *shape, device), TensorSpec(shape, torch.float32, f"{kind}_basis")


def basis_matrix(basis: Basis, device: torch.device) -> Tensor:
    """Return B, float32 [n, n]: a view of what the process shares, to be read only."""
    if basis.kind == "identity":
        return torch.eye(basis.n, dtype=torch.float32, device=device)
    shared = basis._replace(fft=False)
    make = _random_matrix if basis.kind == "random" else _cosine_matrix
    matrix = constant(_key_and_spec(shared, device)[0], lambda: make(basis.n, device))
    return matrix.mT if basis.kind == "dct2" else matrix


def _table(n: int, device: torch.device) -> Tensor:
    """Return T, float32 [4n]."""
    scale = math.sqrt(2 / n)
    values = [scale * math.cos(math.pi * j / (2 * n)) for j in range(4 * n)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _cosine_matrix(n: int, device: torch.device) -> Tensor:
    """Return C, gathered from T in slices of rows."""
    table, matrix = _table(n, device), torch.empty(n, n, dtype=torch.float32, device=device)
    odd = torch.arange(1, 2 * n, 2, device=device)
    rows = max(1, (1 << 18) // n)
    for start in range(0, n, rows):
        k = torch.arange(start, min(start + rows, n), device=device)
        torch.take(table, torch.outer(k, odd).remainder_(4 * n), out=matrix[start : start + rows])
    matrix[0] = math.sqrt(1 / n)
    return matrix


def _random_matrix(n: int, device: torch.device) -> Tensor:
    """Return Q of a Gaussian matrix, made in float64 on the CPU by a generator of its own."""
    gaussian = np.random.default_rng(_SEED).standard_normal((n, n))
    return torch.from_numpy(np.linalg.qr(gaussian)[0].astype(np.float32)).to(device)


def add_coefficients_(S: Tensor, X: Sequence[Tensor], basis: Basis) -> None:
    """Add the coefficients of the columns of matrices in a basis: S ← S + Bᵀx.

    Args:
        S: float32 [number of matrices, n, q]; written.
        X: The matrices, [n, q] each, any floating dtype and strides.
        basis: The basis.
    """
    for out, x in zip(S, X, strict=True):
        if basis.fft or x.dtype != torch.float32:
            _add_in_slices_(out, x, basis)
        elif basis.kind == "identity":
            out.add_(x)
        else:
            out.addmm_(basis_matrix(basis, x.device).mT, x)


def _add_in_slices_(out: Tensor, x: Tensor, basis: Basis) -> None:
    """Add Bᵀx in slices of columns, so that neither complex numbers nor a float32 copy of x grow with it."""
    n, device = basis.n, x.device
    width = max(1, _slice_entries(device) // n)
    parts = zip(torch.split(out, width, dim=1), torch.split(x, width, dim=1), strict=True)
    if basis.kind == "identity":
        for part, columns in parts:
            part.add_(columns)
        return
    if not basis.fft:
        B = basis_matrix(basis, device)
        for part, columns in parts:
            part.addmm_(B.mT, columns.float())
        return
    order = _order(n, device)
    if basis.kind == "dct2":
        twiddle = _twiddle(n, device, inverse=False)
        for part, columns in parts:
            part.mT.add_(_dct2(columns.mT, order, twiddle))
        return
    twiddle, place = _twiddle(n, device, inverse=True), torch.empty_like(order)
    place[order] = torch.arange(n, device=device)
    for part, columns in parts:
        part.add_(_dct3(columns, place, twiddle))


def _dct2(rows: Tensor, order: Tensor, twiddle: Tensor) -> Tensor:
    """Return the orthonormal DCT-II of every row, by one real FFT of its length."""
    n = rows.shape[1]
    # z_k = s_k·e^(−iπk/(2n))·Y_k for k ≤ n/2;  X_k = Re z_k,  X_(n−k) = −Im z_k
    z = torch.fft.rfft(rows.index_select(1, order).float()).mul_(twiddle)
    return torch.cat((z.real, -z.imag[:, 1 : (n + 1) // 2].flip(1)), dim=1)


def _dct3(columns: Tensor, place: Tensor, twiddle: Tensor) -> Tensor:
    """Return the orthonormal DCT-III of every column, the inverse of the DCT-II backwards."""
    n, half = len(columns), len(twiddle)
    columns = columns.float()
    # Y_k = e^(iπk/(2n))·(X_k − i·X_(n−k))/s_k, and X_n = 0
    mirrored = torch.zeros_like(columns[:half])
    mirrored[1:] = columns[n - half + 1 :].flip(0)
    Y = torch.complex(columns[:half], mirrored.neg_()).mul_(twiddle[:, None])
    # the FFT leaves columns beside each other, of which rows are not gathered fast
    permuted: Tensor = torch.fft.irfft(Y, n, dim=0).contiguous()
    return permuted.index_select(0, place)


def _order(n: int, device: torch.device) -> Tensor:
    """Return Makhoul's order of the places: even ones ascending, then odd ones descending."""
    places = torch.arange(n, device=device)
    return torch.cat((places[::2], places[1::2].flip(0)))


def _twiddle(n: int, device: torch.device, *, inverse: bool) -> Tensor:
    """Return s_k·e^(−iπk/(2n)) for k ≤ n/2, or the reciprocals, complex64."""
    table, half = _shared_table(n, device), n // 2 + 1
    # T[k] is s_k·cos(πk/(2n)) and T[n − k] is s_k·sin(πk/(2n)); 1/s_k is s_k·n/2
    cosine, sine = table[:half], table[n - half + 1 : n + 1].flip(0)
    twiddle = torch.complex(cosine, sine).mul_(n / 2) if inverse else torch.complex(cosine, -sine)
    twiddle[0] = math.sqrt(n) if inverse else math.sqrt(1 / n)
    return twiddle


def _shared_table(n: int, device: torch.device) -> Tensor:
    key, _ = _key_and_spec(Basis("dct3", n, True), device)
    return constant(key, lambda: _table(n, device))


def basis_columns(basis: Basis, indices: Tensor) -> Tensor:
    """Return columns of B: B_I.

    Args:
        basis: The basis.
        indices: int64 [number of matrices, r].

    Returns:
        float32 [number of matrices, n, r], a transposed view.
    """
    n, device = basis.n, indices.device
    if not basis.fft:
        return basis_matrix(basis, device).mT[indices].mT
    dtype = torch.int32 if n < 1 << 15 else torch.int64  # a product is less than 2n²
    places, chosen = torch.arange(n, dtype=dtype, device=device), indices[..., None].to(dtype)
    frequency, odd = (chosen, 2 * places + 1) if basis.kind == "dct2" else (places, 2 * chosen + 1)
    angles = (frequency * odd).remainder_(4 * n)
    columns = _shared_table(n, device).index_select(0, angles.view(-1)).view(angles.shape)
    return columns.masked_fill_(frequency == 0, math.sqrt(1 / n)).mT


def largest_rows(S: Tensor, count: int, ranking: Ranking) -> Tensor:
    """Return the indices of the rows of largest norm, ascending; of equal ones the first, and a NaN above all.

    Args:
        S: float32 [number of matrices, n, q].
        count: How many.
        ranking: The norm.

    Returns:
        int64 [number of matrices, count].
    """
    norms = _sums(S) if ranking == "l1" else torch.linalg.vector_norm(S, dim=2)
    order = norms.sort(dim=1, descending=True, stable=True).indices
    rows: Tensor = order[:, :count].sort(dim=1).values
    return rows


def _sums(S: Tensor) -> Tensor:
    """Return Σ|x| of every row, of a slice of rows at a time: torch's own 1-norm takes three times as long on a CPU."""
    rows = max(1, _slice_entries(S.device) // S.shape[2])
    return torch.cat([part.abs().sum(1) for part in torch.split(S.flatten(0, 1), rows)]).view(S.shape[:2])


def _slice_entries(device: torch.device) -> int:
    """Return the entries of a slice, of which there are temporaries: few enough for a CPU's cache."""
    return 5 << 15 if device.type == "cpu" else 1 << 21
