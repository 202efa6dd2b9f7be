"""Kinds of adapters in the Trainer: what trains, what is saved, and what merging gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, measure_state, plan_memory, plan_optimizer
from tests.trainer.runs import ARGUMENTS, KINDS, LEARNING_RATES, logged, make_trainer
from tests.trainer.tiny_models import tiny_llama, token_rows


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 6, "target_modules": ["q_proj", "down_proj"], **settings})


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter.

    Attributes:
        config: Makes its configuration.
        trained: Number of trainable tensors.
        compressed: Number of those that LDAdam compresses at rank 4.
        merges: Whether peft can merge it.
    """

    config: Callable[[], Any]
    trained: int
    compressed: int
    merges: bool = True


ADAPTERS = {
    "lora": Adapter(lora, 8, 8),
    "rslora": Adapter(lambda: lora(use_rslora=True), 8, 8),
    "dora": Adapter(lambda: lora(use_dora=True), 12, 8),
    "head saved": Adapter(lambda: lora(modules_to_save=["lm_head"]), 9, 8),
    "embedding": Adapter(lambda: lora(target_modules=["q_proj", "embed_tokens"]), 6, 4),
    "tokens": Adapter(lambda: lora(trainable_token_indices=list(range(1, 20))), 9, 8),
    "ia3": Adapter(lambda: IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]), 4, 0),
    "prompt": Adapter(lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 1, 0, merges=False),
}


def train(model: nn.Module, name: str, folder: Path, max_steps: int = 8) -> Trainer:
    settings = {"optim_args": ARGUMENTS[name], "learning_rate": LEARNING_RATES.get(name, 1e-2), "max_steps": max_steps}
    trainer = make_trainer(folder, model, optim=name, per_device_train_batch_size=8, **settings)
    trainer.train()
    return trainer


def outputs(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.stack([row["input_ids"] for row in token_rows(4, seed=5)])).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


# all optimizers on plain LoRA are in test_resume.py
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_trains_and_is_saved_and_merged(name: str, kind: str, tmp_path: Path) -> None:
    case = ADAPTERS[kind]
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(), case.config())
    before, untrained = values(model), outputs(model)
    planned = plan_memory(model, name, optim_args=ARGUMENTS[name])
    trainer = train(model, name, tmp_path)

    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved(model, before) == trainable and len(trainable) == case.trained
    names = [n for group in trainer.optimizer.param_groups for n in group["param_names"]]
    assert sorted(names) == sorted(trainable)
    measured = measure_state(trainer.optimizer)
    assert measured == plan_optimizer(trainer.optimizer) == planned[name].state
    if name.startswith("ldadam"):
        state = [trainer.optimizer.state[p] for p in model.parameters() if p.requires_grad]
        assert sum("basis" in entry for entry in state) == case.compressed

    trained = outputs(model)
    assert not torch.equal(trained, untrained)
    trainer.save_model(str(tmp_path / "adapter"))
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), trained)
    if case.merges:
        merged = model.merge_and_unload()
        assert not isinstance(merged, PeftModel) and not any("lora" in n for n, _ in merged.named_parameters())
        torch.testing.assert_close(outputs(merged), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ldadam", "microadam_layerwise"])
def test_of_several_adapters_the_active_one_trains(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), lora(), adapter_name="first")
    model.add_adapter("second", lora(r=5, target_modules=["v_proj", "down_proj"]))
    for active, count in (("second", 8), ("first", 8), ("second", 8)):
        model.set_adapter(active)
        before = values(model)
        trainer = train(model, name, tmp_path, max_steps=3)
        changed = moved(model, before)
        assert len(changed) == count and all(f".{active}." in n for n in changed)
        assert measure_state(trainer.optimizer) == plan_optimizer(trainer.optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_to_compress_is_said_and_a_named_target_without_a_match_refused(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(tiny_llama(), ADAPTERS["ia3"].config())
    with caplog.at_level(logging.WARNING):
        OptimizerFactory(name)(model)
    who = OPTIMIZERS[name].optimizer_class.__name__
    assert f"{who} compresses nothing here: besides embeddings and the output head no linear" in caplog.text
    assert "all 4 tensors take the dense AdamW rule" in caplog.text
    with pytest.raises(ValueError, match=r"optim_target_modules=\['lora_A'\]: 'lora_A' matches no module"):
        OptimizerFactory(name, target_modules=["lora_A"])(model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        OptimizerFactory(name)(model.requires_grad_(False))


def test_a_window_that_takes_more_than_adamw_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny_llama(), lora())
    for window, more in ((32, True), (1, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            optimizer = OptimizerFactory("lowrank_mfac", window=window, rank=1)(model)
        plan = plan_optimizer(optimizer)
        assert (plan.total_bytes > plan.adamw_fp32_bytes) is more
        assert ("This is more than AdamW takes; a smaller rank or window saves memory." in caplog.text) is more
