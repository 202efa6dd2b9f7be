"""PTX, as Triton emits it, split into blocks of instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Which lanes an instruction runs on: all of them, or these.
Lanes = slice | np.ndarray
ALL = slice(None)
#: What an instruction does, given the machine and the lanes.
Step = Callable[[Any, Lanes], None]
WARP, WARP_GROUP = 32, 128

#: By a register's prefix.
WIDTHS = {"p": 1, "rs": 16, "r": 32, "rd": 64}
TYPES = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(eq=False)
class Instruction:
    """One instruction, and where it comes from: its line of PTX and what ``.loc`` says of the source."""

    number: int
    text: str
    line: int
    where: str
    guard: tuple[int, bool] | None  # a predicate's register, and the value with which a lane takes part
    opcode: list[str]
    operands: list[str]
    step: Step | None = None

    def __str__(self) -> str:
        return f"PTX line {self.line} `{self.text}` ({self.where})"


@dataclass
class Program:
    """A kernel: its blocks end where lanes may part or wait."""

    name: str = ""
    num_threads: int = 0
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # numbers, in the order in which the names appear
    instructions: list[Instruction] = field(default_factory=list)

    def register(self, name: str) -> tuple[int, int]:
        """Return a register's number and its bits."""
        prefix = re.fullmatch(r"%(p|rs|rd|r)\d+", name)
        if prefix is None:
            raise NotImplementedError(f"register {name}")
        return self.registers.setdefault(name, len(self.registers)), WIDTHS[prefix[1]]


def split(operands: str) -> list[str]:
    """Split at commas outside braces and brackets."""
    return [each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands) if each.strip()]


def parse(ptx: str) -> Program:
    """Read the one kernel of a module."""
    program = Program()
    lines = ptx.split("\n")
    start = next(number for number, line in enumerate(lines) if ".visible .entry" in line)
    program.name = lines[start].split()[-1].rstrip("(")
    where = "?"
    for number, line in enumerate(lines[start + 1 :], start + 2):
        code, _, comment = line.partition("//")
        code = code.strip()
        if line == "}":
            return program
        if code.startswith(".loc"):
            where = comment.strip()
        elif code.startswith(".reqntid"):
            program.num_threads = int(code.split()[1])
        elif code.endswith(":"):
            if program.blocks[-1]:
                program.blocks.append([])
            program.labels[code[:-1]] = len(program.blocks) - 1
        elif program.num_threads and code != "{" and not code.startswith("."):
            for text in filter(None, map(str.strip, code.split(";"))):
                _add(program, text, number, where)
    raise ValueError(f"{program.name} has no end")


def _add(program: Program, text: str, line: int, where: str) -> None:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", text)
    assert found, text
    guard = (program.register(found[2])[0], not found[1]) if found[2] else None
    opcode, number = re.split(r"[.:]+", found[3]), len(program.instructions)
    instruction = Instruction(number, text, line, where, guard, opcode, split(found[4]))
    program.instructions.append(instruction)
    program.blocks[-1].append(instruction)
    if opcode[0] in ("bra", "ret") or opcode[:2] == ["bar", "sync"]:
        program.blocks.append([])
