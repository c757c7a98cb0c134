"""What the units of a network cost, so that training spends its sparsity where speed is won."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from svd_jax import network, tree
from svd_jax.compaction import Compact, compact
from svd_jax.convention import Number, Weight, weights

PyTree = Any
Measure = Callable[[Compact], float]


def multiply_adds(small: Compact) -> float:
    """Of a smaller network, for its example input: the usual :data:`Measure`."""
    return small.report.multiply_adds[1]


def numbers(small: Compact) -> float:
    """In a smaller network's tree: four bytes each in float32."""
    return small.report.weights[1]


def unit_costs(
    model: Any,
    variables: PyTree,
    *example: Any,
    measure: Measure = multiply_adds,
    threshold: tree.PerPath = 3.0,
    **options: Any,
) -> dict[str, float]:
    """What one more unit of each group costs, in the network as it is now.

    The difference that it makes to :func:`svd_jax.compact` if one that is left were dropped too.

    Args:
      model: as for :func:`svd_jax.compact`.
      variables: its parameters, with groups (see :func:`svd_jax.variational`); or its variables,
        with the parameters under ``'params'``.
      example: as for :func:`svd_jax.compact`.
      measure: of a smaller network: :func:`multiply_adds`, :func:`numbers`, or a function of what
        :func:`svd_jax.compact` returns, such as the time that it takes.
      threshold: as for :func:`svd_jax.sparsify`.
      options: as for :func:`svd_jax.compact`.

    Returns:
      A cost for each group, by its path (``'Conv_0/groups/outputs'``); 0 for one of which no unit
      is left.

    Raises:
      ValueError: no weight has groups.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> from svd_jax import cost
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)]), jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)['params']
      >>> params = svd.variational(params, (), groups={'layers_2': 'inputs'})
      >>> cost.unit_costs(model, params, x)  # three inputs, two outputs
      {'layers_2/groups/inputs': 5.0}
    """
    within = network.with_collections(variables)
    params = variables['params'] if within else variables
    left = jax.device_get(tree.units(params, threshold))
    if not left:
        raise ValueError('no weight has groups: make some with svd.variational(..., groups=...)')

    # Traced once for all the networks that are measured.
    traced = jax.jit(network.function(model, variables, options))

    def run(given: Mapping[str, PyTree], *inputs: Any) -> Any:
        return traced(given if within else given['params'], *inputs)

    def measured(group: str = '') -> float:
        dense = _sparse(params, threshold, group, left)
        given = {**variables, 'params': dense} if within else dense
        return float(measure(compact(run, given, *example)))

    whole = measured()
    return {group: whole - measured(group) if units.any() else 0.0 for group, units in left.items()}


def _sparse(
    params: PyTree, threshold: tree.PerPath, group: str, left: Mapping[str, np.ndarray]
) -> PyTree:
    """What sparsify leaves, without the first unit of a group that is left."""
    limit = tree.per_path(threshold, params, 'threshold')

    def without(weight: Weight) -> jax.Array:
        values = weight.sparse(limit)
        for scale in weight.scales:
            if scale.group == group:
                kept = np.ones(left[group].size)
                kept[np.argmax(left[group])] = 0
                values *= kept.reshape(scale.location.shape)
        return values

    return tree.collapse(params, without)


def kl_weights(costs: Mapping[str, float], params: PyTree, mean: Number = 1.0) -> dict[str, Number]:
    """Weights for the KL divergences of scales, in proportion to what their units cost.

    Args:
      costs: of a unit, by the path of its group, as :func:`unit_costs` gives them. One that is
        measured may be below 0: it counts as 0. If all are 0, the weights are all the same.
      params: the tree.
      mean: of the weights, over all units.

    Returns:
      A weight for each group, by its path.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> from svd_jax import cost
      >>> params = svd.variational({'kernel': jnp.ones((3, 1))}, (), groups=['inputs', 'outputs'])
      >>> cost.kl_weights({'groups/inputs': 1.0, 'groups/outputs': 5.0}, params)
      {'groups/inputs': 0.5, 'groups/outputs': 2.5}
    """
    sizes = {scale.group: scale.location.size for w in weights(params) for scale in w.scales}
    costs = {group: max(cost, 0.0) for group, cost in costs.items()}
    total = sum(cost * sizes[group] for group, cost in costs.items())
    if not total:  # as when all units are gone
        return dict.fromkeys(costs, mean)
    unit = mean * sum(sizes.values()) / total
    return {group: unit * cost for group, cost in costs.items()}
