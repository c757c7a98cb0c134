"""svd_jax.runtime: the outputs of the compacted network, whatever runs it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import svd_jax as svd
from experiments import models
from svd_jax import backend, kernels, parts, runtime, sparse

Function = Callable[..., Any]


def sparse_params(model: Any, x: np.ndarray, density: float = 0.2, seed: int = 0) -> Any:
    """Random parameters, most weights zero."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, value: Any) -> np.ndarray:
        random = rng.normal(size=value.shape).astype(np.float32)
        if path[-1].key == 'kernel':
            random *= rng.uniform(size=value.shape) < density
        return np.abs(random) + 0.1 if path[-1].key == 'var' else random

    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    dense = jax.tree_util.tree_map_with_path(leaf, variables)
    for layer in jax.tree.leaves(dense['params'], is_leaf=lambda t: 'log_sigma2' in t):
        if isinstance(layer, dict):
            layer.pop('log_sigma2', None)
    return dense


def images(batch: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


def all_sparse(small: svd.Compact, x: np.ndarray) -> Function:
    """The network on sparse kernels alone, whether they are the faster or not."""
    network = parts.Network(small, jnp.asarray(x))
    return runtime._chain(network, [runtime.SPARSE] * len(network.parts))


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.shape(a) == np.shape(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        scale = np.max(np.abs(b), initial=1e-30)
        assert np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0) <= tolerance * scale


NETWORKS: dict[str, tuple[Function, tuple[int, ...]]] = {
    'dense': (lambda: [nn.Dense(7), nn.relu, nn.Dense(5), nn.tanh, nn.Dense(3)], (6,)),
    'flattened': (
        lambda: [
            nn.Conv(4, (3, 3), padding='VALID'),
            lambda x: nn.max_pool(x, (2, 2), (2, 2)),
            nn.relu,
            lambda x: x.reshape(x.shape[0], -1),
            nn.Dense(3),
        ],
        (9, 8, 2),
    ),
    'SAME': (lambda: [nn.Conv(3, (3, 3)), nn.relu, nn.Conv(2, (5, 3))], (6, 5, 2)),
    'strides': (
        lambda: [nn.Conv(3, (3, 3), strides=(2, 1)), nn.Conv(2, (3, 2), strides=(1, 2))],
        (7, 6, 2),
    ),
    '1x1': (lambda: [nn.Conv(3, (1, 1)), nn.sigmoid, nn.Conv(2, (1, 1))], (4, 3, 5)),
    'dilated, in groups': (
        lambda: [nn.Conv(6, (2, 2), kernel_dilation=(2, 1), feature_group_count=2)],
        (5, 5, 4),
    ),
    'depthwise': (lambda: [nn.Conv(4, (3, 3), feature_group_count=4), nn.relu], (5, 5, 4)),
    'one axis': (lambda: [nn.Conv(3, (3,)), nn.relu, nn.Conv(2, (2,), strides=2)], (8, 2)),
    'at every position': (lambda: [nn.Dense(4), nn.relu, nn.Dense(2)], (5, 3)),
    'BatchNorm': (
        lambda: [
            nn.Conv(3, (3, 3), use_bias=False),
            nn.BatchNorm(use_running_average=True),
            nn.relu,
            lambda x: nn.max_pool(x, (3, 3), (2, 2), padding='SAME'),
            lambda x: nn.avg_pool(x, (2, 2), (1, 1)),
            lambda x: x.mean((1, 2)),
            nn.Dense(4),
            nn.softmax,
        ],
        (8, 8, 2),
    ),
}


@pytest.fixture(scope='module', params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[svd.Compact, tuple[int, ...]]:
    layers, shape = NETWORKS[request.param]
    model = nn.Sequential(layers())
    x = images(1, *shape)
    return svd.compact(model, sparse_params(model, x, 0.4), x), shape


@pytest.mark.parametrize('batch', [1, 3, 16, 37])
def test_sparse_kernels_give_what_the_dense_network_gives(
    network: tuple[svd.Compact, tuple[int, ...]], batch: int
) -> None:
    small, shape = network
    run = all_sparse(small, images(1, *shape))
    x = images(batch, *shape, seed=batch)
    assert_close(run(x), small(x))


def test_convolutions_as_matrix_products_give_what_the_dense_network_gives(
    network: tuple[svd.Compact, tuple[int, ...]],
) -> None:
    small, shape = network
    split, x = parts.Network(small, images(1, *shape)), images(5, *shape)
    with backend.override('cpu'):
        run = runtime._chain(split, [runtime.PRODUCTS] * len(split.parts))
        assert_close(run(x), small(x))


def test_convolutions_are_matrix_products_where_that_is_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Conv(32, (3, 3)), images(2, 6, 6, 16)
    small = svd.compact(model, sparse_params(model, x, 0.5), x)
    times = {
        'products': ([3.0, 2.0], [1.0], [9.0, 1.0, 5.0]),  # dense, sparse; products; in a chain
        'sparse': ([3.0, 1.0], [9.0, 5.0]),  # saves more than Winograd's algorithm can
        'dense': ([3.0, 3.5], [4.0], [2.0, 5.0]),
    }
    for kernel, turns in times.items():
        measured = iter(turns)
        monkeypatch.setattr(runtime, '_microseconds', lambda *runs, of=measured: next(of))
        compiled = runtime.compile(small, x)
        (layer,) = compiled.report.layers
        assert layer.kernel == kernel
        assert layer.products_us == (None if kernel == 'sparse' else turns[1][0])
        assert next(measured, None) is None
        assert_close(compiled(x), small(x))
    assert 'products us' in str(compiled.report)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(3, (3, 3))(x))
        y = nn.Conv(3, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x)))
        x = jnp.concatenate([nn.relu(x + y), 2 - x], -1)
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


def test_a_residual_sum_is_one_part() -> None:
    x = images(5, 4, 4, 2)
    small = svd.compact(Residual(), sparse_params(Residual(), x, 0.5), x)
    network = parts.Network(small, x)
    paths = [network.path(part) for part in range(len(network.parts))]
    assert paths == ['Conv_0', 'Conv_2, Conv_1', 'Dense_0']  # in the order in which they run
    assert_close(all_sparse(small, x)(x), small(x))


@pytest.mark.parametrize('batch', [1, 40])
@pytest.mark.parametrize('model', [models.LeNet300(), models.LeNet5()])
def test_lenets(model: Any, batch: int) -> None:
    x = images(batch, 28, 28, 1)
    params = sparse_params(model, x[:1], 0.01)
    small = svd.compact(model, params, x[:1], deterministic=True)
    compiled = runtime.compile(small, x)
    assert_close(compiled(x), model.apply(params, x, deterministic=True))
    for other in (1, 2, 130):  # 130: in several blocks, and more than one thread
        y = images(other, 28, 28, 1, seed=1)
        assert_close(compiled(y), small(y))


class Pooled(nn.Module):
    """A convolution of so many inputs that its sums are made of blocks of them."""

    pool: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(6, (3, 3))(x)
        return nn.relu(nn.max_pool(x, self.pool, self.pool))


@pytest.mark.parametrize('batch', [1, 7, 33])
@pytest.mark.parametrize('pool', [(1, 1), (2, 2), (3, 1)])
def test_sums_in_blocks_of_inputs(pool: tuple[int, int], batch: int) -> None:
    model, x = Pooled(pool), images(batch, 9, 7, 50)
    small = svd.compact(model, sparse_params(model, x, density=0.5), x)
    network = parts.Network(small, jnp.asarray(x))
    (linear,) = (op for op in network.plan(slice(0, 1)).table if op[0] == kernels.LINEAR)
    assert linear[-1] > 1  # blocks
    assert_close(all_sparse(small, x)(x), small(x))


@pytest.mark.parametrize(
    ('model', 'batch', 'blocks'),
    [
        (models.LeNet5(), 2, [2]),
        (models.LeNet5(), 15, [16]),  # nearly a vector
        (models.LeNet5(), 50, [48, 2]),
        (models.LeNet300(), 1, [1]),
        (models.LeNet300(), 2, [16]),  # as much work as for 16
        (models.LeNet300(), 49, [48, 1]),
        (models.LeNet300(), 50, [64]),
    ],
)
def test_examples_that_fill_no_vector(model: Any, batch: int, blocks: list[int]) -> None:
    """They are a block of their own where that is less work than a whole vector."""
    x = images(batch, 28, 28, 1)
    params = sparse_params(model, x[:1], 0.01)
    small = svd.compact(model, params, x[:1], deterministic=True)
    network, every = parts.Network(small, jnp.asarray(x)), slice(0, None)
    sparse = runtime._Sparse(network.plan(every), network.features(every))
    assert sparse._blocks(batch) == blocks
    assert_close(sparse(x), model.apply(params, x, deterministic=True)[0])


@pytest.mark.parametrize('batch', [1, 3])
def test_fewer_examples_than_cores(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(runtime, '_WORTH_A_THREAD', 1)
    monkeypatch.setattr(runtime, '_cores', lambda: 4)
    model, x = Pooled((2, 2)), images(batch, 9, 7, 5)
    small = svd.compact(model, sparse_params(model, x, density=0.5), x)
    assert_close(all_sparse(small, x)(x), small(x))


def test_multiply_adds_are_those_of_the_weights_that_are_not_zero() -> None:
    model, x = models.LeNet5(), images(2, 28, 28, 1)
    params = sparse_params(model, x, 0.02)
    small = svd.compact(model, params, x, deterministic=True)
    network = parts.Network(small, x)
    positions = {'Conv_0': 24 * 24, 'Conv_1': 8 * 8, 'Dense_0': 1, 'Dense_1': 1}
    numbers = range(len(network.parts))
    for part in numbers:
        path = network.path(part)
        kernel = small.params['params'][path]['kernel']
        plan = network.plan(slice(part, part + 1))
        assert plan.multiply_adds == np.count_nonzero(kernel) * positions[path]
    dense = sum(map(network.multiply_adds, numbers))
    assert dense == small.report.multiply_adds[1] // len(x)


class Unusual(nn.Module):
    """With an operation that sparse kernels have not, in the middle."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        x = jnp.sort(nn.Dense(6)(x))
        return {'y': nn.Dense(3)(x), 'constant': 7.0}


def test_what_is_not_covered_runs_dense() -> None:
    x = images(4, 5)
    small = svd.compact(Unusual(), sparse_params(Unusual(), x, 0.5), x)
    compiled = runtime.compile(small, x)
    assert_close(compiled(x), small(x))
    assert_close(compiled(x[:1]), small(x[:1]))
    first, second = compiled.report.layers
    assert (first.kernel, first.left, second.left) == ('dense', 'sort', '')
    assert 'not sparse: sort' in str(compiled.report)
    mixed = runtime._chain(parts.Network(small, x), ['dense', 'sparse'])
    assert_close(mixed(x), small(x))


@pytest.mark.parametrize(
    ('function', 'why'),
    [
        (lambda p, x: (x @ p, x.sum() + x @ p), '2 outputs'),
        (lambda p, x: jnp.ones(3), '0 outputs'),
        (lambda p, x: (x @ p, jnp.zeros(x.shape[0])), 'size of the batch'),
        (lambda p, x: x @ p if len(x) == 2 else x @ p + 1, 'another size of the batch'),
        (lambda p, x: x @ p / len(x), 'another size of the batch'),
    ],
)
def test_what_cannot_be_split_runs_as_it_is(function: Function, why: str) -> None:
    x, p = images(2, 3), images(3, 2)

    def apply(p: Any, x: Any) -> Any:
        return function(p, x)

    small = svd.Compact(p, jax.jit(apply), None)  # type: ignore[arg-type]
    compiled = runtime.compile(small, x)
    assert_close(compiled(x), apply(p, x))
    assert why in str(compiled.report)


@pytest.mark.parametrize(
    'function',
    [
        lambda p, x: x[::-1] @ p,
        lambda p, x: (x - x.mean(0, keepdims=True)) @ p,
        lambda p, x: nn.softmax(x @ p, 0),
        lambda p, x: jnp.cumsum(x, 0) @ p,
        lambda p, x: (x @ p) * jnp.arange(x.shape[0], dtype=x.dtype)[:, None],
        lambda p, x: jnp.concatenate([x[:1], x[:-1]]) @ p,
    ],
)
def test_what_mixes_examples_is_not_covered(function: Function) -> None:
    x, p = images(4, 3), images(3, 2)
    small = svd.Compact(p, jax.jit(function), None)  # type: ignore[arg-type]
    compiled = runtime.compile(small, x)
    assert all(layer.kernel == 'dense' for layer in compiled.report.layers)
    assert_close(compiled(x), function(p, x))
    with pytest.raises(sparse.NotCoveredError):
        all_sparse(small, x)


def test_two_inputs_run_as_they_are() -> None:
    def apply(p: Any, x: Any, y: Any) -> Any:
        return (x + y) @ p

    x, p = images(2, 3), images(3, 2)
    compiled = runtime.compile(svd.Compact(p, jax.jit(apply), None), x, x)  # type: ignore[arg-type]
    assert_close(compiled(x, x), 2 * x @ p)
    assert 'not one array as input' in str(compiled.report)
    assert compiled.report.multiply_adds == (0, 0)


@pytest.mark.parametrize(
    ('function', 'p', 'x'),
    [
        (lambda p, x: x.reshape(2, -1) @ p, images(6, 2), images(4, 3)),
        (lambda p, x: x @ p, images(3, 2), images(3)),  # without examples
    ],
)
def test_a_network_of_one_size_of_the_batch_runs_as_it_is(
    function: Function, p: np.ndarray, x: np.ndarray
) -> None:
    compiled = runtime.compile(svd.Compact(p, jax.jit(function), None), x)  # type: ignore[arg-type]
    assert_close(compiled(x), function(p, x))
    assert 'does not take other sizes of the batch' in str(compiled.report)


def test_a_product_of_which_nothing_is_read() -> None:
    """Such as the queries of an attention whose weights were all dropped."""

    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = jnp.exp(x)
            return x + nn.Dense(5)(nn.Dense(3)(x))

    x = images(2, 4, 5)
    params = jax.tree.map(np.array, Positions().init(jax.random.key(0), x)['params'])
    params['Dense_1']['kernel'][:] = 0
    small = svd.compact(Positions(), params, x)
    assert_close(runtime.compile(small, x)(x), small(x))


def test_takes_arrays_of_many_kinds() -> None:
    model, x = nn.Dense(3), images(4, 5)
    small = svd.compact(model, sparse_params(model, x, 0.5), x)
    compiled, wanted = runtime.compile(small, x), small(x)
    unaligned = np.frombuffer(b'\0' + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for same in (jnp.asarray(x), np.asfortranarray(x), x.astype(np.float64), unaligned):
        assert_close(compiled(same), wanted)
        assert_close(all_sparse(small, x)(same), wanted)
    whole = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert_close(compiled(whole), small(np.float32(whole)))
    assert_close(compiled(x[:0]), wanted[:0])


def test_errors_name_what_to_pass() -> None:
    model, x = nn.Dense(3), images(4, 5)
    small = svd.compact(model, sparse_params(model, x), x)
    with pytest.raises(ValueError, match=r'compile needs an example input'):
        runtime.compile(small)
    with pytest.raises(TypeError, match=r'not a Dense: compile\(compact\(model, params, x\), x\)'):
        runtime.compile(model, x)
    compiled = runtime.compile(small, x)
    for wrong in (x[0], x[:, :4]):
        with pytest.raises(ValueError, match=r'shape \(batch, 5\), not'):
            compiled(wrong)


@settings(max_examples=12)
@given(st.data())
def test_any_pattern_of_zeros(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    channels, features = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    window = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    size = data.draw(st.integers(4, 7)), data.draw(st.integers(4, 20))
    strides = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from(['SAME', 'VALID']))
    pool = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    batch = data.draw(st.integers(1, 70))
    kernel = rng.normal(size=(*window, channels, features)).astype(np.float32)
    kernel *= rng.uniform(size=kernel.shape) < data.draw(st.floats(0, 1))
    bias = rng.normal(size=features).astype(np.float32)

    def function(p: Any, x: Any) -> Any:
        dimensions = ('NHWC', 'HWIO', 'NHWC')
        y = jax.lax.conv_general_dilated(x, p[0], strides, padding, dimension_numbers=dimensions)
        return nn.relu(nn.max_pool(y + p[1].reshape(1, 1, 1, -1), pool, pool))

    small = svd.Compact((kernel, bias), jax.jit(function), None)  # type: ignore[arg-type]
    made = jax.eval_shape(function, (kernel, bias), np.zeros((1, *size, channels), np.float32))
    assume(made.size)
    x = rng.normal(size=(batch, *size, channels)).astype(np.float32)
    assert_close(all_sparse(small, x)(x), small(x))
