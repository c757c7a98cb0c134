"""Static indexing as slices, whichever way JAX has traced it.

``h[:, 0]`` and ``h[:, ::2]`` are slices where all sizes are known, and gathers where one is a name,
as that of the batch is in ``jax.export``; ``jnp.split`` is one operation of several results. What
compares programs, or follows units through them, needs one way of these.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from svd_jax.program import Constant, Equation, Operand, Program, bind


class _Slice(NamedTuple):
    """Of every axis, where it starts, where it ends, and in which steps; then, the axes that go."""

    start: tuple[int, ...]
    limit: tuple[Any, ...]
    strides: tuple[int, ...]
    squeezed: tuple[int, ...]


def written_out(program: Program) -> Program:
    """The program with slices in the place of splits, and of gathers at indices written in it."""
    if not any(_is_static(e) or e.primitive is lax.split_p or e.body for e in program.equations):
        return program
    literals = _Literals(program)
    shapes, equations = dict(program.shapes), []
    renamed: dict[int, int] = {}

    def now(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else renamed.get(operand, operand)

    def add(primitive: Any, operand: int, where: str, **params: Any) -> int:
        number = len(shapes)
        shapes[number] = jax.eval_shape(lambda x: primitive.bind(x, **params), shapes[operand])
        equations.append(Equation(primitive, params, (operand,), (number,), where))
        return number

    for equation in program.equations:
        equation = equation._replace(
            inputs=tuple(map(now, equation.inputs)),
            body=equation.body and written_out(equation.body),
        )
        taken, where = literals.slice(equation), equation.where
        result = equation.inputs[0] if equation.inputs else None
        if equation.primitive is lax.split_p and isinstance(result, int):
            pieces = _pieces(equation.params, shapes[result].shape)
            for number, piece in zip(equation.outputs, pieces, strict=True):
                renamed[number] = add(lax.slice_p, result, where, strides=None, **piece)
            continue
        if taken is None or not isinstance(result, int):
            equations.append(equation)
            continue
        strided = max(taken.strides) > 1
        if any(taken.start) or taken.limit != shapes[result].shape or strided:
            result = add(
                lax.slice_p, result, where, start_indices=taken.start, limit_indices=taken.limit,
                strides=taken.strides if strided else None,
            )  # fmt: skip
        if taken.squeezed:
            result = add(lax.squeeze_p, result, where, dimensions=taken.squeezed)
        renamed[equation.outputs[0]] = result
    outputs = tuple(map(now, program.outputs))
    kept, read = [], {i for i in outputs if isinstance(i, int)}
    for equation in reversed(equations):
        # What computes indices is not there either where JAX slices.
        if not literals.made_by(equation) or not read.isdisjoint(equation.outputs):
            kept.append(equation)
            read.update(i for i in equation.inputs if isinstance(i, int))
    return program._replace(equations=tuple(reversed(kept)), outputs=outputs, shapes=shapes)


def _pieces(params: dict[str, Any], shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Where the pieces of a split start and end."""
    axis, start, limit = params['axis'], [0] * len(shape), list(shape)
    for first, end in itertools.pairwise(itertools.accumulate(params['sizes'], initial=0)):
        start[axis], limit[axis] = first, end
        yield {'start_indices': tuple(start), 'limit_indices': tuple(limit)}


def _is_static(equation: Equation) -> bool:
    """Whether this is how JAX gathers at places that it knows while it traces."""
    params = equation.params
    return (
        equation.primitive is lax.gather_p
        and params['mode'] == lax.GatherScatterMode.PROMISE_IN_BOUNDS
        and params['indices_are_sorted']
        and params['unique_indices']
        and not params['dimension_numbers'].operand_batching_dims
    )


class _Literals:
    """What a program computes of numbers that are written in it, as far as indices need it."""

    def __init__(self, program: Program) -> None:
        self._makers = {n: e for e in program.equations for n in e.outputs}
        self._values: dict[int, np.ndarray | None] = {}

    def made_by(self, equation: Equation) -> bool:
        return any(self._values.get(number) is not None for number in equation.outputs)

    def slice(self, equation: Equation) -> _Slice | None:
        """What an equation takes, if it gathers, and that is a slice."""
        if not _is_static(equation):
            return None
        places = self._value(equation.inputs[1])
        return None if places is None or not places.size else _slice(equation.params, places)

    def _value(self, operand: Operand) -> np.ndarray | None:
        if isinstance(operand, Constant):
            return np.asarray(operand.value)
        if operand not in self._values:
            self._values[operand] = None
            maker = self._makers.get(operand)
            operands = [None] if maker is None else list(map(self._value, maker.inputs))
            if maker is not None and all(value is not None for value in operands):
                with jax.ensure_compile_time_eval():  # whoever exports the network traces this
                    results = map(np.asarray, bind(maker, operands, maker.params))
                    self._values.update(zip(maker.outputs, results, strict=True))
        return self._values[operand]


def _slice(params: dict[str, Any], places: np.ndarray) -> _Slice | None:
    """What a gather takes: at one place, or at evenly spaced ones along one axis.

    Args:
      params: of the gather.
      places: (axes,) or (places, axes), along the axes of ``start_index_map``.
    """
    numbers, sizes = params['dimension_numbers'], list(params['slice_sizes'])
    axes, squeezed = list(numbers.start_index_map), numbers.collapsed_slice_dims
    start, strides = [0] * len(sizes), [1] * len(sizes)
    for axis, place in zip(axes, places.reshape(-1, len(axes))[0], strict=True):
        start[axis] = int(place)
    if places.ndim == 2:
        steps = np.diff(places, axis=0)
        moving = np.any(steps, 0) if len(steps) else np.isin(axes, squeezed)
        if not moving.any() or np.count_nonzero(steps[:1]) > 1 or np.any(steps != steps[:1]):
            return None
        column = int(np.argmax(moving))
        axis, step = axes[column], int(steps[0, column]) if len(steps) else 1
        squeezed = tuple(a for a in squeezed if a != axis)
        if step < 0 or axis - sum(a < axis for a in squeezed) in numbers.offset_dims:
            return None
        strides[axis], sizes[axis] = step, (len(places) - 1) * step + 1
    limit = tuple(at + size for at, size in zip(start, sizes, strict=True))
    return _Slice(tuple(start), limit, tuple(strides), squeezed)
