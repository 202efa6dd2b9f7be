"""Adapters on a base model that bitsandbytes has quantized: all optimizers, on its CPU backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from hf_lowmem_optim import (
    OPTIMIZERS,
    OptimizerStateMemoryCallback,
    measure_state,
    plan_memory,
    plan_optimizer,
)
from hf_lowmem_optim.memory.report import load_report
from tests.trainer.runs import (
    ARGUMENTS,
    DEVICES,
    LAYERWISE,
    LEARNING_RATES,
    STOP,
    TRAINED,
    StopAt,
    assert_equal_to_the_bit,
    make_trainer,
)
from tests.trainer.tiny_models import VOCAB, token_rows

pytest.importorskip("bitsandbytes")

QUANTIZED = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8-bit": {"load_in_8bit": True},
}
STEPS = 12
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 128)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, to be quantized as it is loaded; its rows are as long as a block of bitsandbytes."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(base: Path, bits: str, device: str = "cpu") -> nn.Module:
    quantization = BitsAndBytesConfig(**QUANTIZED[bits])
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map={"": device})
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))


def train(model: nn.Module, name: str, folder: Path, *, stop: bool = False, resume: bool = False) -> Trainer:
    given = {"callbacks": [OptimizerStateMemoryCallback(), *([StopAt()] if stop else [])]}
    trainer = make_trainer(
        folder,
        model,
        rows=24,
        given=given,
        optim=name,
        optim_args=ARGUMENTS[name],
        learning_rate=LEARNING_RATES.get(name, 3e-2),
        max_steps=STEPS,
        max_grad_norm=0.0 if name in LAYERWISE else 0.5,
        gradient_checkpointing=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    return trainer


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Of all rows, as that of one batch is mostly noise in so short a run.

    With dropout, the same each time: in evaluation bitsandbytes repacks a 4-bit base for the CPU, for good.
    """
    torch.manual_seed(0)
    rows = torch.stack([row["input_ids"] for row in token_rows(24)]).to(next(model.parameters()).device)
    return model.train()(input_ids=rows, labels=rows).loss.item()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("name", TRAINED)
def test_adapters_on_a_quantized_base_train_and_resume_to_the_bit(
    name: str, bits: str, device: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(base, bits, device)
    start = values(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8 if bits == "4-bit" else torch.int8}
    loss_before = loss(model)
    straight = train(model, name, tmp_path)
    assert loss(model) < loss_before
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 8 and all("lora_" in n for n in adapters)
    assert {n for n, p in values(model).items() if not torch.equal(p, start[n])} == adapters
    groups = straight.optimizer.param_groups
    assert {n for group in groups for n in group["param_names"]} == adapters
    assert measure_state(straight.optimizer) == plan_optimizer(straight.optimizer)
    assert "not the predicted" not in caplog.text
    assert load_report(tmp_path)["measured"] == load_report(tmp_path)["predicted"]

    train(load(base, bits, device), name, tmp_path, stop=True)
    resumed = train(load(base, bits, device), name, tmp_path, resume=True)
    assert resumed.state.global_step == STEPS
    assert_equal_to_the_bit(values(resumed.model), values(model))
    assert_equal_to_the_bit(resumed.optimizer.state_dict(), straight.optimizer.state_dict())


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
