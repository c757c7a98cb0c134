"""Networks that were trained with this library, as files inside the package.

What they are, what made them and how they were evaluated is in ``pretrained_files/README.md``; all
files are remade by ``benchmarks/files.py``.
"""

from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np

from svd_jax.file import load

PyTree = Any

_SUFFIX = '.svd'
_MEAN_IMAGE = 'mean_image'


def names() -> list[str]:
    """The networks that :func:`load_pretrained` knows.

    Returns:
      Their names, sorted.

    Example:
      >>> from svd_jax import pretrained
      >>> 'lenet300' in pretrained.names()
      True
    """
    stems = (file.name.removesuffix(_SUFFIX) for file in _files().iterdir() if _is_tree(file))
    return sorted(set(stems) - {_MEAN_IMAGE})


def load_pretrained(name: str) -> PyTree:
    """Loads a network that was trained on MNIST by Sparse Variational Dropout.

    ``'lenet300'``: LeNet-300-100, 784-300-100-10 with ReLU, which takes the pixels of an image row
    by row; 2,381 bytes, 1.76 % of the test images wrong. It is what
    ``python -m experiments.lenet300 --dataset mnist --seed 0 --kl-weight 2.0 --shift 1`` ends with:
    the first seed, the last epoch.

    ``'lenet5'``: LeNet-5-Caffe, 5x5 convolutions of 20 and 50 features without padding, each with
    a 2x2 maximum pool and ReLU, then 500 units and 10; 2,016 bytes, 0.80 % wrong; of
    ``python -m experiments.lenet5 --dataset mnist --seed 0``, likewise.

    The tolerance of their files was chosen on 5,000 held-out training images, never by test error;
    ``pretrained_files/README.md`` has the protocol. Inputs come from :func:`preprocess`.

    Args:
      name: one of :func:`names`.

    Returns:
      Nested dicts of NumPy arrays, dense, with Flax's names (``'Dense_0'``): the
      parameters of plain ``flax.linen`` layers.

    Raises:
      ValueError: there is no such network; the message lists those there are.

    Example:
      >>> import flax.linen as nn
      >>> import numpy as np
      >>> import svd_jax as svd
      >>> from svd_jax import pretrained
      >>> class LeNet300(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = x.reshape(x.shape[0], -1)
      ...         x = nn.relu(nn.Dense(300)(x))
      ...         x = nn.relu(nn.Dense(100)(x))
      ...         return nn.Dense(10)(x)
      >>> params = pretrained.load_pretrained('lenet300')
      >>> digits = np.zeros((2, 28, 28, 1), np.uint8)
      >>> LeNet300().apply({'params': params}, pretrained.preprocess(digits)).shape
      (2, 10)
    """
    if name not in names():
        raise ValueError(f'no pretrained network {name!r}: choose from {", ".join(names())}')
    return _load(name)


def preprocess(images: np.ndarray) -> np.ndarray:
    """Makes inputs of MNIST's digits, as the pretrained networks expect them.

    Args:
      images: uint8, 0 is background, (N, 28, 28, 1).

    Returns:
      Scaled to [0, 1], minus the mean of the 60,000 training images: float32, (N, 28, 28, 1).

    Raises:
      ValueError: these are no such images.

    Example:
      >>> import numpy as np
      >>> from svd_jax import pretrained
      >>> pretrained.preprocess(np.zeros((2, 28, 28, 1), np.uint8)).shape
      (2, 28, 28, 1)
    """
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28, 1):
        raise ValueError(
            f'expected uint8 images (N, 28, 28, 1), got {images.dtype} {images.shape}: pass the '
            'digits as MNIST has them, 0 to 255'
        )
    return (images.astype(np.float32) - _load(_MEAN_IMAGE).astype(np.float32)) / np.float32(255)


def _files() -> Traversable:
    return resources.files('svd_jax') / 'pretrained_files'


def _is_tree(file: Traversable) -> bool:
    return file.name.endswith(_SUFFIX)


def _load(name: str) -> PyTree:
    with resources.as_file(_files() / f'{name}{_SUFFIX}') as path:
        return load(path)
