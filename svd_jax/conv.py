"""Convolution for CPUs: patches and matrix products, with the batch innermost.

XLA's convolutions are slow on a CPU, their gradients slower, and slower still inside a loop. Where
a layer is an ordinary two-dimensional convolution, its patches are formed once (again for the
gradients, where they are too large to keep) and serve the mean, the variance and the gradients of
both, as matrix products. All of it runs on arrays of shape
(C, H, W, B): there a patch is made of long contiguous runs. The transposes from and to (B, H, W, C)
at the ends of each function meet and cancel where one of them feeds another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from svd_jax import backend, math, noise

Params = Mapping[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]

# Larger patches are formed again for the gradients: their memory would cost more than their time.
_MOST_BYTES_KEPT = 2**25

# (B, H, W, C) to (C, H, W, B), and back.
_TURN = (3, 1, 2, 0)


def by_patches(layer: nn.Module, x: jax.Array) -> bool:
    """Whether this backend computes this layer faster here than by XLA's convolution."""
    return (
        backend.as_on_cpu()
        and type(layer) is nn.Conv
        and x.ndim == 4
        and not isinstance(layer.kernel_size, int)
        and len(layer.kernel_size) == 2
        and layer.padding in ('VALID', 'SAME')
        and _all_ones(layer.strides, layer.input_dilation, layer.kernel_dilation)
        and layer.feature_group_count == 1
        and layer.mask is None
        and layer.conv_general_dilated is None
        and layer.conv_general_dilated_cls is None
        and layer.precision is None
        and jnp.float16 not in (x.dtype, layer.dtype)
    )


def _all_ones(*arguments: int | Sequence[int] | None) -> bool:
    return all(set((a,) if isinstance(a, int) else a or (1,)) == {1} for a in arguments)


def _channels_first(layer: nn.Module, x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (C, H, W, B), padded so that a VALID convolution is the layer's."""
    x = x.transpose(_TURN)
    if layer.padding == 'VALID':
        return x
    (top, bottom), (left, right) = (((n - 1) // 2, n // 2) for n in layer.kernel_size)
    return jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


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


def apply(layer: Any, params: Params, x: jax.Array) -> jax.Array:
    """What ``layer.apply`` gives, for a ``flax.linen.Conv`` that :func:`by_patches` accepts."""
    x, kernel, bias = layer.promote_dtype(
        x, params['kernel'], params.get('bias'), dtype=layer.dtype
    )
    return _add_bias(_convolve(_channels_first(layer, x), kernel), bias).transpose(_TURN)


def sample(
    layer: Any, params: Params, sigma2: jax.Array, x: jax.Array, key: jax.Array
) -> jax.Array:
    """The layer's output, sampled; see :func:`svd_jax.linear.sample`."""
    x, kernel, bias, sigma2 = layer.promote_dtype(
        x, params['kernel'], params.get('bias'), sigma2, dtype=layer.dtype
    )
    mean, variance = _moments(_channels_first(layer, x), kernel, sigma2)
    y = math.reparameterise(mean, variance, noise.standard_normal(key, mean.shape))
    return _add_bias(y, bias).transpose(_TURN)


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    return _max_pool_fwd(x)[0]


def _max_pool_fwd(x: jax.Array) -> Pair:
    a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    of_top, of_bottom = (b > a).astype(jnp.int8), 2 + (d > c).astype(jnp.int8)
    return jnp.maximum(top, bottom), jnp.where(bottom > top, of_bottom, of_top)


def _max_pool_bwd(winner: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    zero = jnp.zeros((), gradient.dtype)

    def spread(at: int) -> jax.Array:
        row, column = divmod(at, 2)
        every_other = ((0, 0, 0), (row, 1 - row, 1), (column, 1 - column, 1), (0, 0, 0))
        return lax.pad(jnp.where(winner == at, gradient, zero), zero, every_other)

    return (spread(0) + spread(1) + spread(2) + spread(3),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Maxima of 2x2 windows without overlap: (B, H, W, C) to (B, H / 2, W / 2, C).

    What ``flax.linen.max_pool(x, (2, 2), (2, 2))`` gives, with a gradient that costs a CPU a tenth
    as much. Where an activation such as relu follows anyway, pool first: it commutes with maxima,
    and works on a quarter of the numbers.

    Raises:
      ValueError: the height or the width is odd.
    """
    if x.ndim != 4 or x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(
            f'max_pool_2x2 needs (batch, even height, even width, channels), got {x.shape}: pad '
            'it, or use flax.linen.max_pool'
        )
    if backend.as_on_cpu():
        return _max_pool(x.transpose(_TURN)).transpose(_TURN)
    return nn.max_pool(x, (2, 2), (2, 2))
