"""Convolution for CPUs: patches and matrix products, mean and variance together.

XLA's convolutions are slow on a CPU, their gradients slower, and slower still inside a loop. Where
a layer is an ordinary two-dimensional convolution, its patches are formed once and serve the mean,
the variance and the gradients of both, as matrix products.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def prefers_patches(layer: nn.Module, x: jax.Array) -> bool:
    """Whether this backend computes this layer faster by patches than by XLA's convolution."""
    return (
        jax.default_backend() == 'cpu'
        and type(layer) is nn.Conv
        and x.ndim == 4
        and not isinstance(layer.kernel_size, int)
        and len(layer.kernel_size) == 2
        and layer.padding == 'VALID'
        and _all_ones(layer.strides, layer.input_dilation, layer.kernel_dilation)
        and layer.feature_group_count == 1
        and layer.mask is None
        and layer.conv_general_dilated is None
        and layer.conv_general_dilated_cls is None
        and layer.precision is None
    )


def _all_ones(*arguments: int | tuple[int, ...] | None) -> bool:
    return all(a in (None, 1) or (not isinstance(a, int) and set(a) == {1}) for a in arguments)


def _patches(x: jax.Array, height: int, width: int) -> jax.Array:
    """(B, H, W, C) to (B * h * w, height * width * C): a row for every output position."""
    batch, rows, columns, channels = x.shape
    h, w = rows - height + 1, columns - width + 1
    windows = [x[:, i : i + h, j : j + w] for i in range(height) for j in range(width)]
    return jnp.concatenate(windows, axis=-1).reshape(batch * h * w, height * width * channels)


def _fold(patches: jax.Array, shape: tuple[int, ...], height: int, width: int) -> jax.Array:
    """The transpose of :func:`_patches`: sums what lies on the same input."""
    batch, rows, columns, channels = shape
    h, w = rows - height + 1, columns - width + 1
    windows = patches.reshape(batch, h, w, height, width, channels)
    return sum(
        jnp.pad(
            windows[:, :, :, i, j],
            ((0, 0), (i, height - 1 - i), (j, width - 1 - j), (0, 0)),
        )
        for i in range(height)
        for j in range(width)
    )  # type: ignore[return-value]


def _matrix(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, kernel.shape[-1])


Pair = tuple[jax.Array, jax.Array]


@jax.custom_vjp
def _moments(x: jax.Array, kernel: jax.Array, sigma2: jax.Array) -> Pair:
    return _moments_fwd(x, kernel, sigma2)[0]


def _moments_fwd(x: jax.Array, kernel: jax.Array, sigma2: jax.Array) -> tuple[Pair, tuple]:
    height, width, _, features = kernel.shape
    patches = _patches(x, height, width)
    squares = _patches(x * x, height, width)
    shape = (x.shape[0], x.shape[1] - height + 1, x.shape[2] - width + 1, features)
    mean = (patches @ _matrix(kernel)).reshape(shape)
    variance = (squares @ _matrix(sigma2)).reshape(shape)
    return (mean, variance), (x, patches, squares, kernel, sigma2)


def _moments_bwd(residuals: tuple, gradients: Pair) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, patches, squares, kernel, sigma2 = residuals
    of_mean, of_variance = map(_matrix, gradients)
    height, width, _, _ = kernel.shape
    of_patches = of_mean @ _matrix(kernel).T + 2 * patches * (of_variance @ _matrix(sigma2).T)
    return (
        _fold(of_patches, x.shape, height, width),
        (patches.T @ of_mean).reshape(kernel.shape),
        (squares.T @ of_variance).reshape(sigma2.shape),
    )


_moments.defvjp(_moments_fwd, _moments_bwd)

Params = Mapping[str, jax.Array]


def apply(layer: nn.Conv, params: Params, x: jax.Array) -> jax.Array:
    """What ``layer.apply`` gives, by patches."""
    x, kernel, bias = layer.promote_dtype(x, params['kernel'], params.get('bias'), dtype=layer.dtype)
    height, width, _, features = kernel.shape
    shape = (x.shape[0], x.shape[1] - height + 1, x.shape[2] - width + 1, features)
    y = (_patches(x, height, width) @ _matrix(kernel)).reshape(shape)
    return y if bias is None else y + bias


def moments(layer: nn.Conv, params: Params, sigma2: jax.Array, x: jax.Array) -> Pair:
    """Mean and variance of the layer's output, as in :func:`svd_jax.linear.moments`."""
    x, kernel, bias, sigma2 = layer.promote_dtype(
        x, params['kernel'], params.get('bias'), sigma2, dtype=layer.dtype
    )
    mean, variance = _moments(x, kernel, sigma2)
    return (mean if bias is None else mean + bias), variance
