"""Leaves bitsandbytes as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_overrides() -> Iterator[None]:
    """Forget what was registered for bitsandbytes: it applies to every later optimizer, by the parameter's index."""
    yield
    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()
