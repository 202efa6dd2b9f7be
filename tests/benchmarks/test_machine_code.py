"""How often the blocks of a listing run, by the lines that the interpreter has counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import CARDS, Executions, blocks, issue_time

SOURCE = """def kernel(n, x):
    for i in range(n):
        x += i
        if x > 9:
            x = 1 / x
    return x
"""
#: Lines of the source and instructions, or a label. The second loop is the first one unrolled.
CODE: list[tuple[int, str] | str] = [
    (2, "S2R R0, SR_TID.X"),
    ".L_1",
    (3, "IADD3 R1, R1, R2, RZ"),
    (3, "@P0 LDS.128 R4, [R1]"),
    (4, "@!P1 BRA `(.L_2)"),
    (5, "MUFU.RCP R1, R1"),
    (5, "@P2 BRA `(.L_2)"),
    (5, "CALL.REL.NOINC `(slow)"),
    ".L_2",
    (2, "BRA.DIV ~URZ, `(.L_3)"),
    (2, "@P3 BRA `(.L_1)"),
    ".L_4",
    *[(line, "FADD R1, R1, R2") for line in (3, 4, 5) * 5],
    (2, "@P3 BRA P4, `(.L_4)"),
    (6, "EXIT"),
    ".L_3",
    (2, "DADD R1, R1, R2"),
    (2, "BRA `(.L_1)"),
    "slow",
    (5, "FMUL R1, R1, R2"),
    (5, "RET.REL.NODEC R2 `(kernel)"),
]


def test_blocks_run_as_often_as_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of ten turns with a branch taken in half of them; no slow path, no code for warps apart, one version."""
    kernels = tmp_path / "triton"
    kernels.mkdir()
    (kernels / "toy.py").write_text(SOURCE)
    monkeypatch.setattr(machine_code, "KERNELS", kernels)
    text = ['\t.section\t.text.kernel,"ax",@progbits', '\t.sectionflags\t@"SHF_BARRIERS=1"']
    for each in CODE:
        if isinstance(each, str):
            text.append(f"{each}:")
        else:
            text += [f'//## File "{kernels}/toy.py", line {each[0]}', f"/*0010*/  {each[1]} ;"]
    ran = Executions({("toy.py", 2): 11, ("toy.py", 3): 10, ("toy.py", 4): 10, ("toy.py", 5): 5, ("toy.py", 6): 1})
    found = {pipe: count for pipe, count in ran.instructions(blocks("\n".join(text))).items() if count}
    assert found == {"alu": 10, "lsu": 10, "turns": 30, "xu": 5, "other": 1 + 10 + 5 + 20 + 1}


def test_the_fullest_pipe_takes_the_time() -> None:
    """Sixteen lanes of 132 multiprocessors, at the clock of the float32 peak; three products for one of tf32x3."""
    seconds, pipe = issue_time({"xu": 132e6, "alu": 2e8}, {}, CARDS["H100"])
    assert pipe == "xu" and seconds == pytest.approx(132e6 * 32 / (16 * 132 * 1.983e9), rel=1e-3)
    assert issue_time({}, {"tf32x3": 494e12}, CARDS["H100"]) == (6.0, "tensor")
