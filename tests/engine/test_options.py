"""Options declared once: signature, help, defaults, checks, what a group may have, and what may change in a run."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, LDAdam, MicroAdam, SparseMFAC
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import COUNT, NOT_NEGATIVE, UNIT, Options, option
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import CASES, assert_equal, assert_same_state, gradients, make_params, run

every_name = pytest.mark.parametrize("name", OPTIMIZERS)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (20, 30), generator=torch.Generator().manual_seed(0)))


@every_name
def test_the_class_shows_every_option_with_default_type_and_help(name: str) -> None:
    cls = OPTIMIZERS[name].optimizer_class
    parameters = dict(inspect.signature(cls).parameters)
    first = parameters.pop("params")
    assert first.default is inspect.Parameter.empty
    defaults, types, texts = (
        f() for f in (cls.method.options.defaults, cls.method.options.types, cls.method.options.help)
    )
    assert {key: p.default for key, p in parameters.items()} == defaults
    assert {key: p.annotation for key, p in parameters.items()} == types
    assert list(texts) == list(defaults) == list(types)
    positional = [key for key, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["lr", "betas", "eps", "weight_decay"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for key, p in parameters.items() if key not in positional)
    assert cls.__doc__ is not None
    for key, text in texts.items():
        assert f"\n    {key}: {text}" in cls.__doc__
        assert len(text) > 10
    # and the defaults are values that pass
    group = cls([weight()]).param_groups[0]
    assert {key: group[key] for key in defaults} == defaults
    assert set(cls.method.shaping) <= set(defaults) and cls.method.switch[0] in cls.method.shaping


@every_name
def test_the_first_four_may_be_given_by_position_as_to_torch(name: str) -> None:
    cls, values = OPTIMIZERS[name].optimizer_class, (0.5, (0.5, 0.25), 1e-5, 0.125)
    group = cls([weight()], *values).param_groups[0]
    assert tuple(group[key] for key in ("lr", "betas", "eps", "weight_decay")) == values
    with pytest.raises(TypeError, match=r"takes lr, betas, eps, weight_decay by position; .* by name"):
        cls([weight()], *values, "param")
    with pytest.raises(TypeError, match="got 'lr' twice"):
        cls([weight()], 0.5, lr=0.5)
    with pytest.raises(TypeError, match=r"no argument 'weight_decya'; did you mean 'weight_decay'\? \(it has: lr, "):
        cls([weight()], weight_decya=0.1)
    with pytest.raises(TypeError, match=r"no argument 'capturable' \(it has: lr, "):
        cls([weight()], capturable=True)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ldadam", "window", 4),
        ("ldadam", "clip_tensor_norm", 1.0),
        ("microadam", "rank", 4),
        ("sparse_mfac", "rho", 0.5),
        ("lowrank_mfac_layerwise", "density", 0.1),
    ],
)
def test_an_option_of_another_method_is_refused_in_a_group(name: str, key: str, value: Any) -> None:
    cls = OPTIMIZERS[name].optimizer_class
    for build in (
        lambda: cls([{"params": [weight()], key: value}]),
        lambda: cls([weight()]).add_param_group({"params": [weight()], key: value}),
    ):
        with pytest.raises(
            TypeError, match=rf"key '{key}', which is an option of another method; {cls.__name__} has: "
        ):
            build()
    with pytest.raises(TypeError, match=r"unknown key 'error_feedbakc'; did you mean 'error_feedback'\?"):
        LDAdam([{"params": [weight()], "error_feedbakc": "fp32"}])


#: What torch, its schedulers and other libraries leave in groups.
FOREIGN = {
    **dict.fromkeys(("initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale", "max_momentum", "base_momentum"), 0.5),
    **dict.fromkeys(("differentiable", "capturable", "maximize"), False),
    "foreach": None,
    "fused": True,
    "name": "decoder",
}


@every_name
def test_what_others_add_to_a_group_passes_and_is_kept(name: str) -> None:
    params = make_params()
    optimizer = CASES[name].build([{"params": list(params.items()), **FOREIGN}])
    assert optimizer.param_groups[0]["param_names"] == list(params)
    run(optimizer, params, gradients(2))
    saved = copy.deepcopy(optimizer.state_dict())
    assert FOREIGN.items() <= saved["param_groups"][0].items()
    again = CASES[name].build(params.values())
    again.load_state_dict(saved)
    assert FOREIGN.items() <= again.param_groups[0].items()
    assert_same_state(optimizer, again)
    # and without them the run is the same
    plain = make_params()
    run(CASES[name].build(plain.values()), plain, gradients(2))
    assert_equal(params.values(), plain.values())


def test_torchs_schedulers_drive_groups() -> None:
    optimizer = LDAdam([weight()], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6, cycle_momentum=True)
    seen = set()
    for _ in range(5):
        optimizer.step()
        schedule.step()
        seen.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    assert len(seen) == 5


@every_name
def test_what_does_not_shape_the_state_may_change_between_steps(name: str) -> None:
    """As if the optimizer had been built with the new values and the old state."""
    changes: dict[str, Any] = {"lr": 0.05, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.3, "damping": 0.1}
    changes |= {"rho": 0.5, "alpha": 0.25, "bias_correction": "window", "stochastic_rounding": True, "momentum": 0.25}
    own = OPTIMIZERS[name].optimizer_class.method
    changes = {key: value for key, value in changes.items() if key in own.options.defaults()}
    if own.options.types().get("bias_correction") is bool:
        changes["bias_correction"] = False
    assert not changes.keys() & set(own.shaping)
    params = make_params()
    optimizer = CASES[name].build(params.values())
    run(optimizer, params, gradients(3))
    other, unchanged = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
    optimizer.param_groups[0].update(changes)
    saved = other.state_dict()
    saved["param_groups"][0].update(changes)
    rebuilt = CASES[name].build(other.param_groups[0]["params"], **changes)
    rebuilt.load_state_dict(saved)
    ends = []
    for each in (optimizer, rebuilt, unchanged):
        ends.append(dict(zip(params, each.param_groups[0]["params"], strict=True)))
        run(each, ends[-1], gradients(3, seed=7))
    assert_equal(ends[0].values(), ends[1].values())
    assert_same_state(optimizer, rebuilt)
    assert not any(torch.equal(ends[0][key], ends[2][key]) for key in ("wide", "conv"))


OTHER_VALUES: dict[str, Any] = {
    "rank": 2, "state_dtype": "param", "dense_state": "fp32", "window": 5, "density": 0.3, "block_size": 128,
    "quant_block_size": 16, "bits": 8, "min_compress_size": 200, "value_dtype": "fp32", "error_feedback": "bf16",
    "scope": "tensor", "dct_type": 2, "basis": "identity", "stacked": True, "sync_every": 5, "projection": "svd",
    "grafting": "adam", "statistics_dtype": "4bit", "root_dtype": "bf16", "moment_dtype": "fp32",
}  # fmt: skip


@every_name
@pytest.mark.parametrize("when", ["after steps", "after a load", "in a copy"])
def test_what_shapes_the_state_cannot_change_in_a_run(name: str, when: str) -> None:
    """Refused before anything moves; set back, the run goes on as if nothing had been."""
    case = CASES[name]
    keys = [key for key in case.method.shaping if not (case.layerwise and key == "scope")]
    params, twins = make_params(), make_params()
    optimizer, reference = case.build(params.values()), case.build(twins.values())
    for each, tensors in ((optimizer, params), (reference, twins)):
        run(each, tensors, gradients(3))
    if when == "after a load":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = case.build(params.values())
        optimizer.load_state_dict(saved)
    elif when == "in a copy":
        optimizer = copy.deepcopy(optimizer)
        params = dict(zip(params, optimizer.param_groups[0]["params"], strict=True))
    group, before = optimizer.param_groups[0], {key: param.detach().clone() for key, param in params.items()}
    for key in keys:
        old, group[key] = group[key], OTHER_VALUES[key]
        assert group[key] != old
        with pytest.raises(ValueError, match=rf"{key}={group[key]!r} of a parameter group was {key}={old!r} when"):
            run(optimizer, params, gradients(1, seed=9))
        group[key] = old
    assert_equal(params.values(), before.values())
    for each, tensors in ((optimizer, params), (reference, twins)):
        run(each, tensors, gradients(3, seed=7))
    assert_equal(params.values(), twins.values())
    assert_same_state(optimizer, reference)


def test_before_the_first_gradient_everything_may_change() -> None:
    optimizer = MicroAdam([weight(64, 128)], window=4)
    optimizer.param_groups[0].update(window=7, block_size=64)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["indices"].shape[0] == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", -0.1, "lr"),
        ("betas", (0.9, 1.5), "betas"),
        ("damping", 0.0, "damping"),
        ("momentum", "big", "momentum"),
        ("damping", 0.5, r"damping=0\.5 of a parameter group differs"),
    ],
)
def test_a_wrong_value_is_refused_in_a_run_before_anything_moves(key: str, value: Any, message: str) -> None:
    """Out of range, or not what the other groups have."""
    params = {"wide": weight(12, 40), "tall": weight(40, 12)}
    optimizer = SparseMFAC([{"params": [each]} for each in params.values()], window=4)
    run(optimizer, params, gradients(3))
    twin = copy.deepcopy(optimizer)
    optimizer.param_groups[1][key] = value
    with pytest.raises((TypeError, ValueError), match=message):
        run(optimizer, params, gradients(1))
    assert_equal(params.values(), [group["params"][0] for group in twin.param_groups])
    assert_same_state(optimizer, twin)


@dataclass(frozen=True)
class MyOptions(Options):
    size: int | None = option(2, "How much.", within=COUNT, none="dense AdamW", shapes_state=True)
    mode: Literal["a", "b"] = option("a", "How.")
    share: float = option(0.5, "Of what.", within=UNIT)
    on: bool = option(True, "Whether.")

    def check(self) -> None:
        if self.mode == "b" and not self.on:
            raise ValueError("mode='b' needs on=True")


def test_declarations_are_checked() -> None:
    assert MyOptions.help()["size"] == "How much. (an int ≥ 1; None: dense AdamW)"
    assert MyOptions.shaping() == ("dense_state", "stacked", "size")
    assert MyOptions.of({"share": np.float64(0.25)}, "Mine") == MyOptions(share=0.25)
    for wrong, error, message in (
        ({"size": 0}, ValueError, r"size=0 is out of range; it must be an int ≥ 1, or None \(dense AdamW\)"),
        ({"size": 2.0}, TypeError, r"size=2\.0 is a float; it must be an int ≥ 1"),
        ({"share": None}, TypeError, r"share=None is a NoneType; it must be a float in \[0, 1\)"),
        ({"share": True}, TypeError, "share=True is a bool"),
        ({"share": float("nan")}, ValueError, "share=nan is not finite"),
        ({"mode": "A"}, ValueError, "mode='A' is not one of 'a', 'b'"),
        ({"on": 1}, TypeError, "on=1 is a int; it must be True or False"),
        ({"mode": "b", "on": False}, ValueError, "mode='b' needs on=True"),
        ({"betas": "ab"}, TypeError, "two floats"),
        ({"betas": (0.9, True)}, TypeError, r"betas\[1\]=True"),
        ({"sise": 3}, TypeError, r"Mine has no argument 'sise'; did you mean 'size'\?"),
    ):
        with pytest.raises(error, match=message):
            MyOptions.of(wrong, "Mine")
    assert NOT_NEGATIVE.contains(0.0)


def test_a_mistyped_description_is_refused_when_it_is_made() -> None:
    def no_state(shape: Any, dtype: torch.dtype, o: MyOptions, /) -> None:
        return None

    def update_(*_: Any) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match=r"switch=\('sise', None\) of the method 'mine' names no option of MyOptions"):
        Method("mine", MyOptions, no_state, update_, switch=("sise", None))
    with pytest.raises(ValueError, match="of the method 'mine' names 'alhpa', which is no option of MyOptions"):
        Method("mine", MyOptions, no_state, update_, switch=("size", None), corrected={"alhpa": 0.0})
    for updates in ({}, {"update_": update_, "coupled_update_": update_}):
        with pytest.raises(ValueError, match="'mine' needs update_ or coupled_update_, and not both"):
            Method("mine", MyOptions, no_state, switch=("size", None), **updates)  # type: ignore[arg-type]

    class Nothing(LowMemoryOptimizer):
        """Has no method."""

    with pytest.raises(TypeError, match=r"Nothing has no class attribute `method = Method\(\.\.\.\)`"):
        Nothing([weight()])
