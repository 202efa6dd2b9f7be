"""Why LDAdam multiplies with loops of its own on a CPU: products with a thin factor, beside torch's.

    python benchmarks/thin_products.py

GFLOP/s of one thread, the best of interleaved rounds, for a matrix X (n, m) and factors of r columns or rows: leftᵀX,
X·rightᵀ and X + left·right. Needs numba (extra ``cpu``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numba
import numpy as np
import torch
from machine import describe_machine

from hf_lowmem_optim.kernels import thin_products

Product = Callable[[], object]


# numba has no annotations for its arrays: what it compiles is untyped here as in the package


@numba.njit(nogil=True)
def _transposed_product(left, X, out):  # type: ignore[no-untyped-def]
    thin_products.transposed_product(left, X, out, 0, X.shape[1])


@numba.njit(nogil=True)
def _product_with_transposed(X, right, out):  # type: ignore[no-untyped-def]
    thin_products.product_with_transposed(X, right, out, 0, X.shape[0])


@numba.njit(nogil=True)
def _add_product(X, left, right):  # type: ignore[no-untyped-def]
    thin_products.add_product(X, left, right, np.float32(1.0), np.float32(-1e-3), 0, X.shape[0])


def products(n: int, m: int, r: int) -> dict[str, tuple[Product, Product]]:
    """Each product with the loops and with torch."""
    generator = torch.Generator().manual_seed(0)
    X, left, right = (torch.randn(*shape, generator=generator) for shape in ((n, m), (r, n), (r, m)))
    out, tall = torch.empty(r, m), torch.empty(r, n)
    x, a, b, into, tall_into = (tensor.numpy() for tensor in (X, left.mT, right, out, tall.mT))
    return {
        "leftᵀX": (lambda: _transposed_product(a, x, into), lambda: torch.mm(left, X, out=out)),
        "X·rightᵀ": (
            lambda: _product_with_transposed(x, b, tall_into),
            lambda: torch.mm(X, right.mT, out=tall.mT),
        ),
        "X + left·right": (
            lambda: _add_product(x, a, b),
            lambda: torch.addmm(X, left.mT, right, alpha=-1e-3, out=X),
        ),
    }


def best_seconds(functions: tuple[Product, ...], rounds: int) -> list[float]:
    """The best of interleaved rounds of three calls each."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(3):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / 3)
    return best


def main() -> None:
    """Time all products in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{describe_machine()['processor']}, torch {torch.__version__}, numba {numba.__version__}")
    print("| n × m | r | product | loops | torch |")
    print("|---|---|---|---|---|")
    for n, m in ((384, 384), (1536, 384), (1024, 2720)):
        for r in (16, 128):
            for name, functions in products(n, m, r).items():
                loops, library = (2e-9 * n * m * r / seconds for seconds in best_seconds(functions, rounds))
                print(f"| {n} × {m} | {r} | {name} | {loops:.0f} | {library:.0f} |")


if __name__ == "__main__":
    main()
