"""The benchmark of LDAdam's stages calls the kernels as they are today; it runs only where there is a GPU."""

from __future__ import annotations

import gpu_stages
import pytest
import torch
from torch import Tensor

from tests.ops.backends import INTERPRETED, QUIET, Use


@QUIET
@pytest.mark.skipif(not INTERPRETED, reason="the benchmark itself runs on a GPU")
@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_every_stage_runs(shape: tuple[int, int], use: Use) -> None:
    pytest.importorskip("triton")
    found = gpu_stages.stages(shape, 2, 16, torch.device(use("triton")))
    assert found.keys() > {"sketch V", "apply", "step"}
    for name, (action, _) in found.items():
        result = action()
        assert not isinstance(result, Tensor) or result.isfinite().all(), name
