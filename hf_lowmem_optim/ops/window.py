"""A window: the last compressed gradients of a tensor, one in each row, and how their values are stored.

The tensor is cut into blocks, and each block keeps the same share of its entries: their indices in the block, and their
values, as floats, or in 8 or 4 bits on a geometric grid for each block of a row.

With L = 2^(bits − 1) − 1, lo and hi the smallest and the largest magnitude that a block keeps, and c rounded to the
nearest in the logarithm:

    step = log2(hi/lo)/L        c = round(log2(|v|/lo)/step)        v̂ = ±lo·2^(c·step)

A code is the sign and c. Stored are lo and, instead of hi, step: reading then needs no logarithm. What has no place on
such a grid takes a code from one of its ends, and the step is that of the codes left:

- zeros among the kept, and what is below the smallest normal float32, have c = 0; the sign of lo says so;
- infinite and NaN have c = L and are read as infinite; the sign of step says so.

A block that keeps nothing but these has lo = step = 0. Blocks of at most 4096 entries have indices of 12 bits: an index
and its code of 4 bits are one int16, code·4096 + index.

All backends take the same steps in float32, with the same polynomials for the logarithm and the power, so that codes
and values agree bit for bit; they are within 1e-6 of the exact grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import FLOAT_DTYPES, Quantized, check_dense
from hf_lowmem_optim.spec import QuantFormat

__all__ = [
    "CHECKED",
    "EXP2",
    "FLOATS",
    "INDEX_BITS",
    "LOG2",
    "MAX_BLOCK_SIZE",
    "MAX_FUSED_BLOCK",
    "MAX_PACKED_BLOCK",
    "VALUES_HELP",
    "Grids",
    "Memo",
    "SparseWindow",
    "ValueDtype",
    "check_alike",
    "check_block_and_values",
    "check_tensors",
    "decode",
    "encode",
    "errors_of",
    "fault_of_grids",
    "kept_per_block",
    "unpack",
    "value_dtype_of",
    "windows_of",
]

Memo = dict[str, Any]
"""What operations note about tensors, for a caller who passes it again as long as these stay where they are."""

ValueDtype = Literal["bf16", "fp32", "8bit", "4bit"]
#: Those that are floats.
FLOATS: dict[ValueDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALUES_HELP = (
    'Storage of the kept values: floats, or codes on a geometric grid for each block and row. ``"4bit"`` puts a code '
    "and its index into 16 bits, for blocks of at most 4096 entries."
)
#: Bits of an index that shares an int16 with a code of 4 bits.
INDEX_BITS = 12
MAX_PACKED_BLOCK = 1 << INDEX_BITS

#: Every product and every sum is rounded.
#: log2(1 + x) = x·(LOG2[0] + LOG2[1]·x + …) and 2^x = 1 + x·(EXP2[0] + EXP2[1]·x + …) for x in [0, 1), to 1e-7.
LOG2 = (1.4426899, -0.7211658, 0.4786837, -0.3473011, 0.24186478, -0.13752135, 0.052059, -0.00930916)
EXP2 = (0.6931513, 0.24016445, 0.05579991, 0.00901703, 0.00186713)
_MAGNITUDE, _MANTISSA, _ONE = 0x7FFFFFFF, 0x7FFFFF, 0x3F800000
_NORMAL, _LARGEST, _INFINITE = 0x00800000, 0x7F7FFFFF, 0x7F800000

#: The kernel that selects takes 8 bytes of shared memory per entry of a block, and some GPUs have 64 KiB.
MAX_FUSED_BLOCK = 8192
MAX_BLOCK_SIZE = 32768  # int16 indices hold 0 … 32767
#: Under this key a memo has the sizes of windows that were checked.
CHECKED = "checked windows"


class Grids(NamedTuple):
    """The grids of a window's values.

    Attributes:
        lo: float32 [window, blocks], contiguous; negative where c = 0 stands for zero.
        step: float32 [window, blocks], contiguous; its sign bit set where c = L stands for infinite.
    """

    lo: Tensor
    step: Tensor


def check_block_and_values(block_size: int, value_dtype: ValueDtype) -> None:
    """Raise ValueError if an index into a block of this size leaves no room for its value's code."""
    if value_dtype == "4bit" and block_size > MAX_PACKED_BLOCK:
        raise ValueError(
            f"block_size={block_size} does not fit value_dtype='4bit', which puts an index and a code into 16 bits: "
            f"take blocks of at most {MAX_PACKED_BLOCK} entries, or value_dtype='8bit'"
        )


def unpack(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices, int64, and codes of 4 bits, int32, of the int16 in which they are."""
    return words.long() & (MAX_PACKED_BLOCK - 1), (words.int() >> INDEX_BITS) & 15


def fault_of_grids(grids: Grids) -> str | None:
    """Return why loaded grids are none, as a clause; None if all their values are zero or in the range of float32."""
    lo, step = grids.lo.abs(), grids.step.abs()
    # the largest code is 127 at most; a larger step means less codes
    empty = (lo == 0) & (step == 0)
    fits = (lo.view(torch.int32) >= _NORMAL) & (lo <= torch.finfo(torch.float32).max) & (step <= 256)
    if bool((empty | fits).all()):
        return None
    return "'value_lo' and 'value_step' hold numbers that are no grid's"


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of the values of some blocks, and the blocks' grids.

    Args:
        x: float32 [blocks, kept].
        bits: 8 or 4.

    Returns:
        int32 [blocks, kept]; lo and step, float32 [blocks].
    """
    levels = (1 << (bits - 1)) - 1
    signed = x.view(torch.int32)
    magnitude = signed & _MAGNITUDE
    small, infinite = magnitude < _NORMAL, magnitude >= _INFINITE
    usual = ~(small | infinite)
    # lo, hi ← smallest and largest usual magnitude, as bits; 0 if there is none
    hi = torch.where(usual, magnitude, 0).amax(1, keepdim=True)
    lo = torch.minimum(torch.where(usual, magnitude, _LARGEST).amin(1, keepdim=True), hi)
    has_zero, has_infinite = small.any(1, keepdim=True) & (lo > 0), infinite.any(1, keepdim=True)
    first = has_zero.float()
    most = levels - has_infinite.float() - first
    # step ← log2(hi/lo) / codes
    logs = _log2_above(torch.cat((magnitude, lo, hi), 1), lo >> 23)
    c, low, high = logs[:, :-2], logs[:, -2:-1], logs[:, -1:]
    step = (high - low).clamp_(min=0) / most
    # c ← round(log2(|v|/lo) / step)
    c = (c - low).div_(torch.where(step > 0, step, torch.inf)).add_(0.5).floor_().clamp_(min=0)
    codes = torch.minimum(c, most).add_(first).int().masked_fill_(small, 0).masked_fill_(infinite, levels)
    codes |= (signed >> 31) & (levels + 1)
    wide = lo.view(torch.float32)
    return codes, torch.where(has_zero, -wide, wide)[:, 0], torch.where(has_infinite, -step, step)[:, 0]


def decode(codes: Tensor, lo: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the values of codes.

    Args:
        codes: int32, of any shape.
        lo: float32, that of each code's grid; broadcast.
        step: Likewise.
        bits: 8 or 4.

    Returns:
        float32.
    """
    levels = (1 << (bits - 1)) - 1
    c = codes & levels
    first, last = (lo < 0).int(), levels - (step.view(torch.int32) < 0).int()
    # lo·2^t: a polynomial for the fraction of t, the exponent for the rest
    t = (c - first).float() * step.abs()
    whole = t.int()
    fraction = t - whole.float()
    power = fraction * EXP2[-1]
    for coefficient in EXP2[-2::-1]:
        power.add_(coefficient).mul_(fraction)
    value = lo.abs() * power.add_(1)
    magnitude = (value.view(torch.int32) + (whole << 23)).clamp_(max=_LARGEST)
    magnitude.masked_fill_(c < first, 0).masked_fill_(c > last, _INFINITE)
    return magnitude.add_((codes >> (bits - 1)) << 31).view(torch.float32)


def _log2_above(magnitude: Tensor, base: Tensor) -> Tensor:
    """Return log2(x) − (base − 127) of normal float32 numbers by their bits; junk for others."""
    x = ((magnitude & _MANTISSA) | _ONE).view(torch.float32) - 1
    total = x * LOG2[-1]
    for coefficient in LOG2[-2::-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(((magnitude >> 23) - base).float())


@functools.lru_cache(maxsize=4096)
def kept_per_block(num_entries: int, density: float) -> int:
    """Return ⌈density·num_entries⌉, the entries kept of a block of ``num_entries``.

    ``density`` counts as the decimal that it prints as: 7% of 100 entries are 7, although 0.07 * 100 > 7 in float64.

    Raises:
        ValueError: The density is not in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    return math.ceil(Fraction(repr(float(density))) * num_entries)


def check_stored(indices: Tensor, values: Tensor | None, grids: Grids | None, blocks: int) -> None:
    """Check the tensors of a window beside its indices.

    Args:
        indices: [window, kept].
        values: As :class:`~hf_lowmem_optim.ops.sparse_window.SparseWindow` has them.
        grids: Likewise.
        blocks: Blocks of a row.

    Raises:
        TypeError: For a wrong dtype.
        ValueError: For a wrong shape or device, or a tensor that is not contiguous.
    """
    wanted = (torch.uint8,) if grids is not None else tuple(FLOATS.values())
    parts = [] if grids is None else [("lo", grids.lo, (torch.float32,)), ("step", grids.step, (torch.float32,))]
    for name, tensor, dtypes in [("values", values, wanted), *parts]:
        if tensor is None and grids is not None:  # codes that are beside the indices
            continue
        if tensor is None or tensor.dtype not in dtypes:
            said = "bfloat16 or float32, or uint8 with grids" if name == "values" else "float32"
            raise TypeError(f"{name} must be {said}; got {None if tensor is None else tensor.dtype}")
        shape = tuple(indices.shape) if name == "values" else (len(indices), blocks)
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and of shape {[*shape]}, got {[*tensor.shape]}")
        if tensor.device != indices.device:
            raise ValueError(f"{name}: on {tensor.device}, but indices is on {indices.device}")


def value_dtype_of(values: Tensor | None, grids: Grids | None) -> ValueDtype:
    """Return how values are stored: without grids they are floats, without a tensor of their own beside the indices."""
    if grids is not None:
        return "4bit" if values is None else "8bit"
    return "fp32" if values is not None and values.dtype == torch.float32 else "bf16"


@dataclass(eq=False, slots=True)
class SparseWindow:
    """The last compressed gradients of one tensor of ``numel`` entries, one per row.

    The tensor is cut into blocks of ``block_size`` entries, the last one shorter. Block ``b`` owns the columns from
    ``b * kept_per_block`` on; the last block owns what is left, at most ``kept_per_block``. Within a row the indices of
    a block ascend strictly. A row that was not written yet may hold anything that is in range (zeros, for example):
    the operations skip a row whose weights are all zero.

    Values are floats, or codes of 8 bits, or of 4 in the upper bits of their indices: see ``window.py``.

    Attributes:
        indices: int16 ``[window, kept]``, contiguous; positions relative to the start of the block.
        values: bfloat16, float32 or (with grids) uint8 ``[window, kept]``, contiguous; None for codes of 4 bits.
        numel: Number of entries of the tensor.
        block_size: Entries per block, 1 to 32768.
        kept_per_block: Kept entries of a full block, 1 to ``block_size``.
        grids: Those of the codes; None for floats.
    """

    indices: Tensor
    values: Tensor | None
    numel: int
    block_size: int
    kept_per_block: int
    grids: Grids | None = None

    def check(self) -> None:
        """Check everything that can be checked without reading the tensors.

        Raises:
            TypeError: For a dtype that is not listed above.
            ValueError: For shapes that contradict each other, or tensors that are not contiguous or not on one device.
        """
        indices, values = self.indices, self.values
        if indices.dtype != torch.int16:
            raise TypeError(f"indices must be int16, got {indices.dtype}")
        if indices.ndim != 2 or not indices.is_contiguous():
            raise ValueError(f"indices must be contiguous and [window, kept], got {[*indices.shape]}")
        most = MAX_PACKED_BLOCK if values is None else MAX_BLOCK_SIZE
        if not 1 <= self.block_size <= most:
            raise ValueError(f"block_size must be in [1, {most}] (int16), got {self.block_size!r}")
        check_stored(indices, values, self.grids, -(-self.numel // self.block_size))
        if not 1 <= self.kept_per_block <= self.block_size:
            raise ValueError(f"kept_per_block must be between 1 and block_size, got {self.kept_per_block}")
        before = (self.numel - 1) // self.block_size  # blocks before the last one
        last = self.numel - before * self.block_size
        if not 1 <= indices.shape[1] - before * self.kept_per_block <= min(self.kept_per_block, last):
            raise ValueError(
                f"{self.numel} entries in blocks of {self.block_size} with {self.kept_per_block} kept per block "
                f"cannot give rows of {self.kept} entries"
            )

    #: The device of the tensors.
    device = property(attrgetter("indices.device"))

    @property
    def window(self) -> int:
        """Number of rows."""
        return self.indices.shape[0]

    @property
    def kept(self) -> int:
        """Number of entries of a row."""
        return self.indices.shape[1]

    @property
    def layout(self) -> tuple[int, int, int, ValueDtype]:
        """What windows must have in common to share a call."""
        return self.window, self.block_size, self.kept_per_block, self.value_dtype

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the short one included."""
        return -(-self.numel // self.block_size)

    @property
    def value_dtype(self) -> ValueDtype:
        """How the values are stored."""
        return value_dtype_of(self.values, self.grids)

    def read(self, columns: slice, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return indices, int64, and values, float32, at columns that begin with a block: of all rows, or of some."""
        k = self.kept_per_block
        blocks = slice(columns.start // k, -(-columns.stop // k))
        parts = [part[:, columns] for part in (self.indices, self.values) if part is not None]
        parts += [part[:, blocks] for part in self.grids or ()]
        if rows is not None:
            parts = [part.index_select(0, rows) for part in parts]
        if self.grids is None:
            indices, values = parts
            return indices.long(), values.float()
        *stored, lo, step = parts
        lo, step = (grid.repeat_interleave(k, 1)[:, : stored[0].shape[1]] for grid in (lo, step))
        if self.values is not None:
            indices, codes = stored
            return indices.long(), decode(codes.int(), lo, step, 8)
        indices, codes = unpack(stored[0])
        return indices, decode(codes, lo, step, 4)


def windows_of(
    state: Mapping[str, Sequence[Any]], numels: Sequence[int], block_size: int, density: float
) -> list[SparseWindow]:
    """Return the windows in the states of some tensors, by key a list of each tensor's own; they are not checked."""
    kept, nothing = kept_per_block(block_size, density), [None] * len(numels)
    grids = map(Grids, state["value_lo"], state["value_step"]) if "value_lo" in state else nothing
    parts = zip(state["indices"], state.get("values", nothing), numels, grids, strict=True)
    return [SparseWindow(i, values, numel, block_size, kept, grid) for i, values, numel, grid in parts]


def errors_of(state: Mapping[str, Sequence[Tensor]], numels: Sequence[int], fmt: QuantFormat) -> list[Quantized]:
    """Return the block-quantized errors in the states of some tensors, likewise."""
    parts = zip(*[state[f"error_{part}"] for part in ("codes", "lo", "hi")], numels, strict=True)
    return [Quantized(codes, lo, hi, numel, fmt) for codes, lo, hi, numel in parts]


def check_alike(windows: Sequence[SparseWindow], memo: Memo | None = None) -> None:
    """Check windows, and that one call can serve them all.

    Args:
        windows: At least one.
        memo: Where their sizes are noted once they are checked; None if nobody will say when they change.

    Raises:
        TypeError: As :meth:`SparseWindow.check`.
        ValueError: Likewise; or they are on several devices, cut or stored differently.
    """
    one = windows[0]
    for window in windows:
        window.check()
        if window.indices.device != one.indices.device:
            raise ValueError(f"window: on {window.device}, but another tensor is on {one.device}")
        if window.layout != one.layout:
            raise ValueError(
                f"windows of one call must be alike in rows, block size, entries kept and storage; got {window.layout} "
                f"beside {one.layout}"
            )
    if memo is not None:
        memo[CHECKED] = [window.numel for window in windows]


def check_tensors(tensors: Sequence[Tensor], name: str, windows: Sequence[SparseWindow], memo: Memo | None) -> None:
    """Check windows, if they were not, and the tensors that they are of: every step has others.

    Args:
        tensors: One for each window.
        name: What they are called.
        windows: At least one.
        memo: As for :func:`check_alike`.

    Raises:
        TypeError: As :func:`check_alike`.
        ValueError: Likewise; or a tensor has not the dtype of the others, has not as many entries as its window, is
            elsewhere, or is not contiguous.
    """
    if memo is None or CHECKED not in memo:
        check_alike(windows, memo)
    numels = [window.numel for window in windows] if memo is None else memo[CHECKED]
    device, dtype = windows[0].indices.device, tensors[0].dtype
    dtypes = (dtype,) if dtype in FLOAT_DTYPES else FLOAT_DTYPES
    for tensor, numel in zip(tensors, numels, strict=True):
        # what check_dense checks: a thousand calls of it take a millisecond
        if (
            tensor.dtype not in dtypes
            or tensor.numel() != numel
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            check_dense(tensor, name, numel=numel, device=device, dtypes=dtypes)
