"""Describe what a figure depends on besides the code: machine, versions, allocator, and other processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

#: Distributions whose version is recorded where they are installed.
_DISTRIBUTIONS = ["torch", "transformers", "numpy", "numba", "triton", "bitsandbytes", "torchao", "galore-torch"]
_DISTRIBUTIONS += ["apollo-torch", "pytorch-optimizer", "peft"]
#: Environment variables that change allocation or the number of threads.
_VARIABLES = ("MALLOC_", "OMP_", "MKL_", "NUMBA_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_", "HF_LOWMEM_OPTIM_")
#: Says which commit is measured in a copy without git.
COMMIT_VARIABLE = "BENCHMARK_COMMIT"


class BusyMachineError(RuntimeError):
    """Other processes kept the machine busy for longer than one was willing to wait."""


def backend(device: str) -> str:
    """Return the backend of our optimizers on a device: the requested one, else the fastest that is installed."""
    fast, package = {"cuda": ("triton", "triton"), "cpu": ("cpu", "numba")}.get(device, ("reference", "torch"))
    requested = os.environ.get("HF_LOWMEM_OPTIM_BACKEND", "").strip()
    return requested or (fast if importlib.util.find_spec(package) else "reference")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory and GPU, without names that tell whose machine it is."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def describe_software() -> dict[str, Any]:
    """Return versions, the commit, and the environment variables that change timings or memory."""
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    environment = {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)}
    malloc = " ".join(f"{key}={value}" for key, value in environment.items() if key.startswith("MALLOC_"))
    return {"versions": versions, "commit": commit(), "environment": environment, "malloc": malloc or "default"}


def _processor() -> str:
    """Return the processor's name as Linux has it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Return the short hash of the checkout, with a plus sign if its Python files were changed; None outside of one."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    # results are written into the checkout, which does not make it another program
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "-uno", "--", ":(top)*.py"])
    folder = Path(__file__).parent
    try:
        head, changes = (subprocess.check_output(command, cwd=folder, text=True).strip() for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changes)


def _busy_seconds() -> float:
    """Return the processor time of everyone since boot, what the hypervisor took for others included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


class OtherLoad:
    """Measure how much processor time other processes take while something runs."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy = _busy_seconds()
        self._own = time.process_time()

    def cores(self) -> float:
        """Return the cores that others kept busy on average since this object was made; an idle system has 0.02."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        return max(0.0, (_busy_seconds() - self._busy - (time.process_time() - self._own)) / seconds)


def wait_until_quiet(limit_cores: float = 0.2, patience_s: float = 300.0, calm_s: float = 3.0) -> float:
    """Wait until other processes together use less than ``limit_cores`` for ``calm_s`` seconds.

    A competitor for a core makes single steps a hundred times slower, and the load average still shows what ended a
    minute ago: so what others compute is measured, second by second.

    Returns:
        What others used in the last second.

    Raises:
        BusyMachineError: It did not become quiet within ``patience_s`` seconds.
    """
    deadline = time.monotonic() + patience_s
    calm, told = 0.0, False
    while True:
        others = OtherLoad()
        time.sleep(1.0)
        used = others.cores()
        calm = calm + 1.0 if used <= limit_cores else 0.0
        if calm >= calm_s:
            return used
        if time.monotonic() > deadline:
            raise BusyMachineError(
                f"other processes use {used:.2f} cores (limit {limit_cores}; load {os.getloadavg()[0]:.1f}) and "
                f"did not stop within {patience_s:.0f} s. Timings would be wrong: stop them, raise --wait, or measure "
                "all the same with --ignore-load"
            )
        if not told and used > limit_cores:
            told = True
            print(f"waiting for other processes, which use {used:.2f} cores (limit {limit_cores})", flush=True)
