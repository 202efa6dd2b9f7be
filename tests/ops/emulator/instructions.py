"""What each instruction does, decoded once per program into a function on all lanes.

The semantics are those of NVIDIA's "Parallel Thread Execution ISA"; an instruction, a type or a modifier that is
not here raises NotImplementedError with its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ops.interpreter.fma import fused

from . import products
from .machine import ALL, WARP, Lanes, Step
from .parse import TYPES, Instruction, Program, split

if TYPE_CHECKING:
    from .machine import Machine

Function = Callable[..., Any]
#: Reads an operand: one value per lane, or one for all.
Source = Callable[["Machine", Lanes], Any]
Target = Callable[["Machine", Lanes, Any], None]

_WIDTHS = {"pred": 1, "bf16": 16, "bf16x2": 32, "f16x2": 32, "s16x2": 32, "tf32": 32}
_CANONICAL = {np.dtype(np.float32): np.uint32(0x7FFFFFFF), np.dtype(np.float64): np.uint64(0x7FFFFFFFFFFFFFFF)}


def width_of(kind: str) -> int:
    """Return the bits of a type."""
    return _WIDTHS.get(kind) or int(kind[1:])


def dtype_of(kind: str) -> Any:
    """Return how numpy computes with a type; as bits where it has no such type."""
    if kind[0] == "s" and kind != "s16x2":
        return np.dtype(f"i{width_of(kind) // 8}")
    return np.dtype(f"f{width_of(kind) // 8}") if kind in ("f16", "f32", "f64") else np.dtype(TYPES[width_of(kind)])


class Decoder:
    """An instruction to be decoded, its operands by their places."""

    def __init__(self, program: Program, instruction: Instruction) -> None:
        self.program, self.instruction = program, instruction
        self.opcode, self.operands = instruction.opcode, instruction.operands
        self.kind = self.opcode[-1]

    def source(self, operand: int | str, kind: str) -> Source:
        """Return a function that reads an operand."""
        text = operand if isinstance(operand, str) else self.operands[operand]
        dtype = dtype_of(kind)
        if text == "global_smem":
            text = "0"
        if text[0] != "%":
            number = int(text[2:] if text[:2] in ("0f", "0d") else text.rstrip("U"), 16 if text[0] == "0" else 10)
            bits = TYPES[width_of(kind)](bool(number) if kind == "pred" else number % (1 << width_of(kind)))
            constant = bits.view(dtype)
            return lambda m, lanes: constant
        if not text[-1].isdigit():
            return lambda m, lanes: m.special[text][lanes].astype(dtype)
        number, width = self.program.register(text)
        if width == width_of(kind):
            return lambda m, lanes: m.registers[number][lanes].view(dtype)
        if width < width_of(kind):
            raise NotImplementedError(f"{kind} of {text}")
        bits = TYPES[width_of(kind)]
        return lambda m, lanes: m.registers[number][lanes].astype(bits).view(dtype)

    def sources(self, operand: int, kind: str) -> list[Source]:
        """Return functions that read the parts of a vector."""
        return [self.source(each, kind) for each in split(self.operands[operand].strip("{} "))]

    def target(self, operand: int | str, kind: str) -> Target:
        """Return a function that writes an operand, extended where the register is wider."""
        text = operand if isinstance(operand, str) else self.operands[operand]
        if text == "_":
            return lambda m, lanes, value: None
        number, width = self.program.register(text)
        bits, dtype = TYPES[width], dtype_of(kind)
        canonical = _CANONICAL.get(dtype)
        if width < width_of(kind):
            raise NotImplementedError(f"{kind} into {text}")

        def put(m: Machine, lanes: Lanes, value: Any) -> None:
            m.registers[number][lanes] = value.view(bits)
            if canonical is not None and (nan := np.isnan(value)).any():
                register = m.registers[number]
                register[lanes] = np.where(nan, canonical, register[lanes])

        def extend(m: Machine, lanes: Lanes, value: Any) -> None:
            m.registers[number][lanes] = value.astype(f"{dtype.kind}{width // 8}").view(bits)

        return put if width == width_of(kind) else extend

    def targets(self, operand: int, kind: str) -> list[Target]:
        """Return functions that write the parts of a vector."""
        return [self.target(each, kind) for each in split(self.operands[operand].strip("{} "))]

    def address(self, operand: int) -> Source:
        """Return a function that reads an address, one per lane."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", self.operands[operand])
        assert found, self.instruction.text
        kind = "s64" if found[1].startswith("%rd") else "u32"
        base, offset = self.source(found[1], kind), int(found[2] or "0", 0)
        return lambda m, lanes: np.broadcast_to(base(m, lanes).astype(np.int64) + offset, m.ids[lanes].shape)

    def apply(self, function: Function, *kinds: str, result: str = "") -> Step:
        """Return a function of the operands after the first, which it writes; all are of the instruction's type."""
        put = self.target(0, result or self.kind)
        sources = [self.source(place, kind) for place, kind in enumerate(kinds or [self.kind] * len(self.operands[1:]), 1)]
        return lambda m, lanes: put(m, lanes, function(*[read(m, lanes) for read in sources]))


# functions of values -------------------------------------------------------------------------------------------------


def fused64(x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z with one rounding: an exact sum of three numbers, the smaller two rounded to odd."""
    x, y, z = np.broadcast_arrays(x, y, z)
    product, total = x * y, x * y + z
    if (product == 0).all() and ((x == 0) | (y == 0)).all():
        return total
    sizes = [np.abs(np.where(each == 0, 1, each)) for each in (x, y, z)]
    plain = np.all([(size > 2.0**-300) & (size < 2.0**300) for size in sizes], axis=0)
    error = _product_error(np.where(plain, x, 0), np.where(plain, y, 0), np.where(plain, product, 0))
    low, lowest = _two_sum(z, error)
    high, middle = _two_sum(product, low)
    rest, lost = _two_sum(middle, lowest)
    bits = np.ascontiguousarray(rest).view(np.int64)
    odd = (lost != 0) & ((bits & 1) == 0)
    rest = np.where(odd, (bits + np.where((lost > 0) == (rest > 0), 1, -1)).view(np.float64), rest)
    exact = np.where((x == 0) | (y == 0), total, high + rest)
    for lane in np.flatnonzero(~plain & np.isfinite(x) & np.isfinite(y) & np.isfinite(z)):
        exact[lane] = _fused_fraction(float(x[lane]), float(y[lane]), float(z[lane]))
    return np.where(plain | (np.isfinite(x) & np.isfinite(y) & np.isfinite(z)), exact, total)


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _product_error(x: Any, y: Any, product: Any) -> Any:
    (a, b), (c, d) = ((each * 134217729.0 - (each * 134217729.0 - each), each) for each in (x, y))
    b, d = b - a, d - c
    return ((a * c - product) + a * d + b * c) + b * d


def _fused_fraction(x: float, y: float, z: float) -> float:
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return x * y + z if 0 in (x, y) else 0.0
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def fused32(x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z with one rounding; that of the sum in float64 matters only if it is halfway, or subnormal."""
    total = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if halfway.any() or ((np.abs(total) < 2.0**-126) & (total != 0)).any():
        return fused(np.asarray(x), np.asarray(y), np.asarray(z))
    return total.astype(np.float32)


def flushed(x: Any) -> Any:
    """Return zero for a subnormal."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def lesser(x: Any, y: Any) -> Any:
    """Return the minimum; the number where the other is NaN, and −0 of two zeros."""
    bits = TYPES[8 * x.itemsize]
    return np.where(x == y, (x.view(bits) | y.view(bits)).view(x.dtype), np.fmin(x, y))


def greater(x: Any, y: Any) -> Any:
    """Return the maximum; the number where the other is NaN, and +0 of two zeros."""
    bits = TYPES[8 * x.itemsize]
    return np.where(x == y, (x.view(bits) & y.view(bits)).view(x.dtype), np.fmax(x, y))


def to_bf16(x: Any) -> Any:
    """Round float32 to nearest even; the bits."""
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Any) -> Any:
    """Widen to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: Any) -> Any:
    """Round to nearest even; the bits."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_tf32(x: Any) -> Any:
    """Round float32 to 10 bits of mantissa, halves away from zero; the bits."""
    bits = x.view(np.uint32)
    finite = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), np.where(np.isinf(x), bits, finite))


def to_integer(kind: str, rounded: Function) -> Function:
    """Return a function that converts a float: out of range to the nearest, NaN to zero."""
    limits = np.iinfo(dtype_of(kind))
    if limits.bits > 32:
        raise NotImplementedError(f"a float to {kind}")

    def convert(x: Any) -> Any:
        clipped = np.clip(rounded(x.astype(np.float64)), limits.min, limits.max)
        return np.where(np.isnan(x), 0, clipped).astype(limits.dtype)

    return convert


def permuted(a: Any, b: Any, selector: Any) -> Any:
    """Return four bytes picked from eight, or their signs."""
    both, result = (b.astype(np.uint64) << np.uint64(32)) | a, np.uint32(0)
    for place in range(4):
        pick = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte >= 128, np.uint32(0xFF), np.uint32(0))
        result = result | (np.where(pick >= 8, sign, byte) << np.uint32(8 * place))
    return result


def extracted(a: Any, start: Any, length: Any) -> Any:
    """Return a field of bits, of the type of ``a``: extended by its sign, the last bit that is there."""
    start, length = (start & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    width, wide = 8 * a.itemsize, a.astype(np.int64)
    if width > 32:
        raise NotImplementedError("bfe of 64 bits")
    field = (wide & 0xFFFFFFFF) >> np.minimum(start, 63) & ((1 << np.minimum(length, 32)) - 1)
    if a.dtype.kind == "i":
        last = np.minimum(start + length - 1, 31)
        sign = ((wide >> np.maximum(last, 0)) & 1) * (length > 0)
        filled = np.maximum(np.minimum(length, np.maximum(32 - start, 0)), 0)
        field = field | -(sign << filled)
    return field.astype(a.dtype)


def quotient(x: Any, y: Any) -> Any:
    """Divide integers of 32 bits toward zero."""
    x, y = x.astype(np.int64), y.astype(np.int64)
    return (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(np.int64)


# instructions --------------------------------------------------------------------------------------------------------

_DECODERS: dict[str, Callable[[Decoder], Step]] = {}
_MODIFIERS = {"sync", "aligned", "rn", "lo", "uni"}


def opcode(*names: str) -> Callable[[Callable[[Decoder], Step]], Callable[[Decoder], Step]]:
    """Register what decodes these instructions."""

    def register(decode: Callable[[Decoder], Step]) -> Callable[[Decoder], Step]:
        _DECODERS.update(dict.fromkeys(names, decode))
        return decode

    return register


def decode(program: Program) -> list[list[tuple[int, Step]]]:
    """Return the steps of each block, with the instruction's number."""
    numbers = {instruction: number for number, instruction in enumerate(program.instructions)}
    return [[(numbers[each], _decode(program, each)) for each in block] for block in program.blocks]


def _decode(program: Program, instruction: Instruction) -> Step:
    try:
        return _DECODERS[instruction.opcode[0]](Decoder(program, instruction))
    except (NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise NotImplementedError(f"{instruction}: {error!r}") from error


def only(i: Decoder, *allowed: str) -> None:
    """Raise for a modifier that is not meant."""
    if unknown := set(i.opcode[1:-1]) - set(allowed):
        raise NotImplementedError(f"modifiers {unknown}")


@opcode("add", "sub", "mul", "div", "rem", "min", "max", "fma", "sqrt", "neg", "abs")
def _arithmetic(i: Decoder) -> Step:
    name, kind = i.opcode[0], i.kind
    if kind in ("f32", "f64"):
        only(i, "rn", "full", "approx", "ftz", "NaN")
        functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt}
        functions |= {"min": lesser, "max": greater, "fma": fused32 if kind == "f32" else fused64}
        functions |= {"neg": np.negative, "abs": np.abs}
        function = functions[name]
        if "NaN" in i.opcode:
            nan = lambda x, y: np.where(np.isnan(x) | np.isnan(y), x.dtype.type(np.nan), function(x, y))  # noqa: E731
            return i.apply(nan)
        if "ftz" in i.opcode:
            return i.apply(lambda *x: flushed(function(*map(flushed, x))))
        return i.apply(function)
    if name == "abs" and kind in ("bf16x2", "f16x2"):
        return i.apply(lambda x: x & np.uint32(0x7FFF7FFF))
    if name == "add" and kind == "s16x2":
        low, high = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
        return i.apply(lambda x, y: ((x + y) & low) | (((x & high) + (y & high)) & high))
    if name == "mul" and "wide" in i.opcode:
        wide = f"{kind[0]}{2 * width_of(kind)}"
        return i.apply(lambda x, y: x.astype(dtype_of(wide)) * y.astype(dtype_of(wide)), result=wide)
    only(i, "lo")
    if name in ("div", "rem"):
        if width_of(kind) > 32:
            raise NotImplementedError("division of 64 bits")
        left = lambda x, y: quotient(x, y) if name == "div" else x.astype(np.int64) - quotient(x, y) * y  # noqa: E731
        return i.apply(lambda x, y: left(x, y).astype(dtype_of(kind)))
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
    return i.apply((functions | {"neg": np.negative, "abs": np.abs})[name])


@opcode("mad")
def _multiply_add(i: Decoder) -> Step:
    only(i, "lo", "wide")
    wide = f"{i.kind[0]}{2 * width_of(i.kind)}" if "wide" in i.opcode else i.kind
    dtype = dtype_of(wide)
    return i.apply(lambda x, y, z: x.astype(dtype) * y.astype(dtype) + z, i.kind, i.kind, wide, result=wide)


@opcode("and", "or", "xor", "not", "popc")
def _logic(i: Decoder) -> Step:
    only(i)
    if i.opcode[0] == "popc":
        return i.apply(lambda x: np.bitwise_count(x).astype(np.uint32), i.kind, result="u32")
    return i.apply({"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[i.opcode[0]])


@opcode("shl", "shr")
def _shift(i: Decoder) -> Step:
    only(i)
    function = np.left_shift if i.opcode[0] == "shl" else np.right_shift  # numpy's shifts by too much are PTX's, too
    return i.apply(lambda x, by: function(x, np.minimum(by, 64).astype(x.dtype)), i.kind, "u32")


@opcode("prmt", "bfe")
def _pick(i: Decoder) -> Step:
    only(i)
    return i.apply(permuted if i.opcode[0] == "prmt" else extracted, i.kind, "u32", "u32")


@opcode("setp")
def _compare(i: Decoder) -> Step:
    name, kind = i.opcode[1], i.kind
    floats = kind[0] == "f"
    functions = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    functions |= {"gt": np.greater, "ge": np.greater_equal}
    if floats:
        functions["ne"] = lambda x, y: (x < y) | (x > y)
        functions |= {"num": lambda x, y: ~np.isnan(x + y), "nan": lambda x, y: np.isnan(x) | np.isnan(y)}
        functions["num"] = lambda x, y: ~(np.isnan(x) | np.isnan(y))
        unordered = {f"{key}u": lambda x, y, f=f: np.isnan(x) | np.isnan(y) | f(x, y) for key, f in functions.items()}
        functions |= unordered
    function = functions[name]
    return i.apply(lambda x, y: np.asarray(function(x, y)), kind, kind, result="pred")


@opcode("selp")
def _select(i: Decoder) -> Step:
    bits = f"b{width_of(i.kind)}"
    put, choice = i.target(0, bits), i.source(3, "pred")
    a, b = i.source(1, bits), i.source(2, bits)
    return lambda m, lanes: put(m, lanes, np.where(choice(m, lanes), a(m, lanes), b(m, lanes)))


@opcode("mov")
def _move(i: Decoder) -> Step:
    width = width_of(i.kind)
    vector = next((each for each in i.operands if each.startswith("{")), None)
    if vector is None:
        return i.apply(lambda x: x, result=i.kind if i.kind == "pred" else f"b{width}")
    whole, part = TYPES[width], width // len(split(vector.strip("{} ")))
    if vector is i.operands[0]:
        read, puts = i.source(1, f"b{width}"), i.targets(0, f"b{part}")

        def unpack(m: Machine, lanes: Lanes) -> None:
            value = read(m, lanes)
            for place, put in enumerate(puts):
                put(m, lanes, (value >> whole(place * part)).astype(TYPES[part]))

        return unpack
    put, parts = i.target(0, f"b{width}"), i.sources(1, f"b{part}")

    def pack(m: Machine, lanes: Lanes) -> None:
        value = whole(0)
        for place, read in enumerate(parts):
            value = value | (read(m, lanes).astype(whole) << whole(place * part))
        put(m, lanes, value)

    return pack


@opcode("cvt")
def _convert(i: Decoder) -> Step:
    *modifiers, to, of = i.opcode[1:]
    mode = [each for each in modifiers if each != "ftz"]
    rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}.get(mode[0] if mode else "")
    if to == "tf32" and mode == ["rna"]:
        return i.apply(to_tf32, "f32", result="b32")
    if to == "f32" and of == "tf32":
        raise NotImplementedError
    if of == "f32" and to in ("tf32",) or (i.opcode[1:3] == ["rna", "tf32"]):
        return i.apply(to_tf32, "f32", result="b32")
    narrow = {"bf16": to_bf16, "f16": to_f16}
    if to in ("bf16x2", "f16x2") and mode == ["rn"]:
        half = narrow[to[:-2]]
        pack = lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low)  # noqa: E731
        return i.apply(pack, "f32", "f32", result="b32")
    if to in narrow and of == "f32" and mode == ["rn"]:
        return i.apply(narrow[to], of, result="b16")
    if of == "bf16" and to in ("f32", "f64") and not mode:
        return i.apply(lambda x: from_bf16(x).astype(dtype_of(to)), of, result=to)
    floats = ("f16", "f32", "f64")
    if of in floats and to == of and rounding:
        return i.apply((lambda x: rounding(flushed(x))) if "ftz" in modifiers else rounding, of, result=to)
    if of in floats and to not in floats and rounding:
        return i.apply(to_integer(to, rounding), of, result=to)
    exact = "bf" not in to + of and ((of in floats) <= (to in floats)) and to != "f16"
    if exact and mode == (["rn"] if to in floats and (of not in floats or of > to) else []):
        return i.apply(lambda x: x.astype(dtype_of(to)), of, result=to)
    raise NotImplementedError


@opcode("bra", "ret", "bar", "fence")
def _control(i: Decoder) -> Step:
    name = i.opcode[0]
    if name == "ret":
        return lambda m, lanes: m.leave(lanes)
    if name == "bar" and i.opcode[1] == "sync":
        if i.operands != ["0"]:
            raise NotImplementedError("a barrier of some threads")
        return lambda m, lanes: m.wait(lanes)
    if name != "bra":  # within a warp, lanes that have not parted run in lock step
        return lambda m, lanes: None
    labels, label = i.program.labels, i.operands[0]
    return lambda m, lanes: m.pc.__setitem__(lanes, labels[label])


@opcode("ld", "st")
def _access(i: Decoder) -> Step:
    size = width_of(i.kind) // 8
    if i.opcode[1] == "param":
        number = int(i.operands[1].strip("[]").rsplit("_", 1)[1])
        put, dtype = i.target(0, i.kind), dtype_of(i.kind)
        bits = TYPES[width_of(i.kind)]
        return lambda m, lanes: put(m, lanes, bits(m.parameters[number] % (1 << 8 * size)).view(dtype))
    only(i, "global", "shared", "cta", "v2", "v4", "v8")
    space = i.opcode[1]
    if i.opcode[0] == "ld":
        address, kind = i.address(1), i.kind if i.kind[0] == "s" else f"b{8 * size}"
        puts = i.targets(0, kind)

        def load(m: Machine, lanes: Lanes) -> None:
            values = m.memories[space].load(m, m.ids[lanes], address(m, lanes), size, len(puts))
            for put, value in zip(puts, values, strict=True):
                put(m, lanes, value.view(dtype_of(kind)))

        return load
    address, sources = i.address(0), i.sources(1, f"b{8 * size}")

    def store(m: Machine, lanes: Lanes) -> None:
        m.memories[space].store(m, m.ids[lanes], address(m, lanes), [read(m, lanes) for read in sources])

    return store


@opcode("atom")
def _atomic(i: Decoder) -> Step:
    only(i, "relaxed", "sys", "gpu", "cta", "shared", "add")
    if "shared" not in i.opcode or i.kind not in ("u32", "s32"):
        raise NotImplementedError
    address, value = i.address(1), i.source(2, "u32")
    if i.operands[0] != "_":  # what it returns depends on the order: it stays garbage
        i.target(0, "u32")

    def add(m: Machine, lanes: Lanes) -> None:
        ids = m.ids[lanes]
        m.memories["shared"].add(m, ids, address(m, lanes), np.broadcast_to(value(m, lanes), ids.shape))

    return add


@opcode("cp")
def _copy(i: Decoder) -> Step:
    """Only when a lane waits for its group does a copy happen."""
    if i.opcode[1:3] == ["async", "commit_group"]:
        return lambda m, lanes: m.committed.__setitem__(lanes, m.committed[lanes] + 1)
    if i.opcode[1:3] == ["async", "wait_group"]:
        open_groups = int(i.operands[0])
        return lambda m, lanes: _finish_copies(m, lanes, open_groups)
    if i.opcode[1] != "async" or i.opcode[3:] != ["shared", "global"]:
        raise NotImplementedError
    to, of, size = i.address(0), i.address(1), int(i.operands[2], 0)
    taken = i.source(3, "u32") if len(i.operands) > 3 else lambda m, lanes: np.uint32(size)

    def issue(m: Machine, lanes: Lanes) -> None:
        ids = m.ids[lanes]
        what = np.stack([ids, m.committed[ids], to(m, lanes), of(m, lanes), np.broadcast_to(taken(m, lanes), ids.shape)])
        m.copies.append((m.now, size, what))

    return issue


def _finish_copies(m: Machine, lanes: Lanes, open_groups: int) -> None:
    waiting, pending, now = np.zeros(m.ids.size, bool), m.copies, m.now
    waiting[lanes] = True
    m.copies = []
    for m.now, size, what in pending:
        due = waiting[what[0]] & (what[1] < m.committed[what[0]] - open_groups)
        if not due.all():
            m.copies.append((m.now, size, what[:, ~due]))
        ids, _, to, of, taken = what[:, due]
        width = min(size, 8)
        m.check((taken == 0) | (taken == size), ids, "copies a part, which is not modelled")
        full = taken > 0
        values = [np.zeros(ids.shape, TYPES[8 * width]) for _ in range(size // width)]
        if full.any():
            for value, loaded in zip(values, m.memories["global"].load(m, ids[full], of[full], width, len(values)), strict=True):
                value[full] = loaded
        if ids.size:
            m.memories["shared"].store(m, ids, to, values)
    m.now = now


@opcode("shfl")
def _shuffle(i: Decoder) -> Step:
    put, mode = i.target(i.operands[0].split("|")[0], "b32"), i.opcode[2]
    value, by, clamp = (i.source(place, "u32") for place in (1, 2, 3))
    if "|" in i.operands[0] or i.opcode[1] != "sync" or i.operands[4] != "-1":
        raise NotImplementedError

    def shuffle(m: Machine, lanes: Lanes) -> None:
        ids = m.ids[lanes]
        lane, b, c = ids % WARP, by(m, lanes).astype(np.int64) % WARP, clamp(m, lanes).astype(np.int64)
        fixed = c >> 8 & 31
        last, first = (lane & fixed) | (c & 31 & ~fixed), lane & fixed
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~fixed)}[mode]
        source = np.where(source >= last if mode == "up" else source <= last, source, lane) + ids - lane
        active = np.zeros(m.ids.size, bool)
        active[lanes] = True
        m.check(active[source], ids, "gets a value from a lane that does not take part")
        values = np.broadcast_to(value(m, ALL), m.ids.shape)
        put(m, lanes, values[source])

    return shuffle


@opcode("redux")
def _reduce(i: Decoder) -> Step:
    only(i, "sync", "add", "min", "max", "and", "or", "xor")
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    function = (functions | {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor})[i.opcode[2]]
    put, value, members = i.target(0, i.kind), i.source(1, i.kind), i.source(2, "u32")

    def reduce(m: Machine, lanes: Lanes) -> None:
        warps = m.whole(lanes)
        m.check(np.atleast_1d(members(m, lanes) == 0xFFFFFFFF), m.ids[lanes], "reduces a part of its warp")
        values = np.broadcast_to(value(m, lanes), warps.size).reshape(warps.shape)
        put(m, lanes, np.repeat(function.reduce(values, 1, dtype=values.dtype), WARP))

    return reduce


@opcode("mma", "wgmma", "ldmatrix", "stmatrix")
def _matrix(i: Decoder) -> Step:
    return products.decode(i)
