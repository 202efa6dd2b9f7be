"""Memory-efficient optimizers as a Hugging Face Trainer plugin."""
