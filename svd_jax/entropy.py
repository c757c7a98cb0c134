"""Entropy coding of sparse matrices: positions and values, by models that adapt as they go.

What is written and what is read is described once: every function here takes a coder that either
writes the symbols given or reads them, and returns them either way. So the models of both sides
cannot disagree. Probabilities are sums, products and quotients, which IEEE 754 rounds alike on
every machine.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import constriction
import numpy as np

model = constriction.stream.model

# A column's share of entries is believed as much as the mean of all over so many rows.
_TRUST = 48

# Symbols are coded in blocks that all have the probabilities learnt before. A block is an eighth of
# what came before, or one while that is less than this; no block has more cells than that.
_SINGLY = 4096
_BLOCK = 2**16

# Whole numbers are coded in pieces of so many bits.
_PIECE_BITS = 16


class Units:
    """Which columns of the arrays so far have entries: what later arrays are guessed by.

    A unit of a network is a column of one layer's weights, an entry of its bias and a row of the
    next layer's weights, or a row for each position of an image. That is not known of an array but
    guessed by its size, and only used to choose between models, which learn how good it is.
    """

    _UNKNOWN, _DEAD, _ALIVE = range(3)
    _LARGEST_SIDE = 64

    def __init__(self) -> None:
        # By how many units there are: what the latest array told, and the latest matrix, last.
        self._columns: dict[int, np.ndarray] = {}
        self._rows: dict[int, np.ndarray] = {}

    def learn(self, alive: np.ndarray, rows: int) -> None:
        """Remembers which columns of an array have entries; a full vector says nothing."""
        size = len(alive)
        if size > 1 and rows > 1:
            self._rows.pop(size, None)
            self._rows[size] = alive
        if size > 1 and (rows > 1 or not alive.all()):
            self._columns[size] = alive

    def of_columns(self, count: int) -> np.ndarray:
        """A guess for each of so many columns."""
        return self._guess(self._columns.get(count), count)

    def of_rows(self, count: int) -> np.ndarray:
        """A guess for each of so many rows."""
        return self._guess(self._rows.get(self._size(count)), count)

    def neighbours(self, rows: int) -> tuple[int, ...]:
        """How far above a row are those of the positions to its left and above, if any are."""
        size = self._size(rows)
        side = math.isqrt(rows // size)
        if side**2 * size != rows or not 1 < side <= self._LARGEST_SIDE:
            return ()
        return size, size * side

    def _size(self, rows: int) -> int:
        """How many units the rows seem to belong to."""
        return next((size for size in reversed(self._rows) if rows % size == 0), 1)

    def _guess(self, alive: np.ndarray | None, count: int) -> np.ndarray:
        if alive is None:
            return np.full(count, self._UNKNOWN)
        return np.resize(np.where(alive, self._ALIVE, self._DEAD), count)


class Coder(Protocol):
    """Writes symbols, or reads them.

    Attributes:
      units: what the arrays so far tell of later ones.
    """

    units: Units

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        """Codes ``count`` symbols by a model, or by one with parameters for each.

        Args:
          symbols: int32, (count,), when writing; else None.
          count: how many.
          model: of constriction.
          each: parameters of the model, arrays (count,), if it has none yet.

        Returns:
          The symbols, int32, (count,).
        """


class Writer:
    """Writes symbols."""

    def __init__(self) -> None:
        self.units = Units()
        self._encoder = constriction.stream.queue.RangeEncoder()

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        assert symbols is not None
        symbols = np.ascontiguousarray(symbols, np.int32)
        if count:
            self._encoder.encode(symbols, model, *each)
        return symbols

    def finish(self) -> bytes:
        """What was written; zeros at the end of the last word go without saying."""
        data = self._encoder.get_compressed().astype('<u4').tobytes()
        return data[:-4] + data[-4:].rstrip(b'\0')


class Reader:
    """Reads what a :class:`Writer` wrote."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.units = Units()
        words = np.zeros(-(-len(data) // 4), '<u4')
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        self._decoder = constriction.stream.queue.RangeDecoder(words.astype(np.uint32, copy=False))

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        if not count:
            return np.zeros(0, np.int32)
        return self._decoder.decode(model, *(each or (count,)))


class _Histogram:
    """A model of symbols that learns how frequent each is."""

    def __init__(self, prior: np.ndarray) -> None:
        self._counts = prior.astype(np.int64)

    def code(self, coder: Coder, symbols: np.ndarray | None, count: int) -> np.ndarray:
        """Codes symbols that all have the probabilities learnt so far, then learns from them."""
        frequencies = model.Categorical(self._counts / self._counts.sum(), perfect=False)
        symbols = coder.code(symbols, count, frequencies)
        self._counts += 16 * np.bincount(symbols, minlength=len(self._counts))
        return symbols


def adaptive(coder: Coder, symbols: np.ndarray | None, count: int, prior: np.ndarray) -> np.ndarray:
    """Codes symbols by how frequent each was before, in pieces that grow.

    Args:
      coder: writes or reads.
      symbols: (count,), when writing; below the length of ``prior``.
      count: how many.
      prior: whole numbers above 0: how frequent each symbol is thought to be; a symbol seen counts
        16.

    Returns:
      The symbols.
    """
    histogram, pieces, at = _Histogram(prior), [], 0
    while at < count:
        size = min(count - at, 8 + at // 4)
        piece = None if symbols is None else symbols[at : at + size]
        pieces.append(histogram.code(coder, piece, size))
        at += size
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def whole_numbers(coder: Coder, values: np.ndarray | None, count: int, bits: int) -> np.ndarray:
    """Codes whole numbers below ``2**bits``, all of them equally likely; uint64, (count,)."""
    result = np.zeros(count, np.uint64)
    for low in range(0, bits, _PIECE_BITS):
        size = 1 << min(_PIECE_BITS, bits - low)
        piece = None if values is None else (values >> np.uint64(low)) & np.uint64(size - 1)
        symbols = coder.code(piece, count, model.Uniform(size))
        result |= symbols.astype(np.uint64) << np.uint64(low)
    return result


def positions(coder: Coder, mask: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """Codes where the entries of a sparse matrix are.

    First which columns and which rows have any; then, where such rows and columns cross, every
    cell, by how many entries its column had before.

    Args:
      coder: writes or reads.
      mask: booleans of this shape, when writing.
      shape: rows and columns.

    Returns:
      The mask.
    """
    if not math.prod(shape):
        return np.zeros(shape, bool)
    given = (None, None) if mask is None else (np.any(mask, 1), np.any(mask, 0))
    columns = _flags(coder, given[1], coder.units.of_columns(shape[1]), ())
    if shape[0] == 1:
        rows = columns.any(keepdims=True)
    else:
        guess, neighbours = coder.units.of_rows(shape[0]), coder.units.neighbours(shape[0])
        rows = _flags(coder, given[0], guess, neighbours)
    coder.units.learn(columns, shape[0])
    inside = np.ix_(rows, columns)
    cells = _cells(coder, None if mask is None else mask[inside], (rows.sum(), columns.sum()))
    if cells.shape == shape:
        return cells
    result = np.zeros(shape, bool)
    result[inside] = cells
    return result


def _flags(
    coder: Coder, flags: np.ndarray | None, guess: np.ndarray, neighbours: tuple[int, ...]
) -> np.ndarray:
    """Codes booleans by what was guessed of each, and by how many of its neighbours are true."""
    count = len(guess)
    result = np.zeros(count, np.int64)
    seen = np.ones((3, len(neighbours) + 1, 2))
    for block in blocks(count, min(neighbours, default=count)):
        near = sum_before(result, block, neighbours)
        kind = guess[block], near
        chance = seen[kind][:, 1] / seen[kind].sum(1)
        result[block] = bits(coder, None if flags is None else flags[block], chance)
        np.add.at(seen, (*kind, result[block]), 2)
    return result.astype(bool)


def _cells(coder: Coder, mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Codes booleans by the share of true ones before, in their column and in all."""
    rows, columns = shape
    if min(rows, columns) <= 1:  # every row and every column has an entry
        return np.ones(shape, bool)
    result, seen = np.zeros(shape, bool), np.zeros(columns)
    for block in blocks(rows, _BLOCK // columns, 0):
        at, part = block.start, result[block]
        share = (seen.sum() + columns / 8) / (at * columns + columns)
        chance = np.tile((seen + _TRUST * share) / (at + _TRUST), len(part))
        given = None if mask is None else mask[block].reshape(-1)
        part[:] = bits(coder, given, chance).reshape(part.shape)
        seen += part.sum(0)
    return result


def blocks(count: int, largest: int, singly: int = _SINGLY) -> Iterator[slice]:
    """Parts of a whole, no larger than this one, that grow with what came before."""
    at = 0
    while at < count:
        size = 1 if at < singly else max(1, min(at // 8, largest))
        yield slice(at, min(at + size, count))
        at += size


def sum_before(values: np.ndarray, block: slice, distances: tuple[int, ...]) -> np.ndarray:
    """The sum of what is so far before the entries of a block; nothing is before the first."""
    result = np.zeros_like(values[block])
    for distance in distances:
        missing = min(max(0, distance - block.start), len(result))
        result[missing:] += values[block.start + missing - distance : block.stop - distance]
    return result


def bits(coder: Coder, flags: np.ndarray | None, chance: np.ndarray) -> np.ndarray:
    """Codes booleans by the chance that each is true; int32."""
    chance = np.clip(chance, 2.0**-16, 1 - 2.0**-16)
    symbols = None if flags is None else flags.astype(np.int32)
    return coder.code(symbols, len(chance), model.Bernoulli(perfect=False), chance)
