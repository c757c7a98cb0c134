"""svd_jax.noise: the draws are standard normal and independent, under every kind of key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from svd_jax import noise

N = 1_000_000
KEYS = {
    'threefry': lambda seed: jax.random.key(seed, impl='threefry2x32'),
    'rbg': lambda seed: jax.random.key(seed, impl='rbg'),
    'raw uint32': lambda seed: jax.random.PRNGKey(seed),
}
every_key = pytest.mark.parametrize('make_key', KEYS.values(), ids=KEYS)


def draw(key: jax.Array, shape: tuple[int, ...] = (N,)) -> np.ndarray:
    return np.asarray(noise.standard_normal(key, shape), np.float64)


@every_key
def test_moments_and_distribution(make_key) -> None:
    x = draw(make_key(0))
    # Four standard errors of each moment of a standard normal.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(x**power) - moment) < 4 * np.sqrt(variance / N), power
    assert stats.kstest(x, 'norm').pvalue > 1e-3


@every_key
def test_draws_of_one_key_are_independent(make_key) -> None:
    x = draw(make_key(1))
    # Lag N / 2 pairs the two halves of each random word.
    for lag in (1, 2, 3, 7, 64, 1000, N // 2):
        for f in (np.asarray, np.square):
            a, b = f(x[:-lag]), f(x[lag:])
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a)), (lag, f)


@every_key
def test_draws_of_different_keys_are_independent(make_key) -> None:
    n = N // 4
    first, second = (np.fft.rfft(draw(make_key(seed), (n,))) for seed in (2, 3))
    # At every shift, for counters that overlap would make one a shift of the other.
    correlations = np.fft.irfft(first * second.conj(), n) / n
    assert np.all(np.abs(correlations) < 6 / np.sqrt(n))


def test_all_quantiles_are_as_documented() -> None:
    values = np.asarray(noise._normal_quantile(jnp.arange(2**16, dtype=jnp.uint32)), np.float64)
    assert np.unique(values).size == 2**16
    np.testing.assert_allclose(
        values, stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose([values.min(), values.max()], [-4.33, 4.33], atol=0.01)
    assert abs(np.var(values) - 1) < 3e-5
    assert 2 * stats.norm.sf(values.max()) < 2e-5


@every_key
@pytest.mark.parametrize('shape', [(), (0,), (3, 0), (1,), (7,), (3, 5), (2, 3, 4)])
def test_shapes(make_key, shape: tuple[int, ...]) -> None:
    x = noise.standard_normal(make_key(5), shape)
    assert x.shape == shape
    assert x.dtype == jnp.float32
    assert np.unique(x).size == x.size  # nothing is repeated to fill an odd size


@every_key
def test_a_key_determines_its_draws(make_key) -> None:
    first, again, other = (draw(make_key(seed), (9,)) for seed in (6, 6, 7))
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)


def test_raw_keys_draw_what_typed_keys_draw() -> None:
    np.testing.assert_array_equal(draw(jax.random.PRNGKey(8), (9,)), draw(jax.random.key(8), (9,)))


@pytest.mark.parametrize('shape', [(), (7,), (2, 4)])
def test_vmap_over_keys_is_a_loop(shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(9), 5)
    together = jax.vmap(lambda key: noise.standard_normal(key, shape))(keys)
    for row, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(row, noise.standard_normal(key, shape))


def test_vmap_over_rbg_keys_gives_distinct_rows() -> None:
    # JAX makes no promise that rbg under vmap equals a loop, only that it is random.
    keys = jax.random.split(jax.random.key(10, impl='rbg'), 3)
    rows = np.asarray(jax.vmap(lambda key: noise.standard_normal(key, (50_000,)))(keys))
    correlations = np.corrcoef(rows)[np.triu_indices(3, 1)]
    assert np.all(np.abs(correlations) < 4 / np.sqrt(50_000))


def test_jit_changes_nothing() -> None:
    np.testing.assert_allclose(  # up to the last bits: compiled whole, products and sums are one
        jax.jit(noise.standard_normal, static_argnums=1)(jax.random.key(11), (33,)),
        noise.standard_normal(jax.random.key(11), (33,)),
        rtol=1e-5,
    )
