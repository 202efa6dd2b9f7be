"""Averages over workers: their values and bytes, and that a worker that differs is named by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.engine import averaging
from hf_lowmem_optim.engine.averaging import (
    average_,
    broadcast_,
    check_agreement,
    check_finite,
    fingerprint,
    num_workers,
    warn_of_equal_gradients,
)
from tests.local_updates.jobs import warnings_of_the_package
from tests.sharding.processes import launch

#: Some larger than a bucket of the test, some that share one, an empty one, a scalar, and two that are not contiguous.
SHAPES = [(300, 7), (3,), (0, 4), (), (64, 33), (5, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def tensors_of(rank: int) -> list[Tensor]:
    """Return what a worker has before an average."""
    random = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(s, generator=random, dtype=torch.float64).to(d) for d in DTYPES for s in SHAPES]
    odd = torch.randn(40, 30, generator=random).t(), torch.randn(6, 20, generator=random)[:, ::2]
    return [*tensors, *odd]


def averages(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Average, send and check, and return what there is afterwards."""
    averaging.BUCKET_BYTES = 1 << 12
    told = {}
    calls: list[int] = []
    reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, **others: Any) -> Any:
        calls.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, **others)

    torch.distributed.all_reduce = counted
    for name, dtype in (("own", None), ("bf16", torch.bfloat16)):
        tensors = tensors_of(rank)
        told[f"{name} bytes"] = average_(tensors, dtype=dtype)
        told[f"{name} calls"] = list(calls)
        told[name] = tensors
        calls.clear()
    torch.distributed.all_reduce = reduce
    sent = [torch.arange(5000, dtype=torch.int16) * (rank + 1), torch.full((3, 2), rank), torch.eye(3)[:, :2] + rank]
    told["broadcast bytes"] = broadcast_(sent, source=1)
    told["broadcast"] = sent
    part = torch.distributed.new_group([0, world - 1])
    if rank in (0, world - 1):
        told["part"] = torch.tensor([float(rank)])
        average_([told["part"]], part)
        with pytest.raises(RuntimeError, match=rf"^rank {world - 1} has NaN or infinity in 'second'"):
            check_finite([torch.ones(2), torch.tensor([torch.inf if rank else 1.0])], ["first", "second"], part)
    large = [torch.tensor([1e300], dtype=torch.float64), torch.ones(0)]
    check_finite(large, ["a", "b"])
    faulty = [torch.tensor([torch.nan if rank == 1 else 0]), torch.tensor([-torch.inf if rank < 2 else 1])]
    with pytest.raises(RuntimeError, match=r"^rank 0 has NaN or infinity in 'b' and rank 1 has NaN or infinity in 'a'"):
        check_finite(faulty, "ab")
    check_agreement("sync_every=4\nweight (3, 2)")
    with pytest.raises(ValueError, match=r"rank 1 differ from rank 0, .*'sync_every=4' where rank 1 has '.*=8'"):
        check_agreement(f"weight (3, 2)\nsync_every={8 if rank == 1 else 4}")
    with pytest.raises(ValueError, match=r"'1 lines' where rank 1 has '2 lines'"):
        check_agreement("a" if rank == 0 else "a\nb")
    told["equal"] = []
    for gradients in ([torch.ones(3), torch.zeros(2)], [torch.ones(3) * (rank + 1)], [torch.zeros(3)]):
        with warnings_of_the_package() as warned:
            warn_of_equal_gradients(gradients)
        told["equal"].append(len(warned) == 1 and "all workers have the same gradients" in warned[0])
    return told


def test_all_workers_get_the_mean_and_count_what_they_send(tmp_path: Path) -> None:
    (results,) = launch([(f"{__name__}:averages", 3)], tmp_path)
    before, first = [tensors_of(rank) for rank in range(3)], results[0]
    for name, tolerance in (("own", 0.0), ("bf16", 2.0**-7)):
        for index, mine in enumerate(first[name]):
            assert all(torch.equal(mine, other[name][index]) for other in results)
            exact = sum(worker[index].double() for worker in before) / 3
            # sums and quotient in the dtype sent, one rounding to the tensor's own
            sizes = max((worker[index].abs().double().max() for worker in before if mine.numel()), default=0)
            own = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-51}[mine.dtype]
            assert mine.numel() == 0 or (mine.double() - exact).abs().max() <= sizes * max(own, tolerance)
    entries = {dtype: sum(t.numel() for t in before[0] if t.dtype == dtype) for dtype in DTYPES}
    assert first["own bytes"] == sum(first["own calls"])
    assert first["own bytes"] == 4 * (entries[torch.float32] + entries[torch.bfloat16]) + 8 * entries[torch.float64]
    assert first["bf16 bytes"] == sum(first["bf16 calls"]) == 2 * sum(entries.values())
    # full buckets, but the last of each dtype
    assert sum(size < 1 << 12 for size in first["own calls"]) == 3 and max(first["own calls"]) == 1 << 12
    assert first["broadcast bytes"] == 2 * 5000 + 8 * 6 + 4 * 6
    for result in results:
        sent = result["broadcast"]
        assert torch.equal(sent[0], torch.arange(5000, dtype=torch.int16) * 2)
        assert torch.equal(sent[1], torch.ones(3, 2, dtype=torch.int64)) and torch.equal(
            sent[2], torch.eye(3)[:, :2] + 1
        )
        assert result["equal"] == [True, False, False]
    assert results[0]["part"] == results[2]["part"] == 1


def test_one_process_alone_sends_nothing() -> None:
    tensor = torch.tensor([torch.nan])
    check_finite([tensor], ["weight"])
    check_agreement("alone")
    assert num_workers() == 1 and average_([tensor]) == broadcast_([tensor]) == 0
    with warnings_of_the_package() as warned:
        warn_of_equal_gradients([torch.ones(1)])
    assert not warned


def test_a_fingerprint_is_of_bits() -> None:
    for dtype in (*DTYPES, torch.float16, torch.uint8):
        tensor = torch.arange(1, 13).to(dtype).view(3, 4)
        assert fingerprint(tensor) == fingerprint(tensor.t()) != fingerprint(tensor + 1)
    # added up without rounding, where a norm would not see it
    large = torch.full((10**5,), 2.0**20)
    small = large.clone()
    small[7] += 2.0**-3
    assert fingerprint(large) != fingerprint(small) and large.norm() == small.norm()
