"""Entropy coding of sparse matrices: positions and values, by models that adapt as they go.

What is written and what is read is described once: every function here takes a coder that either
writes the symbols given or reads them, and returns them either way. So the models of both sides
cannot disagree. Probabilities are quotients of whole numbers, and products of such: every machine
computes the same.
"""

from typing import Any, Protocol

import constriction
import numpy as np

model = constriction.stream.model

# Rows with so many entries at most name them one after the other; others, all columns at once.
_FEW = 8

# How many entries a row has: these numbers as they are, then two symbols for what is more.
_COUNTS = 31
_FULL, _MORE = _COUNTS, _COUNTS + 1

# Whole numbers are coded in pieces of so many bits.
_PIECE_BITS = 16


class Coder(Protocol):
    """Writes symbols, or reads them."""

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
        self._encoder = constriction.stream.queue.RangeEncoder()

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        assert symbols is not None
        symbols = np.ascontiguousarray(symbols, np.int32)
        if count:
            self._encoder.encode(symbols, model, *each)
        return symbols

    def finish(self) -> bytes:
        """What was written, in words of four bytes."""
        return self._encoder.get_compressed().astype('<u4').tobytes()


class Reader:
    """Reads what a :class:`Writer` wrote."""

    def __init__(self, data: bytes) -> None:
        self._decoder = constriction.stream.queue.RangeDecoder(
            np.frombuffer(data, '<u4').astype(np.uint32)
        )

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

    Row by row: how many entries it has, by how many the row before it had; then which columns
    they are in, by how often each column had one before. So rows and columns without any cost next
    to nothing.

    Args:
      coder: writes or reads.
      mask: booleans of this shape, when writing.
      shape: rows and columns.

    Returns:
      The mask.
    """
    rows, columns = shape
    result = np.zeros(shape, bool)
    if not result.size:
        return result
    prior = np.ones(_COUNTS + 2, np.int64)
    prior[[0, 1, 2, 3, _FULL, _MORE]] = 8, 4, 2, 2, 4, 4
    models = [_Histogram(prior) for _ in range(5)]  # by the count of the row before
    seen = np.zeros(columns, np.int64)
    before = entries = 0
    for row in range(rows):
        given = None if mask is None else mask[row]
        before = _count(coder, given, columns, models[min(before, 4)])
        if before == columns:
            result[row] = True
        elif before:
            # What a column is expected to have: what it had, and half an entry and eight rows' mean
            # that are thought to have been there before. In whole numbers, times the cells so far.
            cells = max(1, row * columns)
            expected = 2 * seen * cells + cells + 16 * entries
            code = _one_by_one if before <= _FEW else _at_once
            result[row] = code(coder, given, before, expected)
        seen += result[row]
        entries += before
    return result


def _count(coder: Coder, row: np.ndarray | None, columns: int, histogram: _Histogram) -> int:
    """How many entries a row has."""
    symbol, number = None, None
    if row is not None:
        entries = int(np.count_nonzero(row))
        name = _FULL if entries == columns else min(entries, _MORE)
        if _COUNTS <= entries < columns:
            name = _MORE
        symbol, number = np.array([name], np.int32), np.array([entries], np.uint64)
    (name,) = histogram.code(coder, symbol, 1).tolist()
    if name == _FULL:
        return columns
    if name == _MORE:
        (entries,) = whole_numbers(coder, number, 1, columns.bit_length()).tolist()
        return min(entries, columns)
    return min(name, columns)


def _one_by_one(
    coder: Coder, row: np.ndarray | None, count: int, weights: np.ndarray
) -> np.ndarray:
    """The entries of a row from left to right, each by the chance that it is the next."""
    result = np.zeros(len(weights), bool)
    places = None if row is None else np.flatnonzero(row)
    after = np.cumsum(weights[::-1])[::-1]
    start = 0
    for place in range(count):
        left = count - place
        stop = len(weights) - left + 1  # room for the others
        if stop - start > 1:
            chance = np.minimum(left * weights[start:stop] / after[start:stop], 1 - 2.0**-20)
            none_before = np.cumprod(np.concatenate([[1.0], 1 - chance[:-1]]))
            choice = None if places is None else places[place : place + 1] - start
            (ahead,) = coder.code(
                choice, 1, model.Categorical(chance * none_before, perfect=False)
            ).tolist()
            start += ahead
        result[start] = True
        start += 1
    return result


def _at_once(coder: Coder, row: np.ndarray | None, count: int, weights: np.ndarray) -> np.ndarray:
    """All columns of a row, each by its own chance of an entry."""
    chance = np.clip(count * weights / weights.sum(), 2.0**-16, 1 - 2.0**-16)
    symbols = None if row is None else row.astype(np.int32)
    return coder.code(symbols, len(weights), model.Bernoulli(perfect=False), chance).astype(bool)
