"""The paper's networks.

Each takes images and returns ``(logits, kl)``. Whether they are variational or dense is a matter of
the tree that they are applied to.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from svd_jax.linen import NOISE, Conv, Dense, max_pool_2x2


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10, 266,200 weights; images (batch, 28, 28, 1).

    Attributes:
      options: fields of :class:`svd_jax.linen.Variational`, for every layer.
      hidden: the sizes of the two hidden layers.
    """

    options: Any = ()
    hidden: tuple[int, int] = (300, 100)

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        options = dict(self.options)
        x = x.reshape(x.shape[0], -1)
        x, kl_0 = Dense(self.hidden[0], **options)(x, deterministic)
        x, kl_1 = Dense(self.hidden[1], **options)(nn.relu(x), deterministic)
        x, kl_2 = Dense(10, **options)(nn.relu(x), deterministic)
        return x, kl_0 + kl_1 + kl_2


class LeNet500300(LeNet300):
    """784-500-300-10, 545,000 weights: that of Structured Bayesian Pruning."""

    hidden: tuple[int, int] = (500, 300)


class LeNet5(nn.Module):
    """LeNet-5-Caffe: 20 5x5, pool, 50 5x5, pool, 500, 10, without padding; 430,500 weights.

    Attributes:
      options: fields of :class:`svd_jax.linen.Variational`, for every layer.
    """

    options: Any = ()

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        options = dict(self.options)
        x, kl_0 = Conv(20, (5, 5), padding='VALID', **options)(x, deterministic)
        x = nn.relu(max_pool_2x2(x))
        x, kl_1 = Conv(50, (5, 5), padding='VALID', **options)(x, deterministic)
        x = nn.relu(max_pool_2x2(x))
        x = x.reshape(x.shape[0], -1)
        x, kl_2 = Dense(500, **options)(x, deterministic)
        x, kl_3 = Dense(10, **options)(nn.relu(x), deterministic)
        return x, kl_0 + kl_1 + kl_2 + kl_3


class VGGLike(nn.Module):
    """The paper's VGG-like network for CIFAR: images (batch, 32, 32, 3).

    Thirteen 3x3 convolutions in five stages, each stage ending with a 2x2 pool, and two dense
    layers, all but the last with batch normalisation (Zagoruyko 2015).

    Binary dropout in training, at the rates of the paper's authors: 0.3 after the first
    convolution, 0.4 after every other one that does not end a stage, 0.5 after the hidden dense
    layer. Zagoruyko's network has 0.5 before that one too.

    Attributes:
      width: factor of all widths, the paper's k.
      classes: to tell apart.
      dropout: factor of these rates; none by default.
      stages: dropout rate, channels and convolutions of each.
      options: fields of :class:`svd_jax.linen.Variational`, for every layer.
    """

    width: float = 1.0
    classes: int = 10
    dropout: float = 0.0
    stages: tuple[tuple[float, int, int], ...] = (
        (0.3, 64, 2), (0.4, 128, 2), (0.4, 256, 3), (0.4, 512, 3), (0.4, 512, 3),
    )  # fmt: skip
    options: Any = ()

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        options = dict(self.options)
        total = jnp.zeros(())

        def dropped(x: jax.Array, rate: float) -> jax.Array:
            # A training step has one stream of random numbers, whatever they are for.
            return nn.Dropout(self.dropout * rate, rng_collection=NOISE)(x, deterministic)

        def normalised(layer: nn.Module, x: jax.Array) -> jax.Array:
            nonlocal total
            x, kl = layer(x, deterministic)
            total += kl
            return nn.relu(nn.BatchNorm(use_running_average=deterministic, momentum=0.9)(x))

        for rate, channels, depth in self.stages:
            features = round(self.width * channels)
            for _ in range(depth - 1):
                x = dropped(normalised(Conv(features, (3, 3), **options), x), rate)
            x = normalised(Conv(features, (3, 3), **options), x)
            x = max_pool_2x2(x)
        x = x.reshape(x.shape[0], -1)
        x = dropped(normalised(Dense(round(self.width * 512), **options), x), 0.5)
        x, kl = Dense(self.classes, **options)(x, deterministic)
        return x, total + kl
