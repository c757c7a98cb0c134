"""A network's program, split where a single value passes from one layer to the next."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from svd_jax import network, sparse, transform
from svd_jax.compaction import Compact
from svd_jax.program import Constant, Equation, Program, run_equations
from svd_jax.sizes import literals, outline, trace_as_many

_PRODUCTS = ('dot_general', 'conv_general_dilated')


class Part(NamedTuple):
    """Some of the equations in a row.

    Attributes:
      equations: all depend on the input.
      source: the number of the value that they read.
      target: of the value that they make.
    """

    equations: tuple[Equation, ...]
    source: int
    target: int


class _Split:
    """A program of one input, traced for one size of the batch, and its parts.

    Attributes:
      program: traced.
      fixed: the equations that do not depend on the input.
      parts: of the others; every part has a product, and there are as many as can be.
      target: the number of the output that depends on the input.
    """

    def __init__(self, program: Program) -> None:
        self.program, source = program, program.inputs[-1]
        varies = {source}
        varying = []
        for equation in program.equations:
            if not varies.isdisjoint(_numbers(equation.inputs)):
                varies.update(equation.outputs)
                varying.append(equation)
        kept = {equation.outputs for equation in varying}
        self.fixed = [e for e in program.equations if e.outputs not in kept]
        targets = varies & set(_numbers(program.outputs))
        if len(targets) != 1 or targets == {source}:
            raise sparse.NotCoveredError(f'{len(targets)} outputs that depend on the input')
        (self.target,) = targets
        self.parts = self._parts(varying, varies, source)

    def _parts(self, equations: list[Equation], varies: set[int], source: int) -> list[Part]:
        last_use = {self.target: len(equations)}
        for place, equation in reversed(list(enumerate(equations))):
            for number in varies.intersection(_numbers(equation.inputs)):
                last_use.setdefault(number, place)
        # The places where a single value is alive, and which.
        alive, passes = {source}, {}
        for place, equation in enumerate(equations):
            if len(alive) == 1:
                passes[place] = next(iter(alive))
            alive |= last_use.keys() & set(equation.outputs)
            alive = {number for number in alive if last_use[number] > place}
        passes[len(equations)] = self.target
        products = [p for p, e in enumerate(equations) if e.primitive.name in _PRODUCTS]
        cuts = [0]
        for product in products[1:]:
            cut = max(place for place in passes if place <= product)
            if any(cuts[-1] <= place < cut for place in products):
                cuts.append(cut)
        return [
            Part(tuple(equations[first:last]), passes[first], passes[last])
            for first, last in itertools.pairwise([*cuts, len(equations)])
        ]

    def joined(self, parts: slice) -> Part:
        """Parts in a row as one."""
        chosen = self.parts[parts]
        equations = tuple(itertools.chain.from_iterable(part.equations for part in chosen))
        return Part(equations, chosen[0].source, chosen[-1].target)


class Network:
    """The parts of a compacted network of one input, whose first axis is the batch.

    Args:
      small: the network.
      example: its input.

    Raises:
      sparse.NotCoveredError: it can't be split: it has more than one output that depends on the
        input, or is not the same for every size of the batch.
    """

    def __init__(self, small: Compact, example: Any) -> None:
        self._small, self._like = small, example
        self._leaves = jax.tree.leaves(small.params)
        self._split = functools.cache(self._split_for)
        split, *others = map(self._split, (sparse.EXAMPLES, sparse.EXAMPLES + 1, 1))
        does = [(outline(s.program), *map(literals, s.program.equations)) for s in (split, *others)]
        if any(other != does[0] for other in does):
            raise sparse.NotCoveredError('does something else for another size of the batch')
        shapes = [_fixed_shapes(s.program, s.target) for s in (split, *others)]
        if any(shape != shapes[0] for shape in shapes):
            raise sparse.NotCoveredError('a constant output that depends on the size of the batch')
        self._program = program = split.program
        self._consumers = Counter(_numbers(program.outputs))
        for equation in program.equations:
            self._consumers.update(_numbers(equation.inputs))
        values = jax.jit(lambda leaves: _evaluated(split.fixed, self._known(program, leaves)))
        self._constants = {n: np.asarray(value) for n, value in values(self._leaves).items()}
        self._paths = self._modules()

    def _split_for(self, batch: int) -> _Split:
        like = jax.ShapeDtypeStruct((batch, *self._like.shape[1:]), self._like.dtype)
        try:
            program = trace_as_many(self._small.apply, self._small.params, like)
        except Exception as error:  # whatever a model raises that takes only so many examples
            raise sparse.NotCoveredError('does not take other sizes of the batch') from error
        return _Split(program)

    def _known(self, program: Program, leaves: Iterable[Any]) -> dict[int, Any]:
        return dict(zip(program.inputs[:-1], leaves, strict=True)) | program.constants

    def _modules(self) -> dict[int, str]:
        """Of every constant that is made of one module's parameters alone, its path."""
        paths = {
            number: '/'.join(name for name in path[:-1] if name != 'params')
            for number, path in zip(
                self._program.inputs[:-1], network.paths(self._small.params), strict=True
            )
        }
        for equation in self._split(sparse.EXAMPLES).fixed:
            names = {paths.get(number, '') for number in _numbers(equation.inputs)}
            if len(names) == 1:
                paths.update(dict.fromkeys(equation.outputs, names.pop()))
        return paths

    @property
    def parts(self) -> list[Part]:
        """In the order in which they run."""
        return self._split(sparse.EXAMPLES).parts

    def path(self, part: int) -> str:
        """The modules whose weights a part multiplies with."""
        names = [
            self._paths[number]
            for equation in self.parts[part].equations
            if equation.primitive.name in _PRODUCTS
            for number in _numbers(equation.inputs)
            if number in self._paths
        ]
        return ', '.join(dict.fromkeys(names))

    def multiply_adds(self, part: int) -> int:
        """Of a part when it runs dense, for one example."""
        total = 0
        for equation in self.parts[part].equations:
            if equation.primitive.name not in _PRODUCTS:
                continue
            left, right = (
                i.value.shape if isinstance(i, Constant) else self._program.shapes[i].shape
                for i in equation.inputs
            )
            made = math.prod(self._program.shapes[equation.outputs[0]].shape)
            numbers = equation.params['dimension_numbers']
            if equation.primitive.name == 'dot_general':
                total += made * math.prod(left[axis] for axis in numbers[0][0])
            else:
                total += made * math.prod(right) // right[numbers.rhs_spec[0]]
        return total // sparse.EXAMPLES

    def plan(self, parts: slice) -> sparse.Plan:
        """Parts in a row as operations on rows.

        Raises:
          sparse.NotCoveredError: rows can't do it.
        """
        part = self._split(sparse.EXAMPLES).joined(parts)
        return sparse.lower(
            part.equations, part.source, part.target,
            self._program.shapes, self._constants, self._consumers,
        )  # fmt: skip

    def features(self, parts: slice) -> tuple[int, ...]:
        """The shape of what parts in a row make of one example."""
        return self._program.shapes[self.parts[parts][-1].target].shape[1:]

    def dense(self, parts: slice, products: bool = False) -> Callable[[Any], jax.Array]:
        """Parts in a row by XLA.

        Args:
          parts: which.
          products: whether convolutions are matrix products, as in training (:mod:`svd_jax.conv`).
        """

        @jax.jit
        def run(leaves: Sequence[Any], x: Any) -> Any:
            # Traced again: the sizes in a program are those of its batch.
            split = self._split(x.shape[0])
            part = split.joined(parts)
            known = _evaluated(split.fixed, self._known(split.program, leaves))
            read = {n: known[n] for e in part.equations for n in _numbers(e.inputs) if n in known}

            def made(read: dict[int, Any], x: Any) -> Any:
                return _evaluated(part.equations, read | {part.source: x})[part.target]

            return transform.evaluate(made, read, x) if products else made(read, x)

        return lambda x: run(self._leaves, x)

    def convolves(self, part: int) -> bool:
        """Whether there is a convolution in a part."""
        return any(e.primitive.name == _PRODUCTS[1] for e in self.parts[part].equations)

    def output(self) -> Callable[[Any], Any]:
        """From the value that the last part makes to what the network returns."""
        target = self.parts[-1].target
        leaves = [
            jax.numpy.asarray(i.value) if isinstance(i, Constant) else self._constants.get(i)
            for i in self._program.outputs
        ]
        places = [place for place, i in enumerate(self._program.outputs) if i == target]
        tree = self._program.tree
        if jax.tree_util.treedef_is_leaf(tree):
            return lambda y: y

        def returned(y: Any) -> Any:
            filled = list(leaves)
            for place in places:
                filled[place] = y
            return tree.unflatten(filled)

        return returned


def _numbers(operands: Iterable[Any]) -> list[int]:
    return [operand for operand in operands if isinstance(operand, int)]


def _fixed_shapes(program: Program, target: int) -> list[Any]:
    return [
        None if i == target or isinstance(i, Constant) else program.shapes[i].shape
        for i in program.outputs
    ]


def _evaluated(equations: Iterable[Equation], known: dict[int, Any]) -> dict[int, Any]:
    run_equations(equations, known)
    return known
