"""svd_jax.symmetry: hidden units in order, the same outputs."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import svd_jax as svd
from sparse_networks import NETWORKS, assert_same, small_network, sparse_network

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


def entries(*arrays: Any, axis: int = -1) -> np.ndarray:
    """How many entries of these arrays belong to each unit along an axis."""
    return sum(
        np.count_nonzero(np.moveaxis(np.asarray(a), axis, 0).reshape(a.shape[axis], -1), 1)
        for a in arrays
    )


def assert_descending(counts: np.ndarray) -> None:
    assert len(set(counts.tolist())) > 1
    assert np.all(np.diff(counts) <= 0)


@pytest.mark.parametrize('name', NETWORKS)
def test_the_outputs_stay_the_same(name: str) -> None:
    model, variables, x, options = sparse_network(name)
    found = svd.sort_units(model, variables, x, **options)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables)
    moved = False
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(np.sort(a, None), np.sort(b, None))
        moved |= not np.array_equal(a, b)
    assert moved
    others = jnp.concatenate([x, -2 * x, x**2])  # and another batch size
    run = jax.jit(lambda v, x: model.apply(v, x, **options))
    assert_same(run(found, others), run(variables, others))
    again = svd.sort_units(model, found, x, **options)
    jax.tree.map(np.testing.assert_array_equal, again, found)


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)(x)


def two_layers() -> dict[str, Any]:
    """Hidden units of 3, 0, 5 and 3 entries."""
    first = np.float32([[1, 0, 2, 0], [0, 0, 3, 4], [0, 0, 0, 5]])
    second = np.float32([[6, 0], [0, 0], [7, 8], [0, 0]])
    return {
        'Dense_0': {'kernel': first, 'bias': np.float32([9, 0, 10, 11])},
        'Dense_1': {'kernel': second, 'bias': np.float32([12, 13])},
    }


def test_units_of_most_entries_come_first_and_of_as_many_in_the_order_they_had() -> None:
    params, order = two_layers(), [2, 0, 3, 1]
    found = svd.sort_units(TwoLayers(), params, jnp.ones((1, 3)))
    first, second = params.values()
    wanted = {
        'Dense_0': {'kernel': first['kernel'][:, order], 'bias': np.float32([10, 9, 11, 0])},
        'Dense_1': {'kernel': second['kernel'][order], 'bias': second['bias']},
    }
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_posterior_goes_with_its_weight_and_dropped_weights_do_not_count() -> None:
    params = svd.variational(two_layers(), log_sigma2_init=-8.0)
    places = jnp.arange(12.0).reshape(3, 4) / 100 - 8
    params['Dense_0']['log_sigma2'] = places.at[:2, 2].set(9.0)  # unit 2 has three entries left
    order = [0, 2, 3, 1]
    for tree in (params, {'params': params}):
        found = svd.sort_units(TwoLayers(), tree, jnp.ones((1, 3)))
        found = found.get('params', found)
        for name, leaf in params['Dense_0'].items():
            np.testing.assert_array_equal(found['Dense_0'][name], leaf[..., np.array(order)])
        np.testing.assert_array_equal(
            found['Dense_1']['log_sigma2'], params['Dense_1']['log_sigma2'][np.array(order)]
        )
    # With another threshold none is dropped.
    found = svd.sort_units(TwoLayers(), params, jnp.ones((1, 3)), threshold=30.0)
    np.testing.assert_array_equal(found['Dense_0']['bias'], [10, 9, 11, 0])


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), padding='VALID')(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def test_rows_of_a_flattened_image_move_at_every_position() -> None:
    x, rng = (
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 4, 2))),
        np.random.default_rng(0),
    )
    params = jax.tree.map(np.array, Flattened().init(jax.random.key(0), x)['params'])
    params['Conv_0']['kernel'] *= rng.random((3, 3, 2, 6)) < np.linspace(0.1, 0.9, 6)
    found = svd.sort_units(Flattened(), params, x)
    order = np.argsort(-entries(params['Conv_0']['kernel']), kind='stable')
    assert not np.array_equal(order, np.arange(6))
    np.testing.assert_array_equal(
        found['Dense_0']['kernel'].reshape(6, 6, 3),  # position, channel
        params['Dense_0']['kernel'].reshape(6, 6, 3)[:, order],
    )
    assert_same(*(Flattened().apply({'params': p}, x) for p in (found, params)))


class Attention(nn.Module):
    """Tokens, two residual sums, heads."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(9, 12)(tokens)
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(3)(y, y)
        return nn.Dense(5)(x + nn.Dense(12)(nn.gelu(nn.Dense(16)(x))))


def test_heads_their_units_and_a_stream_of_residual_sums_are_sorted() -> None:
    tokens, rng = jnp.asarray([[0, 3, 4, 8], [1, 1, 2, 7]]), np.random.default_rng(0)
    params = Attention().init(jax.random.key(0), tokens)['params']
    params = jax.tree.map(lambda leaf: leaf * (rng.random(leaf.shape) < 0.3), params)
    found = svd.sort_units(Attention(), params, tokens)
    heads = found['MultiHeadDotProductAttention_0']
    stream = [found['Embed_0']['embedding'], *found['LayerNorm_0'].values()]
    stream += [found['Dense_1'][name] for name in ('kernel', 'bias')]
    stream += [heads['out'][name] for name in ('kernel', 'bias')]
    firsts = [heads[n]['kernel'] for n in ('query', 'key', 'value')]
    firsts += [found['Dense_0']['kernel'], found['Dense_2']['kernel']]
    assert_descending(entries(*stream) + entries(*firsts, axis=0))
    made = [heads[n][k] for n in ('query', 'key', 'value') for k in ('kernel', 'bias')]
    read = heads['out']['kernel']
    assert_descending(entries(*made, axis=-2) + entries(read, axis=0))
    both = [heads[n][k] for n in ('query', 'key') for k in ('kernel', 'bias')]
    assert_descending(entries(*both))
    value = heads['value'].values()
    assert_descending(entries(*value) + entries(read, axis=1))
    assert_same(*(Attention().apply({'params': p}, tokens) for p in (found, params)))


def times_their_number(x):
    return x * jnp.arange(x.shape[-1])[None]


def halves(x):
    return jnp.concatenate([x[..., :3], 2 * x[..., 3:]], -1)


def summed_up(x):
    return jnp.cumsum(x, -1)


def mixed(x):
    return jnp.swapaxes(x.reshape(-1, 3, 2), 1, 2).reshape(-1, 2, 3).sum(-1)


def backwards(x):
    return x[..., ::-1]


def the_largest(x):
    return nn.one_hot(jnp.argmax(x, -1), 6)


@pytest.mark.parametrize(
    'single_out', [times_their_number, halves, summed_up, mixed, backwards, the_largest]
)
def test_units_that_are_not_treated_alike_keep_their_places(single_out: Any) -> None:
    class Singled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = single_out(nn.Dense(6)(x))
            x = nn.relu(nn.Dense(9)(x))
            return nn.Dense(4)(x)

    rng, x = np.random.default_rng(0), jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    params = Singled().init(jax.random.key(0), x)['params']
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), params)
    params = jax.tree.map(lambda leaf: leaf * (rng.random(leaf.shape) < 0.5), params)
    found = svd.sort_units(Singled(), params, x)
    assert not np.array_equal(found['Dense_2']['kernel'], params['Dense_2']['kernel'])
    assert_same(*(Singled().apply({'params': p}, x) for p in (found, params)))


def test_what_this_call_does_not_read_keeps_its_place() -> None:
    params = two_layers() | {'Other_0': {'kernel': np.float32([[0, 1], [2, 3]])}}
    found = svd.sort_units(TwoLayers(), params, jnp.ones((1, 3)))
    np.testing.assert_array_equal(found['Other_0']['kernel'], params['Other_0']['kernel'])


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(['SAME', 'VALID']))
@hypothesis.settings(max_examples=10)
def test_any_pattern_of_zeros(seed: int, density: float, padding: str) -> None:
    model, params, x = small_network(seed, density, padding)
    found = svd.sort_units(model, params, x)
    assert_same(*(model.apply({'params': p}, -x) for p in (found, params)))


def test_sorted_files_are_smaller(tmp_path: Path) -> None:
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(500)(x))
            return nn.Dense(10)(x)

    rng, x = np.random.default_rng(0), jnp.ones((1, 50))
    alive, params = rng.random(500) < 0.2, jax.jit(Wide().init)(jax.random.key(0), x)['params']
    first, second = (params[name]['kernel'] for name in ('Dense_0', 'Dense_1'))
    params = {
        'Dense_0': {'kernel': first * alive[None], 'bias': 1.0 * alive},
        'Dense_1': {'kernel': second * alive[:, None], 'bias': np.ones(10, np.float32)},
    }
    unsorted = svd.save(tmp_path / 'unsorted.svd', params)
    found = svd.save(tmp_path / 'sorted.svd', svd.sort_units(Wide(), params, x))
    # Which 100 of 500 there are takes 0.72 bits each, once.
    assert unsorted - found > 0.8 * 0.72 * 500 / 8
