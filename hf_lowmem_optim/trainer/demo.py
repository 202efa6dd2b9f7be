"""The main job on real text: pre-train a small byte-level Llama with the Trainer, ours beside AdamW.

The text is the documentation of Python's own language topics, which every CPython carries; the vocabulary is the 256
bytes. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import OptimizerNames

from hf_lowmem_optim.engine.options import nearest, shown
from hf_lowmem_optim.memory.measure import measure_state
from hf_lowmem_optim.registry import OPTIMIZERS
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
    component_bytes: Mapping[str, int]
    log_history: Sequence[Mapping[str, Any]]


class _ShortLog(ProgressCallback):
    """The Trainer's bar, with one short line for each log instead of a dictionary."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the line above the bar; what comes at the end is in the table."""
        bar: Any = self.training_bar
        if logs and "loss" in logs and bar is not None:
            step, rate = f"step {state.global_step:>5,} of {state.max_steps:,}", f"{logs['learning_rate']:.2e}"
            bar.write(f"{self._name:<16}  {step}  loss {logs['loss']:.3f}  learning rate {rate}")


def run_demo(
    optims: Sequence[str],
    learning_rates: Sequence[float] | None = None,
    *,
    num_steps: int = 300,
    seed: int = 0,
    optim_args: str | None = None,
) -> list[DemoResult]:
    """Train the same model on the same batches with each optimizer at each learning rate; say first what is done.

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
    print(
        f"Training a language model of 3.3 M parameters from scratch, on Python's own documentation: {num_steps} steps "
        f"with each of {', '.join(optims)}. 300 steps take about a minute on two CPU cores.\n",
        flush=True,
    )
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
        trainer = Trainer(model, args, _collate, training_set, held_out_set)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(_ShortLog(optim))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        held_out_loss = trainer.evaluate()["eval_loss"]
    final_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert trainer.optimizer is not None
    state = measure_state(trainer.optimizer)
    size = (state.total_bytes, state.num_parameters, state.component_bytes)
    return DemoResult(optim, learning_rate, final_loss, held_out_loss, seconds, *size, trainer.state.log_history)


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
