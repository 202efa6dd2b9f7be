"""Time each stage of LDAdam's fused step on a GPU, with its own tile and with others, beside what it must move.

    python benchmarks/gpu_stages.py --save benchmarks/results/gpu_stages.json

Eight matrices of 4096 × 4096 and four of 11008 × 4096, bfloat16, a 4-bit error: the shapes of Llama-7B. The bytes of a
stage are those of gradients, error and weights; the factors are small beside them, or in the second-level cache. Which
tile is best cannot be known without a device: the kernels are not tuned at run time, because they work in place.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import describe_run, save_run
from torch import Tensor

from hf_lowmem_optim.engine.buckets import allocate_stacked
from hf_lowmem_optim.ops.dispatch import chosen_backend
from hf_lowmem_optim.ops.low_rank import Coefficients
from hf_lowmem_optim.optimizers.ldadam import LDAdamOptions, ldadam_state

SHAPES = (((4096, 4096), 8), ((11008, 4096), 4))
RANKS = (16, 128)
#: Bytes an entry of gradient, 4-bit error with its statistics, and weight, read and written.
_READ, _ERROR, _WEIGHT = 2 + 0.5625, 0.5625, 4.0
_REPEATS = 5
#: TERMS, ROWS, COLS, warps, stages to try, by rank: of the products with a, and of the last launch.
_MULTIPLY = {
    16: ((16, 64, 128, 4, 2), (16, 64, 128, 4, 3), (16, 64, 64, 4, 2), (16, 64, 64, 4, 3), (16, 128, 64, 4, 2)),
    128: ((128, 64, 64, 8, 2), (128, 64, 128, 8, 2), (128, 128, 64, 8, 2), (128, 64, 64, 4, 2)),
}
_APPLY = {
    16: ((16, 64, 64, 4, 2), (16, 64, 128, 4, 2), (16, 64, 128, 8, 2), (16, 32, 64, 4, 2), (16, 32, 128, 4, 2)),
    128: ((32, 64, 64, 8, 2), (32, 64, 128, 8, 2), (32, 64, 64, 4, 2), (64, 64, 64, 4, 2), (32, 128, 64, 8, 2)),
}


def milliseconds(action: Callable[[], object]) -> float:
    """Return the median time of an action on the device, after one that is not timed."""
    action()
    times = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def stages(
    shape: tuple[int, int], count: int, rank: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], float]]:
    """Return the stages of a later step, and the bytes of each that grow with the matrices."""
    from hf_lowmem_optim.ops.triton import ldadam_step, residual
    from hf_lowmem_optim.ops.triton.ldadam import update_moments_
    from hf_lowmem_optim.ops.triton.low_rank import orthonormal_columns

    options = LDAdamOptions(rank=rank)
    specs = ldadam_state(shape, torch.bfloat16, options)
    assert specs is not None
    parts = allocate_stacked(specs, count, device)
    state = {key: torch.stack([part[key] for part in parts]) for key in specs}
    state["basis"].copy_(orthonormal_columns(torch.randn_like(state["basis"])))
    state["exp_avg"].normal_()
    state["exp_avg_sq"].uniform_(1, 2)
    state["error_codes"].random_(0, 256)
    state["error_lo"].fill_(-1e-3)
    state["error_hi"].fill_(1e-3)
    g = [torch.randn(shape, device=device).bfloat16() for _ in range(count)]
    W: list[Tensor] = [torch.randn(shape, device=device).bfloat16() for _ in range(count)]
    products, numbers = ldadam_step._products(options), Coefficients.of_step(7, options)
    a, tall = residual.Residual(g, state, "4bit", products), shape[0] > shape[1]
    m, v, old = state["exp_avg"], state["exp_avg_sq"], state["basis"]
    V, Y, U = torch.empty_like(m).mT, torch.randn_like(old), orthonormal_columns(torch.randn_like(old))
    R, factors = U.mT @ old, torch.empty(count, 2 * rank, m.shape[2], device=device)
    entries = count * shape[0] * shape[1]
    read, written = _READ * entries, (_READ + _ERROR + _WEIGHT) * entries
    return {
        "sketch V": (lambda: a.multiply(old, V, over_rows=not tall, weight=0.1, onto=m.mT, onto_weight=0.9), read),
        "sketch Y": (lambda: a.multiply(V, torch.empty_like(Y), over_rows=tall, weight=0.1), read),
        "orthonormalize": (lambda: orthonormal_columns(Y), 0.0),
        "projection": (lambda: a.multiply(U, V, over_rows=not tall), read),
        "moments": (lambda: update_moments_(R, m, v, V.mT, factors, numbers), 0.0),
        "apply": (lambda: ldadam_step._apply_(W, a, (old, U, factors, V.mT), numbers, None), written),
        "step": (lambda: ldadam_step.later_step_(W, g, state, 7, options), 3 * read + written),
    }


def rows_of(shape: tuple[int, int], count: int, rank: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each stage, and for each tile of those that have one."""
    from hf_lowmem_optim.ops.triton import ldadam_step, residual

    found = stages(shape, count, rank, torch.device("cuda"))
    own = residual.multiply_tile, residual.apply_tile
    tiled = itertools.chain(
        ((name, None) for name in found),
        *(((name, tile) for tile in _MULTIPLY[rank]) for name in ("sketch V", "sketch Y")),
        (("apply", tile) for tile in _APPLY[rank]),
    )
    for name, tile in tiled:
        if tile is not None:
            chosen = dict(zip(("TERMS", "ROWS", "COLS", "num_warps", "num_stages"), tile, strict=True))
            residual.multiply_tile = lambda *_, chosen=chosen: chosen
            ldadam_step.apply_tile = lambda *_, chosen=chosen: chosen
        action, moved = found[name]
        row: dict[str, Any] = {"shape": f"{shape[0]} × {shape[1]}", "matrices": count, "rank": rank, "stage": name}
        row["tile"] = "own" if tile is None else " ".join(map(str, tile))
        try:
            row["ms"] = round(milliseconds(action), 4)
            row["gb_per_s"] = round(moved / row["ms"] / 1e6) or None
        except Exception as error:  # a tile that does not fit is a finding
            row["problem"] = f"{type(error).__name__}: {error}"[:120]
        residual.multiply_tile, ldadam_step.apply_tile = own
        yield row


def main() -> None:
    """Time everything for as long as there is time, and print and save each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=70.0, help="begin no row after that")
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    chosen_backend(torch.device("cuda"))  # registers the kernels
    run = describe_run("gpu_stages", {"device": "cuda", "dtype": "bfloat16", "complete": False})
    deadline = time.monotonic() + arguments.seconds
    for (shape, count), rank in itertools.product(SHAPES, RANKS):
        for row in rows_of(shape, count, rank):
            run = replace(run, rows=[*run.rows, row])
            print(*(f"{value}" for value in row.values()), sep="  ", flush=True)
            if arguments.save:
                save_run(run, arguments.save)
            if time.monotonic() > deadline:
                print("no time left for the rest")
                return
        torch.cuda.empty_cache()
    if arguments.save:
        save_run(replace(run, settings={**run.settings, "complete": True}), arguments.save)


if __name__ == "__main__":
    main()
