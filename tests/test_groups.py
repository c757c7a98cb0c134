"""Scales that whole units share, against direct sampling and NumPy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import svd_jax as svd
from svd_jax import convention
from test_linen import key

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')

FAMILIES = {'normal': False, 'log-normal': True}


def spread(params: Any, seed: int = 0) -> Any:
    """The tree with posteriors that differ from entry to entry, none of them near a threshold."""
    rng = np.random.default_rng(seed)

    def change(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        low, high = {
            'log_sigma2': (-4, -1), 'scale': (0.5, 1.5), 'log_scale': (-2, 0),
        }.get(name, (-1, 1))  # fmt: skip
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(change, params)


def moments_of(node: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the scales of a group, in float64, by SciPy."""
    sigma = np.exp(np.asarray(node['log_sigma2'], np.float64) / 2)
    if 'scale' in node:
        return np.asarray(node['scale'], np.float64), sigma**2
    location = np.asarray(node['log_scale'], np.float64)
    x = np.linspace(-20, 0, 20_001)
    shape = (-1, *(1,) * location.ndim)
    a, b = (-20 - location) / sigma, -location / sigma
    density = stats.truncnorm.pdf(x.reshape(shape), a, b, location, sigma)
    first, second = (
        np.trapezoid(density * np.exp(n * x).reshape(shape), x, axis=0) for n in (1, 2)
    )
    return first, second - first**2


class Heads(nn.Module):
    """A kernel of two axes of outputs, as attention has it, flattened on its way."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.DenseGeneral((3, 2), use_bias=False)(x)


CASES: dict[str, tuple[nn.Module, tuple[int, ...], Any]] = {
    'dense, outputs': (nn.Dense(4), (3,), 'outputs'),
    'dense, inputs': (nn.Dense(4), (3,), 'inputs'),
    'dense, both': (nn.Dense(4), (3,), ['inputs', 'outputs']),
    'dense, time': (nn.Dense(4), (2, 3), 'inputs'),
    'heads': (Heads(), (3,), 1),
    'a part of each head': (Heads(), (3,), 2),
    'einsum': (nn.Einsum((3, 2, 2), 'bi,ijk->bjk', use_bias=False), (3,), 1),
    'conv, outputs': (nn.Conv(3, (2, 2)), (3, 3, 2), 'outputs'),
    'conv, inputs': (nn.Conv(3, (2, 2)), (3, 3, 2), 'inputs'),
    'conv, groups': (nn.Conv(4, (2,), feature_group_count=2), (3, 2), 'outputs'),
    'transposed': (nn.ConvTranspose(3, (2,), (2,)), (3, 2), 'outputs'),
}  # fmt: skip


# Every place of a scale with the quickest of posteriors, and some with the others.
MOMENTS = [
    *((name, (), 'normal') for name in CASES),
    *((name, None, 'normal') for name in ('dense, both', 'conv, outputs', 'conv, inputs', 'heads')),
    *((name, (), 'log-normal') for name in ('dense, both', 'conv, outputs')),
    ('dense, inputs', None, 'log-normal'),
]


@pytest.mark.parametrize(
    ('name', 'where', 'family'),
    [pytest.param(*case, id=f'{case[0]}, {case[2]}, {case[1]}') for case in MOMENTS],
)
def test_activations_have_the_moments_of_sampled_weights(
    name: str, where: Any, family: str
) -> None:
    model, shape, groups = CASES[name]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, *shape)), jnp.float32)
    params = svd.variational(
        model.init(key(0)['noise'], x)['params'], where, groups=groups,
        log_normal=FAMILIES[family],
    )  # fmt: skip
    params = spread(params)
    examples, count = jnp.broadcast_to(x, (2_000, *shape)), 20

    def local(key: jax.Array) -> jax.Array:
        return svd.apply(model, {'params': params}, examples, rngs={'noise': key})[0]

    def sampled(key: jax.Array) -> jax.Array:
        return model.apply({'params': svd.sample(params, key)}, x)[0]

    found = np.concatenate(jax.lax.map(jax.jit(local), jax.random.split(jax.random.key(1), count)))
    wanted = np.asarray(jax.jit(jax.vmap(sampled))(jax.random.split(jax.random.key(2), 40_000)))
    scale = wanted.std(0).max()
    error = np.abs(found.mean(0) - wanted.mean(0)) / (wanted.std(0) + 1e-6)
    assert error.max() < 5 * np.sqrt(2 / 40_000)
    np.testing.assert_allclose(found.std(0), wanted.std(0), rtol=0.06, atol=0.01 * scale)
    assert scale > 0.02


def test_a_scale_is_the_same_at_all_positions_and_new_for_every_example() -> None:
    model, x = nn.Conv(2, (1,), use_bias=False), jnp.ones((2, 5, 3))
    params = spread(svd.variational(model.init(key(0)['noise'], x)['params'], (), groups='outputs'))
    y, _ = svd.apply(model, {'params': params}, x, rngs=key(1))
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=1e-6)
    assert np.abs(y[0] - y[1]).min() > 1e-3


@pytest.mark.parametrize('family', FAMILIES)
def test_the_functions_of_trees_against_numpy(family: str) -> None:
    params = {'a': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}, 'b': {'kernel': jnp.ones(2)}}
    log_normal = FAMILIES[family]
    params = svd.variational(
        params, where='a', groups={'^a': ['inputs', 'outputs']}, log_normal=log_normal
    )
    params = spread(params)
    # Noise alone, and hardly any.
    groups = params['a']['groups']
    name = 'log_scale' if log_normal else 'scale'
    groups['inputs'][name] = groups['inputs'][name].at[1].set(-9.0 if log_normal else 0.01)
    groups['inputs']['log_sigma2'] = jnp.full((3, 1), -2.0).at[1].set(3.0)

    z_in, z_out = (moments_of(groups[group]) for group in ('inputs', 'outputs'))
    limit = 0.0 if log_normal else 3.0
    kept = np.log(z_in[1] / z_in[0] ** 2) < limit
    assert kept.ravel().tolist() == [True, False, True]
    kernel = np.asarray(params['a']['kernel'], np.float64)
    alive = np.asarray(params['a']['log_sigma2']) - 2 * np.log(np.abs(kernel)) < 3
    wanted = np.where(alive, kernel, 0) * np.where(kept, z_in[0], 0) * z_out[0]
    sparse = svd.sparsify(params)
    np.testing.assert_allclose(sparse['a']['kernel'], wanted, rtol=2e-4)
    assert sparse['a'].keys() == {'kernel', 'bias'}
    assert sparse['b']['kernel'] is params['b']['kernel']

    alphas = svd.log_alpha(params)['a']
    for group, (mean, variance) in (('inputs', z_in), ('outputs', z_out)):
        np.testing.assert_allclose(
            alphas['groups'][group][name], np.log(variance / mean**2), rtol=2e-3, atol=2e-3
        )
    assert svd.sparsity(params).nonzero == np.count_nonzero(wanted) + 2
    total = float(svd.kl(params))
    of_groups = float(svd.kl(params, weight={'groups/': 1.0, '': 0.0}))
    of_weights = float(
        svd.kl({'kernel': params['a']['kernel'], 'log_sigma2': params['a']['log_sigma2']})
    )
    assert total == pytest.approx(of_groups + of_weights, rel=1e-5)
    if not log_normal:
        wanted_kl = sum(
            float(svd.kl({'kernel': g['scale'], 'log_sigma2': g['log_sigma2']}))
            for g in groups.values()
        )
        assert of_groups == pytest.approx(wanted_kl, rel=1e-5)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.RNN(nn.SimpleCell(3))(x)


class Lone(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param('kernel', nn.initializers.normal(1.0), (x.shape[-1], 1))[:, 0]


@pytest.mark.parametrize(
    ('model', 'x', 'groups'),
    [
        (Cell(), jnp.ones((4, 5, 2)), 'inputs'),
        (nn.Conv(3, (2, 2)), jnp.ones((4, 3, 3, 2)), [(0, 3)]),
        (nn.Embed(5, 3), jnp.zeros((4,), jnp.int32), 'inputs'),
        (Lone(), jnp.ones((4, 3)), 'outputs'),
    ],
    ids=['a cell', 'positions of each filter', 'rows of a table', 'a lone output'],
)  # fmt: skip
def test_scales_that_multiply_no_input_or_result_are_drawn_once(model, x, groups) -> None:
    params = svd.variational(model.init(key(0)['noise'], x)['params'], (), groups=groups)
    params = spread(params)
    y, kl = svd.apply(model, {'params': params}, x, rngs=key(1))
    other, _ = svd.apply(model, {'params': params}, x, rngs=key(2))
    np.testing.assert_allclose(y[0], y[1], rtol=1e-6)  # equal examples
    assert np.abs(y - other).max() > 1e-3
    assert kl == svd.kl(params)


def layer_params(layer: Any, x: jax.Array) -> Any:
    return spread(layer.init({'params': key(0)['noise'], 'noise': key(0)['noise']}, x)['params'])


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('weights', [True, False])
def test_layers_of_linen_and_nnx_are_the_unchanged_model(weights: bool, family: str) -> None:
    fields: dict[str, Any] = {
        'groups': ['inputs', 'outputs'], 'weights': weights, 'log_normal': FAMILIES[family],
    }  # fmt: skip
    x = jax.random.normal(jax.random.key(3), (6, 3))
    layer = svd.linen.Dense(4, **fields)
    params = layer_params(layer, x)
    assert ('log_sigma2' in params) == weights
    y, kl = layer.apply({'params': params}, x, rngs=key(1))
    wanted, wanted_kl = svd.apply(nn.Dense(4), {'params': params}, x, rngs=key(1))
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    assert float(kl) == pytest.approx(float(wanted_kl), rel=1e-6)
    shipped, _ = layer.apply({'params': params}, x, deterministic=True)
    np.testing.assert_allclose(
        shipped, nn.Dense(4).apply({'params': svd.sparsify(params)}, x), rtol=1e-6
    )

    other = svd.nnx.Linear(3, 4, rngs=nnx.Rngs(0), **fields)
    assert jax.tree.map(jnp.shape, svd.nnx.params(other)) == jax.tree.map(jnp.shape, params)
    other = svd.nnx.with_params(other, params)
    rngs = {'noise': jax.random.key(5)}
    again, other_kl = other(x, rngs=rngs['noise'])
    wanted, _ = layer.apply({'params': params}, x, rngs=rngs)
    assert again.shape == wanted.shape
    assert np.abs(again - shipped).max() > 1e-3
    assert float(other_kl) == pytest.approx(float(kl), rel=1e-6)
    np.testing.assert_allclose(other(x, deterministic=True)[0], shipped, rtol=1e-6)


def test_an_nnx_model_gains_and_loses_groups() -> None:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    random = svd.nnx.variational(model, (), groups='outputs')
    assert jax.tree.map(jnp.shape, svd.nnx.params(random)) == {
        'kernel': (3, 4), 'bias': (4,),
        'groups': {'outputs': {'scale': (1, 4), 'log_sigma2': (1, 4)}},
    }  # fmt: skip
    x = jnp.ones((2, 3))
    y, kl = svd.nnx.apply(random, x, rngs=nnx.Rngs(noise=1))
    assert y.shape == (2, 4)
    assert float(kl) == pytest.approx(float(svd.kl(svd.nnx.params(random))))
    sparse = svd.nnx.sparsify(random)
    assert sorted(svd.nnx.params(sparse)) == ['bias', 'kernel']
    np.testing.assert_allclose(sparse(x), model(x), rtol=1e-6)


def test_dropped_units_leave_smaller_arrays_and_a_file_is_read_back(tmp_path) -> None:
    model = nn.Sequential(
        [nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(len(x), -1), nn.Dense(2)]
    )
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 1))
    params = svd.variational(
        model.init(jax.random.key(1), x)['params'], (), groups={'layers_0': 'outputs'}
    )
    group = params['layers_0']['groups']['outputs']
    group['log_sigma2'] = group['log_sigma2'].at[..., 1:3].set(4.0)
    sparse = svd.sparsify(params)
    small = svd.compact(model, sparse, x)
    assert small.params['layers_0']['kernel'].shape == (3, 3, 1, 2)
    np.testing.assert_allclose(small(x), model.apply({'params': sparse}, x), rtol=1e-4, atol=1e-5)
    for put_in_order in (svd.fold, svd.sort_units):
        with pytest.raises(ValueError, match='is of a scale: pass what'):
            put_in_order(model, params, x)
    svd.save(tmp_path / 'units.svd', params, tolerance=0.1)
    loaded = svd.load(tmp_path / 'units.svd')
    (weight,) = (w for w in convention.weights(params) if w.path == 'layers_0/kernel')
    error = np.abs(loaded['layers_0']['kernel'] - sparse['layers_0']['kernel'])
    assert np.all(error <= 0.5 * np.asarray(weight.deviation()) + 1e-7)
    assert not loaded['layers_0']['kernel'][..., 1:3].any()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda p: svd.variational(p, groups=7), 'groups: 7 is no axis of'),
        (lambda p: svd.variational(p, groups='rows'), "'rows' is no axis of a/kernel"),
        (lambda p: svd.variational(p, groups={'b': 'outputs'}), "'b' decides for no weight"),
        (
            lambda p: svd.variational(svd.variational(p, (), groups=0), (), groups=0),
            'a/kernel has a/groups/axis0 among its groups already',
        ),
        (
            lambda p: svd.kl({'a': {**p['a'], 'groups': {'u': {'scale': jnp.ones((1, 2))}}}}),
            'a/groups/u/ holds scale: it must hold a scale or log_scale and its log_sigma2',
        ),
        (
            lambda p: svd.kl({'a': {**p['a'], 'groups': {
                'u': {'scale': jnp.ones((5, 2)), 'log_sigma2': jnp.ones((5, 2))}
            }}}),
            r'a/groups/u/scale has shape \(5, 2\), the weight that it scales \(3, 2\)',
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change({'a': {'kernel': jnp.ones((3, 2))}})
