"""The paper's VGG-like network on CIFAR, of k times its width, by Sparse Variational Dropout.

First a dense network with binary dropout, then Sparse VD from there:

    python -m experiments.vgg --data-dir DIR --k 0.25 --method dense --out runs/dense
    python -m experiments.vgg --data-dir DIR --k 0.25 --pretrained runs/dense

From the scripts of the paper's authors (vgglike-wot.py, vgglike-ard.py) come the network, the rates
of its dropout, batches of 100, 200 epochs, and Adam at a learning rate that is constant for the
first half and falls to 0 in the second. It is 1e-3 here, theirs 1e-5: at that, no log variance
would move by more than 1. Images are normalised by channel, mirrored and shifted, where theirs are
whitened (ZCA) and left in place; there is no L2 penalty. Their reader takes the 20 coarse labels of
CIFAR-100; here it is the 100 fine ones.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import config, data, loop, models
from experiments.training import Training

CLASSES = {'cifar10': 10, 'cifar100': 100}


def check_width(k: float) -> None:
    """Refuses networks without filters.

    Raises:
      UsageError: k is too small.
    """
    config.require(64 * k > 0.5, 'k', 'must be above 1/128: every layer needs a filter')


def network(k: float, dropout: float) -> Callable[..., nn.Module]:
    """Of k times the width, with so many times the authors' dropout rates."""
    return partial(models.VGGLike, width=k, dropout=dropout)


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """Options of a training run on CIFAR."""

    dataset: Literal['cifar10', 'cifar100'] = 'cifar10'
    """Which images and labels."""
    k: float = 1.0
    """Factor of all widths; the paper has 0.25, 0.5, 1 and 1.5."""
    dropout: float = 1.0
    """Factor of the authors' dropout rates, for --method dense; 0 for no dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.k)
        config.require(0 <= self.dropout < 2, 'dropout', 'must be at least 0 and below 2')

    def folder(self, experiment: str) -> Path:
        return super().folder(f'{experiment}-{self.dataset}-k{self.k:g}')


class VGGTraining(Training):
    """Normalises each channel of the images; dropout is for dense networks alone."""

    def __init__(
        self, network: Callable[..., nn.Module], options: config.Config, dataset: data.Dataset
    ) -> None:
        super().__init__(network, options, dataset)
        self.model = self.model.clone(
            classes=CLASSES[dataset.name],
            dropout=0.0 if self.variational else self.model.dropout,
        )
        mean, sd = data.channel_mean_sd(dataset.train_images)
        self._mean, self._sd = (jnp.asarray(each)[None, None, None] for each in (mean, sd))

    def _prepare(self, images: jax.Array) -> jax.Array:
        return super()._prepare(images) / self._sd

    def units(self, path: str) -> Any:
        # What a layer reads, rather than what it makes: a batch normalisation between would undo
        # the scale. The first layer reads colours.
        return None if path == 'Conv_0/kernel' else 'inputs'


DEFAULTS = Config(decay_from=0.5, shift=4, flip=True)


def run(options: Config) -> None:
    loop.run('vgg', network(options.k, options.dropout), options, VGGTraining)


if __name__ == '__main__':
    config.command_line(run, DEFAULTS, __doc__)
