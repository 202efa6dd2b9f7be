"""The cosine basis against its formula in float64; FFT against product; ties; what is shared and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_lowmem_optim.ops.constants import held_constant
from hf_lowmem_optim.ops.cosine_basis import (
    Basis,
    add_coefficients_,
    basis_columns,
    basis_constants,
    basis_matrix,
    largest_rows,
)
from tests.reference.dct_adamw import cosine_basis

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 5, 8, 12, 15, 64, 96, 300)


@pytest.mark.parametrize("kind", ["dct2", "dct3"])
@pytest.mark.parametrize("fft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_coefficients_and_columns(kind: str, fft: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in SIZES:
        basis, B = Basis(kind, n, fft), cosine_basis(n, int(kind[-1]))
        X = [torch.randn(n, 7, generator=generator).to(dtype), torch.randn(7, n, generator=generator).to(dtype).mT]
        S = torch.randn(2, n, 7, generator=generator)
        expected = S.double() + torch.stack([torch.tensor(B).T @ x.double() for x in X])
        add_coefficients_(S, X, basis)
        torch.testing.assert_close(S.double(), expected, rtol=0, atol=2e-6 * max(1, n / 64))
        chosen = torch.randint(n, (2, 4), generator=generator)
        columns = np.stack([B[:, each] for each in chosen.numpy()])
        np.testing.assert_allclose(basis_columns(basis, chosen).numpy(), columns, rtol=0, atol=4e-8)


@pytest.mark.parametrize("n", [1000, 4096])
def test_the_matrix_is_orthogonal_and_has_the_bits_of_its_table(n: int) -> None:
    C = basis_matrix(Basis("dct3", n, False), CPU)
    assert C.dtype == torch.float32
    # a few rows, in float64: each is the rounded value of the formula
    rows = np.array([0, 1, n // 3, n - 1])
    exact = np.sqrt(2 / n) * np.cos(np.pi / (2 * n) * (rows[:, None] * (2 * np.arange(n)[None, :] + 1) % (4 * n)))
    exact[0] = np.sqrt(1 / n)
    assert np.abs(C[rows].double().numpy() - exact).max() <= 2.0**-24 * np.sqrt(2 / n)
    chosen = C[:: n // 50].double()
    assert (chosen @ chosen.T - torch.eye(len(chosen))).abs().max() <= 4e-7
    transposed = basis_matrix(Basis("dct2", n, False), CPU)
    assert torch.equal(transposed, C.mT) and transposed.data_ptr() == C.data_ptr()
    assert torch.equal(basis_columns(Basis("dct3", n, True), torch.tensor([[3, 7]]))[0], C[:, [3, 7]])


def test_wide_matrices_go_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which changes no bit of a transform by FFT, as every column has its own."""
    x, results = torch.randn(64, 9000, generator=torch.Generator().manual_seed(0)), []
    for part in (x, x[:, 4000:4100]):
        S = torch.zeros(1, *part.shape)
        add_coefficients_(S, [part], Basis("dct3", 64, True))
        results.append(S)
    assert torch.equal(results[0][:, :, 4000:4100], results[1])
    narrow, S = x.bfloat16(), torch.zeros(1, *x.shape)
    add_coefficients_(S, [narrow], Basis("dct2", 64, False))
    expected = basis_matrix(Basis("dct2", 64, False), CPU).mT @ narrow.float()
    torch.testing.assert_close(S[0], expected, rtol=0, atol=1e-5)


def test_a_random_basis_is_orthogonal_the_same_every_time_and_nobodys_stream() -> None:
    legacy = np.random.get_state
    before = torch.get_rng_state(), legacy()[1].copy()
    first = basis_matrix(Basis("random", 51, False), CPU)
    assert (first.double().T @ first.double() - torch.eye(51)).abs().max() <= 4e-7
    assert first.data_ptr() == basis_matrix(Basis("random", 51, False), CPU).data_ptr()
    assert torch.equal(torch.get_rng_state(), before[0]) and (legacy()[1] == before[1]).all()
    # another one would end the runs that use this
    expected = np.linalg.qr(np.random.default_rng(0).standard_normal((51, 51)))[0]
    np.testing.assert_allclose(first.numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
def test_the_largest_rows_with_ties_to_the_lowest_index(ranking: str) -> None:
    S = torch.zeros(3, 600, 5)
    S[1] = 1.0
    S[2, ::3] = 1.0
    S[2, 500] = float("inf")
    S[2, 7] = float("nan")
    S[1, 450, 2] = -2.0
    assert largest_rows(S, 4, ranking).tolist() == [[0, 1, 2, 3], [0, 1, 2, 450], [0, 3, 7, 500]]
    values = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
    norms = values.abs().sum(2) if ranking == "l1" else values.square().sum(2)
    assert torch.equal(largest_rows(values, 9, ranking), norms.topk(9).indices.sort().values)


def test_constants_are_described_before_they_are_made() -> None:
    product, fft = Basis("dct3", 53, False), Basis("dct2", 53, True)
    (key, spec), (other, table) = (*basis_constants(product, CPU).items(), *basis_constants(fft, CPU).items())
    assert held_constant(key) is None and held_constant(other) is None
    assert (spec.nbytes, spec.component, table.nbytes) == (4 * 53**2, "dct_basis", 16 * 53)
    for basis in (product, fft):
        add_coefficients_(torch.zeros(1, 53, 3), [torch.ones(53, 3)], basis)
    assert held_constant(key).nbytes == spec.nbytes and held_constant(other).nbytes == table.nbytes
    assert not basis_constants(Basis("identity", 53, False), CPU)
    assert basis_constants(Basis("dct2", 53, False), CPU) == {key: spec}
