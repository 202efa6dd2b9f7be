"""What a GPU has to issue for a launch: instructions of the machine code by pipe, each block as often as it runs.

nvdisasm lists the instructions of a cubin with the source lines that they come from. What closes a loop bears the line
of the ``for`` or ``while``, and Triton's interpreter counts how often each line runs (``counted_lines``); so how often
a loop turns, and a branch is taken, are those of the launch's own data. A slow path of a division or a root (what
calls a function) counts as not taken, and of the versions that ptxas makes of a loop only one counts.

The time that follows is the least that issuing takes, at full clock on all multiprocessors. It knows nothing of
latencies, bank conflicts or a launch too small to fill a device: nothing here is a measured time.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[1] / "hf_lowmem_optim" / "ops" / "triton"
WARP = 32

#: File name in KERNELS and line.
Line = tuple[str, int]


@dataclass(frozen=True)
class Card:
    """A card: the target of its code, multiprocessors, and the peaks of its data sheet, dense."""

    target: str
    processors: int
    fp32: float  # FLOP/s
    tf32: float
    bf16: float
    bandwidth: float  # bytes/s

    @property
    def clock(self) -> float:
        """The clock of the float32 peak, in Hz."""
        return self.fp32 / (2 * self.processors * LANES[self.target]["fma"])


#: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM, H200 SXM and HGX B200 (per GPU). The multiprocessors of a B200 are
#: not in its data sheet; 148 is what its peaks give at 1.98 GHz.
CARDS = {
    "A100": Card("sm80", 108, 19.5e12, 156e12, 312e12, 2.039e12),
    "H100": Card("sm90", 132, 67e12, 494e12, 989e12, 3.35e12),
    "H200": Card("sm90", 132, 67e12, 494e12, 989e12, 4.8e12),
    "B200": Card("sm100", 148, 75e12, 1100e12, 2250e12, 7.7e12),
}

#: Lanes of a multiprocessor per clock: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions".
#: Of the FMA pipe's two halves only one multiplies integers; a shared-memory access of 64 or 128 bits a lane takes two
#: or four turns of the LSU. "all": four schedulers issue one instruction of a warp each.
LANES = {
    "sm80": {"all": 128, "fma": 64, "imad": 64, "alu": 64, "fp64": 32, "xu": 16, "lsu": 32},
    "sm90": {"all": 128, "fma": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16, "lsu": 32},
    "sm100": {"all": 128, "fma": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16, "lsu": 32},
}

#: By the pipes of Nsight Compute's Kernel Profiling Guide. What is in none of these is the ALU's: integers, logic,
#: comparisons, selection, packing. The tensor cores' time comes from counted products.
_PIPES = {
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2",
    "imad": "IMAD IDP",
    "fp64": "DADD DMUL DFMA DSETP DMNMX DMMA",
    "xu": "MUFU F2I I2F F2F FRND POPC FLO BREV REDUX CREDUX",
    "lsu": "LD LDG LDS LDL LDSM ST STG STS STL STSM LDGSTS SHFL MATCH ATOM ATOMS ATOMG RED REDG LDTM STTM",
    "tensor": "HMMA IMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA",
    "other": "BAR BRA BRX JMP EXIT BSSY BSYNC BREAK BMOV CALL RET WARPSYNC YIELD NANOSLEEP NOP DEPBAR LDGDEPBAR ERRBAR "
    "MEMBAR FENCE CCTL ELECT CS2R S2R S2UR LDC LDCU ULDC R2UR VOTE WARPGROUP WARPGROUPSET SYNCS ARRIVES ENDCOLLECTIVE "
    "ACQBULK PREEXIT",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}


def pipe_of(opcode: str) -> str:
    """Return the pipe of an instruction: U… of the uniform datapath counts as other."""
    stem = opcode.split(".")[0]
    return _PIPE_OF.get(stem, "other" if stem.startswith("U") else "alu")


@dataclass(frozen=True)
class Instruction:
    """One of a listing: its predicate, if any, and its source lines from the innermost call outwards."""

    opcode: str
    predicate: str
    operands: str
    label: str | None
    lines: tuple[Line, ...]

    @property
    def stem(self) -> str:
        """Return the opcode without its modifiers."""
        return self.opcode.split(".")[0]


def disassemble(nvdisasm: Path, cubin: bytes) -> str:
    """Return the listing of a cubin with source lines."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "-gi", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a listing, and the place of each label."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: tuple[Line, ...] = ()
    fresh, inside = True, False
    for text in map(str.strip, listing.splitlines()):
        if re.match(r"\.section\s", text):
            inside = ".text." in text
        elif not inside:
            continue
        elif match := re.match(r'//## File "(.*?)", line (\d+)', text):
            frame = (Path(match[1]).name, int(match[2]))
            lines = () if fresh else lines
            lines += (frame,) if Path(match[1]).parent.name == KERNELS.name else ()
            fresh = False
        elif match := re.match(r"(\.?[\w$.]+):$", text):
            labels[match[1]] = len(found)
        elif match := re.match(r"/\*[0-9a-f]+\*/\s+(?:@(!?\w+)\s+)?([\w.]+)(.*);", text):
            label = re.search(r"`\(([^)]+)\)", match[3])
            found.append(Instruction(match[2], match[1] or "", match[3], label[1] if label else None, lines))
            fresh = True
    return found, labels


def _edges(code: Sequence[Instruction], labels: Mapping[str, int]) -> tuple[list[int], dict[int, list[int]]]:
    """Return the places where blocks begin, and which blocks may follow each."""
    jumps = {place for place, each in enumerate(code) if each.stem in ("BRA", "EXIT", "RET", "JMP")}
    targets = {labels[each.label] for each in code if each.stem in ("BRA", "JMP") and each.label in labels}
    calls = {place for place, each in enumerate(code) if each.stem == "CALL"}
    begins = sorted({0, *targets, *(place + 1 for place in jumps | calls if place + 1 < len(code))})
    follow = {}
    for begin, end in zip(begins, [*begins[1:], len(code)], strict=True):
        last = code[end - 1]
        ends = end - 1 in jumps
        # @P0 BRA P1, target: any predicate may keep it from jumping
        certain = last.opcode != "BRA.DIV" and not last.predicate and not re.match(r"\s*!?U?P\w+,", last.operands)
        follow[begin] = [] if (ends and certain) or end == len(code) else [end]
        # BRA.DIV goes to what makes up for a warp whose threads are apart
        if ends and last.stem in ("BRA", "JMP") and last.opcode != "BRA.DIV" and last.label in labels:
            follow[begin].append(labels[last.label])
    return begins, follow


def _reached(start: int, follow: Mapping[int, Sequence[int]], stop: int = -1) -> set[int]:
    """Return the blocks that may run after one begins, without going past ``stop``."""
    seen, todo = {start}, [start]
    while todo:
        block = todo.pop()
        todo += [] if block == stop else [each for each in follow.get(block, ()) if each not in seen]
        seen.update(todo)
    return seen


def _other_versions(
    bodies: Mapping[int, set[int]],
    header: Mapping[int, tuple[Line, ...]],
    code: Sequence[Instruction],
    ends: Mapping[int, int],
) -> set[int]:
    """Return the heads of loops that are another version of one: unrolled, or for when an inner loop does not turn.

    One turn is the shortest of those that have most of the source lines.
    """
    length = {head: sum(ends[each] - each for each in body) for head, body in bodies.items()}
    covered = {
        head: {each.lines for block in body for each in code[block : ends[block]]} for head, body in bodies.items()
    }
    left_out = set()
    for lines in set(header.values()):
        alike = [head for head in bodies if header[head] == lines]
        most = max(len(covered[head]) for head in alike)
        full = [head for head in alike if 2 * len(covered[head]) > most]
        shortest = min(length[head] for head in full)
        left_out |= set(alike) - {head for head in full if length[head] <= 1.5 * shortest}
    return left_out


def blocks(listing: str) -> list[dict[str, Any]]:
    """Return the blocks of a kernel that may run: instructions by pipe, and what says how often they do.

    ``loops`` are the lines of the loops that a block is in; ``lines`` are the source lines of each of its instructions.
    """
    code, labels = parse(listing)
    assert code, f"no instructions in {listing[:200]!r}"
    begins, follow = _edges(code, labels)
    ends = dict(zip(begins, [*begins[1:], len(code)], strict=True))
    before = defaultdict(list)
    for block, others in follow.items():
        for other in others:
            before[other].append(block)
    live = _reached(0, follow)
    bodies: dict[int, set[int]] = defaultdict(set)  # of natural loops, by their heads
    header: dict[int, tuple[Line, ...]] = {}
    for block in live:
        for head in follow[block]:
            if head <= block:
                bodies[head] |= _reached(block, before, stop=head) & live
                header[head] = code[ends[block] - 1].lines
    left_out = _other_versions(bodies, header, code, ends)
    found = []
    for begin in sorted(live):
        part = code[begin : ends[begin]]
        around = [head for head, body in bodies.items() if begin in body]
        if left_out & set(around) or any(each.stem == "CALL" for each in part):
            continue
        pipes = Counter[str]()
        for each in part:
            wide = re.search(r"\.(64|128)\b", each.opcode) if each.stem in ("LDS", "STS") else None
            pipes[pipe_of(each.opcode)] += 1
            pipes["turns"] += int(wide[1]) // 32 - 1 if wide else 0
        loops = [header[head][0] for head in around]
        found.append({"pipes": dict(pipes), "loops": loops, "lines": sorted({each.lines for each in part})})
    return found


@contextmanager
def counted_lines() -> Iterator[tuple[Counter[Line], Counter[str]]]:
    """Count how often the lines of interpreted kernels run, and the multiply-adds of their products by precision.

    Of the programs of a launch only the first two are traced, because that takes ten times as long.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    lines, products = Counter[Line](), Counter[str]()
    real, place = InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *more: Any) -> Any:
        name = "bf16" if a.dtype.scalar.primitive_bitwidth == 16 else str(precision).rsplit(".", 1)[-1].lower()
        products[name] += a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return real(self, a, b, d, precision, *more)

    names: dict[Any, str] = {}  # of code objects: the file in KERNELS, or nothing

    def trace(frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in names:
            path = Path(code.co_filename)
            names[code] = path.name if path.parent == KERNELS else ""
        if not names[code]:
            return None
        if event == "line":
            lines[names[code], frame.f_lineno] += 1
        return trace

    def begin(self: Any, x: int, y: int, z: int) -> None:
        sys.settrace(trace if x < 2 and y == z == 0 else previous)
        place(self, x, y, z)

    previous = sys.gettrace()
    InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx = dot, begin
    try:
        yield lines, products
    finally:
        sys.settrace(previous)
        InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx = real, place


@functools.cache
def _source(file: str) -> tuple[dict[int, ast.For | ast.While], dict[int, list[tuple[ast.stmt, ast.stmt]]]]:
    """Return the loops of a file by their lines, and for each line the branches that it is in: test and first one."""
    loops: dict[int, ast.For | ast.While] = {}
    branches: dict[int, list[tuple[ast.stmt, ast.stmt]]] = defaultdict(list)
    for node in ast.walk(ast.parse((KERNELS / file).read_text())):
        if isinstance(node, (ast.For, ast.While)):
            loops[node.lineno] = node
        if isinstance(node, ast.If):
            for branch in filter(None, (node.body, node.orelse)):
                for line in range(branch[0].lineno, (branch[-1].end_lineno or 0) + 1):
                    branches[line].append((node, branch[0]))
    return loops, branches


@dataclass(frozen=True)
class Executions:
    """How often the lines of a launch ran."""

    lines: Mapping[Line, int]

    def _ran(self, file: str, statement: ast.stmt) -> int:
        """Return how often a statement was reached; a loop's first line runs once more for each turn."""
        if isinstance(statement, (ast.For, ast.While)):
            return self.lines.get((file, statement.lineno), 0) - self._ran(file, statement.body[0])
        # one of several lines may return to its first
        last = statement.lineno if isinstance(statement, ast.If) else statement.end_lineno or statement.lineno
        counts = [self.lines.get((file, line), 0) for line in range(statement.lineno, last + 1)]
        return min(filter(None, counts), default=0)

    def turns(self, header: Line) -> float:
        """Return how often a loop turns, each time that it is reached: once if it only waits for a barrier."""
        file, line = header
        loop = _source(file)[0].get(line)
        if loop is None:
            return 1.0
        return self._ran(file, loop.body[0]) / max(1, self._ran(file, loop))

    def share(self, lines: Sequence[Line]) -> float:
        """Return how often the branches are taken that an instruction is in."""
        share = 1.0
        for file, line in lines:
            for test, first in _source(file)[1][line]:
                share *= self._ran(file, first) / max(1, self._ran(file, test))
        return share

    def instructions(self, code: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the instructions of a warp that runs these blocks."""
        total: dict[str, float] = defaultdict(float)
        for block in code:
            times = max(map(self.share, block["lines"]))
            for header in block["loops"]:
                times *= self.turns(tuple(header))
            for pipe, count in block["pipes"].items():
                total[pipe] += times * count
        return total


def issue_time(instructions: Mapping[str, float], products: Mapping[str, float], card: Card) -> tuple[float, str]:
    """Return the seconds that a card takes to issue instructions of warps, and the pipe that takes them.

    Args:
        instructions: By pipe, of all warps together.
        products: Multiply-adds by precision.
        card: What issues them.
    """
    of = defaultdict(float, instructions)
    used = {pipe: of[pipe] for pipe in ("imad", "alu", "fp64", "xu")}
    used["all"] = sum(count for pipe, count in of.items() if pipe != "turns")
    used |= {"fma": of["fma"] + of["imad"], "lsu": of["lsu"] + of["turns"]}
    seconds = {
        pipe: count * WARP / (LANES[card.target][pipe] * card.processors * card.clock) for pipe, count in used.items()
    }
    tf32 = products.get("tf32", 0) + 3 * products.get("tf32x3", 0)
    seconds["tensor"] = 2 * (tf32 / card.tf32 + products.get("bf16", 0) / card.bf16)
    worst = max(seconds, key=seconds.__getitem__)
    return seconds[worst], worst
