"""Counts what goes through torch.distributed: calls by name, and the bytes that this process sends to others."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def _to_each(given: Mapping[str, Any]) -> int:
    sizes: list[int] = given["input_split_sizes"]
    return (sum(sizes) - sizes[dist.get_rank()]) * int(given["input"].element_size())


def _gathered(given: Mapping[str, Any]) -> int:
    return (dist.get_world_size() - 1) * int(given["input_tensor"].nbytes)


def _scattered(given: Mapping[str, Any]) -> int:
    return (dist.get_world_size() - 1) * int(given["output"].nbytes)


#: Bytes that one process sends, in rings, from the arguments of a call.
_SENT: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "all_to_all_single": _to_each,
    "all_gather": lambda given: sum(part.nbytes for part in given["tensor_list"]) - given["tensor"].nbytes,
    "all_reduce": lambda given: 2 * (given["tensor"].nbytes - given["tensor"].nbytes // dist.get_world_size()),
    **dict.fromkeys(("all_gather_into_tensor", "all_gather_single"), _gathered),
    **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), _scattered),
}
#: What nothing here should call: it would be a KeyError.
_UNEXPECTED = ("broadcast", "send")


class Counts:
    """Collectives, and bytes."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.nbytes = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Count the calls of this process; those that this version of torch lacks are not called."""
    counts = Counts()
    originals = {name: getattr(dist, name) for name in (*_SENT, *_UNEXPECTED) if hasattr(dist, name)}

    def count(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts.calls[name] += 1
            counts.nbytes += _SENT[name](inspect.signature(originals[name]).bind(*args, **kwargs).arguments)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, count(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
