"""Kinds of adapters in the Trainer: what trains, what is saved, and what merging gives; on quantized models too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from hf_lowmem_optim import OPTIMIZERS, fp32_state_dict, measure_state, plan_memory, plan_optimizer
from hf_lowmem_optim.memory.report import load_report
from tests.trainer import runs
from tests.trainer.tiny_models import VOCAB, tiny_llama, token_rows, with_lora


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 6, "target_modules": ["q_proj", "down_proj"], **settings})


#: What makes the configuration of a kind of adapter, and how many tensors train and LDAdam compresses at rank 4.
ADAPTERS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "lora": (lora, 8, 8),
    "rslora": (lambda: lora(use_rslora=True), 8, 8),
    "dora": (lambda: lora(use_dora=True), 12, 8),
    "head saved": (lambda: lora(modules_to_save=["lm_head"]), 9, 8),
    "embedding": (lambda: lora(target_modules=["q_proj", "embed_tokens"]), 6, 4),
    "tokens": (lambda: lora(trainable_token_indices=list(range(1, 20))), 9, 8),
    "ia3": (lambda: IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]), 4, 0),
    "prompt": (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 1, 0),
}


def train(model: nn.Module, name: str, folder: Path, max_steps: int = 8) -> Trainer:
    settings = runs.settings_of(name, max_steps=max_steps, per_device_train_batch_size=8)
    trainer = runs.make_trainer(folder, model, **settings)
    trainer.train()
    return trainer


def outputs(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.stack([row["input_ids"] for row in token_rows(4, seed=5)])).logits
    assert isinstance(logits, torch.Tensor)
    return logits


# all optimizers on plain LoRA are in test_resume.py
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", runs.KINDS)
def test_an_adapter_trains_and_is_saved_and_merged(name: str, kind: str, tmp_path: Path) -> None:
    config, trained_tensors, compressed_tensors = ADAPTERS[kind]
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(), config())
    before, untrained = runs.values(model), outputs(model)
    planned = plan_memory(model, name, optim_args=runs.ARGUMENTS[name])
    trainer = train(model, name, tmp_path)

    losses = runs.logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert runs.moved(model, before) == trainable and len(trainable) == trained_tensors
    names = [n for group in trainer.optimizer.param_groups for n in group["param_names"]]
    assert sorted(names) == sorted(trainable)
    measured = measure_state(trainer.optimizer)
    assert measured == plan_optimizer(trainer.optimizer) == planned[name].state
    if name.startswith("ldadam"):
        state = [trainer.optimizer.state[p] for p in model.parameters() if p.requires_grad]
        assert sum("basis" in entry for entry in state) == compressed_tensors

    trained = outputs(model)
    assert not torch.equal(trained, untrained)
    trainer.save_model(str(tmp_path / "adapter"))
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), trained)
    if kind != "prompt":  # which peft cannot merge
        merged = model.merge_and_unload()
        assert not isinstance(merged, PeftModel) and not any("lora" in n for n, _ in merged.named_parameters())
        torch.testing.assert_close(outputs(merged), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ldadam", "microadam_layerwise"])
def test_of_several_adapters_the_active_one_trains(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), lora(), adapter_name="first")
    model.add_adapter("second", lora(r=5, target_modules=["v_proj", "down_proj"]))
    for active, count in (("second", 8), ("first", 8), ("second", 8)):
        model.set_adapter(active)
        before = runs.values(model)
        trainer = train(model, name, tmp_path, max_steps=3)
        changed = runs.moved(model, before)
        assert len(changed) == count and all(f".{active}." in n for n in changed)
        assert measure_state(trainer.optimizer) == plan_optimizer(trainer.optimizer)


QUANTIZED = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8-bit": {"load_in_8bit": True},
}
#: Every method on a base of one kind, in turn; the first on both.
QUANTIZED_RUNS = [("ldadam", "4-bit"), *zip(runs.TRAINED, itertools.cycle(["8-bit", "4-bit"]), strict=False)]
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 128)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, to be quantized as it is loaded; its rows are as long as a block of bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def load(base: Path, bits: str, device: str = "cpu") -> nn.Module:
    quantization = BitsAndBytesConfig(**QUANTIZED[bits])
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map={"": device})
    return with_lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=True), lora_dropout=0.1)


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Of all rows, as that of one batch is mostly noise in so short a run.

    With dropout, the same each time: in evaluation bitsandbytes repacks a 4-bit base for the CPU, for good.
    """
    torch.manual_seed(0)
    rows = torch.stack([row["input_ids"] for row in token_rows(24)]).to(next(model.parameters()).device)
    return model.train()(input_ids=rows, labels=rows).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("device", runs.DEVICES)
@pytest.mark.parametrize(("name", "bits"), QUANTIZED_RUNS)
def test_adapters_on_a_quantized_base_train_and_resume_to_the_bit(
    name: str, bits: str, device: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(base, bits, device)
    start, loss_before = runs.values(model), loss(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8 if bits == "4-bit" else torch.int8}
    settings = runs.settings_of(name, max_steps=12, gradient_checkpointing=True, use_cpu=device == "cpu")
    if name not in runs.LEARNING_RATES:
        settings["learning_rate"] = 3e-2
    straight = runs.assert_resumes_to_the_bit(tmp_path, lambda: load(base, bits, device), **settings)
    assert loss(straight.model) < loss_before
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 8 and all("lora_" in n for n in adapters)
    assert runs.moved(straight.model, start) == adapters
    assert {n for group in straight.optimizer.param_groups for n in group["param_names"]} == adapters
    assert "not the predicted" not in caplog.text
    assert load_report(tmp_path)["measured"] == load_report(tmp_path)["predicted"]


@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_live_model_is_planned_with_the_bytes_of_its_quantized_base(bits: str, base: Path) -> None:
    model = load(base, bits)
    plan = plan_memory(model)
    weights = plan.weights
    # What bitsandbytes would write to a checkpoint is what it holds, but for a description of each tensor and, in the
    # other direction, the mean of the first statistics (a float32), which is in that description.
    held = {
        n: t for n, t in model.state_dict().items() if "bitsandbytes__" not in n and not n.endswith("weight_format")
    }
    quantized = sum(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    assert quantized == 14
    means = 4 * quantized * (bits == "4-bit")
    buffers = sum(b.nbytes for b in model.buffers())
    assert sum(weights.weight_bytes.values()) - buffers == sum(t.nbytes for t in held.values()) + means
    assert weights.dtypes[bits] == LINEAR
    rate = {"4-bit": 0.5 + 1 / 64, "8-bit": 1.0}[bits]
    assert rate * LINEAR < weights.weight_bytes[f"frozen {bits}"] < 1.4 * rate * LINEAR
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights.num_trainable == adapters
    assert weights.gradient_bytes == {"gradients": 4 * adapters}
    assert weights.num_parameters == LINEAR + 2 * VOCAB * 64 + 5 * 64 + adapters
    assert plan["adamw_fp32"].state is not None
    assert all(plan[name].problem is None for name in OPTIMIZERS)


def test_a_bfloat16_adapter_trains_with_compensated_weights(tmp_path: Path) -> None:
    """Planned and measured alike; float32 weights come through the wrapper of accelerate, close to the narrow ones."""
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama().to(torch.bfloat16), lora(), autocast_adapter_dtype=False)
    arguments = "rank=4,weight_rounding=compensated"
    planned = plan_memory(model, "ldadam", optim_args=arguments)["ldadam"].state
    trainer = runs.make_trainer(tmp_path, model, optim="ldadam", optim_args=arguments, learning_rate=1e-4, max_steps=4)
    trainer.train()
    measured = measure_state(trainer.optimizer)
    assert measured == plan_optimizer(trainer.optimizer) == planned
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert measured.component_bytes["weight correction"] == sum(param.numel() for param in trained.values())
    exported = fp32_state_dict(model, trainer.optimizer)
    assert exported.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert exported[name].dtype == torch.float32
        assert torch.equal(exported[name], value.float()) == (name not in trained), name
        assert (exported[name] - value.float()).abs().max() <= 2**-8 * value.float().abs().max()
