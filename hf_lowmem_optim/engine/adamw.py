"""AdamW (Loshchilov & Hutter, arXiv 1711.05101): the dense rule, for everything that is not compressed.

1. W ← W·(1 − lr·weight_decay)
2. m ← β1·m + (1 − β1)·g
3. v ← β2·v + (1 − β2)·g²
4. W ← W − lr·m̂ / (√v̂ + eps)

| letter | state key    | shape   | dtype         | bytes per parameter |
|--------|--------------|---------|---------------|---------------------|
| m      | `exp_avg`    | shape W | `dense_state` | 4 (fp32), 2 (bf16)  |
| v      | `exp_avg_sq` | shape W | `dense_state` | 4 (fp32), 2 (bf16)  |

``dense_state="param"`` stores the moments in the dtype of W, ``"fp32"`` in float32. torch's own functional AdamW does
the arithmetic: with ``"param"`` the result is that of ``torch.optim.AdamW`` to the bit, with ``"fp32"`` that of
``torch.optim.AdamW`` on a float32 copy of W, rounded to the dtype of W.

``dense_state="8bit"`` (Dettmers et al., arXiv 2110.02861) is bitsandbytes' own operation, imported when first used:
both moments in blocks of 256 entries, as codes of a dynamic map times the block's largest absolute value. Tensors below
4096 entries keep float32 moments, as in bitsandbytes; a trajectory is bit for bit that of
``bitsandbytes.optim.AdamW8bit``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_lowmem_optim.engine.buckets import TensorUpdate
from hf_lowmem_optim.engine.rounding import StochasticRounding
from hf_lowmem_optim.ops.constants import to_device
from hf_lowmem_optim.ops.step_numbers import Number
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["adamw_state", "adamw_update_", "require_bitsandbytes"]

_BLOCK_SIZE = 256
_MIN_QUANTIZED_ENTRIES = 4096
#: bitsandbytes' kernels count entries in 32 bits; whole blocks.
_MAX_8BIT_ENTRIES = 1 << 30
_EXTRA = "pip install 'hf-lowmem-optim[bitsandbytes]'"
# Fused is the fastest of torch's implementations on the CPU and torch's choice for CUDA.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def adamw_state(shape: Sequence[int], dtype: torch.dtype, dense_state: str) -> dict[str, TensorSpec]:
    """Describe both moments of one parameter; allocated as zeros, all of it holds zeros."""
    numel = math.prod(shape)
    if dense_state == "8bit" and numel >= _MIN_QUANTIZED_ENTRIES:
        codes = TensorSpec((numel,), torch.uint8, "dense")
        absmax = TensorSpec((-(-numel // _BLOCK_SIZE),), torch.float32, "dense statistics")
        moments = ("exp_avg", "exp_avg_sq")
        return {f"{key}_{part}": spec for key in moments for part, spec in (("codes", codes), ("absmax", absmax))}
    moment = TensorSpec(tuple(shape), dtype if dense_state == "param" else torch.float32, "dense")
    return {"exp_avg": moment, "exp_avg_sq": moment}


def adamw_update_(updates: Sequence[TensorUpdate]) -> None:
    """Take one AdamW step of tensors of one group, in place; the gradients are only read.

    Where torch's kernel can work in place, it does, on all tensors at once. Elsewhere the tensors are cut into slices,
    so that float32 copies do not grow with them; small tensors share a slice.

    Args:
        updates: The tensors, with states as :func:`adamw_state` describes them.
    """
    in_8bit = updates[0].options.dense_state == "8bit"
    others = [update for update in updates if in_8bit or _needs_copies(update)]
    in_place = [update for update in updates if not _needs_copies(update)] if others else updates
    if in_place and not in_8bit:
        moments = [u.state["exp_avg"] for u in in_place], [u.state["exp_avg_sq"] for u in in_place]
        _adamw_(updates=in_place, W=[u.param for u in in_place], g=[u.grad for u in in_place], moments=moments)
    # what follows walks flat memory
    flat = [replace(u, param=u.param.contiguous(), grad=u.grad.contiguous()) if u.is_odd else u for u in others]
    if in_8bit:
        for update in flat:
            _update_8bit_(update)
    else:
        for slices in _shared_slices(flat):
            _update_slices_(slices)
    for update, done in zip(others, flat, strict=True):
        if not update.param.is_contiguous():
            update.param.copy_(done.param)


def _needs_copies(update: TensorUpdate) -> bool:
    """Return whether the step needs float32 copies: to round its own way, or for moments wider than the weight."""
    mixed = update.options.dense_state == "fp32" and update.param.dtype != torch.float32
    return mixed or update.is_widened


def _adamw_(
    *,
    updates: Sequence[TensorUpdate],
    W: Sequence[Tensor],
    g: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> None:
    """Run torch's functional AdamW; ``updates`` say the step and the options of each entry of the other lists."""
    options = updates[0].options
    lr: float | Number = options.dense_lr
    # torch's fused kernel walks flat memory; another layout takes its plain loop
    has_fused = {device: device.type in _FUSED_DEVICES for device in {w.device for w in W}}
    fusable = [w.is_contiguous() and x.is_contiguous() and has_fused[w.device] for w, x in zip(W, g, strict=True)]
    columns: list[Sequence[Any]] = [W, g, *moments, [update.step for update in updates]]
    for fused in set(fusable):
        # all of them, but for rare layouts
        some: list[list[Any]] = [list(compress(each, [f is fused for f in fusable])) for each in columns]
        adamw(
            some[0],
            some[1],
            some[2],
            some[3],
            [],
            _step_tensors(some[0], some[4], on_device=fused),
            fused=fused,
            foreach=False,
            amsgrad=False,
            beta1=options.betas[0],
            beta2=options.betas[1],
            lr=lr.factor() if isinstance(lr, Number) else lr,
            weight_decay=options.weight_decay,
            eps=options.eps,
            maximize=False,
        )


def _step_tensors(params: Sequence[Tensor], steps: Sequence[Any], *, on_device: bool) -> list[Tensor]:
    """Return the step counts before this update as the float32 scalars that torch's functional AdamW increments."""
    if isinstance(steps[0], Number):
        return list(torch.stack([(step - 1).factor() for step in steps]).unbind())
    if len(devices := {param.device for param in params}) == len(set(steps)) == 1 and on_device:
        # one fill instead of a copy from the host, the usual case
        before = torch.full((len(steps),), float(steps[0] - 1), dtype=torch.float32, device=devices.pop())
        return list(before.unbind())
    by_device: dict[torch.device, list[int]] = {}
    for index, param in enumerate(params):
        by_device.setdefault(param.device if on_device else torch.device("cpu"), []).append(index)
    tensors = [torch.empty(0)] * len(params)
    for device, indices in by_device.items():
        values = to_device(torch.tensor([float(steps[i] - 1) for i in indices], dtype=torch.float32), device)
        for i, value in zip(indices, values.unbind(), strict=True):
            tensors[i] = value
    return tensors


class _Slice(NamedTuple):
    """Some consecutive entries of a tensor, flat."""

    update: TensorUpdate
    weight: Tensor
    grad: Tensor
    moments: tuple[Tensor, Tensor]
    rounding: StochasticRounding | None
    correction: Tensor | None


def _slice_entries(device: torch.device) -> int:
    """Return the entries of a slice, whole quantization blocks: a CPU's cache holds it; few launches elsewhere."""
    return 1 << 16 if device.type == "cpu" else 1 << 21


def _slices(update: TensorUpdate, length: int) -> Iterator[_Slice]:
    """Cut a tensor into slices."""
    rounding = update.rounding()
    weight, grad = update.param.view(-1), update.grad.view(-1)
    m, v = update.state["exp_avg"].view(-1), update.state["exp_avg_sq"].view(-1)
    correction = update.state[CORRECTION].view(-1) if CORRECTION in update.state else None
    for start in range(0, weight.numel(), length):
        part = slice(start, start + length)
        corrected = None if correction is None else correction[part]
        yield _Slice(update, weight[part], grad[part], (m[part], v[part]), rounding, corrected)


def _shared_slices(updates: Sequence[TensorUpdate]) -> Iterator[list[_Slice]]:
    """Yield slices of tensors of one device together, as many as fit into one."""
    by_device: dict[torch.device, list[TensorUpdate]] = {}
    for update in updates:
        by_device.setdefault(update.param.device, []).append(update)
    for device, there in by_device.items():
        limit = room = _slice_entries(device)
        together: list[_Slice] = []
        for piece in (piece for update in there for piece in _slices(update, limit)):
            if piece.weight.numel() > room:
                yield together
                together, room = [], limit
            together.append(piece)
            room -= piece.weight.numel()
        if together:
            yield together


def _update_slices_(slices: Sequence[_Slice]) -> None:
    """Update slices in float32, with the moments that are float32 in place."""
    narrow, grads = [s.weight for s in slices], [s.grad.float() for s in slices]
    # all or none: they are of one group
    corrections = [s.correction for s in slices if s.correction is not None]
    weights = join_weights(narrow, corrections) if corrections else [weight.float() for weight in narrow]
    moments = [s.moments[0].float() for s in slices], [s.moments[1].float() for s in slices]
    _adamw_(updates=[s.update for s in slices], W=weights, g=grads, moments=moments)
    if corrections:
        split_weights_(narrow, corrections, weights)
    for piece, weight, *wide in zip(slices, weights, *moments, strict=True):
        if piece.rounding is None and piece.correction is None:
            piece.weight.copy_(weight)
        elif piece.rounding is not None:
            piece.rounding.round_(piece.weight, weight)
        for stored, moment in zip(piece.moments, wide, strict=True):
            if stored is not moment:
                stored.copy_(moment)


def require_bitsandbytes(params: Iterable[Tensor]) -> None:
    """Raise ImportError where bitsandbytes is missing, or has no 8-bit AdamW for the CPU and a parameter is on it.

    Parameters on the meta device are only planned with and need nothing.
    """
    devices = {param.device.type for param in params} - {"meta"}
    if not devices:
        return
    version = _bitsandbytes().__version__
    operation = "bitsandbytes::optimizer_update_8bit_blockwise"
    if "cpu" in devices and not torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CPU"):
        raise ImportError(
            f'dense_state="8bit" on the CPU needs a bitsandbytes with an 8-bit AdamW for it, which {version} has not; '
            f"upgrade it: {_EXTRA}"
        )


def _update_8bit_(update: TensorUpdate) -> None:
    """Update a tensor by bitsandbytes, which takes weights of any dtype and rounds to nearest."""
    weights, grads, rounding = update.param.view(-1), update.grad.view(-1), update.rounding()
    device, correction = weights.device, update.state[CORRECTION].view(-1) if CORRECTION in update.state else None
    in_one_kernel = device.type != "cpu" and not update.is_widened
    length = _MAX_8BIT_ENTRIES if in_one_kernel else _slice_entries(device)
    for start in range(0, weights.numel(), length):
        part = slice(start, start + length)
        weight, grad = weights[part], grads[part]
        if not update.is_widened:
            _adamw_8bit_slice_(weight, grad, update, start)
            continue
        wide = weight.float() if correction is None else join_weights([weight], [correction[part]])[0]
        _adamw_8bit_slice_(wide, grad.float(), update, start)
        if correction is not None:
            split_weights_([weight], [correction[part]], [wide])
        elif rounding is not None:
            rounding.round_(weight, wide)


def _adamw_8bit_slice_(weight: Tensor, grad: Tensor, update: TensorUpdate, start: int) -> None:
    """Take one step of consecutive entries, from entry ``start`` of the tensor, a multiple of 256."""
    functional, options, state = _bitsandbytes().functional, update.options, update.state
    (beta1, beta2), eps, step, lr = options.betas, options.eps, update.step, options.dense_lr
    stop = start + weight.numel()
    with _on_the_default_stream(weight.device):
        if "exp_avg" in state:
            m, v = (state[key].view(-1)[start:stop] for key in ("exp_avg", "exp_avg_sq"))
            functional.optimizer_update_32bit(
                "adam", grad, weight, m, beta1, eps, step, lr, v, beta2, weight_decay=options.weight_decay
            )
            return
        codes = [state[key][start:stop] for key in ("exp_avg_codes", "exp_avg_sq_codes")]
        blocks = slice(start // _BLOCK_SIZE, -(-stop // _BLOCK_SIZE))
        absmax = [state[key][blocks] for key in ("exp_avg_absmax", "exp_avg_sq_absmax")]
        maps = (_dynamic_map(signed, weight.device) for signed in (True, False))
        # β3 and α are of another optimizer that shares the operation
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, weight, *codes, beta1, beta2, 0.0, 0.0, eps, step, lr, *maps, *absmax, options.weight_decay
        )


def _bitsandbytes() -> Any:
    """Import the package at its first use."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f'dense_state="8bit" needs bitsandbytes: {_EXTRA}') from error
    return bitsandbytes


@functools.lru_cache(maxsize=16)
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """Return bitsandbytes' map from codes to values, float32 [256]."""
    table: Tensor = _bitsandbytes().functional.create_dynamic_map(signed=signed)
    return table.to(device)


@contextmanager
def _on_the_default_stream(device: torch.device) -> Iterator[None]:
    """Order bitsandbytes' kernels, which run on CUDA's default stream, after and before those of torch's stream."""
    if device.type != "cuda" or torch.cuda.default_stream(device) == torch.cuda.current_stream(device):
        yield
        return
    default, current = torch.cuda.default_stream(device), torch.cuda.current_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)
