"""Simulated products: operands lose the bits they should, all large products are rounded, and none never passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers import build_optimizer
from rounded_products import RoundedProducts, cut_to_tf32, round_to_bfloat16
from torch import nn


def test_operands_lose_the_bits_that_tensor_cores_do_not_read() -> None:
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 500)
    bits = x.numpy().view(np.uint32)
    expected = torch.from_numpy((bits & np.uint32(0xFFFFE000)).view(np.float32))
    assert torch.equal(cut_to_tf32(x), expected) and torch.equal(cut_to_tf32(x.mT), expected.mT)
    # to nearest, ties to the even last bit
    nearest = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    assert torch.equal(round_to_bfloat16(x), torch.from_numpy(nearest.astype(np.uint32).view(np.float32)))

    tf32, bf16 = RoundedProducts("tf32"), RoundedProducts("bf16")
    y = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    for products, rounding in ((tf32, cut_to_tf32), (bf16, round_to_bfloat16)):
        product = products.multiply(y, y.mT)
        assert torch.equal(product, rounding(y) @ rounding(y.mT)) and not torch.equal(product, y @ y.mT)
        assert products.count == 2


@pytest.mark.parametrize(("settings", "each"), [("", 5), (",error_feedback=none", 4)])
def test_every_large_product_is_rounded_in_every_step_after_the_first(settings: str, each: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 128), nn.LayerNorm(128))
    optimizer = build_optimizer(f"ldadam:rank=4,products=tf32{settings}", model, 1e-3)
    # a method of RoundedProducts by now, of which the type of optimizers knows nothing
    update = optimizer.method.update_.__self__  # type: ignore[attr-defined]
    counts = []
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        counts.append(update.count)
    assert counts == [0, 3 * each, 6 * each]


def test_a_step_without_rounded_products_raises() -> None:
    model = nn.Linear(3, 3)
    optimizer = build_optimizer("ldadam:rank=4,products=bf16", model, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(RuntimeError, match="a step with products='bf16' has rounded none"):
        optimizer.step()
    with pytest.raises(ValueError, match="products='tf16' is none of those that are simulated, tf32, bf16"):
        build_optimizer("ldadam:products=tf16", nn.Linear(64, 64), 1e-3)
    with pytest.raises(ValueError, match="a setting of ldadam, not of MicroAdam"):
        build_optimizer("microadam:products=tf32", nn.Linear(64, 64), 1e-3)
