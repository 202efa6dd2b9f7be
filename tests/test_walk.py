"""A step is a short walk: how many functions of the package one matrix calls, and how many files it enters."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowmem_optim
from hf_lowmem_optim import OPTIMIZERS

PACKAGE = str(Path(hf_lowmem_optim.__file__).parent)
#: Parts of the function that contains them.
INLINE = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>"}
MAX_CALLS = 45
MAX_FILES = {"reference": 10, "cpu": 12}


def walk(name: str) -> list[tuple[str, str]]:
    """Return file and function of every call of the package's functions in a later step of one matrix."""
    weight = nn.Parameter(torch.randn(128, 192, generator=torch.Generator().manual_seed(0)))
    optimizer = OPTIMIZERS[name].optimizer_class([weight])
    weight.grad = torch.randn(128, 192, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.step()
    frames: list[FrameType] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        ours = code.co_filename.startswith(PACKAGE) and code.co_name not in INLINE
        # a generator that goes on is no call
        if event == "call" and ours and all(frame is not known for known in frames):
            frames.append(frame)

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return [(frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_code.co_qualname) for frame in frames]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["ldadam", "microadam", "sparse_mfac"])
def test_a_step_of_one_matrix_is_a_short_walk(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    calls = walk(name)
    files = {file for file, _ in calls}
    assert ("engine/optimizer.py", "LowMemoryOptimizer.step") in calls
    assert len(files) <= MAX_FILES[backend], files
    assert len(calls) <= MAX_CALLS, calls
