"""What only the numba versions have: pieces on threads, checked indices, a cache that may fail."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")
import numba

from hf_lowmem_optim.ops.block_quant import dequantize_add_, quantize_
from hf_lowmem_optim.ops.block_topk import TopK, foreach_block_topk_, num_kept
from hf_lowmem_optim.ops.cpu import block_quant, launch, sparse_window
from hf_lowmem_optim.ops.cpu.jit import Loop
from hf_lowmem_optim.ops.sparse_window import (
    SparseWindow,
    WindowStep,
    foreach_window_descend_,
    foreach_window_gram_rows,
    foreach_window_update_,
    window_combine_,
)
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import BF16, FP16, FP32, empty_quantized, same
from tests.ops.singles import window_descend_, window_gram_row, window_update_

Use = Callable[[str], str]

BLOCK_SIZE, DENSITY, WINDOW = 96, 0.05, 4
#: Entries of the tensors: several pieces, one entry, whole blocks, an odd last block.
SIZES = (1, 95, 96, 4 * 96, 1000, 777, 5)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set the number of threads, and have them share pieces of some blocks, however small the tensors."""
    for module in (launch, sparse_window):
        monkeypatch.setattr(module, "ENTRIES_PER_PIECE", 200)
    monkeypatch.setattr(block_quant, "ENTRIES_PER_THREAD_BETWEEN", 1)
    monkeypatch.setattr(launch, "_ENTRIES_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the operations on threads ---------------------------------------------------------------------------------------


def random_numbers(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of many magnitudes, few of them NaN or infinite."""
    x = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-6, 4, (numel,), generator=generator)
    place = torch.randint(0, 400, (numel,), generator=generator)
    return x.masked_fill(place == 0, torch.nan).masked_fill(place == 1, -torch.inf).to(dtype)


def steps_of_an_optimizer() -> list[Tensor]:
    """Five steps of every operation on tensors of all sizes and dtypes; returns all that they have written."""
    generator = torch.Generator().manual_seed(3)
    errors: list[Any] = [QuantFormat(4, 32), QuantFormat(8, 3, FP32), QuantFormat(4, 96, FP32), BF16, FP16, FP32, None]
    dtypes = itertools.cycle((FP32, BF16, FP16))
    selections, params, results = [], [], []
    for numel, kind in zip(SIZES, errors, strict=True):
        error = empty_quantized(numel, kind) if isinstance(kind, QuantFormat) else kind
        if isinstance(kind, torch.dtype):
            error = torch.zeros(numel, dtype=kind)
        shape = WINDOW, num_kept(numel, BLOCK_SIZE, DENSITY)
        values = torch.zeros(shape, dtype=FP32 if numel % 2 else BF16)
        selections.append((torch.zeros(shape, dtype=torch.int16), values, error, next(dtypes)))
        params.append(torch.randn(numel, generator=generator).to(next(dtypes)))
    for step in range(5):
        calls, windows = [], []
        for numel, (indices, values, error, dtype) in zip(SIZES, selections, strict=True):
            grad = random_numbers(numel, dtype, generator)
            seed = step if numel % 2 else None
            row = step % WINDOW
            calls.append(TopK(indices, values, row, grad, error, BLOCK_SIZE, DENSITY, error_scale=0.9, seed=seed))
            windows.append(SparseWindow(indices, values, numel, BLOCK_SIZE, 5))
        foreach_block_topk_(calls)
        results.append(foreach_window_gram_rows(windows, step % WINDOW))
        moments, weights = torch.rand(2, WINDOW, generator=generator), torch.rand(WINDOW, generator=generator)
        pairs = list(zip(params, windows, strict=True))
        foreach_window_update_([WindowStep(param, rows, moments, 0.1, 0.01, 1e-8) for param, rows in pairs])
        foreach_window_descend_([WindowStep(param, rows, weights, 0.2, 0.3) for param, rows in pairs])
        for window in windows:
            out = torch.ones(window.numel)
            window_combine_(out, window, weights)
            buffer = empty_quantized(window.numel, QuantFormat(4, 6))
            quantize_(buffer, out, seed=step)
            dequantize_add_(out, buffer, scale=0.7)
            results += [out, buffer.codes, buffer.lo, buffer.hi]
    for indices, values, error, _ in selections:
        stored = () if error is None else (error,) if isinstance(error, Tensor) else (error.codes, error.lo, error.hi)
        results += [indices, values, *stored]
    return [*results, *params]


def test_operations_agree_with_torch_on_any_number_of_threads(threads: Callable[[int], None], use: Use) -> None:
    use("reference")
    expected = steps_of_an_optimizer()
    finite = torch.cat([each.view(-1).isfinite() for each in expected])
    assert 0.7 < finite.double().mean() < 0.99
    use("cpu")
    alone = None
    for count in (1, 2, 3):
        threads(count)
        result = steps_of_an_optimizer()
        for one, other in zip(result, expected, strict=True):
            # sums of products, in another order: all else to the bit
            if one.dtype == torch.float64:
                torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0, equal_nan=True)
            else:
                assert same(one, other)
        alone = alone or result
        assert all(map(same, result, alone))


@pytest.mark.parametrize(
    ("place", "index"), [((1, 0), -1), ((0, 3), 96), ((2, 9), 32767), ((1, 10), 41), ((3, 10), -32768)]
)
def test_an_index_out_of_range_is_refused_before_anything_is_written_there(
    place: tuple[int, int], index: int, threads: Callable[[int], None], use: Use
) -> None:
    use("cpu")
    threads(2)
    # three blocks of 96, 96 and 41 entries, of which they keep 5, 5 and 2
    indices = torch.tensor([0, 20, 40, 60, 80] * 2 + [0, 40], dtype=torch.int16).repeat(WINDOW, 1)
    indices[place] = index
    window = SparseWindow(indices, torch.ones(indices.shape), 233, BLOCK_SIZE, 5)
    entries = 96 if place[1] < 10 else 41
    says = f"index {index} in row {place[0]} .*block {place[1] // 5} has {entries} entries"
    memory = torch.full((1 << 17,), 7.0)
    param = memory[1 << 16 :][:233]
    weights = torch.ones(2, WINDOW)
    with pytest.raises(ValueError, match=says):
        window_update_(param, window, weights, lr=0.1, eps=1e-8)
    with pytest.raises(ValueError, match=says):
        window_descend_(param, window, weights[0], lr=0.1)
    with pytest.raises(ValueError, match=says):
        window_combine_(param, window, weights[0])
    with pytest.raises(ValueError, match=says):
        window_gram_row(window, 2)
    assert (memory[: 1 << 16] == 7).all()
    assert (memory[(1 << 16) + 233 :] == 7).all()
    # a row that does not count may hold anything
    weights[:, place[0]] = 0
    window_update_(param, window, weights, lr=0.1, eps=1e-8)


# ---- pieces on threads -----------------------------------------------------------------------------------------------

MANY = 1 << 30


def test_results_are_in_order_and_every_thread_works(threads: Callable[[int], None]) -> None:
    threads(3)
    at_once = threading.Barrier(3, timeout=30)
    names = set()

    def piece(number: int, factor: int) -> int:
        if number < 3:
            at_once.wait()
        names.add(threading.current_thread().name)
        return number * factor

    assert launch.run_pieces(piece, ((n, 2) for n in range(50)), MANY) == list(range(0, 100, 2))
    assert len(names) == 3
    assert threading.current_thread().name in names


def test_one_thread_where_more_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pool(process: int) -> None:
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr(launch, "_pool", no_pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert launch.run_pieces(abs, [(-1,), (2,)], 2 * launch._ENTRIES_PER_THREAD - 1) == [1, 2]
    assert launch.run_pieces(abs, [], 0) == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert launch.run_pieces(abs, [(-1,)], MANY) == [1]


def test_pieces_are_whole_blocks_and_depend_on_sizes_only() -> None:
    for num_blocks, block_size in ((1, 4096), (100, 4096), (33, 4096), (7, 32768), (10**6, 1), (0, 64)):
        ends = launch.block_ranges(max(0, num_blocks * block_size - block_size // 2), block_size)
        assert [block for first, stop in ends for block in range(first, stop)] == list(range(num_blocks))
        assert all((stop - first) * block_size <= 1 << 17 for first, stop in ends)


class Started:
    """Pieces of which one fails, while another runs on the other thread until that has happened."""

    def __init__(self, failing: bool, error: BaseException) -> None:
        self.fails_here, self.error = failing, error
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.both = threading.Barrier(2, timeout=30)

    def piece(self, number: int) -> None:
        self.begun.append(number)
        if number < 2:
            self.both.wait()
        if (threading.current_thread() is threading.main_thread()) == self.fails_here:
            raise self.error
        time.sleep(0.2)
        self.ended.append(number)


@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize("error", [ArithmeticError("on purpose"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_stops_the_others_and_comes_out_when_they_have_ended(
    in_main_thread: bool, error: BaseException, threads: Callable[[int], None]
) -> None:
    threads(2)
    started = Started(in_main_thread, error)
    with pytest.raises(type(error)):
        launch.run_pieces(started.piece, ((n,) for n in range(100)), MANY)
    assert sorted(started.begun) == [0, 1]
    assert len(started.ended) == 1
    assert launch.run_pieces(abs, [(-1,)] * 3, MANY) == [1] * 3


def test_a_thread_that_finds_no_core_is_not_waited_for(threads: Callable[[int], None]) -> None:
    threads(2)
    pool, go_on = launch._pool(os.getpid()), threading.Event()
    busy = [pool.submit(go_on.wait) for _ in range(pool._max_workers)]
    try:
        assert launch.run_pieces(abs, [(-1,)] * 3, MANY) == [1] * 3
    finally:
        go_on.set()
    assert all(future.result(timeout=30) for future in busy)


def test_a_failure_while_a_piece_is_made_comes_out(threads: Callable[[int], None]) -> None:
    threads(3)

    def pieces() -> Iterator[tuple[int]]:
        yield (1,)
        yield (2,)
        raise LookupError("no third piece")

    with pytest.raises(LookupError, match="no third piece"):
        launch.run_pieces(abs, pieces(), MANY)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to one process")
def test_an_interrupt_while_waiting_for_a_thread_comes_out_when_it_has_ended(threads: Callable[[int], None]) -> None:
    threads(2)
    both, ended = threading.Barrier(2, timeout=30), []

    def piece(_: int) -> None:
        both.wait()
        if threading.current_thread() is not threading.main_thread():
            # the calling thread has nothing left to do but to wait
            for _ in range(2):
                time.sleep(0.2)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        launch.run_pieces(piece, [(0,), (1,)], MANY)
    assert ended == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    script = """
import os, torch
from hf_lowmem_optim.ops.cpu import block_quant, launch, sparse_window
torch.set_num_threads(3)
expected = list(range(50))
assert launch.run_pieces(abs, ((-n,) for n in expected), 1 << 30) == expected
child = os.fork()
if child == 0:
    os._exit(launch.run_pieces(abs, ((-n,) for n in expected), 1 << 30) != expected)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


# ---- compilation and its cache ---------------------------------------------------------------------------------------

SOURCE = """
from hf_lowmem_optim.ops.cpu.jit import loop

@loop
def double(x, count):
    for i in range(count):
        x[i] *= 2

@loop
def total(x, count):
    total = 0.0
    for i in range(count):
        total += x[i]
    return total

@loop
def wrong(x):
    return x.no_such_thing
"""


class Fresh:
    """A module with loops as a new process finds it."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.path = folder / "loops_of_a_test.py"
        self.path.write_text(SOURCE)

    def load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("loops_of_a_test", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def run(self) -> None:
        """Use both loops."""
        module, x = self.load(), torch.ones(4)
        module.double.run(x.numpy(), 4)
        assert module.total.run(x.numpy(), 4) == 8.0


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    monkeypatch.setattr(Loop, "_reported", False)
    made = Fresh(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(made.cache))
    return made


def records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hf_lowmem_optim.ops.cpu.jit"]


def test_a_loop_is_compiled_once_and_kept(fresh: Fresh, caplog: pytest.LogCaptureFixture) -> None:
    fresh.run()
    files = {path: path.stat().st_mtime_ns for path in fresh.cache.rglob("*.nb?")}
    assert len(files) == 4
    fresh.run()
    assert {path: path.stat().st_mtime_ns for path in fresh.cache.rglob("*.nb?")} == files
    module, x = fresh.load(), torch.ones(4)
    module.double.run(x.numpy(), 4)
    with pytest.raises(TypeError):  # not compiled for a second set of types
        module.double.run([1.0], 1)
    assert records(caplog) == []


def test_an_error_of_the_compilation_comes_out(fresh: Fresh, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(numba.TypingError, match="no_such_thing"):
        fresh.load().wrong.run(torch.ones(4).numpy())
    assert records(caplog) == []


def test_no_folder_that_can_be_written_to(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # files where folders would have to be: that stops a superuser, too
    for name in ("cache", "__pycache__", "home"):
        (fresh.path.parent / name).write_text("")
    for variable in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(fresh.path.parent / "home" / "cache"))
    if sys.platform == "win32":
        pytest.skip("the user's folder is not found by a variable")
    with caplog.at_level(logging.INFO):
        fresh.run()
        fresh.run()
    (said,) = records(caplog)
    assert "RuntimeError: cannot cache function" in said
    assert "NUMBA_CACHE_DIR" in said


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "text"])
def test_a_damaged_cache_is_done_without(
    suffix: str, damage: str, fresh: Fresh, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.run()
    for path in fresh.cache.rglob(f"*.{suffix}"):
        whole = path.read_bytes()
        damaged = {"empty": b"", "half": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "text": b"<html>" * 99}
        path.write_bytes(damaged[damage])
    fresh.run()
    (said,) = records(caplog)
    assert "numba's cache cannot be used" in said


def test_numba_that_cannot_be_imported_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(
        'raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.3.")'
    )
    script = """
import torch
from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, quantize_
from hf_lowmem_optim.spec import QuantFormat, quantized_specs
specs = quantized_specs(100, QuantFormat())
buffer = Quantized(*(spec.allocate("cpu") for spec in specs.values()), 100, QuantFormat())
x = torch.zeros(100)
quantize_(buffer, torch.ones(100))
dequantize_(x, buffer)
assert (x == 1).all()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("numba is installed but cannot be imported (Numba needs NumPy 2.2 or less") == 1


def test_a_disabled_compiler_is_as_none() -> None:
    script = "import hf_lowmem_optim.ops.cpu.jit"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert "ImportError: NUMBA_DISABLE_JIT is set" in run.stderr
