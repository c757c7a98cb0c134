"""svd_jax.backend: both ways to compute give the same step, and the override is heeded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from svd_jax import backend

pytestmark = pytest.mark.usefixtures('quick_compilation')


class Network(nn.Module):
    """One of everything that is computed differently on a CPU."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        x, kl = svd.linen.Conv(3, (3, 3), padding='VALID', log_sigma2_init=-60.0)(x, deterministic)
        x = svd.linen.max_pool_2x2(x).reshape(x.shape[0], -1)
        x, more = svd.linen.Dense(4, log_sigma2_init=-60.0)(x, deterministic)
        return x, kl + more


def traced_and_taken(scale: float = 1.0) -> tuple[str, svd.TrainState]:
    """A step, as JAX traces it, and the state after it."""
    model, tx = Network(), optax.sgd(0.1)
    x = scale * jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 8, 2)), jnp.float32)
    state = svd.TrainState.create(model.init(jax.random.key(0), x), tx)
    step = svd.make_train_step(model.apply, svd.classification_loss, tx, num_data=10)
    arguments = ((x, jnp.arange(5) % 4), jax.random.key(1))
    return str(jax.make_jaxpr(step)(state, *arguments)), step(state, *arguments)[0]


def test_both_ways_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, 'cpu')
    jaxpr, on_cpu = traced_and_taken()
    assert ' cond[' in jaxpr
    assert 'conv_general_dilated' not in jaxpr
    monkeypatch.setenv(backend.VARIABLE, 'accelerator')
    jaxpr, elsewhere = traced_and_taken()
    assert ' cond[' not in jaxpr
    assert 'conv_general_dilated' in jaxpr
    assert on_cpu.step == elsewhere.step == 1
    assert jax.tree.structure(on_cpu) == jax.tree.structure(elsewhere)
    # The draws come in another order; with so little noise they do not matter.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), on_cpu, elsewhere
    )


@pytest.mark.parametrize('ways', ['cpu', 'accelerator'])
def test_what_is_not_finite_changes_nothing(ways: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, ways)
    _, state = traced_and_taken(scale=np.inf)
    assert state.step == 0
    jax.tree.map(lambda leaf: np.testing.assert_equal(np.isfinite(leaf).all(), True), state.params)


def test_the_default_is_what_jax_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.as_on_cpu() == (jax.default_backend() == 'cpu')


def test_other_values_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, 'gpu')
    with pytest.raises(ValueError, match="SVD_JAX_WAYS must be 'cpu' or 'accelerator', got 'gpu'"):
        backend.as_on_cpu()
