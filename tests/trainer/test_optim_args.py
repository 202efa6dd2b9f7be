from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, Options, option
from hf_lowmem_optim.optimizers.ldadam import LDAdam
from hf_lowmem_optim.trainer.optim_args import parse_optim_args


@dataclass(frozen=True)
class EveryOptions(Options):
    """Options of every type."""

    size: int = option(3, "A size.", within=COUNT)
    limit: int | None = option(4, "A limit.", within=COUNT, none="no limit")
    mode: Literal["a", "b"] = option("a", "A mode.")
    exact: bool = option(False, "A switch.")


class Every(LowMemoryOptimizer):
    """An optimizer for its options only."""

    method = Method("every", EveryOptions, lambda *_: None, lambda *_: None, switch=("exact", False))


@pytest.mark.parametrize(
    ("optimizer_class", "text", "expected"),
    [
        (LDAdam, None, {}),
        (LDAdam, "", {}),
        (LDAdam, "rank=8", {"rank": 8}),
        (LDAdam, "rank=none", {"rank": None}),
        (LDAdam, " rank = 8 , rho=.5 ", {"rank": 8, "rho": 0.5}),
        (LDAdam, "beta1=0.9,beta2=0.999", {"beta1": 0.9, "beta2": 0.999}),
        (LDAdam, "error_feedback=none", {"error_feedback": "none"}),
        (Every, "size=2,limit=None,mode=b,exact=True", {"size": 2, "limit": None, "mode": "b", "exact": True}),
        (Every, "exact=false", {"exact": False}),
    ],
)
def test_values_are_typed_by_the_signature(
    optimizer_class: type[LowMemoryOptimizer], text: str | None, expected: dict[str, Any]
) -> None:
    parsed = parse_optim_args(text, optimizer_class)
    assert parsed == expected
    assert [type(value) for value in parsed.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("optimizer_class", "text", "message"),
    [
        (LDAdam, "rnak=4", "has no argument 'rnak'; did you mean 'rank'"),
        (LDAdam, "beta3=0.4", "did you mean 'beta"),
        (LDAdam, "rank=x", "rank='x' is not an int or none"),
        (LDAdam, "rank=8.5", "rank='8.5' is not an int or none"),
        (LDAdam, "rank=", "rank='' is not an int or none"),
        (LDAdam, "rho=much", "rho='much' is not a float"),
        (LDAdam, "rank", "'rank' is not of the form key=value"),
        (LDAdam, "rank=4,", "'' is not of the form key=value"),
        (LDAdam, "rank=4=5", "'rank=4=5' is not of the form key=value"),
        (LDAdam, "rank=4,rho=0.5,rank=8", "'rank' is given twice"),
        (LDAdam, "error_feedback=fp64", "not one of param, fp32, bf16, 8bit, 4bit, grad, none"),
        (LDAdam, "betas=(0.9,0.99)", "write beta1"),
        (LDAdam, "lr=1e-3", "TrainingArguments.learning_rate="),
        (LDAdam, "weight_decay=0.1", "TrainingArguments.weight_decay="),
        (LDAdam, "eps=1e-6", "TrainingArguments.adam_epsilon="),
        (LDAdam, "params=1", "has no argument 'params'"),
        (Every, "exact=maybe", "exact='maybe' is not true or false"),
        (Every, "beta3=0.9", "has no argument 'beta3'"),
        (Every, "size=none", "size='none' is not an int"),
    ],
)
def test_what_is_not_understood_is_refused(optimizer_class: type[LowMemoryOptimizer], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        parse_optim_args(text, optimizer_class)
    assert f"optim_args={text!r}" in str(error.value)


@dataclass(frozen=True)
class Source:
    """Arguments and what the optimizer's hyper-parameter must become."""

    arguments: dict[str, Any]
    hyper: dict[str, Any]


PAPER = LDAdam.method.options.defaults()
B1, B2 = PAPER["betas"]
SOURCES = {
    "nothing set: the paper's": Source({}, {"betas": (B1, B2), "eps": PAPER["eps"], "rank": PAPER["rank"]}),
    "the field's default counts as unset": Source({"adam_beta1": 0.9, "adam_beta2": 0.999}, {"betas": (B1, B2)}),
    "a set field wins": Source({"adam_beta1": 0.8, "adam_beta2": 0.95}, {"betas": (0.8, 0.95)}),
    "one set field": Source({"adam_beta2": 0.95}, {"betas": (B1, 0.95)}),
    "optim_args win over both": Source(
        {"adam_beta1": 0.8, "optim_args": "beta1=0.9,beta2=0.999"}, {"betas": (0.9, 0.999)}
    ),
    "one in optim_args": Source({"adam_beta2": 0.95, "optim_args": "beta1=0.9"}, {"betas": (0.9, 0.95)}),
    "epsilon": Source({"adam_epsilon": 1e-6}, {"eps": 1e-6}),
    "rate and decay": Source(
        {"learning_rate": 2e-3, "weight_decay": 0.1, "optim_args": "rank=8"},
        {"lr": 2e-3, "weight_decay": 0.1, "rank": 8},
    ),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_which_value_wins(source: Source) -> None:
    args = TrainingArguments("out", optim="ldadam", report_to=[], **source.arguments)
    factory = OptimizerFactory.from_training_args(args)
    hyper = {**factory.optimizer_class.method.options.defaults(), **factory.hyper}
    assert {key: hyper[key] for key in source.hyper} == source.hyper


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_made_from_bare_arguments(name: str) -> None:
    args = TrainingArguments("out", optim=name, learning_rate=3e-4, weight_decay=0.1, max_grad_norm=0, report_to=[])
    factory = OptimizerFactory.from_training_args(args)
    assert factory.name == name
    defaults = factory.optimizer_class.method.options.defaults()
    assert {**defaults, **factory.hyper} == {**defaults, "lr": 3e-4, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optim_args": "rank=0"}, ValueError, "rank=0"),
        ({"adam_beta1": 1.0}, ValueError, "betas"),
        ({"optim": "adamw_torch"}, ValueError, "optim='adamw_torch' is not an optimizer of this package"),
    ],
)
def test_values_out_of_range_are_refused_before_any_model(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    args = TrainingArguments("out", **{"optim": "ldadam", "report_to": [], **arguments})
    with pytest.raises(error, match=message):
        OptimizerFactory.from_training_args(args)
