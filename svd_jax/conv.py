"""Convolution and pooling for CPUs.

XLA's convolutions are slow on a CPU, their gradients slower, and slower still inside a loop. An
ordinary two-dimensional convolution is computed here as matrix products instead: with the channels
innermost where they are many or Winograd's algorithm has few products (:mod:`svd_jax.wide`), else
with the batch innermost (:mod:`svd_jax.narrow`). XLA's own would do for a few channels and large
images, but not in a loop, where it takes ten times as long or more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax import lax

from svd_jax import backend, narrow, wide, winograd
from svd_jax.windows import Padding

Params = Mapping[str, jax.Array]

# So many channels, of the outputs, are many; so many enough for Winograd's algorithm, which takes
# longer to compile; with fewer, so many bytes of patches are.
_WIDE, _ENOUGH, _MOST_BYTES = 64, 16, 2**24


def by_patches(layer: nn.Module, x: jax.Array) -> bool:
    """Whether this backend computes this layer faster here than by XLA's convolution."""
    return (
        backend.as_on_cpu()
        and type(layer) is nn.Conv
        and x.ndim == 4
        and not isinstance(layer.kernel_size, int)
        and len(layer.kernel_size) == 2
        and _padding(layer, x) is not None
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


def way(x: jax.Array, kernel: jax.Array) -> Any:
    """The module that convolves such images with such a kernel, on a CPU."""
    if not winograd.suits(kernel):
        return wide if kernel.shape[-1] >= _WIDE else narrow
    bytes_of_patches = 3 * 3 * x.size * x.dtype.itemsize
    return wide if kernel.shape[-1] >= _ENOUGH or bytes_of_patches > _MOST_BYTES else narrow


def _padding(layer: Any, x: jax.Array) -> Padding | None:
    """The zeros around the image that make the layer's convolution a VALID one, if there are such.

    And if an image, with those, holds the kernel. The gradient with respect to the input needs
    fewer of them than the kernel has rows or columns.
    """
    padding = canonicalize_padding(layer.padding, 2)
    if padding == 'VALID':
        padding = [(0, 0), (0, 0)]
    elif padding == 'SAME':
        padding = [((n - 1) // 2, n // 2) for n in layer.kernel_size]
    elif isinstance(padding, str):
        return None
    return _within(padding, layer.kernel_size, x)


def _within(padding: Sequence[Sequence[int]], size: Sequence[int], x: jax.Array) -> Padding | None:
    height, width = ((low, high) for low, high in padding)
    within = all(
        0 <= low < n and 0 <= high < n and low + pixels + high >= n
        for (low, high), n, pixels in zip((height, width), size, x.shape[1:3], strict=True)
    )
    return (height, width) if within and len(x) else None


# (batch, height, width, channels) with (height, width, channels, features), as Flax has it.
_DIMENSIONS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def padding_by_patches(params: Mapping[str, Any], x: Any, kernel: Any) -> Padding | None:
    """The zeros around the image of a ``conv_general_dilated`` that this backend computes faster
    here, with ``way(x, kernel)``; None if it doesn't.

    Args:
      params: of the primitive operation.
      x: its images, of any shape.
      kernel: its kernel, of any shape.
    """
    ordinary = (
        backend.as_on_cpu()
        and kernel.ndim == 4
        and jnp.issubdtype(kernel.dtype, jnp.floating)
        and kernel.dtype != jnp.float16
        and params['dimension_numbers'] == _DIMENSIONS
        and _all_ones(params['window_strides'], params['lhs_dilation'], params['rhs_dilation'])
        and _all_ones(params['feature_group_count'], params['batch_group_count'])
        and params['precision'] is None
        and params['preferred_element_type'] in (None, kernel.dtype)
    )
    return _within(params['padding'], kernel.shape[:2], x) if ordinary else None


def apply(layer: Any, params: Params, x: jax.Array) -> jax.Array:
    """What ``layer.apply`` gives, for a ``flax.linen.Conv`` that :func:`by_patches` accepts."""
    x, kernel, bias = layer.promote_dtype(
        x, params['kernel'], params.get('bias'), dtype=layer.dtype
    )
    return way(x, kernel).apply(x, kernel, bias, _padding(layer, x))


def sample(
    layer: Any, params: Params, sigma2: jax.Array, x: jax.Array, key: jax.Array
) -> jax.Array:
    """The layer's output, sampled; see :func:`svd_jax.linear.sample`."""
    x, kernel, bias, sigma2 = layer.promote_dtype(
        x, params['kernel'], params.get('bias'), sigma2, dtype=layer.dtype
    )
    return way(x, kernel).sample(x, kernel, sigma2, bias, _padding(layer, x), key)


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    """Of the second and third axes, whatever the others are."""
    return _max_pool_fwd(x)[0]


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def pools_2x2(params: Mapping[str, Any], x: Any) -> bool:
    """Whether a ``reduce_window_max`` with these parameters is a :func:`max_pool_2x2`."""
    once, pairs = (1, 1, 1, 1), (1, 2, 2, 1)
    return (
        (params['window_dimensions'], params['window_strides']) == (pairs, pairs)
        and (params['base_dilation'], params['window_dilation']) == (once, once)
        and not any(map(any, params['padding']))
        and x.shape[1] % 2 == x.shape[2] % 2 == 0
    )


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
    if not backend.as_on_cpu():
        return nn.max_pool(x, (2, 2), (2, 2))
    if x.shape[-1] >= _WIDE:
        return _max_pool(x)
    return _max_pool(x.transpose(narrow.TURN)).transpose(narrow.TURN)
