"""A program run with some of its arguments random: local reparameterisation without layers.

What JAX traces of any model is a program of primitive operations. Where a random weight meets an
input in a linear one, a matrix product, a convolution or a lookup, the result is drawn from the
Gaussian that it has: local reparameterisation (Kingma, Salimans & Welling 2015), whatever layer the
operation came from. On its way there a weight may be cast, transposed, cut, joined to others or
scaled: anything that leaves its entries independent. Loops, branches and checkpoints are entered,
and stay what they are.

Where the weight has scales that its units share, the input or the result of the linear operation is
multiplied by them instead, a draw for every example: the same for all positions of a convolution.

A weight that is used in any other way has to be drawn itself, before the program runs;
:func:`uses` tells which.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax import lax
from jax.extend import core

from svd_jax import conv, linear, scales
from svd_jax.convention import is_shared
from svd_jax.program import CALLS, closed_jaxpr
from svd_jax.scales import Scale, Spread

Paths = frozenset[str]
_NONE: Paths = frozenset()


class Mark(NamedTuple):
    """What there is to know of an array before its values.

    Attributes:
      paths: of the random weights that it is made of; none if it is not random.
      spreads: how the scales of those lie in it; None for one that cannot be told so.
    """

    paths: Paths = _NONE
    spreads: tuple[Spread | None, ...] = ()


class Random(flax.struct.PyTreeNode):
    """An array of entries that are independent, given their scales.

    Attributes:
      mean: any shape.
      variance: that shape; in float32 where the mean is in float16, whose range is too small. None
        where the entries themselves are not random.
      paths: of the weights that it is made of.
      scales: that multiply its entries, whole units at a time.
    """

    mean: jax.Array
    variance: jax.Array | None
    paths: Paths = flax.struct.field(pytree_node=False)
    scales: tuple[Scale, ...] = ()

    @property
    def mark(self) -> Mark:
        return Mark(self.paths, tuple(scale.spread for scale in self.scales))


def mark_of(value: Any) -> Mark:
    """Of any operand."""
    return value.mark if isinstance(value, Random) else Mark()


class Keys:
    """The keys for the noise: a new one for each use of a weight, which its path determines.

    A layer of svd.linen in the place of the weight's would draw the same one.
    """

    def __init__(self, root: jax.Array) -> None:
        self.root = root
        self._used: dict[tuple[str, Paths], int] = {}

    def _next(self, place: str, paths: Paths = _NONE) -> jax.Array:
        use = (place, paths)
        self._used[use] = self._used.get(use, 0) + 1
        names = filter(None, place.split('/'))
        return LazyRng.create(self.root, *names, self._used[use]).as_jax_rng()

    def of(self, paths: Paths) -> jax.Array:
        """For one operation on a weight."""
        return self._next(min(paths).rpartition('/')[0])

    def of_shared(self, group: str, paths: Paths) -> jax.Array:
        """For scales that weights share: the same one for the first use of each, and so on."""
        return self._next(group, paths)

    def of_rounds(self, count: int) -> jax.Array:
        """One for each round of a loop, to draw others from."""
        return jax.random.split(self._next('loop'), count)


class LayerKeys(Keys):
    """Those of a single layer, whose own key it is that is given."""

    def of(self, paths: Paths) -> jax.Array:
        return self.root


# What only moves or casts the entries of its first operand, where the others are not random.
_MOVES = {
    'convert_element_type',
    'copy',
    'copy_p',
    'dynamic_slice',
    'pad',
    'reduce_precision',
    'reshape',
    'rev',
    'sharding_constraint',
    'slice',
    'split',
    'squeeze',
    'stop_gradient',
    'transpose',
}

_CHECKPOINTS = ('remat', 'remat2', 'checkpoint')


def _called(eqn: Any) -> core.ClosedJaxpr | None:
    """The program of an operation that only runs it, and has no derivative of its own."""
    name = eqn.primitive.name
    if name not in CALLS or name.startswith('custom_'):
        return None
    return closed_jaxpr(eqn.params[CALLS[name]])


def _moved_mark(eqn: Any, marks: Sequence[Mark]) -> Mark | None:
    """Of the results, if they have independent Gaussian entries as the random operands have."""
    if not _keeps_independence(eqn, [mark.paths for mark in marks]):
        return None
    at = next(at for at, mark in enumerate(marks) if mark.paths)
    spreads = tuple(scales.moved(eqn, at, spread) for mark in marks for spread in mark.spreads)
    if None in spreads:
        return None
    return Mark(_NONE.union(*(mark.paths for mark in marks)), spreads)


def _keeps_independence(eqn: Any, operands: Sequence[Paths]) -> bool:
    name, result = eqn.primitive.name, eqn.outvars[0].aval
    only_first = bool(operands[0]) and not any(operands[1:])
    if not jnp.issubdtype(result.dtype, jnp.floating):
        return False
    if name in ('broadcast_in_dim', 'mul', 'div') and any(
        paths and atom.aval.size != result.size
        for paths, atom in zip(operands, eqn.invars, strict=False)
    ):
        return False  # an entry becomes several
    if name == 'broadcast_in_dim':
        return only_first
    if name == 'concatenate':  # of different weights
        return sum(map(len, operands)) == len(_NONE.union(*operands))
    if name == 'mul':
        return not (operands[0] and operands[1])
    return (name in _MOVES or name in ('div', 'neg', 'reduce_sum')) and only_first


def _is_linear(eqn: Any, marks: Sequence[Mark]) -> bool:
    """Whether the results are sums of random entries, each times something that is not random."""
    name = eqn.primitive.name
    if name not in ('gather', 'dot_general', 'conv_general_dilated'):
        return False
    first, second = (bool(mark.paths) for mark in marks[:2])
    if second and (first or name == 'gather'):  # which looks up by numbers
        return False
    return all(
        scales.place(eqn, at, spread) is not None
        for at, mark in enumerate(marks)
        for spread in mark.spreads
    )


class Uses(NamedTuple):
    """How a program uses its random arguments.

    Attributes:
      linear: paths of weights that meet inputs in linear operations.
      other: paths of weights that are used in any other way too.
      results: for each of its results, the mark of what it is made of.
    """

    linear: Paths
    other: Paths
    results: list[Mark]


def uses(program: Any, arguments: Sequence[Mark], in_loops: bool) -> Uses:
    """How a program uses its random arguments.

    Args:
      program: a jaxpr.
      arguments: for each of its arguments the mark of the weight that it is, or an empty one.
      in_loops: whether linear operations in a loop are linear also for a weight that is the same
        in all its rounds. Their noise is new in every round; recurrent networks want one draw for
        all of them (Chirkova, Lobacheva & Vetrov 2018).
    """
    jaxpr = closed_jaxpr(program).jaxpr
    known: dict[Any, Mark] = dict(zip(jaxpr.invars, arguments, strict=True))

    def known_of(atom: Any) -> Mark:
        return Mark() if isinstance(atom, core.Literal) else known.get(atom, Mark())

    linear, other = _NONE, _NONE
    for eqn in jaxpr.eqns:
        marks = [known_of(atom) for atom in eqn.invars]
        paths = united(marks)
        if not paths:
            continue
        if (moved := _moved_mark(eqn, marks)) is not None:
            known.update(dict.fromkeys(eqn.outvars, moved))
        elif _is_linear(eqn, marks):
            linear |= paths
        else:
            found = _uses_within(eqn, marks, in_loops)
            linear, other = linear | found.linear, other | found.other
            known.update(zip(eqn.outvars, found.results, strict=True))
    return Uses(linear, other, [known_of(atom) for atom in jaxpr.outvars])


def united(marks: Sequence[Mark]) -> Paths:
    """The paths of all."""
    return _NONE.union(*(mark.paths for mark in marks))


def _uses_within(eqn: Any, marks: list[Mark], in_loops: bool) -> Uses:
    """How the programs within an operation use its random operands."""
    name = eqn.primitive.name
    if name == 'cond':
        programs, other = eqn.params['branches'], marks[0].paths
        marks = marks[1:]
    elif name == 'scan':
        consts, carried, scanned = _parts(eqn, marks)
        programs = [eqn.params['jaxpr']]
        # A scale would have to be cut into rounds, as its weight is.
        scaled = [mark for mark in scanned if mark.spreads]
        other = united([*carried, *scaled, *([] if in_loops else consts)])
    elif (called := _called(eqn)) is not None:
        programs, other = [called], _NONE
    else:
        programs, other = [], united(marks)
    local = [Mark() if mark.paths & other else mark for mark in marks]
    found = [uses(program, local, in_loops) for program in programs]
    linear = _NONE.union(*(f.linear for f in found))
    other = other.union(*(f.other for f in found))
    if len(found) == 1 and name in CALLS and name not in _CHECKPOINTS:
        return Uses(linear, other, found[0].results)
    # Through these, what is returned has to be an array.
    escaping = (united(f.results) for f in found)
    return Uses(linear, other.union(*escaping), [Mark()] * len(eqn.outvars))


def _parts(eqn: Any, operands: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What is the same in all rounds of a scan, what is carried, and what there is one of each."""
    consts = eqn.params['num_consts']
    carried = consts + eqn.params['num_carry']
    return operands[:consts], operands[consts:carried], operands[carried:]


def evaluate(program: Any, keys: Keys, *arguments: Any) -> list[Any]:
    """A program's results.

    Args:
      program: a jaxpr.
      keys: for the noise.
      *arguments: arrays, and :class:`Random` ones, of which :func:`uses` knows no other use than
        linear ones.
    """
    closed = closed_jaxpr(program)
    known: dict[Any, Any] = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    known.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in closed.jaxpr.eqns:
        operands = [value(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _results(eqn, operands, keys), strict=True))
    return [value(atom) for atom in closed.jaxpr.outvars]


def _results(eqn: Any, operands: list[Any], keys: Keys) -> list[Any]:
    marks = [mark_of(v) for v in operands]
    if not united(marks):
        return _as_it_is(eqn, operands)
    if (moved := _moved_mark(eqn, marks)) is not None:
        return _moved(eqn, operands, moved)
    if _is_linear(eqn, marks):
        return [_sampled(eqn, operands, keys)]
    if eqn.primitive.name == 'cond':
        branches = [functools.partial(evaluate, b, keys) for b in eqn.params['branches']]
        return list(lax.switch(operands[0], branches, *operands[1:]))
    if eqn.primitive.name == 'scan':
        return _scan(eqn, operands, keys)
    run: Callable[..., list[Any]] = functools.partial(evaluate, _called(eqn), keys)
    if eqn.primitive.name in _CHECKPOINTS:
        options = {name: eqn.params[name] for name in ('prevent_cse', 'policy')}
        run = jax.checkpoint(run, **options)
    return run(*operands)


def _as_it_is(eqn: Any, operands: list[Any]) -> list[Any]:
    """An operation of which nothing is random."""
    name = eqn.primitive.name
    if name == 'reduce_window_max' and conv.pools_2x2(eqn.params, operands[0]):
        return [conv.max_pool_2x2(operands[0])]
    if name == 'conv_general_dilated':
        padding = conv.padding_by_patches(eqn.params, *operands)
        if padding:
            return [conv.way(*operands).apply(*operands, None, padding)]
    values = {a: v for a, v in zip(eqn.invars, operands, strict=True) if type(a) is core.Var}
    where = core.DebugInfo(__name__, '', None, None)
    jaxpr = core.Jaxpr((), list(values), eqn.outvars, [eqn], eqn.effects, where)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*values.values())


def _bind(eqn: Any, operands: Sequence[Any], **params: Any) -> list[Any]:
    """An operation with other operands, and some parameters changed."""
    results = eqn.primitive.bind(*operands, **{**eqn.params, **params})
    return list(results) if eqn.primitive.multiple_results else [results]


def _moved(eqn: Any, operands: list[Any], mark: Mark) -> list[Random]:
    """The means move as arrays do; the variances too, scaled by squares, and what is added is 0."""
    name = eqn.primitive.name
    means = _bind(eqn, [v.mean if isinstance(v, Random) else v for v in operands])
    random = [v for v in operands if isinstance(v, Random)]
    known = [scale for v in random for scale in v.scales]
    after = tuple(
        scale.replace(spread=spread) for scale, spread in zip(known, mark.spreads, strict=True)
    )
    if all(v.variance is None for v in random):
        return [Random(mean, None, mark.paths, after) for mean in means]
    dtype = next(v.variance.dtype for v in random if v.variance is not None)
    scaled, joined = name in ('mul', 'div'), name in ('pad', 'concatenate')

    def variance_of(v: Any) -> Any:
        if isinstance(v, Random) and v.variance is not None:
            return v.variance
        if scaled:
            return lax.square(jnp.asarray(v, dtype))
        return jnp.zeros(jnp.shape(v), dtype) if joined else v

    variances, params = [variance_of(v) for v in operands], {}
    if name == 'convert_element_type':
        params['new_dtype'] = linear.variance_dtype(eqn.params['new_dtype'])
    of_variances = variances if name == 'neg' else _bind(eqn, variances, **params)
    return [
        Random(mean, variance, mark.paths, after)
        for mean, variance in zip(means, of_variances, strict=True)
    ]


def _sampled(eqn: Any, operands: list[Any], keys: Keys) -> jax.Array:
    """The result of a linear operation, drawn."""
    at = 0 if isinstance(operands[0], Random) else 1
    weight = operands[at]
    key = keys.of(weight.paths)
    if weight.scales:
        return _scaled(eqn, operands, at, key, keys)
    return _drawn(eqn, operands, at, key)


def _scaled(eqn: Any, operands: list[Any], at: int, key: jax.Array, keys: Keys) -> jax.Array:
    """Of a weight with scales, each of which multiplies the input or the result."""
    weight, x, factors = operands[at], operands[1 - at], []
    for number, scale in enumerate(weight.scales):
        place = scales.place(eqn, at, scale.spread)
        assert place is not None  # uses() has seen to it
        if is_shared(scale.group):
            own = keys.of_shared(scale.group, weight.paths)
        else:
            own = jax.random.fold_in(key, number)
        factor = scale.drawn(place, own)
        if place.of_input:
            x = x * factor.astype(x.dtype)
        else:
            factors.append(factor)
    scaled = [weight, x] if at == 0 else [x, weight]
    if weight.variance is None:
        scaled[at] = weight.mean
        (y,) = _as_it_is(eqn, scaled)
    else:
        y = _drawn(eqn, scaled, at, key)
    for factor in factors:
        y = y * factor.astype(y.dtype)
    return y


def _drawn(eqn: Any, operands: list[Any], at: int, key: jax.Array) -> jax.Array:
    """By local reparameterisation of a weight that is random itself."""
    name, weight, x = eqn.primitive.name, operands[at], operands[1 - at]
    if name == 'conv_general_dilated' and at == 1:
        padding = conv.padding_by_patches(eqn.params, x, weight.mean)
        if padding:
            way = conv.way(x, weight.mean)
            return way.sample(x, weight.mean, weight.variance, None, padding, key)

    def operation(weight: jax.Array, x: jax.Array, **params: Any) -> jax.Array:
        return _bind(eqn, (weight, x) if at == 0 else (x, weight), **params)[0]

    mean = operation(weight.mean, x)
    if name == 'gather':
        return linear.draw(mean, operation(weight.variance, x), key)
    wanted = eqn.params['preferred_element_type']
    wanted = None if wanted is None else linear.variance_dtype(wanted)
    variance = operation(weight.variance, linear.squared(x), preferred_element_type=wanted)
    return linear.draw(mean, variance, key)


def _scan(eqn: Any, operands: list[Any], keys: Keys) -> list[Any]:
    consts, carried, scanned = _parts(eqn, operands)
    length, program = eqn.params['length'], eqn.params['jaxpr']

    def round_(carried: list[Any], each: tuple[jax.Array, list[Any]]) -> tuple[list, list]:
        key, scanned = each
        results = evaluate(program, Keys(key), *consts, *carried, *scanned)
        return results[: len(carried)], results[len(carried) :]

    options = {name: eqn.params[name] for name in ('length', 'reverse', 'unroll')}
    carried, made = lax.scan(round_, carried, (keys.of_rounds(length), scanned), **options)
    return [*carried, *made]
