"""Compiled loops on torch's own threads, or on ours where torch's cannot be had."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

np = pytest.importorskip("numpy")
numba = pytest.importorskip("numba")

from hf_lowmem_optim.kernels import native_loops  # noqa: E402  # after the line that skips where numba is not
from hf_lowmem_optim.kernels.cpu_calls import fetch_add  # noqa: E402  # as above
from hf_lowmem_optim.kernels.native_loops import NativeLoop, num_threads, run_native  # noqa: E402  # as above

THREADS = 3


def wait_and_count_at(numbers: Any) -> None:
    """Numbers there: threads that have begun, whether to go on, threads that have ended."""
    address = numba.carray(numbers, 3).ctypes.data
    fetch_add(address, 1)
    while fetch_add(address + 8, 0) == 0:
        pass
    fetch_add(address + 16, 1)


wait_and_count = NativeLoop(wait_and_count_at, numba.types.int64)


@pytest.fixture(params=["torch's threads", "own threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    if request.param == "own threads":
        monkeypatch.setattr(native_loops, "_team", lambda: None)
    elif native_loops._team() is None:
        # not every library of OpenMP has them, and not every build of torch has OpenMP
        pytest.skip("torch's library has no such functions here")
    yield request.param
    torch.set_num_threads(before)


def test_all_threads_run_it_while_the_first_one_prepares(threads: str) -> None:
    numbers, seen = np.zeros(3, np.int64), []

    def prepare() -> None:
        seen.append(threading.current_thread())
        if threads == "torch's threads":  # which need not Python's lock to begin
            deadline = time.monotonic() + 60
            while numbers[0] < THREADS - 1 and time.monotonic() < deadline:
                pass
        numbers[1] = 1

    for _ in range(3):
        numbers[:] = 0
        run_native(wait_and_count, numbers, THREADS, prepare, lambda: None)
        assert numbers.tolist() == [THREADS, 1, THREADS]
        assert torch.get_num_threads() == THREADS
    assert set(seen) == {threading.current_thread()}


def test_the_threads_are_those_that_torch_has() -> None:
    # as above; and threads are looked up by Linux's list of them
    if native_loops._team() is None or not Path("/proc/self/task").exists():
        pytest.skip("no such functions or no list of threads")
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    entries = torch.zeros(1 << 22)
    entries.add_(1)

    def listed() -> set[str]:
        return {entry.name for entry in Path("/proc/self/task").iterdir()}

    try:
        threads, numbers = listed(), np.array([0, 1, 0])
        run_native(wait_and_count, numbers, num_threads(2), lambda: None, lambda: None)
        assert numbers[2] == THREADS
        entries.add_(1)
        assert listed() <= threads
    finally:
        torch.set_num_threads(before)


def test_what_torch_does_meanwhile_is_right(threads: str) -> None:
    numbers, sums = np.zeros(3, np.int64), []

    def prepare() -> None:
        sums.append(torch.ones(1 << 22).sum().item())
        numbers[1] = 1

    run_native(wait_and_count, numbers, THREADS, prepare, lambda: None)
    assert sums == [1 << 22]
    assert torch.ones(1 << 22).sum().item() == 1 << 22


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_failure_comes_out_when_all_have_ended(threads: str, error: type[BaseException]) -> None:
    numbers = np.zeros(3, np.int64)

    def prepare() -> None:
        raise error("on purpose")

    def stop() -> None:
        numbers[1] = 1

    with pytest.raises(error, match="on purpose"):
        run_native(wait_and_count, numbers, THREADS, prepare, stop)
    assert numbers[0] == numbers[2] == THREADS - 1
    assert torch.ones(1 << 22).sum().item() == 1 << 22


def test_one_thread_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_loops, "run_workers", None)
    monkeypatch.setattr(native_loops, "_team", None)
    numbers = np.array([0, 1, 0])
    run_native(wait_and_count, numbers, num_threads(1), lambda: None, lambda: None)
    assert numbers.tolist() == [1, 1, 1]


def test_it_is_compiled_when_it_is_used() -> None:
    def function(numbers: Any) -> None:
        numba.carray(numbers, 1)[0] = 7

    loop = NativeLoop(function, numba.types.int64)
    assert not vars(loop).keys() & {"_compiled", "run"}
    numbers = np.zeros(1, np.int64)
    loop.run(numbers.ctypes.data)
    assert numbers.tolist() == [7]
