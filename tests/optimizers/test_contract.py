"""What every registered optimizer must do; one suite for all of them."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_lowmem_optim.engine import adamw
from hf_lowmem_optim.engine.buckets import own_tensors
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from hf_lowmem_optim.registry import OPTIMIZERS
from tests.optimizers.cases import (
    CASES,
    DEVICES,
    MIN_QUANTIZED,
    SHAPES,
    VARIANTS,
    WRONG_EVERYWHERE,
    Case,
    assert_equal,
    assert_resumes,
    assert_same_state,
    gradients,
    make_params,
    odd_layout,
    run,
    through_a_file,
)

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *NARROW]
ALL = {**CASES, **VARIANTS}
#: Of few blocks, which take half the time; blocks of several sizes in a matrix are in "dash as published".
ALL |= {name: replace(ALL[name], hyper={**ALL[name].hyper, "block_size": 48}) for name in ("dash", "dash_layerwise")}


def test_every_registered_optimizer_has_a_case() -> None:
    assert {case.name for case in CASES.values()} == set(OPTIMIZERS)


def each_with(name: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """Every method with every value; with one, in turn, their layer-wise modes and variants, which share the update."""
    methods = {key for key, case in ALL.items() if key == case.name and not case.layerwise}
    pairs = [
        pytest.param(key, value, id=f"{key}-{getattr(value, '__name__', value)}")
        for number, key in enumerate(ALL)
        for value in (values if key in methods else [values[number % len(values)]])
    ]
    return pytest.mark.parametrize(("case", name), pairs, indirect=["case"])


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    chosen = ALL[request.param]
    if chosen.hyper.get("dense_state") == "8bit":
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr(adamw, "_MIN_QUANTIZED_ENTRIES", MIN_QUANTIZED)
    return chosen


@each_with("dtype", DTYPES)
def test_state_is_what_the_specs_say_and_appears_at_the_first_gradient(case: Case, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = case.build(params.values())
    assert not optimizer.state
    del params["vector"]
    run(optimizer, params, gradients(3, dtype))
    group = optimizer.param_groups[0]
    assert any(optimizer.method.compresses(p.shape, group) for p in params.values())
    for index, param in enumerate(group["params"]):
        if list(SHAPES)[index] == "vector":
            assert param not in optimizer.state
            continue
        state = own_tensors(optimizer.state[param])
        assert optimizer.state[param]["step"] == 3 and type(optimizer.state[param]["step"]) is int
        specs = optimizer.method.state_specs(param, group)
        assert {k: (tuple(v.shape), v.dtype, v.nbytes) for k, v in state.items()} == {
            k: (s.shape, s.dtype, s.nbytes + s.in_gradient_bytes) for k, s in specs.items()
        }
        in_gradient = {k for k, s in specs.items() if s.in_gradient_bytes}
        assert in_gradient == (
            {"error"} if case.takes_gradients and optimizer.method.compresses(param.shape, group) else set()
        )


@pytest.mark.parametrize("device", DEVICES)
@each_with("dtype", DTYPES)
def test_resume_is_bit_for_bit(case: Case, dtype: torch.dtype, device: str) -> None:
    """With more steps before and after than a window has rows."""
    assert_resumes(case, list(gradients(10, dtype, device=device)), 5)


@pytest.mark.parametrize("device", DEVICES)
@each_with("dtype", NARROW)
def test_resume_with_weights_rounded_stochastically_is_bit_for_bit(case: Case, dtype: torch.dtype, device: str) -> None:
    """Also into and from a layout that has no flat view."""
    steps = list(gradients(8, dtype, device=device))
    assert_resumes(case, steps, 4, layout=odd_layout, weight_rounding="stochastic")


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@each_with("copier", [copy.deepcopy, through_pickle])
def test_copies_go_on_alike(case: Case, copier: Callable[[Any], Any]) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(4))
    twin_optimizer = copier(optimizer)
    twins = dict(zip(params, twin_optimizer.param_groups[0]["params"], strict=True))
    for each, tensors in ((optimizer, params), (twin_optimizer, twins)):
        run(each, tensors, gradients(4, seed=5))
    assert_equal(params.values(), twins.values())
    assert_same_state(optimizer, twin_optimizer)
    assert_takes_a_group(twin_optimizer)


def assert_takes_a_group(optimizer: LowMemoryOptimizer) -> None:
    """Torch puts a default of its own into an optimizer that has been loaded or copied."""
    late = nn.Parameter(torch.ones(12, 40))
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    (late * 2).sum().backward()
    optimizer.step()
    assert optimizer.state[late]["step"] == 1 and optimizer.param_groups[1]["lr"] == 0.25
    assert all(group.keys() == {"params", *optimizer.method.options.defaults()} for group in optimizer.param_groups)


def test_layout_does_not_matter_and_the_gradient_is_left_alone(case: Case) -> None:
    plain = make_params()
    odd = {key: nn.Parameter(odd_layout(param.detach())) for key, param in make_params().items()}
    first, second = case.build(plain.values()), case.build(odd.values())
    run(first, plain, gradients(5))
    for grads in gradients(5):
        for key, param in odd.items():
            # neither the parameter's layout nor contiguous, where the shape allows it
            grad = grads[key].clone()
            param.grad = grad.repeat_interleave(2, dim=-1)[..., ::2] if grad.ndim else grad
        before = {k: (p.grad, p.grad.data_ptr(), p.grad.clone()) for k, p in odd.items()}
        second.step()
        for key, param in odd.items():
            given, address, value = before[key]
            assert given.data_ptr() == address and torch.equal(given, value)
            taken = case.takes_gradients and second.method.compresses(param.shape, second.param_groups[0])
            assert param.grad is (None if taken else given)
    for key in SHAPES:
        torch.testing.assert_close(plain[key], odd[key], rtol=1e-5, atol=1e-6)


def test_dense_groups_are_torch_adamw_to_the_bit(case: Case) -> None:
    hyper = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
    if "dense_state" in case.hyper:
        pytest.skip("other oracles: tests/optimizers/test_dense_state.py")
    for dtype in DTYPES:
        ours, theirs = make_params(dtype), make_params(dtype)
        optimizer = case.build([{"params": list(ours.values()), case.dense_key: None, **hyper}])
        torch_adamw = torch.optim.AdamW(theirs.values(), fused=True, **hyper)
        for each, tensors in ((optimizer, ours), (torch_adamw, theirs)):
            run(each, tensors, gradients(6, dtype))  # type: ignore[arg-type]
        for key in SHAPES:
            assert torch.equal(ours[key], theirs[key]), (key, dtype)
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[ours[key]][name], torch_adamw.state[theirs[key]][name])


def test_tensors_count_their_own_updates(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    alone = make_params()
    reference = case.build([alone["wide"]])
    for index, grads in enumerate(gradients(6)):
        for key, param in params.items():
            param.grad = None if key == "wide" and index < 3 else grads[key].clone()
        optimizer.step()
        if index >= 3:
            alone["wide"].grad = grads["wide"].clone()
            reference.step()
    assert [optimizer.state[p]["step"] for p in params.values()] == [3] + [6] * (len(SHAPES) - 1)
    if not case.coupled:
        assert torch.equal(params["wide"], alone["wide"])


def test_zero_gradients_and_rates_move_nothing(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values(), weight_decay=0.0)
    before = {k: p.detach().clone() for k, p in params.items()}
    zeros = [{k: torch.zeros(s) for k, s in SHAPES.items()}] * 3
    run(optimizer, params, iter(zeros))
    assert_equal(params.values(), before.values())
    run(optimizer, params, gradients(3))
    run(optimizer, params, iter(zeros))
    assert all(torch.isfinite(p).all() for p in params.values())
    assert all(torch.isfinite(v).all() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    # with lr = 0 a step only gathers statistics
    still = make_params()
    optimizer = case.build(still.values(), lr=0.0)
    run(optimizer, still, gradients(2))
    assert_equal(still.values(), before.values())
    assert all(state["step"] == 2 for state in optimizer.state.values())


def accelerates_round_trip(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    Accelerator(cpu=True)
    AcceleratedOptimizer(optimizer)


def step_with_zero_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """With lr = 0 too, as torch.distributed.checkpoint does to learn the layout of the state."""
    assert set(get_optimizer_state_dict(model, optimizer)["state"]) == set(SHAPES)


@each_with("probe", [accelerates_round_trip, step_with_zero_gradients])
def test_wrappers_leave_no_trace(case: Case, probe: Callable[[nn.Module, torch.optim.Optimizer], None]) -> None:
    model, twin = (nn.ParameterDict(make_params()) for _ in range(2))
    optimizer, untouched = case.build(model.parameters()), case.build(twin.parameters())
    for seed in (1, 2):
        probe(model, optimizer)
        for each, tensors in ((optimizer, model), (untouched, twin)):
            run(each, dict(tensors.items()), gradients(4, seed=seed))
    assert_equal(model.values(), twin.values())
    assert_same_state(optimizer, untouched)


@each_with("flat", [False, True])
def test_a_distributed_checkpoint_carries_everything(case: Case, flat: bool) -> None:
    model, twin = (nn.ParameterDict(make_params()) for _ in range(2))
    optimizer, second = case.build(model.parameters()), case.build(twin.parameters())
    run(optimizer, dict(model.items()), gradients(6))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert get_optimizer_state_dict(twin, second, options=options).keys() == saved.keys()
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, second, saved, options=options)
    for each, tensors in ((optimizer, model), (second, twin)):
        run(each, dict(tensors.items()), gradients(5, seed=3))
    assert_equal(model.values(), twin.values())
    assert_same_state(optimizer, second)


@pytest.mark.parametrize("device", DEVICES)
def test_not_finite_gradients_show_in_the_parameter(case: Case, device: str) -> None:
    for bad in (float("nan"), float("inf")):
        for first in (0, 3):
            params = make_params(device=device)
            optimizer = case.build(params.values())
            run(optimizer, params, gradients(first, device=device))
            grads = next(gradients(1, device=device))
            for grad in grads.values():
                grad.view(-1)[0] = bad
            run(optimizer, params, iter([grads]))
            assert all(not torch.isfinite(p).all() for p in params.values())


@contextlib.contextmanager
def settings_of_the_process(precision: str, dtype: torch.dtype) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "medium"):
            yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)


@each_with("given", [("medium", torch.float32), ("highest", torch.bfloat16), ("highest", torch.float64)])
def test_the_settings_of_the_process_do_not_matter(case: Case, given: tuple[str, torch.dtype]) -> None:
    """Nor does the global random state, which is left alone."""
    ends = []
    for settings in (("highest", torch.float32), given):
        params, steps = make_params(), list(gradients(6))
        before = torch.manual_seed(len(ends)).get_state()
        with settings_of_the_process(*settings):
            optimizer = case.build(params.values())
            run(optimizer, params, iter(steps))
        assert torch.equal(torch.get_rng_state(), before)
        ends.append((params, optimizer))
    (params, optimizer), (others, other) = ends
    assert_equal(params.values(), others.values())
    assert_same_state(optimizer, other)


def test_a_backward_pass_through_an_older_graph_is_refused(case: Case) -> None:
    """It would take the new values for the old ones; torch notices by the version of a tensor."""
    params = make_params()
    optimizer = case.build(params.values())
    losses = {key: param.square().sum() for key, param in params.items()}
    run(optimizer, params, gradients(1))
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_closure_is_called_first_and_its_loss_returned(case: Case) -> None:
    """With gradients, in the mode in which training runs, and to the same effect as calling it oneself."""
    weights = [nn.Parameter(torch.linspace(-1, 1, 480).view(12, 40)) for _ in range(2)]
    optimizer, other = (case.build([weight]) for weight in weights)

    def closure(index: int = 0) -> torch.Tensor:
        assert torch.is_grad_enabled()
        (optimizer, other)[index].zero_grad()
        loss = weights[index].square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).item())  # type: ignore[arg-type, attr-defined]
        assert losses[-1] == closure(1).item()
        other.step()
        assert torch.equal(*weights)
    assert losses == sorted(losses, reverse=True)


def test_sparse_and_complex_gradients_are_refused_before_anything_moves(case: Case) -> None:
    if case.layerwise:
        pytest.skip("refused when they come: tests/optimizers/test_layerwise.py")
    embedding = nn.Embedding(50, 20, sparse=True)
    other = nn.Parameter(torch.randn(12, 40))
    optimizer = case.build([("other", other), ("embedding.weight", embedding.weight)])
    (embedding(torch.tensor([1, 2])).sum() + other.square().sum()).backward()
    before = other.detach().clone()
    with pytest.raises(RuntimeError, match=r"'embedding.weight' has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.equal(other, before) and not optimizer.state
    with pytest.raises(TypeError, match="complex64"):
        case.build([nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="float64"):
        case.build([nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))])
    with pytest.raises(ValueError, match="not a leaf"):
        case.build([nn.Parameter(torch.randn(12, 40)) * 2])


ODD_SHAPES = [
    (),
    (0,),
    (0, 16),
    (16, 0),
    (3, 0, 4),
    (1,),
    (1, 500),
    (500, 1),
    (17, 17),
    (2, 3, 4, 5, 6),
    (40, 1, 1, 50),
]


@each_with("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes(case: Case, dtype: torch.dtype) -> None:
    """Empty, of one entry, with dimensions of one, of five dimensions: alone beside a matrix, with state that loads."""
    for shape in ODD_SHAPES:
        odd, other = nn.Parameter(torch.ones(shape, dtype=dtype)), nn.Parameter(torch.ones(64, 128, dtype=dtype))
        optimizer = case.build([odd, other])
        for _ in range(3):
            (odd.float().sum() + other.float().square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(odd).all() and torch.isfinite(other).all()
        again = case.build([odd, other])
        again.load_state_dict(optimizer.state_dict())
        assert_same_state(optimizer, again)


def test_groups_override_every_hyperparameter(case: Case) -> None:
    defaults = OPTIMIZERS[case.name].optimizer_class.method.options.defaults()
    weight = nn.Parameter(torch.randn(12, 40))
    optimizer = case.build([{"params": [weight], "lr": 0.5}])
    second = nn.Parameter(torch.randn(12, 40))
    # a preconditioner over all groups cannot have two windows
    defaults = {**defaults, **{key: case.hyper[key] for key in case.shared_keys if key in case.hyper}}
    optimizer.add_param_group({"params": [second], **defaults})
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert {k: optimizer.param_groups[1][k] for k in defaults} == defaults
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_numpy_numbers_are_saved_as_plain_ones(case: Case) -> None:
    params, numbers = make_params(), {float: np.float64, int: np.int64}
    settings = {key: numbers[type(value)](value) for key, value in case.hyper.items() if type(value) in numbers}
    settings["betas"] = [np.float32(0.5), 0.75]
    optimizer = case.build(params.values(), **settings)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(5))], **settings, "lr": np.int64(0)})
    run(optimizer, params, gradients(2))
    groups = through_a_file(optimizer.state_dict())["param_groups"]
    assert groups[0]["betas"] == (0.5, 0.75) and {key: groups[0][key] for key in case.hyper} == case.hyper
    assert groups[1]["lr"] == 0
    # a schedule of one's own
    optimizer.param_groups[0]["lr"] = np.float32(0.5)
    run(optimizer, params, gradients(1))


def test_wrong_values_name_the_argument(case: Case) -> None:
    known = OPTIMIZERS[case.name].optimizer_class.method.options.defaults()
    wrong = [(n, v) for n, values in {**WRONG_EVERYWHERE, **case.wrong}.items() for v in values if n in known]
    assert len(wrong) > 5
    for name, value in wrong:
        with pytest.raises((TypeError, ValueError), match=name):
            case.build([nn.Parameter(torch.zeros(20, 20))], **{name: value})
        with pytest.raises((TypeError, ValueError), match=name):
            case.build([{"params": [nn.Parameter(torch.zeros(20, 20))], name: value}])


def test_state_of_something_else_is_refused_and_changes_nothing(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(2))
    (key, value), *_ = case.other.items()
    other = case.build(make_params().values(), **case.other)
    with pytest.raises(ValueError, match=f"{key}={optimizer.param_groups[0][key]!r}.*{key}={value!r}"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0][key] == value and not other.state

    theirs = make_params()
    adamw = torch.optim.AdamW(theirs.values())
    run(adamw, theirs, gradients(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another optimizer wrote it"):
        optimizer.load_state_dict(adamw.state_dict())

    fewer = case.build(list(make_params().values())[:-1])
    counts = rf"groups of \[{len(SHAPES)}\] parameters, this optimizer has \[{len(SHAPES) - 1}\]"
    with pytest.raises(ValueError, match=counts):
        fewer.load_state_dict(optimizer.state_dict())

    transposed = make_params()
    transposed["wide"], transposed["square"] = transposed["square"], transposed["wide"]
    swapped = case.build(transposed.values())
    with pytest.raises(ValueError, match="cannot load the state of parameter"):
        swapped.load_state_dict(optimizer.state_dict())


def test_load_hooks_of_the_user_see_plain_state(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(2))
    seen: list[bool] = []
    fresh = case.build(params.values())
    fresh.register_load_state_dict_pre_hook(lambda o, s: seen.append(isinstance(s["state"][0], dict)))
    fresh.register_load_state_dict_post_hook(lambda o: seen.append("step" in o.state[params["wide"]]))
    fresh.load_state_dict(optimizer.state_dict())
    assert seen == [True, True]
    assert_same_state(optimizer, fresh)
    assert_takes_a_group(fresh)


def test_a_refused_constructor_leaves_no_hooks(case: Case) -> None:
    """Also while somebody keeps the exception, and with it the frames that know the optimizer."""
    params = make_params()
    wrong = nn.Parameter(torch.zeros(20, 30, dtype=torch.float64))
    with pytest.raises(TypeError) as refused:
        case.build([{"params": list(params.values())}, {"params": [wrong]}])
    before = {key: param.detach().clone() for key, param in params.items()}
    for _ in range(2):
        sum(param.square().sum() for param in params.values()).backward()  # type: ignore[union-attr]
    assert refused.value
    for key, param in params.items():
        assert torch.equal(param, before[key])
        assert param.grad is not None and torch.equal(param.grad, 4 * before[key])


def test_a_gradient_of_another_dtype_is_not_for_the_dense_rule(case: Case) -> None:
    param = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch has no such gradients")
    param.grad_dtype = torch.float32
    optimizer = case.build([{"params": [param], case.dense_key: None}])
    param.grad = torch.ones(10)
    with pytest.raises(RuntimeError, match=r"bfloat16 with a gradient of torch\.float32; the dense rule needs"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param)) and not optimizer.state


def test_resume_says_which_new_settings_have_no_effect(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    params = make_params()
    first, *others = params.values()
    groups = [{"params": [first]}, {"params": others}]
    optimizer = case.build(groups)
    run(optimizer, params, gradients(1))
    case.build(groups, lr=0.5).load_state_dict(optimizer.state_dict())
    assert "goes on with" not in caplog.text
    other = case.build(groups, weight_decay=0.25)
    other.load_state_dict(optimizer.state_dict())
    (said,) = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
    assert said.startswith("training goes on with weight_decay=0.1, as it was saved; the weight_decay=0.25 of this")
    assert said.endswith("has no effect (parameter groups 0, 1)")
    assert other.param_groups[0]["weight_decay"] == 0.1
