"""A few images at a time, so that what is formed of them fits in the processor's cache."""

from collections.abc import Sequence

import jax

# What one array formed of a block may take. Twice or half as much is as fast.
BYTES = 2**22


def size(batch: int, bytes_per_image: int) -> int:
    """How many images to take at a time: a divisor of the batch, so that no block is ragged."""
    most = max(1, min(batch, BYTES // bytes_per_image))
    return max(n for n in range(1, most + 1) if batch % n == 0)


def split(size: int, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Arrays (batch, ...) to (blocks, size, ...)."""
    return tuple(a.reshape(-1, size, *a.shape[1:]) for a in arrays)
