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
from transformers.training_args import OptimizerNames

import hf_lowmem_optim
from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, register_optimizer_strings
from hf_lowmem_optim.trainer import import_hook, strings
from hf_lowmem_optim.trainer.import_hook import UnsupportedTransformersError
from tests.trainer.tiny_models import tiny_llama, token_rows

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
    assert isinstance(chosen, OptimizerFactory)
    assert keywords == {}


def test_registering_again_changes_nothing() -> None:
    before = list(OptimizerNames), dict(trainer_optimizer._OPTIMIZER_HANDLERS), OptimizerNames._missing_
    register_optimizer_strings()
    import_hook.install()
    importlib.reload(strings).register_optimizer_strings()
    after = list(OptimizerNames), dict(trainer_optimizer._OPTIMIZER_HANDLERS), OptimizerNames._missing_
    assert before == after
    assert sum(isinstance(finder, import_hook._PostImportFinder) for finder in sys.meta_path) == 1


def test_near_misses_are_explained_and_others_left_to_transformers() -> None:
    with pytest.raises(ValueError, match="did you mean 'ldadam'") as error:
        TrainingArguments("out", optim="ldamm")
    assert "adamw_torch" in str(error.value)
    with pytest.raises(ValueError, match=r"^quite else is not a valid OptimizerNames"):
        TrainingArguments("out", optim="quite else")


@pytest.mark.parametrize("optim", ["ldadam", "galore_adamw"])
def test_malformed_arguments_are_explained(optim: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), optim=optim, optim_args="lr_factor=2,rank", use_cpu=True)
    with pytest.raises(ValueError, match=r"optim_args='lr_factor=2,rank': 'rank' is not of the form key=value"):
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


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_lowmem_optim\nfrom transformers import TrainingArguments, Trainer",
        "from transformers import TrainingArguments, Trainer\nimport hf_lowmem_optim",
        "from transformers import TrainingArguments\nimport hf_lowmem_optim\nfrom transformers import Trainer",
        "import hf_lowmem_optim.optimizers\nfrom transformers import Trainer, TrainingArguments",
    ],
    ids=["first", "last", "between", "optimizers only"],
)
def test_import_order_does_not_matter(imports: str, tmp_path: Path) -> None:
    code = f"""
import sys
{imports}
args = TrainingArguments({str(tmp_path)!r}, optim="ldadam", report_to=[])
factory, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
print(repr(factory), sys.modules["transformers.training_args"].__spec__.loader.get_source.__name__)
"""
    assert python(code).startswith("OptimizerFactory('ldadam'")


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys
import hf_lowmem_optim
print([name for name in ("torch", "transformers", "accelerate", "triton", "peft") if name in sys.modules])
import hf_lowmem_optim.optimizers, hf_lowmem_optim.registry, hf_lowmem_optim.memory.plan
print([name for name in ("transformers", "accelerate", "peft") if name in sys.modules])
assert set(hf_lowmem_optim.__all__) <= set(dir(hf_lowmem_optim))
print([name for name in hf_lowmem_optim.__all__ if not hasattr(hf_lowmem_optim, name)])
"""
    assert python(code).split() == ["[]"] * 3
    with pytest.raises(AttributeError, match="no attribute 'LDAdamm'"):
        _ = hf_lowmem_optim.LDAdamm


def test_saved_arguments_load_where_nobody_imported_us(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), optim="ldadam", optim_args="rank=4", **settings)
    trainer = Trainer(tiny_llama(), args, train_dataset=token_rows(8))
    trainer.save_model(str(tmp_path))
    torch.save(args, tmp_path / "plain.pt")
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
