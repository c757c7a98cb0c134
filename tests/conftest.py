"""Strict settings for every test: what JAX would let pass in silence is an error here."""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Arrays of different ranks broadcast only where the code says so, and a typed key is used once.
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)

hypothesis.settings.register_profile(
    'default',
    max_examples=25,
    deadline=None,  # the first example compiles
    derandomize='CI' in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('default')


def pytest_configure(config: pytest.Config) -> None:
    # Prepended, so that what pyproject.toml lists may still make exceptions.
    config.getini('filterwarnings').insert(0, 'error')


@pytest.fixture(scope='module')
def quick_compilation() -> Iterator[None]:
    """For tests that compile much and compute little: half the time of the whole suite.

    The processes that such a test starts compile so, too: it may compare their bits with its own.
    """
    before = jax.config.read('jax_disable_most_optimizations')
    # What was compiled otherwise would go on being used, here or later, also where bits are
    # compared.
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
        jax.config.update('jax_disable_most_optimizations', True)
        yield
        jax.config.update('jax_disable_most_optimizations', before)
    jax.clear_caches()
