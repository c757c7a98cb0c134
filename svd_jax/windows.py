"""The windows of padded images that a convolution multiplies by its kernel: a patch an output."""

import math
from collections.abc import Sequence

import jax

# Zeros around the image: top and bottom, left and right.
Padding = tuple[tuple[int, int], tuple[int, int]]


def outputs(image: Sequence[int], kernel: Sequence[int], padding: Padding) -> tuple[int, int]:
    """How many there are: rows and columns, given those of an image and of a kernel."""
    rows, columns = (n + sum(p) - k + 1 for n, k, p in zip(image, kernel, padding, strict=True))
    return rows, columns


def nbytes(x: jax.Array, kernel: jax.Array, padding: Padding) -> int:
    """What the patches of one of the images (B, H, W, C) take, with (height, width, C, F)."""
    patches = outputs(x.shape[1:3], kernel.shape[:2], padding)
    return math.prod(patches) * math.prod(kernel.shape[:3]) * x.dtype.itemsize


def matrix(kernel: jax.Array) -> jax.Array:
    """What multiplies the patches: (height, width, C, F) to (height * width * C, F)."""
    return kernel.reshape(math.prod(kernel.shape[:3]), kernel.shape[3])
