"""What only the numba versions have: pieces on threads, checked indices, a cache that may fail."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("numba")
import numba

from hf_lowmem_optim.ops.cpu import block_quant, jit, launch
from hf_lowmem_optim.ops.cpu.jit import Loop, _Compilation
from hf_lowmem_optim.ops.sparse_window import window_combine_
from hf_lowmem_optim.ops.window import SparseWindow
from tests.ops.backends import Use, python, same, window_descend_, window_gram_row, window_update_
from tests.ops.test_foreach import ODD, TENSORS, make_all, run

Threads = Callable[[int], None]
MANY = 1 << 30


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    """Set the number of threads, and have them share pieces of some blocks, however small the tensors."""
    monkeypatch.setattr(launch, "ENTRIES_PER_PIECE", 200)
    launch.block_ranges.cache_clear()
    monkeypatch.setattr(block_quant, "ENTRIES_PER_THREAD_BETWEEN", 1)
    monkeypatch.setattr(launch, "_ENTRIES_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
    launch.block_ranges.cache_clear()  # nobody else has pieces so small


def test_operations_agree_with_torch_on_any_number_of_threads(threads: Threads, use: Use) -> None:
    specs = [*TENSORS, *ODD]
    expected = run([make_all(use("reference"), spec) for spec in specs], 5)
    use("cpu")
    alone = None
    for count in (1, 2, 3):
        threads(count)
        result = run([make_all("cpu", spec) for spec in specs], 5)
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
def test_an_index_out_of_range_is_refused_and_nothing_written(place: Any, index: int, threads: Any, use: Use) -> None:
    use("cpu")
    threads(2)
    # three blocks of 96, 96 and 41 entries, of which they keep 5, 5 and 2
    indices = torch.tensor([0, 20, 40, 60, 80] * 2 + [0, 40], dtype=torch.int16).repeat(4, 1)
    indices[place] = index
    window = SparseWindow(indices, torch.ones(indices.shape), 233, 96, 5)
    entries = 96 if place[1] < 10 else 41
    memory = torch.full((1 << 17,), 7.0)
    param = memory[1 << 16 :][:233]
    weights = torch.ones(2, 4)
    for call in (
        lambda: window_update_(param, window, weights, lr=0.1, eps=1e-8),
        lambda: window_descend_(param, window, weights[0], lr=0.1),
        lambda: window_combine_(param, window, weights[0]),
        lambda: window_gram_row(window, 2),
    ):
        with pytest.raises(ValueError, match=f"{index} in row {place[0]} .*block {place[1] // 5} has {entries} ent"):
            call()
    assert (memory[: 1 << 16] == 7).all()
    assert (memory[(1 << 16) + 233 :] == 7).all()
    # a row that does not count may hold anything
    weights[:, place[0]] = 0
    window_update_(param, window, weights, lr=0.1, eps=1e-8)


def test_results_are_in_order_and_every_thread_works(threads: Threads) -> None:
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


@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize("error", [ArithmeticError("on purpose"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_stops_the_others_and_comes_out_at_the_end(in_main_thread: bool, error: Any, threads: Any) -> None:
    threads(2)
    both, begun, ended = threading.Barrier(2, timeout=30), [], []

    def piece(number: int) -> None:
        begun.append(number)
        if number < 2:
            both.wait()
        if (threading.current_thread() is threading.main_thread()) == in_main_thread:
            raise error
        time.sleep(0.2)  # until the other one has failed
        ended.append(number)

    with pytest.raises(type(error)):
        launch.run_pieces(piece, ((n,) for n in range(100)), MANY)
    assert sorted(begun) == [0, 1]
    assert len(ended) == 1
    assert launch.run_pieces(abs, [(-1,)] * 3, MANY) == [1] * 3


def test_a_thread_that_finds_no_core_is_not_waited_for(threads: Threads) -> None:
    threads(2)
    pool, go_on = launch._pool(os.getpid()), threading.Event()
    busy = [pool.submit(go_on.wait) for _ in range(pool._max_workers)]
    try:
        assert launch.run_pieces(abs, [(-1,)] * 3, MANY) == [1] * 3
    finally:
        go_on.set()
    assert all(future.result(timeout=30) for future in busy)


def test_a_failure_while_a_piece_is_made_comes_out(threads: Threads) -> None:
    threads(3)

    def pieces() -> Iterator[tuple[int]]:
        yield (1,)
        yield (2,)
        raise LookupError("no third piece")

    with pytest.raises(LookupError, match="no third piece"):
        launch.run_pieces(abs, pieces(), MANY)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to one process")
def test_an_interrupt_while_waiting_for_a_thread_comes_out_when_it_has_ended(threads: Threads) -> None:
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

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell has none
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.run_pieces(piece, [(0,), (1,)], MANY)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own_and_the_calling_one_works_alone_at_the_end() -> None:
    script = """
import os, threading, torch
from hf_lowmem_optim.ops.cpu import launch
torch.set_num_threads(3)
expected = list(range(50))
assert launch.run_pieces(abs, ((-n,) for n in expected), 1 << 30) == expected
child = os.fork()
if child == 0:
    os._exit(launch.run_pieces(abs, ((-n,) for n in expected), 1 << 30) != expected)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
def work():
    threading.main_thread().join()  # from then on no other thread is to be had
    assert launch.run_pieces(abs, ((-n,) for n in expected), 1 << 30) == expected
    print("done")
threading.Thread(target=work).start()
"""
    run = python("-W", "ignore", "-c", script)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


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


@dataclass
class Fresh:
    """A module with loops as a new process finds it."""

    path: Path
    cache: Path

    def load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("loops_of_a_test", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def run(self) -> ModuleType:
        """Use both loops."""
        module, x = self.load(), torch.ones(4)
        module.double.run(x.numpy(), 4)
        assert module.total.run(x.numpy(), 4) == 8.0
        return module

    def files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.cache.rglob("*.nb?")}


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    monkeypatch.setattr(Loop, "_reported", False)
    monkeypatch.setattr(_Compilation, "_said", False)
    made = Fresh(tmp_path / "loops_of_a_test.py", tmp_path / "cache")
    made.path.write_text(SOURCE)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(made.cache))
    return made


def messages(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hf_lowmem_optim.ops.cpu.jit"]


def records(caplog: Any) -> list[str]:
    """What is said besides that loops are compiled."""
    return [message for message in messages(caplog) if not message.startswith("numba compile")]


def test_a_loop_is_compiled_once_and_kept(fresh: Fresh, caplog: pytest.LogCaptureFixture) -> None:
    fresh.run()
    files = fresh.files()
    assert len(files) == 4
    explained, *times = messages(caplog)
    assert "once for each installation" in explained
    assert [re.sub(r"[\d.]+ s", "", each) for each in times] == [
        f"numba compiled the loop {name!r} in " for name in ("double", "total")
    ]
    caplog.clear()
    module = fresh.run()
    assert fresh.files() == files
    with pytest.raises(TypeError):  # not compiled for a second set of types
        module.double.run([1.0], 1)
    assert messages(caplog) == []


def test_an_error_of_the_compilation_comes_out(fresh: Fresh, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(numba.TypingError, match="no_such_thing"):
        fresh.load().wrong.run(torch.ones(4).numpy())
    assert records(caplog) == []


def test_no_folder_that_can_be_written_to(fresh: Fresh, monkeypatch: Any, caplog: Any) -> None:
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
def test_a_damaged_cache_is_done_without(suffix: str, damage: str, fresh: Fresh, caplog: Any) -> None:
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
    (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("Numba needs NumPy 2.2 or less.")')
    script = """
import torch
from hf_lowmem_optim.ops.block_quant import dequantize_, quantize_
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import empty_quantized, window_descend_, window_gram_row, window_update_
buffer, x = empty_quantized(100, QuantFormat()), torch.zeros(100)
quantize_(buffer, torch.ones(100))
dequantize_(x, buffer)
assert (x == 1).all()
"""
    run = python("-c", script, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("numba is installed but cannot be imported (Numba needs NumPy 2.2 or less") == 1


def test_a_disabled_compiler_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(ImportError, match="NUMBA_DISABLE_JIT is set"):
        runpy.run_path(jit.__file__)
