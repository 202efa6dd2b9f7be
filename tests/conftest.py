"""Settings of the whole suite: reproducible property tests and no look-ups on any hub."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports triton, as transformers' Trainer does: the kernel tests run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
