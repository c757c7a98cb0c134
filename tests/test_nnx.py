"""svd_jax.nnx: its layers against svd_jax.linen's and flax.nnx's; whole models against both."""

import functools
import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import svd_jax as svd
from pages import ROOT, code_blocks
from test_linen import assert_moments

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


class Case(NamedTuple):
    """A layer of NNX, its twin in Linen, and an input's shape."""

    name: str
    linen_name: str
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    linen_args: tuple[Any, ...]
    fields: dict[str, Any] = {}  # noqa: RUF012  # never changed
    linen_fields: dict[str, Any] | None = None  # where they differ


def dense(shape: tuple[int, ...], features: int, **fields: Any) -> Case:
    return Case('Linear', 'Dense', shape, (shape[-1], features), (features,), fields)


def conv(shape: tuple[int, ...], features: int, size: Any, *, of: str = 'Conv', **fields) -> Case:
    return Case(of, of, shape, (shape[-1], features, size), (features, size), fields)


MASK = np.random.default_rng(5).integers(0, 2, (3, 2, 3, 4)).astype(np.float32)
CASES = {
    'linear': dense((3, 5), 4),
    'linear, no bias': dense((2, 3, 5), 4, use_bias=False),
    'linear, 1d': dense((5,), 4),
    'general': Case(
        'LinearGeneral', 'DenseGeneral', (3, 4, 2), ((4, 2), (2, 3)), ((2, 3),), {'axis': (1, 2)}
    ),
    'general, batch': Case(
        'LinearGeneral',
        'DenseGeneral',
        (2, 3, 4),
        (4, 5),
        (5,),
        {'batch_axis': {0: 2}},
        {'batch_dims': (0,)},
    ),
    'conv1': conv((2, 9, 3), 4, 3, strides=2),
    'conv1, causal': conv((2, 9, 3), 4, (3,), padding='CAUSAL'),
    'conv2': conv((2, 6, 7, 3), 4, (3, 2)),
    'conv2, valid': conv((2, 6, 7, 3), 4, (3, 2), padding='VALID'),
    'conv2, circular': conv((2, 6, 7, 3), 4, (3, 3), padding='CIRCULAR'),
    'conv2, strides': conv((2, 6, 7, 3), 4, (3, 3), padding=((1, 0), (2, 1)), strides=(1, 2)),
    'conv2, dilated': conv((2, 8, 7, 2), 3, (3, 2), kernel_dilation=(2, 1), padding='VALID'),
    'conv2, input dilated': conv((2, 4, 5, 2), 3, (3, 3), input_dilation=(2, 1), padding=1),
    'conv2, groups': conv((2, 6, 5, 4), 6, (3, 3), feature_group_count=2),
    'conv2, masked': conv((2, 6, 5, 3), 4, (3, 2), mask=jnp.asarray(MASK)),
    'conv2, unbatched': conv((6, 5, 4), 6, (3, 3), padding='VALID', use_bias=False),
    'transpose1': conv((2, 5, 3), 4, (3,), of='ConvTranspose', strides=(2,)),
    'transpose2': conv(
        (2, 4, 5, 3), 4, (3, 3), of='ConvTranspose', transpose_kernel=True, padding='VALID'
    ),
    'embed': Case('Embed', 'Embed', (2, 3), (7, 4), (7, 4)),
}
DTYPES = {
    'bf16 compute': {'dtype': jnp.bfloat16},
    'bf16 parameters': {'param_dtype': jnp.bfloat16},
}
# One of each way that layers are computed, and those in every precision.
KINDS = ('linear', 'general', 'conv2', 'conv2, strides', 'transpose2', 'embed')
ONE_EACH = [pytest.param(CASES[name], {}, id=name) for name in KINDS]
IN_BFLOAT16 = [
    pytest.param(CASES[name], fields, id=f'{name}, {of}')
    for name in ('linear', 'conv2', 'embed')
    for of, fields in DTYPES.items()
]
EVERY = [pytest.param(case, {}, id=name) for name, case in CASES.items()]
grid = functools.partial(pytest.mark.parametrize, ('case', 'dtypes'))


def inputs(case: Case) -> jax.Array:
    rng = np.random.default_rng(0)
    if case.name == 'Embed':
        return jnp.asarray(rng.integers(0, case.args[0], case.shape), jnp.int32)
    return jnp.asarray(rng.normal(size=case.shape), jnp.float32)


def bias_init(case: Case) -> dict[str, Any]:
    """A bias of zeros would hide mistakes."""
    return {} if case.name == 'Embed' else {'bias_init': nn.initializers.normal(1.0)}


def make(case: Case, module: Any = svd.nnx, seed: int = 0, **fields: Any) -> Any:
    given = {**case.fields, **bias_init(case), **fields}
    return getattr(module, case.name)(*case.args, **given, rngs=nnx.Rngs(params=seed))


def make_linen(case: Case, **fields: Any) -> Any:
    given = case.fields if case.linen_fields is None else case.linen_fields
    return getattr(svd.linen, case.linen_name)(*case.linen_args, **given, **fields)


def with_noise(params: dict[str, Any], low: float = -4.0, high: float = 4.0) -> dict[str, Any]:
    """A log_alpha of each weight's own, spread evenly."""
    weight = params[weight_name(params)]
    alpha = np.random.default_rng(1).uniform(low, high, weight.shape)
    log_sigma2 = alpha + np.log(np.float64(weight) ** 2 + 1e-30)
    return {**params, 'log_sigma2': jnp.asarray(log_sigma2, weight.dtype)}


def noisy(case: Case, **fields: Any) -> Any:
    """The variational layer, with a log_alpha of each weight's own."""
    layer = make(case, **fields)
    return svd.nnx.with_params(layer, with_noise(svd.nnx.params(layer)))


def weight_name(params: dict[str, Any]) -> str:
    return 'embedding' if 'embedding' in params else 'kernel'


def key(seed: int = 1) -> jax.Array:
    return jax.random.key(seed)


def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Compiled whole, which takes less time than one operation after another."""
    return nnx.jit(lambda layer: layer(*args, **kwargs))(layer)


@grid(ONE_EACH + IN_BFLOAT16)
def test_parameters_are_the_twins_and_log_sigma2(case: Case, dtypes) -> None:
    layer, twin = make(case, log_sigma2_init=-7.0, **dtypes), make(case, nnx, **dtypes)
    params, plain = svd.nnx.params(layer), svd.nnx.params(twin)
    log_sigma2 = params.pop('log_sigma2')
    assert isinstance(layer, type(twin))
    assert params.keys() == plain.keys()
    for name, wanted in plain.items():
        assert params[name].dtype == wanted.dtype
        np.testing.assert_array_equal(params[name], wanted)
    weight = plain[weight_name(plain)]
    assert (log_sigma2.shape, log_sigma2.dtype) == (weight.shape, weight.dtype)
    np.testing.assert_array_equal(log_sigma2, np.full(weight.shape, -7.0))
    assert type(layer.log_sigma2) is nnx.Param


@grid(ONE_EACH + IN_BFLOAT16)
def test_outputs_are_those_of_linen(case: Case, dtypes) -> None:
    """To the last bit, given the same key."""
    x, fields = inputs(case), {'mask_in_training': True, 'threshold': 1.0, 'kl_method': 'ard'}
    layer, masking = noisy(case, **dtypes), noisy(case, **dtypes, **fields)

    @jax.jit
    def of_linen(params):
        def apply(**fields: Any) -> Any:
            linen = make_linen(case, **dtypes, **fields)
            return linen.apply({'params': params}, x, rngs={'noise': jax.random.key(3)})

        return apply(), apply(**fields)

    @nnx.jit
    def of_nnx(*layers):
        return tuple(layer(x, rngs=jax.random.key(3)) for layer in layers)

    found, wanted = of_nnx(layer, masking), of_linen(svd.nnx.params(layer))
    for (y, kl), (y_wanted, kl_wanted) in zip(found, wanted, strict=True):
        assert (y.dtype, kl.dtype) == (y_wanted.dtype, jnp.float32)
        np.testing.assert_array_equal(np.float32(y), np.float32(y_wanted))
        np.testing.assert_array_equal(kl, kl_wanted)


@grid(EVERY + IN_BFLOAT16)
def test_outputs_are_the_twins(case: Case, dtypes) -> None:
    layer, twin, x = noisy(case, **dtypes), make(case, nnx, **dtypes), inputs(case)
    params = svd.nnx.params(layer)
    quiet = {**params, 'log_sigma2': jnp.full_like(params['log_sigma2'], -80.0)}
    sparse = svd.nnx.sparsify(layer)
    assert not hasattr(sparse, 'log_sigma2')
    sparse_twin = svd.nnx.with_params(twin, svd.sparsify(params))
    assert 0 < np.mean(np.float32(svd.nnx.params(sparse_twin)[weight_name(params)]) == 0) < 0.9

    @nnx.jit
    def outputs(layer, quiet, sparse, twin, sparse_twin):
        wanted = twin(x), sparse_twin(x)
        return [
            (wanted[0], *quiet(x, rngs=jax.random.key(1))),
            (wanted[1], *layer(x, deterministic=True)),
            (wanted[1], *sparse(x)),
        ]

    quiet = svd.nnx.with_params(layer, quiet)
    tolerance = {'rtol': 2e-2, 'atol': 5e-2} if dtypes else {'rtol': 1e-5, 'atol': 1e-5}
    found = outputs(layer, quiet, sparse, twin, sparse_twin)
    for wanted, y, _ in found:
        assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(np.float32(y), np.float32(wanted), **tolerance)
    for (*_, kl), layer_params in zip(found, map(svd.nnx.params, (quiet, layer)), strict=False):
        np.testing.assert_allclose(kl, svd.kl(layer_params), rtol=1e-5)
    assert found[-1][-1] == 0


def test_preferred_element_type_and_own_operations_are_kept() -> None:
    calls = []

    def dot_general(*args: Any, out_sharding: Any = None, **kwargs: Any) -> jax.Array:
        calls.append(kwargs)
        return jax.lax.dot_general(*args, **kwargs)

    fields = {'preferred_element_type': jnp.float32, 'dtype': jnp.bfloat16}
    layer = noisy(CASES['linear'], dot_general=dot_general, **fields)
    y, _ = call(layer, inputs(CASES['linear']), rngs=key())
    assert y.dtype == jnp.float32
    # The mean and the variance.
    assert [c['preferred_element_type'] for c in calls] == [jnp.float32, jnp.float32]
    for name in ('general', 'conv2', 'transpose2'):
        y, _ = call(noisy(CASES[name], **fields), inputs(CASES[name]), rngs=key())
        assert y.dtype == jnp.float32


@pytest.mark.parametrize('name', ['Linear', 'LinearGeneral', 'Conv', 'ConvTranspose', 'Embed'])
def test_no_argument_of_the_twin_is_ignored(name: str) -> None:
    arguments = inspect.signature(getattr(nnx, name).__init__).parameters
    layer = getattr(svd.nnx, name)
    # Those that only say what the parameters are and start from, and those tested above.
    known = {'self', 'rngs', 'in_features', 'out_features', 'num_embeddings', 'features'}
    known |= {'batch_axis', 'promote_dtype', 'preferred_element_type'}
    known |= {'dot_general', 'dot_general_cls', 'conv_general_dilated'}
    known |= {f'{of}_{what}' for of in ('kernel', 'bias', 'embedding') for what in
              ('init', 'metadata')}  # fmt: skip
    assert set(arguments) <= known | set(layer._same_fields)


N = 50_000


def test_linear_has_the_moments_of_sampled_weights() -> None:
    rng = np.random.default_rng(0)
    kernel, x, bias = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3)
    deviation = rng.uniform(0.2, 1.5, (6, 3))
    layer = svd.nnx.Linear(6, 3, rngs=nnx.Rngs(params=0))
    for name, value in (('kernel', kernel), ('bias', bias), ('log_sigma2', 2 * np.log(deviation))):
        getattr(layer, name)[...] = jnp.asarray(value, jnp.float32)
    y, _ = layer(jnp.asarray(np.repeat(x[None], N, 0), jnp.float32), rngs=key())
    assert_moments(np.float64(y), x @ rng.normal(kernel, deviation, (N, 6, 3)) + bias)


def test_embed_attends_with_the_moments_of_sampled_tables() -> None:
    rng = np.random.default_rng(0)
    table, deviation = rng.normal(size=(3, 4)), rng.uniform(0.2, 1.5, (3, 4))
    layer = svd.nnx.Embed(3, 4, rngs=nnx.Rngs(params=0))
    layer.embedding[...] = jnp.asarray(table, jnp.float32)
    layer.log_sigma2[...] = jnp.asarray(2 * np.log(deviation), jnp.float32)
    query = rng.normal(size=4)
    queries = jnp.asarray(np.repeat(query[None], N, 0), jnp.float32)
    tables = rng.normal(table, deviation, (N, 3, 4))
    assert_moments(np.float64(layer.attend(queries, rngs=key())), tables @ query)
    mean = layer.attend(queries[:2], deterministic=True)
    wanted = nnx.Embed.attend(svd.nnx.sparsify(layer), queries[:2])
    np.testing.assert_allclose(mean, wanted, rtol=1e-6)


def noisy_linear(**streams: int) -> Any:
    return svd.nnx.Linear(3, 2, log_sigma2_init=0.0, rngs=nnx.Rngs(params=0, **streams))


def test_where_noise_comes_from() -> None:
    x = jnp.ones((4, 3))
    layer = noisy_linear(noise=7)
    plain = noisy_linear()
    # The constructor's stream, forked: each call draws anew.
    first, second = layer(x)[0], layer(x)[0]
    assert np.all(np.asarray(first != second))
    again = noisy_linear(noise=7)
    np.testing.assert_array_equal(again(x)[0], first)
    fork = nnx.Rngs(noise=7).noise.fork()
    np.testing.assert_array_equal(plain(x, rngs=fork)[0], first)
    # What is passed to the call takes precedence: Rngs, a stream of them, a key.
    wanted = plain(x, rngs=nnx.Rngs(noise=1))[0]
    for rngs in (nnx.Rngs(noise=1), nnx.Rngs(1), nnx.Rngs(noise=1).noise, nnx.Rngs(1).noise()):
        np.testing.assert_array_equal(layer(x, rngs=rngs)[0], wanted)
    # Layers have noise of their own, also from the same Rngs, which serve other draws next time.
    rngs = nnx.Rngs(0)
    first, second = (svd.nnx.Linear(3, 2, rngs=rngs).rngs.key[...] for _ in range(2))
    assert first != second


def test_missing_noise_is_an_error_that_names_the_fix() -> None:
    layer, x = noisy_linear(), jnp.ones((4, 3))
    assert layer.rngs is None
    with pytest.raises(ValueError, match=r'^Linear needs noise.*rngs=nnx\.Rngs\(noise=.*determin'):
        layer(x)
    with pytest.raises(ValueError, match=r"\['dropout'\].*neither 'noise'.*nnx\.Rngs\(noise="):
        layer(x, rngs=nnx.Rngs(dropout=0))
    with pytest.raises(TypeError, match=r'nnx\.Rngs, nnx\.RngStream or a JAX key, not int'):
        layer(x, rngs=0)
    layer(x, deterministic=True)


def test_the_kl_of_another_layer_is_not_taken_for_deterministic() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(*(svd.nnx.Linear(3, 3, rngs=rngs) for _ in range(2)))
    with pytest.raises(TypeError, match=r'Linear got an array for deterministic.*Sequential'):
        model(jnp.ones((4, 3)))


def test_eval_and_train_and_views() -> None:
    model = nnx.Sequential(noisy_linear(noise=1))
    x = jnp.ones((4, 3))
    mean, _ = model.layers[0](x, deterministic=True)
    assert not np.any(model(x)[0] == mean)
    np.testing.assert_array_equal(nnx.view(model, deterministic=True)(x)[0], mean)
    assert not np.any(model(x)[0] == mean)
    model.eval()
    np.testing.assert_array_equal(model(x)[0], mean)
    assert not np.any(model.layers[0](x, deterministic=False)[0] == mean)
    model.train()
    assert not np.any(model(x)[0] == mean)


def test_log_sigma2_is_partitioned_as_the_weight() -> None:
    init = nnx.with_partitioning(nnx.initializers.ones, (None, 'model'))
    with nnx.use_eager_sharding(False):  # there is one device
        layer = svd.nnx.Linear(3, 4, kernel_init=init, rngs=nnx.Rngs(0))
        twin = svd.nnx.variational(nnx.Linear(3, 4, kernel_init=init, rngs=nnx.Rngs(0)))
    for module in (layer, twin):
        wanted = module.kernel.get_metadata()
        assert wanted['out_sharding'] == (None, 'model')
        assert module.log_sigma2.get_metadata() == wanted


class Layers(nnx.Module):
    """A network of this library's layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = svd.nnx.Conv(1, 3, (3, 3), padding='VALID', rngs=rngs)
        self.out = svd.nnx.Linear(48, 2, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, jax.Array]:
        x, kl = self.conv(x, rngs=rngs)
        y, more = self.out(nnx.relu(x).reshape(len(x), -1), rngs=rngs)
        return y, kl + more


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.attention(self.norm(x))


class Net(nnx.Module):
    """A network that knows nothing of this library: state, random streams, lists, dicts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([Block(rngs)])
        self.head = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.relu)
        self.free = nnx.data([{'kernel': nnx.Param(rngs.params.normal((3, 2)))}])

    def features(self, x: jax.Array) -> jax.Array:
        x = self.dropout(self.norm(self.conv(x)))
        x = x.reshape(len(x), -1, 4)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.features(x) @ self.free[0]['kernel'][...]


WEIGHTS = [
    *(f'blocks/0/attention/{of}/kernel' for of in ('key', 'out', 'query', 'value')),
    'conv/kernel',
    'free/0/kernel',
    'head/layers/0/kernel',
]


def images(count: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(3), (count, 6, 6, 1))


def log_sigma2s(model: Any) -> list[str]:
    flat = nnx.to_flat_state(nnx.state(model))
    return ['/'.join(map(str, path)) for path, _ in flat if path[-1] == 'log_sigma2']


def assert_same_state(model: Any, wanted: Any) -> None:
    assert nnx.graphdef(model) == nnx.graphdef(wanted)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, wanted)), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_array_equal(a, b)


def test_variational_and_sparsify_a_copy_or_in_place() -> None:
    model, original = (Net(nnx.Rngs(0)) for _ in range(2))
    copy = svd.nnx.variational(model, log_sigma2_init=-40.0)
    assert_same_state(model, original)
    assert svd.nnx.variational(model, log_sigma2_init=-40.0, copy=False) is model
    assert_same_state(model, copy)
    assert log_sigma2s(model) == [path.replace('kernel', 'log_sigma2') for path in WEIGHTS]
    np.testing.assert_array_equal(model.conv.log_sigma2[...], np.full((3, 3, 1, 4), -40.0))
    assert_same_state(svd.nnx.sparsify(model), original)  # nothing is so small
    # Its own call is of the means.
    np.testing.assert_array_equal(call(model, images()), call(original, images()))

    assert log_sigma2s(model)
    model.conv.log_sigma2[...] = jnp.full((3, 3, 1, 4), 20.0)
    assert svd.nnx.sparsify(model, copy=False) is model
    assert not log_sigma2s(model)
    assert not np.any(model.conv.kernel[...])
    np.testing.assert_array_equal(model.free[0]['kernel'][...], original.free[0]['kernel'][...])


def test_where_chooses_by_path() -> None:
    model = Net(nnx.Rngs(0))
    assert log_sigma2s(svd.nnx.variational(model, 'layers/0')) == ['head/layers/0/log_sigma2']
    chosen = svd.nnx.variational(model, lambda path: path.startswith('blocks/0/att'))
    assert len(log_sigma2s(chosen)) == 4
    with pytest.raises(ValueError, match=r"'dense' is found in none of .*head/layers/0/kernel"):
        svd.nnx.variational(model, 'dense')
    with pytest.raises(ValueError, match=r'layers/0/kernel is variational already'):
        svd.nnx.variational(svd.nnx.variational(model, 'layers/0'))
    with pytest.raises(ValueError, match='no weight has a log_sigma2'):
        svd.nnx.sparsify(model)


def test_what_is_shared_has_one_posterior() -> None:
    rngs = nnx.Rngs(0)
    embed, shared = nnx.Embed(5, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
    tied = nnx.Linear(3, 3, rngs=rngs)
    tied.kernel = shared.kernel
    model = nnx.List([embed, shared, shared, tied])
    svd.nnx.variational(model, copy=False)
    assert log_sigma2s(model) == ['0/log_sigma2', '1/log_sigma2']
    dropped = jax.tree.map(jnp.zeros_like, svd.nnx.params(model))
    svd.nnx.with_params(model, dropped, copy=False)
    assert tied.kernel is shared.kernel
    assert not np.any(tied.kernel[...])


class TiedTable(nnx.Module):
    """Whose table has another name, which comes before its own in order."""

    def __init__(self) -> None:
        self.embed, self.out = (layer(5, 3, rngs=nnx.Rngs(0)) for layer in (nnx.Embed, nnx.Linear))
        self.decoder = self.embed.embedding

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.out(self.embed(tokens) @ self.decoder[...].T)


def test_a_weight_with_another_name_is_one() -> None:
    model = svd.nnx.variational(TiedTable(), log_sigma2_init=-1.0)
    assert set(svd.weight_paths(svd.nnx.params(model))) == {'embed/embedding', 'out/kernel'}
    _, kl = svd.nnx.apply(model, jnp.arange(3), rngs=nnx.Rngs(noise=0))
    assert kl == svd.kl(svd.nnx.params(model))
    sparse = svd.nnx.sparsify(model, -99.0)
    assert sparse.embed.embedding is sparse.decoder
    assert not np.any(sparse.decoder[...])


class Dropped(nnx.Module):
    def __init__(self) -> None:
        self.dense, self.dropout = nnx.Linear(3, 40, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, own: Any = None, *, rngs: Any = None) -> jax.Array:
        return self.dropout(self.dense(x), rngs=own or rngs)


@pytest.mark.parametrize('jit', [False, True])
def test_random_numbers_that_the_model_is_given(jit: bool) -> None:
    """In the way that a model of its own would draw them, and go on."""
    model = svd.nnx.variational(Dropped(), log_sigma2_init=-40.0)
    x, given, wanted = jnp.ones((2, 3)), nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)

    def run(model: Any, x: jax.Array, own: Any, **options: Any) -> jax.Array:
        return svd.nnx.apply(model, x, own, rngs=jax.random.key(0), **options)[0]

    called = nnx.jit(run, static_argnames='method') if jit else run
    by_name = {'method': lambda model, x, own: model(x, rngs=own)}
    for options in ({}, by_name, by_name):
        found, mean = called(model, x, given, **options), model(x, wanted)
        np.testing.assert_allclose(found, mean, atol=1e-5)
    assert given.dropout.count[...] == 3


@pytest.mark.parametrize(
    ('model', 'groups'),
    [
        (nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)]),
         [svd.Shared('inputs', ('0', '1'))]),
        (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), 'inputs'),
    ],
    ids=['a list', 'groups of its own'],
)  # fmt: skip
def test_scales_that_have_no_place(model: Any, groups: Any) -> None:
    if isinstance(model, nnx.Linear):
        model.groups = 2
    before = nnx.state(model)
    with pytest.raises(ValueError, match=r'has no place: .* must be a module or a dict'):
        svd.nnx.variational(model, groups=groups, copy=False)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)


def test_files_of_the_tree(tmp_path) -> None:
    model = svd.nnx.sparsify(svd.nnx.variational(Net(nnx.Rngs(0)), log_sigma2_init=-1.0))
    tree = svd.nnx.params(model)
    assert svd.sparsity(tree).layers.keys() == {path.removesuffix('/kernel') for path in WEIGHTS}
    svd.save(tmp_path / 'net.svd', tree)
    loaded = svd.nnx.with_params(Net(nnx.Rngs(1)), svd.load(tmp_path / 'net.svd'))
    for a, b in zip(*map(jax.tree.leaves, (svd.nnx.params(loaded), tree)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2)
    # Into a variational model: its posterior is not the file's, and goes.
    loaded = svd.nnx.with_params(svd.nnx.variational(Net(nnx.Rngs(1))), tree)
    assert not log_sigma2s(loaded)


def test_a_tree_that_does_not_fit_is_an_error_that_names_the_path() -> None:
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    before = svd.nnx.params(model)

    def put(**changes: Any) -> Any:
        layer = {**before['layers']['0'], **changes}
        layer = {name: value for name, value in layer.items() if value is not None}
        return svd.nnx.with_params(model, {'layers': {'0': layer}}, copy=False)

    with pytest.raises(ValueError, match=r'layers/0/bias is a parameter of the model but not in'):
        put(bias=None)
    with pytest.raises(ValueError, match=r'layers/0/scale is in the tree but no parameter'):
        put(scale=jnp.ones(2))
    with pytest.raises(ValueError, match=r'layers/0/bias has shape \(3,\) .* \(2,\) in the model'):
        put(bias=jnp.ones(3), kernel=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r'layers/0/log_sigma2 has shape \(2, 3\)'):
        put(log_sigma2=jnp.ones((2, 3)))
    np.testing.assert_array_equal(svd.nnx.params(model)['layers']['0']['kernel'],
                                  before['layers']['0']['kernel'])  # fmt: skip
    put(log_sigma2=jnp.ones((3, 2)))
    assert log_sigma2s(model) == ['layers/0/log_sigma2']


def test_split_and_merge() -> None:
    model, same = (Layers(nnx.Rngs(0, noise=1)) for _ in range(2))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    y, kl = call(nnx.merge(graphdef, params, rest), images())
    np.testing.assert_array_equal(call(same, images())[0], y)
    np.testing.assert_allclose(kl, svd.kl(svd.nnx.params(model)), rtol=1e-6)
    np.testing.assert_allclose(kl, svd.kl(nnx.to_pure_dict(params)), rtol=1e-6)


@pytest.mark.parametrize('make', [Layers, lambda rngs: svd.nnx.variational(Net(rngs))])
def test_checkpoints_by_orbax(make, tmp_path) -> None:
    model, other = make(nnx.Rngs(0)), make(nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / 'state', nnx.state(other)))
    assert_same_state(other, model)


def run_layers(model: Any, x: jax.Array, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    return model(x, rngs=rngs)


def run_unchanged(model: Any, x: jax.Array, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    return svd.nnx.apply(model, x, rngs=rngs)


@pytest.mark.parametrize(
    ('make', 'run'),
    [(Layers, run_layers), (lambda rngs: svd.nnx.variational(Net(rngs)), run_unchanged)],
    ids=['layers', 'apply'],
)
def test_training_reaches_all_weights_and_does_not_recompile(make, run) -> None:
    model, rngs, x, labels = make(nnx.Rngs(0)), nnx.Rngs(noise=1), images(8), jnp.arange(8) % 2
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, rngs, kl_weight):
        def loss(model, rngs):
            logits, kl = run(model, x, rngs)
            data = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return data + kl_weight * kl, data

        traces.append(1)
        (_, data), gradients = nnx.value_and_grad(loss, has_aux=True)(model, rngs)
        optimizer.update(model, gradients)
        return data, gradients

    # Without the KL, so that the noise alone moves log_sigma2.
    _, gradients = step(model, optimizer, rngs, 0.0)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.all(np.isfinite(gradient[...]))
        if path[-1] in ('kernel', 'log_sigma2'):
            assert np.any(gradient[...] != 0), path
    losses = [step(model, optimizer, rngs, 1e-4)[0] for _ in range(40)]
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert rngs.noise.count[...] == (82 if run is run_layers else 41)
    if run is run_unchanged:
        assert np.any(model.norm.mean[...] != 0)
        assert model.dropout.rngs.count[...] == 41


@pytest.mark.parametrize('name', ['linear', 'conv2, valid', 'embed'])
def test_apply_has_the_law_of_the_layers(name: str) -> None:
    case = CASES[name]
    layer, twin = noisy(case), make(case, nnx)
    params = svd.nnx.params(layer)
    twin = svd.nnx.with_params(twin, params)
    x = jnp.repeat(inputs(case)[:1], 20_000, 0)
    found, kl = svd.nnx.apply(twin, x, rngs=key(1))
    wanted, wanted_kl = layer(x, rngs=key(2))
    assert_moments(*(np.float64(y).reshape(len(x), -1) for y in (found, wanted)))
    np.testing.assert_allclose(kl, wanted_kl, rtol=1e-6)


def test_apply_is_svd_apply_of_the_same_model_in_linen() -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3), padding='VALID', name='conv')(x))
            return nn.Dense(2, name='out')(x.reshape(len(x), -1))

    class NNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 3, (3, 3), padding='VALID', rngs=rngs)
            self.out = nnx.Linear(48, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(nnx.relu(self.conv(x)).reshape(len(x), -1))

    model = svd.nnx.variational(NNX(nnx.Rngs(0)), log_sigma2_init=-1.0)
    y, kl = svd.nnx.apply(model, images(), rngs=key())
    variables = {'params': svd.nnx.params(model)}
    wanted, wanted_kl = svd.apply(Linen(), variables, images(), rngs={'noise': key()})
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kl, wanted_kl, rtol=1e-6)
    assert np.all(np.abs(y - model(images())) > 1e-3)


def test_apply_leaves_the_state_that_the_models_own_call_leaves() -> None:
    model = Net(nnx.Rngs(0))
    quiet = svd.nnx.variational(model, log_sigma2_init=-80.0)
    for _ in range(2):
        wanted, (y, _) = model(images()), svd.nnx.apply(quiet, images(), rngs=nnx.Rngs(1))
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    assert np.any(model.norm.mean[...] != 0)
    assert model.dropout.rngs.count[...] == 2
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, (nnx.BatchStat, nnx.RngCount)))
                      for m in (model, quiet)), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_apply_runs_any_method() -> None:
    model = svd.nnx.variational(Net(nnx.Rngs(0)), 'conv')
    features, _ = svd.nnx.apply(model, images(), rngs=key(), method='features')
    assert features.shape == (2, 3)

    class Told(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.unused = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: jax.Array, *, scale: float) -> dict[str, jax.Array]:
            y = self.linear(x) * scale
            self.sow(nnx.Intermediate, 'before', x)
            self.last = nnx.BatchStat(y)
            return {'y': y}

    model = svd.nnx.variational(Told(nnx.Rngs(0)), '^linear')
    x = jnp.ones((4, 3))
    captured = nnx.capture(lambda model, *args, **kwargs: model(*args, **kwargs), nnx.Intermediate)
    (y, sown), _ = svd.nnx.apply(model, x, scale=0.0, rngs=key(), method=captured)
    np.testing.assert_array_equal(y['y'], np.zeros((4, 2)))
    np.testing.assert_array_equal(sown['before'][0], x)
    np.testing.assert_array_equal(model.last[...], np.zeros((4, 2)))  # a variable that is new
    with pytest.raises(ValueError, match='does not use unused/kernel'):
        svd.nnx.apply(
            svd.nnx.variational(model, 'unused'), x, scale=1.0, rngs=key(), method=captured
        )


def test_apply_takes_randomness_and_options() -> None:
    plain = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model, x = svd.nnx.variational(plain, log_sigma2_init=0.0), jnp.ones((4, 3))
    rngs = nnx.Rngs(noise=1)
    first, second = (svd.nnx.apply(model, x, rngs=rngs)[0] for _ in range(2))
    assert np.all(np.asarray(first != second))
    with_key, kl = svd.nnx.apply(model, x, rngs=nnx.Rngs(noise=1).noise(), kl_method='exact')
    np.testing.assert_array_equal(with_key, first)
    np.testing.assert_allclose(kl, svd.kl(svd.nnx.params(model), 'exact'), rtol=1e-6)
    drawn, _ = svd.nnx.apply(model, x, rngs=rngs, sampled='kernel')
    np.testing.assert_array_equal(drawn, np.tile(drawn[:1], (4, 1)))
    masked, _ = svd.nnx.apply(model, x, rngs=nnx.Rngs(noise=1), threshold=-100.0)
    np.testing.assert_allclose(masked, first - plain(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"neither 'noise' nor a default one"):
        svd.nnx.apply(model, x, rngs=nnx.Rngs(params=1))
    with pytest.raises(ValueError, match='no weight has a log_sigma2'):
        svd.nnx.apply(plain, x, rngs=rngs)


def test_the_page_about_it_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = '\n'.join(code for _, code in code_blocks(ROOT / 'docs' / 'nnx.md'))
    images = jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
    names: dict[str, Any] = {'images': images, 'labels': jnp.arange(4)}
    exec(code, names)
    assert np.isfinite(names['value'])
    assert names['y'].shape == (4, 10)
    np.testing.assert_allclose(names['logits'], names['sparse'](images), rtol=1e-4, atol=1e-4)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-6)
    jax.tree.map(assert_close, *map(svd.nnx.params, (names['restored'], names['sparse'])))
