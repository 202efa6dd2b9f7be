"""Orthonormal bases of a few columns, by SVD once and by power iteration ever after, and the products around them."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import Op

__all__ = [
    "MOST_FACTOR_BYTES",
    "MOST_PROJECTION",
    "PRODUCTS_VARIABLE",
    "PROJECTION_NOISE",
    "Coefficients",
    "Products",
    "bound_projection_",
    "leading_left_singular_vectors",
    "of_safe_size",
    "orthonormalize",
    "orthonormalize_rows",
    "precision_of_products",
    "projection_noise",
    "seeded_sketch",
]

Products = Literal["ieee", "tf32x3", "tf32", "bf16"]
"""How fused kernels multiply float32 numbers: in full, as three products of TF32 numbers, as TF32, as bfloat16."""

PRODUCTS_VARIABLE = "HF_LOWMEM_OPTIM_PRODUCTS"

#: Of the largest projection of a column: what is smaller is rounding, of products and of the basis, up to 6e-7 of it.
PROJECTION_NOISE = 2.0**-20
#: Of a projection: larger ones count as this, so that squares of moments stay in float32's range.
MOST_PROJECTION = 2.0**56
#: What the factors of all matrices of one call may take, unless those of one take more.
MOST_FACTOR_BYTES = 1 << 28
#: Terms from which on a 4-bit error has bfloat16 products.
_MOST_TF32_TERMS = 64
#: Of columns of unit length, the least distance of one from those before it with which two passes are enough.
_LEAST_PIVOT = 1e-5
#: Devices on which a look at a number waits for nothing.
_READABLE: tuple[str, ...] = ("cpu",)
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_SEED = 0


class Coefficients(NamedTuple):
    """The numbers of one step of LDAdam.

    Attributes:
        momentum_weight: s.
        gradient_weight: 1 − ρ.
        beta1: β1.
        beta2: β2.
        correction: k.
        damping: δ.
        decay: Factor of W.
        step_size: Factor of U d.
    """

    momentum_weight: float
    gradient_weight: float
    beta1: float
    beta2: float
    correction: float
    damping: float
    decay: float
    step_size: float

    @classmethod
    def of_step(cls, t: int, o: Any) -> Coefficients:
        """Return those of step t for LDAdam's options; k is zero in the first, which has no old moments."""
        (β1, β2), c1, c2 = o.betas, 1 - o.betas[0] ** (t - 1), 1 - o.betas[1] ** (t - 1)
        # m̂/(√v̂ + eps) is m/(√v + eps·√(1 − β2ᵗ)) up to a factor that joins the step size
        root = (1 - β2**t) ** 0.5
        return cls(
            momentum_weight=o.rho / c1 if t > 1 else 0.0,
            gradient_weight=1 - o.rho,
            beta1=β1,
            beta2=β2,
            correction=c2 / c1**2 if t > 1 else 0.0,
            damping=o.eps * root,
            decay=1 - o.lr * o.weight_decay,
            step_size=o.lr * root / (1 - β1**t),
        )


def projection_noise(products: Products, terms: int) -> float:
    """Return :data:`PROJECTION_NOISE` for products of some precision over so many terms.

    Where operands are cut, that outweighs all other rounding: independent errors, of which the sum is like the root of
    their number beside entries of the column. Four times what rank-deficient matrices show at most.
    """
    cut = {"tf32": 2.0**-7, "bf16": 2.0**-4}.get(products)
    return PROJECTION_NOISE if cut is None else cut / math.sqrt(terms)


def precision_of_products(error_feedback: str, rank: int) -> Products:
    """Return how the fused kernels multiply: an error feeds back what a product rounds off, if it is no finer itself.

    Args:
        error_feedback: Storage of the error.
        rank: Terms of the products: with many of them, TF32 is what takes the time.

    Raises:
        ValueError: The environment variable that overrides the rule names no precision.
    """
    requested = os.environ.get(PRODUCTS_VARIABLE, "").strip()
    if requested:
        for known in get_args(Products):
            if known == requested:
                return known  # type: ignore[no-any-return]  # get_args has no types
        choices = ", ".join(get_args(Products))
        raise ValueError(
            f"{PRODUCTS_VARIABLE}={requested!r} names no precision: set it to one of {choices}, or unset it to "
            "choose by the storage of the error"
        )
    if error_feedback == "4bit":
        return "tf32" if rank <= _MOST_TF32_TERMS else "bf16"
    if error_feedback == "8bit":
        return "tf32"
    # three products do not compile for AMD's
    return "ieee" if torch.version.hip else "tf32x3"


def orthonormalize(Y: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a matrix, or of each of a batch, whatever its rank.

    That is Q of a QR decomposition, but for the signs of its columns.

    Args:
        Y: float32, shape (p, r) or (batch, p, r), p ≥ r.

    Returns:
        float32, the same shape, ‖UᵀU − I‖ ≤ 1e-5; the first i columns span what those of Y do, if that has i
        dimensions. From the first column that is not finite on, or everywhere, not finite.

    Raises:
        ValueError: Y is no such matrix.
    """
    if Y.dim() not in (2, 3) or Y.shape[-2] < Y.shape[-1] or Y.dtype != torch.float32:
        raise ValueError(
            f"Y must be float32 of shape (p, r) or (batch, p, r) with p ≥ r; got {Y.dtype} {tuple(Y.shape)}"
        )
    return _orthonormal_columns(Y)


@Op
def _orthonormal_columns(Y: Tensor) -> Tensor:
    """Return Q of the Householder QR decomposition."""
    basis: Tensor = torch.linalg.qr(Y)[0]
    return basis


def orthonormalize_rows(
    Y: Tensor, others: Sequence[Tensor]
) -> Generator[list[Tensor], None, tuple[Tensor, Tensor] | None]:
    """Orthonormalize the columns of matrices of which every process has some rows, by Cholesky QR twice.

    Args:
        Y: This process's rows, float32 (batch, rows, r).
        others: This process's rows of other matrices, float32 (batch, rows, any number of columns).

    Yields:
        Tensors that are to be added up over all processes, in place.

    Returns:
        The rows of U and, of all rows, Uᵀ times the others, side by side; None, on all processes, where columns nearly
        depend on each other or are not finite.
    """
    r = Y.shape[2]
    gram = Y.mT.double() @ Y.double()
    yield [gram]
    scale = gram.diagonal(dim1=1, dim2=2).rsqrt()
    factor, info = torch.linalg.cholesky_ex(gram * scale[:, :, None] * scale[:, None])
    # not `<`, which NaN is not; added up as well, so that processes whose libraries differ agree
    failed = (info != 0) | ~(factor.diagonal(dim1=1, dim2=2).amin(1) > _LEAST_PIVOT)
    failures = failed.any().to(torch.float32).view(1)
    columns = torch.linalg.solve_triangular(factor.mT, Y.double() * scale[:, None], upper=True, left=False).float()
    # the second time together with the products, which its factor corrects
    products = torch.cat([columns.mT @ each for each in (columns, *others)], dim=2)
    yield [products, failures]
    if float(failures) > 0:
        return None
    products = products.double()
    factor = torch.linalg.cholesky_ex(products[:, :, :r])[0]
    U = torch.linalg.solve_triangular(factor.mT, columns.double(), upper=True, left=False)
    return U.float(), torch.linalg.solve_triangular(factor, products[:, :, r:], upper=False).float()


def of_safe_size(V: Tensor) -> Tensor:
    """Return V, float32 [n, q, r], or in each matrix with entries beyond 2²⁰ a multiple.

    V ~ Aᵀ is to be multiplied by an A of its size, and only what the columns of AV span is asked for: AV is to stay in
    the range of float32, which |V| = |A| = 10¹⁹ would leave.
    """
    if V.device.type in _READABLE:  # where a norm is slow
        least, most = torch.aminmax(V.mT)
        if least.item() >= -(2.0**20) and most.item() <= 2.0**20:  # not if one is NaN
            return V
    excess: Tensor = torch.linalg.vector_norm(V, math.inf, dim=(1, 2), keepdim=True).mul_(2.0**-20).clamp_(min=1)
    return (V / excess).div_(excess)


def bound_projection_(p: Tensor) -> Tensor:
    """Take rounding noise and what would overflow out of projected gradients, float32 [n, r, q], in place.

    Entries below :data:`PROJECTION_NOISE` of the largest of their column count as zero, those beyond
    :data:`MOST_PROJECTION` as that.

    Returns:
        The argument.
    """
    size = p.abs()
    largest = size.amax(1, keepdim=True)
    if p.device.type not in _READABLE or not largest.amax().item() <= MOST_PROJECTION:
        p.div_((size * (1 / MOST_PROJECTION)).clamp_(min=1))  # unlike a clamp, it lets infinity become NaN
    return p.mul_(size.ge_(largest.mul_(PROJECTION_NOISE)))  # by ones and zeros: a CPU is slow with booleans


def seeded_sketch(rows: int, columns: int, device: torch.device, seed: int = _SEED) -> Tensor:
    """Return a fixed Gaussian matrix, float32 (rows, columns), drawn on the CPU whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)


def leading_left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` leading left singular vectors, in order of decreasing singular value.

    Exact where the decomposition is small or the rank is a large part of it, else the randomized SVD of Halko,
    Martinsson & Tropp (arXiv 0909.4061, algorithms 4.4 and 5.1) with a fixed sketch: the result depends neither on
    the global random state nor on the device that draws it.

    Args:
        matrix: float32, shape (p, q) with p ≤ q.
        rank: Number of vectors, at most p.

    Returns:
        float32, shape (p, rank), orthonormal columns. Columns of the identity if ``matrix`` is not finite, so that
        the values themselves carry the fault on, as they do in AdamW.
    """
    # One of them is NaN or infinite if an entry is; unlike isfinite of all entries, this takes no memory.
    least, most = torch.stack((matrix.amin(), matrix.amax())).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        return torch.eye(matrix.shape[0], rank, dtype=matrix.dtype, device=matrix.device)
    # A power of two, which changes no digit, keeps the products of entries of any size in the range of float32.
    exponent = math.frexp(max(-least, most))[1]
    scale = 2.0 ** -min(max(exponent, -100), 100) if abs(exponent) > 40 else 1.0
    width = rank + _OVERSAMPLING
    if 2 * width >= matrix.shape[0]:  # the exact decomposition is as cheap as the randomized one
        left: Tensor = torch.linalg.svd(matrix if scale == 1.0 else matrix * scale, full_matrices=False)[0]
        return left[:, :rank].contiguous()
    sketch = seeded_sketch(matrix.shape[1], width, matrix.device)
    basis = orthonormalize(matrix @ (sketch * scale))
    for _ in range(_POWER_ITERATIONS):
        basis = orthonormalize(matrix @ ((matrix.T @ (basis * scale)) * scale))
    projected = (basis * scale).T @ matrix
    rotation: Tensor = torch.linalg.eigh(projected @ projected.T)[1]
    # eigh sorts in ascending order
    return basis @ rotation.flip(1)[:, :rank]
