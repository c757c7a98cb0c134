"""Sparse networks that tests make smaller or sort, and what their outputs must be."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import svd_jax as svd
from experiments.models import LeNet5, LeNet300


def conv(features: int, **fields: Any) -> nn.Conv:
    return nn.Conv(features, (3, 3), **fields)


def norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True)


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (6, 8):
            x = nn.relu(norm()(conv(features)(x)))
            x = nn.relu(norm()(conv(features)(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5)(nn.relu(norm()(nn.Dense(16)(x))))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(8, use_bias=False)(x)
        for features, stride in ((8, 1), (12, 2)):
            y = conv(features, strides=stride, use_bias=False)(nn.relu(norm()(x)))
            y = conv(features, use_bias=False)(nn.relu(norm()(y)))
            if stride > 1:
                x = nn.Conv(features, (1, 1), strides=stride, use_bias=False)(x)
            x = x + y
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))


class DepthwiseSeparable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(8)(x))
        x = nn.relu(conv(8, feature_group_count=8)(x))
        x = nn.relu(nn.Conv(12, (1, 1))(x))
        x = nn.relu(conv(24, feature_group_count=6, strides=2)(x))  # two channels a group
        x = jnp.concatenate([nn.Conv(4, (1, 1))(x), x], -1)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=True)(x.reshape(x.shape[0], -1))
        return nn.DenseGeneral((3, 2))(x)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4)(y, y)
        y = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        return nn.Dense(5)(x + nn.Dense(x.shape[-1])(y))


NETWORKS = {
    'lenet300': (LeNet300(), (28, 28, 1), {'deterministic': True}),
    'lenet5': (LeNet5(), (28, 28, 1), {'deterministic': True}),
    'vgg': (VGG(), (8, 8, 3), {}),
    'resnet': (ResNet(), (8, 8, 3), {}),
    'depthwise separable': (DepthwiseSeparable(), (8, 8, 3), {}),
    'transformer': (Transformer(), (6, 16), {}),
}


def pruned(variables: Any, seed: int) -> Any:
    """Variables with many single weights and whole units at zero, and no other zeros."""
    rng = np.random.default_rng(seed)

    def prune(path, leaf):
        leaf = np.array(leaf + 0.2 * rng.uniform(0.5, 1, leaf.shape), np.float32)
        if path[-1].key == 'kernel':
            leaf[rng.random(leaf.shape) < 0.4] = 0
            leaf[..., rng.random(leaf.shape[-1]) < 0.3] = 0
            if leaf.shape[-2] > 3:
                leaf[..., rng.random(leaf.shape[-2]) < 0.3, :] = 0
        return leaf

    return jax.tree_util.tree_map_with_path(prune, variables)


def sparse_network(name: str, seed: int = 0) -> tuple[nn.Module, Any, jax.Array, dict]:
    model, shape, options = NETWORKS[name]
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, *shape)), jnp.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, **options))()
    variables['params'] = svd.sparsify(variables['params'], np.inf) if options else variables[
        'params'
    ]  # fmt: skip
    return model, pruned(variables, seed), x, options


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b), initial=1e-30))


class Small(nn.Module):
    padding: str

    @nn.compact
    def __call__(self, x):
        y = nn.relu(conv(4, padding=self.padding)(x))
        y = conv(4, padding='SAME', use_bias=False)(y) + y
        return nn.Dense(2)(nn.relu(y).reshape(y.shape[0], -1))


def small_network(seed: int, density: float, padding: str) -> tuple[nn.Module, Any, jax.Array]:
    """With zeros anywhere."""
    rng, model = np.random.default_rng(seed), Small(padding)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 2)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
    params = jax.tree.map(
        lambda leaf: np.float32(rng.normal(size=leaf.shape) * (rng.random(leaf.shape) < density)),
        shapes,
    )
    return model, params, x
