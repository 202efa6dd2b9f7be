"""The main job on real text: pre-train a small byte-level Llama with the Trainer, ours beside AdamW.

The text is the documentation of Python's own language topics, which every CPython carries; the vocabulary is the 256
bytes. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from hf_lowmem_optim.engine.options import nearest, shown
from hf_lowmem_optim.memory.measure import measure_state
from hf_lowmem_optim.registry import OPTIMIZERS
from hf_lowmem_optim.trainer.callbacks import OptimizerStateMemoryCallback
from hf_lowmem_optim.trainer.strings import register_optimizer_strings

__all__ = ["DEMO_LEARNING_RATES", "DemoResult", "demo_model", "documentation", "run_demo"]

#: The best learning rate of those tried for each, by ``hf-lowmem-optim demo --learning-rate ...`` (README).
DEMO_LEARNING_RATES = {"adamw_torch": 5e-4, "ldadam": 4e-3}
_SEQUENCE_LENGTH = 128
_FINAL_STEPS = 50


@dataclass(frozen=True)
class DemoResult:
    """What one run of the demo gave; losses in nats per byte."""

    optim: str
    learning_rate: float  # peak of the cosine schedule
    training_loss: float  # mean over the last 50 steps
    held_out_loss: float  # on the last tenth of the text
    seconds: float  # wall time of train()
    state_bytes: int
    num_parameters: int


def run_demo(
    optims: Sequence[str],
    learning_rates: Sequence[float] | None = None,
    *,
    num_steps: int = 300,
    seed: int = 0,
    optim_args: str | None = None,
) -> list[DemoResult]:
    """Train the same model on the same batches with each optimizer at each learning rate.

    Args:
        optims: Any strings that ``TrainingArguments(optim=...)`` takes.
        learning_rates: The rates to try; by default one for each, :data:`DEMO_LEARNING_RATES`.
        num_steps: Steps of 8 × 128 bytes; rounded up to a multiple of 50.
        seed: Of initialization and data order.
        optim_args: Passed to the optimizers of this package.

    Raises:
        ValueError: There is no such string.
    """
    register_optimizer_strings()
    known = [name.value for name in OptimizerNames]
    for name in optims:
        if name not in known:
            raise ValueError(f"optim={shown(name)} is no optimizer{nearest(name, known)} ({', '.join(known)})")
    num_steps = -(-num_steps // _FINAL_STEPS) * _FINAL_STEPS
    return [
        _train(optim, rate, num_steps, seed, optim_args)
        for optim in optims
        for rate in learning_rates or (DEMO_LEARNING_RATES.get(optim, 1e-3),)
    ]


def _train(optim: str, learning_rate: float, num_steps: int, seed: int, optim_args: str | None) -> DemoResult:
    """Train and evaluate once."""
    set_seed(seed)
    model, (training_set, held_out_set) = demo_model(), documentation()
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            output_dir=directory,
            optim=optim,
            optim_args=optim_args if optim in OPTIMIZERS else None,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=num_steps // 20,
            max_steps=num_steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            logging_steps=_FINAL_STEPS,
            save_strategy="no",
            report_to="none",
            seed=seed,
            dataloader_pin_memory=False,
        )
        callbacks: list[TrainerCallback] = [OptimizerStateMemoryCallback()]
        trainer = Trainer(model, args, _collate, training_set, held_out_set, callbacks=callbacks)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        held_out_loss = trainer.evaluate()["eval_loss"]
    final_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert trainer.optimizer is not None
    state = measure_state(trainer.optimizer)
    return DemoResult(optim, learning_rate, final_loss, held_out_loss, seconds, state.total_bytes, state.num_parameters)


def demo_model() -> LlamaForCausalLM:
    """Return the demo's model with fresh weights: a byte-level Llama of 3.3 M parameters."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    config: dict[str, Any] = {"vocab_size": 256, "max_position_embeddings": _SEQUENCE_LENGTH, **sizes, **special}
    return LlamaForCausalLM(LlamaConfig(**config))


def documentation() -> tuple[TensorDataset, TensorDataset]:
    """Return the documentation of Python's language topics as sequences of bytes: training and held-out."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    sequences = tokens[: len(tokens) // _SEQUENCE_LENGTH * _SEQUENCE_LENGTH].view(-1, _SEQUENCE_LENGTH)
    num_training = int(len(sequences) * 0.9)
    return TensorDataset(sequences[:num_training]), TensorDataset(sequences[num_training:])


def _collate(rows: Sequence[tuple[torch.Tensor]]) -> dict[str, Any]:
    """Return a batch for causal language modelling; the model itself shifts the labels."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}
