"""What is computed how on which backend: the one place that chooses, and says why.

=================================  ============================  ===========================
what                               CPU                           GPU, TPU
=================================  ============================  ===========================
ordinary 2-D convolutions          matrix products, of patches   XLA's own convolutions
                                   or by Winograd's algorithm
max_pool_2x2                       comparisons of four slices    XLA's own pooling
a step that is not finite          takes the other branch        selects the old state
=================================  ============================  ===========================

On a CPU, XLA's convolutions and the gradients of its pooling are slow (see :mod:`svd_jax.conv`),
and a branch costs nothing, while a selection reads and copies the whole state: measured, see
docs/performance.md. What accelerators get is XLA's ordinary way, which no measurement of ours has
questioned yet; a branch there is expected to wait for the host.

The environment variable ``SVD_JAX_WAYS`` overrides the choice: ``cpu`` or ``accelerator``. It is
read when a function is traced; what was compiled before stays as it is.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

VARIABLE = 'SVD_JAX_WAYS'

_overridden: contextvars.ContextVar[str | None] = contextvars.ContextVar('ways', default=None)


@contextlib.contextmanager
def override(ways: str) -> Iterator[None]:
    """Chooses for what is traced within: ``'cpu'`` or ``'accelerator'``."""
    token = _overridden.set(ways)
    try:
        yield
    finally:
        _overridden.reset(token)


def as_on_cpu() -> bool:
    """Whether to compute in the ways of a CPU.

    Raises:
      ValueError: ``SVD_JAX_WAYS`` is neither ``cpu`` nor ``accelerator``.

    Example:
      >>> from svd_jax import backend
      >>> backend.as_on_cpu() in (True, False)
      True
    """
    ways = _overridden.get() or os.environ.get(VARIABLE, '')
    if ways not in ('', 'cpu', 'accelerator'):
        raise ValueError(f"{VARIABLE} must be 'cpu' or 'accelerator', got {ways!r}")
    return (ways or jax.default_backend()) == 'cpu'
