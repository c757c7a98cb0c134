"""Convolutions on CPUs with the channels innermost, a few images at a time.

Kernels of 3x3 in float32 go by Winograd's algorithm (:mod:`svd_jax.winograd`), others by
patches. Those of a few images fit in the processor's cache: there they are formed, multiplied and
forgotten, in a loop over blocks of the batch, and again for the gradients. The gradient with
respect to the input is itself a convolution, of the outputs' gradient with the kernel turned round.
"""

from functools import partial

import jax
import jax.numpy as jnp

from svd_jax import blocks, math, noise, windows, winograd
from svd_jax.windows import Padding

Arrays = tuple[jax.Array, ...]


def apply(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, padding: Padding) -> jax.Array:
    """The convolution of (B, H, W, C), with a kernel (height, width, C, F) and a bias (F,)."""
    if winograd.suits(kernel):
        return _add_bias(winograd.convolve(x, kernel, padding), bias)
    return _add_bias(_convolve(x, (kernel,), padding)[0], bias)


def sample(
    x: jax.Array,
    kernel: jax.Array,
    sigma2: jax.Array,
    bias: jax.Array | None,
    padding: Padding,
    key: jax.Array,
) -> jax.Array:
    """The convolution with a random kernel; see :func:`svd_jax.linear.sample`."""
    if winograd.suits(kernel):
        return _add_bias(winograd.sample(x, kernel, sigma2, key, padding), bias)
    mean, variance = _convolve(x, (kernel, sigma2), padding)
    y = math.reparameterise(mean, variance, noise.standard_normal(key, mean.shape))
    return _add_bias(y, bias)


def _add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias[None, None, None]


def _block(x: jax.Array, kernel: jax.Array, padding: Padding) -> int:
    """How many images to take at a time."""
    return blocks.size(len(x), windows.nbytes(x, kernel, padding), blocks.BYTES)


def _patches(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """(B, H, W, C) to (B * h * w, height * width * C): a row for every output."""
    height, width, channels, _ = kernel.shape
    h, w = windows.outputs(x.shape[1:3], (height, width), padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    shifted = [x[:, i : i + h, j : j + w] for i in range(height) for j in range(width)]
    return jnp.concatenate(shifted, -1).reshape(len(x) * h * w, height * width * channels)


def _correlate(x: jax.Array, kernels: Arrays, padding: Padding) -> Arrays:
    """Outputs of x with the first kernel, and of its squares with the second if there is one."""
    kernel = kernels[0]
    shape = *windows.outputs(x.shape[1:3], kernel.shape[:2], padding), kernel.shape[-1]

    def outputs(x: jax.Array) -> Arrays:
        powers = winograd.powers(_patches(x, kernel, padding), len(kernels))
        return tuple(
            (power @ windows.matrix(kernel)).reshape(len(x), *shape)
            for power, kernel in zip(powers, kernels, strict=True)
        )

    return blocks.map(outputs, _block(x, kernel, padding), (x,))


def _of_kernels(x: jax.Array, gradients: Arrays, like: Arrays, padding: Padding) -> Arrays:
    """The gradients of the kernels, given those of the outputs."""
    exact = jnp.promote_types(x.dtype, jnp.float32)  # what sums over blocks are kept in

    def products(x: jax.Array, *gradients: jax.Array) -> tuple[Arrays, Arrays]:
        powers = winograd.powers(_patches(x, like[0], padding), len(gradients))
        return (), tuple(
            jnp.matmul(power.T, gradient.reshape(len(power), -1), preferred_element_type=exact)
            for power, gradient in zip(powers, gradients, strict=True)
        )

    size = _block(x, like[0], padding)
    _, totals = blocks.map_and_sum(products, size, (x, *gradients))
    return tuple(
        total.reshape(kernel.shape).astype(kernel.dtype)
        for total, kernel in zip(totals, like, strict=True)
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernels: Arrays, padding: Padding) -> Arrays:
    return _correlate(x, kernels, padding)


def _convolve_fwd(
    x: jax.Array, kernels: Arrays, padding: Padding
) -> tuple[Arrays, tuple[jax.Array, Arrays]]:
    return _correlate(x, kernels, padding), (x, kernels)


def _convolve_bwd(
    padding: Padding, residuals: tuple[jax.Array, Arrays], gradients: Arrays
) -> tuple[jax.Array, Arrays]:
    x, kernels = residuals
    height, width = kernels[0].shape[:2]
    (top, bottom), (left, right) = padding
    around = (height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right)
    of_x, *of_squares = (
        _correlate(gradient, (kernel[::-1, ::-1].swapaxes(2, 3),), around)[0]
        for gradient, kernel in zip(gradients, kernels, strict=True)
    )
    for of_square in of_squares:
        of_x = of_x + 2 * x * of_square
    return of_x, _of_kernels(x, gradients, kernels, padding)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)
