"""What storage formats keep: bits stored, bits that count, and bytes and time of a window's indices.

    python benchmarks/formats.py [--save benchmarks/results/formats.json]

GMSE is E‖x − x̂‖²/E‖x‖²; effective bits are −½·log2 GMSE, which for Gaussian numbers are at most the bits stored (arXiv
2506.01863). Statistics and indices count as stored. Errors and moments look Gaussian; what a window keeps is a tail,
the largest 1 % of blocks of 4096, for which formats rank otherwise.
"""

# numba finds the types of what its loops take
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from results import Row, describe_run, save_run
from tables import format_rows, packing_rows
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, quantize_
from hf_lowmem_optim.ops.window import decode, encode
from hf_lowmem_optim.spec import QuantFormat, quantized_specs

SEED, BLOCK, KEPT, BLOCKS = 0, 4096, 41, 1024
_LOW_BITS = 6  # ⌊log2(BLOCK/KEPT)⌋
_HIGH_BYTES = -(-(KEPT + (BLOCK >> _LOW_BITS)) // 8)
Format = tuple[str, float, Callable[[Tensor], Tensor]]


# ---- values --------------------------------------------------------------------------------------------------------


def block_quantized(x: Tensor, fmt: QuantFormat) -> Tensor:
    """Return what a block-quantized buffer gives back."""
    flat, out = x.reshape(-1), torch.empty(x.numel())
    buffer = Quantized(*(spec.allocate("cpu") for spec in quantized_specs(x.numel(), fmt).values()), x.numel(), fmt)
    quantize_(buffer, flat)
    dequantize_(out, buffer)
    return out.view(x.shape)


def scaled_fp8(x: Tensor) -> Tensor:
    """Return e4m3, scaled so that each row's largest number is the largest there is."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def largest_of(x: Tensor, among: int) -> Tensor:
    """Return the larger half of every so many neighbours in bfloat16, the others as zero."""
    groups = x.view(-1, among)
    kept = groups.abs().topk(among // 2).indices
    return torch.zeros_like(groups).scatter_(1, kept, groups.gather(1, kept).bfloat16().float()).view(x.shape)


def geometric(x: Tensor, bits: int) -> Tensor:
    """Return a window's values of so many bits, a block a row."""
    codes, lo, step = encode(x.contiguous(), bits)
    return decode(codes, lo[:, None], step[:, None], bits)


def power_of_two(x: Tensor) -> Tensor:
    """Return the nearest of ±2ʲ."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(mantissa.sign(), exponent - (mantissa.abs() < 0.75).int())


def bfloat16(x: Tensor) -> Tensor:
    """Return the nearest bfloat16."""
    return x.bfloat16().float()


#: Of Gaussian numbers in rows of 64.
DENSE: list[Format] = [
    ("bf16", 16.0, bfloat16),
    ("8bit (blocks of 64)", 8.5, partial(block_quantized, fmt=QuantFormat(8))),
    ("4bit (blocks of 64)", 4.5, partial(block_quantized, fmt=QuantFormat(4))),
    ("fp8 e4m3, scaled (blocks of 64)", 8.25, scaled_fp8),
    ("2:4 in bf16", 9.0, partial(largest_of, among=4)),
    ("larger half of 64 in bf16", 9.0, partial(largest_of, among=64)),
]
_GRID = 64 / KEPT  # lo and step
#: Of the largest of each block.
TAIL: list[Format] = [
    ("bf16", 16.0, bfloat16),
    ("geometric 8bit", 8 + _GRID, partial(geometric, bits=8)),
    ("geometric 4bit", 4 + _GRID, partial(geometric, bits=4)),
    ("geometric 3 bits", 3 + _GRID, partial(geometric, bits=3)),
    ("fp8 e4m3, scaled", 8 + 32 / KEPT, scaled_fp8),
    ("powers of two", 9.0, power_of_two),
]


def value_rows() -> Iterator[Row]:
    """Yield each format's bits, on what it is used for."""
    rng = np.random.default_rng(SEED)
    shape = BLOCKS, BLOCK
    for source, drawn in {
        "normal": rng.standard_normal(shape),
        "Laplace": rng.laplace(size=shape),
        "Student, 3 degrees": rng.standard_t(3, shape),
    }.items():
        x = torch.from_numpy(drawn.astype(np.float32))
        parts = [(DENSE, x.view(-1, 64), "all")] if source == "normal" else []
        largest = x.gather(1, x.abs().topk(KEPT).indices.sort().values)
        for formats, numbers, which in [*parts, (TAIL, largest, "1 %")]:
            for name, bits, stored in formats:
                gmse = float((stored(numbers) - numbers).double().square().sum() / numbers.double().square().sum())
                effective = -0.5 * np.log2(gmse)
                row: Row = {"table": "values", "numbers": f"{source}, {which}", "format": name, "stored_bits": bits}
                yield {**row, "gmse": gmse, "effective_bits": effective, "efficiency": effective / bits}


# ---- indices: rows of KEPT ascending ones, and as many codes of 4 bits ----------------------------------------------


@numba.njit
def _pack_words(indices, codes, out):
    words = out.view(np.uint16)
    for j in range(len(indices)):
        words[j] = indices[j] | codes[j] << 12


@numba.njit
def _unpack_words(packed, indices, codes):
    words = packed.view(np.uint16)
    for j in range(len(indices)):
        indices[j] = words[j] & 4095
        codes[j] = words[j] >> 12


@numba.njit
def _pack_apart(indices, codes, out):
    words = out[: 2 * len(indices)].view(np.uint16)
    for j in range(len(indices)):
        words[j] = indices[j]
    _pack_nibbles(codes, out[2 * len(indices) :])


@numba.njit
def _unpack_apart(packed, indices, codes):
    words = packed[: 2 * len(indices)].view(np.uint16)
    for j in range(len(indices)):
        indices[j] = words[j]
    _unpack_nibbles(packed[2 * len(indices) :], codes)


@numba.njit
def _pack_nibbles(codes, out):
    out[:] = 0
    for j in range(len(codes)):
        out[j >> 1] |= codes[j] << (4 * (j & 1))


@numba.njit
def _unpack_nibbles(packed, codes):
    for j in range(len(codes)):
        codes[j] = packed[j >> 1] >> (4 * (j & 1)) & 15


@numba.njit
def _pack_twelve(indices, codes, out):
    size = (3 * len(indices) + 1) // 2
    out[:size] = 0
    for j in range(len(indices)):
        at, odd = 3 * j // 2, j & 1
        if odd:
            out[at] |= (indices[j] & 15) << 4
            out[at + 1] = indices[j] >> 4
        else:
            out[at] = indices[j] & 255
            out[at + 1] = indices[j] >> 8
    _pack_nibbles(codes, out[size:])


@numba.njit
def _unpack_twelve(packed, indices, codes):
    for j in range(len(indices)):
        at = 3 * j // 2
        both = np.int32(packed[at]) | np.int32(packed[at + 1]) << 8
        indices[j] = both >> 4 if j & 1 else both & 4095
    _unpack_nibbles(packed[(3 * len(indices) + 1) // 2 :], codes)


@numba.njit
def _pack_elias_fano(indices, codes, out):
    """Six low bits each; the high ones as distances in unary: a 1 for each index, a 0 for each step of 64."""
    out[:] = 0
    low, n = out[_HIGH_BYTES:], len(indices)
    for j in range(n):
        place = (indices[j] >> _LOW_BITS) + j
        out[place >> 3] |= 1 << (place & 7)
        bit = _LOW_BITS * j
        part = (indices[j] & 63) << (bit & 7)
        low[bit >> 3] |= part & 255
        low[(bit >> 3) + 1] |= part >> 8
    _pack_nibbles(codes, low[(_LOW_BITS * n + 7) // 8 + 1 :])


@numba.njit
def _unpack_elias_fano(packed, indices, codes):
    low, n = packed[_HIGH_BYTES:], len(indices)
    j, place = 0, 0
    while j < n:
        if packed[place >> 3] >> (place & 7) & 1:
            bit = _LOW_BITS * j
            both = np.int32(low[bit >> 3]) | np.int32(low[(bit >> 3) + 1]) << 8
            indices[j] = (place - j) << _LOW_BITS | (both >> (bit & 7) & 63)
            j += 1
        place += 1
    _unpack_nibbles(low[(_LOW_BITS * n + 7) // 8 + 1 :], codes)


_NIBBLE_BYTES, _LOW_BYTES, _TWELVE_BYTES = (KEPT + 1) // 2, (_LOW_BITS * KEPT + 7) // 8 + 1, (3 * KEPT + 1) // 2
#: Bytes of a row's block of KEPT entries, and how it is packed and unpacked.
PACKINGS: dict[str, tuple[int, Any, Any]] = {
    "int16, codes apart": (2 * KEPT + _NIBBLE_BYTES, _pack_apart, _unpack_apart),
    "index and code in an int16": (2 * KEPT, _pack_words, _unpack_words),
    "12 bits, codes apart": (_TWELVE_BYTES + _NIBBLE_BYTES, _pack_twelve, _unpack_twelve),
    "Elias–Fano, codes apart": (_HIGH_BYTES + _LOW_BYTES + _NIBBLE_BYTES, _pack_elias_fano, _unpack_elias_fano),
}


@numba.njit
def _all_rows(loop, first, second, third, rows):
    for row in range(rows):
        loop(first[row], second[row], third[row])


def packing_times(rounds: int) -> Iterator[Row]:
    """Yield each packing's bytes and time per entry, the least of interleaved rounds; what comes back is checked."""
    rng = np.random.default_rng(SEED)
    indices = np.sort(np.argsort(rng.random((BLOCKS, BLOCK)), 1)[:, :KEPT], 1).astype(np.int32)
    codes = rng.integers(0, 16, (BLOCKS, KEPT)).astype(np.int32)
    times: dict[tuple[str, str], list[float]] = {}
    for round_ in range(rounds + 1):
        for name, (size, pack, unpack) in PACKINGS.items():
            packed = np.zeros((BLOCKS, size), np.uint8)
            again = np.zeros_like(indices), np.zeros_like(codes)
            for what, call in {
                "pack": (pack, indices, codes, packed),
                "unpack": (unpack, packed, *again),
            }.items():
                start = time.perf_counter()
                _all_rows(*call, BLOCKS)
                if round_:  # the first compiles
                    times.setdefault((name, what), []).append(time.perf_counter() - start)
            assert np.array_equal(again[0], indices) and np.array_equal(again[1], codes), name
    for name, (size, _, _) in PACKINGS.items():
        yield {
            "table": "indices",
            "packing": name,
            "bytes_per_entry": size / KEPT,
            "bits_per_index": 8 * size / KEPT - 4,
            "microadam_bytes_per_parameter": 0.5625 + 10 * (size + 8) / BLOCK,
            **{f"{what}_ns": 1e9 * min(times[name, what]) / (BLOCKS * KEPT) for what in ("pack", "unpack")},
        }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of timing")
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    run = describe_run("formats", {"seed": SEED, "threads": 1, "rounds": arguments.rounds})
    rows = [*value_rows(), *packing_times(arguments.rounds)]
    print(f"{format_rows(rows)}\n\n{packing_rows(rows)}")
    if arguments.save:
        save_run(replace(run, rows=rows), arguments.save)


if __name__ == "__main__":
    main()
