from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

from hf_lowmem_optim import OptimizerFactory
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


PAPER = LDAdam.method.options.defaults()
B1, B2 = PAPER["betas"]
#: Arguments, and what the optimizer's hyper-parameters must become.
SOURCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing set: the paper's": ({}, {"betas": (B1, B2), "eps": PAPER["eps"], "rank": PAPER["rank"]}),
    "the field's default counts as unset": ({"adam_beta1": 0.9, "adam_beta2": 0.999}, {"betas": (B1, B2)}),
    "a set field wins": ({"adam_beta1": 0.8, "adam_beta2": 0.95}, {"betas": (0.8, 0.95)}),
    "one set field": ({"adam_beta2": 0.95}, {"betas": (B1, 0.95)}),
    "optim_args win over both": ({"adam_beta1": 0.8, "optim_args": "beta1=0.9,beta2=0.999"}, {"betas": (0.9, 0.999)}),
    "one in optim_args": ({"adam_beta2": 0.95, "optim_args": "beta1=0.9"}, {"betas": (0.9, 0.95)}),
    "epsilon": ({"adam_epsilon": 1e-6}, {"eps": 1e-6}),
    "rank": ({"optim_args": "rank=8"}, {"rank": 8}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_which_value_wins(source: str) -> None:
    given, expected = SOURCES[source]
    args = TrainingArguments("out", optim="ldadam", learning_rate=2e-3, weight_decay=0.1, report_to=[], **given)
    factory = OptimizerFactory.from_training_args(args)
    hyper = {**factory.optimizer_class.method.options.defaults(), **factory.hyper}
    expected = {"lr": 2e-3, "weight_decay": 0.1, **expected}
    assert {key: hyper[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim_args": "rank=0"}, "rank=0"),
        ({"adam_beta1": 1.0}, "betas"),
        ({"optim": "adamw_torch"}, "optim='adamw_torch' is not an optimizer of this package"),
    ],
)
def test_values_out_of_range_are_refused_before_any_model(arguments: dict[str, Any], message: str) -> None:
    args = TrainingArguments("out", **{"optim": "ldadam", "report_to": [], **arguments})
    with pytest.raises(ValueError, match=message):
        OptimizerFactory.from_training_args(args)
