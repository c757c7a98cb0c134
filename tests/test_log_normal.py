"""svd_jax.log_normal against quadrature and scipy's truncated normal, both in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from svd_jax import log_normal

FUNCTIONS = [log_normal.mean, log_normal.log_alpha, log_normal.kl]
pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')
every_function = pytest.mark.parametrize('function', FUNCTIONS)

mean, log_alpha, kl, from_normal = map(jax.jit, (*FUNCTIONS, log_normal.from_normal))

# Inside the interval, on its bounds and next to them, and far outside; sigma from 5e-5 to 20.
# (-25, 0) is where two ways of sampling meet.
LOCATION, LOG_SIGMA2 = (
    a.ravel()
    for a in np.meshgrid(
        np.asarray([-30, -25, -20.001, -20, -19.9, -15, -10, -5, -1, -0.01, 0, 0.1, 3, 10]),
        np.asarray([-20, -12, -7, -3, -1, 0, 1, 2, 3, 4.5, 6]),
    )
)
LOCATION, LOG_SIGMA2 = (np.float64(np.float32(a)) for a in (LOCATION, LOG_SIGMA2))
SIGMA = np.exp(LOG_SIGMA2 / 2)


def posterior(location: np.ndarray, log_sigma2: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mode, distances from it and their probabilities, and the entropy, in float64.

    The panels grow geometrically from the mode to 20 on either side of it, whatever sigma is.
    """
    location, variance = location[:, None], np.exp(log_sigma2)[:, None]
    edges = np.concatenate([[0], np.geomspace(1e-13, 1, 150)])
    nodes, weights = np.polynomial.legendre.leggauss(12)
    steps = np.diff(edges)[:, None]
    unit, unit_weights = (edges[:-1, None] + steps * (nodes + 1) / 2).ravel(), steps * weights / 2
    mode = np.clip(location, -20, 0)
    sides = [-20 - mode, 0 - mode]
    distance = np.concatenate([side * unit for side in sides], 1)
    weight = np.concatenate([np.abs(side) * unit_weights.ravel() for side in sides], 1)
    log_density = distance * (location - mode - distance / 2) / variance
    density = weight * np.exp(log_density)
    mass = density.sum(1, keepdims=True)
    probability = density / mass
    entropy = np.log(mass[:, 0]) - (probability * log_density).sum(1)
    return mode[:, 0], distance, probability, entropy


def reference_mean(location: np.ndarray, log_sigma2: np.ndarray) -> np.ndarray:
    mode, distance, probability, _ = posterior(location, log_sigma2)
    return np.exp(mode) * (probability * np.exp(distance)).sum(1)


def reference_log_alpha(location: np.ndarray, log_sigma2: np.ndarray) -> np.ndarray:
    _, distance, probability, _ = posterior(location, log_sigma2)
    excess = np.expm1(distance)
    mean = (probability * excess).sum(1, keepdims=True)
    return np.log((probability * (excess - mean) ** 2).sum(1)) - 2 * np.log1p(mean[:, 0])


def reference_kl(location: np.ndarray, log_sigma2: np.ndarray) -> np.ndarray:
    return np.log(20) - posterior(location, log_sigma2)[-1]


REFERENCES = dict(zip(FUNCTIONS, [reference_mean, reference_log_alpha, reference_kl], strict=True))
# As documented: relative for the mean, absolute for the logarithms.
TOLERANCES = dict(zip(FUNCTIONS, [2e-6, 1e-5, 5e-6], strict=True))


def truncated(location: np.ndarray, log_sigma2: np.ndarray):
    sigma = np.exp(log_sigma2 / 2)
    return stats.truncnorm((-20 - location) / sigma, -location / sigma, location, sigma)


def test_references_agree_with_scipy_and_the_closed_form() -> None:
    # Where scipy's own closed forms keep their digits.
    rng = np.random.default_rng(0)
    location, log_sigma2 = rng.uniform(-21, 1, 20), rng.uniform(-2, 4, 20)
    sigma = np.exp(log_sigma2 / 2)
    _, distance, probability, _ = posterior(location, log_sigma2)
    scipys = truncated(location, log_sigma2)
    log_z = np.clip(location, -20, 0) + (probability * distance).sum(1)
    np.testing.assert_allclose(log_z, scipys.mean(), rtol=1e-8)
    a, b = (-20 - location) / sigma, -location / sigma
    z = stats.norm.cdf(b) - stats.norm.cdf(a)
    closed = (
        np.log(20)
        - np.log(sigma * z * np.sqrt(2 * np.pi * np.e))
        - (a * stats.norm.pdf(a) - b * stats.norm.pdf(b)) / (2 * z)
    )
    np.testing.assert_allclose(reference_kl(location, log_sigma2), closed, rtol=1e-8, atol=1e-9)


@every_function
def test_values_against_quadrature(function: Callable) -> None:
    arguments = jnp.asarray(LOCATION, jnp.float32), jnp.asarray(LOG_SIGMA2, jnp.float32)
    value = jax.jit(function)(*arguments)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(function(*arguments), value, rtol=1e-5, atol=1e-5)
    wanted, tolerance = REFERENCES[function](LOCATION, LOG_SIGMA2), TOLERANCES[function]
    if function is log_normal.mean:
        np.testing.assert_allclose(value, wanted, rtol=tolerance)
    else:
        np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance)


def slopes(function: Callable, along: int) -> np.ndarray:
    """Differences of the reference, per sigma or per unit of location, whichever is shorter."""
    unit = np.minimum(SIGMA, 1) if along == 0 else np.ones_like(SIGMA)
    at = [LOCATION, LOG_SIGMA2]
    values = []
    for step in (-1e-3, 1e-3):
        shifted = list(at)
        shifted[along] = at[along] + step * unit
        values.append(function(*shifted))
    return (values[1] - values[0]) / 2e-3


@every_function
def test_gradients_against_differences_of_the_reference(function: Callable) -> None:
    arguments = jnp.asarray(LOCATION, jnp.float32), jnp.asarray(LOG_SIGMA2, jnp.float32)
    gradients = jax.jit(jax.vmap(jax.grad(function, argnums=(0, 1))))(*arguments)
    scale = REFERENCES[function](LOCATION, LOG_SIGMA2) if function is log_normal.mean else 1
    for along, unit in ((0, np.minimum(SIGMA, 1)), (1, 1)):
        wanted = slopes(REFERENCES[function], along) / scale
        np.testing.assert_allclose(gradients[along] * unit / scale, wanted, rtol=1e-4, atol=1e-5)


def test_kl_is_positive_and_falls_to_zero_as_sigma_grows() -> None:
    location = jnp.linspace(-20.0, 0.0, 9)[:, None]
    values = np.asarray(kl(location, jnp.linspace(-20.0, 14.0, 80)[None]))
    assert np.all(values > -5e-6)
    assert np.all(np.diff(values) < 5e-6)
    assert np.all(np.abs(values[:, -1]) < 5e-6)
    assert np.all(values[:, 0] > 10)


def test_log_alpha_grows_with_log_sigma2() -> None:
    # Up to there: below -5 or so it has a maximum, before z is log-uniform.
    location = jnp.linspace(-20.0, 5.0, 11)[:, None]
    assert np.all(np.diff(log_alpha(location, jnp.linspace(-20.0, 1.0, 50)[None])) > 0)


def test_limits() -> None:
    # Narrow, far from the bounds: log_alpha is log_sigma2. Wide: log-uniform, all over.
    log_sigma2 = jnp.linspace(-20.0, -14.0, 7)
    narrow = log_alpha(jnp.full(7, -5.0), log_sigma2)
    np.testing.assert_allclose(narrow, log_sigma2, atol=5e-6)
    wide = jnp.asarray(-5.0), jnp.asarray(14.0)
    first, second = -np.expm1(-20) / 20, -np.expm1(-40) / 40
    np.testing.assert_allclose(mean(*wide), first, rtol=1e-4)
    np.testing.assert_allclose(log_alpha(*wide), np.log(second / first**2 - 1), atol=1e-4)


NOISE = np.asarray([-4, -2, -1, -0.1, 0, 0.1, 1, 2, 4])


def reference_log_sample(location: np.ndarray, log_sigma2: np.ndarray) -> np.ndarray:
    scipys = truncated(location[:, None], log_sigma2[:, None])
    upper = scipys.isf(stats.norm.sf(NOISE)[None])
    return np.where(NOISE > 0, upper, scipys.ppf(stats.norm.cdf(NOISE)[None]))


def test_samples_are_quantiles() -> None:
    usable = LOG_SIGMA2 > -10  # scipy's quantiles lose their digits below it
    location, log_sigma2 = LOCATION[usable], LOG_SIGMA2[usable]
    arguments = [jnp.asarray(a, jnp.float32) for a in (location[:, None], log_sigma2[:, None])]
    arguments.append(jnp.asarray(NOISE, jnp.float32)[None])
    sample = from_normal(*arguments)
    np.testing.assert_allclose(log_normal.from_normal(*arguments), sample, rtol=1e-4)
    wanted = reference_log_sample(location, log_sigma2)
    np.testing.assert_allclose(np.log(np.float64(sample)), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize('along', [0, 1])
def test_gradients_of_samples_against_differences_of_quantiles(along: int) -> None:
    usable = LOG_SIGMA2 > -4
    at, unit = [LOCATION[usable], LOG_SIGMA2[usable]], 1 if along else np.minimum(SIGMA[usable], 1)
    shifted = []
    for step in (-1e-3, 1e-3):
        moved = list(at)
        moved[along] = at[along] + step * unit
        shifted.append(reference_log_sample(*moved))
    wanted = (shifted[1] - shifted[0]) / 2e-3

    def log_sample(location: jax.Array, log_sigma2: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.log(log_normal.from_normal(location, log_sigma2, noise))

    over_noise = jax.vmap(jax.grad(log_sample, argnums=along), (None, None, 0))
    gradient = jax.jit(jax.vmap(over_noise, (0, 0, None)))(
        *(jnp.asarray(a, jnp.float32) for a in (*at, NOISE))
    )
    gradient = np.asarray(gradient) * np.reshape(unit, (-1, 1))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-3)


gradients_of_mean = jax.jit(jax.grad(log_normal.mean, argnums=(0, 1)))
gradients_of_samples = jax.jit(
    jax.vmap(jax.grad(log_normal.from_normal, argnums=(0, 1)), (None, None, 0))
)


@pytest.mark.parametrize(
    ('location', 'log_sigma2'), [(-3.0, -2.0), (-0.5, 0.0), (8.0, 2.0), (-24.0, 1.0), (-8.0, 5.0)]
)
def test_moments_of_samples(location: float, log_sigma2: float) -> None:
    count = 100_000
    noise = jax.random.normal(jax.random.key(0), (count,))
    parameters = jnp.asarray(location), jnp.asarray(log_sigma2)
    z = np.float64(from_normal(*parameters, noise))
    error = z.std() / np.sqrt(count)
    assert abs(z.mean() - mean(*parameters)) < 4 * error
    kurtosis = np.mean((z - z.mean()) ** 4) / z.var() ** 2
    relative = np.sqrt(kurtosis / count) + 2 * error / z.mean()
    assert abs(np.log(z.var() / z.mean() ** 2) - log_alpha(*parameters)) < 4 * relative
    # The gradients of samples are, on average, the gradient of the mean.
    gradients = gradients_of_samples(*parameters, noise)
    wanted = gradients_of_mean(*parameters)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert abs(gradient.mean() - expected) < 4 * gradient.std() / np.sqrt(count) + 1e-7


# All in one shape, so that hypothesis compiles once.
@jax.jit
def everything(location: jax.Array, log_sigma2: jax.Array, noise: jax.Array):
    def sample(location: jax.Array, log_sigma2: jax.Array) -> jax.Array:
        return log_normal.from_normal(location, log_sigma2, noise)

    return [
        jax.value_and_grad(function, argnums=(0, 1))(location, log_sigma2)
        for function in (*FUNCTIONS, sample)
    ]


def assert_finite(location: float, log_sigma2: float, noise: float, dtype: jnp.dtype) -> None:
    parameters = jnp.asarray(location, dtype), jnp.asarray(log_sigma2, dtype)
    results = everything(*parameters, jnp.asarray(noise, jnp.float32))
    for value, gradients in results:
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value)
        for gradient in gradients:
            assert gradient.dtype == dtype
            assert jnp.isfinite(gradient)
    (average, _), _, (divergence, _), (sample, _) = results
    for z in (average, sample):
        assert np.exp(-20) * (1 - 1e-6) <= z <= 1 + 1e-6
    assert sample <= 1
    assert divergence > -5e-6


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@given(location=st.floats(-30, 10), log_sigma2=st.floats(-20, 6), noise=st.floats(-6, 6))
def test_values_and_gradients_are_finite(
    dtype: jnp.dtype, location: float, log_sigma2: float, noise: float
) -> None:
    assert_finite(location, log_sigma2, noise, dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_nothing_is_nan_wherever_the_parameters_go(dtype: jnp.dtype) -> None:
    for location in (-np.inf, -1e9, -100.0, -20.0, -10.0, 0.0, 100.0, np.inf):
        for log_sigma2 in (-np.inf, -100.0, -30.0, 0.0, 14.0, 100.0, np.inf):
            for noise in (-np.inf, -9.0, 0.0, 9.0, np.inf):
                assert_finite(location, log_sigma2, noise, dtype)


def test_low_precision_is_computed_in_float32() -> None:
    location = jnp.linspace(-20, 0, 7, dtype=jnp.bfloat16)
    log_sigma2 = jnp.linspace(-9, 3, 7, dtype=jnp.bfloat16)
    wide = location.astype(jnp.float32), log_sigma2.astype(jnp.float32)
    noise = jnp.linspace(-2, 2, 7)
    for function in FUNCTIONS:
        compiled = jax.jit(function)
        np.testing.assert_array_equal(compiled(location, log_sigma2), compiled(*wide))
    np.testing.assert_array_equal(
        from_normal(location, log_sigma2, noise), from_normal(*wide, noise)
    )


def test_double_precision_stays_so() -> None:
    with jax.enable_x64():
        for function in FUNCTIONS:
            value = jax.jit(function)(jnp.asarray(LOCATION), jnp.asarray(LOG_SIGMA2))
            assert value.dtype == jnp.float64
            wanted = REFERENCES[function](LOCATION, LOG_SIGMA2)
            np.testing.assert_allclose(value, wanted, rtol=1e-7, atol=1e-7)
            assert function(jnp.float32(-3), jnp.float32(-2)).dtype == jnp.float32


def test_noise_of_a_batch_is_broadcast() -> None:
    location, log_sigma2 = jnp.asarray([-3.0, 2.0, -26.0]), jnp.asarray([-1.0, 1.0, -2.0])
    noise = jax.random.normal(jax.random.key(1), (4, 5, 3))
    sample = from_normal(location, log_sigma2, noise)
    assert sample.shape == noise.shape
    for unit in range(3):
        one = from_normal(location[unit], log_sigma2[unit], noise[..., unit])
        np.testing.assert_allclose(sample[..., unit], one, rtol=1e-5)
