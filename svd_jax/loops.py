"""Which units of what a loop carries are read, as by a recurrent cell along time.

A hidden unit is read by whatever reads the results of the loop, and in the next round by others
that are read, or by itself alone. So what is needed of the carry is asked for again and again, from
the results backwards through a round, until no more is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from svd_jax.plan import (
    AnyUse,
    Fit,
    Needed,
    Plan,
    Step,
    in_every_example,
    makes_of,
    reads_of,
    without_poles,
)
from svd_jax.program import Constant, Equation, Operand, bind
from svd_jax.rules import RULES, Units, Use, View, everything
from svd_jax.sizes import Resized, outline


class Loop(NamedTuple):
    """How a ``lax.scan`` runs on smaller arrays.

    Attributes:
      reads: of every operand, the units that it must have; None: it is not read.
      makes: of every result, the units that it then has; None: it is not made.
      plan: of a round.
      left: as of :class:`svd_jax.rules.Use`, of operands with constant units.
    """

    reads: tuple[Units | None, ...]
    makes: tuple[Units | None, ...]
    plan: Plan
    left: str = 'constants stay in a loop'

    def run(self, equation: Equation, operands: Sequence[Any]) -> list[Any]:
        """The results, None for those that are not made, of operands, None where not read."""
        body, params = equation.body, equation.params
        assert body is not None
        consts, carried = params['num_consts'], params['num_carry']
        first = consts + carried

        def round_(carry: Sequence[Any], scanned: Sequence[Any]) -> tuple[Any, Any]:
            given = (*operands[:consts], *carry, *scanned)
            values = dict(zip(body.inputs, given, strict=True)) | body.constants
            results = self.plan.run(body, values)
            return list(map(_as_before, carry, results)), results[carried:]

        # Where there is None there is nothing: to JAX, a tree without leaves. The length may be a
        # name, as in jax.export, which JAX takes of the arrays alone.
        carry, scanned = list(operands[consts:first]), list(operands[first:])
        length = None if jax.tree.leaves(scanned) else params['length']
        after, made = lax.scan(
            round_, carry, scanned, length, reverse=params['reverse'], unroll=params['unroll'],
        )  # fmt: skip
        return [*after, *made]


def use(
    equation: Equation,
    views: Sequence[View],
    wanted: Sequence[Units | None],
    sizes: Sequence[Resized],
    same_shapes: bool,
) -> Loop | None:
    """How a ``lax.scan`` makes what is wanted of its results, on as little as it can.

    Args:
      equation: the scan.
      views: of its operands.
      wanted: of its results; None: nothing.
      sizes: a round of it beside the same one for inputs of other sizes.
      same_shapes: whether arrays keep their shapes, with zeros for what is not read.

    Returns:
      None if it does something else for inputs of other sizes.
    """
    if not all(sizes):
        return None
    return _Rounds(equation, views, sizes, same_shapes).use(wanted)


class _Rounds:
    """The analysis of a round, for which :func:`use` has the arguments."""

    def __init__(
        self,
        equation: Equation,
        views: Sequence[View],
        sizes: Sequence[Resized],
        same_shapes: bool,
    ) -> None:
        assert equation.body is not None
        self._body, self._sizes, self._same_shapes = equation.body, sizes, same_shapes
        self._consts, self._carried = (equation.params[f'num_{n}'] for n in ('consts', 'carry'))
        self._rounds = equation.params['length']
        self._known = self._evaluated(views[: self._consts])

    def use(self, wanted: Sequence[Units | None]) -> Loop:
        first = self._consts + self._carried
        state = self._body.inputs[self._consts : first]
        carried = list(wanted[: self._carried])
        made = [None if units is None else units[1:] for units in wanted[self._carried :]]
        while True:
            uses = self._backwards([*carried, *made])
            read = [
                _either(units, self._needed.get(n)) for units, n in zip(carried, state, strict=True)
            ]
            if all(map(_same, read, carried)):
                break
            carried = read
        for number, units in zip(state, carried, strict=True):
            self._needed.add(number, units)
        reads = [self._needed.get(number) for number in self._body.inputs]
        return Loop(
            (*reads[:first], *map(self._all_rounds, reads[first:])),
            (*carried, *map(self._all_rounds, made)),
            self._plan(uses, [*carried, *made]),
        )

    def _all_rounds(self, units: Units | None) -> Units | None:
        return None if units is None else (np.ones(self._rounds, bool), *units)

    def _evaluated(self, consts: Sequence[View]) -> dict[int, np.ndarray]:
        """What is the same in all rounds, for all inputs."""
        body = self._body
        given = zip(body.inputs, (view.value for view in consts), strict=False)
        known = {number: value for number, value in given if value is not None}
        known |= {n: np.asarray(a) for n, a in body.constants.items() if _is_numbers(a)}
        for at, equation in enumerate(body.equations):
            operands = [
                i.value if isinstance(i, Constant) else known.get(i) for i in equation.inputs
            ]
            if (
                any(operand is None for operand in operands)
                or self._counts(at)
                or not all(_is_numbers(body.shapes[n]) for n in equation.outputs)
            ):
                continue
            results = bind(equation, operands, equation.params)
            known.update(zip(equation.outputs, map(np.asarray, results), strict=True))
        return known

    def _backwards(self, wanted: Sequence[Units | None]) -> dict[int, AnyUse | None]:
        self._needed = Needed()
        for output, units in zip(self._body.outputs, wanted, strict=True):
            self._needed.add(output, units)
        return self._needed.of_all(self._body, self._use_of)

    def _use_of(self, at: int, equation: Equation) -> AnyUse | None:
        found: AnyUse | None
        views = list(map(self._view, equation.inputs))
        wanted = [self._needed.get(number) for number in equation.outputs]
        if equation.body is not None:
            sizes = [sizes.within(at) for sizes in self._sizes]
            found = use(equation, views, wanted, sizes, self._same_shapes)
        else:
            found = self._simple(equation, views, wanted)
        if found is not None and not in_every_example(
            found, equation, self._is_size, lambda: self._counts(at)
        ):
            return None
        return found

    def _simple(
        self, equation: Equation, views: Sequence[View], wanted: Sequence[Units | None]
    ) -> Use | None:
        rule = RULES.get(equation.primitive.name)
        if rule is None or len(wanted) != 1 or wanted[0] is None:
            return None
        shape = self._body.shapes[equation.outputs[0]].shape
        found = rule.use(equation, views, shape, wanted[0])
        if found is not None and self._same_shapes:
            found = without_poles(found, equation, views)
        return found

    def _view(self, operand: Operand) -> View:
        if isinstance(operand, Constant):
            value = np.asarray(operand.value)
            return View(value.shape, value, None)
        return View(self._body.shapes[operand].shape, self._known.get(operand), None)

    def _is_size(self, number: int, axis: int) -> bool:
        return any(axis in sizes.axes(number) for sizes in self._sizes)

    def _counts(self, at: int) -> bool:
        return any(sizes.counts(at) for sizes in self._sizes)

    def _plan(self, uses: dict[int, AnyUse | None], wanted: Sequence[Units | None]) -> Plan:
        body = self._body
        has: dict[int, Units | None] = {
            **self._needed,
            **{number: everything(body.shapes[number].shape) for number in body.constants},
        }
        for at, found in uses.items():
            equation = body.equations[at]
            has.update(zip(equation.outputs, makes_of(found, equation, body), strict=True))

        def fit(operand: Operand, units: Units | None) -> Fit | None:
            if isinstance(operand, Constant) or units is None:
                return None if units is None else Fit({}, None)
            own = has[operand]
            assert own is not None
            return Fit.between(own, units)

        steps = [
            Step(at, tuple(map(fit, e.inputs, reads_of(uses[at], e, body))), uses[at])
            for at in sorted(uses)
            for e in [body.equations[at]]
        ]
        return Plan(outline(body), tuple(steps), tuple(map(fit, body.outputs, wanted)))


def _either(units: Units | None, others: Units | None) -> Units | None:
    if units is None or others is None:
        return others if units is None else units
    return tuple(a | b for a, b in zip(units, others, strict=True))


def _same(units: Units | None, others: Units | None) -> bool:
    if units is None or others is None:
        return units is others
    return all(map(np.array_equal, units, others))


def _as_before(before: Any, after: Any) -> Any:
    """What a round makes of what it carries: a number that is written in it is no array yet."""
    if after is None or isinstance(after, jax.Array):
        return after
    return jnp.asarray(after, before.dtype)


def _is_numbers(value: Any) -> bool:
    """Whether a value is no random key, or the like."""
    return not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
