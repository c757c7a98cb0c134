"""Weights as whole multiples of a step, as coarsely as their posterior says that they can be.

A weight may be off by its posterior standard deviation sigma: the noise that the network was
trained to ignore. The cost of an error d, in nats of log-likelihood over the training set, is about
``d^2 / (2 sigma^2)``, as the posterior is a Gaussian around its mean; that of coding a level is its
number of bits. Both are weighed against each other, weight by weight (rate-distortion optimised
quantisation).
"""

import math

import numpy as np

_ROUNDS = 4

# Errors are taken to be so many times as large when a level is chosen by its price: cheap levels
# make weights smaller, all of them at once, and such errors add up where random ones cancel.
_CAUTION = 3

# Biases were trained without noise, and are rounded by a smaller part of the weights' step.
_BIAS_PART = 0.3


def step_size(sigma: np.ndarray, tolerance: float) -> float:
    """The step that the layer's weights are multiples of.

    With steps of a size s, an entropy coder needs a constant minus ``log s`` nats a weight, and
    the error is ``s^2 / 12`` in the mean; the sum of both costs is least for the s here.

    Args:
      sigma: posterior standard deviations of the weights that are kept, (n,).
      tolerance: how large an error may be, in these; 1 weighs a nat of code as one of likelihood.
    """
    return float(tolerance * math.sqrt(12 / np.mean(1 / np.square(sigma.astype(np.float64)))))


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
    kept = weights != 0
    exact = weights[kept].astype(np.float64) / step
    price = np.square(_CAUTION * step / (tolerance * sigma[kept].astype(np.float64))) / 2
    nearest = np.rint(exact)
    nearest = np.where(nearest == 0, np.copysign(1, exact), nearest)
    choices = np.stack([nearest, nearest - np.sign(nearest), np.zeros_like(nearest)])
    errors = price * np.square(exact - choices)
    chosen = nearest
    for _ in range(_ROUNDS):
        nats = _code_length(chosen, weights.size, choices)
        chosen = choices[np.argmin(errors + nats, 0), np.arange(exact.size)]
    result = np.zeros(weights.shape, np.int64)
    result[kept] = chosen.astype(np.int64)
    return result


def bias_levels(bias: np.ndarray, step: float) -> tuple[float, np.ndarray]:
    """The step of a layer's bias, given that of its weights, and its levels."""
    step = float(np.float32(_BIAS_PART * step))
    return step, np.rint(bias.astype(np.float64) / step).astype(np.int64)


def _code_length(chosen: np.ndarray, total: int, choices: np.ndarray) -> np.ndarray:
    """Nats that every choice would take, by how often each level was chosen so far."""
    sizes = np.minimum(np.abs(chosen), 64).astype(np.int64)
    counts = np.bincount(sizes, minlength=65) + 0.1
    counts[0] += total - chosen.size
    nats = math.log(counts.sum()) - np.log(counts)
    nats[1:] += math.log(2)  # the sign
    return nats[np.minimum(np.abs(choices), 64).astype(np.int64)]
