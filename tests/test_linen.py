"""Contracts that every layer of svd_jax.linen meets, against its twin in flax.linen and NumPy."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import svd_jax as svd

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    fields: dict[str, Any] = {}  # noqa: RUF012  # never changed


CASES = {
    'dense': Case('Dense', (3, 5), (4,)),
    'dense, no bias': Case('Dense', (2, 3, 5), (4,), {'use_bias': False}),
    'dense, 1d': Case('Dense', (5,), (4,)),
    'general': Case('DenseGeneral', (3, 4, 2), ((2, 3),), {'axis': (1, 2)}),
    'general, last': Case('DenseGeneral', (3, 4, 2), (6,)),
    'general, batch': Case(
        'DenseGeneral', (2, 3, 4), (5,), {'axis': -1, 'batch_dims': (0,), 'use_bias': False}
    ),
    'conv1': Case('Conv', (2, 9, 3), (4, 3), {'strides': 2}),
    'conv1, causal': Case('Conv', (2, 9, 3), (4, (3,)), {'padding': 'CAUSAL'}),
    'conv2': Case('Conv', (2, 6, 7, 3), (4, (3, 2))),
    'conv2, valid': Case('Conv', (2, 6, 7, 3), (4, (3, 2)), {'padding': 'VALID'}),
    'conv2, valid, no bias': Case(
        'Conv', (2, 6, 7, 3), (4, (3, 2)), {'padding': 'VALID', 'use_bias': False}
    ),
    'conv2, circular': Case('Conv', (2, 6, 7, 3), (4, (3, 3)), {'padding': 'CIRCULAR'}),
    'conv2, explicit': Case(
        'Conv', (2, 6, 7, 3), (4, (3, 3)), {'padding': ((1, 0), (2, 1)), 'strides': (1, 2)}
    ),
    'conv2, dilated': Case(
        'Conv', (2, 8, 7, 2), (3, (3, 2)), {'kernel_dilation': (2, 1), 'padding': 'VALID'}
    ),
    'conv2, input dilated': Case(
        'Conv', (2, 4, 5, 2), (3, (3, 3)), {'input_dilation': (2, 1), 'padding': 1}
    ),
    'conv2, groups': Case('Conv', (2, 6, 5, 4), (6, (3, 3)), {'feature_group_count': 2}),
    'conv2, unbatched': Case('Conv', (6, 5, 4), (6, (3, 3)), {'padding': 'VALID'}),
    'conv3': Case('Conv', (1, 4, 5, 3, 2), (3, (2, 3, 1)), {'padding': 'VALID'}),
    'transpose1': Case('ConvTranspose', (2, 5, 3), (4, (3,)), {'strides': (2,)}),
    'transpose2': Case(
        'ConvTranspose', (2, 4, 5, 3), (4, (3, 3)), {'strides': (2, 1), 'padding': 'VALID'}
    ),
    'transpose2, explicit': Case(
        'ConvTranspose', (2, 4, 5, 3), (4, (2, 3)), {'padding': ((1, 1), (0, 2))}
    ),
    'embed': Case('Embed', (2, 3), (7, 4)),
}
DTYPES = {
    'bf16 compute': {'dtype': jnp.bfloat16},
    'bf16 parameters': {'param_dtype': jnp.bfloat16},
}
# Every case in float32, and one of each kind of layer in every precision.
GRID = [pytest.param(case, {}, id=name) for name, case in CASES.items()] + [
    pytest.param(CASES[name], fields, id=f'{name}, {of}')
    for name in ('dense', 'conv2', 'conv2, valid', 'embed')
    for of, fields in DTYPES.items()
]
every_layer = pytest.mark.parametrize(('case', 'dtypes'), GRID)
# One of each way that layers are computed.
KINDS = ('dense', 'general', 'conv2', 'conv2, valid', 'transpose2', 'embed')
each_kind = pytest.mark.parametrize('case', [CASES[name] for name in KINDS], ids=KINDS)


def inputs(case: Case) -> jax.Array:
    rng = np.random.default_rng(0)
    if case.name == 'Embed':
        return jnp.asarray(rng.integers(0, case.args[0], case.shape), jnp.int32)
    return jnp.asarray(rng.normal(size=case.shape), jnp.float32)


def layers(case: Case, dtypes: dict[str, Any] | None = None, **own: Any) -> tuple[Any, nn.Module]:
    """The variational layer, and its twin."""
    fields = {**case.fields, **(dtypes or {})}
    if case.name != 'Embed':  # a bias of zeros would hide mistakes
        fields['bias_init'] = nn.initializers.normal(1.0)
    variational = getattr(svd.linen, case.name)(*case.args, **fields, **own)
    return variational, getattr(nn, case.name)(*case.args, **fields)


def init(layer: nn.Module, case: Case, seed: int = 0) -> dict[str, Any]:
    return jax.jit(layer.init)(jax.random.key(seed), inputs(case))['params']


def run(layer: nn.Module, params: dict[str, Any], x: jax.Array, **arguments: Any) -> Any:
    """Compiled whole, which takes less time than one operation after another."""
    return jax.jit(lambda params: layer.apply({'params': params}, x, **arguments))(params)


def weight_name(params: dict[str, Any]) -> str:
    return 'embedding' if 'embedding' in params else 'kernel'


def with_noise(params: dict[str, Any], low: float = -4.0, high: float = 4.0) -> dict[str, Any]:
    """A log_alpha of each weight's own, spread evenly."""
    weight = np.float64(params[weight_name(params)])
    alpha = np.random.default_rng(1).uniform(low, high, weight.shape)
    log_sigma2 = alpha + np.log(weight**2 + 1e-30)
    return {**params, 'log_sigma2': jnp.asarray(log_sigma2, params['log_sigma2'].dtype)}


def key(seed: int) -> dict[str, jax.Array]:
    return {'noise': jax.random.key(seed)}


@every_layer
def test_parameters_are_the_twins_and_log_sigma2(case: Case, dtypes) -> None:
    layer, twin = layers(case, dtypes, log_sigma2_init=-7.0)
    params, plain = init(layer, case), init(twin, case)
    log_sigma2 = params.pop('log_sigma2')
    assert params.keys() == plain.keys()
    for name, wanted in plain.items():
        assert (params[name].shape, params[name].dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(params[name], wanted)
    weight = plain[weight_name(plain)]
    assert (log_sigma2.shape, log_sigma2.dtype) == (weight.shape, weight.dtype)
    np.testing.assert_array_equal(log_sigma2, np.full(weight.shape, -7.0))


def assert_same(y: jax.Array, wanted: jax.Array, coarse: bool) -> None:
    assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    tolerance = {'rtol': 2e-2, 'atol': 5e-2} if coarse else {'rtol': 1e-5, 'atol': 1e-5}
    np.testing.assert_allclose(np.float32(y), np.float32(wanted), **tolerance)


@every_layer
def test_outputs_are_the_twins(case: Case, dtypes) -> None:
    layer, twin = layers(case, dtypes)
    params, x = with_noise(init(layer, case)), inputs(case)
    plain = {name: leaf for name, leaf in params.items() if name != 'log_sigma2'}
    quiet = {**plain, 'log_sigma2': jnp.full_like(params['log_sigma2'], -80.0)}
    sparse = svd.sparsify(params, 3.0)
    assert 0 < np.mean(np.float32(sparse[weight_name(sparse)]) == 0) < 0.5

    @jax.jit  # one compilation for all
    def outputs(params, quiet, plain, sparse):
        def apply(layer, params, **arguments):
            return layer.apply({'params': params}, x, **arguments)

        return {
            'no variance': apply(layer, quiet, rngs=key(1)),
            'mean': apply(layer.clone(threshold=jnp.inf), params, deterministic=True),
            'dense tree': apply(layer, plain),
            'deterministic': apply(layer, params, deterministic=True),
            'sparse tree': apply(layer, sparse),
        }, (apply(twin, plain), apply(twin, sparse))

    found, (wanted_dense, wanted_sparse) = outputs(params, quiet, plain, sparse)
    for name, (y, kl) in found.items():
        wanted = wanted_sparse if name in ('deterministic', 'sparse tree') else wanted_dense
        assert_same(y, wanted, coarse=bool(dtypes))
        assert (kl.shape, kl.dtype) == ((), jnp.float32)
        if name.endswith('tree'):
            assert kl == 0
        else:
            tree = quiet if name == 'no variance' else params
            np.testing.assert_allclose(kl, svd.kl(tree), rtol=1e-5)


@each_kind
@pytest.mark.parametrize('method', ['molchanov', 'exact', 'ard'])
def test_kl_is_that_of_the_tree(case: Case, method: str) -> None:
    layer, _ = layers(case, kl_method=method)
    params = with_noise(init(layer, case))
    for arguments in ({'rngs': key(1)}, {'deterministic': True}):
        _, kl = run(layer, params, inputs(case), **arguments)
        np.testing.assert_allclose(kl, svd.kl(params, method), rtol=1e-5)


@pytest.mark.parametrize(
    ('case', 'dtypes'),
    [(CASES[name], {}) for name in KINDS]
    + [(CASES[name], dtypes) for name in ('dense', 'conv2') for dtypes in DTYPES.values()],
)
def test_gradients_are_finite_and_flow_to_every_parameter(case: Case, dtypes) -> None:
    layer, _ = layers(case, dtypes)
    params, x = with_noise(init(layer, case)), inputs(case)
    weight = weight_name(params)
    # Weights and inputs of zero are where logarithms and square roots go wrong.
    params[weight] = params[weight].at[..., 0].set(0)
    x = x if case.name == 'Embed' else x.at[0].set(0)

    @jax.jit
    @jax.grad
    def gradients(params: dict[str, Any]) -> jax.Array:
        y, kl = layer.apply({'params': params}, x, rngs=key(1))
        return jnp.sum(y.astype(jnp.float32) ** 2) + kl

    for name, gradient in gradients(params).items():
        assert gradient.dtype == params[name].dtype
        assert jnp.all(jnp.isfinite(gradient)), name
        assert jnp.any(gradient != 0), name


def test_the_kl_of_another_layer_is_not_taken_for_deterministic() -> None:
    model, x = nn.Sequential([svd.linen.Dense(3), svd.linen.Dense(3)]), jnp.ones((2, 3))
    layer = svd.variational({'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)})
    params = {'layers_0': layer, 'layers_1': layer}
    with pytest.raises(TypeError, match=r'Dense got an array for deterministic.*one by one'):
        model.apply({'params': params}, x, rngs=key(1))


@each_kind
def test_noise_depends_on_the_key_alone(case: Case) -> None:
    layer, _ = layers(case)
    params, x = with_noise(init(layer, case)), inputs(case)
    first, again, other = (run(layer, params, x, rngs=key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.asarray(first) != np.asarray(other))


@pytest.mark.parametrize('case', [CASES[k] for k in KINDS if k != 'embed'], ids=KINDS[:-1])
def test_bias_takes_no_part_in_the_variance(case: Case) -> None:
    layer, _ = layers(case)
    params, x = with_noise(init(layer, case)), inputs(case)
    shifted = {**params, 'bias': params['bias'] + 100.0}
    y, y_shifted = (run(layer, p, x, rngs=key(1))[0] for p in (params, shifted))
    np.testing.assert_allclose(y_shifted - y, np.full(y.shape, 100.0), rtol=1e-4)


@each_kind
def test_mask_in_training_removes_the_mean_but_not_the_noise(case: Case) -> None:
    layer, _ = layers(case, mask_in_training=True)
    params, x = with_noise(init(layer, case)), inputs(case)
    weight = weight_name(params)
    # By hand: the kept mean, the variance as before.
    masked = {**params, weight: svd.sparsify(params)[weight]}
    plain = layer.clone(mask_in_training=False)
    y, kl = run(layer, params, x, rngs=key(1))
    wanted, _ = run(plain, masked, x, rngs=key(1))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    unmasked, _ = run(plain, params, x, rngs=key(1))
    assert np.any(np.abs(y - unmasked) > 1e-3)
    np.testing.assert_allclose(kl, svd.kl(params), rtol=1e-6)


@each_kind
def test_missing_noise_is_an_error_that_names_the_layer(case: Case) -> None:
    layer, _ = layers(case)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=False):
            return layer.clone(parent=self, name='the_layer')(x, deterministic)

    x = inputs(case)
    variables = Model().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"^the_layer needs noise.*rngs=\{'noise': key\}.*determ"):
        Model().apply(variables, x)
    with pytest.raises(ValueError, match=f'^{case.name} needs noise'):
        layer.apply({'params': variables['params']['the_layer']}, x)
    Model().apply(variables, x, deterministic=True)


@each_kind
def test_jit_and_vmap_and_no_second_compilation(case: Case) -> None:
    layer, _ = layers(case)
    params, x = with_noise(init(layer, case)), inputs(case)
    traces = []

    @jax.jit
    def apply(params, x, noise_key):
        traces.append(1)
        return layer.apply({'params': params}, x, rngs={'noise': noise_key})

    def keys() -> jax.Array:
        return jax.random.split(jax.random.key(3), 2)

    one_by_one = [apply(params, x, noise_key) for noise_key in keys()]
    assert len(traces) == 1
    vmapped = jax.vmap(apply, in_axes=(None, None, 0))(params, x, keys())
    eager, _ = layer.apply({'params': params}, x, rngs={'noise': keys()[0]})
    np.testing.assert_allclose(one_by_one[0][0], eager, rtol=1e-4, atol=1e-5)
    for i, (y, kl) in enumerate(one_by_one):
        np.testing.assert_allclose(vmapped[0][i], y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(vmapped[1][i], kl, rtol=1e-6)


def assert_moments(samples: np.ndarray, reference: np.ndarray) -> None:
    """Whether both samples, (draws, outputs), have the same means and variances."""
    n = len(samples)
    # Four standard errors of a difference, raised so that all outputs together pass as often.
    sigmas = stats.norm.isf(stats.norm.sf(4) / samples.shape[1])
    mean_error = np.sqrt((samples.var(0) + reference.var(0)) / n)
    assert np.all(np.abs(samples.mean(0) - reference.mean(0)) < sigmas * mean_error)
    variance_error = np.sqrt(2 / n) * np.hypot(samples.var(0), reference.var(0))
    assert np.all(np.abs(samples.var(0) - reference.var(0)) < sigmas * variance_error)


N = 100_000


def test_dense_has_the_moments_of_sampled_weights() -> None:
    rng = np.random.default_rng(0)
    kernel, x, bias = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3)
    deviation = rng.uniform(0.2, 1.5, (6, 3))
    kernels = rng.normal(kernel, deviation, (N, 6, 3))
    params = {'kernel': kernel, 'bias': bias, 'log_sigma2': 2 * np.log(deviation)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    y, _ = svd.linen.Dense(3).apply(
        {'params': params}, jnp.asarray(np.repeat(x[None], N, 0), jnp.float32), rngs=key(1)
    )
    assert_moments(np.float64(y), x @ kernels + bias)


@pytest.mark.parametrize(
    ('x_size', 'fields'),
    [
        ((2, 3), {'padding': 'VALID'}),
        ((1, 1), {'padding': ((1, 0), (1, 1))}),
        ((1, 2), {'padding': ((0, 1), (0, 1)), 'strides': (5, 5)}),
        ((3, 5), {'padding': 'VALID', 'kernel_dilation': 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize('groups', [1, 2])
def test_conv_has_the_moments_of_sampled_kernels(x_size, fields, groups: int) -> None:
    # With a single output position, where sampling the output or the kernel is the same law.
    rng = np.random.default_rng(0)
    channels, features = 2, 2
    kernel = rng.normal(size=(2, 3, channels // groups, features))
    deviation = rng.uniform(0.2, 1.5, kernel.shape)
    bias, x = rng.normal(size=features), rng.normal(size=(*x_size, channels))
    layer = svd.linen.Conv(features, (2, 3), feature_group_count=groups, **fields)
    # The window that the only output sees, by hand.
    window = np.pad(x, ((0, 0), (0, 0), (0, 0)))
    if fields['padding'] != 'VALID':
        window = np.pad(x, (*fields['padding'], (0, 0)))
    step = fields.get('kernel_dilation', 1)
    window = window[::step, ::step]
    assert window.shape == (2, 3, channels)
    draws = rng.normal(kernel, deviation, (N, *kernel.shape))
    if groups == 1:
        reference = np.einsum('hwc,nhwcf->nf', window, draws) + bias
    else:  # each feature sees the one channel of its group
        reference = np.einsum('hwf,nhwf->nf', window, draws[:, :, :, 0]) + bias
    params = {'kernel': kernel, 'bias': bias, 'log_sigma2': 2 * np.log(deviation)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    images = jnp.asarray(np.repeat(x[None], N, 0), jnp.float32)
    y, _ = layer.apply({'params': params}, images, rngs=key(1))
    assert y.shape == (N, 1, 1, features)
    assert_moments(np.float64(y).reshape(N, features), reference)


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.uint8, jnp.bool_])
def test_integer_inputs_are_numbers(dtype) -> None:
    # Their squares too: 200 ** 2 is no uint8.
    layer = svd.linen.Dense(5, log_sigma2_init=0.0)
    x = jnp.asarray([[3, 200, 0]]).astype(dtype)
    params = layer.init(jax.random.key(0), x)
    y, y_float = (layer.apply(params, a, rngs=key(1))[0] for a in (x, x.astype(jnp.float32)))
    np.testing.assert_allclose(y, y_float, rtol=1e-6)


def test_embed_has_the_moments_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    table, deviation = rng.normal(size=(3, 2)), rng.uniform(0.2, 1.5, (3, 2))
    params = {'embedding': table, 'log_sigma2': 2 * np.log(deviation)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    ids = jnp.tile(jnp.asarray([2, 0, 2]), (N, 1))
    y = np.float64(svd.linen.Embed(3, 2).apply({'params': params}, ids, rngs=key(1))[0])
    reference = rng.normal(table[[2, 0, 2]], deviation[[2, 0, 2]], (N, 3, 2))
    assert_moments(y.reshape(N, -1), reference.reshape(N, -1))
    # The same token twice has two draws.
    assert abs(np.corrcoef(y[:, 0, 0], y[:, 2, 0])[0, 1]) < 4 / np.sqrt(N)


def test_embed_attends_as_the_twin_with_the_moments_of_sampled_tables() -> None:
    rng = np.random.default_rng(0)
    table, deviation = rng.normal(size=(3, 4)), rng.uniform(0.2, 1.5, (3, 4))
    params = {'embedding': table, 'log_sigma2': 2 * np.log(deviation)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    query = rng.normal(size=4)
    layer, queries = svd.linen.Embed(3, 4), jnp.asarray(np.repeat(query[None], N, 0), jnp.float32)
    y = layer.apply({'params': params}, queries, rngs=key(1), method='attend')
    tables = rng.normal(table, deviation, (N, 3, 4))
    assert_moments(np.float64(y), tables @ query)
    mean = layer.apply({'params': params}, queries[:2], deterministic=True, method='attend')
    twin = nn.Embed(3, 4)
    wanted = twin.apply({'params': svd.sparsify(params)}, queries[:2], method='attend')
    np.testing.assert_allclose(mean, wanted, rtol=1e-6)


def test_noise_is_independent_per_example_and_per_call() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = svd.linen.Dense(2, log_sigma2_init=0.0, name='shared')
            return jnp.stack([layer(x)[0], layer(x)[0]])

    x = jnp.ones((20_000, 3))
    variables = Twice().init(jax.random.key(0), x[:1])
    y = np.float64(Twice().apply(variables, x, rngs=key(1)))
    flat = np.concatenate([y[0], y[1], np.roll(y[0], 1, axis=0)], axis=1)
    correlations = np.corrcoef(flat.T)[np.triu_indices(6, 1)]
    assert np.all(np.abs(correlations) < 4.5 / np.sqrt(len(x)))


@pytest.mark.parametrize('name', ['Dense', 'Conv', 'Embed'])
def test_partitioned_parameters(name: str) -> None:
    names = {'Dense': (None, 'model'), 'Conv': (None, None, None, 'model'), 'Embed': ('v', None)}
    make = nn.with_partitioning(nn.initializers.normal(1.0), names[name])
    args = {'Dense': (4,), 'Conv': (4, (3, 3)), 'Embed': (7, 4)}[name]
    layer = getattr(svd.linen, name)(
        *args, **{'embedding_init' if name == 'Embed' else 'kernel_init': make}
    )
    x = {'Dense': jnp.ones((2, 3)), 'Conv': jnp.ones((2, 4, 4, 3)), 'Embed': jnp.arange(3)}[name]
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = variables['params']
    assert params['log_sigma2'].names == params[weight_name(params)].names == names[name]
    unboxed = nn.meta.unbox(variables)
    y, kl = run(layer, params, x, rngs=key(1))
    wanted, wanted_kl = run(layer, unboxed['params'], x, rngs=key(1))
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    np.testing.assert_allclose(kl, wanted_kl, rtol=1e-6)
    np.testing.assert_allclose(kl, svd.kl(unboxed['params']), rtol=1e-6)


def test_layers_keep_flaxs_fields_and_names() -> None:
    for name in ('Dense', 'DenseGeneral', 'Conv', 'ConvTranspose', 'Embed'):
        fields, wanted = (getattr(module, name).__dataclass_fields__ for module in (svd.linen, nn))
        fields = {name for name in fields if not name.startswith('_')}
        own = {'log_sigma2_init', 'threshold', 'mask_in_training', 'kl_method'}
        own |= {'weights', 'groups', 'log_normal'}
        assert fields - set(wanted) == own

    class Model(nn.Module):  # the automatic names are Flax's too, so that checkpoints fit
        @nn.compact
        def __call__(self, x):
            x, kl = svd.linen.Dense(3)(x)
            y, more = svd.linen.Dense(2)(x)
            return y, kl + more

    params = Model().init(jax.random.key(0), jnp.ones((1, 4)))['params']
    assert list(params) == ['Dense_0', 'Dense_1']


def test_parameters_in_float16_do_not_lose_the_variance() -> None:
    layer, x = svd.linen.Dense(4, param_dtype=jnp.float16, use_bias=False), jnp.ones((2000, 3))
    params = layer.init(jax.random.key(0), x)['params']
    params['log_sigma2'] = jnp.full_like(params['log_sigma2'], -20.0)
    y, _ = layer.apply({'params': params}, x, rngs={'noise': jax.random.key(1)})
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(np.std(np.asarray(y), 0), np.sqrt(3) * np.exp(-10), rtol=0.07)


@each_kind
def test_float16_does_not_lose_the_variance(case: Case) -> None:
    """sigma^2 = e^-20 is zero in float16, and the square of 300 infinite."""
    x = inputs(case) if case.name == 'Embed' else 300 * inputs(case)
    half, full = layers(case, {'dtype': jnp.float16})[0], layers(case)[0]
    params = init(full, case)
    name = weight_name(params)
    params['log_sigma2'] = jnp.full_like(params[name], -20.0)
    params[name] = jnp.zeros_like(params[name])
    params.pop('bias', None)  # only the noise is left
    fields = {'use_bias': False} if hasattr(half, 'use_bias') else {}
    key = jax.random.key(2)
    found, wanted = (
        run(layer.clone(**fields), params, x, rngs={'noise': key})[0] for layer in (half, full)
    )
    assert found.dtype == jnp.float16
    deviation = np.std(np.float64(found)) / np.std(np.float64(wanted))
    assert 0.6 < deviation < 1.6  # of few draws, in another order perhaps
