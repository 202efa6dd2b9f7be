"""Local updates against a simulation of all workers, over two and three gloo processes and in one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from hf_lowmem_optim import LDAdam, LocalUpdates, LoRDO, OuterNesterov, layerwise, measure_state
from hf_lowmem_optim.memory.plan import plan_optimizer
from tests.local_updates.jobs import ADAM, SCHEDULES, SHAPE, STEPS, run, start_weight
from tests.reference.local_updates import local_adamw
from tests.sharding.processes import launch

#: What is done, and by how many processes.
JOBS = [
    *(("schedules", 2), ("schedules", 3), ("equal_data", 2), ("sixteen_bits", 2), ("of_this_package", 2)),
    *(("faults", 3), ("save", 2), ("resume", 2), ("resume", 3), ("resume", 1)),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """Return what each process of each job returned."""
    jobs = [(f"tests.local_updates.jobs:{name}", world) for name, world in JOBS]
    return dict(zip(JOBS, launch(jobs, tmp_path_factory.mktemp("local_updates"), timeout=600), strict=True))


def simulated(name: str, workers: int) -> list[dict[str, Any]]:
    start = start_weight().numpy()
    return list(local_adamw(start, range(workers), steps=STEPS, **ADAM, **SCHEDULES[name][1]))


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_workers_do_what_the_simulation_of_all_of_them_does(results: Any, name: str, workers: int) -> None:
    """To rounding in float64, after every step; and after a sync equal to the bit, only then."""
    reference, periods = simulated(name, workers), SCHEDULES[name][1]["periods"]
    found = [each[f"{name} float64"][0] for each in results["schedules", workers]]
    for t, expected in enumerate(reference, 1):
        for key, values in expected.items():
            ours = [steps[t - 1][key] for steps in found]
            for one, other in zip(ours, values, strict=True):
                np.testing.assert_allclose(one.numpy(), other, rtol=1e-11, atol=1e-13)
            equal = all(torch.equal(ours[0], each) for each in ours)
            assert equal == (key in periods and t % periods[key] == 0), (t, key)


@pytest.mark.parametrize("workers", [2, 3])
def test_what_was_sent_is_what_the_formula_says(results: Any, workers: int) -> None:
    entries = SHAPE[0] * SHAPE[1]
    for found in results["schedules", workers]:
        for name, (_, expected) in SCHEDULES.items():
            averages = sum(STEPS // period for period in expected["periods"].values())
            assert found[f"{name} float64"][1] == 8 * entries * averages
        assert found["local adam float32"][1] == 4 * entries * 6
    for found in results["sixteen_bits", 2]:
        sent = {name: nbytes / (2 * entries) for name, (_, nbytes) in found.items()}
        # weights and two moments twice, in two or four bytes
        assert sent == {"weights": 3 * 4, "all": 3 * 2, "displacements": 3 * 2, "none": 3 * 4}


def test_float32_follows_and_the_order_of_the_workers_does_not_matter(results: Any) -> None:
    for workers in (2, 3):
        for rank, found in enumerate(results["schedules", workers]):
            exact, single = found["local adam float64"][0], found["local adam float32"][0]
            moved = (exact[-1]["params"] - start_weight()).norm()
            assert (single[-1]["params"].double() - exact[-1]["params"]).norm() <= 2e-4 * moved
            mirrored = results["schedules", workers][workers - 1 - rank]["local adam float64 permuted"][0]
            for here, there in zip(exact, mirrored, strict=True):
                torch.testing.assert_close(here["params"], there["params"], rtol=1e-12, atol=1e-14)
        ends = [found["end"] for found in results["schedules", workers]]
        assert all(torch.equal(ends[0], end) for end in ends)


def test_workers_with_equal_data_are_as_one_and_are_warned_that_nothing_is_saved(results: Any) -> None:
    for told, told_ddp in results["equal_data", 2]:
        assert len(told) == len(told_ddp) == 1 and told[0].startswith("all workers have the same gradients")
        assert told_ddp == told


def test_sixteen_bits_are_rounded_alike(results: Any) -> None:
    here, there = results["sixteen_bits", 2]
    exact = here["none"][0]["params"]
    moved = (exact - start_weight(torch.float32)).norm()
    # roundings to 8 bits: of weights after each of four steps and up to three times in each of two syncs, or of what
    # they moved in those only
    limits = {"weights": 10 * exact.norm(), "all": 10 * exact.norm(), "displacements": 6 * moved, "none": 0.0}
    for name, limit in limits.items():
        assert all(torch.equal(here[name][0][key], there[name][0][key]) for key in here[name][0])
        assert (here[name][0]["params"].float() - exact).norm() <= 2.0**-9 * limit, name


def test_each_worker_keeps_what_cannot_be_averaged_and_it_is_not_saved(results: Any) -> None:
    here, there = results["of_this_package", 2]
    for name, own in (("ldadam", "basis"), ("microadam", "window"), ("dense", None), ("sgd", None)):
        (weights, state, told, sent), (others, other_state, *_) = here[name], there[name]
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
        differ = {
            key
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not torch.equal(value, other_state[key])
        }
        if own is None:
            assert not differ and told is None
            assert sent == 2 * 4 * (66 * (2 if name == "sgd" else 3))
        else:
            assert differ and all(key.endswith(" W") for key in differ)
            assert "of parameter 'weight' is each worker's own. Save the model only" in told
            assert sent == 2 * 4 * (66 + 2 * 6)


def test_a_worker_that_differs_stops_all_with_its_rank(results: Any) -> None:
    assert results["faults", 3] == [None] * 3


def test_a_run_resumes_at_a_sync_with_any_number_of_workers(results: Any) -> None:
    """To the bit with as many as before."""
    for name in ("local adam", "outer", "des-loc"):
        for before, after in zip(results["save", 2], results["resume", 2], strict=True):
            assert len(before[name]) == len(after[name]) == STEPS - 6
            assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        for world in (1, 2, 3):
            ends = [each[f"{name} synced"] for each in results["resume", world]]
            assert all(torch.equal(ends[0], end) for end in ends) and bool(ends[0].isfinite().all())


def test_one_process_takes_the_optimizers_steps_and_those_of_an_outer_step() -> None:
    for name, (settings, expected) in SCHEDULES.items():
        weight = nn.Parameter(start_weight())
        optimizer = LocalUpdates(AdamW([weight], **ADAM), **settings)
        reference = local_adamw(start_weight().numpy(), [0], steps=STEPS, **ADAM, **expected)
        for ours, theirs in zip(run(optimizer, weight, 0), reference, strict=True):
            np.testing.assert_allclose(ours["params"].numpy(), theirs["params"][0], rtol=1e-11, err_msg=name)
        assert optimizer.communicated_bytes == 0 and optimizer.state_dict()["local_updates"]["num_steps"] == STEPS


def test_it_is_a_torch_optimizer() -> None:
    """Closures, schedulers, hooks, copies, more groups; and one process saves between two syncs and goes on."""
    weight, settings = nn.Parameter(start_weight()), SCHEDULES["outer"][0]
    optimizer = LocalUpdates(AdamW([weight], **ADAM), **settings)
    scheduler, called = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))

    def closure() -> float:
        optimizer.zero_grad()
        weight.grad = torch.ones_like(weight)
        return 3.0

    assert optimizer.step(closure) == 3.0 and called == [1]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == ADAM["lr"] / 2
    optimizer.zero_grad()
    assert weight.grad is None and "LocalUpdates(sync_every={'params': 3, 'moments': 3}" in repr(optimizer)
    more = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [more]})
    twin, twin_weights = copy.deepcopy((optimizer, [weight, more]))
    state = optimizer.state_dict()
    loaded_weights = [nn.Parameter(each.detach().clone()) for each in (weight, more)]
    loaded = LocalUpdates(AdamW([{"params": [each]} for each in loaded_weights], **ADAM), **settings)
    loaded.load_state_dict(copy.deepcopy(state))  # torch would share its tensors
    for one, weights in ((optimizer, [weight, more]), (twin, twin_weights), (loaded, loaded_weights)):
        for _ in range(4):
            for each in weights:
                each.grad = torch.ones_like(each)
            one.step()
    for other in (twin_weights, loaded_weights):
        assert all(torch.equal(a, b) for a, b in zip([weight, more], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_outer_steps_state_is_planned_to_the_byte(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    params = [nn.Parameter(torch.ones(24, 16, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))]
    inner = LDAdam(params, rank=4)
    optimizer = LocalUpdates(inner, sync_every=2, average=("params",), outer=OuterNesterov())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    measured, numel = measure_state(optimizer), 24 * 16 + 5
    assert measured == plan_optimizer(optimizer) and measured.component_bytes["outer"] == numel * (dtype.itemsize + 4)
    assert measured.total_bytes - measured.component_bytes["outer"] == measure_state(inner).total_bytes


def test_refusals() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    half = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    adam = AdamW([weight])
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, "not 3", 3, {}),
        (ValueError, "LoRDO averages its workers by itself", LoRDO([weight]), {}),
        (ValueError, "LocalUpdates averages its workers by itself", LocalUpdates(SGD([weight])), {}),
        (ValueError, "sync_every=0 is out of range", adam, {"sync_every": 0}),
        (TypeError, r"sync_every\['params'\]=2.0 is a float", adam, {"sync_every": {"params": 2.0}}),
        (ValueError, "lacks 'params'", adam, {"sync_every": {"exp_avg": 2}}),
        (ValueError, "average='moments' must be", adam, {"average": "moments"}),
        (ValueError, "names more than average", adam, {"sync_every": {"params": 2, "exp_avg": 2}, "average": "params"}),
        (TypeError, "outer=0.7 is a float", adam, {"outer": 0.7}),
        (ValueError, "sync_dtype='fp16' is unknown", adam, {"sync_dtype": "fp16"}),
        (ValueError, "would round weights of more than 16 bits", adam, {"sync_dtype": "bf16"}),
        (
            NotImplementedError,
            "steps during the backward pass",
            layerwise(LDAdam)([nn.Parameter(torch.ones(8, 8))]),
            {},
        ),
        (ValueError, "'compensated' keeps 8 bits", LDAdam([half], weight_rounding="compensated"), {}),
    ]
    for kind, message, optimizer, settings in cases:
        with pytest.raises(kind, match=message):
            LocalUpdates(optimizer, **settings)
    with pytest.raises(ValueError, match=r"lr=0.0 is out of range"):
        OuterNesterov(lr=0.0)
    saved = LocalUpdates(SGD([weight]), outer=OuterNesterov())
    weight.grad = torch.ones_like(weight)
    saved.step()
    with pytest.raises(ValueError, match="saved with an outer step"):
        LocalUpdates(SGD([weight])).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="of other parameters"):
        LocalUpdates(SGD([nn.Parameter(torch.ones(2))]), outer=OuterNesterov()).load_state_dict(saved.state_dict())
    for path, value, message in (
        ((), 3, "must be a dict of num_steps, synced and outer"),
        (("num_steps",), 2.0, "must be ints from 0"),
        (("synced", "params"), -1, "must be ints from 0"),
        (("outer",), [], "must be a list for this optimizer's 1 parameters"),
        (("outer", 0, "anchor"), torch.ones(8, 8, dtype=torch.bfloat16), "bfloat16.*and this optimizer's .*float32"),
        (("outer", 0, "anchor"), None, "of other parameters"),
    ):
        damaged = copy.deepcopy(saved.state_dict())
        *way, last = ("local_updates", *path)
        place: Any = damaged
        for key in way:
            place = place[key]
        place[last] = value
        with pytest.raises(ValueError, match=f"LocalUpdates cannot load this state: .*{message}"):
            saved.load_state_dict(damaged)
