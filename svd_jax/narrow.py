"""Convolutions of few features on CPUs: the batch innermost, as many patches as fit in the cache.

The patches are formed once, for the mean, the variance and the gradients of both, as matrix
products; where they are too many, in a loop over blocks of the batch, and again for the gradients.
All of it runs on arrays of shape (C, H, W, B): there a patch is made of long contiguous runs,
however few the channels. The transposes from and to (B, H, W, C) at the ends of each function meet
and cancel where one of them feeds another.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from svd_jax import blocks, math, noise, windows, winograd
from svd_jax.windows import Padding

Arrays = tuple[jax.Array, ...]

# What the patches of a block may take.
_MOST_BYTES = 2**24
# Images in a block: the runs of fewer are short.
_FEWEST = 16

# (B, H, W, C) to (C, H, W, B), and back.
TURN = (3, 1, 2, 0)


def apply(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, padding: Padding) -> jax.Array:
    """The convolution of (B, H, W, C), with a kernel (height, width, C, F) and a bias (F,)."""
    size = _block(x, kernel, padding)

    def convolved(x: jax.Array) -> Arrays:
        (y,) = _convolve(_channels_first(x, padding), (kernel,), False)
        return (_add_bias(y, bias).transpose(TURN),)

    return blocks.map(convolved, size, (x,))[0]


def sample(
    x: jax.Array,
    kernel: jax.Array,
    sigma2: jax.Array,
    bias: jax.Array | None,
    padding: Padding,
    key: jax.Array,
) -> jax.Array:
    """The convolution with a random kernel; see :func:`svd_jax.linear.sample`."""
    size = _block(x, kernel, padding)
    whole = size == len(x)

    def sampled(x: jax.Array, key: jax.Array) -> Arrays:
        mean, variance = _convolve(_channels_first(x, padding), (kernel, sigma2), whole)
        y = math.reparameterise(mean, variance, noise.standard_normal(key, mean.shape))
        return (_add_bias(y, bias).transpose(TURN),)

    return blocks.map(sampled, size, (x,), key)[0]


def _block(x: jax.Array, kernel: jax.Array, padding: Padding) -> int:
    """How many images to take at a time."""
    size = blocks.size(len(x), windows.nbytes(x, kernel, padding), _MOST_BYTES)
    return size if size >= _FEWEST else len(x)


def _channels_first(x: jax.Array, padding: Padding) -> jax.Array:
    """(B, H, W, C) to (C, H, W, B), padded with zeros."""
    return jnp.pad(x.transpose(TURN), ((0, 0), *padding, (0, 0)))


def _patches(x: jax.Array, height: int, width: int) -> jax.Array:
    """(C, H, W, B) to (height * width * C, h * w * B): a column for every output."""
    channels, rows, columns, batch = x.shape
    h, w = rows - height + 1, columns - width + 1
    x = jnp.concatenate([x[:, :, j : j + w] for j in range(width)])
    x = jnp.concatenate([x[:, i : i + h] for i in range(height)])
    return x.reshape(height * width * channels, h * w * batch)


def _fold_axis(windows: jax.Array, axis: int) -> jax.Array:
    """Sums windows[k] shifted by k along an axis: (size, ..., n, ...) to (..., n + size - 1, ...).

    Position by position, because XLA makes one fast loop of a concatenation of sums, and
    twenty-five slow ones of a sum of padded arrays.
    """
    size, n = windows.shape[0], windows.shape[axis + 1]
    return jnp.concatenate(
        [
            sum(
                lax.slice_in_dim(windows[k], at - k, at - k + 1, axis=axis)
                for k in range(max(0, at - n + 1), min(size - 1, at) + 1)
            )
            for at in range(n + size - 1)
        ],
        axis,
    )


def _fold(patches: jax.Array, shape: tuple[int, ...], height: int, width: int) -> jax.Array:
    """The transpose of :func:`_patches`: sums what was copied from the same input."""
    channels, rows, columns, batch = shape
    windows = patches.reshape(
        height, width, channels, rows - height + 1, columns - width + 1, batch
    )
    return _fold_axis(_fold_axis(windows, 2), 2)


def _patches_of(x: jax.Array, kernels: Sequence[jax.Array]) -> Arrays:
    """Of what each kernel multiplies."""
    return tuple(_patches(p, *kernels[0].shape[:2]) for p in winograd.powers(x, len(kernels)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernels: Arrays, keep: bool) -> Arrays:
    """Outputs (F, h, w, B) of x (C, H, W, B) with the first kernel, and of its squares with the
    second if there is one. The patches may be kept for the gradients."""
    return _convolve_fwd(x, kernels, keep)[0]


def _convolve_fwd(x: jax.Array, kernels: Arrays, keep: bool) -> tuple[Arrays, tuple]:
    height, width, _, features = kernels[0].shape
    _, rows, columns, batch = x.shape
    patches = _patches_of(x, kernels)
    outputs = tuple(
        (windows.matrix(kernel).T @ p).reshape(
            features, rows - height + 1, columns - width + 1, batch
        )
        for kernel, p in zip(kernels, patches, strict=True)
    )
    return outputs, (x, patches if keep else None, kernels)


def _convolve_bwd(keep: bool, residuals: tuple, gradients: Arrays) -> tuple[jax.Array, Arrays]:
    x, patches, kernels = residuals
    size = kernels[0].shape[:2]
    flat = [gradient.reshape(gradient.shape[0], -1) for gradient in gradients]
    of_x, *of_squares = (
        _fold(windows.matrix(kernel) @ gradient, x.shape, *size)
        for kernel, gradient in zip(kernels, flat, strict=True)
    )
    for of_square in of_squares:
        of_x = of_x + 2 * x * of_square
    return of_x, tuple(
        (gradient @ p.T).T.reshape(kernel.shape)
        for kernel, gradient, p in zip(
            kernels, flat, patches if keep else _patches_of(x, kernels), strict=True
        )
    )


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias[:, None, None, None]
