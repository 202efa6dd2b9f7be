"""The error's buffer: it takes a gradient as it comes."""

from __future__ import annotations

import torch

from hf_lowmem_optim.compression.error_feedback import accumulate, error_state, retain_
from hf_lowmem_optim.compression.workspace import Workspace


def test_a_quantized_error_takes_a_gradient_of_any_dtype_and_layout() -> None:
    state = {key: spec.allocate("cpu") for key, spec in error_state((6, 64), torch.float32, "4bit").items()}
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    retain_(state, torch.linspace(-1, 1, 384).view(6, 64))
    expected = accumulate(values.float(), state, Workspace())
    for grad in (values, values.double(), values.mT.contiguous().mT, values.double().mT.contiguous().mT):
        assert torch.equal(accumulate(grad, state, Workspace()), expected)
