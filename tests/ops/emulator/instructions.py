"""What each instruction does, decoded once per program into a function on all lanes.

The semantics are those of NVIDIA's "Parallel Thread Execution ISA"; an instruction, a type or a modifier that is
not here raises NotImplementedError with its text: a guess would pass for what a GPU computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import products, values
from .parse import ALL, TYPES, WARP, Instruction, Lanes, Program, Step, split

if TYPE_CHECKING:
    from .machine import Machine

Function = Callable[..., Any]
#: Reads an operand: one value per lane, or one for all.
Source = Callable[["Machine", Lanes], Any]
Target = Callable[["Machine", Lanes, Any], None]

_WIDTHS = {"pred": 1, "bf16": 16, "bf16x2": 32, "f16x2": 32, "s16x2": 32, "tf32": 32}
_NAN = {np.dtype(np.float32): np.uint32(0x7FFFFFFF), np.dtype(np.float64): np.uint64(0x7FFFFFFFFFFFFFFF)}
_DECODERS: dict[str, Callable[[Decoder], Step]] = {}


def width_of(kind: str) -> int:
    """Return the bits of a type."""
    return _WIDTHS.get(kind) or int(kind[1:])


def dtype_of(kind: str) -> Any:
    """Return how numpy computes with a type; as bits where it has no such type."""
    if kind in ("f16", "f32", "f64", "s8", "s16", "s32", "s64"):
        return np.dtype(f"{kind[0].replace('s', 'i')}{width_of(kind) // 8}")
    return np.dtype(TYPES[width_of(kind)])


class Decoder:
    """An instruction to be decoded, its operands by their places."""

    def __init__(self, program: Program, instruction: Instruction) -> None:
        self.program, self.instruction = program, instruction
        self.opcode, self.operands = instruction.opcode, instruction.operands
        self.kind = self.opcode[-1]

    def only(self, *modifiers: str) -> None:
        """Raise for a modifier that is not meant."""
        if unknown := set(self.opcode[1:-1]) - set(modifiers):
            raise NotImplementedError(f"modifiers {unknown}")

    def source(self, operand: int | str, kind: str) -> Source:
        """Return a function that reads an operand."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        width, dtype = width_of(kind), dtype_of(kind)
        if text[0] != "%":
            text = {"global_smem": "0"}.get(text, text)  # where shared memory starts
            number = int(text[2:] if text[:2] in ("0f", "0d") else text.rstrip("U"), 16 if text[0] == "0" else 10)
            constant = TYPES[width](number != 0 if kind == "pred" else number % (1 << width)).view(dtype)
            return lambda m, lanes: constant
        if not text[-1].isdigit():
            return lambda m, lanes: m.special[text][lanes].astype(dtype)
        register, has = self.program.register(text)
        if has == width:
            return lambda m, lanes: m.registers[register][lanes].view(dtype)
        if has < width:
            raise NotImplementedError(f"{kind} of {text}")
        return lambda m, lanes: m.registers[register][lanes].astype(TYPES[width]).view(dtype)

    def target(self, operand: int | str, kind: str) -> Target:
        """Return a function that writes an operand, extended where the register is wider."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        if text == "_":
            return lambda m, lanes, value: None
        (register, has), dtype = self.program.register(text), dtype_of(kind)
        if has < width_of(kind):
            raise NotImplementedError(f"{kind} into {text}")
        bits, canonical = TYPES[has], _NAN.get(dtype)

        def put(m: Machine, lanes: Lanes, value: Any) -> None:
            m.registers[register][lanes] = value.view(bits)
            if canonical is not None and (nan := np.isnan(value)).any():
                m.registers[register][m.ids[lanes][nan]] = canonical

        def extend(m: Machine, lanes: Lanes, value: Any) -> None:
            m.registers[register][lanes] = value.astype(f"{dtype.kind}{has // 8}").view(bits)

        return put if has == width_of(kind) else extend

    def sources(self, operand: int, kind: str) -> list[Source]:
        """Return functions that read the parts of a vector."""
        return [self.source(each, kind) for each in split(self.operands[operand].strip("{} "))]

    def targets(self, operand: int, kind: str) -> list[Target]:
        """Return functions that write the parts of a vector."""
        return [self.target(each, kind) for each in split(self.operands[operand].strip("{} "))]

    def address(self, operand: int) -> Source:
        """Return a function that reads an address, one per lane."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", self.operands[operand])
        assert found, self.instruction.text
        base, offset = self.source(found[1], "s64" if found[1].startswith("%rd") else "u32"), int(found[2] or "0", 0)
        return lambda m, lanes: np.broadcast_to(base(m, lanes).astype(np.int64) + offset, m.ids[lanes].shape)

    def apply(self, function: Function, *kinds: str, result: str = "") -> Step:
        """Return a step: the first operand becomes a function of the others; all are of the instruction's type."""
        put, kinds = self.target(0, result or self.kind), kinds or (self.kind,) * (len(self.operands) - 1)
        sources = [self.source(place, kind) for place, kind in enumerate(kinds, 1)]
        return lambda m, lanes: put(m, lanes, function(*[read(m, lanes) for read in sources]))


def decode(program: Program) -> None:
    """Give each instruction its step."""
    for instruction in program.instructions:
        try:
            instruction.step = _DECODERS[instruction.opcode[0]](Decoder(program, instruction))
        except (NotImplementedError, LookupError, ValueError) as error:
            raise NotImplementedError(f"{instruction}: {error!r}") from error


def opcode(*names: str) -> Callable[[Callable[[Decoder], Step]], Callable[[Decoder], Step]]:
    """Register what decodes these instructions."""

    def register(function: Callable[[Decoder], Step]) -> Callable[[Decoder], Step]:
        _DECODERS.update(dict.fromkeys(names, function))
        return function

    return register


_EITHER = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs}
_FLOATS = {"div": np.divide, "sqrt": np.sqrt, "min": values.lesser, "max": values.greater} | _EITHER
_INTEGERS = {"min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or} | _EITHER
_INTEGERS |= {"xor": np.bitwise_xor, "not": np.invert}


@opcode("add", "sub", "mul", "div", "min", "max", "fma", "sqrt", "neg", "abs", "and", "or", "xor", "not")
def _arithmetic(i: Decoder) -> Step:
    name, kind = i.opcode[0], i.kind
    if kind in ("f32", "f64"):
        i.only("rn", "full", "approx", "ftz", "NaN")
        function = {"fma": values.fused32 if kind == "f32" else values.fused64, **_FLOATS}[name]
        if "ftz" in i.opcode:
            return i.apply(lambda *x: values.flushed(function(*map(values.flushed, x))))
        return i.apply(values.nan_of_either(function) if "NaN" in i.opcode else function)
    if kind.endswith("x2"):
        parts = {"abs bf16x2": lambda x: x & 0x7FFF7FFF, "abs f16x2": lambda x: x & 0x7FFF7FFF}
        parts["add s16x2"] = lambda x, y: ((x + y) & 0xFFFF) | (((x & 0xFFFF0000) + (y & 0xFFFF0000)) & 0xFFFF0000)
        return i.apply(parts[" ".join(i.opcode)])
    if "wide" in i.opcode:
        wide = f"{kind[0]}{2 * width_of(kind)}"
        return i.apply(lambda x, y: x.astype(dtype_of(wide)) * y.astype(dtype_of(wide)), result=wide)
    if (name, i.opcode[1]) == ("mul", "hi"):
        return i.apply(values.high_product)
    i.only("lo")
    return i.apply(values.quotient if (name, kind) == ("div", "s32") else _INTEGERS[name])


@opcode("mad")
def _multiply_add(i: Decoder) -> Step:
    i.only("lo", "wide")
    wide = f"{i.kind[0]}{2 * width_of(i.kind)}" if "wide" in i.opcode else i.kind
    dtype = dtype_of(wide)
    return i.apply(lambda x, y, z: x.astype(dtype) * y.astype(dtype) + z, i.kind, i.kind, wide, result=wide)


@opcode("shl", "shr", "prmt", "bfe", "popc")
def _bits(i: Decoder) -> Step:
    i.only()
    name, kind = i.opcode[0], i.kind
    if name == "popc":
        return i.apply(lambda x: np.bitwise_count(x).astype(np.uint32), kind, result="u32")
    if name in ("shl", "shr"):
        function = np.left_shift if name == "shl" else np.right_shift  # by too much as in PTX
        return i.apply(lambda x, by: function(x, np.minimum(by, 64).astype(x.dtype)), kind, "u32")
    function = {"prmt b32": values.permuted, "bfe u32": values.extracted, "bfe s32": values.extracted}[f"{name} {kind}"]
    return i.apply(function, kind, "u32", "u32")


@opcode("setp")
def _compare(i: Decoder) -> Step:
    name, kind = i.opcode[1], i.kind
    functions: dict[str, Function] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    functions |= {"gt": np.greater, "ge": np.greater_equal}
    if kind[0] == "f":
        functions["ne"] = lambda x, y: (x < y) | (x > y)
        functions["num"] = lambda x, y: ~(np.isnan(x) | np.isnan(y))
        for key in ("eq", "ne", "lt", "le", "gt", "ge"):
            functions[key + "u"] = lambda x, y, ordered=functions[key]: np.isnan(x) | np.isnan(y) | ordered(x, y)
    function = functions[name]
    return i.apply(lambda x, y: np.asarray(function(x, y)), kind, kind, result="pred")


@opcode("selp")
def _select(i: Decoder) -> Step:
    bits = f"b{width_of(i.kind)}"
    return i.apply(lambda x, y, first: np.where(first, x, y), bits, bits, "pred", result=bits)


@opcode("mov")
def _move(i: Decoder) -> Step:
    width = width_of(i.kind)
    vector = next((each for each in i.operands if each.startswith("{")), None)
    if vector is None:
        kind = i.kind if i.kind == "pred" else f"b{width}"
        return i.apply(lambda x: x, kind, result=kind)
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
    *mode, to, of = i.opcode[1:]
    narrow = {"rn bf16": values.to_bf16, "rn f16": values.to_f16, "rna tf32": values.to_tf32}
    how, floats = f"{' '.join(mode)} {to}", ("f32", "f64")
    if of == "f32" and how in narrow:
        return i.apply(narrow[how], of, result=f"b{width_of(to)}")
    if of == "f32" and how.removesuffix("x2") in narrow:
        half = narrow[how.removesuffix("x2")]
        return i.apply(lambda high, low: half(high).astype(np.uint32) << 16 | half(low), of, of, result="b32")
    if of == "bf16" and to in floats and not mode:
        return i.apply(lambda x: values.from_bf16(x).astype(dtype_of(to)), of, result=to)
    rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}.get(mode[0] if mode else "")
    if of in floats and rounding and set(mode[1:]) <= {"ftz"}:
        function = rounding if to == of else values.to_integer(dtype_of(to), rounding)
        return i.apply((lambda x: function(values.flushed(x))) if "ftz" in mode else function, of, result=to)
    exact = (of not in floats) if to not in floats else of in ("f16", "f32") and of != to
    if "bf" in to + of or to == "f16" or mode != ([] if exact else ["rn"]) or (of in floats and to not in floats):
        raise NotImplementedError("a conversion of these types, or rounded like that")
    return i.apply(lambda x: x.astype(dtype_of(to)), of, result=to)


@opcode("bra", "ret", "bar", "fence")
def _control(i: Decoder) -> Step:
    name = i.opcode[0]
    if name == "ret":
        return lambda m, lanes: m.leave(lanes)
    if name == "bra":
        labels, label = i.program.labels, i.operands[0]  # which may come later
        return lambda m, lanes: m.pc.__setitem__(lanes, labels[label])
    if name == "bar" and i.opcode[1] == "sync":
        if i.operands != ["0"]:
            raise NotImplementedError("a barrier of some threads")
        return lambda m, lanes: m.wait(lanes)
    return lambda m, lanes: None  # lanes of a warp that have not parted run in lock step


@opcode("ld", "st")
def _access(i: Decoder) -> Step:
    i.only("global", "shared", "cta", "param", "v2", "v4")
    space, dtype = i.opcode[1], dtype_of(i.kind)
    size = dtype.itemsize
    kind = i.kind if i.kind[0] == "s" else f"b{8 * size}"
    if space == "param":
        number, put = int(i.operands[1].strip("[]").rsplit("_", 1)[1]), i.target(0, kind)
        return lambda m, lanes: put(m, lanes, TYPES[8 * size](m.parameters[number] % (1 << 8 * size)).view(dtype))
    if i.opcode[0] == "ld":
        address, puts = i.address(1), i.targets(0, kind)

        def load(m: Machine, lanes: Lanes) -> None:
            loaded = m.memories[space].load(m, m.ids[lanes], address(m, lanes), size, len(puts))
            for put, value in zip(puts, loaded, strict=True):
                put(m, lanes, value.view(dtype_of(kind)))

        return load
    address, sources = i.address(0), i.sources(1, f"b{8 * size}")
    return lambda m, lanes: m.memories[space].store(
        m, m.ids[lanes], address(m, lanes), [read(m, lanes) for read in sources]
    )


@opcode("atom")
def _atomic(i: Decoder) -> Step:
    """Add; what is returned depends on the order: that register stays garbage."""
    i.only("relaxed", "sys", "shared", "add")
    address, value = i.address(1), i.source(2, {"u32": "u32"}[i.kind])

    def add(m: Machine, lanes: Lanes) -> None:
        ids = m.ids[lanes]
        m.memories["shared"].add(m, ids, address(m, lanes), np.broadcast_to(value(m, lanes), ids.shape))

    return add


@opcode("cp")
def _copy(i: Decoder) -> Step:
    """Copy asynchronously: only when a lane waits for its group."""
    if i.opcode[1:3] == ["async", "commit_group"]:
        return lambda m, lanes: m.committed.__setitem__(lanes, m.committed[lanes] + 1)
    if i.opcode[1:3] == ["async", "wait_group"]:
        return partial(_finish_copies, open_groups=int(i.operands[0]))
    if i.opcode[1:] not in (["async", "ca", "shared", "global"], ["async", "cg", "shared", "global"]):
        raise NotImplementedError("an asynchronous copy of another kind")
    to, of, size, taken = i.address(0), i.address(1), int(i.operands[2], 0), i.source(3, "u32")

    def issue(m: Machine, lanes: Lanes) -> None:
        ids = m.ids[lanes]
        full = np.broadcast_to(taken(m, lanes), ids.shape)
        m.check((full == 0) | (full == size), ids, "copies a part, which is not modelled")
        m.copies.append((m.now, size, np.stack([ids, m.committed[ids], to(m, lanes), of(m, lanes), full])))

    return issue


def _finish_copies(m: Machine, lanes: Lanes, open_groups: int) -> None:
    waiting, pending, now, m.copies = np.zeros(m.ids.size, bool), m.copies, m.now, []
    waiting[lanes] = True
    for m.now, size, what in pending:
        due = waiting[what[0]] & (what[1] < m.committed[what[0]] - open_groups)
        if not due.all():
            m.copies.append((m.now, size, what[:, ~due]))
        if due.any():
            ids, _, to, of, full = what[:, due]
            width, taking = min(size, 8), full > 0
            copied = np.zeros((size // width, ids.size), TYPES[8 * width])  # zeros of what is not taken
            copied[:, taking] = m.memories["global"].load(m, ids[taking], of[taking], width, len(copied))
            m.memories["shared"].store(m, ids, to, list(copied))
    m.now = now


@opcode("shfl")
def _shuffle(i: Decoder) -> Step:
    mode, put = i.opcode[2], i.target(0, "b32")
    value, by, clamp = (i.source(place, "u32") for place in (1, 2, 3))
    if i.operands[4] != "-1":
        raise NotImplementedError("a part of a warp")

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
        put(m, lanes, np.broadcast_to(value(m, ALL), m.ids.shape)[source])

    return shuffle


@opcode("redux")
def _reduce(i: Decoder) -> Step:
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[i.opcode[2]]
    put, value, members = i.target(0, i.kind), i.source(1, i.kind), i.source(2, "u32")

    def reduce(m: Machine, lanes: Lanes) -> None:
        warps = m.whole(lanes)
        m.check(np.atleast_1d(members(m, lanes) == 0xFFFFFFFF), m.ids[lanes], "reduces a part of its warp")
        each = np.broadcast_to(value(m, lanes), warps.size).reshape(warps.shape)
        put(m, lanes, function.reduce(each, 1, dtype=each.dtype).repeat(WARP))

    return reduce


@opcode("vote")
def _vote(i: Decoder) -> Step:
    if i.opcode[1:] != ["sync", "ballot", "b32"] or i.operands[2] != "-1":
        raise NotImplementedError("a vote other than the ballot of a whole warp")
    put, value = i.target(0, "b32"), i.source(1, "pred")
    bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def ballot(m: Machine, lanes: Lanes) -> None:
        warps = m.whole(lanes)
        votes = np.broadcast_to(value(m, lanes), warps.size).reshape(warps.shape)
        put(m, lanes, (votes * bits).sum(1, dtype=np.uint32).repeat(WARP))

    return ballot


opcode("mma")(products.multiply_in_registers)
opcode("wgmma")(products.multiply_by_warp_groups)
opcode("ldmatrix", "stmatrix")(products.access_matrices)
