"""Biases, trained again after the weights were rounded.

Rounding moves a layer's sums, in the mean too; few numbers can make up for that, and cost no byte.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import augment, data

_BATCH = 100
_LEARNING_RATE = 2e-3  # of Adam, down to zero by half a cosine


def tune_biases(
    model: Any, params: Any, dataset: data.Dataset, epochs: int, shift: int = 0
) -> dict[str, Any]:
    """Trains the biases that are not zero, on the training images, and nothing else.

    Args:
      model: as in :mod:`experiments.models`.
      params: without a posterior; layers with a ``bias`` each.
      dataset: images and labels to train on.
      epochs: passes over them.
      shift: of the training images, as for :func:`experiments.augment.random_shift`.

    Returns:
      The tree, with other biases.
    """
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    mean = jnp.asarray(data.mean_image(dataset.train_images))[None]
    orders = [data.epoch_permutation(0, epoch, len(labels), _BATCH) for epoch in range(epochs)]
    batches = np.concatenate(orders)
    tx = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, len(batches)))

    def with_biases(biases: dict[str, Any]) -> dict[str, Any]:
        return {
            # A bias of a unit that is gone stays at zero.
            name: layer | {'bias': jnp.where(layer['bias'] == 0, 0, biases[name])}
            for name, layer in params.items()
        }

    @jax.jit
    def step(biases: Any, state: Any, at: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        batch = images[at]
        if shift:
            batch = augment.random_shift(key, batch, shift)
        batch = batch.astype(jnp.float32) / 255 - mean

        def loss(biases: Any) -> jax.Array:
            logits, _ = model.apply({'params': with_biases(biases)}, batch, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[at]).mean()

        updates, state = tx.update(jax.grad(loss)(biases), state)
        return optax.apply_updates(biases, updates), state

    biases = {name: jnp.asarray(layer['bias']) for name, layer in params.items()}
    state = tx.init(biases)
    for at, key in zip(batches, jax.random.split(jax.random.key(0), len(batches)), strict=True):
        biases, state = step(biases, state, at, key)
    return jax.device_get(with_biases(biases))
