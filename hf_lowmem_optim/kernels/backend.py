"""Which implementation of a kernel serves a call: plain torch, Triton or numba.

Every operation in this package has a ``reference`` (plain torch, any device, the specification) and up to two fast
versions: ``triton`` for GPUs and ``cpu`` (numba). The tensors' device decides, and one environment variable overrides:

==========  =========================================================  ====================================
backend     serves                                                     chosen by itself when
==========  =========================================================  ====================================
reference   every device                                               nothing faster is installed
triton      CUDA and ROCm; CPU tensors only under TRITON_INTERPRET=1   tensors on a GPU, triton importable
cpu         CPU tensors                                                tensors on the CPU, numba importable
==========  =========================================================  ====================================

An override that cannot be served raises: there is no silent way back to a slower version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["ENVIRONMENT_VARIABLE", "Backend", "choose_backend", "flat", "implementation", "on_device", "serves"]

Backend = Literal["reference", "triton", "cpu"]

ENVIRONMENT_VARIABLE = "HF_LOWMEM_OPTIM_BACKEND"

_HERE = nullcontext()
_FAST: dict[str, Backend] = {"cuda": "triton", "cpu": "cpu"}
_MODULE: dict[str, str] = {"triton": "triton", "cpu": "numba"}
_FILE: dict[Backend, str] = {"triton": "kernel", "cpu": "cpu", "reference": "reference"}
_EXTRA: dict[str, str] = {"triton": "gpu", "cpu": "cpu"}


def choose_backend(
    operation: str, device: torch.device, *, unsupported: Mapping[Backend, str] | None = None
) -> Backend:
    """Return the backend that serves a call of ``operation`` on tensors of ``device``.

    Args:
        operation: Name of the operation, for error messages.
        device: Device of the operation's tensors.
        unsupported: Backends that cannot serve this very call (a shape or dtype they do not cover), each with the
            reason. They are passed over by the automatic choice, and asking for one of them raises with the reason.

    Returns:
        ``"reference"``, ``"triton"`` or ``"cpu"``.

    Raises:
        ValueError: The environment variable names no backend, or one that cannot serve this call.
        ImportError: The environment variable names a backend whose package is not installed.
    """
    requested = os.environ.get(ENVIRONMENT_VARIABLE)
    if requested and requested.strip():
        return _check_request(requested.strip(), operation, device, unsupported or {})
    fast = _FAST.get(device.type)
    if fast is None or (unsupported and fast in unsupported) or not _importable(_MODULE[fast]):
        return "reference"
    return fast


def serves(backend: Backend, device: torch.device) -> bool:
    """Whether a backend is the one for tensors of a device, by itself or by request; nothing is refused.

    For a part of a step that lies where it must, whatever backend was requested for the step's tensors.
    """
    requested = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    return requested in ("", backend) and _FAST.get(device.type) == backend and _importable(_MODULE[backend])


def _check_request(requested: str, operation: str, device: torch.device, unsupported: Mapping[Backend, str]) -> Backend:
    """Return the requested backend, or raise saying what would be right."""
    said = f"{ENVIRONMENT_VARIABLE}={requested!r}"
    for backend in get_args(Backend):
        if requested == backend:
            break
    else:
        choices = ", ".join(get_args(Backend))
        raise ValueError(f"{said} names no backend: set it to one of {choices}, or unset it to choose by device")
    if backend == "reference":
        return "reference"
    module = _MODULE[backend]
    if not _importable(module):
        raise ImportError(
            f"{said} needs the package {module}, which is not installed: "
            f"pip install 'hf-lowmem-optim[{_EXTRA[backend]}]', or unset the variable"
        )
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and _triton_interprets()):
        raise ValueError(
            f"{said} cannot serve {operation} on tensors on {device}: Triton runs on a GPU "
            "(or on CPU tensors with TRITON_INTERPRET=1, for tests); move the tensors or unset the variable"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(
            f"{said} cannot serve {operation} on tensors on {device}: it runs on CPU tensors only; "
            "set 'triton' or 'reference', or unset the variable"
        )
    if backend in unsupported:
        raise ValueError(
            f"{said} cannot serve this call of {operation}: {unsupported[backend]}; "
            "set 'reference', or unset the variable to choose by device"
        )
    return backend  # type: ignore[no-any-return]


def flat(tensor: Tensor, backend: Backend) -> Tensor:
    """Return a contiguous tensor as the backend takes it: flat.

    The numba versions flatten it themselves, as an array: every call of torch lets go of Python's lock, for which the
    other threads wait.
    """
    return tensor if backend == "cpu" or tensor.dim() == 1 else tensor.view(-1)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of a tensor the current one, where Triton launches; nothing to do if it is, or for a CPU tensor."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


@functools.cache
def implementation(kernel: str, backend: Backend) -> ModuleType:
    """Return the module of a kernel's backend, imported at its first use: it needs the backend's package.

    Args:
        kernel: Name of the kernel's folder, ``"block_quant"``.
        backend: What :func:`choose_backend` returned.

    Raises:
        ImportError: The backend's package cannot be imported.
    """
    return importlib.import_module(f"{__package__}.{kernel}.{_FILE[backend]}")


@functools.cache
def _importable(module: str) -> bool:
    """Whether ``module`` is installed; found without importing it, once per process."""
    return importlib.util.find_spec(module) is not None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
