"""How arrays are written into a file: exactly, or quantised.

Every array is a sparse matrix: its last axis makes the columns, the others the rows. Entries are
what is not zero (of floating-point numbers, what is not +0, bit by bit).
"""

import math

import ml_dtypes
import numpy as np

from svd_jax import entropy
from svd_jax.entropy import Coder

# Floating-point types: sign and exponent bits, mantissa bits.
_FLOATS = {
    np.dtype(np.float32): (9, 23),
    np.dtype(ml_dtypes.bfloat16): (9, 7),
    np.dtype(np.float16): (6, 10),
    np.dtype(np.float64): (12, 52),
}

# Magnitudes below this have a symbol each; larger ones share one for each length in bits.
_OWN_BITS = 4
_OWN = 1 << _OWN_BITS
_LARGEST_BITS = 31


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of an array as a matrix."""
    columns = shape[-1] if shape else 1
    return math.prod(shape[:-1]), columns


def exact(
    coder: Coder, array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Codes an array bit by bit.

    Args:
      coder: writes or reads.
      array: of this shape and type, when writing.
      shape: of the array.
      dtype: of the array.

    Returns:
      The array.
    """
    if dtype not in _FLOATS:
        return _bytes(coder, array, shape, dtype)
    high, low = _FLOATS[dtype]
    words = np.dtype(f'u{dtype.itemsize}')
    bits = None if array is None else np.ascontiguousarray(array).reshape(-1).view(words)
    mask = _positions(coder, None if bits is None else bits != 0, shape)
    result = np.zeros(mask.shape, words)
    count = int(np.count_nonzero(mask))
    entries = None if bits is None else bits[mask]
    heads = tails = None
    if entries is not None:
        heads, tails = entries >> words.type(low), entries & words.type((1 << low) - 1)
    heads = entropy.adaptive(coder, heads, count, np.ones(1 << high, np.int64))
    tails = entropy.whole_numbers(coder, tails, count, low)
    entries = heads.astype(words)
    entries <<= words.type(low)
    entries |= tails
    result[mask] = entries
    return result.view(dtype).reshape(shape)


def _bytes(
    coder: Coder, array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    symbols = None
    if array is not None:
        symbols = np.frombuffer(array.astype(dtype.newbyteorder('<')).tobytes(), np.uint8)
    symbols = entropy.adaptive(coder, symbols, count, np.ones(256, np.int64))
    if dtype.kind == 'b' and symbols.max(initial=0) > 1:
        raise ValueError('a boolean is neither 0 nor 1')
    little = symbols.view(dtype.newbyteorder('<'))
    return little.astype(dtype, copy=False).reshape(shape)


def _positions(coder: Coder, mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of the entries, flat."""
    rows_columns = matrix_shape(shape)
    mask = None if mask is None else mask.reshape(rows_columns)
    return entropy.positions(coder, mask, rows_columns).reshape(-1)


def quantised(
    coder: Coder, levels: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes whole numbers, most of them small.

    Args:
      coder: writes or reads.
      levels: of this shape, when writing; below ``2**31`` in size.
      shape: of the array.

    Returns:
      Where they are not zero, booleans of the shape; and the numbers there, int64, (count,).
    """
    mask = _positions(coder, None if levels is None else levels != 0, shape)
    count = int(np.count_nonzero(mask))
    sizes = None if levels is None else np.abs(levels.reshape(-1)[mask]) - 1
    entries = _magnitudes(coder, sizes, count) + 1
    negative = None if levels is None else levels.reshape(-1) < 0
    entries *= _signs(coder, negative, mask, shape)[mask]
    return mask.reshape(shape), entries


def _signs(
    coder: Coder, negative: np.ndarray | None, mask: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Codes the signs of the entries, by those of neighbouring rows in the same column; flat.

    Returns:
      1, -1, or 0 where there is no entry, int8.
    """
    if len(shape) < 2:  # the entries of a vector are coded one after the other
        shape = (*shape, 1)
    rows, columns = matrix_shape(shape)
    neighbours = coder.units.neighbours(rows) if columns > 1 else ()
    mask = mask.reshape(rows, columns)
    result = np.zeros((rows, columns), np.int8)
    seen = np.ones((3, 2))  # by the neighbours' sign: so many positive, so many negative
    for block in entropy.blocks(rows, min(neighbours, default=rows)):
        inside = mask[block]
        if not inside.any():
            continue
        near = np.sign(entropy.sum_before(result, block, neighbours))[inside]
        chance = seen[near, 1] / seen[near].sum(1)
        flags = None if negative is None else negative.reshape(rows, columns)[block][inside]
        symbols = entropy.bits(coder, flags, chance)
        np.add.at(seen, (near, symbols), 2)
        result[block][inside] = 1 - 2 * symbols
    return result.reshape(-1)


def _magnitudes(coder: Coder, sizes: np.ndarray | None, count: int) -> np.ndarray:
    """Codes whole numbers from 0, the smaller the more likely; int64."""
    symbols = None
    if sizes is not None:
        lengths = np.frexp(sizes.astype(np.float64))[1]  # in bits
        symbols = np.where(sizes < _OWN, sizes, _OWN + lengths - _OWN_BITS - 1)
    kinds = _OWN + _LARGEST_BITS - _OWN_BITS
    prior = np.maximum(1, 32 >> np.minimum(np.arange(kinds) // 2, 5))
    symbols = entropy.adaptive(coder, symbols, count, prior)
    result = symbols.astype(np.int64)
    for symbol in range(_OWN, int(symbols.max(initial=0)) + 1):
        of_length = symbols == symbol
        low = symbol - _OWN + _OWN_BITS  # bits below the first, which is 1
        rest = None if sizes is None else (sizes[of_length] - (1 << low)).astype(np.uint64)
        rest = entropy.whole_numbers(coder, rest, int(np.count_nonzero(of_length)), low)
        result[of_length] = (1 << low) + rest.astype(np.int64)
    return result
