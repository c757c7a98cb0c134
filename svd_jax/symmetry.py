"""The hidden units of a network in an order of their own, for the same outputs.

Hidden units can change places, if everything that makes or reads them changes places with them.
What belongs together is read from the network's own program, operation by operation: every axis of
every value is a product of *factors*, and an operation says which factors of its operands and
results are the same ones. Whatever an operation does not treat alike is fixed: the pixels under a
kernel, what a slice cuts, all that no rule covers, and the inputs and outputs of the network.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from svd_jax import network, rules
from svd_jax.convention import LOG_SIGMA2, WEIGHTS
from svd_jax.network import Path
from svd_jax.program import Constant, Equation, Program, trace
from svd_jax.tree import PerPath

PyTree = Any


class _Factor:
    """Units that stand along axes of several arrays, in one order."""

    def __init__(self, size: int, fixed: bool = False) -> None:
        self.size, self.fixed = size, fixed
        self._is: tuple[_Factor, ...] = ()  # what it was found to be, if anything

    def found(self) -> 'list[_Factor]':
        """What it is for all that is known: itself, another one, or a product of others."""
        return [factor for part in self._is for factor in part.found()] or [self]

    def is_other(self, other: '_Factor') -> None:
        other.fixed |= self.fixed
        self._is = (other,)

    def is_product(self, *sizes: int) -> None:
        self._is = tuple(_Factor(size, self.fixed) for size in sizes)


Axis = list[_Factor]  # the last one changes fastest
Axes = list[Axis]


def _found(axis: Iterable[_Factor]) -> Axis:
    return [factor for given in axis for factor in given.found() if factor.size != 1]


def _fix(axis: Iterable[_Factor]) -> None:
    for factor in _found(axis):
        factor.fixed = True


def _tie(first: Iterable[_Factor], second: Iterable[_Factor]) -> None:
    """Makes the units of two axes, of the same size, one and the same."""
    left, right = _found(first)[::-1], _found(second)[::-1]
    while left and right:
        # What they are may have been found on the way, where a factor is there twice.
        parts = left.pop().found(), right.pop().found()
        if max(map(len, parts)) > 1:
            left += parts[0][::-1]
            right += parts[1][::-1]
            continue
        (a,), (b,) = parts
        if a is b:
            continue
        if a.size == b.size:
            a.is_other(b)
            continue
        small, large = sorted((a, b), key=lambda factor: factor.size)
        left.append(a)
        right.append(b)
        if large.size % small.size:
            break
        large.is_product(small.size, large.size // small.size)
    _fix([*left, *right])


class _Operation:
    """An equation with the axes of its operands and results."""

    def __init__(self, equation: Equation, operands: list[Axes], results: list[Axes]) -> None:
        self.params, self.equation = equation.params, equation
        self.operands, self.results = operands, results

    def fix_all(self) -> None:
        for axes in (*self.operands, *self.results):
            _fix_axes(axes)


def _fix_axes(axes: Axes) -> None:
    for axis in axes:
        _fix(axis)


def _size(axis: Axis) -> int:
    return math.prod(factor.size for factor in axis)


def _shape(axes: Axes) -> tuple[int, ...]:
    return tuple(map(_size, axes))


# What an operation treats alike, by its name.


def _elementwise(operation: _Operation) -> None:
    (result,) = operation.results
    for operand in operation.operands:
        for axis, made in zip(operand, result, strict=bool(operand)):
            if _size(axis) == _size(made):
                _tie(axis, made)


def _moved(
    axes: Callable[[Equation, Any, Any], dict[int, int]], others_alike: bool = False
) -> Callable[[_Operation], None]:
    """Axes of the operand become axes of the result; others are fixed, unless treated alike."""

    def tie(operation: _Operation) -> None:
        operand, (result,) = operation.operands[0], operation.results
        moves = axes(operation.equation, _shape(operand), _shape(result))
        for before, after in moves.items():
            _tie(operand[before], result[after])
        for at, axis in enumerate(operand):
            if at not in moves and not others_alike:
                _fix(axis)
        for at, axis in enumerate(result):
            if at not in moves.values() and not others_alike:
                _fix(axis)

    return tie


def _reshape(operation: _Operation) -> None:
    (before,), (after,) = operation.operands, operation.results
    _tie([f for axis in before for f in axis], [f for axis in after for f in axis])


def _concatenate(operation: _Operation) -> None:
    along, (result,) = operation.params['dimension'], operation.results
    for operand in operation.operands:
        for at, (axis, made) in enumerate(zip(operand, result, strict=True)):
            if at != along:
                _tie(axis, made)
        _fix(operand[along])
    _fix(result[along])


def _dot(operation: _Operation) -> None:
    (left, right), (result,) = operation.operands, operation.results
    (contracted, batch) = operation.params['dimension_numbers']
    for a, b in (*zip(*contracted, strict=True), *zip(*batch, strict=True)):
        _tie(left[a], right[b])
    free = [left[a] for a in batch[0]]
    for operand, gone in zip((left, right), zip(contracted, batch, strict=True), strict=True):
        taken = {*gone[0], *gone[1]}
        free += [axis for at, axis in enumerate(operand) if at not in taken]
    for axis, made in zip(free, result, strict=True):
        _tie(axis, made)


def _conv(operation: _Operation) -> None:
    (image, kernel), (result,) = operation.operands, operation.results
    numbers, groups = operation.params['dimension_numbers'], operation.params['feature_group_count']
    (batch, features, *space), (outputs, inputs, *places) = numbers.lhs_spec, numbers.rhs_spec
    made_batch, made_features, *made_space = numbers.out_spec
    if operation.params['batch_group_count'] != 1:
        operation.fix_all()
        return
    for axes, positions in ((image, space), (kernel, places), (result, made_space)):
        for position in positions:
            _fix(axes[position])
    _tie(image[batch], result[made_batch])
    _tie(kernel[outputs], result[made_features])
    if groups == 1:
        _tie(image[features], kernel[inputs])
    elif _size(kernel[inputs]) == 1:  # depthwise: so many results of every channel
        each = _Factor(_size(kernel[outputs]) // groups)
        _tie([*image[features], each], kernel[outputs])
    else:
        for axis in (image[features], kernel[inputs], kernel[outputs]):
            _fix(axis)


def _gather(operation: _Operation) -> None:
    """Whole axes of the slices that are taken, such as the features of an embedding."""
    _fix_axes(operation.operands[1])
    _moved(rules.gathered_axes)(operation)


_TIES: dict[str, Callable[[_Operation], None]] = {
    **dict.fromkeys(rules.ELEMENTWISE, _elementwise),
    'transpose': _moved(rules.transpose_axes),
    'squeeze': _moved(rules.squeeze_axes),
    'broadcast_in_dim': _moved(rules.broadcast_axes, others_alike=True),
    'slice': _moved(rules.sliced_axes),
    'pad': _moved(rules.unpadded_axes),
    **dict.fromkeys(
        ['reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or'],
        _moved(rules.reduced_axes, others_alike=True),
    ),
    **dict.fromkeys(['argmax', 'argmin'], _moved(rules.reduced_axes)),
    **dict.fromkeys(
        ['reduce_window_max', 'reduce_window_min', 'reduce_window_sum'],
        _moved(rules.window_axes),
    ),
    'reshape': _reshape,
    'concatenate': _concatenate,
    'dot_general': _dot,
    'conv_general_dilated': _conv,
    'gather': _gather,
}


def _axes_of_array(array: Any) -> Axes:
    """Units can change places along an axis where an array is the same all along."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return [[_Factor(size, fixed=True)] for size in array.shape]
    values = np.asarray(array)
    return [
        [_Factor(size, fixed=not np.array_equal(values, np.roll(values, 1, axis)))]
        for axis, size in enumerate(values.shape)
    ]


def _axes_of_weights(program: Program, count: int) -> dict[int, Axes]:
    """The axes of the first inputs of a program, so many, as all its operations tie them."""
    axes: dict[int, Axes] = {number: _axes_of_array(a) for number, a in program.constants.items()}

    def new(number: int, fixed: bool = False) -> Axes:
        shape = program.shapes[number].shape
        return axes.setdefault(number, [[_Factor(size, fixed)] for size in shape])

    for at, number in enumerate(program.inputs):
        new(number, fixed=at >= count)
    for equation in program.equations:
        operation = _Operation(
            equation,
            [
                _axes_of_array(np.asarray(i.value)) if isinstance(i, Constant) else axes[i]
                for i in equation.inputs
            ],
            list(map(new, equation.outputs)),
        )
        _TIES.get(equation.primitive.name, _Operation.fix_all)(operation)
    read = {i for equation in program.equations for i in equation.inputs if isinstance(i, int)}
    for number in program.inputs[:count]:
        if number not in read:  # what it is for is not known
            _fix_axes(axes[number])
    for output in program.outputs:
        if not isinstance(output, Constant):
            _fix_axes(axes[output])
    return {number: list(map(_found, axes[number])) for number in program.inputs[:count]}


# The order.


def _along(factors: Sequence[_Factor], factor: _Factor) -> list[int]:
    return [at for at, other in enumerate(factors) if other is factor]


def _orders(arrays: Sequence[tuple[Axis, np.ndarray]]) -> dict[_Factor, np.ndarray]:
    """For every factor that is not fixed, its units in order: of most entries first.

    Args:
      arrays: the factors of all axes of each, in a row, and its values.
    """
    counts: dict[_Factor, np.ndarray] = {}
    for factors, values in arrays:
        entries = (values != 0).reshape([factor.size for factor in factors])
        for factor in factors:
            for at in _along(factors, factor):
                others = tuple(axis for axis in range(entries.ndim) if axis != at)
                before = counts.setdefault(factor, np.zeros(factor.size, np.int64))
                counts[factor] = before + np.count_nonzero(entries, others)
    return {f: np.argsort(-n, kind='stable') for f, n in counts.items() if not f.fixed}


def sort_units(
    model: Any, variables: PyTree, *example: Any, threshold: PerPath = 3.0, **options: Any
) -> PyTree:
    """The same network with its hidden units in order: those of most weights first.

    What makes a hidden unit and what reads it changes places with it, so the outputs stay the same
    (to rounding: sums are taken in another order). Units with nothing left come last, and
    :func:`svd_jax.save` writes fewer bytes, as no unit's place has to be told.

    Args:
      model: as for :func:`svd_jax.compact`.
      variables: as for :func:`svd_jax.fold`; best after it.
      example: as for :func:`svd_jax.compact`.
      threshold: at which log alpha the weights of a variational tree will be dropped: those do not
        count.
      options: as for :func:`svd_jax.compact`.

    Returns:
      A tree of the same structure and shapes. Units stay where they are if something treats them
      each in its own way: inputs, outputs, the pixels under a kernel, and whatever an operation
      reads that is not known here.

    Raises:
      ValueError: a pattern of ``threshold`` or a path is not matched; or weights have groups.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(1)])
      >>> first = {'kernel': jnp.asarray([[0.0, 1, 2]]), 'bias': jnp.asarray([0.0, 3, 4])}
      >>> second = {'kernel': jnp.asarray([[0.0], [0], [5]]), 'bias': jnp.asarray([6.0])}
      >>> params = {'layers_0': first, 'layers_2': second}
      >>> svd.sort_units(model, params, jnp.ones((1, 1)))['layers_0']
      {'bias': Array([4., 3., 0.], dtype=float32), 'kernel': Array([[2., 1., 0.]], dtype=float32)}
    """
    variables = meta.unbox(variables)
    dense = network.dense(variables, threshold)
    leaves, paths = jax.tree.leaves(dense), network.paths(dense)
    program = trace(network.function(model, dense, options), dense, *example)
    axes = _axes_of_weights(program, len(leaves))
    factors: dict[Path, Axis] = {
        path: [factor for axis in axes[number] for factor in axis]
        for path, number in zip(paths, program.inputs, strict=False)
    }
    within = network.with_collections(dense)
    orders = _orders([
        (factors[path], np.asarray(leaf))
        for path, leaf in zip(paths, leaves, strict=True)
        if not within or path[0] == 'params'
    ])  # fmt: skip

    def in_order(keys: Any, leaf: Any) -> Any:
        path = network.path_of(keys)
        if path[-1:] == (LOG_SIGMA2,):  # beside a weight, and of its shape
            path = next((*path[:-1], name) for name in WEIGHTS if (*path[:-1], name) in factors)
        moved = [(at, orders[f]) for at, f in enumerate(factors[path]) if f in orders]
        if not moved:
            return leaf
        split = jnp.reshape(leaf, [factor.size for factor in factors[path]])
        for at, order in moved:
            split = jnp.take(split, order, at)
        return split.reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(in_order, variables)
