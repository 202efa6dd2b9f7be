"""The state that the compressors describe: its bytes, and that it is what the operations take."""

from __future__ import annotations

import pytest
import torch

from hf_lowmem_optim.compression.error_feedback import accumulate, error_state, retain_
from hf_lowmem_optim.compression.quantization import (
    QuantFormat,
    dequantize_,
    quantize_,
    quantized_specs,
    quantized_state,
)
from hf_lowmem_optim.compression.topk import window_specs
from hf_lowmem_optim.compression.workspace import Workspace


def test_bytes_of_microadam_at_its_defaults():
    numel = 4096 * 11008
    window = window_specs(numel, window=10, density=0.01, block_size=4096)
    error = quantized_specs(numel, QuantFormat())
    per_parameter = {
        name: sum(s.nbytes for s in (window | error).values() if s.component == name) / numel
        for name in ("indices", "values", "error codes", "error statistics")
    }
    assert per_parameter == {
        "indices": pytest.approx(0.2, rel=2e-3),
        "values": pytest.approx(0.2, rel=2e-3),
        "error codes": 0.5,
        "error statistics": 2 * 2 / 64,
    }
    assert sum(per_parameter.values()) <= 0.97


@pytest.mark.parametrize("numel", [1, 63, 1000])
@pytest.mark.parametrize("fmt", [QuantFormat(), QuantFormat(8, 32, torch.float32)])
def test_allocated_state_holds_zeros_and_serves_the_operations(numel, fmt):
    state = {name: spec.allocate("cpu") for name, spec in quantized_specs(numel, fmt, prefix="xi").items()}
    assert set(state) == {"xi_codes", "xi_lo", "xi_hi"}
    out = torch.full((numel,), torch.nan)
    dequantize_(out, quantized_state(state, numel, fmt, prefix="xi"))
    assert torch.equal(out, torch.zeros(numel))
    quantize_(quantized_state(state, numel, fmt, prefix="xi"), torch.ones(numel))
    dequantize_(out, quantized_state(state, numel, fmt, prefix="xi"))
    assert torch.equal(out, torch.ones(numel))


def test_window_rows_and_refusals():
    specs = window_specs(10_000, window=3, density=0.01, block_size=4096, value_dtype=torch.float32)
    assert specs["indices"].shape == specs["values"].shape == (3, 41 + 41 + 19)
    assert specs["indices"].dtype == torch.int16 and specs["values"].dtype == torch.float32
    with pytest.raises(ValueError, match="window must be at least 1"):
        window_specs(10, window=0, density=0.1, block_size=4)


def test_a_quantized_error_takes_a_gradient_of_any_dtype_and_layout() -> None:
    state = {key: spec.allocate("cpu") for key, spec in error_state((6, 64), torch.float32, "4bit").items()}
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    retain_(state, torch.linspace(-1, 1, 384).view(6, 64))
    expected = accumulate(values.float(), state, Workspace())
    for grad in (values, values.double(), values.mT.contiguous().mT, values.double().mT.contiguous().mT):
        assert torch.equal(accumulate(grad, state, Workspace()), expected)
