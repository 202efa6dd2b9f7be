"""How many bytes of tensors are alive at most while some code runs, counted from what torch's operators return."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that appear inside the ``with`` block; workspace inside an operator is not seen."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        # Held, so that no new storage can take the address of one of them.
        self.existing = {t.untyped_storage()._cdata: t for t in existing}
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.existing or key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def step_peak_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that one ``step()`` allocates at most, less the state it leaves."""
    held = [t for group in optimizer.param_groups for p in group["params"] for t in (p.data, p.grad)]
    before = state_tensors(optimizer)
    with LiveBytes([*held, *before]) as live:
        optimizer.step()
    known = {id(t) for t in before}
    return live.peak - sum(t.nbytes for t in state_tensors(optimizer) if id(t) not in known)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
