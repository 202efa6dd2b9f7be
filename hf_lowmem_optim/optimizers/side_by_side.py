"""Updates of different tensors at the same time on a CPU, each on one thread.

The steps of one matrix are many and short, and some (QR, quantization, what Python does) use one thread whatever there
are: two matrices on two threads take less time than one after the other on both (``benchmarks/step_time.py``). A tensor
of up to :data:`SIDE_BY_SIDE_ENTRIES` is always updated on one thread, also where it is alone: so its result depends
neither on the number of threads nor on which other tensors are there. Larger ones, and those of a GPU, are updated one
after the other, with all threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.workers import num_workers, run_workers

__all__ = ["SIDE_BY_SIDE_ENTRIES", "Job", "goes_side_by_side", "run_jobs"]

#: The temporaries of larger matrices would be too many at once, and their products make good use of all threads.
SIDE_BY_SIDE_ENTRIES = 1 << 22
_LEAST_ENTRIES = 1 << 15


@dataclass(slots=True)
class Job:
    """An update that touches nothing that another one touches.

    Attributes:
        tensors: The parameters.
        run: Does it, with the temporary buffers that it is given.
    """

    tensors: Sequence[Tensor]
    run: Callable[[Workspace], None]

    @property
    def entries(self) -> int:
        """Of all parameters."""
        return sum([tensor.numel() for tensor in self.tensors])


def goes_side_by_side(tensor: Tensor) -> bool:
    """Whether a tensor is updated on one thread, beside others."""
    # a subclass (a sharded DTensor, a FakeTensor) may do more than arithmetic, which belongs to the thread that calls
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and tensor.numel() <= SIDE_BY_SIDE_ENTRIES


def run_jobs(jobs: Sequence[Job], workspace: Workspace | None = None) -> None:
    """Do all jobs, on a CPU those of small tensors side by side.

    Args:
        jobs: The jobs; the result does not depend on their order.
        workspace: Temporary buffers for jobs that the calling thread does; new ones if None.

    Raises:
        Exception: What a job raised, the first of several. No job is running any more then; others may not have run.
    """
    together: list[Job] = []
    others: list[Job] = []
    for job in jobs:
        (others if False in map(goes_side_by_side, job.tensors) else together).append(job)
    if num_workers() == 1:
        others = [*together, *others]
    elif together:
        _run_side_by_side(together)
    space = Workspace() if workspace is None else workspace
    for job in others:
        job.run(space)


def _run_side_by_side(jobs: Sequence[Job]) -> None:
    """Let every worker take the largest job that is left, until none is."""
    entries = [job.entries for job in jobs]
    by_size = sorted(range(len(jobs)), key=lambda index: -entries[index])
    left = deque(jobs[index] for index in by_size)

    @torch.no_grad()  # the mode is one of the thread
    def work() -> None:
        workspace = Workspace()
        try:
            while left:
                try:
                    job = left.popleft()
                except IndexError:  # another worker was faster
                    return
                job.run(workspace)
        except BaseException:
            left.clear()
            raise

    # Python's part of an update is done by one thread at a time: where it is most of it, a second thread is in the way
    pays = sum(entries) >= len(jobs) * _LEAST_ENTRIES
    run_workers([work] * (num_workers(len(jobs)) if pays else 1), left.clear)
