"""What is timed: networks, their inputs, and who computes their training step.

A workload is a network, dense or variational, with a batch of fixed shape and Adam. Its peers in
PyTorch are built alike in :mod:`benchmarks.peers`, ours in :mod:`benchmarks.ours`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Program(NamedTuple):
    """A training step that is ready to be timed.

    Attributes:
      run: runs so many steps, and returns when the device is done with them.
      flops: of the matrix products and convolutions in a step, if they were counted.
    """

    run: Callable[[int], None]
    flops: int | None = None


NUM_DATA = 60_000  # the KL is divided by it
NUM_BATCHES = 8  # that the steps go through in turn


class Workload(NamedTuple):
    """Shapes of a training step.

    Attributes:
      input_shape: of a batch, channels last.
      target_shape: of its labels.
      classes: how many there are.
      dispatch: steps that one dispatch holds where steps are scanned.
    """

    input_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    classes: int
    dispatch: int

    def batches(self) -> tuple[np.ndarray, np.ndarray]:
        """Random inputs and labels, with a leading axis of batches."""
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((NUM_BATCHES, *self.input_shape), np.float32)
        return inputs, rng.integers(self.classes, size=(NUM_BATCHES, *self.target_shape))


WORKLOADS = {
    'lenet300': Workload((100, 28, 28, 1), (100,), 10, 100),
    'lenet5': Workload((100, 28, 28, 1), (100,), 10, 50),
    'vgg': Workload((100, 32, 32, 3), (100,), 10, 2),
    'transformer': Workload((32, 64, 128), (32, 64), 65, 20),
}


class Variant(NamedTuple):
    """Who computes the step, and how.

    Attributes:
      implementation: ``'svd_jax'``; ``'svd.apply'``, on a network of Flax's own layers; or a
        peer: ``'cplxmodule'``, ``'pytorch-ard'``,
        ``'hand-written'`` (the shortest PyTorch for it), and ``'dense'`` for either; or
        ``'matrix product'``, which instead of a step multiplies matrices as fast as it can.
      framework: ``'jax'`` or ``'torch'``.
      mode: ``'step'`` or ``'scan'`` (several steps per dispatch), ``'eager'`` or ``'compiled'``.
      num_samples: draws of the noise per step.
    """

    implementation: str
    framework: str
    mode: str
    num_samples: int = 1

    def __str__(self) -> str:
        samples = f', {self.num_samples} draws' if self.num_samples > 1 else ''
        return f'{self.implementation} ({self.framework}, {self.mode}{samples})'


MATRIX_PRODUCT = Variant('matrix product', 'jax', 'step')
OURS = [
    Variant(implementation, 'jax', mode)
    for implementation in ('dense', 'svd_jax')
    for mode in ('step', 'scan')
]
PEERS = [
    Variant(implementation, 'torch', mode)
    for implementation in ('dense', 'cplxmodule', 'pytorch-ard', 'hand-written')
    for mode in ('eager', 'compiled')
]


def variants(workload: str) -> list[Variant]:
    """All that are timed on a workload."""
    more = [Variant('svd_jax', 'jax', 'scan', 8)] if workload == 'lenet300' else []
    if workload in ('lenet5', 'transformer'):
        more = [Variant('svd.apply', 'jax', mode) for mode in ('step', 'scan')]
    return [MATRIX_PRODUCT, *OURS, *more, *PEERS]
