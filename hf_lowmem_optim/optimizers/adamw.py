"""AdamW (Loshchilov & Hutter, arXiv 1711.05101): the rule of everything that is not compressed.

1. W ← W·(1 − lr·weight_decay)
2. m ← β1·m + (1 − β1)·g
3. v ← β2·v + (1 − β2)·g²
4. W ← W − lr·m̂ / (√v̂ + eps)

| letter | state key    | shape   | dtype                | bytes per parameter |
|--------|--------------|---------|----------------------|---------------------|
| m      | `exp_avg`    | shape W | `dense_state`        | 4 (fp32), 2 (bf16)  |
| v      | `exp_avg_sq` | shape W | `dense_state`        | 4 (fp32), 2 (bf16)  |

``dense_state="param"`` stores the moments in the dtype of W, ``"fp32"`` in float32; ``"8bit"`` is in ``adamw8bit.py``.
torch's own functional AdamW does the arithmetic: with ``"param"`` the result is that of ``torch.optim.AdamW`` to the
bit, with ``"fp32"`` that of ``torch.optim.AdamW`` on a float32 copy of W, rounded to the dtype of W (``dense.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_lowmem_optim.optimizers.adamw8bit import adamw8bit_state
from hf_lowmem_optim.state import TensorSpec

__all__ = ["DENSE_STATES", "DenseState", "adamw_state", "adamw_update_"]

DenseState = Literal["param", "fp32", "8bit"]
"""How the dense rule stores its moments."""

DENSE_STATES: tuple[str, ...] = get_args(DenseState)

# Fused is the fastest of torch's implementations on the CPU (benchmarks/step_time.py) and torch's choice for CUDA.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def adamw_state(shape: Sequence[int], dtype: torch.dtype, *, dense_state: str = "param") -> dict[str, TensorSpec]:
    """State of the dense rule: both moments.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.
        dense_state: Storage of the moments, one of :data:`DENSE_STATES`.

    Returns:
        The specs of ``exp_avg`` and ``exp_avg_sq``, or those of :func:`adamw8bit_state`.
    """
    if dense_state == "8bit":
        return adamw8bit_state(shape)
    spec = TensorSpec(tuple(shape), dtype if dense_state == "param" else torch.float32, "dense")
    return {"exp_avg": spec, "exp_avg_sq": spec}


def adamw_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    steps: Sequence[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of many tensors, in place; the gradients are only read.

    Args:
        params: Parameters of any shapes; float32, bfloat16 or float16.
        grads: Their gradients, same shapes and dtypes.
        states: Their states, moments of the same dtypes.
        steps: Which update this is for each of them, 1 for the first.
        lr: Learning rate.
        betas: Decay rates β1 and β2.
        eps: Added to √v̂.
        weight_decay: Decoupled weight decay.
    """
    fusable = [_is_fusable(p, g) for p, g in zip(params, grads, strict=True)]
    for fused in (True, False):
        chosen = [i for i, f in enumerate(fusable) if f is fused]
        if not chosen:
            continue
        adamw(
            [params[i] for i in chosen],
            [grads[i] for i in chosen],
            [states[i]["exp_avg"] for i in chosen],
            [states[i]["exp_avg_sq"] for i in chosen],
            [],
            _step_tensors([params[i] for i in chosen], [steps[i] for i in chosen], on_device=fused),
            fused=fused,
            # A layout that the fused kernel would misread takes the plain loop.
            foreach=False,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


def _is_fusable(param: Tensor, grad: Tensor) -> bool:
    """Whether torch's fused kernel, which walks flat memory, may be given these tensors."""
    return param.device.type in _FUSED_DEVICES and param.is_contiguous() and grad.is_contiguous()


def _step_tensors(params: Sequence[Tensor], steps: Sequence[int], *, on_device: bool) -> list[Tensor]:
    """The step counts before this update as the float32 scalars that torch's functional AdamW increments."""
    by_device: dict[torch.device, list[int]] = {}
    for index, param in enumerate(params):
        by_device.setdefault(param.device if on_device else torch.device("cpu"), []).append(index)
    tensors = [torch.empty(0)] * len(params)
    for device, indices in by_device.items():
        counts = [float(steps[i] - 1) for i in indices]
        # One fill instead of a copy from the host where all counts are equal, the usual case.
        if len(set(counts)) == 1:
            values = torch.full((len(counts),), counts[0], device=device)
        else:
            values = torch.tensor(counts, device=device)
        for i, value in zip(indices, values.unbind(), strict=True):
            tensors[i] = value
    return tensors
