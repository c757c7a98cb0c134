"""A few images at a time, so that what is formed of them fits in the processor's cache."""

from collections.abc import Callable, Sequence

import jax
from jax import lax

# What one array formed of a block may take, channels innermost. Twice or half as much is as fast.
BYTES = 2**22


def size(batch: int, bytes_per_image: int, most_bytes: int) -> int:
    """How many images to take at a time: a divisor of the batch, so that no block is ragged."""
    most = max(1, min(batch, most_bytes // max(1, bytes_per_image)))
    return max(n for n in range(1, most + 1) if batch % n == 0)


def split(size: int, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Arrays (batch, ...) to (blocks, size, ...)."""
    return tuple(a.reshape(-1, size, *a.shape[1:]) for a in arrays)


def map(
    function: Callable[..., tuple[jax.Array, ...]],
    size: int,
    arrays: Sequence[jax.Array],
    *more: jax.Array,
) -> tuple[jax.Array, ...]:
    """A function of some images, applied to all: block by block, unless they are one.

    Args:
      function: from arrays (size, ...), and an element of each of ``more``, to arrays (size, ...).
      size: as from :func:`size`.
      arrays: (batch, ...).
      more: (blocks, ...), such as keys.

    Returns:
      Arrays (batch, ...).
    """
    batch = arrays[0].shape[0]
    if size == batch:
        return function(*arrays, *(m[0] for m in more))
    pieces = lax.map(lambda block: function(*block), (*split(size, arrays), *more))
    return tuple(piece.reshape(batch, *piece.shape[2:]) for piece in pieces)
