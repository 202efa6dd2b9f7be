"""What interpreted kernels load and store, launch by launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

SECTOR_BYTES = 32


class Launch:
    """The loads and stores of one launch: addresses of lanes, and bytes of each."""

    def __init__(self) -> None:
        self.accesses: dict[str, list[tuple[Any, int]]] = {"load": [], "store": []}

    def issued(self) -> int:
        """Return the bytes of all lanes, whatever they address."""
        return sum(lanes.size * size for kind in self.accesses.values() for lanes, size in kind)

    def needed(self, tensors: Sequence[Tensor], unit: int = 1) -> int:
        """Return the distinct bytes of some tensors that are read, plus those that are written, in units of so many."""
        extents = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        total = 0
        for kind in self.accesses.values():
            touched = []
            for lanes, size in kind:
                lanes = np.unique(lanes)
                wanted = lanes[np.any([(lanes >= start) & (lanes < stop) for start, stop in extents], axis=0)]
                # entries are aligned, so that only units smaller than one have to be told apart within it
                offsets = np.arange(0, size, unit)
                touched.append(np.unique((wanted[:, None] + offsets).ravel() // unit))
            total += np.unique(np.concatenate(touched)).size * unit if touched else 0
        return total


@contextmanager
def counted_launches() -> Iterator[list[Launch]]:
    """Note every launch of an interpreted kernel, with what it loads and stores."""
    found: list[Launch] = []
    run = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(Launch())
        return run(self, *args, **kwargs)

    def counting(kind: str, real: Any) -> Any:
        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[1] if kind == "store" else rest[0]
            lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            found[-1].accesses[kind].append((lanes.astype(np.int64), size))
            return real(self, pointers, *rest)

        return access

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        for kind in ("load", "store"):
            name = f"create_masked_{kind}"
            patch.setattr(InterpreterBuilder, name, counting(kind, getattr(InterpreterBuilder, name)))
        yield found
