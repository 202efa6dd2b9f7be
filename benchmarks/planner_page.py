"""Write the planner's page, docs/planner/index.html, with plans of well-known models; takes minutes."""

from __future__ import annotations

from pathlib import Path

from hf_lowmem_optim.trainer.planner_data import model_data, page_of

PAGE = Path(__file__).parent.parent / "docs" / "planner" / "index.html"
MODELS = (
    "llama-3.1-8b",
    "llama-2-7b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "gemma-2-2b",
    "bert-base",
    "minilm-l6",
)


def main() -> None:
    """Plan for all models, and write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page_of({name: model_data(name) for name in MODELS}), encoding="utf-8")


if __name__ == "__main__":
    main()
