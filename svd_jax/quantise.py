"""Weights as whole multiples of a step, as coarsely as their posterior says that they can be.

A weight may be off by its posterior standard deviation sigma: the noise that the network was
trained to ignore. The cost of an error d, in nats of log-likelihood over the training set, is about
``d^2 / (2 sigma^2)``, as the posterior is a Gaussian around its mean; that of coding a level is its
number of bits. Both are weighed against each other, weight by weight (rate-distortion optimised
quantisation).
"""

import math

import numpy as np

_ROUNDS = 6
_LARGEST = 64  # sizes of levels that are told apart

# Errors are taken to be so many times as large when a level is chosen by its price: cheap levels
# make weights smaller, all of them at once, and such errors add up where random ones cancel.
_CAUTION = 2.2

# The smallest step is 2^-40.
_SMALLEST = 40

# Biases were trained without noise, and are rounded by a smaller part of the weights' step.
_BIAS_PART = 0.5


def step_size(sigma: np.ndarray, tolerance: float) -> float:
    """The step that the layer's weights are multiples of.

    With steps of a size s, an entropy coder needs a constant minus ``log s`` nats a weight, and
    the error is ``s^2 / 12`` in the mean; the sum of both costs is least for the s here.

    Args:
      sigma: posterior standard deviations of the weights that are kept, (n,).
      tolerance: how large an error may be, in these; 1 weighs a nat of code as one of likelihood.
    """
    return float(tolerance * math.sqrt(12 / np.mean(1 / np.square(sigma.astype(np.float64)))))


def step_code(size: float) -> int:
    """The number of the step next to a size: four steps double it."""
    size = min(size, step(255))
    exponent = math.floor(math.log2(size))
    code = 4 * (exponent + _SMALLEST) + round(4 * (size / 2.0**exponent - 1))
    return min(max(code, 0), 255)


def step(code: int) -> float:
    """The step of a number from 0 to 255: ``(4 + code % 4) * 2^(code // 4 - 42)``."""
    return (4 + code % 4) * 2.0 ** (code // 4 - _SMALLEST - 2)


def values(levels: np.ndarray, step: float, dtype: np.dtype) -> np.ndarray:
    """What the multiples of a step are, in this type; infinite beyond its largest number."""
    exact = np.promote_types(dtype, np.float32)
    with np.errstate(over='ignore'):
        return (levels.astype(exact) * exact.type(step)).astype(dtype)


def levels(weights: np.ndarray, sigma: np.ndarray, step: float, tolerance: float) -> np.ndarray:
    """Which multiple of the step every weight becomes.

    Args:
      weights: any shape; those at zero stay there.
      sigma: their posterior standard deviations.
      step: as from :func:`step_size`.
      tolerance: as there.

    Returns:
      Whole numbers, int64, of the weights' shape.
    """
    matrix = weights.reshape(-1, weights.shape[-1] if weights.ndim else 1)
    kept = np.nonzero(matrix)
    exact = matrix[kept].astype(np.float64) / step
    spread = sigma.reshape(matrix.shape)[kept].astype(np.float64)
    price = np.square(_CAUTION * (step / tolerance) / spread) / 2
    nearest = np.rint(exact)
    nearest = np.where(nearest == 0, np.copysign(1, exact), nearest)
    choices = np.stack([nearest, nearest - np.sign(nearest), np.zeros_like(nearest)])
    errors = price * np.square(exact - choices)
    result = np.zeros(matrix.shape, np.int64)
    result[kept] = nearest
    for _ in range(_ROUNDS):
        nats = _code_length(result, kept, choices)
        result[kept] = choices[np.argmin(errors + nats, 0), np.arange(exact.size)]
    return result.reshape(weights.shape)


def bias_levels(bias: np.ndarray, step_of_weights: float) -> tuple[int, np.ndarray]:
    """The number of the step of a layer's bias, given that of its weights, and its levels."""
    code = step_code(_BIAS_PART * step_of_weights)
    return code, np.rint(bias.astype(np.float64) / step(code)).astype(np.int64)


def _code_length(
    levels: np.ndarray, kept: tuple[np.ndarray, ...], choices: np.ndarray
) -> np.ndarray:
    """Nats that every choice would take, given all levels so far."""
    sizes = np.minimum(np.abs(choices), _LARGEST).astype(np.int64)
    used_sizes = np.minimum(np.abs(levels[kept]), _LARGEST)
    counts = np.bincount(used_sizes, minlength=_LARGEST + 1) + 0.1
    nats = math.log(counts[1:].sum()) - np.log(counts[sizes]) + math.log(2)  # the sign
    # That it is there: among the cells of used rows and columns, or as the only one of its own.
    cells, used = 1, int(np.count_nonzero(levels))
    for axis, at in enumerate(kept):
        entries = np.count_nonzero(levels, 1 - axis)
        alive = max(int(np.count_nonzero(entries)), 1)
        nats += (entries[at] <= 1) * math.log(len(entries) / alive)
        cells *= alive
    nats += math.log(max(cells - used, 1) / max(used, 1))
    return np.where(sizes == 0, 0, nats)
