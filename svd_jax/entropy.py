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

# A column's share of entries is believed as much as the mean over so many rows; that of the cells
# with as many neighbours as much as the mean of all over so many cells.
_TRUST = 96
_TRUST_NEAR = 16

# Symbols are coded in blocks that all have the probabilities learnt before. A block is an eighth of
# what came before, or one while that is less than this; no block has more cells than that.
_SINGLY = 4096
_BLOCK = 2**16

# No boolean is thought to be rarer.
_RAREST = 2.0**-16
_BOOLEAN = model.Bernoulli(perfect=False)

# Whole numbers are coded in pieces of so many bits.
_PIECE_BITS = 16

# How many symbols are in memory at once, beside what they tell.
_PART = 2**18

# Symbols that are certain take next to no room, so without a limit a small file could be hours of
# work. A call of the coder takes as long as so many symbols; so many are free, a few seconds of
# work; then every byte pays for so many.
_CALL = 2**9
_FREE = 2**26
_OF_A_BYTE = 2**12


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
            return np.full(count, self._UNKNOWN, np.int8)
        kinds = np.where(alive, np.int8(self._ALIVE), np.int8(self._DEAD))
        return np.resize(kinds, count)


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
        self._work = 0

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        assert symbols is not None
        symbols = np.ascontiguousarray(symbols, np.int32)
        if count:
            self._encoder.encode(symbols, model, *each)
            self._work += count + _CALL
        return symbols

    def finish(self) -> bytes:
        """What was written; zeros at the end of the last word go without saying.

        Unless they pay for the work: see :class:`Reader`.
        """
        data = self._encoder.get_compressed().astype('<u4').tobytes()
        data = data[:-4] + data[-4:].rstrip(b'\0')
        return data.ljust(-(-max(0, self._work - _FREE) // _OF_A_BYTE), b'\0')


class Reader:
    """Reads what a :class:`Writer` wrote.

    It raises ValueError once that takes more work than so many bytes may ask for.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.units = Units()
        self._work = _FREE + _OF_A_BYTE * len(data)
        words = np.zeros(-(-len(data) // 4), '<u4')
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        self._decoder = constriction.stream.queue.RangeDecoder(words.astype(np.uint32, copy=False))

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        if not count:
            return np.zeros(0, np.int32)
        self._work -= count + _CALL
        if self._work < 0:
            raise ValueError('it declares more than so few bytes hold')
        return self._decoder.decode(model, *(each or (count,)))


class _Histogram:
    """A model of symbols that learns how frequent each is."""

    def __init__(self, prior: np.ndarray) -> None:
        self._counts = prior.astype(np.int64)

    def code(self, coder: Coder, symbols: np.ndarray | None, count: int) -> Iterator[np.ndarray]:
        """Codes symbols that all have the probabilities learnt so far, and learns from them."""
        frequencies = model.Categorical(self._counts / self._counts.sum(), perfect=False)
        for part in _parts(slice(0, count)):
            given = None if symbols is None else symbols[part]
            coded = coder.code(given, part.stop - part.start, frequencies)
            self._counts += 16 * np.bincount(coded, minlength=len(self._counts))
            yield coded


def adaptive(coder: Coder, symbols: np.ndarray | None, count: int, prior: np.ndarray) -> np.ndarray:
    """Codes symbols by how frequent each was before, in pieces that grow.

    Args:
      coder: writes or reads.
      symbols: (count,), when writing; below the length of ``prior``.
      count: how many.
      prior: whole numbers above 0: how frequent each symbol is thought to be; a symbol seen counts
        16.

    Returns:
      The symbols, of the smallest type that holds them.
    """
    histogram, at = _Histogram(prior), 0
    result = np.zeros(count, np.min_scalar_type(len(prior) - 1))
    while at < count:
        size = min(count - at, 8 + at // 4)
        piece = None if symbols is None else symbols[at : at + size]
        for coded in histogram.code(coder, piece, size):
            result[at : at + len(coded)] = coded
            at += len(coded)
    return result


def whole_numbers(coder: Coder, values: np.ndarray | None, count: int, bits: int) -> np.ndarray:
    """Codes whole numbers below ``2**bits``, all of them equally likely.

    Returns:
      The numbers, of the smallest unsigned type that holds them, (count,).
    """
    result = np.zeros(count, np.min_scalar_type((1 << bits) - 1))
    word = result.dtype.type
    for low in range(0, bits, _PIECE_BITS):
        size = 1 << min(_PIECE_BITS, bits - low)
        for part in _parts(slice(0, count)):
            piece = None if values is None else (values[part] >> word(low)) & word(size - 1)
            symbols = coder.code(piece, part.stop - part.start, model.Uniform(size))
            result[part] |= symbols.astype(word) << word(low)
    return result


def positions(coder: Coder, mask: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """Codes where the entries of a sparse matrix are.

    First which columns and which rows have any; then, where such rows and columns cross, every
    cell, by how many entries its column had before, and how many its neighbours have.

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
    columns = _flags(coder, given[1], coder.units.of_columns(shape[1]), None)
    neighbours = coder.units.neighbours(shape[0])
    if shape[0] == 1:
        rows = np.array([columns.any()])
    else:
        rows = _flags(coder, given[0], coder.units.of_rows(shape[0]), neighbours)
    coder.units.learn(columns, shape[0])
    if rows.all() and columns.all():
        return _cells(coder, mask, shape, _above(rows, neighbours))
    inside = np.ix_(rows, columns)
    given_inside = None if mask is None else mask[inside]
    counts = int(rows.sum()), int(columns.sum())
    cells = _cells(coder, given_inside, counts, _above(rows, neighbours))
    result = np.zeros(shape, bool)
    result[inside] = cells
    return result


def _above(rows: np.ndarray, neighbours: tuple[int, ...]) -> np.ndarray:
    """For every row with entries, which of these its neighbours are; -1: none of them."""
    place = np.where(rows, np.cumsum(rows) - 1, -1)
    at = np.flatnonzero(rows)
    missing = [at < distance for distance in neighbours]
    found = [np.where(m, -1, place[at - d]) for m, d in zip(missing, neighbours, strict=True)]
    return np.array(found, np.int64).reshape(len(neighbours), len(at))


def _flags(
    coder: Coder, flags: np.ndarray | None, guess: np.ndarray, neighbours: tuple[int, ...] | None
) -> np.ndarray:
    """Codes booleans by what was guessed of each, and by how many of its neighbours are true.

    Args:
      coder: writes or reads.
      flags: the booleans, when writing.
      guess: of each, see :class:`Units`.
      neighbours: how far before it they are; None: one, the last before the block.

    Returns:
      The booleans.
    """
    count, kinds = len(guess), 2 if neighbours is None else len(neighbours) + 1
    result = np.zeros(count, np.int8)
    seen = np.ones((3 * kinds, 2))
    _flags_singly(coder, flags, guess, (1,) if neighbours is None else neighbours, result, seen)
    for block in blocks(count, min(neighbours or (), default=count), _SINGLY, _SINGLY):
        chance, last = seen[:, 1] / seen.sum(1), result[block.start - 1]
        for part in _parts(block):
            near = last if neighbours is None else sum_before(result, part, neighbours)
            kind = guess[part] * kinds + near
            given = None if flags is None else flags[part]
            result[part] = bits(coder, given, chance[kind])
            _count(seen, kind, result[part], 2)
    return result.view(bool)


def _flags_singly(
    coder: Coder,
    flags: np.ndarray | None,
    guess: np.ndarray,
    neighbours: tuple[int, ...],
    result: np.ndarray,
    seen: np.ndarray,
) -> None:
    """The first of them, one by one: for that, Python's numbers are faster than arrays."""
    kinds, counts = len(neighbours) + 1, seen.tolist()
    told: list[int] = []
    for at, guessed in enumerate(guess[:_SINGLY].tolist()):
        kind = guessed * kinds + sum(told[at - d] for d in neighbours if d <= at)
        chance = min(max(counts[kind][1] / sum(counts[kind]), _RAREST), 1 - _RAREST)
        given = None if flags is None else flags[at : at + 1]
        symbol = int(coder.code(given, 1, _BOOLEAN, np.array([chance]))[0])
        counts[kind][symbol] += 2
        told.append(symbol)
    result[: len(told)], seen[:] = told, counts


def _count(seen: np.ndarray, kind: np.ndarray, symbols: np.ndarray, each: int) -> None:
    """Learns from booleans of several kinds; seen: (kinds, 2), to which each adds so much."""
    seen += each * np.bincount(2 * kind + symbols, minlength=seen.size).reshape(seen.shape)


def _cells(
    coder: Coder, mask: np.ndarray | None, shape: tuple[int, int], above: np.ndarray
) -> np.ndarray:
    """Codes booleans by the share of true ones before, in their column and with such neighbours.

    Args:
      coder: writes or reads.
      mask: the booleans, of this shape, when writing.
      shape: rows and columns.
      above: see :func:`_above`, (neighbours, rows).

    Returns:
      The booleans.
    """
    rows, columns = shape
    if min(rows, columns) <= 1:  # every row and every column has an entry
        return np.ones(shape, bool)
    result = np.zeros((rows + 1, columns), np.int8)  # the last one: where there is no neighbour
    seen, near_seen = np.zeros(columns), np.zeros((len(above) + 1, 2))
    nearest = above.max(0, initial=-1)
    at = 0
    while at < rows:
        size = min(max(1, min(at // 8, _BLOCK // columns)), rows - at)
        # No row of a block has a neighbour there.
        block = slice(at, at + (int(np.argmax(nearest[at : at + size] >= at)) or size))
        share = (seen.sum() + columns / 8) / (at * columns + columns)
        shares = (near_seen[:, 1] + _TRUST_NEAR * share) / (near_seen.sum(1) + _TRUST_NEAR)
        for part in _parts(slice(0, columns)):  # several only where a block is a single row
            near = np.zeros((block.stop - at, part.stop - part.start), np.int8)
            for neighbours in above[:, block]:
                near += result[neighbours, part]
            chance = (seen[part] + _TRUST * shares[near]) / (at + _TRUST)
            given = None if mask is None else mask[block, part].reshape(-1)
            symbols = bits(coder, given, chance.reshape(-1))
            result[block, part] = symbols.reshape(near.shape)
            _count(near_seen, near.reshape(-1), symbols, 1)
        seen += result[block].sum(0)
        at = block.stop
    return result[:rows].view(bool)


def blocks(count: int, largest: int, singly: int = _SINGLY, at: int = 0) -> Iterator[slice]:
    """Parts of a whole from here on, no larger than so, that grow with what came before."""
    while at < count:
        size = 1 if at < singly else max(1, min(at // 8, largest))
        yield slice(at, min(at + size, count))
        at += size


def _parts(block: slice) -> Iterator[slice]:
    """A block in parts that take little memory."""
    for at in range(block.start, block.stop, _PART):
        yield slice(at, min(at + _PART, block.stop))


def sum_before(values: np.ndarray, block: slice, distances: tuple[int, ...]) -> np.ndarray:
    """The sum of what is so far before the entries of a block; nothing is before the first."""
    result = np.zeros_like(values[block])
    for distance in distances:
        missing = min(max(0, distance - block.start), len(result))
        result[missing:] += values[block.start + missing - distance : block.stop - distance]
    return result


def bits(coder: Coder, flags: np.ndarray | None, chance: np.ndarray) -> np.ndarray:
    """Codes booleans by the chance that each is true; int32."""
    chance = np.clip(chance, _RAREST, 1 - _RAREST)
    symbols = None if flags is None else flags.astype(np.int32)
    return coder.code(symbols, len(chance), _BOOLEAN, chance)
