"""What the processes of the tests do: each function is called with its rank, the number of processes, and a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # which a first step imports, in every process
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hf_lowmem_optim import LDAdam, LocalUpdates, MicroAdam, OuterNesterov, keep_gradients_local
from hf_lowmem_optim.engine.averaging import SyncedOptimizer
from tests.reference.local_updates import batch

SHAPE = (6, 10)
STEPS = 10
ADAM: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
#: Schedules: arguments of LocalUpdates, and those of the reference.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local adam": ({"sync_every": 4}, {"periods": {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}}),
    "every step": ({"sync_every": 1}, {"periods": {"params": 1, "exp_avg": 1, "exp_avg_sq": 1}}),
    "weights only": ({"sync_every": 3, "average": ("params",)}, {"periods": {"params": 3}}),
    "des-loc": ({"sync_every": (own := {"params": 1, "exp_avg": 3, "exp_avg_sq": 6})}, {"periods": own}),
    "outer": (
        {"sync_every": 3, "outer": OuterNesterov(0.7, 0.9)},
        {"periods": dict.fromkeys(("params", "exp_avg", "exp_avg_sq"), 3), "outer": (0.7, 0.9)},
    ),
}


def start_weight(dtype: torch.dtype = torch.float64) -> Tensor:
    # in memory that torch aligned: the last bit may depend on that
    return torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE)).to(dtype, copy=True)


def backward(weight: Tensor, worker: int, t: int) -> Tensor:
    """Compute the gradient of a worker's step, and return the loss."""
    x, y = (torch.from_numpy(each).to(weight.dtype) for each in batch(worker, t, *SHAPE))
    weight.grad = None
    loss = (x @ weight.T - y).square().mean()
    loss.backward()
    return loss


def run(
    optimizer: LocalUpdates, weight: Tensor, worker: int, steps: int = STEPS, begin: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Train, and yield weights and moments after each step."""
    for t in range(begin + 1, steps + 1):
        backward(weight, worker, t)
        optimizer.step()
        moments = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
        yield {key: value.detach().clone() for key, value in {"params": weight, **moments}.items()}


@contextmanager
def warnings_of_the_package() -> Iterator[list[str]]:
    """Collect what the package logs."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("hf_lowmem_optim")
    package.addHandler(handler)
    try:
        yield told
    finally:
        package.removeHandler(handler)


def schedules(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train by every schedule in float64; local Adam in float32 too, and with the workers in another order."""
    found: dict[str, Any] = {}
    cases = [(name, torch.float64, "") for name in SCHEDULES]
    cases += [("local adam", torch.float32, ""), ("local adam", torch.float64, " permuted")]
    for name, dtype, order in cases:
        weight = nn.Parameter(start_weight(dtype))
        optimizer = LocalUpdates(AdamW([weight], **ADAM), **SCHEDULES[name][0])
        assert isinstance(optimizer, SyncedOptimizer)
        with warnings_of_the_package() as told:
            steps = list(run(optimizer, weight, world - 1 - rank if order else rank))
        assert not told
        key = f"{name} {str(dtype).removeprefix('torch.')}{order}"
        found[key] = steps, optimizer.communicated_bytes
        if key == "local adam float64":
            assert optimizer.steps_since_sync == 2 == STEPS % 4
            with pytest.raises(RuntimeError, match=r"saved 2 steps after a sync.*multiple of sync_every=4"):
                optimizer.state_dict()
            optimizer.sync()
            optimizer.sync()
            assert optimizer.communicated_bytes == 3 * 3 * 8 * weight.numel() and optimizer.steps_since_sync == 0
            found["end"] = weight.detach().clone()
    return found


def equal_data(rank: int, world: int, folder: Path) -> list[list[str]]:
    """Train workers on the same data: as one alone, and under DDP that averages, with a warning."""
    alone = nn.Parameter(start_weight())
    plain = AdamW([alone], **ADAM)
    weight = nn.Parameter(start_weight())
    optimizer = LocalUpdates(AdamW([weight], **ADAM), sync_every=3)
    with warnings_of_the_package() as told:
        for t, step in enumerate(run(optimizer, weight, 5), 1):
            backward(alone, 5, t)
            plain.step()
            assert torch.equal(step["params"], alone)
    gradients = []
    with warnings_of_the_package() as told_ddp:
        for settings in ({}, {"broadcast_buffers": False}):
            torch.manual_seed(0)
            ddp = nn.parallel.DistributedDataParallel(nn.Linear(10, 6, bias=False), **settings)
            optimizer = LocalUpdates(AdamW(ddp.parameters(), **ADAM), sync_every=3)
            if settings:
                keep_gradients_local(ddp)
            x, y = (torch.from_numpy(each).float() for each in batch(rank, 1, *SHAPE))
            (ddp(x) - y).square().mean().backward()
            gradients.append(ddp.module.weight.grad.clone())
            optimizer.step()
            assert len(told_ddp) == 1
    parts = [torch.empty_like(gradients[1]) for _ in range(world)]
    dist.all_gather(parts, gradients[1])
    torch.testing.assert_close(gradients[0], sum(parts) / world)
    for wrong, message in ((nn.Linear(1, 1), "not Linear"), (ddp.module, "not Linear")):
        with pytest.raises(TypeError, match=message):
            keep_gradients_local(wrong)
    for settings in ({}, {"broadcast_buffers": False, "find_unused_parameters": True}):
        with pytest.raises(ValueError, match="find_unused_parameters=True" if settings else "broadcast_buffers=False"):
            keep_gradients_local(nn.parallel.DistributedDataParallel(nn.Linear(1, 1), **settings))
    return [told, told_ddp]


def sixteen_bits(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train bfloat16 weights, and float32 ones whose displacements are sent in 16 bits."""
    found = {}
    for name, dtype, settings in (
        ("weights", torch.bfloat16, {"sync_every": 2}),
        ("all", torch.bfloat16, {"sync_every": 2, "sync_dtype": "bf16"}),
        ("displacements", torch.float32, {"sync_every": 2, "sync_dtype": "bf16", "outer": OuterNesterov(1.0, 0.0)}),
        ("none", torch.float32, {"sync_every": 2}),
    ):
        weight = nn.Parameter(start_weight(dtype))
        optimizer = LocalUpdates(AdamW([weight], **ADAM), **settings)
        found[name] = list(run(optimizer, weight, rank, steps=4))[-1], optimizer.communicated_bytes
    return found


def of_this_package(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train what is compressed on each worker for itself, beside what is dense."""
    os.environ["HF_LOWMEM_OPTIM_BACKEND"] = "reference"  # nothing to compile
    found = {}
    for name, build in (
        ("ldadam", lambda params: LDAdam(params, lr=1e-2, rank=2)),
        ("microadam", lambda params: MicroAdam(params, lr=1e-2, min_compress_size=32, block_size=64)),
        ("dense", lambda params: LDAdam(params, lr=1e-2, rank=None)),
        ("sgd", lambda params: SGD(params, lr=1e-2, momentum=0.9)),
    ):
        weight, bias = nn.Parameter(start_weight(torch.float32)), nn.Parameter(torch.zeros(6))
        optimizer = LocalUpdates(build([("weight", weight), ("bias", bias)]), sync_every=2)
        for t in range(1, 5):
            x, y = (torch.from_numpy(each).float() for each in batch(rank, t, *SHAPE))
            optimizer.zero_grad()
            (x @ weight.T + bias - y).square().mean().backward()
            optimizer.step()
        state = {f"{key} {who}": v for who, p in (("W", weight), ("b", bias)) for key, v in optimizer.state[p].items()}
        told = None
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            told = str(error)
        found[name] = [weight.detach(), bias.detach()], state, told, optimizer.communicated_bytes
    return found


def faults(rank: int, world: int, folder: Path) -> None:
    """Set one worker up or let it go another way, and have all of them say so."""

    def build(rows: int = 6, scale: float = 1, **settings: Any) -> tuple[list[nn.Parameter], LocalUpdates]:
        params = [nn.Parameter(scale * torch.ones(rows, 4)), nn.Parameter(torch.ones(3))]
        named = list(zip(("weight", "bias"), params, strict=True))
        return params, LocalUpdates(AdamW(named, lr=0.1), **{"sync_every": 2, **settings})

    def step(params: list[nn.Parameter], optimizer: LocalUpdates, gradients: list[float | None]) -> None:
        for param, value in zip(params, gradients, strict=True):
            param.grad = None if value is None else torch.full_like(param, value)
        optimizer.step()

    other = rank == 1
    for settings, message in (
        ({"sync_every": 3 if other else 2}, r"rank 1 differ from rank 0, .*'params': 2.*'params': 3"),
        ({"outer": OuterNesterov() if other else None}, r"rank 1 differ from rank 0, .*outer=None.*OuterNesterov"),
        ({"rows": 5 if other else 6}, r"weight of group 0 \(6, 4\).*weight of group 0 \(5, 4\)"),
        ({"scale": 2 if other else 1}, "weight of group 0.*bits adding up to"),
    ):
        params, optimizer = build(**settings)
        with pytest.raises(ValueError, match=message):
            step(params, optimizer, [rank, rank])
        assert optimizer.num_steps == 0
    params, optimizer = build()
    step(params, optimizer, [rank, None if other else 1])
    with pytest.raises(ValueError, match=r"rank 1 differ.*exp_avg of bias of group 0"):
        step(params, optimizer, [1, None if other else 1])
    params, optimizer = build()
    step(params, optimizer, [rank, 1])
    step(params, optimizer, [rank, 1])
    step(params, optimizer, [rank, None if other else 1])
    with pytest.raises(
        ValueError, match=r"rank 1 differ.*'step=4.0 of bias of group 0' .*'step=3.0 of bias of group 0'"
    ):
        step(params, optimizer, [rank, 1])
    params, optimizer = build()
    step(params, optimizer, [rank + 1, 1])
    with pytest.raises(RuntimeError, match=r"^rank 1 has NaN or infinity in 'weight of group 0'"):
        step(params, optimizer, [torch.nan if other else 1, 1])
    assert optimizer.communicated_bytes == 0 and (other or bool(params[0].isfinite().all()))
    # a group that is added between two syncs, by all alike
    params, optimizer = build()
    step(params, optimizer, [rank, 1])
    params.append(nn.Parameter(torch.ones(2)))
    optimizer.add_param_group({"params": [("later", params[2])]})
    step(params, optimizer, [rank, 1, rank])
    optimizer.sync()
    ends = [torch.empty_like(params[2]) for _ in range(world)]
    dist.all_gather(ends, params[2].detach())
    assert all(torch.equal(ends[0], end) for end in ends) and optimizer.steps_since_sync == 0
    # codes have no mean
    params, optimizer = build()
    step(params, optimizer, [rank, 1])
    optimizer.state[params[0]]["codes"] = torch.full((6, 4), rank, dtype=torch.uint8)
    step(params, optimizer, [rank, 1])
    assert bool((optimizer.state[params[0]]["codes"] == rank).all())
    assert optimizer.own_state() == "codes of weight of group 0 is each worker's own"
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="falls out of step"):
        scaler.step(optimizer)


def save(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Save after six steps of ten; return the end, and what was there after six."""
    found = {}
    for name in ("local adam", "outer", "des-loc"):
        weight = nn.Parameter(start_weight())
        optimizer = LocalUpdates(AdamW([weight], **ADAM), **SCHEDULES[name][0])
        steps = run(optimizer, weight, rank)
        for _ in range(6):
            next(steps)
        optimizer.sync()  # not always due then
        if rank == 0:
            torch.save((weight.detach(), optimizer.state_dict()), folder / f"{name}.pt")
        found[name] = [step["params"] for step in steps]
    dist.barrier()
    return found


def resume(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Go on from what two workers saved, with any number of them."""
    found = {}
    for name in ("local adam", "outer", "des-loc"):
        saved, state = torch.load(folder / f"{name}.pt", weights_only=True)
        weight = nn.Parameter(saved)
        optimizer = LocalUpdates(AdamW([weight], **ADAM), **SCHEDULES[name][0])
        optimizer.load_state_dict(state)
        assert (optimizer.num_steps, optimizer.steps_since_sync) == (6, 0)
        found[name] = [step["params"] for step in run(optimizer, weight, rank, begin=6)]
        optimizer.sync()
        found[f"{name} synced"] = weight.detach().clone()
    return found
