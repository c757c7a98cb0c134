"""svd_jax.loops: units of what a loop carries go, as the hidden units of recurrent cells."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax

import svd_jax as svd
from experiments.language_models import LSTM
from sparse_networks import assert_same

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')

UNITS, FEATURES, OUTPUTS = 6, 4, 3
UNREAD = [1, 3, 4]
CELLS = {
    'simple': nn.SimpleCell,
    'gru': nn.GRUCell,
    'mgu': nn.MGUCell,
    'lstm': nn.LSTMCell,
    'optimised lstm': nn.OptimizedLSTMCell,
}


class Recurrent(nn.Module):
    """A cell along time, and what reads it."""

    cell: Callable[..., nn.Module] = nn.OptimizedLSTMCell
    read: Callable[[jax.Array], jax.Array] = lambda h: h
    options: Any = ()

    @nn.compact
    def __call__(self, x):
        h = nn.RNN(self.cell(UNITS, name='cell'), **dict(self.options))(x)
        return nn.Dense(OUTPUTS, name='reader')(self.read(h))


def without(params: Any, units: list[int], seed: int = 0) -> Any:
    """Random parameters in which nothing reads these hidden units."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    for name, layer in {**params['cell'], 'reader': params['reader']}.items():
        if name.startswith('h') or name == 'reader':
            layer['kernel'][units] = 0
    return params


def sequences(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def network(model: nn.Module, x: jax.Array, units: list[int] = UNREAD) -> Any:
    return without(jax.eval_shape(model.init, jax.random.key(0), x)['params'], units)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('name', CELLS)
def test_hidden_units_that_nothing_reads_go(name: str, batch: int) -> None:
    model, x = Recurrent(CELLS[name]), sequences(batch, 5, FEATURES)
    params = network(model, x)
    small = svd.compact(model, params, x)
    left = UNITS - len(UNREAD)
    for path, leaf in jax.tree_util.tree_leaves_with_path(small.params['cell']):
        layer, kind = path[-2].key, path[-1].key
        wanted = (left,) if kind == 'bias' else (left if layer[0] == 'h' else FEATURES, left)
        assert leaf.shape == wanted, path
    assert small.params['reader']['kernel'].shape == (left, OUTPUTS)
    for others in (x, sequences(4, 5, FEATURES), sequences(1, 8, FEATURES), x[:, :2]):
        assert_same(small(others), model.apply({'params': params}, others))


def test_the_report_counts_every_round() -> None:
    model, x = Recurrent(), sequences(2, 5, FEATURES)
    small = svd.compact(model, network(model, x), x)
    kernels = 4 * UNITS, 4 * (UNITS - len(UNREAD))
    left = UNITS - len(UNREAD)
    assert list(map(tuple, small.report.layers)) == [
        ('cell/hf+hg+hi+ho', (UNITS, left), kernels, (10 * 6 * 24, 10 * 3 * 12)),
        ('cell/if+ig+ii+io', (FEATURES, FEATURES), kernels, (10 * 4 * 24, 10 * 4 * 12)),
        ('reader', (UNITS, left), (OUTPUTS, OUTPUTS), (10 * 6 * 3, 10 * 3 * 3)),
    ]
    separate = svd.compact(Recurrent(nn.GRUCell), network(Recurrent(nn.GRUCell), x), x)
    names = [layer.path for layer in separate.report.layers]
    assert sorted(names) == [
        'cell/hn',
        'cell/hr',
        'cell/hz',
        'cell/in',
        'cell/ir',
        'cell/iz',
        'reader',
    ]


READERS = {
    'last': lambda h: h[:, -1],
    'first': lambda h: h[:, 0],
    'mean': lambda h: h.mean(1),
    'every other': lambda h: h[:, ::2],
    'some units': lambda h: jnp.concatenate([h[..., :2], h[..., 2:]], -1),
}


@pytest.mark.parametrize('name', READERS)
def test_whatever_reads_the_sequence(name: str) -> None:
    model, x = Recurrent(nn.GRUCell, READERS[name]), sequences(2, 6, FEATURES)
    params = network(model, x)
    small = svd.compact(model, params, x)
    assert small.params['cell']['hr']['kernel'].shape == (3, 3)
    for others in (x, x[:1], sequences(3, 6, FEATURES), sequences(3, 9, FEATURES)):
        assert_same(small(others), model.apply({'params': params}, others))


OPTIONS = {
    'backwards': {'reverse': True, 'keep_order': True},
    'unrolled': {'unroll': 2},
    'time first': {'time_major': True},
}


@pytest.mark.parametrize('name', OPTIONS)
def test_options_of_the_loop_stay(name: str) -> None:
    model, x = Recurrent(options=OPTIONS[name]), sequences(4, 4, FEATURES)
    params = network(model, x)
    small = svd.compact(model, params, x)
    assert small.params['cell']['hi']['kernel'].shape == (3, 3)
    assert_same(small(-x), model.apply({'params': params}, -x))


def test_units_that_read_each_other_alone_go() -> None:
    """Units 1 and 3 feed each other, and 4 itself: nothing that is read follows from them."""
    model, x = Recurrent(nn.SimpleCell), sequences(2, 5, FEATURES)
    params = network(model, x)
    kernel = params['cell']['h']['kernel']
    kernel[1, 3] = kernel[3, 1] = kernel[4, 4] = 1
    small = svd.compact(model, params, x)
    assert small.params['cell']['h']['kernel'].shape == (3, 3)
    assert_same(small(x), model.apply({'params': params}, x))
    kernel[3, 0] = 1  # 1 is read by 3, which 0 reads
    small = svd.compact(model, params, x)
    assert small.params['cell']['h']['kernel'].shape == (5, 5)
    assert_same(small(x), model.apply({'params': params}, x))


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 0.6), st.sampled_from(sorted(CELLS)))
@hypothesis.settings(max_examples=10)
def test_any_pattern_of_zeros(seed: int, density: float, name: str) -> None:
    model, x, rng = Recurrent(CELLS[name]), sequences(2, 4, FEATURES), np.random.default_rng(seed)
    params = without(jax.eval_shape(model.init, jax.random.key(0), x)['params'], [], seed)
    for layer in [*params['cell'].values(), params['reader']]:
        layer['kernel'] *= rng.random(layer['kernel'].shape) < density
    small = svd.compact(model, params, x)
    assert_same(small(-x), model.apply({'params': params}, -x))
    # Which units lead to the output, by a walk through the graph of the weights.
    state = [layer['kernel'] for key, layer in params['cell'].items() if key[0] == 'h']
    feeds = np.any([kernel != 0 for kernel in state], 0)
    read = np.any(params['reader']['kernel'] != 0, 1)
    for _ in range(UNITS):
        read = read | feeds[:, read].any(1)
    kept = small.params.get('cell', {})
    sizes = {leaf.shape[-1] for key, layer in kept.items() for leaf in layer.values()}
    assert sizes == {int(read.sum())}
    folded = svd.fold(model, params, x)
    assert_same(model.apply({'params': folded}, -x), model.apply({'params': params}, -x))
    biases = [np.asarray(b) for key, b in flat_biases(folded['cell'])]
    assert not any(np.any(bias[~read]) for bias in biases)


def flat_biases(cell: Any) -> list[tuple[str, Any]]:
    return [(name, layer['bias']) for name, layer in cell.items() if 'bias' in layer]


def test_what_the_loop_ends_with_is_read_too() -> None:
    class Ending(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.GRUCell(UNITS, name='cell')
            last, h = nn.RNN(cell, return_carry=True, name='rnn')(x)
            return nn.Dense(OUTPUTS, name='reader')(h), last

    model, x = Ending(), sequences(2, 5, FEATURES)
    params = network(model, x)
    small = svd.compact(model, params, x)
    assert small.params['cell']['hr']['kernel'].shape == (3, UNITS)  # all are made, three are read
    assert_same(small(-x), model.apply({'params': params}, -x))


def test_layers_of_cells_shrink_from_the_last_to_the_first() -> None:
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.RNN(nn.OptimizedLSTMCell(5, name='first'))(x)
            h = nn.RNN(nn.OptimizedLSTMCell(UNITS, name='cell'))(h)
            return nn.Dense(OUTPUTS, name='reader')(h)

    model, x = Stacked(), sequences(2, 4, FEATURES)
    params = network(model, x)
    for gate in 'ifgo':
        kernel = params['cell'][f'i{gate}']['kernel']
        kernel[2, [i for i in range(UNITS) if i not in UNREAD]] = 0  # for units that go
        params['first'][f'h{gate}']['kernel'][2] = 0
    small = svd.compact(model, params, x)
    assert small.params['first']['hi']['kernel'].shape == (4, 4)
    assert small.params['cell']['ii']['kernel'].shape == (4, 3)
    assert_same(small(-x), model.apply({'params': params}, -x))


def test_a_language_model_with_an_embedding() -> None:
    model = LSTM(11, embedding=3, width=UNITS)
    tokens = jnp.asarray(np.random.default_rng(0).integers(11, size=(2, 7)))
    params = jax.tree.map(np.array, model.init(jax.random.key(0), tokens)['params'])
    cell = params['OptimizedLSTMCell_0']
    for gate in 'ifgo':
        cell[f'h{gate}']['kernel'][UNREAD] = 0
        cell[f'i{gate}']['kernel'][1] = 0
    params['Dense_0']['kernel'][UNREAD] = 0
    small = svd.compact(model, params, tokens)
    assert small.params['Embed_0']['embedding'].shape == (11, 2)
    for others in (tokens, tokens[:1, :3]):
        assert_same(small(others), model.apply({'params': params}, others))


# Loops of one's own.


def loop(round_: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A model that carries its four units through a round for each of three steps."""

    def model(variables: Any, x: jax.Array) -> jax.Array:
        params = variables['params']
        start = jnp.tanh(x @ params['first']['kernel'])
        _, made = lax.scan(lambda h, at: round_(params, h, at), start, jnp.arange(3))
        return made @ params['last']['kernel']

    return model


def own_params() -> Any:
    """Nothing reads unit 1 but itself, nor unit 2 but unit 1."""
    rng = np.random.default_rng(0)
    shapes = {'first': (3, 4), 'again': (4, 4), 'last': (4, 2)}
    params = {
        name: {'kernel': rng.uniform(0.5, 1, shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    params['last']['kernel'][[1, 2]] = 0
    params['again']['kernel'][1, [0, 2, 3]] = params['again']['kernel'][2, [0, 2, 3]] = 0
    return params


def through(params: Any, h: jax.Array) -> jax.Array:
    return jnp.tanh(h @ params['again']['kernel'])


def nested(params: Any, h: jax.Array, at: jax.Array) -> Any:
    h, _ = lax.scan(lambda h, _: (through(params, h), None), h, None, length=2)
    return h, h


def checkpointed(params: Any, h: jax.Array, at: jax.Array) -> Any:
    h = jax.checkpoint(lambda h: through(params, h))(h)
    return h, h


ROUNDS = {
    'plain': lambda p, h, at: (through(p, h), h),
    'place in the sequence': lambda p, h, at: (through(p, h) * (at + 1.0), h),
    'a loop in a loop': nested,
    'checkpointed': checkpointed,
    'a branch': lambda p, h, at: (jnp.where(at > 1, through(p, h), -h), h),
}


@pytest.mark.parametrize('name', ROUNDS)
def test_a_loop_of_ones_own(name: str) -> None:
    model, params, x = loop(ROUNDS[name]), own_params(), sequences(2, 3)
    small = svd.compact(model, params, x)
    assert small.params['first']['kernel'].shape == (3, 2)
    assert small.params['again']['kernel'].shape == (2, 2)
    for others in (x, x[:1], sequences(5, 3)):
        assert_same(small(others), model({'params': params}, others))


ACROSS = {
    'examples': lambda p, h, at: (through(p, h - h.mean(0, keepdims=True)), h),
    'units': lambda p, h, at: (through(p, h / jnp.sum(jnp.abs(h), -1, keepdims=True)), h),
    'sorted': lambda p, h, at: (through(p, jnp.sort(h, -1)), h),
}


@pytest.mark.parametrize('name', ACROSS)
def test_what_works_across_examples_or_units(name: str) -> None:
    model, params, x = loop(ACROSS[name]), own_params(), sequences(2, 3)
    small = svd.compact(model, params, x)
    units = 2 if name == 'examples' else 4
    assert small.params['first']['kernel'].shape == (3, units)
    for others in (x, sequences(5, 3)):
        assert_same(small(others), model({'params': params}, others))


def test_what_is_taken_in_a_loop_may_depend_on_the_length() -> None:
    def model(variables: Any, x: jax.Array) -> jax.Array:
        params, length = variables['params'], x.shape[1]
        mask = jnp.asarray(np.arange(4) < length - 2, jnp.float32)

        def round_(h: jax.Array, _: Any) -> Any:
            h = jnp.tanh(h @ (mask[:, None] * params['again']['kernel']))
            return h, lax.slice_in_dim(h, length - 3, length, axis=1)

        start = jnp.tanh(x @ params['first']['kernel'])
        _, made = lax.scan(round_, start, None, length=2)
        return made @ params['last']['kernel']

    params, x = own_params(), sequences(2, 8, 3)
    for length in (3, 4, 6):
        small = svd.compact(model, params, x[:, :length])
        for others in (x[:, :3], x[:1, :5], x):
            assert_same(small(others), model({'params': params}, others))


def test_numbers_and_keys_are_carried_too() -> None:
    def model(variables: Any, x: jax.Array) -> jax.Array:
        params = variables['params']

        def round_(carry: Any, _: Any) -> Any:
            h, count, flag, key = carry
            key, own = jax.random.split(key)
            h = through(params, h) + 0.1 * count + flag * jax.random.normal(own)
            return (h, count + 1, 2.0, key), h

        start = jnp.tanh(x @ params['first']['kernel']), 0, 1.0, jax.random.key(0)
        (_, count, _, _), made = lax.scan(round_, start, None, length=3)
        return made @ params['last']['kernel'] + count

    params, x = own_params(), sequences(2, 3)
    small = svd.compact(model, params, x)
    assert small.params['again']['kernel'].shape == (2, 2)
    assert_same(small(-x), model({'params': params}, -x))


def test_folding_in_a_loop_makes_no_zero_of_what_is_divided_by() -> None:
    def round_(params: Any, h: jax.Array, at: jax.Array) -> Any:
        h = jnp.tanh(1 / (2 + h @ params['again']['kernel'] * (h * h + 1e-3)))
        return h, 1 / h

    model, params, x = loop(round_), own_params(), sequences(2, 3)
    folded = svd.fold(model, params, x)
    wanted = model({'params': params}, x)
    assert np.all(np.isfinite(wanted))
    assert_same(model({'params': folded}, x), wanted)


def test_layers_in_a_loop_stay_whole() -> None:
    """Each round has weights of its own: what one does not read, another may."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
            )
            x, _ = layers(name='layers')(nn.Dense(4, name='first')(x), None)
            return nn.Dense(OUTPUTS, name='reader')(x)

    model, x = Deep(), sequences(2, 3)
    params = jax.tree.map(np.array, model.init(jax.random.key(0), x)['params'])
    params['layers']['Dense_0']['kernel'][:, 1] = 0
    params['reader']['kernel'][1] = 0
    small = svd.compact(model, params, x)
    for name in ('first', 'layers'):
        assert jax.tree.map(np.shape, small.params[name]) == jax.tree.map(np.shape, params[name])
    assert_same(small(-x), model.apply({'params': params}, -x))


# What is done with the smaller network.


def test_gradients_are_those_of_the_weights_that_are_left() -> None:
    model, x = Recurrent(nn.GRUCell), sequences(2, 5, FEATURES)
    params = network(model, x)
    small = svd.compact(model, params, x)
    whole = jax.grad(lambda p: jnp.sum(model.apply({'params': p}, x) ** 2))(params)
    found = jax.grad(lambda p: jnp.sum(small.apply(p, x) ** 2))(small.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        names = tuple(key.key for key in path)
        wanted = whole
        for name in names:
            wanted = wanted[name]
        assert_same(leaf, wanted[np.ix_(*small.kept[names])])


def test_it_can_be_vmapped_and_exported_for_any_batch_size() -> None:
    model, x = Recurrent(), sequences(2, 5, FEATURES)
    small = svd.compact(model, network(model, x), x)
    wanted = small(x)
    assert_same(jax.vmap(lambda one: small(one[None])[0])(x), wanted)
    (batch,) = export.symbolic_shape('batch')
    like = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    assert_same(export.export(jax.jit(small))(like).call(x), wanted)


def test_it_can_be_exported_for_sequences_of_any_length() -> None:
    model, x = Recurrent(), sequences(2, 5, FEATURES)
    small = svd.compact(model, network(model, x), x)
    batch, length = export.symbolic_shape('batch, length')
    like = jax.ShapeDtypeStruct((batch, length, FEATURES), x.dtype)
    exported = export.export(jax.jit(small))(like)
    for others in (x, sequences(3, 9, FEATURES)):
        assert_same(exported.call(others), small(others))


def test_it_can_be_compiled() -> None:
    model, x = Recurrent(read=lambda h: h[:, -1]), sequences(2, 5, FEATURES)
    params = network(model, x)
    compiled = svd.compile(svd.compact(model, params, x), x)
    assert_same(compiled(x), model.apply({'params': params}, x))


@pytest.mark.parametrize('cell', [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_training_goes_on_on_the_neurons_that_are_left(cell: Callable[..., nn.Module]) -> None:
    """With the same noise, the gradients are those of the whole network, where it has no noise."""
    model, x = Recurrent(cell), sequences(2, 5, FEATURES)
    params = network(model, x)
    if cell is nn.LSTMCell:
        params['cell']['hf']['kernel'][1, 0] = 1  # read for one gate alone
    shared = svd.Shared('inputs', ('hf', 'hg', 'hi', 'ho'))
    params = svd.variational(
        params, log_sigma2_init=-40.0, groups=lambda path: shared if '/h' in path else None
    )
    tx = optax.adam(1e-3)
    state = svd.TrainState.create({'params': params}, tx)
    shrunk = svd.shrink(model, state, tx, x)
    left = UNITS - len(UNREAD) + (cell is nn.LSTMCell)
    for gate in 'fgio':
        assert shrunk.state.params['cell'][f'h{gate}']['kernel'].shape == (left, left)
    (scale,) = shrunk.state.params['cell']['groups'].values()
    assert scale['scale'].shape == (left, 1)

    def loss(network: Any, params: Any, x: jax.Array) -> jax.Array:
        y, _ = svd.apply(network, {'params': params}, x, rngs={'noise': jax.random.key(0)})
        return jnp.mean(y**2)

    whole = jax.grad(loss, 1)(model, params, x)
    found = jax.grad(loss, 1)(shrunk.model, shrunk.state.params, x)
    expanded = shrunk.expand(shrunk.state.replace(params=found)).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(expanded):
        if path[-1].key in ('kernel', 'bias', 'scale'):
            wanted = whole
            for key in path:
                wanted = wanted[key.key]
            there = np.asarray(leaf) != 0
            np.testing.assert_allclose(leaf[there], wanted[there], rtol=1e-3, atol=1e-6)
