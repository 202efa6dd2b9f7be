"""Matrices cut into blocks of at most ``block_size`` rows and columns, and what belongs to each block.

Rows and columns are cut into stretches of ``block_size``, the last one shorter, so that a grid has up to four regions
of equal blocks: B × B, B × c, r × B and r × c. What belongs to the blocks of a matrix lies in one flat tensor, region
after region, in each the blocks in row-major order. A :class:`Piece` is a number of equal blocks of equal matrices:
what one stack of products is made of.

Vectors are stored in float32 or bfloat16, or block-quantized; a block's codes share no range with another's, so that a
NaN stays where it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, quantize_
from hf_lowmem_optim.ops.inverse_root import alike_in_a_stack
from hf_lowmem_optim.spec import QuantFormat, TensorSpec, quantized_specs

__all__ = [
    "FirstMoment",
    "Piece",
    "Region",
    "Squares",
    "Storage",
    "Vectors",
    "Width",
    "grid",
    "piece_entries",
    "pieces",
]

Storage = Literal["fp32", "bf16", "8bit", "4bit"]
#: Length of a block's part of a flat tensor, from the block's rows and columns.
Width = Callable[[int, int], int]

_FORMATS = {"8bit": QuantFormat(8, 64), "4bit": QuantFormat(4, 64)}
#: Sums of thousands of products of such entries stay in the range of float32.
_MOST = 2.0**50
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Region:
    """Equal blocks of a matrix, beside and below each other.

    Attributes:
        row: First row of the matrix.
        column: First column.
        rows: Blocks one below the other.
        columns: Blocks beside each other.
        a: Rows of a block.
        b: Columns of a block.
    """

    row: int
    column: int
    rows: int
    columns: int
    a: int
    b: int


def grid(p: int, q: int, block_size: int) -> list[Region]:
    """Return the regions of a p × q matrix, in the order of their state."""
    rows, columns = _stretches(p, block_size), _stretches(q, block_size)
    return [Region(i, j, m, n, a, b) for i, m, a in rows for j, n, b in columns]


def _stretches(length: int, size: int) -> list[tuple[int, int, int]]:
    """Return (begin, number, length) of the whole stretches, and of the shorter last one."""
    whole, rest = divmod(length, size)
    return [each for each in ((0, whole, size), (whole * size, min(rest, 1), rest)) if each[1]]


def total(regions: Sequence[Region], width: Width) -> int:
    """Return the length of a flat tensor that has ``width`` entries for each block."""
    return sum(each.rows * each.columns * width(each.a, each.b) for each in regions)


@dataclass(frozen=True)
class Piece:
    """Equal blocks of matrices of one shape.

    Attributes:
        before: The regions before its own.
        region: Its region.
        tensors: Which matrices.
        rows: Which rows of the region's blocks.
        columns: Which columns; all, unless it is a single row.
    """

    before: Sequence[Region]
    region: Region
    tensors: range
    rows: range
    columns: range

    def blocks(self, x: Tensor) -> Tensor:
        """Return its blocks of one matrix, a view [rows, columns, a, b]."""
        r = self.region
        part = x[r.row + self.rows.start * r.a :][: len(self.rows) * r.a]
        part = part[:, r.column + self.columns.start * r.b :][:, : len(self.columns) * r.b]
        return part.view(len(self.rows), r.a, len(self.columns), r.b).transpose(1, 2)

    def views(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Return its blocks of each of its matrices."""
        return [self.blocks(x[i]) for i in self.tensors]

    def gather(self, x: Sequence[Tensor]) -> Tensor:
        """Return its blocks of all its matrices in float32, a copy [blocks, a, b], cut at ±2⁵⁰."""
        parts = self.views(x)
        out = torch.empty((len(parts), *parts[0].shape), dtype=torch.float32, device=parts[0].device)
        for into, part in zip(out.unbind(), parts, strict=True):
            into.copy_(part)
        # the product lets infinity become NaN, unlike the clamp
        return out.clamp(-_MOST, _MOST).add_(out, alpha=0).flatten(0, 2)

    def only(self, j: int) -> Piece:
        """Return the piece of its block j alone."""
        ij, k = divmod(j, len(self.columns))
        i, r = divmod(ij, len(self.rows))
        place = (self.tensors[i : i + 1], self.rows[r : r + 1], self.columns[k : k + 1])
        return Piece(self.before, self.region, *place)

    def numbers(self) -> list[tuple[int, int]]:
        """Return (matrix, number of the block in it) of each of its blocks."""
        first = total(self.before, lambda a, b: 1)
        return [
            (i, first + row * self.region.columns + column)
            for i in self.tensors
            for row in self.rows
            for column in self.columns
        ]

    def span(self, width: Width) -> tuple[int, int]:
        """Return where in a flat tensor with ``width`` entries a block its blocks begin, and that width."""
        r = self.region
        w = width(r.a, r.b)
        return total(self.before, width) + (self.rows.start * r.columns + self.columns.start) * w, w

    def part(self, flat: Tensor, start: int, width: int) -> Tensor:
        """Return what belongs to its blocks of stacked flat tensors, a view [matrices, blocks, width]."""
        count = len(self.rows) * len(self.columns)
        rows = flat[self.tensors.start : self.tensors.stop, start : start + count * width]
        return rows.view(len(rows), count, width)


def piece_entries(device: torch.device) -> int:
    """Return the entries of the largest matrices of a piece together, unless one block has more."""
    return 1 << 19 if device.type == "cpu" else 1 << 22


def pieces(regions: Sequence[Region], count: int, device: torch.device) -> Iterator[Piece]:
    """Cut ``count`` equal matrices into pieces: a bounded number of blocks each, the stacks of products."""
    for index, region in enumerate(regions):
        before, m, n = regions[:index], region.rows, region.columns
        alike = alike_in_a_stack(region.a, region.b, device)
        most = max(1, piece_entries(device) // max(region.a, region.b) ** 2) if alike else 1
        together, rows, columns = max(1, most // (m * n)), max(1, most // n), min(n, most)
        for i in range(0, count, together):
            for r in range(0, m, rows):
                for c in range(0, n, columns):
                    yield Piece(
                        before,
                        region,
                        range(i, min(i + together, count)),
                        range(r, min(r + rows, m)),
                        range(c, min(c + columns, n)),
                    )


@dataclass(frozen=True)
class Vectors:
    """A vector for each block of a matrix, in the state of its tensor.

    Attributes:
        key: Its state key; of a quantized one the prefix of three.
        component: Name under which its bytes are counted.
        width: The entries of the vector.
        storage: How it is stored.
    """

    key: str
    component: str
    width: Width
    storage: Storage = "fp32"

    def specs(self, regions: Sequence[Region]) -> dict[str, TensorSpec]:
        """Describe its state."""
        length, fmt = total(regions, self._stored_width), _FORMATS.get(self.storage)
        if fmt is None:
            return {self.key: TensorSpec((length,), _DTYPES[self.storage], self.component)}
        specs = quantized_specs(length, fmt, prefix=self.key)
        return {key: dataclasses.replace(spec, component=self.component) for key, spec in specs.items()}

    def read(self, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Return those of a piece in float32, [blocks, width]: a copy, or a view of what is float32."""
        fmt = _FORMATS.get(self.storage)
        if fmt is None:
            return self._parts(state, piece)[0].flatten(0, 1).float()
        codes, lo, hi = (part.reshape(-1).contiguous() for part in self._parts(state, piece))
        length = codes.numel() * 8 // fmt.bits
        out = codes.new_empty(length, dtype=torch.float32)
        dequantize_(out, Quantized(codes, lo, hi, length, fmt))
        blocks = len(piece.tensors) * len(piece.rows) * len(piece.columns)
        return out.view(blocks, -1)[:, : self.width(piece.region.a, piece.region.b)]

    def write_(self, state: Mapping[str, Tensor], piece: Piece, values: Tensor) -> None:
        """Store float32 [blocks, width]."""
        fmt, parts = _FORMATS.get(self.storage), self._parts(state, piece)
        if fmt is None:
            parts[0].copy_(values.view(parts[0].shape))
            return
        missing = self._stored_width(piece.region.a, piece.region.b) - values.shape[1]
        if missing:  # the last entry again, which changes no range
            values = torch.cat((values, values[:, -1:].expand(-1, missing)), dim=1)
        buffers = [
            part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
            for part in parts
        ]
        codes, lo, hi = (buffer.view(-1) for buffer in buffers)
        quantize_(Quantized(codes, lo, hi, values.numel(), fmt), values.contiguous())
        for part, buffer in zip(parts, buffers, strict=True):
            if part is not buffer:
                part.copy_(buffer)

    def _stored_width(self, a: int, b: int) -> int:
        """Return the entries of a vector with what fills its last quantization block."""
        fmt, width = _FORMATS.get(self.storage), self.width(a, b)
        return width if fmt is None else fmt.num_blocks(width) * fmt.block_size

    def _parts(self, state: Mapping[str, Tensor], piece: Piece) -> list[Tensor]:
        """Return what a piece's are stored in, views [matrices, blocks, width]: as they are, or codes, lo and hi."""
        fmt, (start, width) = _FORMATS.get(self.storage), piece.span(self._stored_width)
        if fmt is None:
            return [piece.part(state[self.key], start, width)]
        entries = {"codes": 8 // fmt.bits, "lo": fmt.block_size, "hi": fmt.block_size}
        return [piece.part(state[f"{self.key}_{name}"], start // n, width // n) for name, n in entries.items()]


@dataclass(frozen=True)
class Squares:
    """The running mean of the squares of each block's entries, in the state of its tensor.

    Its root is given as factors that broadcast to [blocks, a, b]; rows and columns of them take no pass over all.

    Attributes:
        key: Its state key, or the prefix of two.
        factored: Whether only row and column sums are kept: ρτᵀ/Σρ instead (Adafactor, arXiv 1804.04235).
    """

    key: str
    factored: bool

    def specs(self, regions: Sequence[Region]) -> dict[str, TensorSpec]:
        """Describe its state."""
        return {key: spec for part in self._parts() for key, spec in part.specs(regions).items()}

    def root(self, state: Mapping[str, Tensor], piece: Piece) -> list[Tensor]:
        """Return factors of the mean's root, float32 copies."""
        return self._root([part.read(state, piece) for part in self._parts()], piece)

    def update_(self, state: Mapping[str, Tensor], piece: Piece, x: Tensor, decay: float) -> list[Tensor]:
        """Let the squares of float32 x [blocks, a, b] into the mean, and return factors of its root, copies."""
        squares, parts = x.square(), self._parts()
        values = [squares.sum(2), squares.sum(1)] if self.factored else [squares.flatten(1)]
        # each operation rounds once, so that an entry's place in a stack does not matter
        values = [(p.read(state, piece) * decay).add_(v * (1 - decay)) for p, v in zip(parts, values, strict=True)]
        for part, value in zip(parts, values, strict=True):
            part.write_(state, piece, value)
        return self._root(values, piece)

    def _root(self, values: Sequence[Tensor], piece: Piece) -> list[Tensor]:
        if not self.factored:
            return [values[0].sqrt().view(-1, piece.region.a, piece.region.b)]
        rows, columns = values
        whole = rows.sum(1, keepdim=True)
        return [rows.sqrt()[:, :, None], (columns / whole.masked_fill(whole == 0, 1)).sqrt_()[:, None, :]]

    def _parts(self) -> list[Vectors]:
        if not self.factored:
            return [Vectors(self.key, "second_moment", lambda a, b: a * b)]
        rows = Vectors(f"{self.key}_row", "second_moment", lambda a, b: a)
        return [rows, Vectors(f"{self.key}_col", "second_moment", lambda a, b: b)]


@dataclass(frozen=True)
class FirstMoment:
    """The running mean of each block's entries, in the state of its tensor; quantized, in units of √v.

    On m itself the step of a quantizer's grid is that of its largest entries, and zero need not be on the grid: what is
    much smaller, because its gradients are, would keep a noise that m/√v multiplies without bound. Of m/√v the noise is
    a fixed share. Where v is 0, a quantized m is.

    Attributes:
        key: Its state key, or the prefix of three.
        storage: How it is stored.
    """

    key: str
    storage: Storage

    def specs(self, regions: Sequence[Region]) -> dict[str, TensorSpec]:
        """Describe its state."""
        return self._vectors().specs(regions)

    def read(self, state: Mapping[str, Tensor], piece: Piece, root: Sequence[Tensor]) -> Tensor:
        """Return the mean, float32 [blocks, a, b], given the factors of √v with which it was written.

        What is stored in float32 may come as a view.
        """
        m = self._vectors().read(state, piece).view(-1, piece.region.a, piece.region.b)
        for factor in root if self.storage in _FORMATS else ():
            m.mul_(factor)
        return m

    def write_(self, state: Mapping[str, Tensor], piece: Piece, m: Tensor, root: Sequence[Tensor]) -> None:
        """Store float32 m [blocks, a, b], given the factors of the stored √v."""
        if self.storage in _FORMATS:
            first, *others = [(1 / factor).nan_to_num_(nan=torch.nan, posinf=0) for factor in root]
            m = m * first
            for inverse in others:
                m.mul_(inverse)
        self._vectors().write_(state, piece, m.flatten(1))

    def _vectors(self) -> Vectors:
        return Vectors(self.key, "first_moment", lambda a, b: a * b, self.storage)
