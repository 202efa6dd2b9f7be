"""Settings and surroundings that cannot work, or that read other than they were meant: each is named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import HfArgumentParser, TrainingArguments

from hf_lowmem_optim import LDAdam, MicroAdam, OptimizerFactory
from tests.trainer.runs import make_trainer
from tests.trainer.tiny_models import tiny_llama


@pytest.mark.parametrize(
    ("then", "now", "remedy"),
    [
        ("rank=10", "rank=10,dense_state=fp32", "dense_state='param', as it was saved"),
        ("rank=16,error_feedback=none", "rank=16,error_feedback=param", "error_feedback='none', as it was saved"),
        ("rank=8", "rank=20", "rank=8, as it was saved"),
        ("rank=8", "rank=20,state_dtype=param", "rank=8, as it was saved; and state_dtype='fp32', as it was saved"),
    ],
)
def test_a_resume_names_the_setting_that_moved_parameters_to_other_groups(
    then: str, now: str, remedy: str, tmp_path: Path
) -> None:
    model = tiny_llama().to(torch.bfloat16 if "dense_state" in now else torch.float32)
    make_trainer(tmp_path, model, optim="ldadam", optim_args=then, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(tmp_path, model, optim="ldadam", optim_args=now, max_steps=4)
    with pytest.raises(ValueError, match=r"groups of \[.*this optimizer has \[.*Build it with " + remedy):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resume_says_that_another_learning_rate_has_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, optim="ldadam", learning_rate=1e-3, save_strategy="steps", save_steps=2).train()
    given = {"optim": "ldadam", "max_steps": 4}
    for change in ({"learning_rate": 7e-3}, {"learning_rate": 1e-3}):
        trainer = make_trainer(tmp_path, **given, **change)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3}
    (said,) = [text for record in caplog.records if "goes on with" in (text := record.getMessage())]
    assert "initial_lr=0.001, as it was saved; the initial_lr=0.007 of this LDAdam has no effect" in said


@pytest.mark.parametrize(
    ("given", "names"),
    [("q_proj", {"q_proj"}), ('["q_proj", "v_proj"]', {"q_proj", "v_proj"}), (r".*\.[qv]_proj", {"q_proj", "v_proj"})],
)
def test_a_command_line_names_layers(given: str, names: set[str], tmp_path: Path) -> None:
    command_line = ["--output_dir", str(tmp_path), "--optim", "ldadam", "--optim_target_modules", given, "--use_cpu"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command_line)
    _, placements = OptimizerFactory("ldadam", args.optim_target_modules, rank=4).build(tiny_llama())
    assert {p.name.split(".")[-2] for p in placements if p.targeted} == names


@pytest.mark.parametrize(
    ("given", "said"),
    [('["q_proj"', "is not a JSON list of names"), ('["q_prj"]', "did you mean 'q_proj'"), ("self_attn", "whole name")],
)
def test_a_list_that_is_none_and_a_name_of_no_layer_are_refused(given: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"optim_target_modules=.*" + said):
        OptimizerFactory("ldadam", given, rank=4).build(tiny_llama())


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ldadam_layerwise", {}, "optim='ldadam_layerwise' has used them up"),
        ("ldadam", {"error_feedback": "grad"}, "error_feedback='grad' has used them up"),
    ],
)
def test_adalora_needs_gradients_after_the_backward_pass(name: str, settings: dict[str, Any], said: str) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=6, target_r=4, total_step=10, tinit=1, tfinal=1)
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match=f"AdaLoRA reads gradients .*{said}"):
        OptimizerFactory(name, rank=4, **settings)(model)
    optimizer = OptimizerFactory("ldadam", rank=4)(model)
    tokens = torch.arange(1, 9)[None]
    for step in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def test_the_rho_of_sam_is_not_taken_for_that_of_ldadam() -> None:
    group = {"params": [torch.nn.Parameter(torch.randn(8, 8))], "rho": 0.05, "adaptive": False}
    with pytest.raises(TypeError, match="'rho' and 'adaptive', which are SAM's: LDAdam has an option rho as well"):
        LDAdam([dict(group)], rank=2)
    MicroAdam([dict(group)])  # has none
