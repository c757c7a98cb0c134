"""svd.apply: unchanged models against the same of svd.linen's layers, and drawn weights."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from svd_jax import noise
from test_linen import CASES, DTYPES, Case, init, inputs, key, layers, with_noise

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


def spread(params: Any, seed: int = 0) -> Any:
    """A variational tree with a log_alpha of each weight's own, and biases that are not zero."""
    rng = np.random.default_rng(seed)

    def change(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if name == 'log_sigma2':
            return jnp.asarray(rng.uniform(-6, 0, leaf.shape), leaf.dtype)
        return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(change, params)


@pytest.fixture(params=[0.0, 1.0], ids=['means', 'deviations'])
def same_noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """All noise is this number: what it is 0 in tells the means, 1 the deviations."""
    monkeypatch.setattr(noise, 'standard_normal', lambda key, shape: jnp.full(shape, request.param))
    return request.param


def run(model: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    def apply(params: Any) -> Any:
        return svd.apply(model, {'params': params}, *args, rngs=key(1), **kwargs)

    return jax.jit(apply)(params)


def assert_close(found: Any, wanted: Any, rtol: float = 1e-6) -> None:
    def check(a: jax.Array, b: jax.Array) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = float(jnp.max(jnp.abs(b.astype(jnp.float32)))) + 1e-30
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=rtol * scale)

    jax.tree.map(check, found, wanted)


# Single layers.

GRID = [pytest.param(case, {}, id=name) for name, case in CASES.items()] + [
    pytest.param(CASES[name], fields, id=f'{name}, {of}')
    for name in ('dense', 'conv2', 'conv2, valid', 'embed')
    for of, fields in {**DTYPES, 'f16': {'dtype': jnp.float16}}.items()
]


def check_layer(case: Case, dtypes: dict[str, Any], rtol: float) -> None:
    layer, twin = layers(case, dtypes)
    params, x = with_noise(init(layer, case)), inputs(case)
    wanted = jax.jit(lambda p: layer.apply({'params': p}, x, rngs=key(1)))(params)
    assert_close(run(twin, params, x), wanted, rtol)


@pytest.mark.parametrize(('case', 'dtypes'), GRID)
def test_a_layer_of_flax_has_the_moments_of_that_of_svd_linen(
    case: Case, dtypes: dict[str, Any], same_noise: float
) -> None:
    # Where they are coarse, it shows whether a bias is added before the noise or after it.
    coarse = jnp.bfloat16 in dtypes.values() or jnp.float16 in dtypes.values()
    check_layer(case, dtypes, rtol=2e-2 if coarse else 1e-6)


@pytest.mark.parametrize('name', ['dense', 'general', 'conv1', 'conv2, valid', 'embed'])
def test_a_layer_of_flax_draws_the_noise_that_that_of_svd_linen_draws(name: str) -> None:
    check_layer(CASES[name], {}, rtol=2e-6)


class TwoMethods(nn.Module):
    """An embedding that looks up and attends."""

    embed: nn.Module

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(first(self.embed(ids)))


def first(result: Any) -> jax.Array:
    """Without the KL of a layer of svd.linen."""
    return result[0] if isinstance(result, tuple) else result


def test_an_embedding_that_attends() -> None:
    ids = jnp.asarray([[1, 2, 6]])
    plain, ours = (TwoMethods(lib.Embed(7, 4)) for lib in (nn, svd.linen))
    params = spread(svd.variational(plain.init(jax.random.key(0), ids)['params']))
    y, kl = run(plain, params, ids)
    wanted = ours.apply({'params': params}, ids, rngs=key(1))
    assert_close(y, wanted)
    np.testing.assert_allclose(kl, svd.kl(params), rtol=1e-6)


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        (nn.Einsum((3, 4, 5), 'bac,acd->bad'), (2, 3, 4)),
        (nn.Einsum((4, 6), '...c,cd->...d', use_bias=False), (2, 3, 4)),
        (nn.ConvLocal(4, (3, 2), padding='VALID'), (2, 5, 4, 3)),
        (nn.ConvLocal(4, (3,), strides=2, use_bias=False), (2, 7, 3)),
        (nn.Conv(4, (2, 2), mask=np.tri(12, 4).reshape(2, 2, 3, 4)), (2, 5, 4, 3)),
        (nn.Dense(4, dot_general=functools.partial(jax.lax.dot_general)), (2, 3)),
    ],
    ids=['einsum, batch', 'einsum', 'local2', 'local1', 'masked', 'dot_general'],
)
def test_the_moments_of_layers_that_svd_linen_does_not_have(layer, shape, same_noise) -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    plain = jax.jit(layer.init)(jax.random.key(0), x)['params']
    params = spread(svd.variational(plain))
    log_sigma2 = params.pop('log_sigma2')
    biases = {k: jnp.zeros_like(v) for k, v in params.items() if k != 'kernel'}
    mean = layer.apply({'params': params}, x)
    mask = getattr(layer, 'mask', None)
    sigma2 = jnp.exp(log_sigma2)
    assert mask is None or {0, 1} == set(np.unique(mask))
    variance = layer.apply({'params': {**biases, 'kernel': sigma2}}, x**2)
    y, kl = run(layer, {**params, 'log_sigma2': log_sigma2}, x)
    assert_close(y, mean + same_noise * jnp.sqrt(variance), rtol=3e-6)
    np.testing.assert_allclose(kl, svd.kl({**params, 'log_sigma2': log_sigma2}), rtol=1e-6)


@pytest.mark.parametrize('name', ['dense', 'conv2', 'general', 'transpose2', 'embed'])
def test_moments_are_those_of_sampled_weights(name: str) -> None:
    case = CASES[name]
    layer, twin = layers(case)
    params, x = with_noise(init(layer, case), -2.0, 1.0), inputs(case)
    draws = 4000
    keys = jax.random.split(jax.random.key(3), draws)

    def moments(of: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = jax.jit(jax.vmap(of))(keys)
        return y.mean(axis=0), y.std(axis=0)

    local = moments(lambda k: svd.apply(twin, {'params': params}, x, rngs={'noise': k})[0])
    drawn = moments(lambda k: twin.apply({'params': svd.sample(params, k)}, x))
    error = np.asarray(drawn[1]) / np.sqrt(draws)
    assert np.max(np.abs(local[0] - drawn[0]) / error) < 6.5
    np.testing.assert_allclose(local[1], drawn[1], rtol=0.1)


# Networks, and Flax's transformations.


class Block(nn.Module):
    """One layer as a scanned, checkpointed or vmapped body has it."""

    lib: Any = nn
    features: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return nn.tanh(first(self.lib.Dense(self.features, name='dense')(x))), None


def split(lib: Any, *streams: str) -> dict[str, bool]:
    return dict.fromkeys((*streams, *(() if lib is nn else ('noise',))), True)


class Scanned(nn.Module):
    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            Block, variable_axes={'params': 0}, split_rngs=split(self.lib, 'params'), length=3
        )
        return layers(self.lib)(x)[0]


class Checkpointed(nn.Module):
    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = nn.remat(Block)(self.lib)(x)
        return nn.remat(Block, policy=jax.checkpoint_policies.dots_saveable)(self.lib)(x)[0]


class ScannedCheckpoints(nn.Module):
    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={'params': 0},
            split_rngs=split(self.lib, 'params'),
            length=3,
        )
        return layers(self.lib)(x)[0]


class Vmapped(nn.Module):
    """An ensemble: parameters of their own for each of the first axis."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        many = nn.vmap(Block, variable_axes={'params': 0}, split_rngs=split(self.lib, 'params'))
        return many(self.lib)(x)[0]


class VmappedOverExamples(nn.Module):
    """The same parameters for each of the first axis."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rngs = {'params': False, **split(self.lib)}
        many = nn.vmap(Block, variable_axes={'params': None}, split_rngs=rngs)
        return many(self.lib)(x)[0]


class Jitted(nn.Module):
    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.jit(Block)(self.lib)(x)[0]


class Shared(nn.Module):
    """One layer, called twice."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = self.lib.Dense(4)
        return first(layer(nn.tanh(first(layer(x)))))


class Setup(nn.Module):
    """Declared in setup, with a method beside ``__call__`` and layers in a list."""

    lib: Any = nn

    def setup(self) -> None:
        self.encoder = self.lib.Dense(3)
        self.decoders = [self.lib.Dense(4), self.lib.Dense(2)]

    def encode(self, x: jax.Array) -> jax.Array:
        return nn.relu(first(self.encoder(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.encode(x)
        for decoder in self.decoders:
            x = first(decoder(x))
        return x


class Stacked(nn.Module):
    """nn.Sequential."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ours = lambda *results: results[0]  # noqa: E731  # Sequential spreads tuples
        return nn.Sequential([self.lib.Dense(5), ours, nn.gelu, self.lib.Dense(3), ours])(x)


class MyDense(nn.Dense):
    """A user's layer, built from Flax's."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2.0 * super().__call__(x)


class Doubled(nn.Module):
    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.lib is nn:
            return MyDense(3, name='layer')(x)
        return 2.0 * first(self.lib.Dense(3, name='layer')(x))


class Branches(nn.Module):
    """nn.cond, on what is not known before it runs."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = self.lib.Dense(4)

        def yes(layer: Any, x: jax.Array) -> jax.Array:
            return first(layer(x))

        return nn.cond(jnp.sum(x) > 0, yes, lambda layer, x: -first(layer(x)), layer, x)


class Attention(nn.Module):
    """nn.MultiHeadDotProductAttention, and what it is made of."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.lib is nn:
            return nn.MultiHeadDotProductAttention(2, name='attention')(x, x)
        return AttentionOfLayers(name='attention')(x)


class AttentionOfLayers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = {
            name: first(svd.linen.DenseGeneral((2, x.shape[-1] // 2), name=name)(x))
            for name in ('query', 'key', 'value')
        }
        y = nn.dot_product_attention(heads['query'], heads['key'], heads['value'])
        return first(svd.linen.DenseGeneral(x.shape[-1], axis=(-2, -1), name='out')(y))


class Convolutional(nn.Module):
    """Convolution, pooling, normalisation and dropout."""

    lib: Any = nn

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :, None, None] * jnp.ones((1, 1, 4, 3))
        x = nn.relu(first(self.lib.Conv(6, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = first(self.lib.Conv(70, (3, 3), use_bias=False)(x))
        x = nn.LayerNorm()(x).reshape(x.shape[0], -1)
        return first(self.lib.Dense(3)(x))


NETWORKS = [
    Attention,
    Branches,
    Checkpointed,
    Convolutional,
    Doubled,
    Jitted,
    Scanned,
    ScannedCheckpoints,
    Setup,
    Shared,
    Stacked,
    Vmapped,
    VmappedOverExamples,
]
every_network = pytest.mark.parametrize('network', NETWORKS, ids=lambda n: n.__name__)


def example(network: Any) -> tuple[jax.Array, Any]:
    shape = (2, 3, 4) if network in (Attention, Vmapped, VmappedOverExamples) else (2, 4)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    params = jax.jit(network().init)(jax.random.key(0), x)['params']
    return x, spread(svd.variational(params))


@every_network
def test_a_network_gives_what_it_gives_of_svd_linens_layers(network: Any, same_noise) -> None:
    x, params = example(network)
    y, kl = run(network(), params, x)
    wanted = jax.jit(lambda p: network(svd.linen).apply({'params': p}, x, rngs=key(1)))(params)
    assert_close(y, wanted, rtol=3e-6)
    np.testing.assert_allclose(kl, svd.kl(params), rtol=1e-6)
    dense = network().apply({'params': svd.sparsify(params, jnp.inf)}, x)
    if same_noise:
        assert np.max(np.abs(y - dense)) > 0.01
    else:
        assert_close(y, dense, rtol=3e-6)


@every_network
def test_gradients_are_those_of_svd_linens_layers(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, 'standard_normal', lambda key, shape: jnp.ones(shape))
    x, params = example(network)

    def gradients(apply: Callable[..., Any]) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(first(apply({'params': params}, x, rngs=key(1)))))

        return jax.jit(jax.grad(loss))(params)

    found = gradients(functools.partial(svd.apply, network()))
    wanted = gradients(network(svd.linen).apply)
    for path, gradient in jax.tree_util.tree_leaves_with_path(found):
        assert np.all(np.isfinite(gradient)), path
        if path[-2].key != 'key':  # attention does not see the bias of its keys
            assert np.any(gradient != 0), path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


@every_network
def test_the_plain_network_takes_the_variational_tree_and_the_sparse_one(network: Any) -> None:
    x, params = example(network)
    plain = network().apply({'params': params}, x)
    assert_close(plain, network().apply({'params': svd.sparsify(params, jnp.inf)}, x))


def correlation(a: jax.Array, b: jax.Array) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def test_noise_is_new_for_every_example_call_round_and_key() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            layer = nn.Dense(64)
            return layer(x), layer(x)

    class Rounds(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def body(layer: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
                return x, layer(x)

            rounds = nn.scan(
                body, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
            )
            return rounds(nn.Dense(64), x, None)[1]

    x = jnp.ones((64, 4))
    # Zeros as means: what is left is noise.
    params = svd.variational({'Dense_0': {'kernel': jnp.zeros((4, 64)), 'bias': jnp.zeros(64)}})
    (a, b), _ = run(Twice(), params, x)
    other = svd.apply(Twice(), {'params': params}, x, rngs=key(2))[0][0]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    (c, d), _ = run(Rounds(), stacked, x)
    limit = 5 / np.sqrt(a.size)
    for first_, second in ((a, b), (a, other), (a[:32], a[32:]), (c, d)):
        assert abs(correlation(first_, second)) < limit
    for draw in (a, b, c, d):
        np.testing.assert_allclose(np.std(draw), np.exp(-5.0) * 2, rtol=0.06)


# Weights that are drawn themselves.


class Recurrent(nn.Module):
    cell: Any = nn.LSTMCell

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.RNN(self.cell(5), name='rnn')(x))


CELLS = [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell]


@pytest.mark.parametrize('cell', CELLS)
def test_recurrent_cells_keep_one_draw_of_their_weights_along_time(cell: Any) -> None:
    model, x = Recurrent(cell), jnp.ones((2, 4, 3))
    params = jax.jit(model.init)(jax.random.key(0), x)['params']
    params = spread(svd.variational(params, where='rnn|Cell'))
    y, kl = run(model, params, x)
    assert_close(y, model.apply({'params': svd.sample(params, key(1)['noise'])}, x))
    np.testing.assert_allclose(kl, svd.kl(params), rtol=1e-6)
    # Beside it, a dense layer has local noise, even for two equal examples.
    y, _ = run(model, spread(svd.variational(model.init(jax.random.key(0), x)['params'])), x)
    assert np.all(y[0] != y[1])


def test_noise_of_its_own_in_every_round_where_the_user_wants_that() -> None:
    model, x = Recurrent(), jnp.ones((2, 4, 3))
    params = spread(svd.variational(model.init(jax.random.key(0), x)['params']))
    y, _ = run(model, params, x, sampled=lambda path: False)
    once, _ = run(model, params, x)
    some, _ = run(model, params, x, sampled='rnn|Cell')
    assert not np.allclose(y, once)
    assert_close(some, once)


def test_weights_that_are_used_otherwise_are_drawn() -> None:
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            kernel = self.param('kernel', nn.initializers.normal(1.0), (3, 4))
            return x @ (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))

    model, x = Normalised(), jnp.ones((2, 3))
    params = spread(svd.variational(model.init(jax.random.key(0), x)['params']))
    y, _ = run(model, params, x)
    assert_close(y, model.apply({'params': svd.sample(params, key(1)['noise'])}, x))
    with pytest.raises(ValueError, match=r'kernel is not used in linear operations alone'):
        run(model, params, x, sampled=lambda path: False)


@pytest.mark.parametrize(
    'use',
    [
        lambda w, x: x @ (2.0 * w / 3.0).T[::-1].T,
        lambda w, x: x @ jnp.concatenate([w[:, :1], w[:, 1:]], axis=1).astype(jnp.float32),
        lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 1))),
        lambda w, x: x @ -w,
        lambda w, x: jnp.einsum('bi,ij->b', x, w),
        lambda w, x: x[:, :1] @ w.sum(axis=0, keepdims=True),
        lambda w, x: (x @ w) @ jnp.ones((4, 2)),
        lambda w, x: w[jnp.asarray([0, 2, 0])],
        lambda w, x: (x[:, 0] * w[0, 0]) + x @ w[:, 0],
        lambda w, x: (x * w[0, 0]) @ jnp.ones((3, 2)),
        lambda w, x: (x / w[:1, :1]).sum(1),
        lambda w, x: (jnp.ones((2, 5, 4)) * w[:1, None]).mean(1) @ jnp.ones((4, 2)),
        lambda w, x: x @ jnp.roll(w, 1, axis=0),
        lambda w, x: x @ jnp.concatenate([w, w], axis=1),
        lambda w, x: jnp.sum(jnp.concatenate([x, x]).T * w[:, :1], axis=0),
        lambda w, x: x @ (w @ w.T),
        lambda w, x: jax.lax.fori_loop(0, 2, lambda i, c: c @ w @ w.T, x),
        lambda w, x: jax.nn.softmax(w)[: x.shape[0]],
        lambda w, x: jnp.round(w).astype(jnp.int32),
        lambda w, x: (w, x),
    ],
)
def test_any_use_of_a_weight_has_the_variance_of_a_sampled_weight(use) -> None:
    """What is local has the moments of what is drawn; what cannot be local is drawn."""
    rng = np.random.default_rng(4)
    kernel = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    params = {'kernel': kernel, 'log_sigma2': jnp.asarray(rng.uniform(-3, 0, (3, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(5), 3000)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return use(self.param('kernel', nn.initializers.ones, (3, 4)), x)

    def moments(of: Callable[[jax.Array], Any]) -> tuple[np.ndarray, np.ndarray]:
        y = jax.jit(jax.vmap(of))(keys)
        y = jnp.concatenate([jnp.reshape(leaf, (len(keys), -1)) for leaf in jax.tree.leaves(y)], 1)
        return np.mean(y, axis=0), np.std(y, axis=0)

    mean, deviation = moments(
        lambda k: svd.apply(Model(), {'params': params}, x, rngs={'noise': k})[0]
    )
    wanted_mean, wanted = moments(lambda k: use(svd.sample(params, k)['kernel'], x))
    np.testing.assert_allclose(deviation, wanted, rtol=0.12, atol=1e-6)
    assert np.all(np.abs(mean - wanted_mean) <= 7 * wanted / np.sqrt(len(keys)) + 1e-5)


def test_sample_is_the_posterior() -> None:
    params = {
        'a': {'kernel': jnp.full((50, 40), 2.0), 'log_sigma2': jnp.full((50, 40), np.log(9.0))},
        'b': {'kernel': jnp.ones(3), 'log_sigma2': jnp.zeros(3), 'bias': jnp.ones(2)},
    }
    drawn = svd.sample(params, jax.random.key(0), where='a')
    assert drawn['b'] is not None
    assert jax.tree.structure(drawn['b']) == jax.tree.structure(params['b'])
    assert set(drawn['a']) == {'kernel'}
    np.testing.assert_allclose(np.mean(drawn['a']['kernel']), 2.0, atol=0.3)
    np.testing.assert_allclose(np.std(drawn['a']['kernel']), 3.0, rtol=0.1)
    both = svd.sample(params, jax.random.key(0))
    assert_close(both['a'], drawn['a'])
    assert set(both['b']) == {'kernel', 'bias'}
    assert not np.allclose(
        svd.sample(params, jax.random.key(1))['a']['kernel'], drawn['a']['kernel']
    )
    with pytest.raises(ValueError, match=r'svd.variational'):
        svd.sample({'kernel': jnp.ones(2)}, jax.random.key(0))


# What model.apply takes and gives.


class Full(nn.Module):
    """Batch statistics, dropout, keyword arguments, an intermediate."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, scale: Any = 1.0) -> jax.Array:
        x = nn.Dense(8)(x)
        self.sow('intermediates', 'hidden', x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return scale * nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def full() -> tuple[jax.Array, Any]:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    variables = Full().init(jax.random.key(0), x)
    return x, {**variables, 'params': svd.variational(variables['params'])}


def test_what_model_apply_takes_passes_through() -> None:
    x, variables = full()
    rngs = {'dropout': jax.random.key(3), **key(1)}
    quiet = {
        **variables,
        'params': jax.tree_util.tree_map_with_path(
            lambda path, v: v - 90.0 if path[-1].key == 'log_sigma2' else v, variables['params']
        ),
    }
    wanted, updates = Full().apply(
        quiet, x, train=True, scale=2.0, rngs={'dropout': rngs['dropout']}, mutable=['batch_stats']
    )

    @jax.jit
    def applied(variables: Any, scale: Any) -> Any:
        apply = functools.partial(svd.apply, Full(), variables, x)
        return (
            apply(train=True, scale=scale, rngs=rngs, mutable=['batch_stats']),
            apply(rngs=key(1), capture_intermediates=True),
            apply(rngs=key(1), mutable=[]),
        )

    ((y, kl), found), (_, captured), ((_, _), nothing) = applied(quiet, 2.0)
    assert_close(y, wanted)
    assert_close(found, updates)
    np.testing.assert_allclose(kl, svd.kl(quiet['params']))
    assert_close(captured, Full().apply(quiet, x, capture_intermediates=True)[1])
    assert nothing == {}


def test_methods_and_bound_modules() -> None:
    x, params = example(Setup)
    encoder = {'encoder': params['encoder']}
    wanted, _ = svd.linen.Dense(3).apply({'params': params['encoder']}, x, rngs=key(1))
    for model in (Setup(), Setup().bind({'params': params})):
        for method in ('encode', Setup.encode, lambda module, x: module.encode(x)):
            y, kl = svd.apply(model, {'params': encoder}, x, rngs=key(1), method=method)
            assert y.shape == wanted.shape
            np.testing.assert_allclose(kl, svd.kl(encoder), rtol=1e-6)


def test_the_mean_is_masked_at_a_threshold() -> None:
    case = CASES['dense']
    layer, twin = layers(case, None, mask_in_training=True, threshold=1.0)
    params, x = with_noise(init(layer, case)), inputs(case)
    wanted = layer.apply({'params': params}, x, rngs=key(1))
    assert_close(run(twin, params, x, threshold=1.0), wanted)
    assert not np.allclose(run(twin, params, x)[0], wanted[0])


def test_errors_name_the_fix() -> None:
    x, params = example(Setup)
    with pytest.raises(ValueError, match=r"rngs=\{'noise': key\}"):
        svd.apply(Setup(), {'params': params}, x)
    with pytest.raises(ValueError, match=r'svd.variational\(params\)'):
        svd.apply(Setup(), {'params': svd.sparsify(params)}, x, rngs=key(1))
    with pytest.raises(
        ValueError, match=r'does not use decoders_0/kernel, decoders_1/kernel: .*where=.*method='
    ):
        svd.apply(Setup(), {'params': params}, x, rngs=key(1), method='encode')


def test_compiles_once_and_runs_over_keys() -> None:
    x, params = example(Stacked)
    compiled = jax.jit(lambda p, x, k: svd.apply(Stacked(), {'params': p}, x, rngs={'noise': k}))
    with jax.log_compiles(False):
        compiled(params, x, jax.random.key(0))
        compiled(params, x + 1, jax.random.key(1))
    assert compiled._cache_size() == 1
    keys = jax.random.split(jax.random.key(2), 3)
    many, _ = jax.vmap(lambda k: compiled(params, x, k))(keys)
    for one, k in zip(many, keys, strict=True):
        assert_close(one, compiled(params, x, k)[0], rtol=1e-5)


def test_training_step_with_batch_statistics_and_several_draws() -> None:
    x, variables = full()
    tx = optax.adam(1e-2)
    apply = functools.partial(svd.apply, Full())
    step = svd.make_train_step(apply, svd.classification_loss, tx, num_data=6, num_samples=3)
    state = svd.TrainState.create(variables, tx)
    labels = jnp.arange(6) % 2
    before = None
    for i in range(30):
        state, metrics = step(state, (x, labels), jax.random.key(i))
        before = before or metrics['data_term']
    assert metrics['finite']
    assert metrics['data_term'] < before
    sparse = svd.sparsify(state.params)
    assert Full().apply({'params': sparse, **state.collections}, x).shape == (6, 2)
