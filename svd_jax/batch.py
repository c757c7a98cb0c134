"""What of a network's program depends on how many examples it is given.

A network that is made smaller with one example has to do the same for a hundred. So its program is
traced once more, for twice as many: a size or a number that is another one there is no constant.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from svd_jax.program import Constant, Equation, Program, trace

# Parameters that are sizes: they say nothing that the shapes of the results don't.
_SIZES = {'shape', 'new_sizes', 'limit_indices', 'sharding', 'out_sharding'}


class Batch:
    """See the module's docstring.

    Args:
      program: traced for the example.
      larger: traced for more; None: there can't be more.
      known: primitives of which every result is made of operands alone, example by example.
    """

    def __init__(self, program: Program, larger: Program | None, known: Sequence[str]) -> None:
        self._program, self._larger, self._known = program, larger, frozenset(known)

    @classmethod
    def of(cls, program: Program, known: Sequence[str], function: Any, *args: Any) -> 'Batch':
        """Of a function's program for these arguments, the last ones examples."""
        *fixed, example = args
        larger = _traced(function, *fixed, *_twice(example))
        same = larger is not None and outline(larger) == outline(program)
        return cls(program, larger if same else None, known)

    def axes(self, number: int) -> set[int]:
        """Of a value, those whose size is in proportion to the number of examples."""
        if self._larger is None:
            return set()
        shapes = (each.shapes[number].shape for each in (self._program, self._larger))
        return {a for a, (n, m) in enumerate(zip(*shapes, strict=True)) if n != m}

    def constants(self) -> set[int]:
        """The arrays that the function closes over which are others for more examples."""
        if self._larger is None:
            return set()
        pairs = ((n, a, self._larger.constants[n]) for n, a in self._program.constants.items())
        return {n for n, a, b in pairs if a is not b and not np.array_equal(a, b)}

    def counts(self, at: int) -> bool:
        """Whether entries of an equation's results may be others for more examples.

        Of those that its operands have in both cases.
        """
        if self._larger is None:
            return False
        equation, other = self._program.equations[at], self._larger.equations[at]
        return (
            literals(equation) != literals(other)
            or _but_sizes(equation) != _but_sizes(other)
            or self._across(equation)
            or (
                equation.primitive.name not in self._known
                and any(self.axes(number) for number in equation.outputs)
            )
        )

    def _across(self, equation: Equation) -> bool:
        """Whether it sums, or the like, over examples."""
        name, params = equation.primitive.name, equation.params
        axes = [self.axes(i) if isinstance(i, int) else set() for i in equation.inputs]
        if name == 'dot_general':
            contracted, _ = params['dimension_numbers']
            return any(own & set(over) for own, over in zip(axes, contracted, strict=True))
        if name == 'conv_general_dilated':
            return bool(axes[0] - {params['dimension_numbers'].lhs_spec[0]} or axes[1])
        if 'window_dimensions' in params:
            return any(params['window_dimensions'][axis] != 1 for axis in axes[0])
        return name.startswith(('reduce_', 'arg')) and bool(axes[0] & set(params.get('axes', ())))


def outline(program: Program) -> list[tuple[str, ...]]:
    """What runs, and on arrays of how many axes: the same for another number of examples."""
    return [
        (e.primitive.name, *(str(len(program.shapes[number].shape)) for number in e.outputs))
        for e in program.equations
    ]


def literals(equation: Equation) -> list[str]:
    """The operands that are written in the program, as text, in which NaN is NaN."""
    return [str(np.asarray(i.value).tolist()) for i in equation.inputs if isinstance(i, Constant)]


def _but_sizes(equation: Equation) -> dict[str, str]:
    # As text: programs within have no equality to speak of.
    return {name: str(value) for name, value in equation.params.items() if name not in _SIZES}


def _twice(example: tuple) -> tuple:
    """The shapes of twice as many examples, along the first axis of the first input."""
    leaves, structure = jax.tree.flatten(example)
    batch = next((leaf.shape[0] for leaf in leaves if np.ndim(leaf)), None)

    def more(leaf: Any) -> Any:
        if not np.ndim(leaf) or leaf.shape[0] != batch:
            return leaf
        return jax.ShapeDtypeStruct((2 * batch, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.unflatten(structure, list(map(more, leaves)))


def _traced(function: Any, *args: Any) -> Program | None:
    try:
        return trace(function, *args)
    except Exception:  # whatever a model raises that takes only so many examples
        return None
