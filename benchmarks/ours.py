"""The workloads in JAX: dense, and by svd_jax, as its users would write them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

import svd_jax as svd
from benchmarks.flops import matrix_flops
from benchmarks.workloads import NUM_BATCHES, NUM_DATA, WORKLOADS, Program, Variant
from experiments.models import LeNet5, LeNet300, VGGLike


class Block(nn.Module):
    """A block of a Transformer, and a classifier for each position.

    Attributes:
      heads: of the attention.
      classes: to tell apart at each position.
    """

    heads: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        width, kl = x.shape[-1], jnp.zeros(())

        def dense(features: int, x: jax.Array) -> jax.Array:
            nonlocal kl
            y, divergence = svd.linen.Dense(features)(x, deterministic)
            kl += divergence
            return y

        y = nn.LayerNorm()(x)
        query, key, value = (
            dense(width, y).reshape(*x.shape[:-1], self.heads, -1) for _ in range(3)
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, y.reshape(x.shape))
        x = x + dense(width, nn.gelu(dense(4 * width, nn.LayerNorm()(x))))
        return dense(self.classes, x), kl


def network(workload: str) -> nn.Module:
    """The variational network of a workload."""
    as_trained = (('mask_in_training', True),)  # as experiments.lenet300 and lenet5 do
    return {
        'lenet300': LeNet300(as_trained),
        'lenet5': LeNet5(as_trained),
        'vgg': VGGLike(),
        'transformer': Block(4, WORKLOADS['transformer'].classes),
    }[workload]


def _matrix_products() -> Program:
    """Products of square matrices large enough for the device's best rate."""
    size = 1024 if jax.default_backend() == 'cpu' else 8192
    a = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(lambda a, b: (a @ b) / size)

    def run(count: int) -> None:
        b = a
        for _ in range(count):
            b = multiply(a, b)
        b.block_until_ready()

    return Program(run, matrix_flops(multiply, a, a))


def build(workload: str, variant: Variant) -> Program:
    """The training step of a workload, with its state donated and the batches on the device."""
    if variant.implementation == 'matrix product':
        return _matrix_products()
    model, tx = network(workload), optax.adam(1e-4)
    inputs, targets = map(jnp.asarray, WORKLOADS[workload].batches())
    init_key, noise_key = jax.random.split(jax.random.key(0))
    variables = dict(jax.jit(model.init)(init_key, inputs[0]))
    if variant.implementation == 'dense':
        variables['params'] = svd.sparsify(variables['params'], float('inf'))
    state = svd.TrainState.create(variables, tx)
    step = svd.make_train_step(
        model.apply,
        svd.classification_loss,
        tx,
        num_data=NUM_DATA,
        num_samples=variant.num_samples,
    )
    dispatch = WORKLOADS[workload].dispatch if variant.mode == 'scan' else 1

    def scanned(state: svd.TrainState, first: int) -> Any:
        def body(state: svd.TrainState, i: jax.Array) -> Any:
            key, at = jax.random.fold_in(noise_key, i), i % NUM_BATCHES
            return step(state, (inputs[at], targets[at]), key)

        return lax.scan(body, state, first + jnp.arange(dispatch))

    scanned = jax.jit(scanned, donate_argnums=0)
    batches = list(zip(inputs, targets, strict=True))

    flops = matrix_flops(step, state, batches[0], noise_key)

    def run(count: int) -> None:
        nonlocal state
        metrics = {}
        for i in range(0, count, dispatch):
            if variant.mode == 'scan':
                state, metrics = scanned(state, i)
            else:
                key = jax.random.fold_in(noise_key, i)
                state, metrics = step(state, batches[i % NUM_BATCHES], key)
        jax.block_until_ready((state, metrics))

    return Program(run, flops)


def device_peak_bytes() -> int | None:
    """Peak memory of the accelerator, since the start of the process; None on a CPU."""
    statistics = jax.devices()[0].memory_stats()
    return statistics['peak_bytes_in_use'] if statistics else None
