"""Which version of an operation serves a call: plain torch, Triton or numba.

Every operation has a torch version that serves any device and specifies the others. The device of the call's tensors
decides, and one environment variable overrides:

==========  =========================================================  ====================================
backend     serves                                                     chosen by itself when
==========  =========================================================  ====================================
reference   every device: the torch version                            nothing faster is installed
triton      CUDA and ROCm; CPU tensors only under TRITON_INTERPRET=1   tensors on a GPU, triton importable
cpu         CPU tensors (numba)                                        tensors on the CPU, numba importable
==========  =========================================================  ====================================

An override that cannot be served raises: there is no silent way back to a slower version. An operation for which a
backend has no version takes the torch version under any override.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, ParamSpec, TypeVar, get_args, overload

import torch

__all__ = ["ENVIRONMENT_VARIABLE", "Backend", "Op", "full_precision", "register"]

logger = logging.getLogger(__name__)

Backend = Literal["reference", "triton", "cpu"]

ENVIRONMENT_VARIABLE = "HF_LOWMEM_OPTIM_BACKEND"

P = ParamSpec("P")
R = TypeVar("R")

_FAST: dict[str, Backend] = {"cuda": "triton", "cpu": "cpu"}
_PACKAGE: dict[str, str] = {"triton": "triton", "cpu": "numba"}
_EXTRA: dict[str, str] = {"triton": "gpu", "cpu": "cpu"}

#: Triton's interpreter keeps the program that it is at in global variables.
_INTERPRETER = threading.RLock()
#: Faster versions by operation and backend, each with a function that says why it cannot serve a call.
_VERSIONS: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., str | None] | None]] = {}
#: Operations whose torch version is made of others, by backend that serves those.
_COMPOSED: set[tuple[str, str]] = set()


class Op(Generic[P, R]):
    """An operation: its torch version, and the faster ones registered for its name.

    The first argument of a call decides by its ``device``: a tensor, something that has a device, or a sequence of
    such; of a tuple, its first element.

    Args:
        torch_version: The specification; the operation has its name, signature and docstring.

    Example:
        >>> @Op
        ... def double(x: Tensor) -> Tensor:
        ...     return x + x
        >>> # in ops/triton/double.py
        >>> @register(double, "triton")
        ... def double(x: Tensor) -> Tensor: ...
    """

    def __init__(self, torch_version: Callable[P, R]) -> None:
        functools.update_wrapper(self, torch_version)
        self.name = torch_version.__name__
        self.torch_version = torch_version

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the version that serves these arguments."""
        first: Any = args[0]
        while isinstance(first, Sequence):
            first = first[0]
        backend = _resolve(os.environ.get(ENVIRONMENT_VARIABLE, ""), first.device.type)
        version = _VERSIONS.get((self.name, backend))
        if version is None:
            return self.torch_version(*args, **kwargs)
        run, why_not = version
        if why_not is not None and (reason := why_not(*args, **kwargs)) is not None:
            if (self.name, backend) not in _COMPOSED:
                refuse_override(self.name, backend, reason)
            return self.torch_version(*args, **kwargs)
        if backend == "triton" and first.device.type == "cpu":
            with _INTERPRETER:
                return run(*args, **kwargs)  # type: ignore[no-any-return]
        return run(*args, **kwargs)  # type: ignore[no-any-return]


@overload
def register(
    op: Op[P, R], backend: Backend, *, why_not: Callable[P, str | None] | None = None, composed: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


@overload
def register(
    op: str, backend: Backend, *, why_not: Callable[..., str | None] | None = None, composed: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def register(op: Any, backend: Backend, *, why_not: Any = None, composed: bool = False) -> Any:
    """Register a faster version of an operation.

    Args:
        op: The operation; its name where the module that defines it is in a higher layer (a method's whole update).
        backend: Whose version it is.
        why_not: Given the arguments of a call, returns why this version cannot serve it, or None if it can. The torch
            version serves such a call, unless the backend was asked for: that raises with the reason.
        composed: Whether the torch version is made of operations that the backend serves, too: then it is no way back
            to a slower backend, and serves the call also where the backend was asked for.

    Returns:
        A decorator that leaves the function as it is.
    """

    def add(version: Callable[..., Any]) -> Callable[..., Any]:
        key = op if isinstance(op, str) else op.name, backend
        _VERSIONS[key] = version, why_not
        if composed:
            _COMPOSED.add(key)
        return version

    return add


def chosen_backend(device: torch.device) -> Backend:
    """Return the backend for tensors of a device: the requested one, or the fastest that can be imported.

    Raises:
        ValueError: The environment variable names no backend, or one that cannot serve this device.
        ImportError: The environment variable names a backend whose package cannot be imported.
    """
    return _resolve(os.environ.get(ENVIRONMENT_VARIABLE, ""), device.type)


@functools.cache
def _resolve(requested: str, device_type: str) -> Backend:
    """Return the backend for a kind of device, given the environment variable; see :func:`chosen_backend`."""
    if requested.strip():
        return _check_request(requested.strip(), device_type)
    fast = _FAST.get(device_type, "reference")
    return fast if fast == "reference" or _loaded(fast) is None else "reference"


def refuse_override(operation: str, backend: Backend, reason: str) -> None:
    """Raise ValueError with the reason if a backend that cannot serve a call was asked for."""
    if os.environ.get(ENVIRONMENT_VARIABLE, "").strip():
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={backend!r} cannot serve this call of {operation}: {reason}; "
            "set 'reference', or unset the variable to choose by device"
        )


def _check_request(requested: str, device: str) -> Backend:
    """Return the requested backend, or raise saying what would be right."""
    said = f"{ENVIRONMENT_VARIABLE}={requested!r}"
    backend: Backend | None = next((known for known in get_args(Backend) if known == requested), None)
    if backend is None:
        choices = ", ".join(get_args(Backend))
        raise ValueError(f"{said} names no backend: set it to one of {choices}, or unset it to choose by device")
    if backend == "reference":
        return backend
    if backend == "triton" and device != "cuda" and not (device == "cpu" and _triton_interprets()):
        raise ValueError(
            f"{said} cannot serve tensors on {device}: Triton runs on a GPU "
            "(or on CPU tensors with TRITON_INTERPRET=1, for tests); move the tensors or unset the variable"
        )
    if backend == "cpu" and device != "cpu":
        raise ValueError(
            f"{said} cannot serve tensors on {device}: it runs on CPU tensors only; "
            "set 'triton' or 'reference', or unset the variable"
        )
    problem = _loaded(backend)
    if problem is not None:
        raise ImportError(
            f"{said} needs the package {_PACKAGE[backend]}: {problem}. "
            f"pip install 'hf-lowmem-optim[{_EXTRA[backend]}]', or unset the variable"
        )
    return backend


@functools.cache
def _loaded(backend: Backend) -> str | None:
    """Import a backend's versions once, which registers them; return why that failed, None if it did not."""
    package = _PACKAGE[backend]
    try:
        missing = importlib.util.find_spec(package) is None
    except ValueError:  # a module put into sys.modules by hand
        missing = False
    if missing:
        return f"{package} is not installed"
    # a package may fail in any way, such as OSError for a library that cannot be loaded; our own versions may not
    for module, failures in ((package, Exception), (f"{__package__}.{backend}", ImportError)):
        try:
            importlib.import_module(module)
        except failures as error:
            logger.warning(
                "%s is installed but cannot be imported (%s): the optimizers compute with plain torch, which is slower",
                *(package, error),
            )
            return f"{package} cannot be imported ({error})"
    return None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32, whatever TF32, bfloat16 or autocast setting training runs with."""
    autocast = [torch.autocast(kind, enabled=False) for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    changed = []
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn):
        owner: Any = getattr(backend, "matmul", backend)
        name, full = ("fp32_precision", "ieee") if hasattr(owner, "fp32_precision") else ("allow_tf32", False)
        before = getattr(owner, name, None)
        if before in ("tf32", "bf16", True):
            changed.append((owner, name, before))
            setattr(owner, name, full)
    for context in autocast:
        context.__enter__()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for context in reversed(autocast):
            context.__exit__(None, None, None)
        for owner, name, before in changed:
            setattr(owner, name, before)
