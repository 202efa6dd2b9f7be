"""Train sentence embeddings with sentence-transformers: ``optim`` is one of our strings.

    pip install . sentence-transformers datasets
    python examples/front_ends/train_embeddings.py --output_dir out --max_steps 50

Without ``--model`` it makes a small DistilBERT over bytes, and pairs of Python's topics with their texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pydoc_data.topics import topics

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tiny_model import byte_tokenizer
from transformers import DistilBertConfig, DistilBertModel, HfArgumentParser, set_seed

import hf_lowmem_optim


@dataclass
class ModelArguments:
    """What is trained."""

    model: str | None = field(default=None, metadata={"help": "a SentenceTransformer: its name or its directory"})


def tiny_encoder(folder: str) -> SentenceTransformer:
    """Return a small DistilBERT over bytes with mean pooling."""
    tokenizer = byte_tokenizer()
    sizes = {"dim": 128, "hidden_dim": 256, "n_layers": 2, "n_heads": 4, "pad_token_id": tokenizer.pad_token_id}
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    body = Transformer(folder, max_seq_length=128)
    return SentenceTransformer(modules=[body, Pooling(128)], device="cpu")


def main() -> None:
    """Train, then say what the optimizer's state takes."""
    parser = HfArgumentParser((ModelArguments, SentenceTransformerTrainingArguments))
    parser.set_defaults(optim="ldadam", learning_rate=1e-3, logging_steps=1, report_to="none")
    own, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model = SentenceTransformer(own.model) if own.model else tiny_encoder(f"{args.output_dir}/untrained")
    pairs = Dataset.from_list([{"anchor": f"What about {n}?", "positive": t.strip()[:200]} for n, t in topics.items()])
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[hf_lowmem_optim.OptimizerStateMemoryCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
