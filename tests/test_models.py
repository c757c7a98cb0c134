"""The paper's networks: their weights, and that a training step moves them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from experiments.models import LeNet5, LeNet300, VGGLike

VGG_CONVOLUTIONS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def _vgg_weights(width):
    channels = [3, *(round(width * features) for features in VGG_CONVOLUTIONS)]
    convolutions = sum(9 * i * o for i, o in itertools.pairwise(channels))
    return convolutions + channels[-1] * round(512 * width) + 10 * round(512 * width)


@pytest.mark.parametrize(
    ('network', 'size', 'weights'),
    [
        (LeNet300(), (28, 28, 1), 266_200),  # as the paper counts them
        (LeNet5(), (28, 28, 1), 430_500),
        (VGGLike(), (32, 32, 3), _vgg_weights(1.0)),
        (VGGLike(width=0.25), (32, 32, 3), _vgg_weights(0.25)),
    ],
    ids=['lenet300', 'lenet5', 'vgg', 'vgg, a quarter as wide'],
)
def test_networks_have_the_weights_of_the_paper(network, size, weights):
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *size)))['params']
    total = sum(int(np.prod(weight.values.shape)) for weight in svd.tree.weights(shapes))
    assert total == weights
    assert all(weight.log_sigma2 is not None for weight in svd.tree.weights(shapes))


def test_vgg_trains_evaluates_and_ships(quick_compilation):
    network, tx = VGGLike(width=1 / 32, classes=3), optax.adam(1e-3)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    # Operation by operation, each of so many layers would compile its own.
    evaluate = jax.jit(functools.partial(network.apply, deterministic=True))
    state = svd.TrainState.create(jax.jit(network.init)(jax.random.key(1), x), tx)
    before = jax.device_get((state.params, state.collections))
    step = svd.make_train_step(network.apply, svd.classification_loss, tx, num_data=4)
    state, metrics = step(state, (x, jnp.asarray([0, 1, 2, 0])), jax.random.key(2))
    assert metrics['finite']
    np.testing.assert_allclose(metrics['kl'], svd.kl(before[0]), rtol=1e-5)
    moved = jax.tree.map(
        lambda new, old: bool(np.any(np.asarray(new) != old)),
        (state.params, state.collections), before,
    )  # fmt: skip
    assert all(jax.tree.leaves(moved))
    sparse = {'params': svd.sparsify(state.params), **state.collections}
    logits, kl = evaluate(sparse, x)
    assert logits.shape == (4, 3)
    assert kl == 0
    masked, _ = evaluate({'params': state.params, **state.collections}, x)
    np.testing.assert_allclose(logits, masked, rtol=1e-5)
