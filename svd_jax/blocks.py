"""A few images at a time, so that what is formed of them fits in the processor's cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Arrays = tuple[jax.Array, ...]

# What one array formed of a block may take, channels innermost. Twice or half as much is as fast.
BYTES = 2**22


def size(batch: int, bytes_per_image: int, most_bytes: int) -> int:
    """How many images to take at a time: a divisor of the batch, if one is large enough.

    Else the last block is filled up, by images of zeros.
    """
    most = max(1, min(batch, most_bytes // max(1, bytes_per_image)))
    divisor = max(n for n in range(1, most + 1) if batch % n == 0)
    return divisor if 2 * divisor > most else -(-batch // -(-batch // most))


def map(
    function: Callable[..., Arrays],
    size: int,
    arrays: Sequence[jax.Array],
    key: jax.Array | None = None,
) -> Arrays:
    """A function of some images, applied to all: block by block, unless they are one.

    Args:
      function: from arrays (size, ...), and a key if there is one, to arrays (size, ...).
      size: as from :func:`size`.
      arrays: (batch, ...).
      key: of which every block gets its own.

    Returns:
      Arrays (batch, ...).
    """
    if size == len(arrays[0]):
        return function(*arrays) if key is None else function(*arrays, key)
    blocks = _split(size, arrays)
    keys = () if key is None else (jax.random.split(key, len(blocks[0])),)
    return _join(lax.map(lambda block: function(*block), (*blocks, *keys)), len(arrays[0]))


def map_and_sum(
    function: Callable[..., tuple[Arrays, Any]], size: int, arrays: Sequence[jax.Array]
) -> tuple[Arrays, Any]:
    """The same with a second result, such as the gradient of a kernel: its sum over the blocks.

    Args:
      function: from arrays (size, ...) to arrays (size, ...) and a tree of arrays, zero for images
        of zeros.
      size: as from :func:`size`.
      arrays: (batch, ...).

    Returns:
      Arrays (batch, ...) and that tree.
    """
    if size == len(arrays[0]):
        return function(*arrays)
    blocks = _split(size, arrays)
    _, like = jax.eval_shape(function, *(block[0] for block in blocks))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    def add(sums: Any, block: Arrays) -> tuple[Any, Arrays]:
        pieces, terms = function(*block)
        return jax.tree.map(jnp.add, sums, terms), pieces

    sums, pieces = lax.scan(add, zeros, blocks)
    return _join(pieces, len(arrays[0])), sums


def _split(size: int, arrays: Sequence[jax.Array]) -> Arrays:
    """(batch, ...) to (blocks, size, ...)."""
    count = -(-len(arrays[0]) // size)

    def filled_up(array: jax.Array) -> jax.Array:
        missing = count * size - len(array)
        return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    return tuple(filled_up(array).reshape(count, size, *array.shape[1:]) for array in arrays)


def _join(pieces: Arrays, batch: int) -> Arrays:
    """(blocks, size, ...) to (batch, ...)."""
    return tuple(p.reshape(p.shape[0] * p.shape[1], *p.shape[2:])[:batch] for p in pieces)
