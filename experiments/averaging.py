"""Averages of the weights along the way, which vary less than the weights after the last step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import svd_jax as svd


class AverageState(NamedTuple):
    """Attributes: average: of the parameters, a tree like theirs."""

    average: Any


def average(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters; the last in a chain.

    After every step the average has a share of ``decay`` in itself, and the new parameters the
    rest (Polyak & Juditsky 1992). It starts from the parameters, so nothing in it is biased
    towards zero.

    Args:
      decay: 0 up to 1; ``1 / (1 - decay)`` is about the number of steps averaged over.

    Returns:
      A transformation that leaves the updates as they are, and needs the parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from experiments.averaging import average
      >>> tx, params = optax.chain(optax.sgd(1.0), average(0.75)), jnp.zeros(1)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(params), params)
      >>> params + updates, state[-1].average
      (Array([-1.], dtype=float32), Array([-0.25], dtype=float32))
    """

    def init(params: Any) -> AverageState:
        return AverageState(_copy(params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        after = optax.apply_updates(params, updates)
        return updates, AverageState(
            optax.incremental_update(after, state.average, step_size=1 - decay)
        )

    return optax.GradientTransformation(init, update)


def averaged(state: svd.TrainState) -> svd.TrainState:
    """The state with the average that its optimiser keeps in the place of the parameters."""
    return state.replace(params=_copy(optax.tree_utils.tree_get(state.opt_state, 'average')))


def restarted(state: svd.TrainState) -> svd.TrainState:
    """The state with an average that starts again from the parameters."""
    start = _copy(state.params)
    return state.replace(opt_state=optax.tree_utils.tree_set(state.opt_state, average=start))


def _copy(params: Any) -> Any:
    """Buffers of its own: steps donate their state, and no buffer can be donated twice."""
    return jax.tree.map(jnp.array, params)
