"""Work on several threads: torch's own number of threads is left as it was, and failures come out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_lowmem_optim.kernels import workers
from hf_lowmem_optim.kernels.workers import MAX_WORKERS, num_workers, run_pieces, run_workers

pytestmark = pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch has no threads by caller here")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_function_has_a_thread_and_torch_with_one() -> None:
    at_once = threading.Barrier(3, timeout=30)
    seen: list[tuple[str, int]] = []

    def work() -> None:
        at_once.wait()
        seen.append((threading.current_thread().name, torch.get_num_threads()))

    for _ in range(2):
        seen.clear()
        run_workers([work] * 3, lambda: None)
        assert len({name for name, _ in seen}) == 3
        assert [threads for _, threads in seen] == [1, 1, 1]
        assert threading.current_thread().name in {name for name, _ in seen}
        assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_threads_of_openmp_do_not_wait_beside_the_workers() -> None:
    # threads are looked up by Linux's list of them, and not every build of torch brings OpenMP 5
    if workers._openmp_pause() is None or not Path("/proc/self/task").exists():
        pytest.skip("no OpenMP 5 or no list of threads")

    def threads() -> set[str]:
        return {entry.name for entry in Path("/proc/self/task").iterdir()}

    run_workers([lambda: None] * 3, lambda: None)  # the workers are there
    before = threads()
    numbers = torch.zeros(1 << 22)
    numbers.add_(1)
    waiting = threads() - before
    assert waiting
    seen: list[set[str]] = []
    run_workers([lambda: seen.append(threads())] * 3, lambda: None)
    assert not any(waiting & each for each in seen)
    # and the next operation has them again
    assert numbers.add_(1).sum() == 2 * len(numbers)
    assert len(threads() - before) == len(waiting)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_comes_out_when_all_have_ended(failing: int) -> None:
    ended, stopped = [], threading.Event()

    def fails() -> None:
        raise ArithmeticError("on purpose")

    def works() -> None:
        if failing == 0:
            assert stopped.wait(30)
        ended.append(True)

    functions = [works, works, works]
    functions[failing] = fails
    with pytest.raises(ArithmeticError, match="on purpose"):
        run_workers(functions, stopped.set)
    assert len(ended) == 2
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_pieces_cover_every_block_once(pieces: int) -> None:
    seen = run_pieces(lambda begin, first, stop: list(range(begin + first, begin + stop)), (5,), 10, pieces)
    assert len(seen) == pieces
    assert [block for piece in seen for block in piece] == list(range(5, 15))


def test_there_are_no_more_workers_than_jobs_and_threads() -> None:
    assert [num_workers(jobs) for jobs in (0, 1, 2, 5)] == [1, 1, 2, 3]
    torch.set_num_threads(MAX_WORKERS + 1)
    assert num_workers(1000) == MAX_WORKERS
    torch.set_num_threads(1)
    assert num_workers(1000) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_workers_of_its_own() -> None:
    script = """
import os, torch
from hf_lowmem_optim.kernels.workers import run_workers
torch.set_num_threads(2)
seen = []
run_workers([lambda: seen.append(1)] * 2, lambda: None)
child = os.fork()
if child == 0:
    run_workers([lambda: seen.append(2)] * 2, lambda: None)
    os._exit(0 if seen == [1, 1, 2, 2] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "0", done.stderr
