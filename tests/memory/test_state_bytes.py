"""What is planned is what is measured, to the byte."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_optimizer, plan_state

SHAPES = {"tall": (40, 24), "wide": (24, 72), "small": (40, 3), "vector": (40,), "kernel": (24, 4, 3, 3), "scalar": ()}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES.values()]


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_planned_equals_measured(name: str, dtype: torch.dtype) -> None:
    optimizer_class = OPTIMIZERS[name].optimizer_class
    given = parameters(dtype)
    optimizer = optimizer_class([{"params": given[:2]}, {"params": given[2:], "weight_decay": 0.1}])
    planned = plan_optimizer(optimizer)
    assert measure_state(optimizer).total_bytes == 0
    assert not optimizer.state  # looking made no entries
    step(optimizer)
    measured = measure_state(optimizer)
    assert measured == planned
    assert measured.num_parameters == sum(p.numel() for p in given)
    assert measured.adamw_fp32_bytes == 8 * measured.num_parameters
    shared = sum(spec.nbytes for spec in optimizer.method.shared_specs(optimizer.param_groups).values())
    constants = sum(spec.nbytes for spec in optimizer.method.constants_of(optimizer.param_groups).values())
    assert sum(measured.group_bytes) + shared + constants == measured.total_bytes
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert measured.total_bytes - constants == sum(each.nbytes for each in kept if isinstance(each, torch.Tensor))
    assert measure_state(copy.deepcopy(optimizer)) == measured
    from_shapes = plan_state(name, {key: (shape, dtype) for key, shape in SHAPES.items()})
    assert from_shapes.component_bytes == planned.component_bytes


def test_state_outside_the_parameters_and_in_containers_counts_and_what_is_shared_once() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state["window"] = {"rows": [torch.zeros(5), (torch.zeros(2, dtype=torch.int16),)], "count": 3}
    optimizer.state[weight]["projector"] = type("Projector", (), {})()
    optimizer.state[weight]["projector"].matrix = torch.zeros(7)
    report = measure_state(optimizer)
    assert report.component_bytes == {"rows": 24, "projector": 28}
    assert report.group_bytes == (28,)
    given, table = parameters(torch.float32), torch.zeros(256)
    optimizer = torch.optim.SGD(given, lr=0.1)
    for parameter in given:
        optimizer.state[parameter]["table"] = table
    assert measure_state(optimizer).component_bytes == {"table": 1024}


def test_only_our_optimizers_can_be_planned() -> None:
    with pytest.raises(TypeError, match="cannot predict the state of SGD"):
        plan_optimizer(torch.optim.SGD(parameters(torch.float32), lr=0.1))
    with pytest.raises(ValueError, match="did you mean 'ldadam'"):
        plan_state("ldamm", {})
    with pytest.raises(TypeError, match="did you mean 'rank'"):
        plan_state("ldadam", {}, rnak=3)


def test_sharded_state_counts_with_all_its_parts() -> None:
    """Two processes of which this is one: a stand-in for the other answers every collective."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        weight = nn.Parameter(distribute_tensor(torch.zeros(9, 4), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([weight], foreach=False)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert measure_state(optimizer).component_bytes == {"exp_avg": 144, "exp_avg_sq": 144, "step": 4}
        # the first of two parts of nine rows has five
        assert measure_state(optimizer, local=True).component_bytes == {"exp_avg": 80, "exp_avg_sq": 80, "step": 4}
        assert measure_state(optimizer).num_parameters == 36
    finally:
        torch.distributed.destroy_process_group()
