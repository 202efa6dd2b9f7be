"""Write a tiny Llama with a byte-level tokenizer, and a table of prompts and completions, for the configurations here.

    python examples/front_ends/tiny_model.py tiny

makes ``tiny/model`` and ``tiny/data.jsonl``; nothing is downloaded. The text is the documentation of Python's topics.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes, an end and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(folder: Path) -> None:
    """Write model, tokenizer and table."""
    set_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = ({"prompt": f"What about {name}? ", "completion": text.strip()[:200]} for name, text in topics.items())
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # how LLaMA-Factory finds it
    table = {"file_name": "data.jsonl", "columns": {"prompt": "prompt", "response": "completion"}}
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": table}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
