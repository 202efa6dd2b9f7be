"""Types and tensors of Triton's language, which the interpreter makes millions of: what they are is computed once.

What is kept are attributes that the stock constructors gave to the first one of its kind.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_stock_np_dtype = interpreter._get_np_dtype
_stock_equal = tl.dtype.__eq__
_stock_block_type = tl.block_type.__init__
_stock_tensor = tl.tensor.__init__
_stock_broadcast = TritonSemantic.broadcast_impl_value

_np_dtypes: dict[str, Any] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], dict[str, Any]] = {}


def _np_dtype(dtype: Any) -> Any:
    scalar = dtype.scalar
    found = _np_dtypes.get(scalar.name)
    if found is None:
        found = _np_dtypes[scalar.name] = _stock_np_dtype(scalar)
    return found


def _equal(self: Any, other: Any) -> bool:
    return self is other or _stock_equal(self, other)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    # True and 1 are one key
    key = (element_ty.name, *shape) if all(type(size) is int for size in shape) else None
    found = None if key is None else _block_types.get(key)
    if found is None:
        _stock_block_type(self, element_ty, shape)
        if key is not None:
            _block_types[key] = dict(self.__dict__)
    else:
        self.__dict__.update(found, element_ty=element_ty)


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    shape = type.shape if type.is_block() else ()
    found = _shapes.get(shape)
    if found is None:
        _stock_tensor(self, handle, type)
        _shapes[shape] = {key: value for key, value in self.__dict__.items() if key not in ("handle", "type", "dtype")}
    else:
        self.__dict__.update(found, handle=handle, type=type, dtype=type.scalar)


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.shape == right.shape:
        return lhs, rhs  # the stock one takes the tuple for another shape than its list
    return _stock_broadcast(self, lhs, rhs)


def enable() -> None:
    """Replace the constructors, the comparison of dtypes, and the broadcast of two equal shapes."""
    interpreter._get_np_dtype = _np_dtype
    tl.dtype.__eq__ = _equal
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast
