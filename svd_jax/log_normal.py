"""The mathematics of Structured Bayesian Pruning, on arrays.

A unit is multiplied by noise z. Its posterior is a log-normal cut off at both ends, log z ~
N(location, sigma^2) truncated to [``LOWEST``, ``HIGHEST``], and its prior the log-uniform one on
the same interval: a proper distribution, unlike that of a weight in :mod:`svd_jax.math`.

Neklyudov, Molchanov, Ashukha & Vetrov, "Structured Bayesian Pruning via Log-Normal Multiplicative
Noise", NIPS 2017, arXiv:1705.07283.

The paper's closed forms subtract numbers that are nearly equal: E[z^2] - E[z]^2 where sigma is
small, Phi(B) - Phi(A) where location is outside the interval. So the moments and the KL are sums
over the nodes of a Gauss-Legendre rule on as much of the interval as matters, measured from the
posterior's mode: nothing cancels there, in float32, nor in the gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from svd_jax.math import _at_least_float32

# The interval of log z, as in the paper's experiments.
LOWEST, HIGHEST = -20.0, 0.0

# Parameters beyond these count as these: no power of them overflows float32, and with a sigma
# wider than the larger one the posterior is uniform to within float32 anyway.
_LARGEST_LOCATION = 100.0
_LOG_SIGMA2_RANGE = (-30.0, 14.0)

# Where the density is below exp(-24), relative to its mode, its tail is left out: the rule's own
# errors, in float64, are then below 1e-7.
_NEGLIGIBLE = 24.0
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(32) + np.array([[1.0], [0.0]])) / 2  # on [0, 1]


def _parameters(
    location: jax.typing.ArrayLike, log_sigma2: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    location = jnp.clip(_at_least_float32(location), -_LARGEST_LOCATION, _LARGEST_LOCATION)
    return location, jnp.clip(_at_least_float32(log_sigma2), *_LOG_SIGMA2_RANGE)


def _reach(offset: jax.Array, variance: jax.Array) -> jax.Array:
    """The t > 0 where t * (t / 2 - offset) = _NEGLIGIBLE * variance."""
    root = jnp.sqrt(offset * offset + 2 * _NEGLIGIBLE * variance)
    far = 2 * _NEGLIGIBLE * variance / (root + jnp.abs(offset))
    return jnp.where(offset < 0, far, root + offset)


def _quadrature(
    location: jax.Array, log_sigma2: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The mode of one unit's log z, the nodes' distances from it, their probabilities, their span.

    The nodes move with the parameters, and so gradients see a shape that hardly changes.
    """
    variance = jnp.exp(log_sigma2)
    mode = jnp.clip(location, LOWEST, HIGHEST)
    offset = location - mode  # not zero where location is outside the interval
    below = jnp.minimum(mode - LOWEST, _reach(-offset, variance))
    # z^2 times the density is a Gaussian too, 2 sigma^2 further up: E[z^2] may be all in the tail.
    above = jnp.minimum(HIGHEST - mode, _reach(offset + 2 * variance, variance))
    nodes, weights = jnp.asarray(_NODES, mode.dtype), jnp.asarray(_WEIGHTS, mode.dtype)
    distance = above * nodes - below * (1 - nodes)
    # Never below exp(-64), by what _reach allows: no probability is zero.
    density = weights * jnp.exp(distance * (offset - distance / 2) / variance)
    return mode, distance, density / jnp.sum(density), below + above


@jnp.vectorize
def _mean(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    mode, distance, probability, _ = _quadrature(location, log_sigma2)
    return jnp.exp(mode) * (1 + jnp.sum(probability * jnp.expm1(distance)))


@jnp.vectorize
def _log_alpha(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    _, distance, probability, span = _quadrature(location, log_sigma2)
    excess = jnp.expm1(distance)  # z / exp(mode) - 1
    mean = jnp.sum(probability * excess)
    deviation = (excess - mean) / span  # of order 1 where sigma is small: its square can't vanish
    return jnp.log(jnp.sum(probability * deviation**2)) + 2 * jnp.log(span / (1 + mean))


@jnp.vectorize
def _kl(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    _, _, probability, span = _quadrature(location, log_sigma2)
    prior = span * jnp.asarray(_WEIGHTS / (HIGHEST - LOWEST), span.dtype)
    return jnp.sum(probability * jnp.log(probability / prior))


def mean(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    """Mean of each unit's noise, E[z]: what replaces it outside of training.

    Args:
      location: the means of log z before truncation, any shape.
      log_sigma2: the logarithms of its variances before truncation, of the same shape.

    Returns:
      An array of that shape, in float32 at least, with a relative error below 2e-6 in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import log_normal
      >>> round(float(log_normal.mean(jnp.asarray(-3.0), jnp.asarray(-9.0))), 4)  # exp(-3)
      0.0498
    """
    return _mean(*_parameters(location, log_sigma2))


def log_alpha(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    """Logarithm of the noise level, alpha = Var[z] / E[z]^2, of each unit.

    The paper drops a unit when its signal-to-noise ratio, alpha^(-1/2), is below 1: when this is
    above 0. It is close to ``log_sigma2`` where sigma is small and the truncation far away.

    Args:
      location: the means of log z before truncation, any shape.
      log_sigma2: the logarithms of its variances before truncation, of the same shape.

    Returns:
      An array of that shape, in float32 at least, with a relative error of alpha below 1e-5 in
      float32: the variance is a sum of squares of z's deviations from its mean.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import log_normal
      >>> round(float(log_normal.log_alpha(jnp.asarray(-3.0), jnp.asarray(-10.0))), 4)
      -10.0
    """
    return _log_alpha(*_parameters(location, log_sigma2))


def kl(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    """KL divergence of each unit's posterior from the log-uniform prior, in nats.

    With :math:`[a, b]` the interval, :math:`A, B` its bounds minus location, in units of sigma,
    and :math:`Z = \\Phi(B) - \\Phi(A)`,

    .. math:: \\log(b - a) - \\log(\\sigma Z \\sqrt{2 \\pi e})
              - \\frac{A \\varphi(A) - B \\varphi(B)}{2 Z},

    which vanishes as sigma grows.

    Args:
      location: the means of log z before truncation, any shape.
      log_sigma2: the logarithms of its variances before truncation, of the same shape.

    Returns:
      An array of that shape, in float32 at least, with an error below 5e-6 in float32: sum it,
      don't average it.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import log_normal
      >>> round(float(log_normal.kl(jnp.asarray(-10.0), jnp.asarray(0.0))), 4)
      1.5768
    """
    return _kl(*_parameters(location, log_sigma2))


# Further than this many sigmas outside of the interval, a tail is taken for what it nearly is,
# exponential, and corrected for what it is not.
_FAR = 5.0


def _inside(lower: jax.Array, upper: jax.Array, noise: jax.Array) -> jax.Array:
    """The quantile, for lower < _FAR: of whichever tail keeps its digits."""
    below, above = ndtr(lower), ndtr(-upper)
    mass = jnp.where(lower > 0, ndtr(-lower) - above, ndtr(upper) - below)
    p, q = below + mass * ndtr(noise), above + mass * ndtr(-noise)
    return jnp.where(p < q, 1, -1) * ndtri(jnp.where(p < q, p, q))


def _mills(x: jax.Array) -> jax.Array:
    """Phi(-x) / phi(x), for x >= _FAR: Laplace's continued fraction, to within 2e-7."""
    fraction = x
    for k in range(6, 0, -1):
        fraction = x + k / fraction
    return 1 / fraction


def _beyond(lower: jax.Array, width: jax.Array, noise: jax.Array) -> jax.Array:
    """The quantile's distance from ``lower``, for lower >= _FAR.

    A step of Newton's method, for log Phi(-x), from where the density's logarithm alone would be
    as far down: its error, relative to the mean distance, is below 1e-3.
    """
    at_upper = jnp.exp(-width * (lower + width / 2)) * _mills(lower + width) / _mills(lower)
    down = -jnp.log(ndtr(-noise) + ndtr(noise) * at_upper)
    start = 2 * down / (lower + jnp.sqrt(lower * lower + 2 * down))
    mills = _mills(lower + start)
    return start - mills * jnp.log(_mills(lower) / mills)


def from_normal(location: jax.Array, log_sigma2: jax.Array, noise: jax.Array) -> jax.Array:
    """A sample of each unit's noise z from standard normal noise, by the inverse CDF.

    Args:
      location: the means of log z before truncation, any shape.
      log_sigma2: the logarithms of its variances before truncation, of the same shape.
      noise: standard normal draws, of that shape, or with further dimensions in front of it.

    Returns:
      An array of the shape of ``noise``, in float32 at least, between exp(``LOWEST``) and
      exp(``HIGHEST``); its gradients are those of the quantile at fixed noise.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import log_normal
      >>> noise = jnp.asarray([-1.0, 2.0])
      >>> z = log_normal.from_normal(jnp.asarray(-10.0), jnp.asarray(0.0), noise)
      >>> jnp.log(z).round(1).tolist()
      [-11.0, -8.0]
    """
    noise = jnp.clip(_at_least_float32(noise), -9, 9)  # no tail of these underflows
    location, log_sigma2 = (
        jnp.expand_dims(x, tuple(range(noise.ndim - x.ndim)))
        for x in _parameters(location, log_sigma2)
    )
    # Upwards of the bound that is nearer to location, which may be the upper one.
    low = location < (LOWEST + HIGHEST) / 2
    sign, bound = jnp.where(low, 1, -1), jnp.where(low, LOWEST, HIGHEST)
    sigma, noise = jnp.exp(log_sigma2 / 2), sign * noise
    lower, width = sign * (bound - location) / sigma, (HIGHEST - LOWEST) / sigma
    # Each way of computing it sees only what it is good for, also where the other's result is used.
    far = lower >= _FAR
    near = jnp.where(far, _FAR, lower)
    log_z = jnp.where(
        far,
        bound + sign * sigma * _beyond(jnp.where(far, lower, _FAR), width, noise),
        location + sign * sigma * _inside(near, near + width, noise),
    )
    # Not clip, which would halve the gradient of a sample that is rounded onto a bound.
    log_z = jnp.where(log_z < LOWEST, LOWEST, jnp.where(log_z > HIGHEST, HIGHEST, log_z))
    return jnp.exp(log_z)
