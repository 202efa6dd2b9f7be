from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import pickle
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer_optimizer
from transformers import trainer as transformers_trainer
from transformers.training_args import OptimizerNames

import hf_lowmem_optim
from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, register_optimizer_strings
from hf_lowmem_optim.trainer import import_hook, strings
from hf_lowmem_optim.trainer.attachment import UnsupportedTransformersError
from tests.trainer.runs import make_trainer
from tests.trainer.tiny_models import tiny_llama

REPOSITORY = Path(__file__).parents[2]


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter, from the root of the repository, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Extended(TrainingArguments):
    extra: int = 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_string_works_wherever_transformers_takes_one(name: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), optim=name, max_grad_norm=0, report_to=[])
    assert args.optim == name
    assert isinstance(args.optim, OptimizerNames)
    assert TrainingArguments(str(tmp_path), report_to=[]).set_optimizer(name=name, args="beta1=0.5").optim is args.optim
    for arguments_class in (TrainingArguments, Extended):
        command_line = ["--output_dir", str(tmp_path), "--optim", name, "--report_to", "none"]
        (parsed,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(command_line)
        assert parsed.optim is args.optim
    assert json.loads(args.to_json_string())["optim"] == args.to_dict()["optim"] == name
    assert args.to_sanitized_dict()["optim"] == name
    (from_file,) = HfArgumentParser(TrainingArguments).parse_dict(
        {"output_dir": str(tmp_path), "optim": args.to_dict()["optim"]}
    )
    assert from_file.optim is args.optim
    for twin in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert twin.optim is args.optim
    chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
    assert chosen is OPTIMIZERS[name].optimizer_class
    assert keywords == OptimizerFactory.from_training_args(args).hyper


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
    args = TrainingArguments(str(tmp_path), optim="ldadam", optim_args="rnak=4", use_cpu=True)
    with pytest.raises(ValueError, match="has no argument 'rnak'; did you mean 'rank'"):
        Trainer.get_optimizer_cls_and_kwargs(args)


def enum_module(*values: str) -> types.ModuleType:
    """Stands for `transformers.training_args` with optimizers of these names."""
    from transformers.utils.generic import ExplicitEnum

    module = types.ModuleType("transformers.training_args")
    module.OptimizerNames = ExplicitEnum("OptimizerNames", {value.upper(): value for value in values})
    return module


def test_a_value_of_transformers_itself_stays(caplog: pytest.LogCaptureFixture) -> None:
    module = enum_module("sgd", *OPTIMIZERS)
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
from transformers import Trainer, TrainerCallback, TrainingArguments
import hf_lowmem_optim, hf_lowmem_optim.trainer.strings
from tests.trainer.runs import make_trainer

class Reporter(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        keys.append([key for key in logs if key.startswith("optimizer_state/total")])

keys = []
given = {"callbacks": [Reporter(), hf_lowmem_optim.OptimizerStateMemoryCallback]}
trainer = make_trainer(sys.argv[1], optim="ldadam", optim_args="rank=4", max_steps=1, given=given)
kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
names = collections.Counter(kind.__name__ for kind in kinds)
assert {names[name] for name in ("BackwardCallback", "EarlyLogCallback", "OptimizerStateMemoryCallback")} == {1}, names
ours = [kind for kind in kinds if kind.__module__.startswith("hf_lowmem_optim")]
assert len(ours) == 3
assert all(getattr(sys.modules[kind.__module__], kind.__name__) is kind for kind in ours)
trainer.train()
assert len(keys) == 2 and all(keys), keys
assert type(trainer.optimizer.optimizer) is hf_lowmem_optim.LDAdam
chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
assert chosen is hf_lowmem_optim.LDAdam and keywords["rank"] == 4
assert pickle.loads(pickle.dumps(trainer.args.optim)) is trainer.args.optim
finders = [finder for finder in sys.meta_path if type(finder).__name__ == "_PostImportFinder"]
assert [type(finder) for finder in finders] == [sys.modules["hf_lowmem_optim.trainer.import_hook"]._PostImportFinder]
assert sys.modules["transformers.training_args"].__spec__.loader.get_source("transformers.training_args")
"""
LIGHT = """
import sys
import hf_lowmem_optim
assert not [name for name in ("torch", "transformers", "accelerate", "triton", "peft") if name in sys.modules]
import hf_lowmem_optim.optimizers, hf_lowmem_optim.registry, hf_lowmem_optim.memory.plan
assert not [name for name in ("transformers", "accelerate", "peft") if name in sys.modules]
assert set(hf_lowmem_optim.__all__) <= set(dir(hf_lowmem_optim))
"""
PICKLED = """
import pickle
from transformers.training_args import OptimizerNames
pickled = pickle.dumps(OptimizerNames("ldadam"))
"""
LOADS = "assert pickle.loads(pickled) is OptimizerNames('ldadam')\n"
AFTER = "from transformers import TrainingArguments, Trainer\nimport hf_lowmem_optim\n"


@pytest.mark.parametrize(
    "code",
    [
        LIGHT + PURGE + CHECK,
        AFTER + PICKLED + PURGE + LOADS + PURGE + CHECK + LOADS,
        "from transformers import TrainingArguments\nimport hf_lowmem_optim\n" + CHECK,
    ],
    ids=["before transformers, purged", "after transformers, purged twice", "between"],
)
def test_the_order_of_imports_does_not_matter_nor_their_number(code: str, tmp_path: Path) -> None:
    python(code, str(tmp_path))


def test_public_names_are_there() -> None:
    assert [name for name in hf_lowmem_optim.__all__ if not hasattr(hf_lowmem_optim, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'LDAdamm'"):
        _ = hf_lowmem_optim.LDAdamm


def test_saved_arguments_load_where_nobody_imported_us(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="ldadam", optim_args="rank=4")
    trainer.save_model(str(tmp_path))
    torch.save(trainer.args, tmp_path / "plain.pt")
    code = """
import sys, torch
for path in sys.argv[1:]:
    args = torch.load(path, weights_only=False)
    assert args.optim == "ldadam" and type(args.optim).__name__ == "OptimizerNames", args.optim
    print(args.optim.value, args.optim_args)
"""
    printed = python(code, str(tmp_path / "training_args.bin"), str(tmp_path / "plain.pt"))
    assert printed.split() == ["ldadam", "rank=4"] * 2


def test_trl_configs_and_trainer_take_the_string(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    for requirement in map(Requirement, importlib.metadata.requires("trl") or []):
        if requirement.name in ("transformers", "accelerate"):
            installed = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(installed):
                pytest.skip(f"this TRL needs {requirement}, installed is {installed}")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "one", "two", "three"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    args = trl.SFTConfig(
        str(tmp_path),
        optim="ldadam",
        optim_args="rank=4",
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": ["one two three", "three two one"] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert {group["rank"] for group in trainer.optimizer.param_groups} == {4, None}
