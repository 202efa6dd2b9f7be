"""Compare storages of Dash's first moment m: how far they turn its step, and by what they miss Adam's length.

    python benchmarks/first_moment.py

Sixty steps on gradients of one block, 96 × 128. Means of the last ten: the cosine of L^(−1/4) m R^(−1/4)
to that of a float32 m, and ‖m/√v‖ relative to that of a float32 m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tables import markdown_table
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, quantize_
from hf_lowmem_optim.ops.inverse_root import InverseRoot, inverse_fourth_root
from hf_lowmem_optim.spec import QuantFormat

ROWS, COLUMNS, STEPS, COMPARED = 96, 128, 60, 10
_FORMAT = QuantFormat(8, 64)


def in_8_bits(x: Tensor) -> Tensor:
    """Return x as it comes back from 8 bits."""
    codes = torch.empty(x.numel(), dtype=torch.uint8)
    lo, hi = torch.empty(2, _FORMAT.num_blocks(x.numel()), dtype=_FORMAT.stat_dtype)
    stored, out = Quantized(codes, lo, hi, x.numel(), _FORMAT), torch.empty_like(x)
    quantize_(stored, x.contiguous())
    dequantize_(out, stored)
    return out


#: m as it comes back, from m and √v.
STORAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bf16": lambda m, unit: m.bfloat16().float(),
    "8 bits of m": lambda m, unit: in_8_bits(m),
    "8 bits of m/√v": lambda m, unit: in_8_bits((m / unit).masked_fill(unit == 0, 0)) * unit,
}


def gradients(kind: str) -> Iterator[Tensor]:
    """Yield random gradients: of full rank, of rank 8, or of a rank or with columns that the kind says."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    right, scales, row = random(8, COLUMNS), torch.logspace(0, -8, COLUMNS), random(ROWS)
    while True:
        yield {
            "full rank": lambda: random(ROWS, COLUMNS),
            "rank 8": lambda: random(ROWS, 8) @ right,
            "columns from 1 to 1e-8": lambda: random(ROWS, COLUMNS) * scales,
            "rank 1, columns from 1 to 1e-8": lambda: torch.outer(row + 0.3 * random(ROWS), scales),
        }[kind]()


def compare(kind: str, stored: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Return cosine and quotient of lengths."""
    L, R, m = torch.zeros(ROWS, ROWS), torch.zeros(COLUMNS, COLUMNS), torch.zeros(2, ROWS, COLUMNS)  # stored, exact
    found = []
    for t, G in zip(range(STEPS), gradients(kind), strict=False):
        L, R = 0.95 * L + 0.05 * G @ G.T, 0.95 * R + 0.05 * G.T @ G
        rho, tau = L.diagonal(), R.diagonal()
        unit = (torch.outer(rho, tau) / rho.sum()).sqrt()
        m = 0.9 * m + 0.1 * G
        if t >= STEPS - COMPARED:
            left, right = (inverse_fourth_root(A.double()[None], InverseRoot("eigh"))[0] for A in (L, R))
            step, exact = left @ m.double() @ right
            lengths = torch.linalg.vector_norm(m / unit, dim=(1, 2))
            found.append((float((step * exact).sum() / step.norm() / exact.norm()), float(lengths[0] / lengths[1])))
        m[0] = stored(m[0], unit)
    cosines, quotients = zip(*found, strict=True)
    return sum(cosines) / COMPARED, sum(quotients) / COMPARED


def main() -> None:
    """Print the table."""
    kinds = ("full rank", "rank 8", "columns from 1 to 1e-8", "rank 1, columns from 1 to 1e-8")
    lines = []
    for kind in kinds:
        results = [compare(kind, stored) for stored in STORAGES.values()]
        lines.append([kind, *(f"{cosine:.4f}, {quotient:.4g} ×" for cosine, quotient in results)])
    print(markdown_table(["gradients", *STORAGES], lines))


if __name__ == "__main__":
    main()
