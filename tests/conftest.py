"""What holds for the whole suite: reproducible property tests, no look-ups on any hub, no test that marks another."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports torch. What tests compute is too small to be shared between threads, which spin while they
# wait; the cores are for several processes of pytest. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports triton, as transformers' Trainer does: the kernel tests run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
# numba's cache does not notice a change in a jit function that another file calls: a cache per state of the sources.
# It serves every run on them, also that of .ci/oldest.
_sources = sorted((Path(__file__).parent.parent / "hf_lowmem_optim" / "ops").rglob("*.py"))
_digest = hashlib.sha256(b"".join(path.read_bytes() for path in _sources)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"hf-lowmem-optim-numba-{_digest}"))
if "EMULATE" in os.environ:  # a GPU, for kernels as compiled
    from tests.ops import emulator

    emulator.enable(*os.environ["EMULATE"].split(","))

settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Keep what stays until the end, the tests and what they import, out of all collections: each took a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the process end as it would: extensions tell what is left over."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_overrides_left_in_bitsandbytes() -> Iterator[None]:
    """Forget what a test registered: it applies to every later optimizer of the process, by the parameter's index."""
    yield
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None:
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
