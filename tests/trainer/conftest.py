"""Lets hundreds of short runs of the Trainer take minutes, also on a busy machine."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="package")
def imported_modules_are_no_garbage() -> None:
    """Keep what these tests import out of the collections of ``Trainer.train``, too: each would take a second."""
    gc.collect()
    gc.freeze()
