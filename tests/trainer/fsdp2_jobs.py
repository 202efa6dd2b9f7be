"""What the processes of ``test_fsdp2.py`` do: the Trainer with accelerate's FSDP2, on CPUs.

accelerate takes its FSDP2 path for GPUs only. The processes say that they have some, by two patches of accelerate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_lowmem_optim import OptimizerStateMemoryCallback

SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}
SETTINGS = {"ldadam": "rank=4", "microadam": "min_compress_size=1000", "sparse_mfac": "density=0.1,window=4"}


def pretend_to_have_gpus() -> None:
    def set_device(state: Any) -> None:
        if state.device is None:
            state.device = torch.device("cpu")

    backend = ("gloo", DistributedType.MULTI_GPU)
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: backend  # type: ignore[method-assign]
    accelerate.state.PartialState.set_device = set_device  # type: ignore[method-assign]


def train(folder: Path, optim: str, kind: str, resume: bool) -> Trainer:
    """Train four steps with clipping and accumulation, or the last two of them after the checkpoint."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=False, **SIZES))
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(i, i + 16) % 64 for i in range(64))]
    config = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = TrainingArguments(
        str(folder),
        optim=optim,
        optim_args=SETTINGS[optim],
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        fsdp=True,
        fsdp_config=config,
        learning_rate=1e-2,
        max_grad_norm=1.0,
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[OptimizerStateMemoryCallback()])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


def train_and_resume(rank: int, world: int, folder: Path) -> dict[str, Any]:
    pretend_to_have_gpus()
    found = {}
    for optim, kind in (
        ("ldadam", "FULL_STATE_DICT"),
        ("microadam", "FULL_STATE_DICT"),
        ("sparse_mfac", "SHARDED_STATE_DICT"),
    ):
        ends, trainer = [], None
        for resume in (False, True):
            trainer = train(folder / optim, optim, kind, resume)
            params = list(trainer.model.parameters())
            assert trainer.accelerator.is_fsdp2 and all(isinstance(param, DTensor) for param in params)
            ends.append([param.full_tensor().detach().clone() for param in params])
        assert trainer is not None
        inner = trainer.optimizer.optimizer
        assert any(inner.method.compresses(p.shape, group) for group in inner.param_groups for p in group["params"])
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found[optim] = (
            all(torch.equal(a, b) for a, b in zip(*ends, strict=True)),
            {state["step"] for state in inner.state.values()},
            [log.get("optimizer_state/total_bytes") == log.get("optimizer_state/predicted_bytes") for log in logs],
        )
    return found
