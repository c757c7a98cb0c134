"""The workloads in JAX: dense, and by svd_jax, as its users would write them."""

import functools
from collections.abc import Callable
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
      plain: whether it is one of Flax's layers, which returns scores alone, without their KL.
    """

    heads: int
    classes: int
    plain: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        width, kl = x.shape[-1], jnp.zeros(())

        def dense(features: int, x: jax.Array) -> jax.Array:
            nonlocal kl
            if self.plain:
                return nn.Dense(features)(x)
            y, divergence = svd.linen.Dense(features)(x)
            kl += divergence
            return y

        y = nn.LayerNorm()(x)
        query, key, value = (
            dense(width, y).reshape(*x.shape[:-1], self.heads, -1) for _ in range(3)
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, y.reshape(x.shape))
        x = x + dense(width, nn.gelu(dense(4 * width, nn.LayerNorm()(x))))
        x = dense(self.classes, x)
        return x if self.plain else (x, kl)


class PlainLeNet5(nn.Module):
    """:class:`experiments.models.LeNet5` as a user of Flax writes it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (20, 50):
            x = nn.Conv(features, (5, 5), padding='VALID')(x)
            x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def unchanged(workload: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of Flax's layers, and the options of svd.apply for the same training."""
    if workload == 'lenet5':
        return PlainLeNet5(), {'threshold': 3.0}
    return Block(4, WORKLOADS[workload].classes, plain=True), {}


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
    tx = optax.adam(1e-4)
    inputs, targets = map(jnp.asarray, WORKLOADS[workload].batches())
    init_key, noise_key = jax.random.split(jax.random.key(0))
    if variant.implementation == 'svd.apply':
        model, options = unchanged(workload)
        apply: Callable[..., Any] = functools.partial(svd.apply, model, **options)
    else:
        model = network(workload)
        apply = model.apply
    variables = dict(jax.jit(model.init)(init_key, inputs[0]))
    if variant.implementation == 'dense':
        variables['params'] = svd.sparsify(variables['params'], float('inf'))
    if variant.implementation == 'svd.apply':
        variables['params'] = svd.variational(variables['params'])
    state = svd.TrainState.create(variables, tx)
    step = svd.make_train_step(
        apply,
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
