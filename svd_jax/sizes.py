"""What of a network's program depends on the sizes of its inputs.

A network that is made smaller with one example has to do the same for a hundred, and for longer
texts and larger images, if it takes them. So its program is traced once more, for other sizes: a
size or a number that is another one there is no constant.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svd_jax import slices
from svd_jax.program import Constant, Equation, Operand, Program, evaluate, trace

# Of every input, the axes that are to be of another size.
Axes = tuple[frozenset[int], ...]
Shape = tuple[int, ...]

# Parameters that are sizes: they say nothing that the shapes of the results don't.
_SIZES = {'shape', 'new_sizes', 'limit_indices', 'sharding', 'out_sharding'}


class Resized:
    """A program beside the same one for inputs of other sizes.

    Args:
      program: traced for the example.
      other: traced for the other sizes; None: there can't be others.
      known: primitives of which every result is made of operands alone, example by example.
      inputs: of the other program, if it is to be run.
    """

    def __init__(
        self, program: Program, other: Program | None, known: Sequence[str], inputs: tuple = ()
    ) -> None:
        same = other is not None and outline(other) == outline(program)
        self._program, self._other = program, other if same else None
        self._known, self._inputs = frozenset(known), inputs

    @classmethod
    def of_more_examples(
        cls, program: Program, known: Sequence[str], function: Any, tree: Any, example: tuple
    ) -> 'Resized':
        """Of a function's program for a tree and examples: with twice as many."""
        return cls(program, _traced(function, tree, *_twice(example)), known)

    @classmethod
    def of_other_inputs(
        cls, program: Program, known: Sequence[str], function: Any, tree: Any, example: tuple
    ) -> list['Resized']:
        """With sequences twice as long, or larger images; or half of that, if it takes those.

        One for every size that can be another one by itself: that of the texts, of the masks that
        go with them, of another input's first axis.
        """
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, example))

        def tried(axes: Axes) -> 'Resized | None':
            for change in (_longer, _shorter):
                inputs = [change(leaf, own) for leaf, own in zip(leaves, axes, strict=True)]
                other = _traced(function, tree, *jax.tree.unflatten(structure, inputs))
                found = cls(program, other, known, tuple(inputs))
                if found:
                    return found
            return None

        # Of more than one way, the first that the network takes.
        found = (next(filter(None, map(tried, ways)), None) for ways in _together(leaves))
        return [sizes for sizes in found if sizes is not None]

    def __bool__(self) -> bool:
        """Whether there are other sizes."""
        return self._other is not None

    def within(self, at: int) -> 'Resized':
        """A round of the loop that an equation is, beside the same one for the other sizes."""
        program, other = self._program.equations[at].body, self._other
        assert program is not None
        return Resized(program, other and other.equations[at].body, tuple(self._known))

    def values(self, tree: Any) -> dict[int, Any]:
        """Every value of the other program, by the numbers of this one."""
        assert self._other is not None
        return evaluate(self._other, *jax.tree.leaves(tree), *jax.tree.leaves(self._inputs))

    def dependent(self) -> set[int]:
        """What may have other entries for the other sizes, of those that are there for both."""
        if self._other is None:
            return set()
        found = self.constants()
        for at, equation in enumerate(self._program.equations):
            if self.counts(at) or not found.isdisjoint(
                i for i in equation.inputs if isinstance(i, int)
            ):
                found.update(equation.outputs)
        return found

    def axes(self, number: int) -> set[int]:
        """Of a value, those whose size is another one for the other sizes."""
        if self._other is None:
            return set()
        shapes = (each.shapes[number].shape for each in (self._program, self._other))
        return {a for a, (n, m) in enumerate(zip(*shapes, strict=True)) if n != m}

    def constants(self) -> set[int]:
        """The arrays that the function closes over which are others for the other sizes."""
        if self._other is None:
            return set()
        pairs = ((n, a, self._other.constants[n]) for n, a in self._program.constants.items())
        return {n for n, a, b in pairs if a is not b and not np.array_equal(a, b)}

    def counts(self, at: int) -> bool:
        """Whether entries of an equation's results may be others for the other sizes.

        Of those that its operands have in both cases.
        """
        if self._other is None:
            return False
        equation, other = self._program.equations[at], self._other.equations[at]
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
        """Whether it sums, or the like, over what there is more of."""
        name, params = equation.primitive.name, equation.params
        axes = [self.axes(i) if isinstance(i, int) else set() for i in equation.inputs]
        if name == 'dot_general':
            contracted, _ = params['dimension_numbers']
            return any(own & set(over) for own, over in zip(axes, contracted, strict=True))
        if name == 'conv_general_dilated':
            return bool(axes[0] - {params['dimension_numbers'].lhs_spec[0]} or axes[1])
        if name == 'rev':  # what is last comes first
            return bool(axes[0] & set(params['dimensions']))
        if 'window_dimensions' in params:
            return any(params['window_dimensions'][axis] != 1 for axis in axes[0])
        return name.startswith(('reduce_', 'arg')) and bool(axes[0] & set(params.get('axes', ())))


def trace_as_many(function: Callable[..., Any], tree: Any, *inputs: Any) -> Program:
    """The program for a tree and inputs, of the same equations for one example as for many.

    JAX leaves out a broadcast to the shape that there is already, such as that of a class token to
    a batch of one.
    """
    program = slices.written_out(trace(function, tree, *inputs))
    if _batch(jax.tree.leaves(inputs)) != 1:
        return program
    many = _traced(function, tree, *_twice(inputs))
    return (many and _with_broadcasts_of(many, program)) or program


def _with_broadcasts_of(many: Program, one: Program) -> Program | None:
    """The program of one example with every broadcast of that of many; None if more differs."""
    if len(many.constants) != len(one.constants):
        return None
    numbers: dict[int, Operand] = dict(
        zip((*many.inputs, *many.constants), (*one.inputs, *one.constants), strict=True)
    )
    shapes = {n: one.shapes[own] for n, own in numbers.items() if isinstance(own, int)}
    equations, rest = [], list(reversed(one.equations))

    def own(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else numbers[operand]

    for equation in many.equations:
        operands = list(map(own, equation.inputs))
        if rest and _alike(equation, many, operands, rest[-1], one):
            found = rest.pop()
            if equation.body is not None and found.body is not None:
                body = _with_broadcasts_of(equation.body, found.body)
                found = found._replace(body=body or found.body)
            operands = [
                theirs if isinstance(theirs, int) else ours
                for theirs, ours in zip(equation.inputs, found.inputs, strict=True)
            ]
            equations.append(found._replace(inputs=tuple(operands), outputs=equation.outputs))
            for number, ours in zip(equation.outputs, found.outputs, strict=True):
                numbers[number], shapes[number] = ours, one.shapes[ours]
        elif equation.primitive.name == 'broadcast_in_dim' and isinstance(operands[0], int):
            (output,), like = equation.outputs, one.shapes[operands[0]]
            if not _same_but_batch(many.shapes[output], like):
                return None
            params = {**equation.params, 'shape': like.shape}
            equations.append(equation._replace(params=params))
            numbers[output], shapes[output] = operands[0], like
        else:
            return None
    if rest or list(map(own, many.outputs)) != list(one.outputs):
        return None
    constants = dict(zip(many.constants, one.constants.values(), strict=True))
    return many._replace(
        constants=constants, equations=tuple(equations), shapes=shapes, tree=one.tree
    )


def _alike(
    equation: Equation, many: Program, operands: Sequence[Operand], other: Equation, one: Program
) -> bool:
    """Whether an equation for many examples is this one, of these operands, for one example."""
    return (
        equation.primitive is other.primitive
        and len(operands) == len(other.inputs)
        and all(
            a == b if isinstance(a, int) else isinstance(b, Constant)
            for a, b in zip(operands, other.inputs, strict=True)
        )
        and all(
            _same_but_batch(many.shapes[theirs], one.shapes[ours])
            for theirs, ours in zip(equation.outputs, other.outputs, strict=True)
        )
    )


def _same_but_batch(many: Any, one: Any) -> bool:
    """Whether a value for twice as many examples has the shape of that for one."""
    return len(many.shape) == len(one.shape) and all(
        n in (m, 2 * m) for n, m in zip(many.shape, one.shape, strict=True)
    )


def outline(program: Program) -> list[tuple[str, ...]]:
    """What runs, and on arrays of how many axes: the same for inputs of other sizes."""
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


def _batch(leaves: Sequence[Any]) -> int | None:
    """How many examples there are: along the first axis of the first input."""
    return next((leaf.shape[0] for leaf in leaves if np.ndim(leaf)), None)


def _twice(example: tuple) -> tuple:
    """The shapes of twice as many examples, along the first axis of the first input."""
    leaves, structure = jax.tree.flatten(example)
    batch = _batch(leaves)

    def more(leaf: Any) -> Any:
        if not np.ndim(leaf) or leaf.shape[0] != batch:
            return leaf
        return jax.ShapeDtypeStruct((2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)

    return jax.tree.unflatten(structure, list(map(more, leaves)))


def _together(leaves: Sequence[jax.Array]) -> Iterator[list[Axes]]:
    """For every size, which axes may be of another one at once, in the order to try them.

    Not the first axis, if it is that of examples. What has the size of another axis by chance, such
    as the last one, of features, may have to stay.
    """
    batch = _batch(leaves)
    shapes = [leaf.shape for leaf in leaves]
    for size in sorted({n for shape in shapes for n in shape}):
        yield _ways(size, shapes, batch)
    yield [_chosen(shapes, lambda s, a: 0 < a < len(s) - 1)]


def _ways(size: int, shapes: Sequence[Shape], batch: int | None) -> list[Axes]:
    def alike(shape: Shape, axis: int) -> bool:
        return shape[axis] == size and (axis > 0 or size != batch)

    ways = (
        _chosen(shapes, alike),
        _chosen(shapes, lambda s, a: alike(s, a) and (len(s) < 3 or a < len(s) - 1)),
        _chosen(shapes, lambda s, a: alike(s, a) or (len(s) == 1 and s[a] == size)),
    )
    return [way for way in dict.fromkeys(ways) if any(way)]


def _chosen(shapes: Sequence[Shape], condition: Callable[[Shape, int], bool]) -> Axes:
    return tuple(frozenset(a for a in range(len(s)) if condition(s, a)) for s in shapes)


def _longer(leaf: jax.Array, axes: frozenset[int]) -> jax.Array:
    """An input of the other sizes, with the entries that it has, so that they are valid there."""
    return jnp.tile(leaf, [2 if axis in axes else 1 for axis in range(leaf.ndim)])


def _shorter(leaf: jax.Array, axes: frozenset[int]) -> jax.Array:
    return leaf[tuple(slice((n + 1) // 2 if a in axes else n) for a, n in enumerate(leaf.shape))]


def _traced(function: Any, tree: Any, *inputs: Any) -> Program | None:
    try:
        return trace_as_many(function, tree, *inputs)
    except Exception:  # whatever a model raises that takes only so many examples
        return None
