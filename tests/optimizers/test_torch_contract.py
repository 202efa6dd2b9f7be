"""PyTorch's own contract of an optimizer: the generic tests of its test/test_optim.py, for every normal method.

What describes an optimizer to them (``OptimizerInfo``) and the mistakes that every optimizer must refuse ship with
torch; the tests do not: each is written here after the one of the same name there, and goes through all settings of the
``OptimizerInfo``. Those that are missing here are in ``DOES_NOT_APPLY``, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_lowmem_optim import Dash
from hf_lowmem_optim.registry import OPTIMIZERS
from tests.optimizers.cases import CASES, NEEDS_GPU, Case, assert_equal, through_a_file
from tests.trainer.runs import NORMAL, assert_equal_to_the_bit

_ONE_WAY = "neither foreach nor fused is an argument: a method has one update, whose faster versions tests/ops compares"
_REFUSED = "such parameters or gradients are refused: test_contract.py"
DOES_NOT_APPLY = {
    "test_rosenbrock_sparse": _REFUSED,
    "test_complex": _REFUSED,
    "test_complex_2d": _REFUSED,
    "test_adamw_serialization": "about a key that only torch's Adam and AdamW have",
    "test_foreach_matches_forloop": _ONE_WAY,
    "test_foreach_large_tensor": _ONE_WAY,
    "test_set_default_dtype_works_with_foreach": _ONE_WAY + "; other default dtypes: test_contract.py",
    "test_peak_memory_foreach": _ONE_WAY + "; what a step allocates: tests/memory/test_scratch.py",
    "test_defaults_changed_to_foreach": _ONE_WAY,
    "test_mixed_device_dtype": _ONE_WAY + "; two devices: test_forloop_goes_right_direction_multigpu",
    "test_fused_matches_forloop": _ONE_WAY,
    "test_fused_error_on_params_on_meta": _ONE_WAY,
    "test_fused_large_tensor": _ONE_WAY,
    "test_fused_does_not_step_if_foundinf": _ONE_WAY + "; torch's GradScaler leaves such a step out by itself",
    "test_fused_cpu_matches_cuda": _ONE_WAY + "; both devices: test_gpu.py",
    "test_cpu_load_state_dict": "capturable is no argument; state of another device: test_state_dict_with_cuda_params",
    "test_second_order_optims_return_consistent_types": "no method calls its closure more than once",
    "test_correctness": "of compiled optimizers; the compiler is kept out of step(): test_hostile_input.py",
}

#: All of torch's ``TestOptimRenewed``, and ``test_correctness``, which tests them compiled.
GENERIC = {
    *DOES_NOT_APPLY,
    "test_can_load_from_to_named_state_dict",
    "test_can_load_older_state_dict",
    "test_deepcopy_copies_all_public_attrs",
    "test_errors",
    "test_forloop_goes_right_direction",
    "test_forloop_goes_right_direction_multigpu",
    "test_grads_are_never_inplaced_into",
    "test_load_nontensor_step",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_pre_post_hook",
    "test_non_empty_state",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs",
    "test_optimizer_can_be_printed",
    "test_param_group_with_lrscheduler_goes_right_direction",
    "test_param_groups_lr",
    "test_param_groups_weight_decay",
    "test_save_load_equality_with_weights_only",
    "test_state_dict_deterministic",
    "test_state_dict_post_hook",
    "test_state_dict_pre_hook",
    "test_state_dict_pre_post_hook",
    "test_state_dict_with_cuda_params",
    "test_step_all_hooks",
    "test_step_is_noop_for_zero_grads",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_iteration",
    "test_step_post_hook",
    "test_step_pre_hook",
    "test_tensor_lr",
}


def settings_of(case: Case) -> list[dict[str, Any]]:
    """Return the settings that every test goes through: a tensor as small as theirs is dense with the defaults."""
    small = {"min_compress_size": 16} if "min_compress_size" in case.hyper else {}
    # with one gradient in every row of its window, a preconditioner divides by little but the damping
    damped = {"damping": 1.0} if "damping" in case.hyper else {}
    compressed = {**case.hyper, "weight_decay": 0.0, **small, **damped}
    known = case.method.options.defaults()
    stored = {
        key: value
        for key, value in {"bits": 8, "error_feedback": "bf16", "moment_dtype": "fp32"}.items()
        if key in known
    }
    return [
        damped,
        {**damped, "lr": 0.02, "weight_decay": 0.1},
        compressed,
        {**compressed, "lr": 0.02, "weight_decay": 0.1},
        {**compressed, "betas": (0.5, 0.75), "dense_state": "fp32", **stored},
        {**compressed, "lr": torch.tensor(0.001)},
        {**compressed, "lr": torch.tensor([0.001]), "weight_decay": 0.1},
    ]


@pytest.fixture(scope="module")
def torchs() -> ModuleType:
    """Torch's descriptions of optimizers."""
    from torch.testing._internal import common_optimizers

    # the import forbids plain assignments to flags such as allow_tf32 from then on
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return common_optimizers


@pytest.fixture(params=NORMAL)
def info(request: pytest.FixtureRequest, torchs: ModuleType) -> Any:
    case = CASES[request.param]

    def inputs(device: Any, dtype: Any = None) -> list[Any]:
        return [torchs.OptimizerInput(params=None, kwargs=kwargs) for kwargs in settings_of(case)]

    def errors(device: str, dtype: torch.dtype) -> list[Any]:
        own = [
            ({"betas": (1.0, 0.0)}, ValueError, r"betas\[0\]=1.0"),
            ({"weight_decay": -1}, ValueError, "weight_decay=-1"),
            ({"foreach": True}, TypeError, "no argument 'foreach'"),
            ({"maximize": True}, TypeError, "no argument 'maximize'"),
        ]
        return torchs.get_error_inputs_for_all_optims(device, dtype) + [
            torchs.ErrorOptimizerInput(torchs.OptimizerInput(None, kwargs), error_type=kind, error_regex=regex)
            for kwargs, kind, regex in own
        ]

    return torchs.OptimizerInfo(
        OPTIMIZERS[case.name].optimizer_class,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        supported_impls=(),
        # what the state dict of an older version may lack: options on which no state depends
        not_og_supported_flags=tuple(case.method.options.defaults().keys() - set(case.method.shaping)),
        supports_complex=False,
    )


def inputs_of(info: Any) -> Iterator[dict[str, Any]]:
    """Give the settings, each with tensors of its own, which a schedule changes."""
    for each in info.optim_inputs_func(device="cpu"):
        yield each.kwargs


def pair(device: str = "cpu", contiguous: bool = True) -> tuple[Parameter, Parameter]:
    """Return the weight and the bias of torch's tests."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, 2, generator=generator)[..., 0].to(device) for shape in ((10, 5), (10,)))
    if contiguous:
        return Parameter(weight.contiguous()), Parameter(bias.contiguous())
    return Parameter(weight), Parameter(bias)


def named(params: Any, names: bool) -> list[Any]:
    return [(f"name{i}", p) for i, p in enumerate(params)] if names else list(params)


def backward(optimizer: Optimizer, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the loss of torch's tests, and compute its gradients alone."""
    optimizer.zero_grad()
    row = torch.linspace(-1, 1, 5, device=weight.device)
    loss = (weight.mv(row).to(bias.device) + bias).pow(2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def train(optimizer: Optimizer, weight: Tensor, bias: Tensor, steps: int = 20, schedulers: Any = ()) -> float:
    """Take steps, and return by how much the loss fell."""
    before = backward(optimizer, weight, bias).item()
    for _ in range(steps):
        loss = backward(optimizer, weight, bias)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*[loss.item()] * isinstance(scheduler, ReduceLROnPlateau))
    return before - backward(optimizer, weight, bias).item()


# ---------------------------------------------------------------------------------------------- which tests there are


def test_every_generic_test_of_torch_is_run_or_has_a_reason(torchs: ModuleType) -> None:
    """And whatever other test the installed torch names in its own descriptions."""
    run = {name for name, value in globals().items() if name.startswith("test_") and inspect.isfunction(value)}
    run.remove("test_every_generic_test_of_torch_is_run_or_has_a_reason")
    assert not run & DOES_NOT_APPLY.keys() and run | DOES_NOT_APPLY.keys() == GENERIC
    known_to_torch = {getattr(d, "test_name", None) for each in torchs.optim_db for d in each.decorators}
    assert len(known_to_torch) > 5 and known_to_torch <= {*GENERIC, None}


def test_optim_infos_do_not_specify_global_cliquey_kwargs(info: Any) -> None:
    for index, kwargs in enumerate(inputs_of(info)):
        assert not {"foreach", "fused", "differentiable"} & kwargs.keys()
        optimizer = info.optim_cls(pair(), **kwargs)
        # beyond the defaults, the compressed rule is what the tests go through
        assert index < 2 or optimizer.method.compresses((10, 5), optimizer.param_groups[0])


# ------------------------------------------------------------------------------------------------------- construction


def test_errors(info: Any) -> None:
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        assert error.error_on.name == "CONSTRUCTION_ERROR"
        given = error.optimizer_error_input
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expected(error.error_type, match=error.error_regex):
            info.optim_cls([Parameter(torch.ones(1))] if given.params is None else given.params, **given.kwargs)


def test_optimizer_can_be_printed(info: Any) -> None:
    for kwargs in inputs_of(info):
        text = repr(info.optim_cls(pair(), **kwargs))
        assert text.startswith(f"{info.name} (") and all(f"{key}: {value}" in text for key, value in kwargs.items())


def test_deepcopy_copies_all_public_attrs(info: Any) -> None:
    for kwargs in inputs_of(info):
        train(optimizer := info.optim_cls(params := pair(), **kwargs), *params, steps=3)
        twin = copy.deepcopy(optimizer)
        assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(twin) if k[0] != "_"}
        assert_equal_to_the_bit(twin.state_dict(), optimizer.state_dict())


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_forloop_goes_right_direction(info: Any, contiguous: bool, scheduled: bool) -> None:
    # every schedule and all settings, each with one or two of the others
    inputs = [*inputs_of(info), *inputs_of(info)] if scheduled else [*inputs_of(info)]
    assert len(inputs) >= len(info.scheduler_inputs) or not scheduled
    for kwargs, made in zip(inputs, itertools.cycle(info.scheduler_inputs if scheduled else [()])):
        params = pair(contiguous=contiguous)
        assert params[0].is_contiguous() is contiguous
        optimizer = info.optim_cls(params, **kwargs)
        assert train(optimizer, *params, schedulers=[make(optimizer) for make in made]) > 0, kwargs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forloop_goes_right_direction_multigpu(info: Any) -> None:
    """With the CPU as the second device."""
    for schedules in [(), *info.scheduler_inputs]:
        for kwargs in inputs_of(info):
            params = pair("cuda")[0], pair()[1]
            optimizer = info.optim_cls(params, **kwargs)
            assert train(optimizer, *params, schedulers=[make(optimizer) for make in schedules]) > 0, kwargs


def test_param_group_with_lrscheduler_goes_right_direction(info: Any) -> None:
    for schedules in info.scheduler_inputs:
        weight, bias = pair()
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
        optimizer = info.optim_cls(groups, **next(inputs_of(info)))
        assert train(optimizer, weight, bias, schedulers=[make(optimizer) for make in schedules]) > 0


def test_param_groups_lr(info: Any) -> None:
    for kwargs in inputs_of(info):
        weight, bias, idle = *pair(), Parameter(torch.ones(2))
        groups = [{"params": [weight, bias], "lr": 1e-3, **kwargs}, {"params": [idle], **shared_of(info, kwargs)}]
        optimizer = info.optim_cls(groups, lr=1e-28)
        first = backward(optimizer, weight, bias).item()
        for _ in range(20):
            backward(optimizer, weight, bias)
            idle.grad = torch.rand(2)
            optimizer.step()
        assert backward(optimizer, weight, bias).item() < first
        assert torch.equal(idle, torch.ones(2)) and optimizer.state[idle]["step"] == 20


def shared_of(info: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the options on which all groups of a method must agree."""
    return {key: kwargs[key] for key in info.optim_cls.method.shared_options if key in kwargs}


def test_param_groups_weight_decay(info: Any) -> None:
    for kwargs in inputs_of(info):
        weight, bias = pair()
        groups = [{"params": [weight], **kwargs}, {"params": [bias], **kwargs, "weight_decay": 0.0}]
        optimizer = info.optim_cls(groups)
        assert train(optimizer, weight, bias) > 0
        decay = kwargs.get("weight_decay", info.optim_cls.method.options.defaults()["weight_decay"])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]


def test_tensor_lr(info: Any) -> None:
    for kwargs in inputs_of(info):
        for lr in (torch.tensor(1e-3), torch.tensor([1e-3])):
            params, others = pair(), pair()
            optimizer = info.optim_cls(params, **{**kwargs, "lr": lr})
            other = info.optim_cls(others, **{**kwargs, "lr": lr.item()})
            for _ in range(5):
                train(optimizer, *params, steps=1)
                train(other, *others, steps=1)
                assert_equal(params, others)
            assert optimizer.param_groups[0]["lr"] is lr


def test_step_is_noop_when_params_have_no_grad(info: Any) -> None:
    for kwargs in inputs_of(info):
        for params in ([torch.ones(2, 3)], list(pair())):
            before = [p.detach().clone() for p in params]
            optimizer = info.optim_cls(params, **kwargs)
            assert optimizer.step(lambda: torch.tensor([1.0])) == 1
            assert_equal(params, before)
            assert not optimizer.state


def test_step_is_noop_for_zero_grads(info: Any) -> None:
    for kwargs in inputs_of(info):
        before, params = pair(), pair()
        optimizer = info.optim_cls(params, **{**kwargs, "weight_decay": 0.0})
        for param in params:
            param.grad = torch.zeros_like(param)
        assert optimizer.step(lambda: torch.tensor([1.0])) == 1
        assert_equal(params, before)


def test_grads_are_never_inplaced_into(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(params := pair(contiguous=False), **kwargs)
        for _ in range(3):
            backward(optimizer, *params)
            grads = [p.grad for p in params]
            before = [(g.clone(), g._version) for g in grads]
            optimizer.step()
            for param, grad, (value, version) in zip(params, grads, before, strict=True):
                assert param.grad is grad and torch.equal(grad, value) and grad._version == version


def test_step_iteration(info: Any) -> None:
    """Every step with a gradient counts one, for its tensor."""
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(params := pair(), **kwargs)
        for count in range(1, 4):
            train(optimizer, *params, steps=1)
            assert [optimizer.state[p]["step"] for p in params] == [count] * 2
            optimizer.zero_grad()
            optimizer.step()


def test_non_empty_state(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls((model := nn.Linear(5, 5)).parameters(), **kwargs)
        model(torch.rand(2, 5)).sum().backward()
        optimizer.step()
        assert all(len(optimizer.state[param]) > 1 for param in model.parameters())


# -------------------------------------------------------------------------------------------------------- state dicts


#: Whether parameters have names in the optimizer that saves, and in the one that loads.
NAMES = [(False, False), (False, True), (True, False), (True, True)]


def test_state_dict_deterministic(info: Any) -> None:
    for kwargs, names in zip(inputs_of(info), itertools.cycle(NAMES)):
        params = pair()
        optimizer = info.optim_cls(named(params, names[0]), **kwargs)
        train(optimizer, *params, steps=10)
        others = [Parameter(p.detach().clone()) for p in params]
        other = info.optim_cls(named(others, names[1]), **copy.deepcopy(kwargs))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(10):
            train(optimizer, *params, steps=1)
            train(other, *others, steps=1)
            assert_equal(params, others)
        assert_equal_to_the_bit(without_names(optimizer), without_names(other))
        # a group that is there twice has the same numbers twice
        other.param_groups.extend(other.param_groups)
        assert without_names(other)["param_groups"][-1] == without_names(optimizer)["param_groups"][-1]


def without_names(optimizer: Optimizer) -> dict[str, Any]:
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


def convolution() -> tuple[nn.Module, Callable[[Optimizer], None]]:
    """Return the model of torch's tests of state dicts, and what trains it for some steps."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
    images = torch.rand(1, 4, 16, 16)

    def step(optimizer: Optimizer, count: int = 1) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(images).sum().backward()
            optimizer.step()

    return model, step


def test_can_load_older_state_dict(info: Any) -> None:
    for kwargs in inputs_of(info):
        model, step = convolution()
        step(optimizer := info.optim_cls(model.parameters(), **kwargs), 3)
        before, old = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
        for flag in info.not_og_supported_flags:
            del old["param_groups"][0][flag]
        optimizer.load_state_dict(old)
        assert_equal_to_the_bit(optimizer.state_dict()["state"], before["state"])
        step(optimizer)


def test_can_load_from_to_named_state_dict(info: Any) -> None:
    for kwargs, names in zip(inputs_of(info), itertools.cycle(NAMES)):
        model, step = convolution()
        first, second = (
            info.optim_cls(model.named_parameters() if each else model.parameters(), **kwargs) for each in names
        )
        step(first, 3)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        step(second)
        found = second.state_dict()["param_groups"][0].get("param_names")
        assert found == (["0.weight", "0.bias", "1.weight", "1.bias"] if any(names) else None)


def test_save_load_equality_with_weights_only(info: Any) -> None:
    for kwargs, names in zip(inputs_of(info), itertools.cycle([False, True])):
        params = pair()
        train(optimizer := info.optim_cls(named(params, names), **kwargs), *params, steps=3)
        assert_equal_to_the_bit(through_a_file(optimizer.state_dict()), optimizer.state_dict())


def test_load_nontensor_step(info: Any) -> None:
    for kwargs in inputs_of(info):
        params = pair()
        train(optimizer := info.optim_cls(params, **kwargs), *params, steps=3)
        saved = copy.deepcopy(optimizer.state_dict())
        assert [type(entry["step"]) for entry in saved["state"].values()] == [int, int]
        optimizer.load_state_dict(saved)
        train(optimizer, *params, steps=1)
        assert [optimizer.state[p]["step"] for p in params] == [4, 4]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_state_dict_with_cuda_params(info: Any, device: str) -> None:
    # of Dash what rounding moves little: one solver on either device, well-conditioned statistics
    steady = {"solver": "newton_db", "damping": 1.0, "moment_dtype": "fp32"} if info.optim_cls is Dash else {}
    for kwargs in ({**each, **steady} for each in inputs_of(info)):
        params = pair()
        train(optimizer := info.optim_cls(params, **kwargs), *params, steps=3)
        moved = [Parameter(p.detach().to(device)) for p in params]
        saved, given = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
        other = info.optim_cls(moved, **kwargs)
        other.load_state_dict(given)
        assert_equal_to_the_bit(given, saved)
        for _ in range(5):
            train(optimizer, *params, steps=1)
            train(other, *moved, steps=1)
            for param, on_device in zip(params, moved, strict=True):
                torch.testing.assert_close(param, on_device.cpu(), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- hooks


def mark(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1  # type: ignore[index, assignment]


def unmark(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["marked"] = state_dict["state"].pop("test", None) is not None
    return state_dict


def test_state_dict_pre_hook(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(pair(), **kwargs)
        optimizer.register_state_dict_pre_hook(mark)
        assert optimizer.state_dict()["state"]["test"] == 1


def test_state_dict_post_hook(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(pair(), **kwargs)
        optimizer.register_state_dict_post_hook(unmark)
        assert optimizer.state_dict()["marked"] is False


def test_state_dict_pre_post_hook(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(pair(), **kwargs)
        optimizer.register_state_dict_pre_hook(mark)
        optimizer.register_state_dict_post_hook(unmark)
        saved = optimizer.state_dict()
        assert saved["marked"] is True and "test" not in saved["state"]


def set_rate(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def copy_with_rate(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(state_dict)
    changed["param_groups"][0]["lr"] = 0.003
    return changed


def note_rate(optimizer: Optimizer) -> None:
    optimizer.state["rate"] = optimizer.param_groups[0]["lr"]  # type: ignore[index]


def test_load_state_dict_pre_hook_and_prepend(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(pair(), **kwargs)
        saved = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(set_rate)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.002
        first = optimizer.register_load_state_dict_pre_hook(copy_with_rate, prepend=True)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.002
        first.remove()
        optimizer.register_load_state_dict_pre_hook(copy_with_rate)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.003


def test_load_state_dict_post_hook(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(pair(), **kwargs)
        optimizer.register_load_state_dict_post_hook(note_rate)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["rate"] == optimizer.param_groups[0]["lr"] != 0.003


def test_load_state_dict_pre_post_hook(info: Any) -> None:
    for kwargs in inputs_of(info):
        optimizer = info.optim_cls(pair(), **kwargs)
        optimizer.register_load_state_dict_pre_hook(copy_with_rate)
        optimizer.register_load_state_dict_post_hook(note_rate)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["rate"] == 0.003


def test_step_pre_hook(info: Any) -> None:
    assert_calls(info, lambda optimizer, hook: optimizer.register_step_pre_hook(hook), [[], [1, 1]])


def test_step_post_hook(info: Any) -> None:
    assert_calls(info, lambda optimizer, hook: optimizer.register_step_post_hook(hook), [[1, 1], [2, 2]])


def assert_calls(info: Any, register: Callable[[Optimizer, Any], Any], counts: list[list[int]]) -> None:
    """Check what a hook sees of the state in two steps, and that it is not called after it has been removed."""
    for kwargs in inputs_of(info):
        optimizer, seen = info.optim_cls(params := pair(), **kwargs), list[list[int]]()
        handle = register(optimizer, lambda o, *_, seen=seen: seen.append([e["step"] for e in o.state.values()]))
        train(optimizer, *params, steps=2)
        handle.remove()
        train(optimizer, *params, steps=1)
        assert seen == counts


def test_step_all_hooks(info: Any) -> None:
    called: list[str] = []
    for kwargs in inputs_of(info):
        params = [torch.ones(2)]
        optimizer, other = info.optim_cls(params, **kwargs), SGD(params)
        called.clear()
        handles = [
            register_optimizer_step_pre_hook(lambda *_: called.append("all before")),
            register_optimizer_step_post_hook(lambda *_: called.append("all after")),
        ]
        for each in (optimizer, other):
            handles.append(each.register_step_pre_hook(lambda *_: called.append("before")))
            handles.append(each.register_step_post_hook(lambda *_: called.append("after")))
        for each in (optimizer, other, optimizer):
            each.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert called == ["all before", "before", "after", "all after"] * 3
