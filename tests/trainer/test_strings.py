"""The optimizers as strings of transformers: `optim` wherever it is taken, and what `optim_args` and its fields set."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer_optimizer
from transformers import trainer as transformers_trainer
from transformers.training_args import OptimizerNames
from transformers.utils.generic import ExplicitEnum

import hf_lowmem_optim
from hf_lowmem_optim import OPTIMIZERS, LDAdam, OptimizerFactory, register_optimizer_strings
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, Options, option
from hf_lowmem_optim.trainer import import_hook, strings
from hf_lowmem_optim.trainer.attachment import UnsupportedTransformersError
from hf_lowmem_optim.trainer.optim_args import parse_optim_args
from tests.trainer.runs import make_trainer, run_python


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = run_python("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Extended(TrainingArguments):
    extra: int = 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_string_works_wherever_transformers_takes_one(name: str, tmp_path: Path) -> None:
    settings = {"learning_rate": 3e-4, "weight_decay": 0.1, "max_grad_norm": 0}
    args = TrainingArguments(str(tmp_path), optim=name, report_to=[], **settings)
    assert args.optim == name
    assert isinstance(args.optim, OptimizerNames)
    assert TrainingArguments(str(tmp_path), report_to=[]).set_optimizer(name=name, args="beta1=0.5").optim is args.optim
    for arguments_class in (TrainingArguments, Extended):
        command_line = ["--output_dir", str(tmp_path), "--optim", name, "--report_to", "none"]
        (parsed,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(command_line)
        assert parsed.optim is args.optim
    assert json.loads(args.to_json_string())["optim"] == args.to_dict()["optim"] == name
    assert args.to_sanitized_dict()["optim"] == name
    written = {"output_dir": str(tmp_path), "optim": args.to_dict()["optim"]}
    (from_file,) = HfArgumentParser(TrainingArguments).parse_dict(written)
    assert from_file.optim is args.optim
    for twin in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert twin.optim is args.optim
    chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
    assert chosen is OPTIMIZERS[name].optimizer_class
    assert keywords == OptimizerFactory.from_training_args(args).hyper
    defaults = chosen.method.options.defaults()
    assert {**defaults, **keywords} == {**defaults, "lr": 3e-4, "weight_decay": 0.1}


def test_registering_again_changes_nothing() -> None:
    def registered() -> Any:
        members = {member.name: member for member in OptimizerNames}
        handlers = {key: handler.__name__ for key, handler in trainer_optimizer._OPTIMIZER_HANDLERS.items()}
        return members, handlers, [callback.__name__ for callback in transformers_trainer.DEFAULT_CALLBACKS]

    before = registered()
    register_optimizer_strings()
    import_hook.install()
    importlib.reload(strings).register_optimizer_strings()
    assert registered() == before
    assert sum(isinstance(finder, import_hook._PostImportFinder) for finder in sys.meta_path) == 1


def test_what_transformers_itself_refuses_has_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^ldamm is not a valid OptimizerNames.*'ldadam'"):
        TrainingArguments("out", optim="ldamm")
    # It takes optim_args apart before a handler gets them.
    args = TrainingArguments(str(tmp_path), optim="ldadam", optim_args="rank", use_cpu=True)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_a_value_of_transformers_itself_stays(caplog: pytest.LogCaptureFixture) -> None:
    module: Any = types.ModuleType("transformers.training_args")
    module.OptimizerNames = ExplicitEnum("OptimizerNames", {value.upper(): value for value in ("sgd", *OPTIMIZERS)})
    theirs = module.OptimizerNames("ldadam")
    strings.add_members(module)
    assert module.OptimizerNames("ldadam") is theirs
    assert "of its own, which stays in use" in caplog.text


def test_an_unsupported_transformers_is_named() -> None:
    with pytest.raises(UnsupportedTransformersError, match=r"transformers >= 5\.2\.0"):
        strings.add_members(types.ModuleType("transformers.training_args"))
    with pytest.raises(UnsupportedTransformersError, match="no table of optimizer handlers"):
        strings.add_handlers(types.ModuleType("transformers.trainer_optimizer"))
    # At import it is a warning, because a plain loop must still be able to import transformers.
    with pytest.warns(RuntimeWarning, match="cannot add its optim strings"):
        import_hook._after_import(types.ModuleType("transformers.training_args"))


#: Removes this package and imports it again; what was registered must be replaced.
PURGE = """
import pickle, sys
before = sys.modules["hf_lowmem_optim.trainer.import_hook"]
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_lowmem_optim"]:
    del sys.modules[name]
import hf_lowmem_optim
assert sys.modules["hf_lowmem_optim.trainer.import_hook"] is not before
"""
#: Builds a Trainer and checks that what it uses is of the package that is imported now, and there once.
CHECK = """
import collections, io, pickle, sys
from transformers import Trainer, TrainingArguments
import hf_lowmem_optim, hf_lowmem_optim.trainer.strings
from tests.trainer.runs import Reporter, make_trainer

given = {"callbacks": [reporter := Reporter(), hf_lowmem_optim.OptimizerStateMemoryCallback]}
trainer = make_trainer(sys.argv[1], optim="ldadam", optim_args="rank=4", max_steps=1, given=given)
kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
names = collections.Counter(kind.__name__ for kind in kinds)
assert {names[name] for name in ("BackwardCallback", "EarlyLogCallback", "OptimizerStateMemoryCallback")} == {1}, names
ours = [kind for kind in kinds if kind.__module__.startswith("hf_lowmem_optim")]
assert len(ours) == 3
assert all(getattr(sys.modules[kind.__module__], kind.__name__) is kind for kind in ours)
trainer.train()
assert len(reporter.seen) == 2 and all("optimizer_state/total_bytes" in logs for logs in reporter.seen), reporter.seen
assert type(trainer.optimizer.optimizer) is hf_lowmem_optim.LDAdam
chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
assert chosen is hf_lowmem_optim.LDAdam and keywords["rank"] == 4
assert pickle.loads(pickle.dumps(trainer.args.optim)) is trainer.args.optim
finders = [finder for finder in sys.meta_path if type(finder).__name__ == "_PostImportFinder"]
assert [type(finder) for finder in finders] == [sys.modules["hf_lowmem_optim.trainer.import_hook"]._PostImportFinder]
assert sys.modules["transformers.training_args"].__spec__.loader.get_source("transformers.training_args")
"""
ALL = """
import hf_lowmem_optim
assert set(hf_lowmem_optim.__all__) <= set(dir(hf_lowmem_optim))
assert all(hasattr(hf_lowmem_optim, name) for name in hf_lowmem_optim.__all__)
"""
#: Arguments load where nobody imported us.
SAVED = """
import sys, torch
for file in ("training_args.bin", "plain.pt"):
    args = torch.load(f"{sys.argv[1]}/{file}", weights_only=False)
    assert args.optim == "ldadam" and type(args.optim).__name__ == "OptimizerNames", args.optim
    assert (args.optim.value, args.optim_args) == ("ldadam", "rank=4")
assert "transformers.trainer" not in sys.modules
"""
PICKLED = """
import pickle
from transformers.training_args import OptimizerNames
pickled = pickle.dumps(OptimizerNames("ldadam"))
"""
LOADS = "assert pickle.loads(pickled) is OptimizerNames('ldadam')\n"
AFTER = "from transformers import TrainingArguments, Trainer\nimport hf_lowmem_optim\n"


#: Runs each order in a fork of a process that has imported what transformers imports, which takes longer.
FORKS = """
import importlib, importlib.util, os, sys, traceback
for name in ("torch", "torch.distributed.fsdp", "accelerate", "bitsandbytes", "datasets", "numba", "sklearn.metrics"):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
assert not {"transformers", "peft", "hf_lowmem_optim"} & sys.modules.keys()
for code in sys.argv[2:]:
    if not (child := os.fork()):
        try:
            exec(code, {})
        except BaseException:
            print(code, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
#: Before transformers, then purged; after it, purged twice; between its parts, by what was saved.
ORDERS = (
    ALL + PURGE + CHECK,
    AFTER + PICKLED + PURGE + LOADS + PURGE + CHECK + LOADS,
    SAVED + "from transformers import TrainingArguments\nimport hf_lowmem_optim\n" + CHECK,
)


def test_the_order_of_imports_does_not_matter_nor_their_number(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="ldadam", optim_args="rank=4")
    trainer.save_model(str(tmp_path))
    torch.save(trainer.args, tmp_path / "plain.pt")
    python(FORKS, str(tmp_path), *ORDERS)


def test_a_misspelt_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LDAdamm'"):
        _ = hf_lowmem_optim.LDAdamm


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
def test_values_are_typed(
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
        ({"optim_args": "rnak=4"}, "has no argument 'rnak'; did you mean 'rank'"),
        ({"adam_beta1": 1.0}, "betas"),
        ({"optim": "adamw_torch"}, "optim='adamw_torch' is not an optimizer of this package"),
    ],
)
def test_wrong_values_are_refused_before_any_model(arguments: dict[str, Any], message: str) -> None:
    args = TrainingArguments("out", **{"optim": "ldadam", "report_to": [], **arguments})
    with pytest.raises(ValueError, match=message):
        OptimizerFactory.from_training_args(args)
