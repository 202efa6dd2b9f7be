r"""QLoRA: adapters on a base model that bitsandbytes holds in 4 or 8 bits, with a low-memory optimizer for them.

Without a model of your own it adapts a small byte-level Llama with random weights to the documentation of Python, on
bitsandbytes' CPU backend if there is no GPU:

    python examples/qlora_finetuning.py --learning_rate 1e-3 --max_steps 50

With your own (every field of TrainingArguments is an option as well):

    python examples/qlora_finetuning.py --model path/to/model --text my.txt --optim microadam \
        --learning_rate 1e-4 --num_train_epochs 1 --bf16
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lowmem_optim import measure_state, plan_memory
from hf_lowmem_optim.trainer.demo import demo_model, documentation


@dataclass
class DataArguments:
    """What is trained on what, and how the base is held."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file; needed with --model"})
    sequence_length: int = field(default=512, metadata={"help": "tokens per training sequence of your own text"})
    bits: int = field(default=4, metadata={"help": "4 or 8", "choices": [4, 8]})
    lora_rank: int = field(default=64, metadata={"help": "rank of the adapters"})


def load(data: DataArguments, *, bf16: bool) -> tuple[torch.nn.Module, Dataset]:
    """Return the quantized base and rows of tokens."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    compute = {"bnb_4bit_compute_dtype": torch.bfloat16 if bf16 else torch.float32}
    config = BitsAndBytesConfig(**({**four, **compute} if data.bits == 4 else {"load_in_8bit": True}))
    if not data.model or not data.text:
        with tempfile.TemporaryDirectory() as folder:
            demo_model().save_pretrained(folder)
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), documentation()[0]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(data.model)(data.text.read_text())["input_ids"])
    rows = tokens[: len(tokens) // data.sequence_length * data.sequence_length].view(-1, data.sequence_length)
    return AutoModelForCausalLM.from_pretrained(data.model, quantization_config=config), TensorDataset(rows)


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences; the model shifts the labels by itself."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}


def main() -> None:
    """Train and save the adapter, then say where the bytes are."""
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    parser.set_defaults(optim="ldadam", warmup_steps=5)
    data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, dataset = load(data, bf16=args.bf16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(model, LoraConfig(r=data.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(model, args, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # the adapter alone
    weights = plan_memory(model, args.optim.value).weights.weight_bytes
    state = measure_state(trainer.optimizer)
    print("weights:", ", ".join(f"{kind} {count:,} bytes" for kind, count in weights.items()))
    print(f"optimizer state: {state.total_bytes:,} bytes, where AdamW in fp32 takes {state.adamw_fp32_bytes:,}")


if __name__ == "__main__":
    main()
