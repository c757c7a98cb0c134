"""Training on a smaller network goes on as on the whole one, but for the noise of what went."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from svd_jax import convention, noise

pytestmark = pytest.mark.usefixtures('quick_compilation')
THRESHOLD = {'groups/': 1.0, '': 3.0}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3), padding='VALID')(x))
        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


@pytest.fixture(scope='module', params=[(), None], ids=['groups alone', 'weights and groups'])
def trained(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """A network after a few steps of training, and the units that are then made noise alone."""
    model, tx = Net(), optax.adam(1e-2)
    x = jax.random.normal(jax.random.key(0), (16, 5, 5, 2))
    labels = jax.random.randint(jax.random.key(1), (16,), 0, 3)
    params = model.init(jax.random.key(2), x)['params']
    params = svd.variational(params, request.param, groups={'Conv': 'outputs', 'Dense': 'inputs'})
    state = svd.TrainState.create({'params': params}, tx)
    step = steps(model, tx)
    for seed in range(3):
        state, _ = step(state, (x, labels), jax.random.key(seed))
    dead = {'Conv_0': [0, 3], 'Conv_1': [1], 'Dense_1': [0, 2, 5]}
    params = jax.tree.map(jnp.array, state.params)
    for layer, units in dead.items():
        ((_, group),) = params[layer]['groups'].items()
        flat = group['log_sigma2'].reshape(-1).at[np.asarray(units)].set(4.0)
        group['log_sigma2'] = flat.reshape(group['log_sigma2'].shape)
    return model, tx, state.replace(params=params), (x, labels)


@pytest.fixture
def started(trained: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy: steps donate their state."""
    model, tx, state, batch = trained
    return model, tx, jax.tree.map(jnp.array, state), batch


def steps(model: Any, tx: optax.GradientTransformation) -> Any:
    def apply(variables: Any, inputs: jax.Array, rngs: Any) -> Any:
        return svd.apply(model, variables, inputs, rngs=rngs, threshold=THRESHOLD)

    return svd.make_train_step(apply, svd.classification_loss, tx, num_data=16, threshold=THRESHOLD)


def test_training_goes_on_as_it_would_have(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tx, state, batch = started
    # Of what is removed, the noise goes too: without any, the two trainings are the same.
    monkeypatch.setattr(noise, 'standard_normal', lambda key, shape: jnp.zeros(shape))
    smaller, small, report, *_ = svd.shrink(model, state, tx, batch[0], threshold=THRESHOLD)
    assert small.params['Conv_0']['kernel'].shape == (3, 3, 2, 4)
    assert small.params['Conv_1']['kernel'].shape == (3, 3, 4, 3)
    assert small.params['Conv_1']['groups']['outputs']['scale'].shape == (1, 1, 1, 3)
    assert small.params['Dense_0']['kernel'].shape == (27, 5)
    assert small.params['Dense_0']['groups']['inputs']['scale'].shape == (27, 1)
    assert small.params['Dense_1']['kernel'].shape == (5, 3)
    assert report.multiply_adds[1] < report.multiply_adds[0]
    x, _ = batch
    shipped = svd.sparsify(state.params, THRESHOLD)
    left = svd.sparsify(small.params, THRESHOLD)
    np.testing.assert_allclose(smaller(left, x), smaller.apply({'params': left}, x), rtol=1e-5)
    if svd.backend.as_on_cpu():  # by patches
        assert 'conv_general_dilated' not in str(jax.make_jaxpr(smaller.__call__)(left, x))
    np.testing.assert_allclose(
        smaller.apply({'params': left}, x), model.apply({'params': shipped}, x),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip

    # A step of each; from then on they part, since a constant unit's bias learns no more.
    state, whole = steps(model, tx)(state, batch, jax.random.key(0))
    small, after = steps(smaller, tx)(small, batch, jax.random.key(0))
    np.testing.assert_allclose(after['data_term'], whole['data_term'], rtol=1e-5)
    assert small.step == state.step
    last = np.setdiff1d(np.arange(8), [0, 2, 5])
    for name in ('kernel', 'log_sigma2'):
        if name in state.params['Dense_1']:
            found, wanted = (s.params['Dense_1'][name] for s in (small, state))
            np.testing.assert_allclose(found, wanted[last], rtol=1e-3, atol=1e-4)


def test_the_optimiser_knows_what_it_knew(started: Any) -> None:
    model, tx, state, (x, _) = started
    _, small, *_ = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    kept = np.setdiff1d(np.arange(6), [0, 3])
    for moments in ('mu', 'nu'):
        whole, left = (getattr(s.opt_state[0], moments)['Conv_0'] for s in (state, small))
        np.testing.assert_array_equal(left['kernel'], whole['kernel'][..., kept])
        scales = (node['groups']['outputs']['scale'] for node in (left, whole))
        np.testing.assert_array_equal(next(scales), next(scales)[..., kept])
    assert small.opt_state[0].count == state.opt_state[0].count


def test_expanding_gives_the_whole_state_with_zeros_that_shrink_again(started: Any) -> None:
    model, tx, state, (x, _) = started
    shrunk = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    whole = shrunk.expand(shrunk.state)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, state)
    np.testing.assert_allclose(
        model.apply({'params': svd.sparsify(whole.params, THRESHOLD)}, x),
        model.apply({'params': svd.sparsify(state.params, THRESHOLD)}, x),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    for threshold in (THRESHOLD, float('inf')):  # what was removed is dropped at any
        again = svd.shrink(model, whole, tx, x, threshold=threshold)
        jax.tree.map(np.testing.assert_array_equal, again.state, shrunk.state)


def test_it_can_shrink_again_and_be_shipped(started: Any, tmp_path: Any) -> None:
    model, tx, state, (x, _) = started
    smaller, small, *_ = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    params = jax.tree.map(jnp.array, small.params)
    group = params['Dense_1']['groups']['inputs']
    group['log_sigma2'] = group['log_sigma2'].at[0].set(4.0)
    small = small.replace(params=params)
    again, smallest, *_ = svd.shrink(smaller, small, tx, x, threshold=THRESHOLD)
    assert smallest.params['Dense_1']['kernel'].shape == (4, 3)
    left = svd.sparsify(smallest.params, THRESHOLD)
    np.testing.assert_allclose(
        again.apply({'params': left}, x),
        smaller.apply({'params': svd.sparsify(params, THRESHOLD)}, x),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    svd.save(tmp_path / 'left.svd', left)
    loaded = svd.load(tmp_path / 'left.svd')
    assert [w.values.shape for w in convention.weights(loaded)] == [
        w.values.shape for w in convention.weights(left)
    ]


def test_what_cannot_shrink_is_refused(started: Any) -> None:
    model, tx, state, (x, _) = started
    with pytest.raises(ValueError, match='the state has batch_stats'):
        svd.shrink(model, state.replace(collections={'batch_stats': {}}), tx, x)
    with pytest.raises(ValueError, match='no unit is left'):
        svd.shrink(model, state, tx, x, threshold=-99.0)
