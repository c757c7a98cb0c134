"""The families of posteriors: of a weight, and of a scale that the weights of a unit share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from svd_jax import log_normal, math

Array = jax.Array


class Family(NamedTuple):
    """What is to know of a family, as functions of arrays of locations and of log variances.

    Attributes:
      log_alpha: the noise level, the logarithm of variance / mean^2.
      kl: to the log-uniform prior, in nats; the third argument is the method, see
        :func:`svd_jax.math.kl`.
      mean: of the posterior.
      drawn: a draw of it, made of standard normal noise of that shape.
      offset: what is added to a threshold of log alpha.
    """

    log_alpha: Callable[[Array, Array], Array]
    kl: Callable[[Array, Array, str], Array]
    mean: Callable[[Array, Array], Array]
    drawn: Callable[[Array, Array, Array], Array]
    offset: float = 0.0


def _kl_normal(location: Array, log_sigma2: Array, method: str) -> Array:
    return math.kl(math.log_alpha(location, log_sigma2), method)


def _drawn_normal(location: Array, log_sigma2: Array, noise: Array) -> Array:
    return math.reparameterise(location, jnp.exp(log_sigma2.astype(jnp.float32)), noise)


NORMAL = Family(math.log_alpha, _kl_normal, lambda location, log_sigma2: location, _drawn_normal)

# Truncated, its prior too (Neklyudov et al. 2017). The paper drops what has a signal-to-noise ratio
# below 1, a log alpha of 0 and more, where the threshold for normal posteriors is 3.
LOG_NORMAL = Family(
    log_normal.log_alpha,
    lambda location, log_sigma2, method: log_normal.kl(location, log_sigma2),
    log_normal.mean,
    log_normal.from_normal,
    offset=-3.0,
)
