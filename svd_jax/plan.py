"""What is left of a program once its arrays are smaller: which operations run, on which units."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from svd_jax.network import Path
from svd_jax.program import Constant, Equation, Operand, Program, bind
from svd_jax.rules import Fixed, Units, Use, View, everything
from svd_jax.sizes import outline

# Operands of which a zero has no finite result.
_POLES = {
    'div': 1, 'rem': 1, 'log': 0, 'rsqrt': 0, 'pow': 0, 'integer_pow': 0, 'lgamma': 0, 'acosh': 0,
}  # fmt: skip


class Fit(NamedTuple):
    """How to make the units that an operation reads out of those that an array has.

    Attributes:
      take: for every axis where they differ, which to take; beyond the end: of the constants.
      constants: what is appended along the axis of the constant units, if any are read.
    """

    take: dict[int, np.ndarray]
    constants: tuple[int, np.ndarray] | None

    @classmethod
    def between(cls, has: Units, reads: Units, fixed: Fixed | None = None) -> 'Fit':
        take, constants = {}, None
        for axis, (own, wanted) in enumerate(zip(has, reads, strict=True)):
            if np.array_equal(own, wanted):
                continue
            place = np.cumsum(own) - 1
            missing = wanted & ~own
            if missing.any():
                assert fixed is not None
                assert fixed.axis == axis
                assert not np.any(missing & ~fixed.units)
                place = np.where(missing, own.sum() + np.cumsum(missing) - 1, place)
                constants = axis, fixed.values[missing]
            take[axis] = place[wanted]
        return cls(take, constants)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.constants is not None:
            axis, values = self.constants
            shape = [len(values) if a == axis else n for a, n in enumerate(x.shape)]
            place = [-1 if a == axis else 1 for a in range(x.ndim)]
            block = jnp.broadcast_to(jnp.asarray(values, x.dtype).reshape(place), shape)
            x = jnp.concatenate([x, block], axis)
        for axis, places in self.take.items():
            x = _taken(x, places, axis)
        return x


def _taken(x: jax.Array, places: np.ndarray, axis: int) -> jax.Array:
    """The entries at these places along an axis; in a row, as pieces of a split are, a slice."""
    if np.all(np.diff(places) == 1):
        first = int(places[0]) if len(places) else 0
        return lax.slice_in_dim(x, first, first + len(places), axis=axis)
    return jnp.take(x, places, axis)


class ManyUse(Protocol):
    """How an equation of several results runs on smaller arrays."""

    @property
    def reads(self) -> tuple[Units | None, ...]:
        """Of every operand, the units that it must have; None: it is not read."""

    @property
    def makes(self) -> tuple[Units | None, ...]:
        """Of every result, the units that it then has; None: it is not made."""

    @property
    def left(self) -> str:
        """As of :class:`svd_jax.rules.Use`."""

    def run(self, equation: Equation, operands: Sequence[Any]) -> list[Any]:
        """The results, of operands that have the units that are read."""


AnyUse = Use | ManyUse


class Step(NamedTuple):
    """An equation that still runs.

    Attributes:
      at: its index in the program.
      fits: for every operand; None: it is not read.
      use: of one result, or of several; None: on whole arrays.
      constant: the path of the array that is added to the result, and the first axis it goes along.
    """

    at: int
    fits: tuple[Fit | None, ...]
    use: AnyUse | None
    constant: tuple[Path, int] | None = None


class Plan(NamedTuple):
    """A program on smaller arrays.

    Attributes:
      outline: of the program that was planned.
      steps: in order.
      outputs: what is made of the results; None: they are not wanted.
    """

    outline: list[tuple[str, ...]]
    steps: tuple[Step, ...]
    outputs: tuple[Fit | None, ...]

    def run(
        self, program: Program, values: dict[int, Any], arrays: Mapping[Path, Any] | None = None
    ) -> list[Any]:
        """The results, None for those that are not wanted.

        Args:
          program: that was planned, for inputs of whatever size.
          values: the inputs and constants of it that are read, by number; others are added.
          arrays: of the tree, for the constants of steps.

        Raises:
          ValueError: it is another program.
        """
        if outline(program) != self.outline:
            raise ValueError(
                'the model does something else for inputs of this shape than for the example: '
                'call compact again with an example of it'
            )

        def value(operand: Operand, fit: Fit | None) -> Any:
            if fit is None:
                return None
            return operand.value if isinstance(operand, Constant) else fit(values[operand])

        for step in self.steps:
            equation = program.equations[step.at]
            operands = list(map(value, equation.inputs, step.fits))
            if isinstance(step.use, Use):
                whole = program.shapes[equation.outputs[0]].shape
                results = bind(equation, operands, _adapted(step.use, equation, whole))
            elif step.use is not None:
                results = step.use.run(equation, operands)
            else:
                results = bind(equation, operands, equation.params)
            if step.constant is not None:
                assert arrays is not None
                path, axis = step.constant
                constant = arrays[path]
                after = results[0].ndim - axis - constant.ndim
                results[0] += constant.reshape((1,) * axis + constant.shape + (1,) * after)
            values.update(zip(equation.outputs, results, strict=True))
        return list(map(value, program.outputs, self.outputs))


def _adapted(use: Use, equation: Equation, whole: tuple[int, ...]) -> dict[str, Any]:
    smaller = tuple(
        n if units.all() else int(units.sum()) for n, units in zip(whole, use.makes, strict=True)
    )
    return use.adapt(equation.params, smaller)


class Needed(dict[int, Units]):
    """Which units of every value are read, by its number: of those of which any are."""

    def add(self, operand: Operand, units: Units | None) -> None:
        if isinstance(operand, Constant) or units is None:
            return
        before = self.get(operand)
        if before is not None:
            units = tuple(a | b for a, b in zip(before, units, strict=True))
        self[operand] = units

    def of_all(
        self, program: Program, use_of: Callable[[int, Equation], AnyUse | None]
    ) -> dict[int, AnyUse | None]:
        """Goes backwards from what is needed of the results to what is of everything else.

        Args:
          program: whose results are needed.
          use_of: an equation, and its index: how it makes what is needed by then; None: of all.

        Returns:
          The uses by the index of the equation, of those that run.
        """
        uses: dict[int, AnyUse | None] = {}
        for at, equation in reversed(list(enumerate(program.equations))):
            if self.keys().isdisjoint(equation.outputs):
                continue
            use = uses[at] = use_of(at, equation)
            if use is None:
                for number in equation.outputs:
                    self[number] = everything(program.shapes[number].shape)
            for operand, units in zip(
                equation.inputs, reads_of(use, equation, program), strict=True
            ):
                self.add(operand, units)
        return uses


def reads_of(use: AnyUse | None, equation: Equation, program: Program) -> Sequence[Units | None]:
    """The units that are read of every operand; None: nothing."""
    return _whole(equation.inputs, program) if use is None else use.reads


def makes_of(use: AnyUse | None, equation: Equation, program: Program) -> Sequence[Units | None]:
    """The units that are made of every result; None: it is not wanted."""
    if use is None:
        return _whole(equation.outputs, program)
    return (use.makes,) if isinstance(use, Use) else use.makes


def _whole(operands: Sequence[Operand], program: Program) -> list[Units]:
    return [
        everything(np.shape(i.value) if isinstance(i, Constant) else program.shapes[i].shape)
        for i in operands
    ]


def in_every_example(
    use: AnyUse,
    equation: Equation,
    is_size: Callable[[int, int], bool],
    counts: Callable[[], bool],
) -> bool:
    """Whether the same units are read and made of every example, and wherever in it.

    Args:
      use: of the equation.
      equation: with its operands and results.
      is_size: whether an axis of a value, by its number, has as many entries as there are examples,
        or positions.
      counts: whether the equation does something else where there are more of those.
    """
    made = (use.makes,) if isinstance(use, Use) else use.makes
    every = (*use.reads, *made)
    if isinstance(use, Use) and equation.primitive is lax.slice_p:
        taken = zip(use.reads[0], use.makes, strict=True)
        if any(len(own) != len(piece) and not own.all() for own, piece in taken) and counts():
            return False  # it takes other units
    operands = (*equation.inputs, *equation.outputs)
    return not any(
        is_size(number, axis)
        for number, units in zip(operands, every, strict=True)
        if isinstance(number, int) and units is not None
        for axis, own in enumerate(units)
        if not own.all()
    )


def without_poles(use: Use, equation: Equation, views: Sequence[View]) -> Use:
    """The use where units that are not read are zero, and computed with all the same.

    They must not make NaNs, which zero weights read.
    """
    pole = _POLES.get(equation.primitive.name)
    if pole is None:
        return use
    reads = list(use.reads)
    reads[pole] = everything(views[pole].shape)
    return use._replace(reads=tuple(reads))
