"""How a variational linear operation is computed: the one place that knows.

For a layer that is linear in its input and in its kernel, the activations of a random kernel have
mean ``layer(x, kernel) + bias`` and, where no weight is used twice for one output, variance
``layer(x^2, sigma^2)``: the same operation, with stride, padding, dilation, groups and all. So any
Flax layer serves for both, and the bias takes no part in the variance.

A convolution's weights are used at every output position, and there the noise is drawn
independently, which is the paper's choice (section 4.3), not the law of one sampled kernel.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from svd_jax import conv, math, noise

Params = Mapping[str, jax.Array]


def apply(layer: Any, params: Params, x: jax.Array, method: str = '__call__') -> jax.Array:
    """The layer's output with the given parameters, by the fastest way for this backend."""
    if method == '__call__' and conv.by_patches(layer, x):
        return conv.apply(layer, params, x)
    return layer.apply({'params': params}, x, method=method)


def sample(
    layer: Any,
    name: str,
    params: Params,
    log_sigma2: jax.Array,
    x: jax.Array,
    key: jax.Array,
    method: str = '__call__',
) -> jax.Array:
    """A sample of a layer's output under the posterior of its weights: local reparameterisation.

    Args:
      layer: an unbound Flax layer, linear in its input and weight (an embedding: in its weight).
      name: the name of the weight in ``params``.
      params: the layer's parameters.
      log_sigma2: logarithm of the posterior's variance, of the weight's shape.
      x: the layer's input.
      key: for the noise.
      method: which of the layer's methods.

    Returns:
      An array of the shape and type of the layer's output.
    """
    sigma2 = jnp.exp(log_sigma2.astype(variance_dtype(log_sigma2.dtype)))
    if method == '__call__' and conv.by_patches(layer, x):
        return conv.sample(layer, params, sigma2, x, key)
    mean = layer.apply({'params': params}, x, method=method)
    without_bias = layer.clone(use_bias=False) if hasattr(layer, 'use_bias') else layer
    if mean.dtype == jnp.float16:
        without_bias = without_bias.clone(dtype=jnp.float32)
    looks_up = isinstance(layer, nn.Embed) and method == '__call__'
    squares = x if looks_up else squared(x)
    variance = without_bias.apply({'params': {name: sigma2}}, squares, method=method)
    return draw(mean, variance, key)


def variance_dtype(dtype: Any) -> Any:
    """What to compute variances in: float16 has no room for x^2 and sigma^2."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def squared(x: jax.Array) -> jax.Array:
    """What meets the variances of the weights, where x meets their means."""
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return lax.square(x.astype(variance_dtype(x.dtype) if inexact else jnp.float32))


def draw(mean: jax.Array, variance: jax.Array, key: jax.Array) -> jax.Array:
    """Independent Gaussian activations with these moments, of the mean's type."""
    return math.reparameterise(mean, variance, noise.standard_normal(key, mean.shape))
