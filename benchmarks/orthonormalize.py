"""Why LDAdam finds its basis as it does: time and accuracy of ways to orthonormalize tall matrices.

    python benchmarks/orthonormalize.py
    python benchmarks/orthonormalize.py --device cuda --batch 1 24

Needs numba (extra ``cpu``), or on a GPU Triton. Per shape and method: best milliseconds of interleaved rounds,
‖UᵀU − I‖₂ for a well-conditioned matrix and for one whose columns span eight orders of magnitude and are nearly
dependent.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.orthonormalize import orthonormalize


def numba_loops() -> Callable[[Tensor], Tensor]:
    """Householder QR with numba's loops, which LDAdam's step has on a CPU."""
    import numba

    from hf_lowmem_optim.kernels.householder import orthonormalize_rows

    @numba.njit(nogil=True)
    def compiled(address: int, r: int, p: int) -> None:
        orthonormalize_rows(address, r, p)

    def loops(matrices: Tensor) -> Tensor:
        rows = matrices.mT.contiguous()
        for each in rows:
            compiled(each.data_ptr(), *each.shape)
        return rows.mT

    return loops


def householder(matrices: Tensor) -> Tensor:
    """LAPACK's QR, or cuSOLVER's."""
    return torch.linalg.qr(matrices)[0]


def cholesky_twice(matrices: Tensor) -> Tensor:
    """CholeskyQR2: Q ← Y·L⁻ᵀ with LLᵀ = YᵀY, two times."""
    identity = torch.eye(matrices.shape[-1], device=matrices.device)
    for _ in range(2):
        factor, _ = torch.linalg.cholesky_ex(matrices.mT @ matrices)
        matrices = matrices @ torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).mT
    return matrices


def cholesky_float64(matrices: Tensor) -> Tensor:
    """One CholeskyQR in float64."""
    wide = matrices.double()
    factor, _ = torch.linalg.cholesky_ex(wide.mT @ wide)
    return torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False).float()


def methods(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared on a device; the first is what is used there."""
    used = (
        {"Householder, numba": numba_loops()} if device.type == "cpu" else {"Cholesky or Householder": orthonormalize}
    )
    return {
        **used,
        "torch.linalg.qr": householder,
        "CholeskyQR2": cholesky_twice,
        "CholeskyQR in float64": cholesky_float64,
    }


def deviation(bases: Tensor) -> float:
    """The largest ‖UᵀU − I‖₂, NaN if the method failed."""
    wide = bases.double()
    gram = wide.mT @ wide - torch.eye(wide.shape[-1], dtype=torch.float64, device=wide.device)
    return float(torch.linalg.matrix_norm(gram, 2).max()) if torch.isfinite(gram).all() else float("nan")


def milliseconds(method: Callable[[Tensor], Tensor], matrices: Tensor) -> float:
    """Time of a call, until the device has finished it."""
    if matrices.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    method(matrices)
    if matrices.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Time all methods in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="how many matrices at once")
    arguments = parser.parse_args()
    device = arguments.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    print("| matrices | p × r | method | best ms | ‖UᵀU − I‖ | same, ill-conditioned |")
    print("|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    shapes = ((384, 16), (384, 128), (512, 16), (512, 128), (4096, 16), (4096, 128))
    for batch, (rows, rank) in itertools.product(arguments.batch, shapes):
        matrices = torch.randn(batch, rows, rank, generator=generator).to(device)
        ill = (matrices[..., :1] + 1e-4 * matrices) * torch.logspace(0, -8, rank, device=device)
        compared = methods(device)
        best = dict.fromkeys(compared, float("inf"))
        for _ in range(arguments.rounds):
            for name, method in compared.items():
                best[name] = min(best[name], milliseconds(method, matrices))
        for name, method in compared.items():
            good, bad = deviation(method(matrices)), deviation(method(ill))
            print(f"| {batch} | {rows} × {rank} | {name} | {best[name]:.3f} | {good:.1e} | {bad:.1e} |")


if __name__ == "__main__":
    main()
