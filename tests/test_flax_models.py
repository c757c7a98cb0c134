"""The example models of Flax's own repository, rebuilt as it writes them, go all the way unchanged.

Smaller than the originals, with the same layers and the same structure: examples/mnist, imagenet
(ResNet-50), lm1b, seq2seq and vae.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


class CNN(nn.Module):
    """examples/mnist"""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.avg_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(64, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape((x.shape[0], -1))))
        return nn.Dense(10)(x)


class BottleneckResNetBlock(nn.Module):
    filters: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(
            self.conv(self.filters * 4, (1, 1))(y)
        )
        if residual.shape != y.shape:
            residual = self.conv(self.filters * 4, (1, 1), self.strides, name='conv_proj')(residual)
            residual = self.norm(name='norm_proj')(residual)
        return nn.relu(residual + y)


class ResNet50(nn.Module):
    """examples/imagenet; two blocks of the first stage and one of the next take less time."""

    num_filters: int = 4
    stage_sizes: tuple[int, ...] = (2, 1)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name='conv_init')(x)
        x = nn.relu(norm(name='bn_init')(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                filters = self.num_filters * 2**i
                x = BottleneckResNetBlock(filters, conv, norm, strides)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class DecoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        y = nn.LayerNorm()(x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, qkv_features=8, use_bias=False, dropout_rate=0.1,
            deterministic=deterministic,
        )  # fmt: skip
        x = x + nn.Dropout(0.1)(attention(y, y, mask=mask), deterministic=deterministic)
        y = nn.relu(nn.Dense(16)(nn.LayerNorm()(x)))
        y = nn.Dense(8)(nn.Dropout(0.1)(y, deterministic=deterministic))
        return x + nn.Dropout(0.1)(y, deterministic=deterministic)


class TransformerLM(nn.Module):
    """examples/lm1b, with logits_via_embedding"""

    vocabulary: int = 11

    @nn.compact
    def __call__(self, tokens: jax.Array, deterministic: bool = False) -> jax.Array:
        embed = nn.Embed(self.vocabulary, 8, embedding_init=nn.initializers.normal(1.0))
        shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        x = embed(shifted.astype('int32'))
        positions = self.param('pos_embedding', nn.initializers.normal(0.02), (1, 32, 8))
        x = x + positions[:, : x.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            x = DecoderBlock()(x, mask, deterministic)
        x = nn.LayerNorm()(x)
        return embed.attend(x.astype(jnp.float32)) / np.sqrt(8)


class DecoderLSTMCell(nn.RNNCellBase):
    features: int
    teacher_force: bool

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        lstm_state, last_prediction = carry
        if not self.teacher_force:
            x = last_prediction
        lstm_state, y = nn.LSTMCell(self.features)(lstm_state, x)
        logits = nn.Dense(x.shape[-1])(y)
        categorical_rng = self.make_rng('lstm')
        predicted = jax.random.categorical(categorical_rng, logits)
        prediction = jax.nn.one_hot(predicted, x.shape[-1], dtype=jnp.float32)
        return (lstm_state, prediction), (logits, prediction)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Seq2seq(nn.Module):
    """examples/seq2seq"""

    teacher_force: bool = False
    hidden_size: int = 6

    @nn.compact
    def __call__(self, encoder_inputs: jax.Array, decoder_inputs: jax.Array) -> jax.Array:
        encoder = nn.RNN(nn.LSTMCell(self.hidden_size), return_carry=True, name='encoder')
        decoder = nn.RNN(
            DecoderLSTMCell(self.hidden_size, self.teacher_force),
            split_rngs={'params': False, 'lstm': True},
            name='decoder',
        )
        encoder_state, _ = encoder(encoder_inputs)
        start = decoder_inputs[:, 0]
        logits, _ = decoder(decoder_inputs[:, :-1], initial_carry=(encoder_state, start))
        return logits


class VAE(nn.Module):
    """examples/vae"""

    latents: int = 3

    def setup(self) -> None:
        self.fc1, self.fc2_mean, self.fc2_logvar = nn.Dense(9), nn.Dense(3), nn.Dense(3)
        self.fc3, self.fc4 = nn.Dense(9), nn.Dense(12)

    def __call__(self, x: jax.Array, z_rng: jax.Array) -> jax.Array:
        h = nn.relu(self.fc1(x))
        mean, logvar = self.fc2_mean(h), self.fc2_logvar(h)
        z = mean + jax.random.normal(z_rng, logvar.shape) * jnp.exp(0.5 * logvar)
        return self.generate(z)

    def generate(self, z: jax.Array) -> jax.Array:
        return nn.sigmoid(self.fc4(nn.relu(self.fc3(z))))


class Example(NamedTuple):
    model: nn.Module
    inputs: tuple[Any, ...]
    rngs: tuple[str, ...] = ()


def _inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def _one_hot(*shape: int) -> jax.Array:
    return jax.nn.one_hot(np.random.default_rng(0).integers(5, size=shape), 5)


EXAMPLES = {
    'mnist': Example(CNN(), (_inputs(2, 8, 8, 1),)),
    'imagenet': Example(ResNet50(), (_inputs(2, 32, 32, 3),)),
    'lm1b': Example(TransformerLM(), (jnp.asarray([[1, 4, 2, 7], [3, 3, 9, 1]]),), ('dropout',)),
    'seq2seq': Example(Seq2seq(), (_one_hot(2, 4), _one_hot(2, 5)), ('lstm',)),
    'seq2seq, forced': Example(
        Seq2seq(teacher_force=True), (_one_hot(2, 4), _one_hot(2, 5)), ('lstm',)
    ),
    'vae': Example(VAE(), (_inputs(2, 12), jax.random.key(5))),
}


def fresh(inputs: Any) -> Any:
    """Keys that may be used once more."""
    return jax.tree.map(
        lambda x: jax.random.clone(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, inputs
    )


@pytest.mark.parametrize('name', EXAMPLES)
def test_an_example_of_flax_goes_all_the_way(name: str) -> None:
    model, inputs, streams = EXAMPLES[name]
    rngs = {stream: jax.random.key(i) for i, stream in enumerate(('params', *streams))}
    variables = jax.jit(model.init)(rngs, *fresh(inputs))
    params = svd.variational(variables['params'], log_sigma2_init=-6.0)
    variational = [w for w in jax.tree_util.tree_leaves_with_path(params) if 'log_sigma2' in str(w)]
    assert len(variational) == len(svd.weight_paths(params))

    def apply(variables: Any, inputs: Any, rngs: Any, **kwargs: Any) -> Any:
        others = {s: jax.random.fold_in(rngs['noise'], i) for i, s in enumerate(streams)}
        return svd.apply(model, variables, *inputs, rngs={**rngs, **others}, **kwargs)

    def loss(outputs: jax.Array, target: float) -> jax.Array:
        return jnp.mean((outputs - target) ** 2)

    step = svd.make_train_step(apply, loss, optax.sgd(0.01), num_data=100)
    state = svd.TrainState.create({**variables, 'params': params}, optax.sgd(0.01))
    state, metrics = step(state, (fresh(inputs), 0.5), jax.random.key(7))
    assert metrics['finite']  # and so is every gradient
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
    ):
        if path[-1].key == 'log_sigma2':
            assert np.all(np.isfinite(after)), path
            assert np.any(after != before), path

    alpha = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(svd.log_alpha(params))])
    sparse = svd.sparsify(state.params, float(np.median(alpha)))
    assert 0.3 < svd.sparsity(sparse).percent / 100 < 0.7
    assert jax.tree.structure(sparse) == jax.tree.structure(variables['params'])
    others = {stream: rngs[stream] for stream in streams}
    outputs = jax.jit(
        lambda params: model.apply(
            {**variables, 'params': params}, *fresh(inputs), rngs=others, mutable=['batch_stats']
        )[0]
    )(sparse)
    assert np.all(np.isfinite(outputs))


def test_resnet_50_in_its_full_depth() -> None:
    model, x = ResNet50(stage_sizes=(3, 4, 6, 3)), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    variables['params'] = svd.variational(variables['params'])
    assert len(svd.weight_paths(variables['params'])) == 54

    def apply(variables: Any, x: jax.Array) -> Any:
        rngs = {'noise': jax.random.key(1)}
        return svd.apply(
            model, variables, x, rngs=rngs, mutable=['batch_stats'], sampled=lambda path: False
        )

    (y, kl), _ = jax.eval_shape(apply, variables, x)  # fails if a weight is unused, or not local
    assert (y.shape, kl.shape) == ((2, 10), ())


@pytest.mark.parametrize('forced', [False, True])
def test_what_is_the_same_along_time_is_drawn_once(forced: bool) -> None:
    model, inputs, _ = EXAMPLES['seq2seq, forced' if forced else 'seq2seq']
    rngs = {'params': jax.random.key(0), 'lstm': jax.random.key(1)}
    params = svd.variational(model.init(rngs, *inputs)['params'], log_sigma2_init=-1.0)
    key, rngs = jax.random.key(2), {'lstm': jax.random.key(3)}
    y, _ = svd.apply(model, {'params': params}, *inputs, rngs={'noise': key, **rngs})
    wanted = model.apply({'params': svd.sample(params, key)}, *inputs, rngs=fresh(rngs))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
