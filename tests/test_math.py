"""svd_jax.math against float64, quadrature and the published figures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from svd_jax import math

METHODS = ['molchanov', 'exact', 'ard']


def quadrature_kl(log_alpha: float) -> float:
    """2 * integral of Dawson's function from 0 to 1 / sqrt(2 alpha), in float64."""
    end = np.exp(-log_alpha / 2) / np.sqrt(2)
    # In t = exp(v), so that the range over many orders of magnitude is integrated evenly.
    value, error = integrate.quad(
        lambda v: 2 * np.exp(v) * special.dawsn(np.exp(v)),
        -30,
        np.log(end),
        epsabs=0,
        epsrel=1e-11,
        limit=500,
    )
    assert error < 1e-9 * value
    return value


def quadrature_slope(log_alpha: np.ndarray) -> np.ndarray:
    s = np.exp(-log_alpha / 2) / np.sqrt(2)
    return -s * special.dawsn(s)


def definition_kl(log_alpha: float) -> float:
    """-log(alpha) / 2 + E log|eps|, eps ~ N(1, alpha), plus the constant; no Dawson in it."""
    deviation = np.exp(log_alpha / 2)

    def integrand(v: float) -> float:  # eps = +-exp(v): the logarithm's singularity is gone
        eps = np.exp(v)
        density = stats.norm.pdf(eps, 1, deviation) + stats.norm.pdf(-eps, 1, deviation)
        return v * density * eps

    end = np.log1p(40 * deviation)
    # For small alpha the mass is in a narrow peak around eps = 1, where v = 0.
    points = sorted({-40.0, -4.0, *np.clip([-deviation, 0, deviation], -4, end), end})
    expectation = sum(
        integrate.quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12, limit=500)[0]
        for a, b in itertools.pairwise(points)
    )
    # As alpha grows, eps / sqrt(alpha) tends to N(0, 1), and E log|N(0, 1)| = -(gamma + ln 2) / 2.
    return -0.5 * log_alpha + expectation + (np.euler_gamma + np.log(2)) / 2


@pytest.mark.parametrize('log_alpha', [-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0])
def test_dawson_integral_is_the_kl_by_its_definition(log_alpha: float) -> None:
    # The references of this file, against one another.
    np.testing.assert_allclose(
        quadrature_kl(log_alpha), definition_kl(log_alpha), rtol=1e-7, atol=1e-9
    )
    h = 1e-4
    slope = (quadrature_kl(log_alpha + h) - quadrature_kl(log_alpha - h)) / (2 * h)
    np.testing.assert_allclose(quadrature_slope(np.asarray(log_alpha)), slope, rtol=1e-6)


def test_exact_kl_and_its_gradient_against_quadrature() -> None:
    # Besides the whole range, both sides of the joints between the ways of computing it.
    joints = [j + d for j in (-4.0, 2.0) for d in (-1e-6, 0.0, 1e-6)]
    grid = np.asarray([*np.linspace(-20, 20, 161), *joints], np.float32)
    kl, slope = jax.vmap(jax.value_and_grad(math.kl_exact))(jnp.asarray(grid))
    assert kl.dtype == slope.dtype == jnp.float32
    exact = grid.astype(np.float64)
    np.testing.assert_allclose(kl, [quadrature_kl(a) for a in exact], rtol=1e-5)
    np.testing.assert_allclose(slope, quadrature_slope(exact), rtol=1e-5)


def test_exact_kl_has_forward_derivatives_too() -> None:
    at = jnp.linspace(-10.0, 10.0, 9)
    forward = jax.jvp(math.kl_exact, (at,), (jnp.full(9, 2.0),))[1]
    np.testing.assert_allclose(forward, 2 * quadrature_slope(np.asarray(at)), rtol=1e-5)


def test_worst_error_of_the_papers_fit() -> None:
    grid = np.linspace(-8, 8, 321)
    fit = np.asarray(math.kl_molchanov(jnp.asarray(grid, jnp.float32)))
    error = np.abs(fit - [quadrature_kl(a) for a in grid])
    assert 0.009 < error.max() <= 0.0094  # as documented: neither worse nor much better


def test_empirical_bayes_kl_against_numpy() -> None:
    grid = np.linspace(-30, 30, 121)
    ard = math.kl_ard(jnp.asarray(grid, jnp.float32))
    exact = 0.5 * np.logaddexp(0, -grid)
    np.testing.assert_allclose(ard, exact, rtol=5e-7)
    with jax.enable_x64():
        np.testing.assert_allclose(math.kl_ard(jnp.asarray(grid)), exact, rtol=1e-14)


@pytest.mark.parametrize(
    ('log_alpha', 'method', 'value'),
    [
        (0.0, 'exact', 0.4267),
        (0.0, 'molchanov', 0.4312),
        (0.0, 'ard', 0.3466),
        (3.0, 'exact', 0.02469),
        (3.0, 'molchanov', 0.02542),
        (3.0, 'ard', 0.02429),
    ],
)
def test_published_values(log_alpha: float, method: str, value: float) -> None:
    digits = 4 if log_alpha == 0 else 5
    assert round(float(math.kl(jnp.asarray(log_alpha), method)), digits) == value


@pytest.mark.parametrize('method', METHODS)
def test_kl_falls_to_zero_as_the_noise_grows(method: str) -> None:
    kl = np.asarray(math.kl(jnp.linspace(-20.0, 20.0, 401), method))
    assert np.all(np.diff(kl) < 0)
    assert np.all(kl > 0)
    assert kl[-1] < 1e-8


@pytest.mark.parametrize('method', METHODS)
def test_gradients_of_kl_against_finite_differences(method: str) -> None:
    grid, h = np.linspace(-7.0, 7.0, 57), 0.05
    # Differences of the value in float32, to fourth order.
    at = [np.asarray(math.kl(jnp.asarray(grid + k * h), method), float) for k in (-2, -1, 1, 2)]
    slope = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    gradient = jax.vmap(jax.grad(lambda a: math.kl(a, method)))(jnp.asarray(grid))
    np.testing.assert_allclose(gradient, slope, atol=3e-5)


def test_unknown_method_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown KL method 'mean'.*'molchanov', 'exact', 'ard'"):
        math.kl(jnp.zeros(2), 'mean')


@given(
    kernel=st.floats(1e-6, 1e6).flatmap(lambda size: st.sampled_from([size, -size])),
    log_sigma2=st.floats(-40, 40),
)
def test_log_alpha_against_float64(kernel: float, log_sigma2: float) -> None:
    kernel32, log_sigma2_32 = np.float32(kernel), np.float32(log_sigma2)
    wanted = np.float64(log_sigma2_32) - np.log(np.float64(kernel32) ** 2)
    value = math.log_alpha(jnp.asarray(kernel32), jnp.asarray(log_sigma2_32))
    np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=1e-5)


def test_gradients_of_log_alpha() -> None:
    kernel = jnp.asarray([-3.0, -1e-3, 0.5, 20.0])
    of_kernel, of_log_sigma2 = jax.grad(
        lambda *args: jnp.sum(math.log_alpha(*args)), argnums=(0, 1)
    )(kernel, jnp.zeros(4))
    np.testing.assert_allclose(of_kernel, -2 / np.asarray(kernel), rtol=1e-6)
    np.testing.assert_array_equal(of_log_sigma2, np.ones(4))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('method', METHODS)
def test_values_and_gradients_are_finite_everywhere(method: str, dtype: jnp.dtype) -> None:
    sizes = [0.0, 1e-30, 1e-10, 1.0, 1e3]
    kernel, log_sigma2 = (
        a.ravel().astype(dtype)
        for a in jnp.meshgrid(jnp.asarray([*sizes, *(-s for s in sizes)]), jnp.asarray([-30, 30]))
    )

    def total(kernel: jax.Array, log_sigma2: jax.Array) -> jax.Array:
        return jnp.sum(math.kl(math.log_alpha(kernel, log_sigma2), method))

    assert jnp.all(jnp.isfinite(math.kl(math.log_alpha(kernel, log_sigma2), method)))
    gradients = jax.grad(total, argnums=(0, 1))(kernel, log_sigma2)
    for gradient in gradients:
        assert gradient.dtype == dtype
        assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(gradients[1] != 0)


def test_low_precision_is_computed_in_float32() -> None:
    kernel, log_sigma2 = jnp.full(7, 0.7, jnp.bfloat16), jnp.linspace(-9, 9, 7, dtype=jnp.bfloat16)
    alpha = math.log_alpha(kernel, log_sigma2)
    assert alpha.dtype == jnp.float32
    wanted = np.float64(log_sigma2) - 2 * np.log(np.float64(kernel))
    np.testing.assert_allclose(alpha, wanted, rtol=1e-6)
    for method in METHODS:
        assert math.kl(alpha.astype(jnp.bfloat16), method).dtype == jnp.float32


def test_reparameterise_is_mean_plus_deviation_times_noise() -> None:
    rng = np.random.default_rng(0)
    mean, noise = rng.normal(size=(2, 50))
    variance = rng.uniform(0.01, 4, 50)
    arrays = [jnp.asarray(a, jnp.float32) for a in (mean, variance, noise)]
    np.testing.assert_allclose(
        math.reparameterise(*arrays), mean + np.sqrt(variance) * noise, rtol=1e-5, atol=1e-6
    )


def test_reparameterise_without_variance_is_the_mean_with_finite_gradients() -> None:
    mean, zero, noise = jnp.asarray([0.0, 2.0]), jnp.zeros(2), jnp.asarray([3.0, -3.0])
    np.testing.assert_allclose(math.reparameterise(mean, zero, noise), mean, atol=1e-14)
    gradients = jax.grad(lambda *a: jnp.sum(math.reparameterise(*a)), argnums=(0, 1))(
        mean, zero, noise
    )
    np.testing.assert_array_equal(gradients[0], np.ones(2))
    assert jnp.all(jnp.isfinite(gradients[1]))


def test_reparameterise_rounds_bfloat16_only_once() -> None:
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=1000), jnp.bfloat16)
    variance = jnp.asarray(rng.uniform(0, 1, 1000), jnp.bfloat16)
    noise = jnp.asarray(rng.normal(size=1000), jnp.float32)
    sample = math.reparameterise(mean, variance, noise)
    assert sample.dtype == jnp.bfloat16
    exact = np.float64(mean) + np.sqrt(np.float64(variance)) * np.float64(noise)
    # Half a unit in the last of bfloat16's 8 bits; twice or thrice that if rounded on the way.
    assert np.all(np.abs(np.float64(sample) - exact) <= 2.0**-8 * np.abs(exact) * 1.0001)


@pytest.mark.parametrize('method', ['exact', 'molchanov', 'ard'])
def test_the_type_is_that_of_the_parameters_where_there_are_longer_ones(method: str) -> None:
    with jax.enable_x64():
        for dtype in (jnp.float32, jnp.float64):
            log_alpha = jnp.linspace(-9, 9, 20, dtype=dtype)
            assert math.kl(log_alpha, method).dtype == dtype
            assert jax.grad(lambda x: math.kl(x, method).sum())(log_alpha).dtype == dtype
