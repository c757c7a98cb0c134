"""Scales that several layers share: one draw, one KL divergence, one decision for all of them."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import svd_jax as svd
from svd_jax import convention
from test_groups import spread
from test_linen import key as rngs_of

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')

INPUTS = svd.Shared('inputs', ('a', 'b'))
GROUP = 'groups', 'a+b:inputs'


class Two(nn.Module):
    """Two layers that read the same, of 3 and 2 outputs, and one that reads both."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        a = nn.Dense(3, name='a', use_bias=False)(x)
        b = nn.Dense(2, name='b', use_bias=False)(x)
        return a, b, nn.Dense(1, name='c')(jnp.concatenate([a, b], -1))


class Cell(nn.Module):
    """A recurrent network, whose cell has the weights of its gates in eight layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.RNN(nn.OptimizedLSTMCell(5), name='rnn')(x))


def two(where: Any = (), **options: Any) -> Any:
    params = Two().init(jax.random.key(0), jnp.ones((1, 4)))['params']
    return spread(svd.variational(params, where, groups={'^[ab]/': INPUTS}, **options))


def group_of(params: Any) -> Any:
    return params[GROUP[0]][GROUP[1]]


@pytest.mark.parametrize('log_normal', [False, True])
def test_the_scales_lie_beside_the_layers_once(log_normal: bool) -> None:
    params = two(log_normal=log_normal)
    name = 'log_scale' if log_normal else 'scale'
    assert jax.tree.map(jnp.shape, group_of(params)) == {name: (4, 1), 'log_sigma2': (4, 1)}
    (random,) = convention.randoms(params)
    assert random.group == '/'.join(GROUP)
    np.testing.assert_allclose(
        svd.kl(params), jnp.sum(random.family.kl(*random[1:], 'molchanov')), rtol=1e-6
    )
    assert jax.tree.structure(svd.sparsify(params)) == jax.tree.structure(
        Two().init(jax.random.key(0), jnp.ones((1, 4)))['params']
    )
    assert jax.tree.structure(svd.log_alpha(params)['groups']) == jax.tree.structure(
        {GROUP[1]: {name: 0}}
    )


@pytest.mark.parametrize('where', [(), None])
def test_a_unit_goes_from_all_layers_or_from_none(where: Any) -> None:
    params = two(where)
    scales = group_of(params)
    scales['log_sigma2'] = scales['log_sigma2'].at[1].set(9.0)
    sparse = svd.sparsify(params)
    for layer in 'ab':
        kept = np.asarray(params[layer]['kernel']) * np.asarray(scales['scale'])
        kept[1] = 0
        if where is None:
            noisy = np.asarray(svd.log_alpha(params)[layer]['kernel']) >= 3
            kept[noisy] = 0
        np.testing.assert_allclose(sparse[layer]['kernel'], kept, rtol=1e-6)
    found = svd.sparsity(params)
    (left,) = found.units.values()
    assert (left.nonzero, left.total) == (3, 4)
    assert sparse['c'] is not None
    small = svd.compact(Two(), sparse, jnp.ones((1, 4)))
    assert small.params['a']['kernel'].shape == (3, 3)
    assert svd.unit_costs(Two(), params, jnp.ones((1, 4))) == {'/'.join(GROUP): 5.0}


def test_layers_that_read_the_same_see_the_same_draw() -> None:
    params, x = two(), jnp.ones((6, 4)).at[:, 1:].set(0)  # one input: its scale can be read off
    (a, b, _), _ = svd.apply(Two(), {'params': params}, x, rngs=rngs_of(1))
    of_a, of_b = a / params['a']['kernel'][:1], b / params['b']['kernel'][:1]
    np.testing.assert_allclose(of_a, np.broadcast_to(of_a[:, :1], of_a.shape), rtol=1e-5)
    np.testing.assert_allclose(of_b, np.broadcast_to(of_a[:, :1], of_b.shape), rtol=1e-5)
    assert np.unique(np.round(of_a[:, 0], 5)).size == 6  # and every example another


def test_the_moments_are_those_of_a_shared_scale() -> None:
    params, x = two(), jax.random.normal(jax.random.key(3), (2, 4))
    count = 4000

    def outputs(k: jax.Array) -> jax.Array:
        (a, b, _), _ = svd.apply(Two(), {'params': params}, x, rngs={'noise': k})
        return jnp.concatenate([a, b], -1)

    drawn = np.asarray(jax.jit(jax.vmap(outputs))(jax.random.split(jax.random.key(2), count)))
    scales = group_of(params)
    mean, sigma2 = np.asarray(scales['scale'])[:, 0], np.exp(np.asarray(scales['log_sigma2']))[:, 0]
    kernel = np.concatenate([params[layer]['kernel'] for layer in 'ab'], 1)
    for example in range(2):
        parts = np.asarray(x)[example][:, None] * kernel  # (inputs, outputs)
        covariance = parts.T @ (sigma2[:, None] * parts)
        sd = np.sqrt(np.diag(covariance))
        error = drawn[:, example].mean(0) - mean @ parts
        assert np.all(np.abs(error) < 5 * sd / count**0.5)
        np.testing.assert_allclose(
            np.cov(drawn[:, example].T), covariance, atol=0.12 * np.outer(sd, sd).max()
        )


def test_a_cell_draws_a_neuron_once() -> None:
    layers = 'hi', 'hf', 'hg', 'ho'
    x = jnp.ones((2, 3, 4))
    params = Cell().init(jax.random.key(0), x)['params']
    neurons = svd.Shared('inputs', layers)
    made = spread(svd.variational(params, (), groups={'/h[ifgo]/': neurons}))
    cell = next(node for node in made.values() if isinstance(node, dict) and 'hi' in node)
    drawn = next(node for node in svd.sample(made, jax.random.key(4)).values() if 'hi' in node)
    factors = [np.asarray(drawn[n]['kernel'] / cell[n]['kernel']) for n in layers]
    for factor in factors:
        np.testing.assert_allclose(factor, np.broadcast_to(factors[0][:, :1], factor.shape), 1e-4)
    y, _ = svd.apply(Cell(), {'params': made}, x, rngs=rngs_of(4))
    # Weights along time are drawn once: this is the plain model with that draw.
    np.testing.assert_allclose(
        y, Cell().apply({'params': svd.sample(made, jax.random.key(4))}, x), rtol=1e-5, atol=1e-6
    )


def test_the_smaller_network_has_them_smaller() -> None:
    params, x = two(), jax.random.normal(jax.random.key(0), (3, 4))
    scales = group_of(params)
    scales['log_sigma2'] = scales['log_sigma2'].at[2].set(9.0)
    state = svd.TrainState.create({'params': params}, tx := optax.adam(1e-2))
    shrunk = svd.shrink(Two(), state, tx, x)
    assert group_of(shrunk.state.params)['scale'].shape == (3, 1)
    for got, want in zip(
        shrunk.model.compact.apply(svd.sparsify(shrunk.state.params), x),
        Two().apply({'params': svd.sparsify(params)}, x),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_it_trains_and_ships(tmp_path: Any) -> None:
    params = two(None)
    tx = optax.adam(1e-2)
    state = svd.TrainState.create({'params': params}, tx)

    def apply(variables: Any, x: jax.Array, rngs: Any) -> Any:
        (_, _, c), kl = svd.apply(Two(), variables, x, rngs=rngs)
        return c, kl

    def loss(outputs: jax.Array, targets: jax.Array) -> Any:
        return jnp.mean((outputs - targets) ** 2), {}

    step = svd.make_train_step(apply, loss, tx, num_data=100)
    before = jax.device_get(group_of(params))
    for i in range(3):
        state, metrics = step(state, (jnp.ones((5, 4)), jnp.ones((5, 1))), jax.random.key(i))
        assert np.isfinite(metrics['loss'])
    for name, leaf in group_of(state.params).items():
        assert not np.array_equal(leaf, before[name])
    svd.save(tmp_path / 'two.svd', state.params, tolerance=0.1)
    loaded = svd.load(tmp_path / 'two.svd')
    assert jax.tree.structure(loaded) == jax.tree.structure(svd.sparsify(state.params))


def test_nnx_models_have_them_too() -> None:
    class Pair(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a = nnx.Linear(4, 3, rngs=rngs, use_bias=False)
            self.b = nnx.Linear(4, 2, rngs=rngs, use_bias=False)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.concatenate([self.a(x), self.b(x)], -1)

    model = svd.nnx.variational(Pair(nnx.Rngs(0)), (), groups={'^[ab]/': INPUTS})
    x = jnp.ones((6, 4)).at[:, 1:].set(0)
    y, _ = svd.nnx.apply(model, x, rngs=nnx.Rngs(noise=1))
    factors = y / jnp.concatenate([model.a.kernel[:1], model.b.kernel[:1]], -1)
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], y.shape), rtol=1e-5)
    sparse = svd.nnx.with_params(model, svd.sparsify(svd.nnx.params(model)))
    assert sorted(svd.nnx.params(sparse)) == ['a', 'b']


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda p: svd.variational(p, groups={'^a/': INPUTS}), 'is to be shared by b too'),
        (
            lambda p: svd.variational(p, groups=svd.Shared('outputs', ('a', 'b', 'c'))),
            'layers cannot share the scales of',
        ),
        (lambda p: svd.variational(p, groups=INPUTS), 'it needs two layers or more'),
        (lambda p: svd.variational(p, groups={'^a/': svd.Shared(0, ('a',))}), 'two layers or more'),
        (lambda p: svd.variational(p, groups={'^a/': svd.Shared(7, ('a', 'b'))}), '7 is no axis'),
        (
            lambda p: svd.sample(two(), jax.random.key(0), '^a/'),
            'would go with some of the weights that share it',
        ),
        (
            lambda p: svd.sample(two(), jax.random.key(0), re.compile('^a/').search),
            'would go with some of the weights that share it',
        ),
        (
            lambda p: svd.kl({**two(), 'b': {}}),
            'shared by b, which holds no weight there',
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    params = Two().init(jax.random.key(0), jnp.ones((1, 4)))['params']
    with pytest.raises(ValueError, match=message):
        make(params)


def test_a_module_named_groups_is_a_module() -> None:
    params = {'groups': {'a': {'kernel': jnp.ones((2, 2))}}}
    assert svd.weight_paths(params) == ['groups/a/kernel']
    assert jax.tree.structure(svd.sparsify(svd.variational(params))) == jax.tree.structure(params)
