"""What is computed how on which backend: the one place that chooses, and says why.

=================================  ============================  ===========================
what                               CPU                           GPU, TPU
=================================  ============================  ===========================
ordinary 2-D convolutions          patches and matrix products   XLA's own convolutions
max_pool_2x2                       comparisons of four slices    XLA's own pooling
a step that is not finite          takes the other branch        selects the old state
=================================  ============================  ===========================

On a CPU, XLA's convolutions and the gradients of its pooling are slow (see :mod:`svd_jax.conv`),
and a branch costs nothing, while a selection reads and copies the whole state. On an accelerator a
branch waits for the host, and the selection is free.

The environment variable ``SVD_JAX_WAYS`` overrides the choice: ``cpu`` or ``accelerator``. It is
read when a function is traced; what was compiled before stays as it is.
"""

import os

import jax

VARIABLE = 'SVD_JAX_WAYS'


def as_on_cpu() -> bool:
    """Whether to compute in the ways of a CPU.

    Raises:
      ValueError: ``SVD_JAX_WAYS`` is neither ``cpu`` nor ``accelerator``.

    Example:
      >>> from svd_jax import backend
      >>> backend.as_on_cpu() in (True, False)
      True
    """
    ways = os.environ.get(VARIABLE, '')
    if ways not in ('', 'cpu', 'accelerator'):
        raise ValueError(f"{VARIABLE} must be 'cpu' or 'accelerator', got {ways!r}")
    return (ways or jax.default_backend()) == 'cpu'
