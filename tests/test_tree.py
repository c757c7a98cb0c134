"""svd_jax.tree on random trees, against independent NumPy."""

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

import svd_jax as svd

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


class Pair(NamedTuple):
    first: Any
    second: Any


@st.composite
def arrays(draw, shape: tuple[int, ...] | None = None) -> np.ndarray:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=shape).astype(np.float32)
    return np.where(rng.uniform(size=shape) < 0.1, 0, values).astype(np.float32)


@st.composite
def layers(draw) -> dict[str, Any]:
    layer = {draw(st.sampled_from(['kernel', 'embedding'])): jnp.asarray(draw(arrays()))}
    if draw(st.booleans()):
        layer['bias'] = jnp.asarray(draw(arrays()))
    return layer


OTHER_LEAVES = st.one_of(
    st.none(), st.integers(-3, 3), arrays(), st.just(jnp.arange(3)), st.just(jnp.zeros(()))
)
NAMES = st.text('abXY_01', min_size=1, max_size=4)


def containers(children: st.SearchStrategy) -> st.SearchStrategy:
    mappings = st.dictionaries(NAMES, children, max_size=3)
    return st.one_of(
        mappings,
        mappings.map(FrozenDict),
        mappings.map(OrderedDict),
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Pair, children, children),
    )


@st.composite
def trees(draw) -> Any:
    """With at least one weight; everything that a tree of parameters may be nested of."""
    rest = draw(st.recursive(st.one_of(layers(), OTHER_LEAVES), containers, max_leaves=6))
    layer = draw(layers())
    return draw(st.sampled_from([layer, {'layer': layer, 'rest': rest}, [rest, (layer, None)]]))


def layers_of(tree: Any, path: str = '') -> dict[str, dict[str, Any]]:
    """The mappings that hold a weight, by path; found here without the library's help."""
    if isinstance(tree, (list, tuple)):
        tree = {str(i): child for i, child in enumerate(tree)}
    elif not isinstance(tree, (dict, FrozenDict)):
        return {}
    found = {path: tree} if {'kernel', 'embedding'} & set(tree) else {}
    for name, child in tree.items():
        found |= layers_of(child, f'{path}{name}/')
    return found


def weight_of(layer: dict[str, Any]) -> np.ndarray:
    return np.float64(layer.get('kernel', layer.get('embedding')))


def randomised(tree: Any, seed: int) -> Any:
    """Another value for every log_sigma2, so that a third or so of the weights are noise."""
    rng = np.random.default_rng(seed)

    def replace(path, leaf):
        if getattr(path[-1], 'key', None) == 'log_sigma2':
            return jnp.asarray(rng.normal(1.0, 3.0, leaf.shape), leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(replace, tree)


def log_alpha_of(layer: dict[str, Any]) -> np.ndarray:
    with np.errstate(divide='ignore'):
        return np.float64(layer['log_sigma2']) - np.log(weight_of(layer) ** 2)


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


@given(trees())
def test_variational_then_sparsify_nothing_is_the_identity(tree) -> None:
    there = svd.variational(tree, log_sigma2_init=-7.0)
    for path, layer in layers_of(there).items():
        log_sigma2 = layer['log_sigma2']
        assert log_sigma2.dtype == jnp.float32
        np.testing.assert_array_equal(log_sigma2, np.full(weight_of(layer).shape, -7.0), path)
    back = svd.sparsify(there, math.inf)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(leaves(back), leaves(tree), strict=True):
        np.testing.assert_array_equal(a, b)


@given(trees(), st.integers(0, 99), st.sampled_from([0.0, 3.0]))
def test_sparsify_zeroes_what_numpy_would(tree, seed: int, threshold: float) -> None:
    full = randomised(svd.variational(tree), seed)
    sparse = svd.sparsify(full, threshold)
    assert jax.tree.structure(sparse) == jax.tree.structure(tree)
    before, after = layers_of(full), layers_of(sparse)
    assert before.keys() == after.keys()
    for path, layer in before.items():
        alpha = log_alpha_of(layer)
        wanted = np.where(alpha >= threshold, 0, weight_of(layer))
        close = np.abs(alpha - threshold) < 1e-4  # where float32 may differ
        np.testing.assert_array_equal(weight_of(after[path])[~close], wanted[~close])
    compiled = jax.jit(svd.sparsify)(full, threshold)
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(sparse), strict=True):
        np.testing.assert_array_equal(a, b)


def test_threshold_itself_is_dropped() -> None:
    layer = {'kernel': jnp.ones(3), 'log_sigma2': jnp.asarray([2.999, 3.0, 3.001])}
    np.testing.assert_array_equal(svd.sparsify(layer)['kernel'], [1, 0, 0])


@given(trees())
def test_other_leaves_stay_the_same_objects(tree) -> None:
    full = svd.variational(tree)
    for result in (full, svd.sparsify(full)):
        kept = {id(leaf) for leaf in leaves(result)}
        weights = {
            id(layer[name])
            for layer in layers_of(tree).values()
            for name in ('kernel', 'embedding')
            if name in layer
        }
        assert kept >= {id(leaf) for leaf in leaves(tree)} - weights
    assert {id(leaf) for leaf in leaves(full)} >= weights


def test_weights_without_a_posterior_are_left_alone() -> None:
    tree = {'a': {'kernel': jnp.ones(2)}, 'b': {'kernel': jnp.ones(2)}}
    sparse = svd.sparsify(svd.variational(tree, where='a', log_sigma2_init=5.0))
    np.testing.assert_array_equal(sparse['a']['kernel'], [0, 0])
    assert sparse['b']['kernel'] is tree['b']['kernel']


@given(trees(), st.integers(0, 99))
def test_log_alpha_against_numpy(tree, seed: int) -> None:
    full = randomised(svd.variational(tree), seed)
    found, wanted = svd.log_alpha(full), layers_of(full)
    assert layers_of(found).keys() == wanted.keys()
    assert len(jax.tree.leaves(found)) == len(wanted)
    for path, layer in layers_of(found).items():
        alpha = log_alpha_of(wanted[path])
        finite = np.isfinite(alpha)
        value = weight_of(layer)
        np.testing.assert_allclose(value[finite], alpha[finite], rtol=1e-5, atol=1e-5)
        assert np.all(value[~finite] > 40)  # a weight of zero: as good as infinite, yet finite
        assert np.all(np.isfinite(value))


@given(trees(), st.integers(0, 99))
def test_kl_is_the_sum_of_numpys(tree, seed: int) -> None:
    full = randomised(svd.variational(tree), seed)
    with np.errstate(over='ignore'):
        wanted = sum(
            np.sum(0.5 * np.log1p(np.exp(-log_alpha_of(layer))))
            for layer in layers_of(full).values()
        )
    kl = svd.kl(full, 'ard')
    assert (kl.shape, kl.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(kl, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda tree: svd.kl(tree, 'ard'))(full), kl, rtol=1e-5)


@pytest.mark.parametrize('method', ['molchanov', 'exact', 'ard'])
def test_kl_has_gradients_for_weights_and_posterior_only(method: str) -> None:
    rng = np.random.default_rng(0)
    kernel, log_sigma2 = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    layer = {'kernel': kernel, 'log_sigma2': log_sigma2}
    tree = {'a': {**layer, 'bias': jnp.ones(4)}, 'b': [layer]}
    gradient = jax.jit(jax.grad(lambda tree: svd.kl(tree, method)))(tree)
    np.testing.assert_array_equal(gradient['a']['bias'], np.zeros(4))
    np.testing.assert_allclose(gradient['a']['kernel'], gradient['b'][0]['kernel'], rtol=1e-6)
    # KL depends on log_sigma2 - log(kernel^2) alone.
    of_kernel, of_log_sigma2 = gradient['a']['kernel'], gradient['a']['log_sigma2']
    np.testing.assert_allclose(of_kernel, -2 * of_log_sigma2 / layer['kernel'], rtol=1e-5)
    assert np.all(of_log_sigma2 < 0)


LAYER = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
FULL = {**LAYER, 'log_sigma2': jnp.zeros((2, 3))}
NETWORK = {'Conv_0': LAYER, 'Dense_0': LAYER, 'heads': [LAYER, {'embedding': jnp.ones(2)}]}


@pytest.mark.parametrize(
    ('where', 'chosen'),
    [
        (None, {'Conv_0/', 'Dense_0/', 'heads/0/', 'heads/1/'}),
        ('Dense', {'Dense_0/'}),
        (r'_0/kernel$', {'Conv_0/', 'Dense_0/'}),
        (r'embedding|^Conv', {'Conv_0/', 'heads/1/'}),
        (lambda path: path == 'heads/0/kernel', {'heads/0/'}),
        (lambda path: not path.startswith('heads'), {'Conv_0/', 'Dense_0/'}),
        (['heads/1/embedding'], {'heads/1/'}),
        (('Conv_0/kernel', 'heads/0/kernel'), {'Conv_0/', 'heads/0/'}),
        ({'Dense_0/kernel', 'heads/0/kernel'}, {'Dense_0/', 'heads/0/'}),
        (svd.weight_paths(NETWORK)[:-1], {'Conv_0/', 'Dense_0/', 'heads/0/'}),
    ],
)
def test_where_chooses(where, chosen: set[str]) -> None:
    full = svd.variational(NETWORK, where)
    assert {path for path, layer in layers_of(full).items() if 'log_sigma2' in layer} == chosen
    # What is left can be made variational afterwards.
    rest = (
        svd.variational(full, lambda path: path.rpartition('/')[0] + '/' not in chosen)
        if (where is not None)
        else full
    )
    assert all('log_sigma2' in layer for layer in layers_of(rest).values())


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: svd.variational({'a': [LAYER, FULL]}), '^a/1/kernel is variational already'),
        (lambda: svd.variational({'scale': jnp.ones(2)}), 'no leaf named kernel or embedding'),
        (lambda: svd.variational({'kernel': jnp.arange(2)}), 'no leaf named kernel or embedding'),
        (lambda: svd.variational({'a': LAYER}, 'b'), "'b' is found in none of.*a/kernel"),
        (
            lambda: svd.variational({'a': LAYER}, 'b', groups='inputs'),
            "'b' is found in none of.*a/kernel",
        ),
        (lambda: svd.sample(FULL, jax.random.key(0), 'LSTM'), "'LSTM' is found in none of"),
        (
            lambda: svd.variational(NETWORK, ['Conv_0/kernel', 'Dense_0', 'Dense_1/kernel']),
            'where names Dense_0, Dense_1/kernel, but the weights are Conv_0/kernel, Dense_0/kernel'
            '.*svd.weight_paths',
        ),
        (lambda: svd.variational(NETWORK, []), r'where=\[\] chose none of Conv_0/kernel'),
        (
            lambda: svd.kl({'a': {'b': {**FULL, 'log_sigma2': jnp.zeros((3, 2))}}}),
            r'a/b/log_sigma2 has shape \(3, 2\) but a/b/kernel has \(2, 3\)',
        ),
        (
            lambda: svd.sparsify({'a': {'log_sigma2': jnp.zeros(2)}, 'b': FULL}),
            '^a/log_sigma2 has no kernel or embedding beside it',
        ),
        (
            lambda: svd.kl({'a': {**FULL, 'embedding': jnp.ones((2, 3))}}),
            '^a/(kernel stands beside embedding|embedding stands beside kernel)',
        ),
        (
            lambda: svd.variational({'a': {'kernel': nn.Partitioned(jnp.ones(2), ('x',))}}),
            r'^a/kernel is boxed .*unbox\(params\)',
        ),
        (lambda: svd.kl({'a': LAYER}), 'no weight has a log_sigma2.*svd.variational'),
        (lambda: svd.log_alpha({'a': LAYER}), 'no weight has a log_sigma2'),
        (lambda: svd.sparsify({'a': LAYER}), 'no weight has a log_sigma2'),
        (lambda: svd.sparsity({'bias': jnp.ones(2)}), 'no leaf named.*nothing to count'),
        (lambda: svd.kl(FULL, 'mean'), "unknown KL method 'mean'"),
    ],
)
def test_errors_name_the_path_and_the_remedy(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_keys_need_not_be_strings() -> None:
    tree = svd.variational({'layers': {0: LAYER, 1: LAYER}}, 'layers/1/')
    assert set(tree['layers']) == {0, 1}
    assert [set(tree['layers'][i]) for i in (0, 1)] == [set(LAYER), {*LAYER, 'log_sigma2'}]
    assert jax.tree.structure(svd.sparsify(tree)) == jax.tree.structure(
        {'layers': {0: LAYER, 1: LAYER}}
    )


PAIR = {'Conv_0': FULL, 'Conv_1': FULL, 'heads': [FULL]}
BY_PATTERN = {'Conv_0': 1.0, 'Conv': 2.0, '': 3.0}
NUMBERS = {'Conv_0/kernel': 1.0, 'Conv_1/kernel': 2.0, 'heads/0/kernel': 3.0}
PER_PATH = [
    BY_PATTERN,
    OrderedDict(BY_PATTERN),
    {'': 3.0, 'Conv_0': 1.0, 'Conv': 2.0},  # '' is last wherever it stands
    {'^Conv_0/': 1.0, r'0/k.*l$': 3.0, 'v_1': 2.0},
    NUMBERS.__getitem__,
]


@pytest.mark.parametrize('value', PER_PATH, ids=range(len(PER_PATH)))
def test_a_number_for_every_path(value) -> None:
    full = svd.variational(svd.sparsify(PAIR, math.inf), log_sigma2_init=value)
    assert {path: float(layer['log_sigma2'][0, 0]) for path, layer in layers_of(full).items()} == {
        'Conv_0/': 1.0, 'Conv_1/': 2.0, 'heads/0/': 3.0
    }  # fmt: skip

    # Weights of 1 have the log_alpha that their log_sigma2 is: of three, one is below each number.
    steps = jnp.asarray([[0.5, 1.5, 2.5]] * 2)
    tree = jax.tree.map(lambda leaf: steps if leaf is FULL['log_sigma2'] else leaf, PAIR)
    wanted = {'Conv_0/': 1, 'Conv_1/': 2, 'heads/0/': 3}
    sparse = svd.sparsify(tree, value)
    kept = {path: np.count_nonzero(layer['kernel'][0]) for path, layer in layers_of(sparse).items()}
    assert kept == wanted
    counts = svd.sparsity(tree, value).layers
    assert {f'{path}/': count.nonzero // 2 for path, count in counts.items()} == wanted

    terms = [svd.kl(layer) for layer in (FULL, FULL, FULL)]
    wanted_kl = sum(number * term for number, term in zip((1, 2, 3), terms, strict=True))
    found = svd.kl(PAIR, weight=value)
    assert (found.shape, found.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(found, wanted_kl, rtol=1e-6)


def test_numbers_may_be_traced_and_their_gradient_taken() -> None:
    tree = randomised(PAIR, seed=0)
    for threshold in (0.0, 1.0):
        for value in (threshold, {'Conv': threshold, '': 2.0}):
            traced = jax.jit(svd.sparsify)(tree, value)  # jit sorts: '' comes first
            wanted = svd.sparsify(tree, value)
            for a, b in zip(leaves(traced), leaves(wanted), strict=True):
                np.testing.assert_array_equal(a, b)
    slope = jax.grad(lambda weight: svd.kl(tree, weight=weight))({'Conv': 1.0, '': 1.0})
    np.testing.assert_allclose(slope[''], svd.kl(tree['heads']), rtol=1e-6)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ({'Conv': 1.0}, "no pattern is found in heads/0/kernel: add one, or the key ''"),
        ({'Cnov': 1.0, '': 2.0}, "'Cnov' decides for no weight: it is found in none of Conv_0/k"),
        ({'Conv': 1.0, 'Conv_0': 2.0, '': 0.0}, "'Conv_0' decides for no weight: patterns before"),
        ({}, 'no pattern is found in Conv_0/kernel'),
    ],
)
def test_numbers_for_no_path_and_paths_without_a_number_are_errors(value, message: str) -> None:
    for name, call in (
        ('threshold', lambda: svd.sparsify(PAIR, value)),
        ('threshold', lambda: svd.sparsity(PAIR, value)),
        ('weight', lambda: svd.kl(PAIR, weight=value)),
        (
            'log_sigma2_init',
            lambda: svd.variational(svd.sparsify(PAIR), log_sigma2_init=value),
        ),
    ):
        with pytest.raises(ValueError, match=f'^{name}: .*{message}'):
            call()


def test_numbers_are_asked_for_only_where_they_are_needed() -> None:
    tree = svd.variational(NETWORK, 'Conv', log_sigma2_init={'Conv': 5.0})
    assert svd.sparsity(tree, {'Conv_0': 4.0}).layers['Conv_0'].nonzero == 0
    assert svd.kl(tree, weight={'Conv': 0.0}) == 0


@given(trees())
def test_weight_paths_lead_to_all_weights_in_order(tree) -> None:
    found = [path.rpartition('/') for path in svd.weight_paths(tree)]
    layers = layers_of(tree)
    assert {f'{parent}/'.removeprefix('/') for parent, _, _ in found} == {
        path for path, layer in layers.items()
    }
    assert all(name in ('kernel', 'embedding') for _, _, name in found)
    assert svd.weight_paths(svd.variational(tree)) == svd.weight_paths(tree)


@given(trees(), st.integers(0, 99))
def test_sparsity_counts_what_numpy_counts(tree, seed: int) -> None:
    full = randomised(svd.variational(tree), seed)
    sparse = svd.sparsify(full)
    for counts in (svd.sparsity(full), svd.sparsity(sparse)):
        found = {path.removesuffix('/'): layer for path, layer in layers_of(sparse).items()}
        if '' in found:  # the root itself: called by its weight's name
            found = {next(n for n in found[''] if n in ('kernel', 'embedding')): found['']}
        assert counts.layers.keys() == found.keys()
        for path, layer in found.items():
            weight = weight_of(layer)
            assert counts.layers[path] == (np.count_nonzero(weight), weight.size)
        nonzero = sum(np.count_nonzero(weight_of(layer)) for layer in found.values())
        total = sum(weight_of(layer).size for layer in found.values())
        assert (counts.nonzero, counts.total) == (nonzero, total)
        assert counts.compression == (total / nonzero if nonzero else math.inf)
        assert math.isclose(counts.percent, 100 * (total - nonzero) / total if total else 0)


@pytest.mark.parametrize('model', [nn.Dense(4), nn.Conv(4, (3, 3))], ids=lambda m: type(m).__name__)
def test_trees_fit_the_plain_flax_model(model: nn.Module) -> None:
    x = jnp.ones((1, 5, 5, 2))
    params = model.init(jax.random.key(0), x)['params']
    full = svd.variational(params)
    np.testing.assert_array_equal(
        model.apply({'params': full}, x), model.apply({'params': params}, x)
    )
    y = model.apply({'params': svd.sparsify(full, -math.inf)}, x)
    np.testing.assert_array_equal(y, np.zeros_like(y))  # all dropped, and the bias starts at zero


def test_numpy_trees_work_as_jax_trees_do() -> None:
    full = jax.tree.map(np.asarray, {'a': FULL, 'b': [FULL]})
    np.testing.assert_allclose(svd.kl(full), svd.kl({'a': FULL, 'b': [FULL]}))
    assert svd.sparsity(full, 0.0).nonzero == 0
    np.testing.assert_array_equal(svd.sparsify(full, 0.0)['b'][0]['kernel'], np.zeros((2, 3)))
    assert svd.variational({'a': full['a']['kernel'], 'kernel': full['a']['kernel']})


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_types_are_kept(dtype) -> None:
    full = svd.variational({'kernel': jnp.ones(3, dtype)})
    assert full['log_sigma2'].dtype == dtype
    assert svd.sparsify(full)['kernel'].dtype == dtype


def test_shapes_alone_are_enough_under_eval_shape() -> None:
    shape = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    full = jax.eval_shape(svd.variational, {'a': {'kernel': shape}})
    assert full['a']['log_sigma2'] == shape
    assert jax.eval_shape(svd.sparsify, full) == {'a': {'kernel': shape}}
    assert jax.eval_shape(svd.kl, full).shape == ()


@pytest.mark.parametrize(
    'function', [svd.variational, svd.kl, svd.log_alpha, svd.sparsify, svd.sparsity, svd.diagnose]
)
def test_two_weights_of_one_path_are_refused(function: Any) -> None:
    """Not counted as one."""
    kernel, log_sigma2 = jnp.ones((2, 2)), jnp.zeros((2, 2))
    if function is svd.variational:
        layer = {'kernel': kernel}
    else:
        layer = {'kernel': kernel, 'log_sigma2': log_sigma2}
    with pytest.raises(ValueError, match='two arrays have the path a/b/kernel: rename one of them'):
        function({'a/b': layer, 'a': {'b': layer}})
