"""One LoRA adapter whose first components are adapters of smaller ranks."""
