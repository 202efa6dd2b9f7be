"""What the processes of the tests do: each function is called with its rank, the number of processes, and a folder.

Annotations are not postponed: torch reads those of a communication hook.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from hf_lowmem_optim import MatryoshkaLora, attach_nested_lora
from tests.trainer.runs import make_trainer
from tests.trainer.tiny_models import with_lora


class CountSent(TrainerCallback):
    """Counts the buckets that DDP averages."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parallel = self.trainer.model_wrapped
        if state.global_step == 0 and isinstance(parallel, DistributedDataParallel):
            parallel.register_comm_hook(None, self.average)

    def average(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.num_sent += 1
        work = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def train(rank: int, world: int, folder: Path) -> dict[str, tuple[dict[str, Tensor], int]]:
    """Train three steps of two micro-batches by each mode; return the adapter, and what was sent."""
    if world > 1:  # accelerate asks for them, though the group is there
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    results = {}
    for mode in ("losses", "dylora"):
        model = with_lora(init_lora_weights=False)
        nested, count = MatryoshkaLora(model, (1, 2, 6), mode=mode), CountSent()  # type: ignore[arg-type]
        trainer: Trainer = make_trainer(
            folder / f"{mode}{rank}{world}",
            model,
            rows=24,
            given={"callbacks": [count]},
            max_steps=3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4 // world,
            learning_rate=1e-2,
            optim="sgd",
            seed=3,
        )
        count.trainer = trainer
        attach_nested_lora(trainer, nested)
        trainer.train()
        values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        results[mode] = values, count.num_sent
    return results
