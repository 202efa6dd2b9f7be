"""The error between two steps: what is stored and added to the next gradient, in every precision, tensors together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.engine.error_feedback import FORMATS, add_residual, error_state, save_residual_
from hf_lowmem_optim.spec import QuantFormat, quantized_specs


def stacked(storage: str, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    specs = error_state((6, 64), dtype, storage)
    return {key: spec.allocate("cpu").expand(count, *spec.shape).clone() for key, spec in specs.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("storage", ["param", "fp32", "bf16", "8bit", "4bit", "none"])
def test_what_was_stored_is_added_to_the_next_gradients(storage: str, dtype: torch.dtype, count: int) -> None:
    """Against the definition; the gradients are only read, whatever their dtype."""
    generator, fmt = torch.Generator().manual_seed(0), FORMATS.get(storage)
    state = stacked(storage, count, torch.bfloat16)
    residual = torch.randn(count, 6, 64, generator=generator)
    given = residual.clone()
    save_residual_(state, residual, fmt)
    assert torch.equal(residual, given)
    gradients = [torch.randn(6, 64, generator=generator).to(dtype) for _ in range(count)]
    before = [each.clone() for each in gradients]
    a = add_residual(gradients, state, fmt)
    assert a.dtype == torch.float32 and a.shape == (count, 6, 64)
    assert all(torch.equal(*pair) for pair in zip(gradients, before, strict=True))
    # half a step of the quantizer, an eighth of a digit of bfloat16, or nothing
    error = {"fp32": 0.0, "8bit": 0.03, "4bit": 0.4}.get(storage, 2**-8 * 4)
    for part, grad, stored in zip(a, before, given, strict=True):
        expected = grad.float() + (stored if storage != "none" else 0.0)
        assert (part - expected).abs().max() <= error + 1e-6
        assert storage in ("fp32", "none") or not torch.equal(part, expected)
    if storage == "fp32":  # the buffer itself, until the residual is stored
        assert a.data_ptr() == state["error"].data_ptr()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("seed", [None, 5])
def test_several_quantized_errors_are_stored_as_each_alone(fmt: QuantFormat, seed: int | None) -> None:
    """Also where a block would span two tensors, and where draws go by the place in a buffer."""
    for shape in ((6, 64), (5, 13)):
        specs = quantized_specs(shape[0] * shape[1], fmt)
        together = {key: spec.allocate("cpu").expand(3, *spec.shape).clone() for key, spec in specs.items()}
        residual = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        save_residual_(together, residual, fmt, seed=seed)
        for index, part in enumerate(residual):
            alone = {key: spec.allocate("cpu")[None] for key, spec in specs.items()}
            save_residual_(alone, part[None], fmt, seed=seed)
            assert all(torch.equal(together[key][index], value[0]) for key, value in alone.items())
