"""Standard normal noise from few random bits.

Noise is a large part of a variational step: one draw for every activation. Sixteen random bits a
draw are enough for it, so each call of threefry, which makes 64, serves four draws (JAX's own
``jax.random.normal`` takes one call per draw).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32
from scipy import special

from svd_jax.math import polynomial


def _random_words(key: jax.Array, count: int) -> jax.Array:
    """``count`` independent uint32, from the key's own generator."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) == 'threefry2x32':
        return threefry_2x32(jax.random.key_data(key), lax.iota(jnp.uint32, count))
    return jax.random.bits(key, (count,), jnp.uint32)


def _quantile_ratio(w: np.ndarray) -> np.ndarray:
    """z / u, where a standard normal lies within z of 0 with probability u = sqrt(1 - exp(-w))."""
    u = np.sqrt(-np.expm1(-w))
    return special.ndtri((1 + u) / 2) / u


# As a polynomial, with an error in z below 3e-6. XLA's erf_inv takes longer: log1p,
# where log will do for numbers so coarse, and two polynomials for every draw.
_RATIO = (
    np.polynomial.chebyshev.Chebyshev.interpolate(
        _quantile_ratio, 10, domain=[0, -np.log(1 - (1 - 2.0**-16) ** 2)]
    )
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


def _normal_quantile(bits: jax.Array) -> jax.Array:
    """The quantile of the middle of one of 65,536 equal slices of the unit interval."""
    u = (bits.astype(jnp.float32) - 32767.5) * (1 / 32768)
    w = -jnp.log((1 - u) * (1 + u))
    return u * polynomial(_RATIO, w)


def standard_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Independent standard normal draws, each from 16 random bits.

    The draws take 65,536 equally likely values between -4.33 and 4.33, the quantiles of the
    middles of as many slices: no test of Kolmogorov-Smirnov's kind can tell them from a normal
    distribution by fewer than a billion draws, their variance is 1 to within 3e-5, and only the
    tail beyond 4.33 (probability 2e-5) is missing.

    Args:
      key: a PRNG key of any of JAX's generators.
      shape: the shape of the draws.

    Returns:
      A float32 array of that shape.

    Example:
      >>> import jax
      >>> from svd_jax import noise
      >>> noise.standard_normal(jax.random.key(0), (2, 3)).shape
      (2, 3)
    """
    size = math.prod(shape)
    words = _random_words(key, (size + 1) // 2)
    halves = jnp.concatenate([_normal_quantile(words >> 16), _normal_quantile(words & 0xFFFF)])
    return halves[:size].reshape(shape)
