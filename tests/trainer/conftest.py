"""Lets hundreds of short runs of the Trainer take minutes, also on a busy machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def short_runs_are_fast() -> Iterator[None]:
    """Keep imported modules out of garbage collection, and threads from waiting for each other.

    ``Trainer.train`` collects garbage, which takes a second with the objects of all modules that are imported here;
    those stay until the process ends anyway, and what tests make is collected as always. And no tensor of the tiny
    models is large enough to be shared between threads, which on a busy machine spin while they wait.
    """
    num_threads = torch.get_num_threads()
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of processes that tests start
        yield
    torch.set_num_threads(num_threads)
    gc.unfreeze()
