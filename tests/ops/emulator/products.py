"""Tensor cores: matrices spread over the lanes of a warp, or in shared memory under a descriptor.

Products are exact, summed in float64 and rounded once to float32; TF32 operands are truncated.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import WARP, WARP_GROUP, Lanes, Step

if TYPE_CHECKING:
    from .instructions import Decoder, Source
    from .machine import Machine

_LANE = np.arange(WARP)
_ROW, _COLUMN = _LANE // 4, _LANE % 4


def _values(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return the numbers in registers of 32 bits, as the last dimension."""
    if kind == "tf32":
        return (bits & 0xFFFFE000).view(np.float32)[..., None]
    halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    return halves.view(np.float16) if kind == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)


def _registers(m: Machine, lanes: Lanes, sources: list[Source]) -> np.ndarray:
    """Return [warps, registers, lanes]."""
    warps = m.whole(lanes).shape
    return np.stack([np.broadcast_to(read(m, lanes), warps[0] * WARP).reshape(warps) for read in sources], 1)


def _left(m: Machine, lanes: Lanes, sources: list[Source], kind: str) -> np.ndarray:
    """Return the first operand, [warps, 16, depth], from four registers."""
    values = _values(_registers(m, lanes, sources), kind)
    each, register = np.arange(values.shape[-1]), np.arange(4)[:, None, None]
    matrix = np.empty((len(values), 16, 8 * each.size))
    column = each.size * _COLUMN[:, None] + each + 4 * each.size * (register // 2)
    matrix[:, _ROW[:, None] + 8 * (register % 2), column] = values
    return matrix


def _right(m: Machine, lanes: Lanes, sources: list[Source], kind: str) -> np.ndarray:
    """Return the second operand, [warps, depth, 8], from two registers."""
    values = _values(_registers(m, lanes, sources), kind)
    each, register = np.arange(values.shape[-1]), np.arange(2)[:, None, None]
    matrix = np.empty((len(values), 8 * each.size, 8))
    matrix[:, each.size * _COLUMN[:, None] + each + 4 * each.size * register, _ROW[:, None]] = values
    return matrix


def _place(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of a sum's registers, [registers, lanes]."""
    register = np.arange(registers)[:, None]
    return _ROW + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * _COLUMN + register % 2


def _multiply_add(left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the sums' registers, [warps, registers, lanes], with the product added."""
    rows, columns = _place(sums.shape[1])
    return ((left @ right)[:, rows, columns] + sums).astype(np.float32)


def multiply_in_registers(i: Decoder) -> Step:
    """Decode mma.sync."""
    kind = i.opcode[-2]
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    if i.opcode[1:] != ["sync", "aligned", shape, "row", "col", "f32", kind, kind, "f32"]:
        raise NotImplementedError("a product of another shape, layout or type")
    puts, a, b, c = i.targets(0, "f32"), i.sources(1, "b32"), i.sources(2, "b32"), i.sources(3, "f32")

    def run(m: Machine, lanes: Lanes) -> None:
        left, right = _left(m, lanes, a, kind), _right(m, lanes, b, kind)
        sums = _multiply_add(left, right, _registers(m, lanes, c))
        for register, put in enumerate(puts):
            put(m, lanes, sums[:, register].reshape(-1))

    return run


def multiply_by_warp_groups(i: Decoder) -> Step:
    """Decode wgmma, which happens when it is issued."""
    if i.opcode[1] != "mma_async":
        return lambda m, lanes: None
    kind = i.opcode[-1]
    found = re.fullmatch(r"m64n(\d+)k(\d+)", i.opcode[4])
    assert found, i.instruction.text
    columns, depth = int(found[1]), int(found[2])
    if i.opcode[5] != "f32" or kind not in ("tf32", "bf16", "f16") or i.operands[4:6] != ["1", "1"]:
        raise NotImplementedError("a product of another type, or of negated operands")
    puts, sums = i.targets(0, "f32"), i.sources(0, "f32")
    in_registers = i.operands[1].startswith("{")
    a = i.sources(1, "b32") if in_registers else [i.source(1, "u64")]
    b, keep = i.source(2, "u64"), i.source(3, "pred")
    transposed = [False] * (2 - in_registers) if kind == "tf32" else [each == "1" for each in i.operands[6:]]

    def run(m: Machine, lanes: Lanes) -> None:
        groups = m.whole(lanes, WARP_GROUP)[:, 0]
        first = lambda read: np.broadcast_to(read(m, lanes), groups.size * WARP_GROUP)[::WARP_GROUP]  # noqa: E731 (used below)
        right = _described(m, groups, first(b), (columns, depth), transposed[-1], kind)
        if in_registers:
            left = _left(m, lanes, a, kind)
        else:
            left = _described(m, groups, first(a[0]), (64, depth), transposed[0], kind).reshape(-1, 16, depth)
        before = np.where(first(keep).repeat(4)[:, None, None], _registers(m, lanes, sums), np.float32(0))
        result = _multiply_add(left, right.transpose(0, 2, 1).repeat(4, 0), before)
        for register, put in enumerate(puts):
            put(m, lanes, result[:, register].reshape(-1))

    return run


def _described(
    m: Machine, lanes: np.ndarray, descriptors: np.ndarray, shape: tuple[int, int], transposed: bool, kind: str
) -> np.ndarray:
    """Return the matrices under descriptors, [descriptors, rows, depth]: tiles of 8 by a swizzle's width."""
    fields = descriptors.astype(np.uint64)[:, None, None]
    start, leading, stride = ((fields >> at & 0x3FFF).astype(np.int64) << 4 for at in (0, 16, 32))
    modes = fields.reshape(-1) >> 62
    m.check(modes == modes[0], lanes, "uses another swizzle than the rest")
    mode = int(modes[0])
    size = 4 if kind == "tf32" else 2
    width = 256 >> mode if mode else 16
    rows, depth = np.arange(shape[0])[:, None], np.arange(shape[1])
    along, across = (rows * size, depth) if transposed else (depth * size, rows)
    if mode == 0 and transposed:
        raise NotImplementedError("a transposed matrix without a swizzle")
    addresses = start + across // 8 * stride + across % 8 * width + along // width * leading + along % width
    swizzled = (16 >> mode) - 1 if mode else 0
    addresses ^= ((addresses >> 7) & swizzled) << 4
    lanes = np.broadcast_to(lanes[:, None, None], addresses.shape).reshape(-1)
    (bits,) = m.memories["shared"].load(m, lanes, addresses.reshape(-1), size, 1)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64).reshape(addresses.shape)
    wide = bits & 0xFFFFE000 if kind == "tf32" else bits.astype(np.uint32) << 16
    return wide.view(np.float32).astype(np.float64).reshape(addresses.shape)


def access_matrices(i: Decoder) -> Step:
    """Decode ldmatrix and stmatrix: a lane addresses a row of 16 bytes; two of its neighbours are in a register."""
    load = i.opcode[0] == "ldmatrix"
    count, transposed = int(i.opcode[4][1]), "trans" in i.opcode
    if i.opcode[3] != "m8n8" or i.opcode[-2:] != ["shared", "b16"]:
        raise NotImplementedError("a tile other than m8n8 of 16 bits")
    address = i.address(1 if load else 0)
    registers: list[Any] = i.targets(0, "b32") if load else i.sources(1, "b32")
    assert len(registers) == count, i.instruction.text

    def turned(matrices: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(matrices.swapaxes(-1, -2)) if transposed else matrices

    def run(m: Machine, lanes: Lanes) -> None:
        warps = m.whole(lanes)
        rows = warps[:, : 8 * count].reshape(-1)
        addresses = np.broadcast_to(address(m, lanes), warps.size).reshape(warps.shape)[:, : 8 * count].reshape(-1)
        shared = m.memories["shared"]
        if load:
            halves = np.stack(shared.load(m, rows, addresses, 8, 2), 1).view(np.uint16)
            words = turned(halves.reshape(-1, count, 8, 8)).view(np.uint32).reshape(-1, count, WARP)
            for place, put in enumerate(registers):
                put(m, lanes, words[:, place].reshape(-1))
        else:
            halves = _registers(m, lanes, registers).reshape(-1, count, 8, 4).view(np.uint16)
            doubles = turned(halves).view(np.uint64).reshape(-1, 2)
            shared.store(m, rows, addresses, [doubles[:, 0], doubles[:, 1]])

    return run
