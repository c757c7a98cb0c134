"""The mathematics of Sparse Variational Dropout, on arrays.

A weight has the posterior N(kernel, sigma^2), with alpha = sigma^2 / kernel^2 its noise level
relative to its mean, and the log-uniform prior p(|w|) ~ 1/|w|. Everything else in this library is
these few functions, applied to trees and layers.

Molchanov, Ashukha & Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017,
arXiv:1701.05369; equations are numbered as there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

# Below this, a kernel counts as zero: alpha is then as good as infinite, and 2 / kernel, the
# gradient of log_alpha, would no longer be safe to multiply in float32.
_SMALLEST_KERNEL = 1e-15

# Below this, a variance counts as zero: the gradient of its square root, 0.5 / sqrt(variance),
# stays finite.
_SMALLEST_VARIANCE = 1e-30

# The constants of the paper's fit, equation 14.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def _at_least_float32(x: jax.typing.ArrayLike) -> jax.Array:
    """bfloat16 and float16 keep too few digits to subtract and to sum logarithms in."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_alpha(kernel: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    """Logarithm of the noise level, alpha = sigma^2 / kernel^2, of each weight.

    A weight is worth dropping when this is large: 3 (95 % of dropout) is the paper's threshold.

    Args:
      kernel: the posterior means, any shape.
      log_sigma2: the logarithms of the posterior variances, of the same shape.

    Returns:
      An array of that shape, in float32 at least, finite also where ``kernel`` is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import math
      >>> float(math.log_alpha(jnp.asarray(1.0), jnp.asarray(-10.0)))
      -10.0
    """
    size = jnp.maximum(jnp.abs(_at_least_float32(kernel)), _SMALLEST_KERNEL)
    return _at_least_float32(log_sigma2) - 2.0 * jnp.log(size)


def polynomial(coefficients: np.ndarray, x: jax.Array) -> jax.Array:
    """Horner's rule, lowest power first, in float32."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + np.float32(coefficient)
    return value


# log(1 + e) / e as a polynomial for e in [0, 1], to within half a unit in float32's last place:
# XLA's log1p costs a CPU more than the rest of the KL together.
_LOG1P_RATIO = (
    np.polynomial.chebyshev.Chebyshev.interpolate(lambda e: np.log1p(e) / e, 10, domain=[0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


@jax.custom_jvp
def _softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)), with a relative error below 2e-7."""
    if x.dtype == jnp.float64:
        return jax.nn.softplus(x)
    e = jnp.exp(-jnp.abs(x))
    log1p = e * polynomial(_LOG1P_RATIO, e)
    return jnp.where(x > 0, x + log1p, log1p)


@_softplus.defjvp
def _softplus_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return _softplus(x), jax.nn.sigmoid(x) * tangent


def kl_molchanov(log_alpha: jax.Array) -> jax.Array:
    """KL divergence to the log-uniform prior by the paper's fit (equation 14).

    .. math:: k_1 \\, \\sigma(-(k_2 + k_3 \\log\\alpha)) + \\tfrac12 \\log(1 + \\alpha^{-1})

    with the constant chosen so that it vanishes as alpha grows. Its worst error for log alpha in
    [-8, 8] is 0.0094.
    """
    log_alpha = _at_least_float32(log_alpha)
    return _K1 * jax.nn.sigmoid(-(_K2 + _K3 * log_alpha)) + kl_ard(log_alpha)


def kl_ard(log_alpha: jax.Array) -> jax.Array:
    """KL divergence to the best Gaussian prior of each weight (empirical Bayes).

    .. math:: \\tfrac12 \\log(1 + \\alpha^{-1})

    Kharitonov, Molchanov & Vetrov, "Variational Dropout via Empirical Bayes", arXiv:1811.00596.
    """
    return 0.5 * _softplus(-_at_least_float32(log_alpha))


# With s = 1 / sqrt(2 alpha) and Dawson's function D, the KL is F(s) = 2 * int_0^s D(t) dt. Between
# the ranges where its power series and its asymptotic series are accurate, F and s D(s) are
# interpolated as polynomials in log alpha; the coefficients are computed on import, in float64.
_SERIES_FROM, _ASYMPTOTIC_BELOW = 2.0, -4.0
_MIDDLE = _ASYMPTOTIC_BELOW, _SERIES_FROM


def _dawson_integral(log_alpha: np.ndarray) -> np.ndarray:
    s = np.exp(-log_alpha / 2) / np.sqrt(2)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    t = s[:, None] * (nodes + 1) / 2
    return s * (special.dawsn(t) @ weights)


def _dawson_slope(log_alpha: np.ndarray) -> np.ndarray:
    s = np.exp(-log_alpha / 2) / np.sqrt(2)
    return s * special.dawsn(s)


def _interpolate(function: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    # As Python's numbers, which take on the type of what they meet.
    fit = np.polynomial.chebyshev.Chebyshev.interpolate(function, 24, domain=_MIDDLE)
    return fit.coef.tolist()


_INTEGRAL, _SLOPE = _interpolate(_dawson_integral), _interpolate(_dawson_slope)


def _chebyshev(coefficients: list[float], x: jax.Array) -> jax.Array:
    """Clenshaw's recurrence."""
    b1 = b2 = jnp.zeros_like(x)
    for c in coefficients[:0:-1]:
        b1, b2 = c + 2 * x * b1 - b2, b1
    return coefficients[0] + x * b1 - b2


def _piecewise(
    log_alpha: jax.Array,
    series: Callable[[jax.Array], jax.Array],
    coefficients: list[float],
    asymptotic: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Each branch sees only arguments of its own range: its gradient elsewhere must not be NaN."""
    small_u = 0.5 * jnp.exp(-jnp.maximum(log_alpha, _SERIES_FROM))
    middle = jnp.clip(log_alpha, _ASYMPTOTIC_BELOW, _SERIES_FROM)
    middle = (2 * middle - sum(_MIDDLE)) / (_MIDDLE[1] - _MIDDLE[0])
    low = jnp.minimum(log_alpha, _ASYMPTOTIC_BELOW)
    return jnp.where(
        log_alpha > _SERIES_FROM,
        series(small_u),
        jnp.where(log_alpha < _ASYMPTOTIC_BELOW, asymptotic(low), _chebyshev(coefficients, middle)),
    )


@jax.custom_jvp
def _kl_exact(log_alpha: jax.Array) -> jax.Array:
    def series(u: jax.Array) -> jax.Array:
        return u * (1 - u * (1 / 3 - u * (4 / 45 - u * (2 / 105 - u * (16 / 4725)))))

    def asymptotic(log_alpha: jax.Array) -> jax.Array:
        r = 2 * jnp.exp(log_alpha)  # 1 / u
        tail = r * (1 / 4 + r * (3 / 16 + r * (5 / 16 + r * (105 / 128 + r * (189 / 64)))))
        return -log_alpha / 2 + float(np.euler_gamma + np.log(2)) / 2 - tail

    return _piecewise(log_alpha, series, _INTEGRAL, asymptotic)


@_kl_exact.defjvp
def _kl_exact_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    def series(u: jax.Array) -> jax.Array:
        return u * (1 - u * (2 / 3 - u * (4 / 15 - u * (8 / 105 - u * (16 / 945)))))

    def asymptotic(log_alpha: jax.Array) -> jax.Array:
        r = 2 * jnp.exp(log_alpha)
        return 1 / 2 + r * (1 / 4 + r * (3 / 8 + r * (15 / 16 + r * (105 / 32 + r * (945 / 64)))))

    (log_alpha,), (tangent,) = primals, tangents
    slope = _piecewise(log_alpha, series, _SLOPE, asymptotic)
    return _kl_exact(log_alpha), -slope * tangent


def kl_exact(log_alpha: jax.Array) -> jax.Array:
    """KL divergence to the log-uniform prior, exactly.

    With :math:`u = 1 / (2\\alpha)` and Dawson's function D,

    .. math:: 2 \\int_0^{\\sqrt u} D(t) \\, dt, \\qquad
              \\partial_{\\log\\alpha} = -\\sqrt u \\, D(\\sqrt u),

    which tends to :math:`\\tfrac12(\\gamma + \\ln 2 - \\log\\alpha)` as alpha vanishes.
    The derivative is analytic, not that of an approximation. Relative error of both in float32:
    below 3e-6.

    Hron, Matthews & Ghahramani, "Variational Bayesian dropout: pitfalls and fixes",
    arXiv:1807.01969, give the integral.
    """
    return _kl_exact(_at_least_float32(log_alpha))


KL_METHODS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'molchanov': kl_molchanov,
    'exact': kl_exact,
    'ard': kl_ard,
}


def kl(log_alpha: jax.Array, method: str = 'molchanov') -> jax.Array:
    """KL divergence of each weight's posterior from its prior, in nats.

    Args:
      log_alpha: any shape.
      method: ``'molchanov'`` (the paper's fit, see :func:`kl_molchanov`), ``'exact'``
        (:func:`kl_exact`) or ``'ard'`` (:func:`kl_ard`).

    Returns:
      An array of that shape, in float32 at least: sum it, don't average it.

    Raises:
      ValueError: the method is none of these.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import math
      >>> [round(float(math.kl(jnp.asarray(0.0), m)), 4) for m in ('molchanov', 'exact', 'ard')]
      [0.4312, 0.4267, 0.3466]
    """
    if method not in KL_METHODS:
        known = ', '.join(map(repr, KL_METHODS))
        raise ValueError(f'unknown KL method {method!r}: choose one of {known}')
    return KL_METHODS[method](log_alpha)


def reparameterise(mean: jax.Array, variance: jax.Array, noise: jax.Array) -> jax.Array:
    """Local reparameterisation: a sample of N(mean, variance) from standard normal noise.

    The activations are sampled, not the weights: independent per example, at the cost of one more
    linear operation (Kingma, Salimans & Welling 2015; equation 8 of the paper).

    Args:
      mean: any shape.
      variance: the same shape, not negative.
      noise: the same shape, standard normal.

    Returns:
      ``mean + sqrt(variance) * noise``, of the mean's type but computed in float32 at least, with
      finite gradients where the variance is zero.
    """
    deviation = jnp.sqrt(jnp.maximum(_at_least_float32(variance), _SMALLEST_VARIANCE))
    return (_at_least_float32(mean) + deviation * noise).astype(mean.dtype)
