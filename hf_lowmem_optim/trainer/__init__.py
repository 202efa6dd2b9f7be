"""The Trainer layer: the only part of the package that imports transformers.

This file stays empty: ``hf_lowmem_optim`` imports ``trainer.import_hook`` at once, and that must not load transformers.
"""
