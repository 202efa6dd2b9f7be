"""Updates on several threads of a CPU: the result is that of one thread, and a failure leaves no thread running."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, LDAdam
from hf_lowmem_optim.optimizers import ldadam as ldadam_module
from hf_lowmem_optim.optimizers import side_by_side
from hf_lowmem_optim.optimizers.side_by_side import SIDE_BY_SIDE_ENTRIES, Job, goes_side_by_side, run_jobs

SHAPES = [(48, 200), (200, 48), (40, 40), (40, 40), (96, 70), (33,), (7, 3, 3, 3), (5,)]
#: Above what is one job of the dense rule, and not a multiple of it.
LARGE = (1030, 1025)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ldadam": [{"rank": 4}, {"rank": None}, {"rank": 4, "error_feedback": "fp32"}],
    "microadam": [{"min_compress_size": 1, "block_size": 64, "density": 0.1}, {"density": None}],
    "sparse_mfac": [{"block_size": 64}, {"block_size": 64, "scope": "tensor"}, {"density": None}],
    "sparse_ggt": [{"block_size": 64}],
    "lowrank_mfac": [{"rank": 2}],
}


@pytest.fixture(autouse=True)
def threads_come_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are to go to several threads here."""
    monkeypatch.setattr(side_by_side, "_LEAST_ENTRIES", 0)
    if importlib.util.find_spec("numba"):
        cpu_calls = importlib.import_module("hf_lowmem_optim.kernels.cpu_calls")
        monkeypatch.setattr(cpu_calls, "_LEAST_ENTRIES", 1)
        monkeypatch.setattr(cpu_calls, "_GROUP_ENTRIES", 256)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained(name: str, hyper: dict[str, Any], threads: int, dtype: torch.dtype) -> list[Any]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, LARGE] if hyper.get("rank", 0) is None or hyper.get("density", 0) is None else SHAPES
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = OPTIMIZERS[name].optimizer_class(weights, lr=1e-2, **hyper)
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.get_num_threads() == threads
    state = [value for key in optimizer.state for value in optimizer.state[key].values()]
    return [*weights, *(value for value in state if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "hyper"), [(name, h) for name in SETTINGS for h in SETTINGS[name]], ids=str)
def test_the_number_of_threads_changes_nothing(name: str, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    one = trained(name, hyper, 1, dtype)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(trained(name, hyper, threads, dtype), one, strict=True))


def test_a_failing_update_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def broken(param: torch.Tensor, *_: Any, **__: Any) -> None:
        if param.shape[0] == 30:
            raise ArithmeticError("on purpose")
        done.append(param.shape[0])

    monkeypatch.setattr(LDAdam, "update_function", staticmethod(broken))
    monkeypatch.setattr(ldadam_module, "update_stacked_", broken)
    torch.set_num_threads(2)
    weights = [nn.Parameter(torch.zeros(size, 33)) for size in range(30, 10, -1)]
    optimizer = LDAdam(weights, rank=2)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(ArithmeticError, match="on purpose"):
        optimizer.step()
    # the other thread has ended what it had begun, and takes no more
    ended = len(done)
    time.sleep(0.05)
    assert len(done) == ended
    assert torch.get_num_threads() == 2


def test_what_is_mostly_python_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    started: list[int] = []
    monkeypatch.setattr(side_by_side, "run_workers", lambda works, stop: started.append(len(works)))
    for least, size in ((1 << 15, 100), (1 << 15, 1 << 16), (0, 100)):
        monkeypatch.setattr(side_by_side, "_LEAST_ENTRIES", least)
        run_jobs([Job([torch.zeros(size)], lambda workspace: None) for _ in range(4)])
    assert started == [1, 2, 2]


def test_only_plain_small_tensors_of_a_cpu_go_side_by_side() -> None:
    assert goes_side_by_side(torch.zeros(3))
    assert goes_side_by_side(nn.Parameter(torch.zeros(SIDE_BY_SIDE_ENTRIES, dtype=torch.bfloat16)))
    assert not goes_side_by_side(torch.zeros(SIDE_BY_SIDE_ENTRIES + 1, dtype=torch.bfloat16))
    assert not goes_side_by_side(torch.zeros(3, device="meta"))
    assert not goes_side_by_side(torch.zeros(3).as_subclass(type("Wrapped", (torch.Tensor,), {})))
