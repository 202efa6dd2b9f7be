"""Compile every Triton launch for GPUs that are not there, and read what the compilers say about it.

Run as ``python -m benchmarks.ahead_of_time [target …]`` in a process without TRITON_INTERPRET (the interpreter
replaces the kernels when triton is imported). Prints one JSON list: per launch and target the registers, spills, shared
memory, widest global load and machine code. No GPU and no driver are needed: triton brings ptxas, nvdisasm and LLVM's
AMD backend along. ``--rotate`` is for tests: see :func:`jobs`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine_code import blocks, disassemble


@dataclass(frozen=True)
class Target:
    """A GPU: how triton names it, and what one of its multiprocessors (compute units) holds.

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's guide to the CDNA3
    instruction set.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_per_program: int  # bytes that one program may use
    shared_per_processor: int
    shared_reserved: int  # bytes taken per program by the driver
    warps_per_processor: int
    registers_per_processor: int  # 32-bit registers of all threads together
    register_granule: int  # registers per thread are rounded up to it


TARGETS = {
    "sm80": Target("cuda", 80, 32, 163 << 10, 164 << 10, 1 << 10, 64, 65536, 8),
    "sm90": Target("cuda", 90, 32, 227 << 10, 228 << 10, 1 << 10, 64, 65536, 8),
    "sm100": Target("cuda", 100, 32, 227 << 10, 228 << 10, 1 << 10, 64, 65536, 8),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 0, 32, 4 * 512 * 64, 8),
}


def _record(launch: Any, target: Target) -> list[tuple[Any, dict[str, Any], int]]:
    """Run a call with the launching itself replaced.

    Returns:
        Each kernel, its arguments and options by name, and how many programs it has.
    """
    import torch
    from triton.runtime.jit import JITFunction

    seen: list[tuple[Any, dict[str, Any], int]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs, math.prod(grid)))

    real_run, real_hip = JITFunction.run, torch.version.hip
    JITFunction.run, torch.version.hip = run, "ahead of time" if target.backend == "hip" else None
    try:
        launch.prepare()[0]()
    finally:
        JITFunction.run, torch.version.hip = real_run, real_hip
    return seen


def _type_of(value: Any) -> str:
    """Triton's name for the type of a launch argument."""
    if hasattr(value, "data_ptr"):
        name = str(value.dtype).removeprefix("torch.")
        for long, short in {"bfloat16": "bf16", "float": "fp", "uint": "u", "int": "i"}.items():
            name = name.replace(long, short)
        return f"*{name}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_kernel(kernel: Any, values: dict[str, Any], target: Target) -> Any:
    """Specialize as triton's launcher would (constants, ones, multiples of 16), then compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in values.items() if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for param in kernel.params:
        value = values[param.name]
        specialize = not param.do_not_specialize
        if param.is_constexpr or value is None or (specialize and value is not True and _is_int(value) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        signature[param.name] = _type_of(value)
        address = value.data_ptr() if hasattr(value, "data_ptr") else value
        if specialize and _is_int(address) and address % 16 == 0:
            attributes[(kernel.arg_names.index(param.name),)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def nvidia_tool(name: str) -> Path | None:
    """Return where triton, or else CUDA, has one of NVIDIA's tools; None where neither has it."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    elsewhere = shutil.which(name)
    return found if found.exists() else Path(elsewhere) if elsewhere else None


def _registers_and_spills(compiled: Any, target: Target) -> tuple[int, int]:
    if target.backend == "hip":
        listing = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", listing)
            return int(found[1]) if found else 0

        # vgpr_count is the total of ordinary and accumulation registers, which share one file
        spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
        return field("vgpr_count"), max(field("private_segment_fixed_size"), 4 * spilled)
    cuobjdump = nvidia_tool("cuobjdump")
    assert cuobjdump, "triton has no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found, listing
    return int(found[1]), int(found[2]) + int(found[3])


def _widest_load(compiled: Any, target: Target) -> int:
    if target.backend == "hip":
        widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2}
        widths |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        loads = re.findall(r"(?:global|buffer|flat)_load_(\w+?)(?:_d16\w*)?\s", compiled.asm["amdgcn"])
        return max((widths.get(load, 0) for load in loads), default=0)
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[.\w:]* \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in loads] + [int(size, 16) for size in copies]
    return max(widths, default=0)


def occupancy(target: Target, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that can be resident, at most."""
    granule = target.register_granule
    per_thread = max(granule, -(-registers // granule) * granule)
    by_registers = target.registers_per_processor // (per_thread * target.warp_size) // num_warps
    by_shared = target.shared_per_processor // max(1, shared_bytes + target.shared_reserved)
    by_warps = target.warps_per_processor // num_warps
    return min(by_registers, by_shared, by_warps) * num_warps / target.warps_per_processor


def compile_launch(name: str, target_name: str, list_code: bool) -> list[dict[str, Any]]:
    """Compile the kernels of one call for one target; where that fails, there is nothing but an ``error``.

    Registers and spilled bytes are those of a thread; ``widest_load`` is what one thread loads at once from global
    memory, at most, and ``required_load`` what the launch table demands of the first kernel, at least. ``code`` are the
    blocks of the machine code; None where that is not asked for, not NVIDIA's, or nvdisasm is not there.
    """
    from benchmarks.launches import LAUNCHES, force_triton

    force_triton()
    target = TARGETS[target_name]
    launch = next(launch for launch in LAUNCHES if launch.name == name)
    kernels = _record(launch, target)
    results = [_report(*each, target, list_code) | {"launch": name, "target": target_name} for each in kernels]
    return [each | {"required_load": launch.widest_load if not place else 0} for place, each in enumerate(results)]


def _report(kernel: Any, values: dict[str, Any], programs: int, target: Target, list_code: bool) -> dict[str, Any]:
    """Compile one kernel and return what the compilers say about it."""
    found = {"kernel": kernel.fn.__name__, "programs": programs, "code": None}
    try:
        compiled = compile_kernel(kernel, values, target)
    except Exception as error:  # whatever the compiler raises is the result
        return found | {"error": f"{type(error).__name__}: {error}"[-400:]}
    registers, spill_bytes = _registers_and_spills(compiled, target)
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    found |= {"error": "", "num_warps": num_warps, "registers": registers, "spill_bytes": spill_bytes}
    found |= {"shared_bytes": shared, "occupancy": occupancy(target, num_warps, registers, shared)}
    if list_code and target.backend == "cuda" and (nvdisasm := nvidia_tool("nvdisasm")):
        found["code"] = blocks(disassemble(nvdisasm, compiled.asm["cubin"]))
    return found | {"widest_load": _widest_load(compiled, target)}


def jobs(names: list[str], *, rotate: bool, only_main: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield launch, target, and whether to list the code.

    To ``rotate``, the variants of a kernel have one target each, in turn, but for those that are meant to be compiled
    everywhere; the first one also has what no other has, so that each kernel is compiled for each target. Main launches
    have sm90, and only of these the code is listed.
    """
    from benchmarks.launches import EVERYWHERE, LAUNCHES, MAIN

    targets = names or list(TARGETS)
    variants: dict[str, list[str]] = {}
    for launch in LAUNCHES:
        if launch.name in MAIN or not only_main:
            variants.setdefault(re.split(r"\W", launch.name)[0], []).append(launch.name)
    for of_kernel in variants.values():
        chosen: dict[str, set[str]] = {}
        for number, launch_name in enumerate(of_kernel):
            in_turn = {targets[number % len(targets)]} | ({"sm90"} & {*targets} if launch_name in MAIN else set())
            chosen[launch_name] = {*targets} if not rotate or launch_name in EVERYWHERE else in_turn
        chosen[of_kernel[0]] |= {*targets}.difference(*chosen.values())
        for launch_name in of_kernel:
            for target in targets:
                if target in chosen[launch_name]:
                    yield launch_name, target, not rotate or (launch_name in MAIN and target == "sm90")


def main() -> None:
    """Compile launches in two processes and print the list."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: unset it")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="all of them by default")
    parser.add_argument("--rotate", action="store_true", help="most variants for one target each")
    parser.add_argument("--main", action="store_true", help="only the main launches")
    arguments = parser.parse_args()
    chosen = jobs(arguments.targets, rotate=arguments.rotate, only_main=arguments.main)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2) as pool:
            results = pool.map(compile_launch, *zip(*chosen, strict=True))
            print(json.dumps([each for of_one in results for each in of_one]))


if __name__ == "__main__":
    main()
