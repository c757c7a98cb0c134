"""Labels drawn at random: dropout learns them by heart, Sparse VD drops every weight.

A network of two hidden layers on MNIST, or the VGG-like one on CIFAR. All labels, for training and
for testing, are draws that have nothing to do with the images (Zhang et al. 2016, arXiv 1611.03530;
Molchanov et al. 2017, section 5.5). --method dense is the network with binary dropout.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tyro

from experiments import config, data, loop, vgg
from experiments.training import Training, evaluation_batches
from svd_jax.linen import NOISE, Dense

CLASSES = 10
# Training images whose labels are asked for after each epoch; after the last one, all of them are.
_FOLLOWED = 10_000


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """Options of a training run on random labels."""

    label_seed: int = 0
    """Of the labels; networks that differ in SEED alone learn the same ones."""
    images: int = 0
    """Learn the labels of so many of the training images, the first ones; 0 for all."""
    width: int = 512
    """Units of each of the two hidden layers, on MNIST."""
    k: float = 0.25
    """Factor of the widths of the VGG-like network, on CIFAR."""
    dropout: float = 0.1
    """Share of the hidden units that --method dense drops in training; on CIFAR, factor of the
    dropout rates of the paper's authors, 0.3 to 0.5."""
    # There is nothing in such labels that could hold for other images.
    validation: tyro.conf.Suppress[int] = 0
    shift: tyro.conf.Suppress[int] = 0
    flip: tyro.conf.Suppress[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        config.require(
            0 <= self.label_seed < 2**32, 'label_seed', 'must lie between 0 and 2**32 - 1'
        )
        config.require(self.images >= 0, 'images', 'must be at least 0')
        config.require(self.width >= 1, 'width', 'must be at least 1')
        vgg.check_width(self.k)
        config.require(0 <= self.dropout < 1, 'dropout', 'must be at least 0 and below 1')

    def identity(self) -> dict[str, Any]:
        unused = ('validation', 'shift', 'flip')
        return {name: value for name, value in super().identity().items() if name not in unused}


def with_random_labels(dataset: data.Dataset, seed: int) -> data.Dataset:
    """The same images with labels drawn from the uniform distribution: a function of the seed."""
    rng = np.random.default_rng(seed)

    def draw(labels: np.ndarray) -> np.ndarray:
        return rng.integers(CLASSES, size=labels.shape, dtype=labels.dtype)

    return dataset._replace(
        train_labels=draw(dataset.train_labels), test_labels=draw(dataset.test_labels)
    )


def first(dataset: data.Dataset, images: int) -> data.Dataset:
    """With the first so many training images alone, or all of them if 0.

    Raises:
      UsageError: there are fewer.
    """
    count = len(dataset.train_images)
    config.require(images <= count, 'images', f'is for up to {count} images of {dataset.name}')
    return dataset._replace(
        train_images=dataset.train_images[: images or None],
        train_labels=dataset.train_labels[: images or None],
    )


class Memoriser(nn.Module):
    """784-width-width-10, with binary dropout of the hidden units; images (batch, 28, 28, 1).

    Attributes:
      width: units of a hidden layer.
      dropout: the share of them that is dropped where not deterministic.
      options: fields of :class:`svd_jax.linen.Variational`, for every layer.
    """

    width: int = Config.width
    dropout: float = 0.0
    options: Any = ()

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        options = dict(self.options)
        # A training step has one stream of random numbers, whatever they are for.
        dropped = nn.Dropout(self.dropout, rng_collection=NOISE)
        x = x.reshape(x.shape[0], -1)
        x, kl_0 = Dense(self.width, **options)(x, deterministic)
        x = dropped(nn.relu(x), deterministic)
        x, kl_1 = Dense(self.width, **options)(x, deterministic)
        x = dropped(nn.relu(x), deterministic)
        x, kl_2 = Dense(CLASSES, **options)(x, deterministic)
        return x, kl_0 + kl_1 + kl_2


class MemoryTraining(Training):
    """Asks a network for the labels that it was trained on, without dropout and noise."""

    def _train_error(self, variables: Any, count: int | None = None) -> float:
        """On the first so many of the training images, or on all of them."""
        images, labels = self.dataset.train_images[:count], self.dataset.train_labels[:count]
        wrong = self._errors(
            variables, evaluation_batches(images), evaluation_batches(labels, fill=-1)
        )
        return 100 * int(wrong) / len(labels)

    def _scores(self, variables: Any) -> dict[str, float]:
        # Takes the place of the mean over the steps, which has the dropout and the noise in it.
        train_error = self._train_error(variables, _FOLLOWED)
        return {**super()._scores(variables), 'train_error': train_error}

    def _final_scores(self, variables: Any) -> dict[str, float]:
        return {**super()._scores(variables), 'train_error': self._train_error(variables)}


class VGGMemoryTraining(MemoryTraining, vgg.VGGTraining):
    """The same of the VGG-like network, with its batch statistics."""


def make_training(options: Config, dataset: data.Dataset) -> MemoryTraining:
    """Of the network that goes with the images."""
    if dataset.name in vgg.CLASSES:
        vgg_like = vgg.network(options.k, options.dropout)
        return VGGMemoryTraining(vgg_like, options, dataset)
    dropout = options.dropout if options.method == 'dense' else 0.0
    connected = partial(Memoriser, width=options.width, dropout=dropout)
    return MemoryTraining(connected, options, dataset)


DEFAULTS = Config(epochs=100, decay_from=0.5, batch_size=200)


def run(options: Config) -> None:
    dataset = first(data.load(options.dataset, options.data_dir), options.images)
    dataset = with_random_labels(dataset, options.label_seed)
    data.epoch_permutation(options.seed, 0, len(dataset.train_labels), options.batch_size)  # checks
    facts = {
        'experiment': 'random_labels', 'dataset': dataset.name,
        'examples': config.fingerprint(*dataset[1:]),
    }  # fmt: skip
    loop.run_training(lambda: make_training(options, dataset), options, facts)


if __name__ == '__main__':
    config.command_line(run, DEFAULTS, __doc__)
