r"""Supervised fine-tuning with TRL: the optimizers are strings of SFTConfig as well (pip install trl).

Without a model of your own it makes a small Llama with a byte-level tokenizer, and questions about Python's operators:

    python examples/trl_sft.py --learning_rate 3e-3 --max_steps 50

With your own model and a JSON-lines file with the columns prompt and completion:

    python examples/trl_sft.py --model path/to/model --table my.jsonl --learning_rate 5e-5 --num_train_epochs 1 --bf16
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

import hf_lowmem_optim


@dataclass
class DataArguments:
    """What is trained on what."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    table: Path | None = field(default=None, metadata={"help": "JSON lines with prompt and completion"})


def load_rows(table: Path | None) -> list[dict[str, str]]:
    """Return prompts with completions."""
    if table:
        return [json.loads(line) for line in table.read_text().splitlines()]
    return [{"prompt": f"What about {name}? ", "completion": text.strip()[:200]} for name, text in topics.items()]


def load_model(path: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model with its tokenizer; without a path a small one, whose tokens are the 256 bytes."""
    if path:
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    return LlamaForCausalLM(config), fast


def main() -> None:
    """Train, then say what the optimizer's state takes."""
    parser = HfArgumentParser((DataArguments, SFTConfig))
    # SFTConfig itself has bf16 on, which the Trainer refuses without a GPU
    parser.set_defaults(optim="ldadam", max_length=256, bf16=torch.cuda.is_available())
    data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, tokenizer = load_model(data.model)
    rows = Dataset.from_list(load_rows(data.table))
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[hf_lowmem_optim.OptimizerStateMemoryCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    print({**trainer.state.log_history[-1], "optim": args.optim.value})


if __name__ == "__main__":
    main()
