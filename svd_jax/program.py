"""A function as a flat list of primitive operations, with numbered values.

What JAX traces is nested: a jitted function, a custom derivative or a checkpoint is an equation
with a program of its own. Here all of that is written out: who reads it meets primitives alone,
a ``lax.scan`` being one, with the program of a round beside it.
The numbers depend on the function, not on the sizes of its arguments: a program traced again for
another batch size has the same ones.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

# The parameter that holds the program of an equation which only calls it.
CALLS = {
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'core_call': 'call_jaxpr',
    'remat': 'jaxpr',
    'remat2': 'jaxpr',
    'checkpoint': 'jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
}


class Constant(NamedTuple):
    """An operand that is not computed: a literal."""

    value: Any


Operand = int | Constant


class Equation(NamedTuple):
    """One primitive operation.

    Attributes:
      primitive: what JAX calls it.
      params: its parameters.
      inputs: the numbers of its operands, or constants.
      outputs: the numbers of its results.
      where: the path of the module that it was traced in, such as ``LeNet5/Conv_0``.
      body: of a ``lax.scan``, what runs in every round.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    where: str
    body: 'Program | None' = None


class Program(NamedTuple):
    """A traced function.

    Attributes:
      inputs: the numbers of its arguments, flattened.
      constants: arrays that the function closes over, by number.
      equations: in order.
      outputs: the numbers of its results, flattened.
      shapes: what every number stands for: something with ``shape`` and ``dtype``.
      tree: the structure of the results; None for that of a round.
    """

    inputs: tuple[int, ...]
    constants: dict[int, Any]
    equations: tuple[Equation, ...]
    outputs: tuple[Operand, ...]
    shapes: dict[int, Any]
    tree: Any

    def sources(self, operand: Operand) -> set[int]:
        """The inputs and constants that a value is computed of."""
        found, made = {operand}, {number for e in self.equations for number in e.outputs}
        for equation in reversed(self.equations):
            if not found.isdisjoint(equation.outputs):
                found.update(equation.inputs)
        return {number for number in found if isinstance(number, int) and number not in made}


def closed_jaxpr(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr with its constants, of which an open one has none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """The program of a function for arguments of these shapes (arrays or ``ShapeDtypeStruct``)."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    return _written_out(closed)._replace(tree=jax.tree.structure(out))


def _written_out(closed: core.ClosedJaxpr) -> Program:
    constants: dict[int, Any] = {}
    equations: list[Equation] = []
    shapes: dict[int, Any] = {}

    def number(aval: Any) -> int:
        shapes[len(shapes)] = aval
        return len(shapes) - 1

    def inline(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Operand]) -> list[Operand]:
        known: dict[Any, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            known[var] = number(var.aval)
            constants[len(shapes) - 1] = value

        def operand(atom: Any) -> Operand:
            return Constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [operand(atom) for atom in eqn.invars]
            inner = eqn.params.get(CALLS.get(eqn.primitive.name, ''))
            if inner is not None:
                closed = closed_jaxpr(inner)
                results = inline(closed.jaxpr, closed.consts, operands)
                known.update(zip(eqn.outvars, results, strict=True))
                continue
            outputs = tuple(number(var.aval) for var in eqn.outvars)
            known.update(zip(eqn.outvars, outputs, strict=True))
            where = str(eqn.source_info.name_stack)
            body = None
            if eqn.primitive is lax.scan_p:
                body = _written_out(closed_jaxpr(eqn.params['jaxpr']))
            equations.append(
                Equation(eqn.primitive, eqn.params, tuple(operands), outputs, where, body)
            )
        return [operand(atom) for atom in jaxpr.outvars]

    arguments = tuple(number(var.aval) for var in closed.jaxpr.invars)
    outputs = inline(closed.jaxpr, closed.consts, arguments)
    return Program(arguments, constants, tuple(equations), tuple(outputs), shapes, None)


def primitive_names(equation: Any) -> Iterator[str]:
    """The name of the primitive of an equation, ours or JAX's, and of those in programs within."""
    yield equation.primitive.name
    for held in jax.tree.leaves(list(equation.params.values())):
        if isinstance(held, core.Jaxpr | core.ClosedJaxpr):
            for eqn in closed_jaxpr(held).jaxpr.eqns:
                yield from primitive_names(eqn)


def bind(equation: Equation, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """The results of an equation, with these operands and parameters."""
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def operand_of(operand: Operand, known: dict[int, Any]) -> Any:
    """The value of an operand."""
    return operand.value if isinstance(operand, Constant) else known[operand]


def run_equations(
    equations: Iterable[Equation], known: dict[int, Any], bind: Callable[..., list[Any]] = bind
) -> None:
    """Adds what equations make to the values known by number.

    Args:
      equations: in order.
      known: what they read, or an equation before them makes.
      bind: as :func:`bind`: how an equation runs.
    """
    for equation in equations:
        operands = [operand_of(operand, known) for operand in equation.inputs]
        results = bind(equation, operands, equation.params)
        known.update(zip(equation.outputs, results, strict=True))


def evaluate(program: Program, *arguments: Any) -> dict[int, Any]:
    """Every value of a program, by number.

    Operation by operation: JAX keeps what it compiles of each, so that the same program again, or
    another with such operations, runs at once. As one function it would be compiled every time.
    """
    known = dict(zip(program.inputs, arguments, strict=True)) | program.constants
    run_equations(program.equations, known)
    return known
