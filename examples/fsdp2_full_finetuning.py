r"""Full fine-tuning with FSDP2: weights, gradients and the optimizer's state are split over the processes.

Without a model of your own it trains a small byte-level Llama on the documentation that comes with Python, here in two
processes; without GPUs they run on the CPU:

    accelerate launch --multi_gpu --num_processes 2 examples/fsdp2_full_finetuning.py --max_steps 100 --save_steps 50

With your own, on eight GPUs, and to go on from a checkpoint, which any number of processes can do:

    accelerate launch --multi_gpu --num_processes 8 examples/fsdp2_full_finetuning.py --model path/to/model \
        --text my.txt --optim ldadam --learning_rate 1e-5 --bf16 --resume fsdp2_out/checkpoint-50

This is a loop of its own, because the Trainer's FSDP2 runs on accelerators only; there, add --fsdp to any script with
TrainingArguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import reduce, set_seed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_cosine_schedule_with_warmup

from hf_lowmem_optim import OptimizerFactory, measure_state
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.plan import plan_optimizer
from hf_lowmem_optim.trainer.demo import demo_model, documentation


@dataclass
class Arguments:
    """What is trained on what, and how."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file; needed with --model"})
    sequence_length: int = field(default=512, metadata={"help": "tokens per training sequence of your own text"})
    optim: str = "ldadam"
    learning_rate: float = 3e-3
    batch_size: int = field(default=8, metadata={"help": "sequences of a step, of all processes together"})
    max_steps: int = 100
    save_steps: int = 50
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16; weights stay in their dtype"})
    output_dir: Path = Path("fsdp2_out")
    resume: Path | None = field(default=None, metadata={"help": "a checkpoint to go on from"})


def load(args: Arguments) -> tuple[Any, torch.Tensor]:
    """Return a model on the CPU, and rows of tokens."""
    if not args.model or not args.text:
        return demo_model(), documentation()[0].tensors[0]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(args.model)(args.text.read_text())["input_ids"])
    rows = tokens[: len(tokens) // args.sequence_length * args.sequence_length].view(-1, args.sequence_length)
    return AutoModelForCausalLM.from_pretrained(args.model), rows


def shard(model: Any, args: Arguments) -> None:
    """Split every layer over the processes, and then what is in none; what is split moves to the GPU."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy()
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def batches(rows: torch.Tensor, args: Arguments, first: int, process: PartialState) -> Iterator[tuple[int, Any]]:
    """Yield the steps that are left, and this process's part of each one's batch, which depends on the step alone."""
    for step in range(first, args.max_steps):
        chosen = torch.randint(len(rows), (args.batch_size,), generator=torch.Generator().manual_seed(step))
        ours = rows[chosen[process.process_index :: process.num_processes]].to(process.device)
        yield step + 1, {"input_ids": ours, "labels": ours}


def memory(optimizer: torch.optim.Optimizer, process: PartialState) -> str:
    """Describe what this process holds."""
    weights = sum(p.to_local().nbytes for group in optimizer.param_groups for p in group["params"])
    state, planned = measure_state(optimizer, local=True), plan_optimizer(optimizer, local=True)
    line = f"rank {process.process_index}: weights {format_bytes(weights)}, optimizer state "
    line += f"{format_bytes(state.total_bytes)} (planned {format_bytes(planned.total_bytes)})"
    if process.device.type == "cuda":
        line += f", peak {format_bytes(torch.cuda.max_memory_allocated())}"
    return line


def main() -> None:
    """Train, save, and say what each process holds."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    process = PartialState(cpu=not torch.accelerator.is_available())
    if args.batch_size % process.num_processes:
        raise SystemExit(f"--batch_size {args.batch_size} is not divisible by {process.num_processes} processes")
    set_seed(0)
    model, rows = load(args)
    shard(model, args)
    # after the sharding: the optimizer is for the parameters that there are then
    optimizer = OptimizerFactory(args.optim, lr=args.learning_rate)(model)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    first = 0
    if args.resume:
        first = load_checkpoint(args.resume, model, optimizer, schedule)
    model.train()
    for step, batch in batches(rows, args, first, process):
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == args.max_steps:
            mean, norm = reduce(loss.detach(), "mean"), norm.full_tensor()
            process.print(f"step {step}  loss {mean.item():.4f}  gradient norm {norm.item():.4f}")
        if step % args.save_steps == 0:
            save_checkpoint(args.output_dir / f"checkpoint-{step}", step, model, optimizer, schedule)
    lines: list[Any] = [None] * process.num_processes
    dist.all_gather_object(lines, memory(optimizer, process))
    process.print("\n".join(lines))


def save_checkpoint(folder: Path, step: int, model: Any, optimizer: Any, schedule: Any) -> None:
    """Save each process's part; the files do not depend on how many there are."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save({**parts, "schedule": schedule.state_dict(), "step": step}, checkpoint_id=folder)


def load_checkpoint(folder: Path, model: Any, optimizer: Any, schedule: Any) -> int:
    """Load each process's part of a checkpoint, and return its step."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    saved = {**parts, "schedule": schedule.state_dict(), "step": 0}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    return int(saved["step"])


if __name__ == "__main__":
    main()
