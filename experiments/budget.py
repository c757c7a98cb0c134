"""A network for a given amount of work: how hard to pull towards it, and how to end within it."""

import bisect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import svd_jax as svd
from svd_jax.convention import GROUPS, LOG_SIGMA2
from svd_jax.tree import units

# By when the budget is to be met, as a share of the epochs: the rest is for what is left to learn.
_MET_AFTER = 0.7
# Added to log variances of units that are dropped, and taken from those of units that come back: it
# goes far beyond any threshold, whatever the family.
_NOISE = 20.0


def kl_factor(share: float, budget: float, progress: float) -> float:
    """What to multiply the KL weight with, by how far the network is from where it should be.

    It should shrink by the same factor in every epoch until the budget is met.

    Args:
      share: of the dense network's multiply-adds that is left.
      budget: the share that is to be left in the end.
      progress: how much of the training is done, 0 to 1.

    Example:
      >>> from experiments import budget
      >>> [round(budget.kl_factor(share, 0.1, 0.7), 2) for share in (0.4, 0.1, 0.05)]
      [16.0, 1.0, 0.25]
    """
    wanted = budget ** min(1.0, progress / _MET_AFTER)
    return (share / wanted) ** 2


def within(params: Any, share: Callable[[Any], float], budget: float, threshold: Any) -> Any:
    """The parameters with as many units as the budget has room for: the least noisy ones.

    Units that are too many for it are dropped. Those that the threshold drops come back where there
    is room for them, as a network may lose more than it is asked to. No group loses its last unit:
    there, the budget may be missed.

    Args:
      params: a variational tree with scales of units.
      share: of the dense network's work that is left with such parameters.
      budget: the share that may be left.
      threshold: at or above which units count as dropped, as :func:`svd_jax.sparsify` has it.

    Returns:
      The tree, with log variances of units raised or lowered until they count as dropped or not.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> from experiments import budget
      >>> params = {'Dense_0': {'kernel': jnp.ones((3, 2))}}
      >>> params = svd.variational(params, where=(), groups='inputs')
      >>> noise = jnp.asarray([[-1.0], [-3.0], [-2.0]])
      >>> params['Dense_0']['groups']['inputs']['log_sigma2'] = noise
      >>> def share(params):
      ...     (units,) = svd.sparsity(params, threshold=1.0).units.values()
      ...     return units.nonzero / units.total
      >>> params = budget.within(params, share, budget=0.7, threshold=1.0)
      >>> params['Dense_0']['groups']['inputs']['log_sigma2'].ravel().tolist()
      [19.0, -3.0, -2.0]
      >>> params = budget.within(params, share, budget=1.0, threshold=1.0)
      >>> params['Dense_0']['groups']['inputs']['log_sigma2'].ravel().tolist()
      [-1.0, -3.0, -2.0]
    """
    if share(params) == budget:
        return params
    noise = {
        (*path[:-1], LOG_SIGMA2): log_alpha
        for path, log_alpha in flatten_dict(svd.log_alpha(params)).items()
        if GROUPS in path
    }
    levels = np.unique(np.concatenate([np.ravel(each) for each in noise.values()]))
    levels = np.append(levels, np.inf)[::-1]

    def without(level: float) -> Any:
        """Without the units at a level of noise or above it, and with all others."""

        def moved(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
            if path not in noise:
                return leaf
            kept = (noise[path] < level) | (noise[path] == noise[path].min())
            before = there['/'.join(path[:-1])].reshape(leaf.shape)
            return leaf + _NOISE * (before.astype(leaf.dtype) - kept)

        return unflatten_dict({path: moved(path, leaf) for path, leaf in flat.items()})

    there = units(params, threshold)
    flat = flatten_dict(params, keep_empty_nodes=True)
    first = bisect.bisect_left(levels, True, key=lambda level: share(without(level)) <= budget)
    return without(levels[min(first, len(levels) - 1)])
