"""Vectorized custom reductions and scans (and with them ``tl.sort``), in place of one Python call per element.

Both combine in an order-preserving tree, as a GPU does: an associative combine function gives the same result up to
rounding. A combine function that is not associative shows here as it would on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Arrays = list[np.ndarray]

_stock_grid_call = interpreter.GridExecutor.__call__
_patched_globals: set[int] = set()


def _tensor(array: np.ndarray, dtype: Any) -> Any:
    kind = tl.block_type(dtype.scalar, list(array.shape)) if array.shape else dtype.scalar
    return tl.core.tensor(interpreter.TensorHandle(np.ascontiguousarray(array), dtype.scalar), kind)


def _combine(fn: Callable[..., Any], left: Arrays, right: Arrays, dtypes: Sequence[Any]) -> Arrays:
    """One call of the combine function on whole arrays."""
    operands = [_tensor(a, d) for side in (left, right) for a, d in zip(side, dtypes, strict=True)]
    result = fn(*operands)
    result = result if isinstance(result, tuple) else (result,)
    shape = left[0].shape
    return [
        np.broadcast_to(r.handle.data, shape).astype(a.dtype, copy=False) for r, a in zip(result, left, strict=True)
    ]


def _reduce(self: Any, operands: Any) -> list[Any]:
    whole = self.axis is None
    operands, axis = self.unravel(operands, self.axis)
    dtypes = [t.dtype for t in operands]
    num_dims = operands[0].handle.data.ndim
    data = [np.moveaxis(t.handle.data, axis, -1) for t in operands]
    while (length := data[0].shape[-1]) > 1:
        even = length // 2 * 2
        pairs = _combine(self.combine_fn.fn, [a[..., 0:even:2] for a in data], [a[..., 1:even:2] for a in data], dtypes)
        data = [np.concatenate([p, a[..., even:]], -1) for p, a in zip(pairs, data, strict=True)]
    results = []
    for array, operand in zip(data, operands, strict=True):
        out: Any = array[..., 0]
        if self.keep_dims:
            out = out.reshape((1,) * num_dims) if whole else np.expand_dims(out, axis)
        elif out.ndim == 0:
            out = out.item()
        results.append(self.to_tensor(out, operand.dtype))
    return results


def _scan(self: Any, operands: Any) -> list[Any]:
    dtypes = [t.dtype for t in operands]
    data = [np.moveaxis(t.handle.data, self.axis, -1).copy() for t in operands]
    shift, length = 1, data[0].shape[-1]
    while shift < length:
        # all lanes at once (shapes must stay powers of two): the first `shift` lanes combine junk and are dropped
        combined = _combine(self.combine_fn.fn, [np.roll(a, shift, -1) for a in data], data, dtypes)
        data = [np.concatenate([a[..., :shift], c[..., shift:]], -1) for c, a in zip(combined, data, strict=True)]
        shift *= 2
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(a, -1, self.axis)), t.dtype)
        for a, t in zip(data, operands, strict=True)
    ]


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a jit function from a kernel, patching the language once per module and launch, not once per call."""
    module = id(self.fn.__globals__)
    if module not in _patched_globals:
        interpreter._patch_lang(self.fn)
        _patched_globals.add(module)
    return self.rewrite()(*args, **kwargs)


def _call_grid(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched_globals.clear()
    return _stock_grid_call(self, *args, **kwargs)


def enable() -> None:
    """Replace the element-by-element reductions and scans, and the patching at every device-function call."""
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.ScanOps.generic_scan = _scan
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.GridExecutor.__call__ = _call_grid
