"""How much arithmetic a step cannot do without: that of its matrix products and convolutions."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def matrix_flops(function: Callable[..., Any], *args: Any) -> int:
    """Additions and multiplications in the matrix products and convolutions of a function.

    Args:
      function: what to count in; it is traced, not run. Loops count with their length, except
        those that end when a condition says so, which count once.
      args: its arguments, arrays or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> matrix_flops(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # Without what nobody reads, such as the gradient with respect to the images.
    return _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    if equation.primitive.name == 'dot_general':
        ((contracted, _), _) = equation.params['dimension_numbers']
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if equation.primitive.name == 'conv_general_dilated':
        kernel = equation.invars[1].aval
        features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // features
    nested = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda p: isinstance(p, (ClosedJaxpr, Jaxpr))
    )
    counts = [
        _count(p.jaxpr if isinstance(p, ClosedJaxpr) else p)
        for p in nested
        if isinstance(p, (ClosedJaxpr, Jaxpr))
    ]
    if equation.primitive.name == 'cond':
        return max(counts)
    return equation.params.get('length', 1) * sum(counts)
