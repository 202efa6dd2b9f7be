"""The threads of several CTAs, side by side: registers are arrays with one entry per thread, a lane."""

from __future__ import annotations

import numpy as np

from .memory import Memory
from .parse import ALL, TYPES, WARP, WARP_GROUP, WIDTHS, Instruction, Lanes, Program

#: Added to where a lane goes on while it waits at a barrier; and where a lane is that has returned.
_WAITING, _DONE = 1 << 20, 1 << 30


class Fault(AssertionError):
    """What a kernel must not do: a GPU may compute anything."""


class Machine:
    """Some CTAs of a launch."""

    def __init__(self, program: Program, grid: tuple[int, ...], ctas: range, parameters: list[int]) -> None:
        self.program, self.parameters = program, parameters
        threads, lanes = program.num_threads, len(ctas) * program.num_threads
        self.ids = np.arange(lanes)
        thread, self.warps = self.ids % threads, -(-threads // WARP)
        self.cta = (self.ids // threads + ctas.start).astype(np.int32)
        self.warp = (self.cta * self.warps + thread // WARP).astype(np.int32)
        self.bit = np.uint32(1) << (thread // WARP).astype(np.uint32)
        self.special = {"%tid.x": thread}
        places = self.cta % grid[0], self.cta // grid[0] % grid[1], self.cta // grid[0] // grid[1]
        for axis, size, place in zip("xyz", grid, places, strict=True):
            self.special |= {f"%ctaid.{axis}": place, f"%nctaid.{axis}": np.full(lanes, size)}
        widths = [WIDTHS[name[1:].rstrip("0123456789")] for name in program.registers]
        garbage = 0xA5A5A5A5A5A5A5A5
        self.registers = [np.full(lanes, garbage % (1 << width), TYPES[width]) for width in widths]
        self.pc, self.now = np.zeros(lanes, np.int32), 0
        #: Asynchronous copies: how many groups each lane has committed, and what has not happened yet.
        self.committed = np.zeros(lanes, np.int64)
        self.copies: list[tuple[int, int, np.ndarray]] = []

    def run(self, memories: dict[str, Memory], epoch: int, order: str) -> int:
        """Run all lanes to their end.

        Returns:
            The first epoch after it.
        """
        self.memories, self.epoch, turns = memories, epoch, self._turns(order)
        while (self.pc < _DONE).any():
            for lanes in turns:
                self._run_to_barrier(lanes)
            self._pass_barrier()
        return self.epoch

    def _turns(self, order: str) -> list[np.ndarray]:
        """Return the lanes that run side by side, one group after the other."""
        if order == "lock step":
            return [self.ids]
        together = any(each.opcode[0] == "wgmma" for each in self.program.instructions)
        group = self.ids % self.program.num_threads // (WARP_GROUP if together else WARP)
        numbers = range(group.max() + 1)
        return [self.ids[group == each] for each in (numbers if order == "ascending" else reversed(numbers))]

    def _run_to_barrier(self, lanes: np.ndarray) -> None:
        """Run those who are furthest behind until all wait or have returned: parted lanes meet where they may."""
        while (block := (at := self.pc[lanes]).min()) < _WAITING:
            behind = at == block
            chosen = lanes if behind.all() else lanes[behind]
            self._run_block(block, ALL if chosen.size == self.ids.size else chosen)

    def _run_block(self, block: int, lanes: Lanes) -> None:
        self.pc[lanes] = block + 1
        for instruction in self.program.blocks[block]:
            self.now, chosen = instruction.number, lanes
            if instruction.guard is not None:
                register, wanted = instruction.guard
                active = self.registers[register][lanes] == wanted
                if not active.any():
                    continue
                if not active.all():
                    chosen = self.ids[lanes][active]
            instruction.step(self, chosen)

    def wait(self, lanes: Lanes) -> None:
        """Hold the lanes at a barrier."""
        self.pc[lanes] += _WAITING

    def leave(self, lanes: Lanes) -> None:
        """End the lanes."""
        self.pc[lanes] = _DONE

    def _pass_barrier(self) -> None:
        at = self.pc.reshape(-1, self.program.num_threads)
        missing = (at.min(1) != at.max(1)) & (at.min(1) < _DONE)
        if missing.any():
            cta = int(missing.argmax())
            where = {int(each) for each in at[cta]}
            names = [str(self.program.blocks[each - _WAITING - 1][-1]) if each < _DONE else "the end" for each in where]
            raise Fault(f"{self.program.name}: threads of CTA {self.cta[0] + cta} wait at {' and at '.join(names)}")
        self.pc[self.pc < _DONE] -= _WAITING
        self.epoch += 1

    def check(self, good: np.ndarray, lanes: np.ndarray, what: str, other: np.ndarray | None = None) -> None:
        """Raise what the first bad entry's lane does; ``other`` are instructions with which it conflicts."""
        if good.all():
            return
        first = int(good.argmin())
        lane = lanes[first * lanes.size // good.size]
        thread = lane % self.program.num_threads
        text = f"{self.program.name}: thread {thread} of CTA {self.cta[lane]} {what}: {self.instruction(self.now)}"
        if other is not None:
            text += f" against {self.instruction(int(other[first]))}"
        raise Fault(text)

    def instruction(self, number: int) -> Instruction | str:
        """Return the instruction of that number in the whole program."""
        return self.program.instructions[number] if number >= 0 else "several instructions"

    def whole(self, lanes: Lanes, size: int = WARP) -> np.ndarray:
        """Return the lanes as warps (groups of warps), which must be complete."""
        ids = self.ids[lanes]
        first = ids[::size] // size * size
        complete = ids.size % size == 0 and np.array_equal(ids.reshape(-1, size), first[:, None] + np.arange(size))
        self.check(np.array([complete]), ids[:1], "is in a divided warp")
        return ids.reshape(-1, size)
