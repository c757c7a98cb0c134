"""svd_jax.compaction: smaller arrays, the same outputs."""

from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import svd_jax as svd
from sparse_networks import (
    NETWORKS,
    assert_same,
    conv,
    small_network,
    sparse_network,
)

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


@pytest.mark.parametrize('name', NETWORKS)
def test_outputs_are_those_of_the_sparse_network(name: str) -> None:
    model, variables, x, options = sparse_network(name)
    small = svd.compact(model, variables, x, **options)
    others = jnp.concatenate([x, -2 * x, x**2])  # and another batch size
    wanted = jax.jit(lambda x: model.apply(variables, x, **options))(others)
    assert np.std(jax.tree.leaves(wanted)[0], 0).min() >= 0
    assert np.std(jax.tree.leaves(wanted)[0], 0).max() > 1e-3  # they depend on the input
    assert_same(small(others), wanted)
    before, after = small.report.multiply_adds
    assert after < 0.8 * before
    numbers = sum(leaf.size for leaf in jax.tree.leaves(small.params))
    assert small.report.weights == (sum(v.size for v in jax.tree.leaves(variables)), numbers)
    assert numbers < 0.8 * small.report.weights[0]


class TwoLayers(nn.Module):
    """Four hidden units, from three inputs to two outputs."""

    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2, use_bias=self.bias)(x)


def two_layers() -> dict[str, dict[str, np.ndarray]]:
    """Hidden unit 0 is constant, 2 is not read; input 1 is not read either."""
    rng = np.random.default_rng(0)
    first, second = (rng.uniform(0.5, 1, shape).astype(np.float32) for shape in ((3, 4), (4, 2)))
    first[:, 0] = first[1] = second[2] = 0
    return {
        'Dense_0': {'kernel': first, 'bias': np.float32([0.5, 0.1, 0.2, -0.3])},
        'Dense_1': {'kernel': second, 'bias': np.float32([1, -1])},
    }


def test_a_constant_unit_moves_into_the_next_bias_and_an_unread_one_goes() -> None:
    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    small = svd.compact(TwoLayers(), params, x)
    first, second = params['Dense_0'], params['Dense_1']
    wanted = {
        'Dense_0': {'kernel': first['kernel'][[0, 2]][:, [1, 3]], 'bias': first['bias'][[1, 3]]},
        'Dense_1': {
            'kernel': second['kernel'][[1, 3]],
            'bias': second['bias'] + 0.5 * second['kernel'][0],
        },
    }
    assert jax.tree.map(np.shape, small.params) == jax.tree.map(np.shape, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), small.params, wanted)
    layers = [tuple(layer) for layer in small.report.layers]
    assert layers == [
        ('Dense_0', (3, 2), (4, 2), (2 * 12, 2 * 4)),  # two examples
        ('Dense_1', (4, 2), (2, 2), (2 * 8, 2 * 4)),
    ]
    assert small.report.multiply_adds == (40, 16)
    assert small.report.weights == (26, 12)
    assert 'Dense_0  3 -> 2  4 -> 2' in str(small.report)


def test_without_a_bias_the_constant_gets_an_array_of_its_own() -> None:
    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    del params['Dense_1']['bias']
    small = svd.compact(TwoLayers(bias=False), params, x)
    np.testing.assert_allclose(
        small.params['Dense_1']['constant'], 0.5 * params['Dense_1']['kernel'][0], rtol=1e-6
    )
    assert_same(small(x), TwoLayers(bias=False).apply({'params': params}, x))


def test_constants_of_complex_weights_are_complex() -> None:
    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    params = jax.tree.map(lambda a: (a * np.complex64(1 + 2j)).astype(np.complex64), params)
    model = nn.Sequential([nn.Dense(4), jnp.sin, nn.Dense(2)])
    params = {'layers_0': params['Dense_0'], 'layers_2': params['Dense_1']}
    expected = model.apply({'params': params}, x)
    small = svd.compact(model, params, x)
    assert small.params['layers_0']['kernel'].shape == (2, 2)
    assert_same(small(x), expected)
    assert_same(model.apply({'params': svd.fold(model, params, x)}, x), expected)


def test_gradients_are_those_of_the_weights_that_are_left() -> None:
    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    small = svd.compact(TwoLayers(), params, x)

    def loss(apply):
        return lambda params: jnp.sum(jnp.sin(apply(params, x)))

    found = jax.grad(loss(small.apply))(small.params)
    wanted = jax.grad(loss(lambda params, x: TwoLayers().apply({'params': params}, x)))(params)
    for layer, rows, columns in (('Dense_0', [0, 2], [1, 3]), ('Dense_1', [1, 3], [0, 1])):
        kernel = wanted[layer]['kernel'][np.ix_(rows, columns)]
        np.testing.assert_allclose(found[layer]['kernel'], kernel, rtol=1e-4)
        np.testing.assert_allclose(
            found[layer]['bias'], wanted[layer]['bias'][np.asarray(columns)], rtol=1e-4
        )


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
def test_a_constant_channel_is_folded_only_where_the_edge_does_not_show(padding: str) -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = conv(3, padding=padding)(x)
            return conv(2, padding=padding)(x)

    model, x = Two(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 1)), jnp.float32)
    params = jax.tree.map(np.array, model.init(jax.random.key(0), x)['params'])
    params['Conv_0']['kernel'][..., 1] = 0
    params['Conv_0']['bias'] += 0.5
    small = svd.compact(model, params, x)
    assert_same(small(x), model.apply({'params': params}, x))
    # A constant channel is not computed either way; it is folded, or put in beside the others.
    assert small.report.layers[0].units == (3, 2)
    assert small.report.layers[1].inputs == (3, 2 if padding == 'VALID' else 3)


class ScaledByTheInput(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(6)(x)) * jnp.mean(x)
        return nn.Dense(3)(y)


class Split(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x)).reshape(len(x), 3, 2)
        return nn.Dense(3)(x)


class ReadByTwoAxes(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((3, 2))(nn.relu(nn.Dense(6)(x)))
        return nn.Dense(3)(x)


class ReadOverTwoAxes(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = jnp.broadcast_to(x[:, None], (len(x), 4, 6))
        return nn.Dense(3)(nn.DenseGeneral((3, 2), axis=(-2, -1))(x))


class Pooled(nn.Module):
    """Whose windows at the edge hold nothing but padding."""

    pool: Any = nn.max_pool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x[:, None, None]))
        x = self.pool(x, (2, 2), (2, 2), ((2, 2), (2, 2)))
        return nn.Dense(3)(jnp.maximum(x, -5.0))


class VectorHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        return x @ self.param('head', nn.initializers.normal(1.0), (6,))


class UnreadGroups(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1,), feature_group_count=2)(nn.Dense(6)(x)[:, None])
        x = nn.Dense(3, kernel_init=nn.initializers.zeros)(x)
        return x + self.param('bias', nn.initializers.ones, (1, 1, 3))


class Positions(nn.Module):
    """With a bias along time, which is as long as the other axis."""

    @nn.compact
    def __call__(self, x):
        x = jnp.broadcast_to(nn.relu(nn.Dense(6)(x))[:, None], (len(x), 4, 6))
        bias = self.param('bias', nn.initializers.normal(1.0), (4,))
        return nn.Dense(3)(nn.relu(nn.Dense(4, use_bias=False)(x) + bias[None, :, None]))


class Edges(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))[:, None]
        return nn.Dense(3)(jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode='edge'))


@pytest.mark.parametrize(
    'model',
    [
        ReadOverTwoAxes(), Pooled(), Pooled(nn.avg_pool), VectorHead(), UnreadGroups(), Edges(),
        Positions(),
    ],
    ids=['two axes', 'max', 'mean', 'vector', 'groups', 'edges', 'positions'],
)  # fmt: skip
@pytest.mark.parametrize('shorten', [svd.compact, svd.fold])
def test_constants_of_many_uses(model: nn.Module, shorten: Any) -> None:
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.normal(mean, size=(2, 5)), jnp.float32) for mean in (0, 1))
    params = jax.tree.map(np.array, model.init(jax.random.key(0), x)['params'])
    params['Dense_0']['kernel'][:, [0, 2]] = 0
    params['Dense_0']['bias'][[0, 2]] = [1.5, 2.5]
    if 'DenseGeneral_0' in params:
        params['DenseGeneral_0']['kernel'][:, [1, 3, 4, 5], :, 0] = 0
    short = shorten(model, params, x)
    for inputs in (x, other):
        found = short(inputs) if shorten is svd.compact else model.apply({'params': short}, inputs)
        assert_same(found, model.apply({'params': params}, inputs))


@pytest.mark.parametrize('alike', [False, True])
@pytest.mark.parametrize('model', [ScaledByTheInput(), Split(), ReadByTwoAxes()])
def test_what_differs_from_place_to_place_is_not_folded_as_a_constant(
    model: nn.Module, alike: bool
) -> None:
    """Whether a unit of the last axis has one value, or one for each place of another axis."""
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.normal(mean, size=(2, 5)), jnp.float32) for mean in (0, 1))
    params = jax.tree.map(np.array, model.init(jax.random.key(0), x)['params'])
    params['Dense_0']['kernel'][:, ::2] = 0
    values = np.full(3, 2.0) if alike else np.arange(1.0, 4.0)
    params['Dense_0']['bias'][::2] = values
    if 'DenseGeneral_0' in params:
        kernel = params['DenseGeneral_0']['kernel']
        kernel[1:, :, 0], kernel[0, :, 0] = 0, values
    small = svd.compact(model, params, x)
    for inputs in (x, other):
        assert_same(small(inputs), model.apply({'params': params}, inputs))
    folded = small.params['Dense_1']['kernel'].shape[0] < params['Dense_1']['kernel'].shape[0]
    assert folded == (alike and not isinstance(model, ScaledByTheInput))


def test_the_report_of_a_network_without_a_product() -> None:
    model, x = nn.Embed(5, 3), jnp.arange(4)
    params = model.init(jax.random.key(0), x)['params']
    assert svd.compact(model, params, x).report.multiply_adds == (0, 0)


def test_a_network_that_is_all_constant_still_runs() -> None:
    params, x = two_layers(), jnp.ones((2, 3))
    params['Dense_0']['kernel'][:] = 0
    small = svd.compact(TwoLayers(), params, x)
    assert_same(small(x), TwoLayers().apply({'params': params}, x))


class FrozenKernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Dense(6)(x))
        kernel = self.variable('frozen', 'kernel', lambda: jnp.arange(18.0).reshape(6, 3)).value
        return x @ kernel + self.param('bias', nn.initializers.zeros, (3,))[None]


class FrozenBias(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.Dense(3, use_bias=False)(x)
        return x + self.variable('frozen', 'offset', lambda: jnp.ones(3)).value[None]


@pytest.mark.parametrize('model', [FrozenKernel(), FrozenBias()])
def test_what_is_no_parameter_is_not_folded_into(model: nn.Module) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 5))
    variables = jax.tree.map(np.array, model.init(jax.random.key(1), x))
    variables['params']['Dense_0']['kernel'][:, :3] = 0
    variables['params']['Dense_0']['bias'][:3] = 2
    wanted = model.apply(variables, x)
    folded = svd.fold(model, variables, x)
    assert_same(model.apply(folded, x), wanted)
    assert_same(svd.compact(model, variables, x)(x), wanted)
    jax.tree.map(np.testing.assert_array_equal, folded['frozen'], variables['frozen'])


def test_a_model_without_inputs() -> None:
    class Constants(nn.Module):
        @nn.compact
        def __call__(self):
            return nn.Dense(2)(self.param('z', nn.initializers.ones, (1, 4)))

    params = Constants().init(jax.random.key(0))['params']
    assert_same(svd.compact(Constants(), params)(), Constants().apply({'params': params}))


def test_what_no_rule_covers_is_left_and_said() -> None:
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.sort(nn.Dense(4)(x), -1)
            return nn.Dense(2)(x)

    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    small = svd.compact(Sorted(), params, x)
    assert_same(small(x), Sorted().apply({'params': params}, x))
    (line,) = small.report.left
    assert 'sort: no rule' in line
    assert line in str(small.report)
    assert small.report.layers[0].units == (4, 3)  # the constant is put in before the sort


def test_it_can_be_vmapped_and_exported_for_any_batch_size() -> None:
    model, variables, x, _ = sparse_network('vgg')
    small = svd.compact(model, variables, x)
    wanted = small(x)
    assert_same(jax.vmap(lambda image: small(image[None])[0])(x), wanted)
    (batch,) = export.symbolic_shape('batch')
    like = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    assert_same(export.export(jax.jit(small))(like).call(x), wanted)


STATIC_INDEXING = {
    'first': lambda h: h[:, 0],
    'last': lambda h: h[:, -1],
    'only': lambda h: h[:, :1][:, 0],
    'all but the first': lambda h: h[:, 1:],
    'every other': lambda h: h[:, ::2],
    'every other of some units': lambda h: h[:, 1::2, 1:3],
    'every other of one unit': lambda h: h[:, ::2, 1],
    'every fourth': lambda h: h[:, ::4],
    'every fourth of one unit': lambda h: h[:, ::4, 1],
    'backwards': lambda h: h[:, ::-1],
    'some backwards': lambda h: h[:, 3::-2],
    'one unit': lambda h: h[..., 1],
    'one number': lambda h: h[:, 0, 1],
    'last of the first axis': lambda h: jnp.moveaxis(h, 1, 0)[-1],
    'table': lambda h: h[:, jnp.asarray([2, 0])],
    'take': lambda h: jnp.take(h, 2, axis=1),
    'twice': lambda h: jnp.concatenate([h[:, 1:3], h[:, jnp.asarray([1, 2])]], 1),
}


@pytest.mark.parametrize('name', STATIC_INDEXING)
def test_what_is_indexed_can_be_exported_for_any_batch_size(name: str) -> None:
    params, index = two_layers(), STATIC_INDEXING[name]

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = index(nn.relu(x @ first['kernel'] + first['bias'][None, None]))
        if h.shape[-1] == 4 and h.ndim > 1:
            return h @ second['kernel']
        return h

    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    small = svd.compact(model, params, x[:2])
    (batch,) = export.symbolic_shape('batch')
    like = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(small))(like)
    for some in (x[:1], x):
        assert_same(exported.call(some), model({'params': params}, some))


def test_a_variational_tree_is_refused() -> None:
    params = svd.variational(two_layers())
    with pytest.raises(ValueError, match=r'Dense_0/log_sigma2 .*svd_jax\.sparsify'):
        svd.compact(TwoLayers(), params, jnp.ones((1, 3)))


def test_an_input_of_a_shape_that_changes_the_network_is_refused() -> None:
    class Shaped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            return x if x.shape[0] == 1 else jnp.sin(x)

    params = {'Dense_0': two_layers()['Dense_0']}
    small = svd.compact(Shaped(), params, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r'inputs of this shape.*call compact again'):
        small(jnp.ones((2, 3)))


OF_THE_BATCH = {
    'sum': lambda h: h.sum(0, keepdims=True),
    'mean': lambda h: h - h.mean(0, keepdims=True),
    'product': lambda h: jnp.prod(h, 0, keepdims=True),
    'count': lambda h: h * len(h),
    'count of another array': lambda h: h * jnp.ones(h.shape).sum(),
    'power': lambda h: h ** len(h),
    'places': lambda h: h * jnp.arange(len(h), dtype=h.dtype)[:, None],
    'closed over': lambda h: h * np.linspace(1, 2, len(h), dtype=np.float32)[:, None],
    'merged': lambda h: h * h.reshape(-1).sum(),
    'matrix': lambda h: jnp.tril(jnp.ones((len(h), len(h)))) @ h,
    'window': lambda h: jax.lax.reduce_window(
        h, 0.0, jax.lax.add, (2, 1), (1, 1), ((1, 0), (0, 0))
    ),
}


def assert_same_for(model: Any, params: Any, example: jax.Array, others: tuple) -> None:
    """Compacted and folded with the example, the network is the same for all of these inputs."""
    small, folded = svd.compact(model, params, example), svd.fold(model, params, example)
    for other in others:
        wanted = model({'params': params}, other)
        assert_same(small(other), wanted)
        assert_same(model({'params': folded}, other), wanted)


@pytest.mark.parametrize('name', OF_THE_BATCH)
@pytest.mark.parametrize('batch', [1, 3])
def test_what_depends_on_the_number_of_examples_is_no_constant(name: str, batch: int) -> None:
    params, mix = two_layers(), OF_THE_BATCH[name]

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = mix(nn.relu(x @ first['kernel'] + first['bias'][None]))
        return h @ second['kernel'] + second['bias'][None]

    x = jax.random.normal(jax.random.key(0), (8, 3))
    assert_same_for(model, params, x[:batch], (x[:batch], x, x[:5]))


def token(b: jax.Array, h: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(b[None, None], (len(h), count, b.size))


# JAX leaves such broadcasts out where there is one example.
BROADCAST_TO_THE_BATCH = {
    'token': lambda b, h: jnp.concatenate([token(b, h, 1), h[:, None]], 1).mean(1),
    'tokens': lambda b, h: jnp.concatenate([token(b, h, 1), token(b, h, 5), h[:, None]], 1).sum(1),
    'mask': lambda b, h: jnp.where(b[None] > 0.5, h, 0),
    'table': lambda b, h: h + jnp.sin(jnp.broadcast_to(jnp.cos(b)[None], h.shape)),
    'closed over': lambda b, h: h * jnp.broadcast_to(np.linspace(1, 2, 4)[None], h.shape) + b[None],
}


@pytest.mark.parametrize('name', BROADCAST_TO_THE_BATCH)
@pytest.mark.parametrize('batch', [1, 2])
def test_what_is_broadcast_to_the_examples_may_be_for_one_or_many(name: str, batch: int) -> None:
    params, mix = two_layers(), BROADCAST_TO_THE_BATCH[name]

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = mix(first['bias'], nn.relu(x @ first['kernel']))
        return h @ second['kernel'] + second['bias'][None]

    x = jax.random.normal(jax.random.key(0), (5, 3))
    assert_same_for(model, params, x[:batch], (x[:1], x[:2], x))


@pytest.mark.parametrize('name', OF_THE_BATCH)
@pytest.mark.parametrize('length', [1, 4])
def test_what_depends_on_how_long_an_example_is_is_no_constant(name: str, length: int) -> None:
    params, mix = two_layers(), jax.vmap(OF_THE_BATCH[name])

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = mix(nn.relu(x @ first['kernel'] + first['bias'][None, None]))
        return h @ second['kernel'] + second['bias'][None, None]

    x = jax.random.normal(jax.random.key(0), (2, 8, 3))
    assert_same_for(model, params, x[:, :length], (x[:, :length], x, x[:1, :5]))


class Frames(nn.Module):
    """Of any number of frames, and of as many bands as the example; mean by attention."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x.reshape(*x.shape[:2], -1))
        weight = nn.softmax(nn.Dense(4)(x), axis=1)
        return nn.Dense(2)((weight * nn.relu(x)).sum(1))


class Points(nn.Module):
    """Of any number of points, or of nodes, beside inputs of other sizes."""

    @nn.compact
    def __call__(self, context, points):
        total = nn.relu(nn.Dense(4)(points)).sum(0, keepdims=context.ndim > 1)
        return nn.Dense(2)(total) + nn.Dense(2)(context)


class Places(nn.Module):
    """Of a text, and of where its characters are."""

    @nn.compact
    def __call__(self, x, places):
        x = nn.relu(nn.Dense(4)(x)) + places[None, :, None]
        return nn.Dense(2)(x.sum(1))


class Masked(nn.Module):
    """Of a text, and of which characters see which."""

    @nn.compact
    def __call__(self, x, mask):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)((mask[:, 0] @ x).sum(1))


def sized(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize(
    ('model', 'example', 'others'),
    [
        (Frames(), (sized(2, 6, 3, 1),), [(sized(2, 12, 3, 1),), (sized(1, 5, 3, 1),)]),
        # As many frames as bands, and as examples.
        (Frames(), (sized(3, 3, 3, 1),), [(sized(3, 5, 3, 1),), (sized(2, 4, 3, 1),)]),
        (Points(), (sized(2), sized(5, 3)), [(sized(2), sized(10, 3)), (sized(2), sized(3, 3))]),
        (Points(), (sized(1, 2), sized(5, 3)), [(sized(1, 2), sized(7, 3))]),
        (Places(), (sized(2, 6, 3), sized(6)), [(sized(2, 9, 3), sized(9))]),
        (Places(), (sized(6, 6, 3), sized(6)), [(sized(2, 9, 3), sized(9))]),
        (
            Masked(), (sized(2, 6, 3), jnp.ones((2, 1, 6, 6))),
            [(sized(2, 4, 3), jnp.ones((2, 1, 4, 4))), (sized(3, 6, 3), jnp.ones((3, 1, 6, 6)))],
        ),
    ],
)  # fmt: skip
def test_sizes_that_can_be_others_by_themselves(
    model: nn.Module, example: tuple, others: list[tuple]
) -> None:
    params = jax.tree.map(np.array, model.init(jax.random.key(0), *example)['params'])
    params['Dense_0']['kernel'][:, :2] = 0
    params['Dense_0']['bias'][:2] = 1, -1
    params['Dense_1']['kernel'][:, :2] = 0
    small = svd.compact(model, params, *example)
    folded = svd.fold(model, params, *example)
    for inputs in (example, *others):
        wanted = model.apply({'params': params}, *inputs)
        assert_same(small(*inputs), wanted)
        assert_same(model.apply({'params': folded}, *inputs), wanted)


def test_weights_scaled_by_a_length_take_no_constant() -> None:
    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = nn.relu(x @ first['kernel'] + first['bias'][None, None])
        return h @ (second['kernel'] / x.shape[1]) + second['bias'][None, None]

    params, x = two_layers(), jax.random.normal(jax.random.key(0), (2, 8, 3))
    small, folded = (shrink(model, params, x) for shrink in (svd.compact, svd.fold))
    for other in (x, x[:, :3]):
        wanted = model({'params': params}, other)
        assert_same(small(other), wanted)
        assert_same(model({'params': folded}, other), wanted)


def test_a_small_constant_that_depends_on_a_length_beside_a_large_one() -> None:
    params, x = two_layers(), jax.random.normal(jax.random.key(0), (2, 8, 3))
    params['Dense_0']['kernel'][:, 3] = 0
    params['Dense_0']['bias'][3] = 1e4
    params['Dense_1']['kernel'][3] = 1e-4

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = nn.relu(x @ first['kernel'] + first['bias'][None, None])
        h = h + 0.1 * x.shape[1] * jnp.eye(4)[None, :1]
        return h @ second['kernel'] + second['bias'][None, None]

    small = svd.compact(model, params, x)
    for other in (x, x[:, :3]):
        assert_same(small(other), model({'params': params}, other))


@pytest.mark.parametrize('longest', [8, 16])
def test_a_constant_goes_through_a_mean_over_positions(longest: int) -> None:
    """Whether the model takes longer examples than it is given, or only shorter ones."""

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        assert x.shape[1] <= longest
        h = nn.relu(x @ first['kernel'] + first['bias'][None, None]).mean(1)
        return h @ second['kernel'] + second['bias'][None]

    params, x = two_layers(), jax.random.normal(jax.random.key(0), (2, 8, 3))
    small = svd.compact(model, params, x)
    assert jax.tree.map(np.shape, small.params['Dense_1']) == {'kernel': (2, 2), 'bias': (2,)}
    for other in (x, x[:, :3]):
        assert_same(small(other), model({'params': params}, other))


def test_units_of_every_example_go_whatever_the_batch() -> None:
    # Zeros for each example are constant all the same.
    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = jnp.maximum(x @ first['kernel'] + first['bias'][None], jnp.zeros((len(x), 4)))
        return h @ second['kernel'] + second['bias'][None]

    small = svd.compact(model, two_layers(), jnp.ones((2, 3)))
    assert small.params['Dense_0']['kernel'].shape == (2, 2)


CUTTING = {
    'split': lambda h: jnp.multiply(*jnp.split(h, 2, -1)),
    'slices': lambda h: h[:, :2] - h[:, 2:],
    'every other': lambda h: h[:, ::2] / (1 + h[:, 1::2] ** 2),
    'a part of it': lambda h: h[:, 1:3],
    'twice the same': lambda h: h[:, 1:3] + h[:, :2],
    'backwards': lambda h: h[::-1, 2:] * h[:, 2:],
}


@pytest.mark.parametrize('name', CUTTING)
def test_units_go_through_cuts(name: str) -> None:
    """Of two units that are read after the cut, the second reads nothing but noise."""
    cut, params = CUTTING[name], two_layers()
    params['Dense_0'] = {k: np.random.default_rng(1).normal(size=v.shape).astype(np.float32)
                         for k, v in params['Dense_0'].items()}  # fmt: skip
    params['Dense_1']['kernel'] = np.float32([[1, 2], [0, 0]])

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = cut(jnp.tanh(x @ first['kernel'] + first['bias'][None]))
        return h @ second['kernel'] + second['bias'][None]

    x = jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    small = svd.compact(model, params, x)
    # The units that the first one after the cut is made of, by its gradient.
    made = jax.grad(lambda h: cut(h)[0, 0])(jnp.asarray([[0.1, 0.2, 0.3, 0.4]]))[0]
    assert small.params['Dense_0']['kernel'].shape == (3, np.count_nonzero(made))
    for others in (x, -x[:1], jnp.concatenate([x, x**2])):
        assert_same(small(others), model({'params': params}, others))


BY_LENGTH = {
    'the last five': lambda h: lax.slice_in_dim(h, h.shape[1] - 5, h.shape[1], axis=1),
    'the rest of a split': lambda h: jnp.split(h, [h.shape[1] - 5], axis=1)[1],
    'backwards': lambda h: h * jnp.arange(h.shape[1])[::-1][None, :, None],
    'a window': lambda h: lax.slice_in_dim(
        jnp.concatenate([h, 2 * h, 3 * h, h], 2), h.shape[1] - 5, h.shape[1] - 1, axis=2
    ),
    'a mask': lambda h: h @ jnp.diag(jnp.asarray(np.arange(4) < h.shape[1] - 4, float)),
}


@pytest.mark.parametrize('name', BY_LENGTH)
def test_what_is_taken_may_depend_on_the_length(name: str) -> None:
    taken, params = BY_LENGTH[name], two_layers()

    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = jnp.tanh(x @ first['kernel'] + first['bias'][None, None])
        return taken(h) @ second['kernel']

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 3)), jnp.float32)
    for length in (5, 6, 8):
        small = svd.compact(model, params, x[:, :length])
        folded = svd.fold(model, params, x[:, :length])
        for others in (x[:, :5], x[:, :7], x[:1, :9], x):
            wanted = model({'params': params}, others)
            assert_same(small(others), wanted)
            assert_same(model({'params': folded}, others), wanted)


@pytest.mark.parametrize('mode', ['fill', 'clip'])
def test_columns_of_a_table_go(mode: str) -> None:
    def model(variables: Any, tokens: jax.Array) -> jax.Array:
        table, first = variables['params']['Embed_0'], variables['params']['Dense_0']
        return jnp.take(table['embedding'], tokens, axis=0, mode=mode) @ first['kernel']

    embedding = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    params = {'Embed_0': {'embedding': embedding}, 'Dense_0': two_layers()['Dense_0']}
    params['Dense_0']['kernel'][[0, 2], 0] = 1  # no output is constant
    tokens = jnp.asarray([[0, 1, 2], [4, 4, 3]])
    small = svd.compact(model, params, tokens)
    assert small.params['Embed_0']['embedding'].shape == (5, 2)
    for others in (tokens, tokens[:1], tokens + 3):  # and beyond the end, NaN where that fills
        np.testing.assert_allclose(small(others), model({'params': params}, others), rtol=1e-5)


@pytest.mark.parametrize('mode', ['fill', 'clip'])
def test_a_constant_unit_is_none_beyond_the_end(mode: str) -> None:
    params = two_layers()

    def model(variables: Any, x: jax.Array, places: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = nn.relu(x @ first['kernel'] + first['bias'][None])
        return jnp.take(h, places, axis=0, mode=mode) @ second['kernel']

    x, places = jnp.asarray([[1.0, 2, 3], [-1, 0, 5]]), jnp.asarray([0, 1, 1])
    small = svd.compact(model, params, x, places)
    assert small.params['Dense_0']['kernel'].shape == (2, 2)
    for others in (places, places + 1):
        wanted = model({'params': params}, x, others)
        np.testing.assert_allclose(small(x, others), wanted, rtol=1e-5)


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(['SAME', 'VALID']))
@hypothesis.settings(max_examples=10)
def test_any_pattern_of_zeros(seed: int, density: float, padding: str) -> None:
    model, params, x = small_network(seed, density, padding)
    small = svd.compact(model, params, x)
    assert_same(small(-x), model.apply({'params': params}, -x))


# Folded: the same shapes, without what has no effect.


def zeros(tree: Any) -> int:
    return sum(int(np.sum(np.asarray(leaf) == 0)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', NETWORKS)
def test_a_folded_tree_gives_the_same_outputs(name: str) -> None:
    model, variables, x, options = sparse_network(name)
    folded = svd.fold(model, variables, x, **options)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, variables)
    assert zeros(folded) > zeros(variables)
    others = jnp.concatenate([x, -2 * x, x**2])
    found, wanted = (
        jax.jit(lambda v, x: model.apply(v, x, **options))(v, others) for v in (folded, variables)
    )
    assert_same(found, wanted)
    for collection in variables.keys() - {'params'}:
        assert folded[collection] is not None
        np.testing.assert_equal(folded[collection], variables[collection])
    again = svd.fold(model, folded, x, **options)
    assert zeros(again) == zeros(folded)


@pytest.mark.parametrize(
    'function', [lambda h: 1 / h, jnp.log, jax.lax.rsqrt, lambda h: h**-2.0, lambda h: h**-2]
)
def test_folding_makes_no_zero_of_what_is_divided_by(function: Any) -> None:
    def model(variables: Any, x: jax.Array) -> jax.Array:
        first, second = variables['params']['Dense_0'], variables['params']['Dense_1']
        h = function(x @ first['kernel'] + first['bias'][None])
        return h @ second['kernel'] + second['bias'][None]

    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [4, 0, 5]])
    folded = svd.fold(model, params, x)
    wanted = model({'params': params}, x)
    assert np.all(np.isfinite(wanted))
    assert_same(model({'params': folded}, x), wanted)


def test_folding_moves_a_constant_and_forgets_what_is_not_read() -> None:
    params, x = two_layers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    folded = svd.fold(TwoLayers(), params, x)
    first, second = params['Dense_0'], params['Dense_1']
    read = np.array([False, True, False, True])  # unit 0 is constant at 0.5, nothing reads unit 2
    wanted = {
        'Dense_0': {'kernel': first['kernel'] * read, 'bias': first['bias'] * read},
        'Dense_1': {
            'kernel': second['kernel'] * read[:, None],
            'bias': second['bias'] + 0.5 * second['kernel'][0],
        },
    }
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, folded, wanted)


def test_a_constant_stays_where_no_bias_can_take_it() -> None:
    params, x = two_layers(), jnp.asarray([[1.0, 2, 3]])
    del params['Dense_1']['bias']
    folded = svd.fold(TwoLayers(bias=False), params, x)
    assert folded['Dense_0']['bias'][0] == np.float32(0.5)
    np.testing.assert_array_equal(folded['Dense_1']['kernel'], params['Dense_1']['kernel'])
    np.testing.assert_array_equal(np.flatnonzero(folded['Dense_0']['bias']), [0, 1, 3])


def test_a_constant_stays_where_its_weights_have_another_use() -> None:
    """At the second use the unit is not constant, so that its weights must not become zero."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(2)
            return shared(nn.sigmoid(nn.Dense(2)(x))) * shared(nn.sigmoid(nn.Dense(2)(x)))

    model, x = Twice(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    params = jax.tree.map(np.array, model.init(jax.random.key(0), x)['params'])
    for layer in params.values():
        layer['bias'] += 0.7
    constant = next(name for name, layer in params.items() if layer['kernel'].shape == (3, 2))
    params[constant]['kernel'][:, 1] = 0
    folded = svd.fold(model, params, x)
    assert_same(model.apply({'params': folded}, -x), model.apply({'params': params}, -x))


def test_a_variational_tree_stays_one_and_ships_the_folded_network() -> None:
    model, x = TwoLayers(), jnp.asarray([[1.0, 2, 3], [-1, 0, 5]])
    params = svd.variational(two_layers(), log_sigma2_init=-8.0)
    log_sigma2 = params['Dense_1']['log_sigma2'].at[1].set(9.0)  # drops what read unit 1
    params['Dense_1']['log_sigma2'] = log_sigma2
    for tree in (params, {'params': params}):
        folded = svd.fold(model, tree, x)
        assert jax.tree.structure(folded) == jax.tree.structure(tree)
        inner = folded.get('params', folded)
        assert inner['Dense_1']['log_sigma2'] is log_sigma2
        shipped = svd.sparsify(inner)
        jax.tree.map(
            np.testing.assert_array_equal, shipped, svd.fold(model, svd.sparsify(params), x)
        )
        np.testing.assert_array_equal(np.flatnonzero(inner['Dense_0']['bias']), [3])
        assert not np.any(inner['Dense_1']['kernel'][1])


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(['SAME', 'VALID']))
@hypothesis.settings(max_examples=10)
def test_folding_any_pattern_of_zeros(seed: int, density: float, padding: str) -> None:
    model, params, x = small_network(seed, density, padding)
    folded = svd.fold(model, params, x)
    assert zeros(folded) >= zeros(params)
    wanted = model.apply({'params': params}, -x)
    assert_same(model.apply({'params': folded}, -x), wanted)
