"""The next basis of LDAdam in three launches: orthonormal whatever the matrix, and that which torch finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops.low_rank import Coefficients, of_safe_size, orthonormalize
from tests.ops.backends import DEVICE, INTERPRETED, ON_GPU, QUIET, normal

sketch = pytest.importorskip("hf_lowmem_optim.ops.triton.sketch", exc_type=ImportError)
residual = pytest.importorskip("hf_lowmem_optim.ops.triton.residual", exc_type=ImportError)
pytestmark = [*([] if INTERPRETED else ON_GPU), QUIET]

NUMBERS = Coefficients(0.9, 0.1, 0.9, 0.99, 0.7, 1e-4, 1.0, 1e-2)
RANK, SHORT, LONG = 5, 70, 150
FULL = normal(SHORT, LONG, seed=1)
OF_RANK_2 = normal(SHORT, 2, seed=2) @ normal(2, LONG, seed=3)
#: a, how much momentum it has, and the columns of Y that are known beyond rounding. The directions that were added are
#: 4e-5 and 4e-11 of the others in Y: float64 products of columns tell the former ones apart.
MATRICES = {
    "any": (FULL, 1.0, 5),
    "huge": (FULL * 1e36, 1.0, 5),
    "nearly of rank 2": (OF_RANK_2 + 3e-2 * FULL, 0.0, 2),
    "all but of rank 2": (OF_RANK_2 + 3e-5 * FULL, 0.0, 2),
    "of rank 2": (OF_RANK_2, 0.0, 2),
    "zero": (FULL * 0, 0.0, 0),
}


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_basis_is_that_of_torch(kind: str, tall: bool) -> None:
    a, momentum, known = MATRICES[kind]
    a = torch.stack([a, FULL])
    g = [each.mT.contiguous() if tall else each for each in a]
    m = torch.stack([normal(RANK, LONG, seed=4 + i) for i in range(2)])
    m[0] *= momentum
    old = orthonormalize(torch.stack([normal(SHORT, RANK, seed=6 + i) for i in range(2)])).contiguous()
    U = old.clone()
    copy, R = sketch.move_basis_(residual.Residual(g, {}, "none", "ieee"), U, m, NUMBERS)
    assert torch.equal(copy, old)
    one = torch.eye(RANK, device=DEVICE)
    assert (U.mT @ U - one).abs().max() <= 1e-6
    assert (R - U.mT @ old).abs().max() <= 1e-6
    V = of_safe_size(torch.baddbmm(m, old.mT, a, beta=0.9, alpha=0.1).mT)
    expected = orthonormalize((old @ (m @ V)).baddbmm_(a, V, beta=0.9, alpha=0.1))
    alike = [columns(U[0], expected[0], known), columns(U[1], expected[1], RANK)]
    assert all((each - one[: len(each), : len(each)]).abs().sum() <= 1e-3 for each in alike)


def columns(U: Tensor, expected: Tensor, known: int) -> Tensor:
    """Return the products of the first columns, without signs."""
    return (U.mT @ expected)[:known, :known].abs()
