"""A training loop of your own with accelerate: one process or several, with a checkpoint that resumes.

python examples/front_ends/accelerate_loop.py --folder out --max_steps 50
accelerate launch examples/front_ends/accelerate_loop.py --folder out --max_steps 100 --resume
hf-lowmem-optim report out --html report.html
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lowmem_optim import OptimizerFactory, build_report, write_report
from hf_lowmem_optim.trainer.demo import demo_model, documentation


def main() -> None:
    """Train, from the beginning or from where the last run stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("out"))
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--save_steps", type=int, default=25)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(0)
    model = demo_model()
    optimizer = OptimizerFactory("ldadam", lr=4e-3, rank=16, weight_decay=0.01)(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    loader = DataLoader(documentation()[0], batch_size=8)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)

    checkpoint, history, seconds, first = args.folder / "checkpoint", [], [], 0
    if args.resume:
        accelerator.load_state(checkpoint)
        first = json.loads((checkpoint / "step.json").read_text())
    batches = accelerator.skip_first_batches(loader, first % len(loader))
    step = first
    while step < args.max_steps:
        for (batch,) in batches:
            begun = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            history.append({"step": step, "loss": loss.item(), "learning_rate": rate, "grad_norm": norm.item()})
            seconds.append({"step": step, "seconds": time.perf_counter() - begun})
            accelerator.print(f"step {step}  loss {history[-1]['loss']:.4f}")
            if step % args.save_steps == 0:
                accelerator.save_state(checkpoint)
                if accelerator.is_main_process:
                    (checkpoint / "step.json").write_text(json.dumps(step))
            if step == args.max_steps:
                break
        batches = loader
    report = build_report(optimizer, history, seconds)  # in every process: state may be sharded
    if accelerator.is_main_process:
        accelerator.print(f"the report is in {write_report(report, args.folder)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
