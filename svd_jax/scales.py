"""Scales that the weights of a unit share, in the program of a network.

A unit's weights lie along an axis of an array. Where they meet an input, multiplying the weights of
a unit is multiplying what comes out of it, or what goes into it: so a scale can be drawn for every
example, at the cost of a product.
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from svd_jax import noise, posterior


class Spread(NamedTuple):
    """Which entries share a scale: those at i along an axis have number (i // inner) % units.

    Attributes:
      axis: along which the scales differ.
      units: how many scales there are.
      inner: how many entries in a row share one, where an axis of units was merged with others.
    """

    axis: int
    units: int
    inner: int = 1

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> 'Spread | None':
        """Of scales with ones along the axes whose entries share one; None if along several."""
        axes = [axis for axis, size in enumerate(shape) if size > 1] or [len(shape) - 1]
        return cls(axes[0], shape[axes[0]]) if len(axes) == 1 else None


class Place(NamedTuple):
    """Where a scale enters a linear operation.

    Attributes:
      of_input: whether it multiplies the input of the operation, rather than the result.
      shape: of its draws: 1 along axes where they are the same.
      axis: along which the scales differ, and the size of that axis.
      size: of that axis.
      spread: of the weight.
    """

    of_input: bool
    shape: tuple[int, ...]
    axis: int
    size: int
    spread: Spread


class Scale(flax.struct.PyTreeNode):
    """The scales of a weight.

    Attributes:
      location: (units,) of the posterior.
      log_sigma2: (units,).
      family: of the posterior.
      spread: how they lie in the weight.
      group: the path of their group.
    """

    location: jax.Array
    log_sigma2: jax.Array
    family: posterior.Family = flax.struct.field(pytree_node=False)
    spread: Spread = flax.struct.field(pytree_node=False)
    group: str = flax.struct.field(pytree_node=False)

    def drawn(self, place: Place, key: jax.Array) -> jax.Array:
        """What to multiply with at that place."""
        shape = [self.spread.units if a == place.axis else n for a, n in enumerate(place.shape)]
        along = [-1 if a == place.axis else 1 for a in range(len(shape))]
        location, log_sigma2 = self.location.reshape(along), self.log_sigma2.reshape(along)
        draws = self.family.drawn(location, log_sigma2, noise.standard_normal(key, shape))
        if self.spread.units == place.size:
            return draws
        numbers = np.arange(place.size) // self.spread.inner % self.spread.units
        return jnp.take(draws, numbers, place.axis)


def moved(eqn: Any, at: int, spread: Spread | None) -> Spread | None:
    """How scales lie in the results of an operation that moves the entries of an array.

    Args:
      eqn: the operation.
      at: which of its operands the array is.
      spread: how they lie in that.

    Returns:
      None where they cannot be followed.
    """
    if spread is None:
        return None
    name, params = eqn.primitive.name, eqn.params
    before, after = eqn.invars[at].aval.shape, eqn.outvars[0].aval.shape
    axis = spread.axis
    if name == 'transpose':
        return spread._replace(axis=params['permutation'].index(axis))
    if name == 'broadcast_in_dim':
        return spread._replace(axis=params['broadcast_dimensions'][axis])
    if name == 'squeeze':
        if axis in params['dimensions']:
            return None
        return spread._replace(axis=axis - sum(a < axis for a in params['dimensions']))
    if name == 'reshape':
        return _reshaped(before, after, spread) if params['dimensions'] is None else None
    if name in ('slice', 'split', 'dynamic_slice', 'pad'):
        return spread if before[axis] == after[axis] and not _pads(eqn, axis) else None
    if name == 'rev':
        return spread if axis not in params['dimensions'] else None
    if name in ('concatenate', 'reduce_sum') or before != after:
        return None
    return spread


def _pads(eqn: Any, axis: int) -> bool:
    """Whether a padding changes an axis; one of as many as it cuts off keeps its size."""
    return eqn.primitive.name == 'pad' and any(eqn.params['padding_config'][axis])


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], spread: Spread) -> Spread | None:
    """In the axis of the result in which the whole of their axis lies."""
    stride = math.prod(before[spread.axis + 1 :]) * spread.inner
    inner = 1
    for axis in reversed(range(len(after))):
        whole = inner * after[axis]
        # All the steps from one scale to the next, and nothing beyond the last, lie in this axis.
        if inner <= stride and stride * spread.units <= whole:
            fits = stride % inner == 0 and whole % (stride * spread.units) == 0
            return Spread(axis, spread.units, stride // inner) if fits else None
        inner = whole
    return None


def place(eqn: Any, at: int, spread: Spread | None) -> Place | None:
    """Where scales enter a linear operation.

    Args:
      eqn: a matrix product, a convolution or a lookup.
      at: which of its operands the weight is.
      spread: how they lie in that.

    Returns:
      None where they multiply neither inputs nor results.
    """
    if spread is None:
        return None
    name, result = eqn.primitive.name, eqn.outvars[0].aval.shape
    x = eqn.invars[1 - at].aval.shape
    if name == 'dot_general':
        return _place_in_product(eqn, at, spread, x, result)
    if name == 'conv_general_dilated':
        return _place_in_convolution(eqn, at, spread, x, result)
    numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if spread.axis in gone or sizes[spread.axis] != eqn.invars[0].aval.shape[spread.axis]:
        return None
    kept = [axis for axis in range(len(sizes)) if axis not in gone]
    axis = numbers.offset_dims[kept.index(spread.axis)]
    return _placed(False, result, axis, numbers.offset_dims, spread)


def _place_in_product(
    eqn: Any, at: int, spread: Spread, x: tuple[int, ...], result: tuple[int, ...]
) -> Place | None:
    contracted, batch = eqn.params['dimension_numbers']
    own, others = contracted[at], contracted[1 - at]
    if spread.axis in batch[at]:
        return None
    if spread.axis in own:
        return _placed(True, x, others[own.index(spread.axis)], others, spread)
    shape = eqn.invars[at].aval.shape
    free = [axis for axis in range(len(shape)) if axis not in (*own, *batch[at])]
    first = len(batch[at]) if at == 0 else len(result) - len(free)
    axes = range(first, first + len(free))
    return _placed(False, result, axes[free.index(spread.axis)], axes, spread)


def _place_in_convolution(
    eqn: Any, at: int, spread: Spread, x: tuple[int, ...], result: tuple[int, ...]
) -> Place | None:
    params = eqn.params
    numbers = params['dimension_numbers']
    if at == 0 or params['batch_group_count'] != 1:
        return None
    outputs, inputs = numbers.rhs_spec[:2]
    if spread.axis == outputs:
        return _placed(False, result, numbers.out_spec[1], numbers.out_spec[1:], spread)
    if spread.axis == inputs and params['feature_group_count'] == 1:
        return _placed(True, x, numbers.lhs_spec[1], numbers.lhs_spec[1:], spread)
    return None


def _placed(
    of_input: bool, whole: tuple[int, ...], axis: int, shared: Any, spread: Spread
) -> Place:
    """At an axis of an array; a draw is the same along shared axes, and new along the others."""
    shape = tuple(1 if a in shared else n for a, n in enumerate(whole))
    return Place(of_input, shape, axis, whole[axis], spread)
