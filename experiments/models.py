"""The paper's networks for MNIST, dense or variational: the same module, the same tree.

Each takes images (batch, 28, 28, 1) and returns ``(logits, kl)``; dense, the KL is zero.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import svd_jax as svd


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (B, H / 2, W / 2, C), without overlap.

    As a maximum over a reshape: its gradient costs a CPU a fifth of ``reduce_window``'s.
    """
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class Network(nn.Module):
    """What both share.

    Attributes:
      variational: layers of svd.linen, rather than flax.linen.
      options: fields of :class:`svd_jax.linen.Variational` for every layer.
    """

    variational: bool = True
    options: Any = None

    def _run(
        self, layer: str, x: jax.Array, deterministic: bool, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, jax.Array]:
        if not self.variational:
            return getattr(nn, layer)(*args, **kwargs)(x), jnp.zeros(())
        options = dict(self.options or {})
        return getattr(svd.linen, layer)(*args, **kwargs, **options)(x, deterministic)


class LeNet300(Network):
    """LeNet-300-100: 784-300-100-10, 266,200 weights."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        x = x.reshape(x.shape[0], -1)
        x, kl_0 = self._run('Dense', x, deterministic, 300)
        x, kl_1 = self._run('Dense', nn.relu(x), deterministic, 100)
        x, kl_2 = self._run('Dense', nn.relu(x), deterministic, 10)
        return x, kl_0 + kl_1 + kl_2


class LeNet5(Network):
    """LeNet-5-Caffe: 20 5x5, pool, 50 5x5, pool, 500, 10, without padding; 430,500 weights."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        x, kl_0 = self._run('Conv', x, deterministic, 20, (5, 5), padding='VALID')
        x = max_pool_2x2(nn.relu(x))
        x, kl_1 = self._run('Conv', x, deterministic, 50, (5, 5), padding='VALID')
        x = max_pool_2x2(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        x, kl_2 = self._run('Dense', x, deterministic, 500)
        x, kl_3 = self._run('Dense', nn.relu(x), deterministic, 10)
        return x, kl_0 + kl_1 + kl_2 + kl_3
