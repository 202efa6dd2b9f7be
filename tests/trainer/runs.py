"""What the tests of the Trainer share: how a small run is set up, read and compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowmem_optim import OPTIMIZERS, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from tests.trainer.tiny_models import tiny_llama, token_rows

#: With the defaults the tensors of the tiny models are too small to be compressed, or gain nothing by it.
ARGUMENTS = {
    "ldadam": "rank=4",
    "microadam": "density=0.05,min_compress_size=64,quant_block_size=32",
    "sparse_mfac": "density=0.05",
    "lowrank_mfac": "rank=4",
    "dct_adamw": "rank=4,update_interval=3",
    "trion": "rank=4,dense_lr_ratio=1",  # a smaller rate would be lost in norms of bfloat16
    "sparse_ggt": "density=0.05",
    "lordo": "rank=4,sync_every=3",
    "dash": "block_size=16,precondition_frequency=3",
}
ARGUMENTS.update({f"{name}_layerwise": text for name, text in ARGUMENTS.items() if f"{name}_layerwise" in OPTIMIZERS})
#: A step of GGT is at most as long as the rate, over all parameters together.
LEARNING_RATES = {"sparse_ggt": 0.3}
LAYERWISE = [name for name, entry in OPTIMIZERS.items() if entry.optimizer_class.method.layerwise]
NORMAL = [name for name in OPTIMIZERS if name not in LAYERWISE]
#: For what takes seconds each: the layer-wise mode is the same for all methods.
TRAINED = [*NORMAL, "ldadam_layerwise", "microadam_layerwise"]
#: One of each kind: a low-rank one, a sparse one, a preconditioner over all tensors, a layer-wise one.
KINDS = ["ldadam", "microadam", "sparse_mfac", "ldadam_layerwise"]
STOP = 6
REPOSITORY = Path(__file__).parents[2]
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


class Reporter(TrainerCallback):
    """Stands for TensorBoard or W&B: keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class StopAt(TrainerCallback):
    """Ends training as an interruption would: the schedule is still that of the whole run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP:
            control.should_training_stop = True
            control.should_save = True


def arguments(folder: Path | str, **settings: Any) -> TrainingArguments:
    """Training arguments for a short run on the CPU that logs every step and writes nothing."""
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        # the layer-wise optimizers refuse the Trainer's default
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def make_trainer(
    folder: Path | str,
    model: nn.Module | None = None,
    *,
    rows: Any = 8,
    trainer_class: type[Trainer] = Trainer,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """A Trainer for a model and rows, or their number; ``given`` goes to it, the rest to its arguments."""
    return trainer_class(
        tiny_llama() if model is None else model,
        arguments(folder, **settings),
        train_dataset=token_rows(rows) if isinstance(rows, int) else rows,
        **(given or {}),
    )


def settings_of(name: str, **settings: Any) -> dict[str, Any]:
    """Settings with which a tiny model learns by an optimizer in a few steps, and ``settings``."""
    rate, limit = LEARNING_RATES.get(name, 1e-2), 0.0 if name in LAYERWISE else 0.5
    own = {"optim": name, "optim_args": ARGUMENTS[name], "learning_rate": rate, "max_grad_norm": limit}
    return {**own, **settings}


def run_python(*arguments: str, folder: Path = REPOSITORY, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run an interpreter of its own, with a limit for machines that are much slower or busy."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "300"},
        text=True,
        capture_output=True,
        input="typed\n",
        timeout=timeout,
        check=False,
    )


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def logged(trainer: Trainer, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def assert_equal_to_the_bit(left: Any, right: Any) -> None:
    """Same structure, same dtypes, same values."""
    (leaves, structure), (others, other_structure) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert structure == other_structure
    for leaf, other in zip(leaves, others, strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == other.dtype
            assert torch.equal(leaf, other)
        else:
            assert leaf == other


def assert_resumes_to_the_bit(folder: Path, make_model: Callable[[], nn.Module], **settings: Any) -> Trainer:
    """Train without a stop, anew with one, and on from there, to the same end. Return the trainer of the first run."""

    def train(*callbacks: TrainerCallback, resume: str | None = None) -> Trainer:
        given = {"callbacks": [OptimizerStateMemoryCallback(), *callbacks]}
        trainer = make_trainer(folder, make_model(), given=given, **{"rows": 24, **settings})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train()
    train(StopAt())
    resumed = train(resume=str(folder / f"checkpoint-{STOP}"))
    assert straight.state.global_step == resumed.state.global_step > STOP
    assert_same_parameters(resumed, straight)
    assert_equal_to_the_bit(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert measure_state(straight.optimizer) == plan_optimizer(straight.optimizer)
    return straight


def assert_same_parameters(left: Trainer, right: Trainer) -> None:
    for mine, theirs in zip(left.model.parameters(), right.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
