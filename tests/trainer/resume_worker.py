"""Trains tiny models in a process of its own: `python -m tests.trainer.resume_worker begin|resume FOLDER CASE...`.

`begin` trains every case for 12 steps without a stop, and again for 6 steps with a checkpoint at the end. `resume`, a
new process, goes on from that checkpoint to step 12. Both write parameters and optimizer state to FOLDER/CASE/*.pt.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_optimizer
from tests.trainer.tiny_models import tiny_llama, token_rows

STEPS, STOP = 12, 6
#: With the defaults the tensors of the tiny models are too small to be compressed, or gain nothing by it.
ARGUMENTS = {
    "ldadam": "rank=4",
    "microadam": "density=0.05,min_compress_size=64,quant_block_size=32",
    "sparse_mfac": "density=0.05",
    "lowrank_mfac": "rank=4",
    "sparse_ggt": "density=0.05",
}
ARGUMENTS.update({f"{name}_layerwise": text for name, text in ARGUMENTS.items() if f"{name}_layerwise" in OPTIMIZERS})
#: A step of GGT is at most as long as the rate, over all parameters together.
LEARNING_RATES = {"sparse_ggt": 0.3}
CLIP_TENSOR_NORM = 0.02


@dataclass(frozen=True)
class Case:
    """One way to train: what differs from float32 with :data:`ARGUMENTS`."""

    dtype: torch.dtype = torch.float32
    adapters: dict[str, Any] | None = None
    """How the adapters differ from plain LoRA; None for no adapters."""
    settings: dict[str, Any] = field(default_factory=dict)
    defaults: bool = False


CASES = {
    "fp32": Case(),
    "bf16": Case(dtype=torch.bfloat16),
    "autocast": Case(settings={"bf16": True}),
    # Without accumulation, with which the layer-wise optimizers do not clip.
    "defaults": Case(settings={"gradient_accumulation_steps": 1}, defaults=True),
    # The gradients of fresh adapters are small; they too shall be clipped.
    "lora": Case(adapters={}, settings={"max_grad_norm": 0.01}),
    "lora bf16": Case(torch.bfloat16, {}, {"max_grad_norm": 0.01}),
    # DoRA's magnitudes, and a head that peft trains and saves whole
    "lora autocast": Case(
        adapters={"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]},
        settings={"max_grad_norm": 0.01, "bf16": True},
    ),
}


class StopAt(TrainerCallback):
    """Ends training as an interruption would: the schedule is still that of the whole run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP:
            control.should_training_stop = True
            control.should_save = True


def build_model(case: Case) -> nn.Module:
    model = tiny_llama().to(case.dtype)
    if case.adapters is None:
        return model
    torch.manual_seed(7)
    return get_peft_model(
        model, LoraConfig(r=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, **case.adapters)
    )


def train(name: str, case: Case, folder: Path, *, stop: bool = False, resume: bool = False) -> None:
    """Train one case from the start or from its checkpoint, and write where it ended."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": LEARNING_RATES.get(name, 1e-2),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **case.settings,
    }
    optim_args = None if case.defaults else ARGUMENTS[name]
    clipped_at = settings["max_grad_norm"]
    if OPTIMIZERS[name].optimizer_class.layerwise:
        settings["max_grad_norm"] = clipped_at = 0.0
        if settings["gradient_accumulation_steps"] == 1:
            optim_args = f"clip_tensor_norm={CLIP_TENSOR_NORM}"
            # A norm of all tensors beyond this is that of at least one which is clipped.
            clipped_at = CLIP_TENSOR_NORM * len(list(build_model(case).parameters())) ** 0.5
    args = TrainingArguments(str(folder), optim=name, optim_args=optim_args, **settings)
    model = build_model(case)
    trainer = Trainer(model, args, train_dataset=token_rows(24), callbacks=[StopAt()] if stop else [])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    history = trainer.state.log_history
    torch.save(
        {
            "initial": dict(build_model(case).named_parameters()),
            "parameters": dict(model.named_parameters()),
            "trainable": [n for n, p in model.named_parameters() if p.requires_grad],
            "optimizer": trainer.optimizer.state_dict(),
            "steps": trainer.state.global_step,
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "grad_norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
            "clipped_at": clipped_at,
            "planned": plan_optimizer(trainer.optimizer).component_bytes,
            "measured": measure_state(trainer.optimizer).component_bytes,
            "launched": "ACCELERATE_MIXED_PRECISION" in os.environ,
        },
        folder / ("stopped.pt" if stop else "resumed.pt" if resume else "straight.pt"),
    )


def main() -> None:
    phase, root, *chosen = sys.argv[1:]
    for name in OPTIMIZERS:
        for key in chosen:
            folder = Path(root) / f"{name}-{key}"
            folder.mkdir(parents=True, exist_ok=True)
            if phase == "begin":
                train(name, CASES[key], folder)
                train(name, CASES[key], folder, stop=True)
            else:
                train(name, CASES[key], folder, resume=True)


if __name__ == "__main__":
    main()
