"""What a small network can learn from the one it comes from, beside the labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import svd_jax as svd

# What both networks' logits are divided by: on MNIST, 2.5 to 4 were best for the smallest networks
# of that paper.
TEMPERATURE = 4.0


def distillation_loss(share: float) -> Callable[[jax.Array, Any], tuple[jax.Array, Any]]:
    """A loss of logits against labels and another network's logits (Hinton et al. 2015).

    The second part is the KL divergence from the other network's softened predictions to these,
    times the temperature squared: its gradient is then of the size of the first's (arXiv
    1503.02531, section 2.1).

    Args:
      share: of the second part, 0 to 1; the labels have the rest.

    Returns:
      A function of logits (..., classes) and of a pair: labels (...), integers, and the other
      network's logits (..., classes). It returns the loss and the metrics of
      :func:`svd_jax.classification_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.distillation import distillation_loss
      >>> logits, labels = jnp.asarray([[2.0, 0.0]]), jnp.asarray([0])
      >>> float(distillation_loss(1.0)(logits, (labels, logits))[0])
      0.0
    """

    def loss(logits: jax.Array, targets: Any) -> tuple[jax.Array, Any]:
        labels, theirs = targets
        hard, metrics = svd.classification_loss(logits, labels)
        ours, theirs = (
            jax.nn.log_softmax(each.astype(jnp.float32) / TEMPERATURE) for each in (logits, theirs)
        )
        soft = TEMPERATURE**2 * jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), -1))
        return (1 - share) * hard + share * soft, metrics

    return loss
