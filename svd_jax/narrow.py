"""Convolutions of few features on CPUs: the batch innermost, all patches at once.

The patches are formed once (again for the gradients, where they are too large to keep) and serve
the mean, the variance and the gradients of both, as matrix products. All of it runs on arrays of
shape (C, H, W, B): there a patch is made of long contiguous runs, however few the channels. The
transposes from and to (B, H, W, C) at the ends of each function meet and cancel where one of them
feeds another.
"""

import jax
import jax.numpy as jnp
from jax import lax

from svd_jax import math, noise
from svd_jax.wide import Padding

Pair = tuple[jax.Array, jax.Array]

# Larger patches are formed again for the gradients: their memory would cost more than their time.
_MOST_BYTES_KEPT = 2**25

# (B, H, W, C) to (C, H, W, B), and back.
TURN = (3, 1, 2, 0)


def apply(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, padding: Padding) -> jax.Array:
    """The convolution of (B, H, W, C), with a kernel (height, width, C, F) and a bias (F,)."""
    return _add_bias(_convolve(_channels_first(x, padding), kernel), bias).transpose(TURN)


def sample(
    x: jax.Array,
    kernel: jax.Array,
    sigma2: jax.Array,
    bias: jax.Array | None,
    padding: Padding,
    key: jax.Array,
) -> jax.Array:
    """The convolution with a random kernel; see :func:`svd_jax.linear.sample`."""
    mean, variance = _moments(_channels_first(x, padding), kernel, sigma2)
    y = math.reparameterise(mean, variance, noise.standard_normal(key, mean.shape))
    return _add_bias(y, bias).transpose(TURN)


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


def _matrix(kernel: jax.Array) -> jax.Array:
    """(height, width, C, F) to (height * width * C, F)."""
    return kernel.reshape(-1, kernel.shape[-1])


def _output_shape(x: jax.Array, kernel: jax.Array) -> tuple[int, ...]:
    height, width, _, features = kernel.shape
    _, rows, columns, batch = x.shape
    return features, rows - height + 1, columns - width + 1, batch


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(C, H, W, B) to (F, h, w, B)."""
    y = _matrix(kernel).T @ _patches(x, *kernel.shape[:2])
    return y.reshape(_output_shape(x, kernel))


@jax.custom_vjp
def _moments(x: jax.Array, kernel: jax.Array, sigma2: jax.Array) -> Pair:
    return _convolve(x, kernel), _convolve(x * x, sigma2)


def _moments_fwd(x: jax.Array, kernel: jax.Array, sigma2: jax.Array) -> tuple[Pair, tuple]:
    shape, size = _output_shape(x, kernel), kernel.shape[:2]
    patches, squares = _patches(x, *size), _patches(x * x, *size)
    mean = (_matrix(kernel).T @ patches).reshape(shape)
    variance = (_matrix(sigma2).T @ squares).reshape(shape)
    kept = (patches, squares) if patches.nbytes <= _MOST_BYTES_KEPT else None
    return (mean, variance), (x, kept, kernel, sigma2)


def _moments_bwd(residuals: tuple, gradients: Pair) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kept, kernel, sigma2 = residuals
    size = kernel.shape[:2]
    patches, squares = kept or (_patches(x, *size), _patches(x * x, *size))
    of_mean, of_variance = (g.reshape(g.shape[0], -1) for g in gradients)
    through_mean, through_variance = (
        _fold(_matrix(weight) @ gradient, x.shape, *size)
        for weight, gradient in ((kernel, of_mean), (sigma2, of_variance))
    )
    return (
        through_mean + 2 * x * through_variance,
        (of_mean @ patches.T).T.reshape(kernel.shape),
        (of_variance @ squares.T).T.reshape(sigma2.shape),
    )


_moments.defvjp(_moments_fwd, _moments_bwd)


def _add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias[:, None, None, None]
