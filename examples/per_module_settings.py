"""Settings of single modules: a larger rank for the MLPs, one layer dense, a compressed head, a rate for embeddings.

python examples/per_module_settings.py --max_steps 100
"""

from __future__ import annotations

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_lowmem_optim import OptimizerFactory, OptimizerStateMemoryCallback
from hf_lowmem_optim.trainer.demo import demo_model, documentation

#: By the name of a module, a part of it, or a regex for all of it; the first entry that matches holds.
OVERRIDES = {
    r"model\.layers\.0\..*_proj": {"rank": None},  # the first layer dense: AdamW
    "mlp": {"rank": 32},
    "lm_head": {"rank": 8, "weight_decay": 0.0},  # the head would be dense, had it not been named with a rank
    "embed_tokens": {"lr": 1e-3},
}


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences; the model shifts the labels by itself."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}


def main() -> None:
    """Train a small Llama on the documentation of Python; the log says which tensors took which settings."""
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(learning_rate=3e-3, weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=10)
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model = demo_model()
    training_set, held_out = documentation()
    factory = OptimizerFactory(
        "ldadam", lr=args.learning_rate, weight_decay=args.weight_decay, rank=16, overrides=OVERRIDES
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=training_set,
        eval_dataset=held_out,
        data_collator=collate,
        optimizer_cls_and_kwargs=(factory, {}),
        callbacks=[OptimizerStateMemoryCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    for group in trainer.optimizer.param_groups:
        print(f"{len(group['params']):3d} tensors: rank {group['rank']}, weight decay {group['weight_decay']}")
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
