"""Keeps what is imported out of garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def imported_modules_are_not_collected() -> Iterator[None]:
    """``Trainer.train`` collects garbage, which takes a second with the objects of all modules that are imported here.

    Those stay until the process ends anyway; what tests make is collected as always.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
