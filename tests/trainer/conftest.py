"""Lets hundreds of short runs of the Trainer take minutes, also on a busy machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def imported_modules_are_no_garbage() -> Iterator[None]:
    """Keep what stays until the end out of the collections of ``Trainer.train``, which would take a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
