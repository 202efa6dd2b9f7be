"""LDAdam with the products of tensor cores, in torch: what TF32 and bfloat16 do to training, wherever it runs.

Both operands of every product with a dimension of the matrix are rounded as the fused step on a GPU does it
(``ops/triton/ldadam_step.py``): cut to TF32, or rounded to bfloat16; sums are float32. What is r × r is float32 there
and here, and so is the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem_optim.engine.error_feedback import FORMATS, add_residual, save_residual_
from hf_lowmem_optim.ops.low_rank import Coefficients, of_safe_size, orthonormalize, projection_noise
from hf_lowmem_optim.optimizers.ldadam import LDAdam, LDAdamOptions, ldadam_moments_, ldadam_update_


def cut_to_tf32(x: Tensor) -> Tensor:
    """Return float32 numbers without the 13 low bits of their fractions, as tensor cores read them."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def round_to_bfloat16(x: Tensor) -> Tensor:
    """Return the nearest bfloat16 numbers, in float32."""
    return x.bfloat16().float()


ROUNDINGS = {"tf32": cut_to_tf32, "bf16": round_to_bfloat16}


class RoundedProducts:
    """Products of rounded operands, and LDAdam's update with them.

    Args:
        products: ``"tf32"`` or ``"bf16"``.

    Raises:
        ValueError: It is none of these.
    """

    def __init__(self, products: str) -> None:
        if products not in ROUNDINGS:
            raise ValueError(f"products={products!r} is none of those that are simulated, {', '.join(ROUNDINGS)}")
        self.products, self.rounding = products, ROUNDINGS[products]
        self.count = 0  # of matrices, not of batches

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the product of two batches of matrices, float32, and count it."""
        self.count += len(x)
        return self.rounding(x) @ self.rounding(y)

    def update_(
        self, W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: LDAdamOptions
    ) -> None:
        """Take one step of LDAdam; see :func:`hf_lowmem_optim.optimizers.ldadam.ldadam_update_`."""
        if t == 1:
            ldadam_update_(W, g, state, t, o)
            return
        tall, numbers, fmt = W[0].shape[0] > W[0].shape[1], Coefficients.of_step(t, o), FORMATS.get(o.error_feedback)
        m, v, old = (state[key].float().contiguous() for key in ("exp_avg", "exp_avg_sq", "basis"))
        s, rest = numbers.momentum_weight, numbers.gradient_weight
        # 1. a ← g + ξ
        residual = add_residual(g, state, fmt)
        a = residual.mT if tall else residual
        # 3. V ← bᵀU₋;  Y ← bV;  U ← orthonormalize(Y), with b = s·U₋m + (1 − ρ)·a
        Vt = (s * m).add_(self.multiply(old.mT, a), alpha=rest)
        V = of_safe_size((round_to_bfloat16(Vt) if self.products == "bf16" else Vt).mT)
        U = orthonormalize((s * old @ (m @ V)).add_(self.multiply(a, V), alpha=rest))
        # 4. p̃ ← Uᵀa, without what is rounding of these products
        p = self.multiply(U.mT, a)
        size = p.abs()
        p.mul_(size >= size.amax(1, keepdim=True) * projection_noise(self.products, old.shape[1]))
        # 5. to 8.
        moved = m * (numbers.beta1 / (1 - numbers.beta1))
        ldadam_moments_(U.mT @ old, m, v, p, numbers)
        if o.error_feedback != "none":
            # 6. ξ ← a + c·U₋m − U(p̃ + c·m̃), the latter m/(1 − β1) by now
            factors = torch.cat((moved, m * (-1 / (1 - numbers.beta1))), dim=1)
            a.add_(self.multiply(torch.cat((old, U), dim=2), factors))
            save_residual_(state, residual, fmt, seed=t if o.stochastic_rounding else None)
        # 9. W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]
        for weight, change in zip(W, self.multiply(U, p), strict=True):
            into = weight.mT if tall else weight
            into.copy_(numbers.decay * into.float() - numbers.step_size * change)
        for key, value in (("basis", U), ("exp_avg", m), ("exp_avg_sq", v)):
            state[key].copy_(value)


def round_products_(optimizer: Optimizer, products: str) -> RoundedProducts:
    """Let an LDAdam compute with rounded products from now on; a step after the first that rounds none raises.

    Args:
        optimizer: An LDAdam, not layer-wise.
        products: ``"tf32"`` or ``"bf16"``.

    Returns:
        What computes them, and counts.

    Raises:
        ValueError: It is no such optimizer, or there are no such products.
    """
    if type(optimizer) is not LDAdam:
        raise ValueError(f"products={products!r} is a setting of ldadam, not of {type(optimizer).__name__}")
    rounded, counts = RoundedProducts(products), [0]

    def check(*_: Any) -> None:
        if len(counts) > 1 and rounded.count == counts[-1]:
            raise RuntimeError(f"a step with products={products!r} has rounded none: no matrix is compressed by it")
        counts.append(rounded.count)

    optimizer.method = replace(optimizer.method, update_=rounded.update_)
    optimizer.register_step_post_hook(check)
    return rounded
