"""Trains tiny models in a process of its own: `python -m tests.trainer.resume_worker begin|resume FOLDER CASE NAME...`.

`begin` trains for 12 steps without a stop, and again for 6 steps with a checkpoint at the end. `resume`, a new process,
goes on from that checkpoint to step 12. Both write parameters and optimizer state to FOLDER/NAME-CASE/*.pt.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, measure_state, plan_optimizer
from tests.trainer.runs import ARGUMENTS, KINDS, LEARNING_RATES, STOP, TRAINED, StopAt, logged, make_trainer, values
from tests.trainer.tiny_models import tiny_llama, with_lora

STEPS = 12
# As in conftest.py: the Trainer's collections of garbage would take longer than training.
gc.freeze()
CLIP_TENSOR_NORM = 0.02


@dataclass(frozen=True)
class Case:
    """One way to train: what differs from float32 with :data:`ARGUMENTS`."""

    dtype: torch.dtype = torch.float32
    adapters: dict[str, Any] | None = None
    """How the adapters differ from plain LoRA; None for no adapters."""
    settings: dict[str, Any] = field(default_factory=dict)
    optim_args: str | None = ""
    """What is added to :data:`ARGUMENTS`; None for neither."""
    factory: dict[str, Any] | None = None
    """What the factory gets that stands in place of the string."""
    names: Sequence[str] = tuple(TRAINED)


CASES = {
    "fp32": Case(),
    "bf16": Case(torch.bfloat16),
    "autocast": Case(settings={"bf16": True}, names=KINDS),
    # Without accumulation, with which the layer-wise optimizers do not clip.
    "defaults": Case(settings={"gradient_accumulation_steps": 1}, optim_args=None, names=KINDS),
    "error in gradients": Case(optim_args=",error_feedback=grad", names=["ldadam"]),
    "error in gradients bf16": Case(torch.bfloat16, optim_args=",error_feedback=grad", names=["ldadam"]),
    # The gradients of fresh adapters are small; they too shall be clipped.
    "lora": Case(adapters={}, settings={"max_grad_norm": 0.01}),
    "lora bf16": Case(torch.bfloat16, {}, {"max_grad_norm": 0.01}, names=KINDS),
    # DoRA's magnitudes, and a head that peft trains and saves whole
    "lora autocast": Case(
        adapters={"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]},
        settings={"max_grad_norm": 0.01, "bf16": True},
        names=KINDS,
    ),
    "lora with own settings": Case(
        adapters={"modules_to_save": ["lm_head"]},
        settings={"max_grad_norm": 0.01},
        factory={"lr_ratio": 4, "overrides": {"down_proj": {"rank": 5}, "lm_head": {"lr": 1e-3}}},
        names=["ldadam"],
    ),
}


def build_model(case: Case) -> nn.Module:
    model = tiny_llama().to(case.dtype)
    return model if case.adapters is None else with_lora(model, lora_dropout=0.1, **case.adapters)


def train(name: str, case: Case, folder: Path, *, stop: bool = False, resume: bool = False) -> None:
    """Train one case from the start or from its checkpoint, and write where it ended."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": LEARNING_RATES.get(name, 1e-2),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        **case.settings,
    }
    optim_args = None if case.optim_args is None else ARGUMENTS[name] + case.optim_args
    clipped_at = settings["max_grad_norm"]
    if OPTIMIZERS[name].optimizer_class.method.layerwise:
        settings["max_grad_norm"] = clipped_at = 0.0
        if settings["gradient_accumulation_steps"] == 1:
            optim_args = f"clip_tensor_norm={CLIP_TENSOR_NORM}"
            # A norm of all tensors beyond this is that of at least one which is clipped.
            clipped_at = CLIP_TENSOR_NORM * len(list(build_model(case).parameters())) ** 0.5
    model = build_model(case)
    given: dict[str, Any] = {"callbacks": [StopAt()] if stop else []}
    if case.factory is not None:
        factory = OptimizerFactory(name, lr=settings["learning_rate"], weight_decay=0.1, rank=4, **case.factory)
        given["optimizer_cls_and_kwargs"] = (factory, {})
    trainer = make_trainer(folder, model, rows=24, given=given, optim=name, optim_args=optim_args, **settings)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    torch.save(
        {
            "initial": values(build_model(case)),
            "parameters": dict(model.named_parameters()),
            "trainable": [n for n, p in model.named_parameters() if p.requires_grad],
            "optimizer": trainer.optimizer.state_dict(),
            "steps": trainer.state.global_step,
            "losses": logged(trainer, "loss"),
            "grad_norms": logged(trainer, "grad_norm"),
            "clipped_at": clipped_at,
            "planned": plan_optimizer(trainer.optimizer).component_bytes,
            "measured": measure_state(trainer.optimizer).component_bytes,
            "launched": "ACCELERATE_MIXED_PRECISION" in os.environ,
        },
        folder / ("stopped.pt" if stop else "resumed.pt" if resume else "straight.pt"),
    )


def run_phase(phase: str, root: str, name: str, key: str) -> None:
    """Train one optimizer in one way: from the start, or from the checkpoint."""
    folder = Path(root) / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    if phase == "begin":
        train(name, CASES[key], folder)
        train(name, CASES[key], folder, stop=True)
    else:
        train(name, CASES[key], folder, resume=True)


if __name__ == "__main__":
    for each in sys.argv[4:]:
        run_phase(*sys.argv[1:3], each, sys.argv[3])
