"""From a sparsified network to a smaller one with the same outputs.

A unit whose incoming weights are all zero is a constant: it moves into the next bias. One whose
outgoing weights are all zero is nothing. Which axes of which arrays belong together is read from
the network's own program, operation by operation (:mod:`svd_jax.rules`): forwards, which units are
constant; backwards, which are read. The arrays then keep the units that are read and vary. What no
rule covers is left as it is.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from svd_jax import loops, network, table
from svd_jax.loops import Loop
from svd_jax.network import Path
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
from svd_jax.program import (
    Constant,
    Equation,
    Operand,
    Program,
    bind,
    evaluate,
    primitive_names,
    trace,
)
from svd_jax.rules import RULES, Fixed, Rule, Units, Use, View, everything
from svd_jax.sizes import Resized, outline, trace_as_many
from svd_jax.tree import PerPath

PyTree = Any


# What a weight may go through on its way to its use, and still be that weight.
_RESHAPING = ('reshape', 'broadcast_in_dim', 'convert_element_type', 'squeeze')
# How the names of operations start that draw random numbers.
_RANDOM = ('random_', 'threefry2x32', 'rng_')


class Layer(NamedTuple):
    """What became of a product or convolution with weights.

    Attributes:
      path: of its module.
      inputs: it reads, before and after; the others no weight reads.
      units: it makes, before and after.
      multiply_adds: for the example input, before and after.
    """

    path: str
    inputs: tuple[int, int]
    units: tuple[int, int]
    multiply_adds: tuple[int, int]


class Report(NamedTuple):
    """What :func:`compact` removed; printed, a table.

    Attributes:
      layers: in the order in which they run.
      weights: numbers in the tree, before and after.
      left: what was left as it is, and why, a line each.
    """

    layers: tuple[Layer, ...]
    weights: tuple[int, int]
    left: tuple[str, ...]

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Of all layers, before and after."""
        before, after = (sum(layer.multiply_adds[at] for layer in self.layers) for at in (0, 1))
        return before, after

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [('layer', 'inputs', 'units', 'multiply-adds')]
        for layer in self.layers:
            changes = layer.inputs, layer.units, layer.multiply_adds
            rows.append((layer.path, *map(_change, changes)))
        rows.append(('total', '', '', _change(self.multiply_adds)))
        return '\n'.join([
            *table.aligned(rows),
            f'numbers in the tree: {_change(self.weights)}',
            *(f'left: {line}' for line in self.left),
        ])  # fmt: skip


def _change(numbers: tuple[int, int]) -> str:
    return f'{numbers[0]:,} -> {numbers[1]:,}'


@dataclasses.dataclass(frozen=True, eq=False)  # the arrays have no equality to speak of
class Compact:
    """A smaller network.

    Attributes:
      params: the smaller tree. A layer without a bias that took on constants has one named
        ``constant`` beside its kernel.
      apply: the pure function that runs it: ``apply(params, x)`` gives what
        ``model.apply(variables, x)`` gave. It can be compiled, differentiated, vmapped, exported.
        Where the model has a function with a derivative of its own (``jax.custom_vjp``), such as
        one that passes gradients straight through a rounding, it is what that function computes
        that is differentiated.
      report: what was removed.
      kept: of every array that is left, by its path, which of its entries along each axis.
    """

    params: PyTree
    apply: Callable[..., Any]
    report: Report
    kept: dict[Path, Units] = dataclasses.field(default_factory=dict)

    def __call__(self, *inputs: Any) -> Any:
        """``apply`` with these parameters."""
        return self.apply(self.params, *inputs)


def compact(model: Any, variables: PyTree, *example: Any, **options: Any) -> Compact:
    """A physically smaller network with the outputs of a sparsified one.

    Args:
      model: a ``flax.linen.Module``, or whatever has such an ``apply``; or a pure function of the
        variables and the inputs.
      variables: its sparsified parameters; or its variables, with the parameters under ``'params'``
        and, say, ``'batch_stats'``.
      example: example inputs, arrays. Others may have another batch size.
      options: for ``apply``, such as ``deterministic=True``. Whatever makes the model a function of
        its inputs alone: no dropout, running averages.

    Returns:
      The smaller tree, the function that runs it, and a report.

    Raises:
      ValueError: the tree is variational; or, when run, the model does something else for the shape
        of its inputs than for that of the example.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)['params']
      >>> params['layers_2']['kernel'] = params['layers_2']['kernel'].at[1:].set(0)
      >>> small = svd.compact(model, params, x)
      >>> jax.tree.map(jnp.shape, small.params['layers_0'])
      {'bias': (1,), 'kernel': (3, 1)}
      >>> bool(jnp.allclose(small(x), model.apply({'params': params}, x)))
      True
    """
    variables = meta.unbox(variables)
    posterior = network.posterior(variables)
    if posterior is not None:
        raise ValueError(f'{posterior} is a posterior: pass what svd_jax.sparsify returns')
    return _Analysis(network.function(model, variables, options), variables, example).result()


def compact_but_read(
    model: Any,
    variables: PyTree,
    example: tuple,
    kept: Mapping[Path, Units],
    options: dict[str, Any],
) -> Compact:
    """As :func:`compact`, with all numbers that are left in the tree, and none in the program.

    Units that are constant, and are read by anything but a product, stay: where a training goes on,
    they are still trained, and the whole tree can be made of the smaller one. So do those entries
    of arrays that are to be kept.
    """
    function = network.function(model, variables, options)
    return _Analysis(function, variables, example, keep_read=True, kept=kept).result()


def compact_with_training(
    model: Any,
    training: Callable[..., Any],
    variables: PyTree,
    example: tuple,
    kept: Mapping[Path, Units],
    options: dict[str, Any],
) -> tuple[Compact, Callable[..., Any]]:
    """:func:`compact` of a network that goes on training, with its mutable collections.

    Only units that nothing reads are removed, which are the same ones in training and after. One
    that is constant stays: batch statistics make another constant of it than running averages do.

    Args:
      model: as for :func:`compact`: what will be shipped.
      training: the same in training: a pure function of the variables and the inputs that returns
        ``(outputs, updates)``, the new collections by name.
      variables: its variables, with sparsified parameters under ``'params'``.
      example: as for :func:`compact`.
      kept: entries of arrays that stay.
      options: as for :func:`compact`.

    Returns:
      What :func:`compact` returns; and what ``training`` is on the smaller variables.

    Raises:
      ValueError: random numbers are drawn in training.
    """
    shipped = network.function(model, variables, options)
    trained = network.function(training, variables, {})

    def analysed(
        function: Callable[..., Any], kept: Mapping[Path, Units], *wanted: Units
    ) -> '_Analysis':
        return _Analysis(function, variables, example, constants=False, kept=kept, wanted=wanted)

    # Each keeps what the other reads: more and more, until they agree.
    kept = {**kept, **_only_trained(shipped, variables, example)}
    while True:
        evaluation = analysed(shipped, kept)
        kept = evaluation.kept()
        state = {path: kept[path] for path in sorted(kept) if path[0] != 'params'}
        whole = analysed(_updating(trained, list(state)), kept, *state.values())
        if _agree(whole.kept(), kept):
            break
        kept = whole.kept()
    if random := whole.random():
        raise ValueError(
            f'{random} draws random numbers in training: pass a training function without them, '
            'such as one with a dropout rate of 0'
        )
    return evaluation.result(), whole.result().apply


def _only_trained(
    function: Callable[..., Any], variables: PyTree, example: tuple
) -> dict[Path, Units]:
    """All of the collections of which a function does not know: those are of training alone."""
    program = trace(function, variables, *example)
    known = {i for equation in program.equations for i in equation.inputs if isinstance(i, int)}
    return {
        path: everything(program.shapes[number].shape)
        for number, path in zip(program.inputs, network.paths(variables), strict=False)
        if path[0] != 'params' and number not in known
    }


def _updating(function: Callable[..., Any], paths: Sequence[Path]) -> Callable[..., Any]:
    """The function with those arrays alone of the collections that it returns."""

    def updating(variables: PyTree, *inputs: Any) -> Any:
        outputs, updates = function(variables, *inputs)
        after = {**variables, **updates}
        found = dict(zip(network.paths(after), jax.tree.leaves(after), strict=True))
        return outputs, traverse_util.unflatten_dict({path: found[path] for path in paths})

    return updating


def _agree(ours: dict[Path, Units], theirs: dict[Path, Units]) -> bool:
    same = ours.keys() == theirs.keys()
    return same and jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def fold(
    model: Any, variables: PyTree, *example: Any, threshold: PerPath = 3.0, **options: Any
) -> PyTree:
    """The same tree without what has no effect: fewer numbers to store, for the same outputs.

    A bias of a unit that no weight reads, and weights into it, become zero; so do those out of a
    unit that is constant, once the constant is in the next bias. Where there is no such bias, or
    another use of the same weights, they stay. :func:`compact` removes the units themselves.

    Args:
      model: as for :func:`compact`.
      variables: as for :func:`compact`; or variational, to be saved with a tolerance.
      example: as for :func:`compact`.
      threshold: at which log alpha the weights of a variational tree will be dropped.
      options: as for :func:`compact`.

    Returns:
      A tree of the same structure and shapes. In a variational one, weights that are dropped have a
      mean of zero. Only parameters change, no other collection.

    Raises:
      ValueError: a pattern of ``threshold`` or a path is not matched; or weights have groups.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model = nn.Sequential([nn.Dense(2), nn.relu, nn.Dense(1)])
      >>> first = {'kernel': jnp.asarray([[1.0, 0.0]]), 'bias': jnp.asarray([1.0, 2.0])}
      >>> second = {'kernel': jnp.asarray([[1.0], [3.0]]), 'bias': jnp.asarray([0.5])}
      >>> params = {'layers_0': first, 'layers_2': second}
      >>> folded = svd.fold(model, params, jnp.ones((1, 1)))
      >>> folded['layers_0']['bias'].tolist(), folded['layers_2']
      ([1.0, 0.0], {'bias': Array([6.5], dtype=float32), 'kernel': Array([[1.],
             [0.]], dtype=float32)})
    """
    variables = meta.unbox(variables)
    dense = network.dense(variables, threshold)
    function = network.function(model, dense, options)
    folded = _Analysis(function, dense, example, same_shapes=True).folded()
    leaves = dict(jax.tree_util.tree_leaves_with_path(folded))
    # log_sigma2, which is not among them, stays.
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path, leaf), variables)


class _Runner:
    """Runs the plan on the smaller arrays."""

    def __init__(
        self,
        function: Callable[..., Any],
        tree: PyTree,
        paths: dict[int, Path],
        plan: Plan,
    ) -> None:
        self._function, self._tree, self._paths = function, tree, paths
        self._plan = plan

    def __call__(self, params: PyTree, *inputs: Any) -> Any:
        # Traced again, for the sizes of these inputs: of the weights, only their shapes are needed.
        program = trace_as_many(self._function, self._tree, *inputs)
        arrays = traverse_util.flatten_dict(params)
        values: dict[int, Any] = {number: arrays[path] for number, path in self._paths.items()}
        values.update(program.constants)
        leaves = jax.tree.leaves(inputs)
        first = len(program.inputs) - len(leaves)
        values.update(zip(program.inputs[first:], leaves, strict=True))
        outputs = self._plan.run(program, values, arrays)
        return jax.tree.unflatten(program.tree, outputs)


class _Analysis:
    """Forwards, backwards, and the plan that comes of it.

    Args:
      function: of the tree and the example.
      tree: the whole one.
      example: example inputs.
      same_shapes: whether arrays keep their shapes.
      keep_read: whether constant units stay where anything reads them but a product, which has
        them in a bias.
      constants: whether units that are constant go.
      kept: entries of the tree's arrays that stay, whether they are read or not.
      wanted: which entries are of the last results; of the others, all.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        tree: PyTree,
        example: tuple,
        same_shapes: bool = False,
        keep_read: bool = False,
        constants: bool = True,
        kept: Mapping[Path, Units] | None = None,
        wanted: Sequence[Units] = (),
    ) -> None:
        self._function, self._tree, self._same_shapes = function, tree, same_shapes
        self._keep_read = same_shapes or keep_read
        program = self._program = trace_as_many(function, tree, *example)
        self._makers = {n: e for e in program.equations for n in e.outputs}
        leaves = jax.tree.leaves(tree)
        self._weights = program.inputs[: len(leaves)]
        self._paths = dict(zip(self._weights, network.paths(tree), strict=True))
        self._whole = {*program.inputs[len(leaves) :], *program.constants}
        self._values = {
            number: _as_numpy(value)
            for number, value in evaluate(program, *leaves, *jax.tree.leaves(example)).items()
        }
        self._example = example
        self._batch = Resized.of_more_examples(program, tuple(RULES), function, tree, example)
        # On the inputs, or on how many they are.
        self._depends = {*program.inputs[len(leaves) :], *self._batch.constants()}
        self._fixed: dict[int, Fixed] = {}
        self._left: dict[str, None] = {}
        self._forwards(RULES if constants else {})
        if self._fixed or self._computes_weights():
            self._forget_sizes()
        outputs = program.outputs[: len(program.outputs) - len(wanted)]
        self._wanted = [everything(np.shape(self._value(output))) for output in outputs]
        self._wanted += wanted
        kept = kept or {}
        self._needed = Needed(
            {number: kept[path] for number, path in self._paths.items() if path in kept}
        )
        self._uses = self._backwards()

    @functools.cached_property
    def _others(self) -> list[Resized]:
        # Only where a unit may go: it takes another trace or two for every size.
        known = tuple(RULES)
        return Resized.of_other_inputs(
            self._program, known, self._function, self._tree, self._example
        )

    def _is_size(self, number: int, axis: int) -> bool:
        """Whether that axis of a value is longer for more examples, or for longer ones."""
        return any(axis in sizes.axes(number) for sizes in (self._batch, *self._others))

    def _counts(self, at: int) -> bool:
        """Whether an equation does something else for more examples, or for longer ones."""
        return any(sizes.counts(at) for sizes in (self._batch, *self._others))

    # Forwards: which units of every value are constant.

    def _view(self, operand: Operand) -> View:
        if isinstance(operand, Constant):
            value = np.asarray(operand.value)
            return View(value.shape, value, None)
        value = self._values[operand]
        if operand in self._depends:
            return View(value.shape, None, self._fixed.get(operand))
        return View(value.shape, value, None)

    def _value(self, operand: Operand) -> Any:
        return operand.value if isinstance(operand, Constant) else self._values[operand]

    def _forwards(self, rules: Mapping[str, Rule]) -> None:
        for at, equation in enumerate(self._program.equations):
            if not any(i in self._depends for i in equation.inputs if isinstance(i, int)):
                if self._batch.counts(at):
                    self._depends.update(equation.outputs)
                continue
            self._depends.update(equation.outputs)
            rule = rules.get(equation.primitive.name)
            if rule is None or len(equation.outputs) != 1:
                continue
            (number,) = equation.outputs
            shape = self._values[number].shape
            outcome = rule.constant(equation, [self._view(i) for i in equation.inputs], shape)
            if outcome is not None and outcome[1].any() and self._values[number].size:
                axis, units = outcome
                if self._is_size(number, axis) or self._batch.counts(at):
                    continue
                rows = np.moveaxis(self._values[number], axis, 0).reshape(shape[axis], -1)
                self._fixed[number] = Fixed(axis, units, rows[:, 0])

    def _computes_weights(self) -> bool:
        """Whether anything but the tree is the same for all inputs, as far as one of them shows."""
        return bool(self._program.constants) or any(
            equation.primitive.name not in _RESHAPING
            and self._depends.isdisjoint(equation.outputs)
            and any(isinstance(i, int) for i in equation.inputs)
            for equation in self._program.equations
        )

    def _forget_sizes(self) -> None:
        """What is constant for inputs of one size alone, such as sums over them, is none.

        A mean over positions is one again: its values are compared, not the way to them.
        """
        for sizes in self._others:
            found = {n for n in sizes.dependent() if n in self._fixed or n not in self._depends}
            others = sizes.values(self._tree) if found else {}
            for number in found:
                self._compare(number, others[number])

    def _compare(self, number: int, other: Any) -> None:
        """Keeps what is constant of a value where it is the same for inputs of another size."""
        value, fixed = self._values[number], self._fixed.get(number)
        if fixed is not None:
            rows = np.moveaxis(np.asarray(other), fixed.axis, 0).reshape(len(fixed.units), -1)
            if not _close(rows[fixed.units], fixed.values[fixed.units, None]):
                del self._fixed[number]
        elif (
            isinstance(value, np.ndarray)  # not a random key
            and value.shape == other.shape
            and not _close(np.asarray(other), value)
        ):
            self._depends.add(number)

    # Backwards: which units of every value are read.

    def _kept(self, number: int) -> Units:
        """The units that the smaller array of a value has: those that are read and vary."""
        units = [np.array(u) for u in self._needed[number]]
        # In arrays of the same shapes a unit that is read is there, constant or not.
        fixed = None if self._keep_read else self._fixed.get(number)
        if fixed is not None and (units[fixed.axis] & ~fixed.units).any():
            units[fixed.axis] &= ~fixed.units
        return tuple(units)

    def _backwards(self) -> dict[int, AnyUse | None]:
        for output, units in zip(self._program.outputs, self._wanted, strict=True):
            self._needed.add(output, units)
        return self._needed.of_all(self._program, self._use)

    def _use(self, at: int, equation: Equation) -> AnyUse | None:
        views = [self._view(operand) for operand in equation.inputs]
        use = self._loop(at, equation, views) if equation.body else self._simple(equation, views)
        if use is not None and not in_every_example(
            use, equation, self._is_size, lambda: self._counts(at)
        ):
            use = None
        if isinstance(use, Use) and self._same_shapes:
            use = without_poles(use, equation, views)
        reason = 'no rule for it' if use is None else use.left
        if reason and any(view.fixed is not None for view in views):
            name = f'{equation.where or "the model"}: {equation.primitive.name}: {reason}'
            self._left[name] = None
        return use

    def _simple(self, equation: Equation, views: Sequence[View]) -> Use | None:
        rule = RULES.get(equation.primitive.name)
        if rule is None or len(equation.outputs) != 1:
            return None
        (number,) = equation.outputs
        shape, wanted = self._values[number].shape, self._kept(number)
        use = rule.use(equation, views, shape, wanted)
        if self._same_shapes and use is not None and not self._can_fold(equation, use):
            varying = [view._replace(fixed=None) for view in views]
            use = rule.use(equation, varying, shape, wanted)
        return use

    def _loop(self, at: int, equation: Equation, views: Sequence[View]) -> Loop | None:
        wanted = [self._kept(n) if n in self._needed else None for n in equation.outputs]
        sizes = [sizes.within(at) for sizes in (self._batch, *self._others) if sizes]
        return loops.use(equation, views, wanted, sizes, self._same_shapes)

    # The plan: the smaller arrays, and the steps that run on them.

    def _has(self, number: int) -> Units:
        """The units of the array that a value is when the steps run."""
        if number in self._whole:
            return everything(self._values[number].shape)
        return self._made.get(number) or self._kept(number)

    def result(self) -> Compact:
        self._made = {
            number: units
            for at, use in self._uses.items()
            for equation in [self._program.equations[at]]
            for number, units in zip(
                equation.outputs, makes_of(use, equation, self._program), strict=True
            )
            if units is not None
        }
        arrays = self._arrays()
        steps = []
        for at in sorted(self._uses):
            equation, use = self._program.equations[at], self._uses[at]
            constant = None
            if isinstance(use, Use) and use.bias is not None:
                constant = self._place_bias(equation, use, arrays)
            reads = reads_of(use, equation, self._program)
            steps.append(Step(at, tuple(map(self._fit, equation.inputs, reads)), use, constant))
        outputs = map(self._fit, self._program.outputs, self._wanted)
        params = traverse_util.unflatten_dict({p: jnp.asarray(a) for p, a in arrays.items()})
        runner = _Runner(
            self._function,
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self._tree),
            {number: self._paths[number] for number in self._read()},
            Plan(outline(self._program), tuple(steps), tuple(outputs)),
        )
        before = sum(self._values[number].size for number in self._weights)
        report = Report(
            tuple(self._layers()), (before, sum(a.size for a in arrays.values())), tuple(self._left)
        )
        # Inline: whoever traces a network that runs it is to see its operations.
        return Compact(params, jax.jit(runner, inline=True), report, self.kept())

    def kept(self) -> dict[Path, Units]:
        """Which entries are kept of every array of which some are read."""
        return {self._paths[number]: self._kept(number) for number in self._read()}

    def random(self) -> str | None:
        """Where random numbers are drawn that the results depend on, if they are."""
        for at, use in self._uses.items():
            equation = self._program.equations[at]
            if _draws(equation, use):
                return equation.where or 'the model'
        return None

    def folded(self) -> PyTree:
        """The tree with zeros in the place of the units that are not kept."""
        arrays = self._arrays()
        for at, use in self._uses.items():
            if isinstance(use, Use) and use.bias is not None:
                assert self._place_bias(self._program.equations[at], use, arrays) is None
        leaves = []
        for number, leaf in zip(self._weights, jax.tree.leaves(self._tree), strict=True):
            path = self._paths[number]
            if self._may_change(number) and self._consumers(number):
                whole = np.zeros_like(self._values[number])
                if path in arrays:
                    whole[np.ix_(*self._kept(number))] = arrays[path]
                leaf = jnp.asarray(whole)
            leaves.append(leaf)
        return jax.tree.unflatten(jax.tree.structure(self._tree), leaves)

    def _arrays(self) -> dict[Path, np.ndarray]:
        """The units that are kept of every array of which some are read."""
        return {
            self._paths[number]: self._values[number][np.ix_(*self._kept(number))]
            for number in self._read()
        }

    def _read(self) -> list[int]:
        """The weights of which some entries are read."""
        return [number for number in self._weights if number in self._needed]

    def _fit(self, operand: Operand, reads: Units | None) -> Fit | None:
        if isinstance(operand, Constant) or reads is None:
            return None if reads is None else Fit({}, None)
        return Fit.between(self._has(operand), reads, self._fixed.get(operand))

    def _consumers(self, number: int) -> list[int]:
        # Where arrays keep their shapes, what is not read is computed too.
        equations = range(len(self._program.equations)) if self._same_shapes else self._uses
        return [
            at
            for at in equations
            for operand in self._program.equations[at].inputs
            if operand == number
        ] + [-1 for output in self._program.outputs if output == number]

    def _weight_of(self, operand: Operand, alone: bool = False) -> int | None:
        """The leaf that a value is, up to its shape and type; alone: and nothing else reads."""
        while isinstance(operand, int):
            if alone and len(self._consumers(operand)) != 1:
                return None
            if operand in self._paths:
                return operand
            maker = self._makers.get(operand)
            if maker is None or maker.primitive.name not in _RESHAPING:
                return None
            operand = maker.inputs[0]
        return None

    def _may_change(self, leaf: int | None) -> TypeGuard[int]:
        """Whether a leaf is one that may be given other entries: of several collections, a
        parameter, where arrays keep their shapes."""
        if leaf is None:
            return False
        others_stay = self._same_shapes and network.with_collections(self._tree)
        return not others_stay or self._paths[leaf][0] == 'params'

    def _following_bias(self, equation: Equation, use: Use) -> int | None:
        """The leaf that is added next, to this result alone, if it can take on the constants."""
        assert use.bias is not None
        (number,) = equation.outputs
        consumers = self._consumers(number)
        if len(consumers) != 1 or consumers == [-1]:
            return None
        follower = self._program.equations[consumers[0]]
        others = [operand for operand in follower.inputs if operand != number]
        if follower.primitive.name != 'add' or not others:
            return None
        leaf = self._weight_of(others[0], alone=True)
        if not self._may_change(leaf) or self._values[leaf].shape != use.bias[1].shape:
            return None
        return leaf if self._lies_at(others[0], leaf, use.bias[0], number) else None

    def _lies_at(self, operand: Operand, leaf: int, axis: int, number: int) -> bool:
        """Whether a leaf, moved and broadcast, has its axes at those from ``axis`` of a value."""
        moves: list[Equation] = []
        while operand != leaf:
            assert isinstance(operand, int)
            moves.append(self._makers[operand])
            operand = moves[-1].inputs[0]
        own, whole = self._values[leaf].shape, self._values[number].shape
        entries = np.arange(math.prod(own)).reshape(own)
        moved: Any = jnp.asarray(entries)
        for move in reversed(moves):
            if move.primitive.name != 'convert_element_type':
                (moved,) = bind(move, [moved], move.params)
        wanted = entries.reshape((1,) * axis + own + (1,) * (len(whole) - axis - len(own)))
        return np.array_equal(np.broadcast_to(wanted, whole), np.broadcast_to(moved, whole))

    def _can_fold(self, equation: Equation, use: Use) -> bool:
        """Whether constants can go where there is already a place for them, and no other use."""
        return use.bias is None or (
            self._following_bias(equation, use) is not None
            and any(self._may_change(self._weight_of(i, alone=True)) for i in equation.inputs)
        )

    def _place_bias(
        self, equation: Equation, use: Use, arrays: dict[Path, np.ndarray]
    ) -> tuple[Path, int] | None:
        """Adds what constant units contribute to the bias that follows, or makes a new array."""
        assert use.bias is not None
        axis, bias = use.bias
        (number,) = equation.outputs
        leaf = self._following_bias(equation, use)
        if leaf is not None:
            path, dtype = self._paths[leaf], self._values[leaf].dtype
            arrays[path] = (arrays[path] + bias[np.ix_(*self._kept(leaf))]).astype(dtype)
            return None
        kernel = next(filter(None, map(self._weight_of, reversed(equation.inputs))), None)
        path = self._paths[kernel][:-1] if kernel is not None else ()
        path = (*path, 'constant')
        while path in arrays:
            path = (*path[:-1], f'{path[-1]}_')
        units = use.makes[axis : axis + bias.ndim]
        arrays[path] = bias[np.ix_(*units)].astype(self._values[number].dtype)
        return path, axis

    def _layers(self) -> Iterator[Layer]:
        for at in sorted(self._uses):
            equation, use = self._program.equations[at], self._uses[at]
            if isinstance(use, Loop):
                assert equation.body is not None
                rounds = equation.params['length']
                for step in use.plan.steps:
                    inner = equation.body.equations[step.at]
                    if isinstance(step.use, Use) and step.use.work is not None:
                        name = self._layer_in(equation, inner.inputs[step.use.work.weights])
                        yield _layer(inner, step.use, equation.body, name, rounds)
            elif isinstance(use, Use) and use.work is not None:
                leaf = self._weight_of(equation.inputs[use.work.weights])
                yield _layer(equation, use, self._program, self._name([leaf]) or equation.where)

    def _layer_in(self, loop: Equation, operand: Operand) -> str:
        """The name of the layers whose weights an operand in a round of a loop is made of."""
        assert loop.body is not None
        sources = loop.body.sources(operand)
        outer = dict(zip(loop.body.inputs, loop.inputs, strict=True))
        return self._name([self._weight_of(outer[n]) for n in sources if n in outer]) or loop.where

    def _name(self, leaves: Sequence[int | None]) -> str:
        """Of the layer with these weights, or of those that lie beside each other."""
        paths = sorted({self._paths[leaf][:-1] for leaf in leaves if leaf is not None})
        alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
        together = [names[0] for names in alike]
        apart = '+'.join('/'.join(path[len(together) :]) for path in paths)
        return '/'.join(part for part in (*together, apart) if part and part != 'params')


def _layer(equation: Equation, use: Use, program: Program, name: str, times: int = 1) -> Layer:
    """What becomes of a product.

    Args:
      equation: the product.
      use: of it.
      program: that it is in.
      name: of the layer.
      times: how often it runs.
    """
    work = use.work
    assert work is not None
    result, *whole = (
        np.shape(i.value) if isinstance(i, Constant) else program.shapes[i].shape
        for i in (*equation.outputs, *equation.inputs)
    )
    sizes = (result, *whole), (_sizes(use.makes), *map(_sizes, use.reads))
    counts = [
        (_product(inputs, work.inputs), _product(weights, work.units),
         times * math.prod(made) * _product(weights, work.summed))
        for made, *operands in sizes
        for weights, inputs in [(operands[work.weights], operands[1 - work.weights])]
    ]  # fmt: skip
    return Layer(name, *zip(*counts, strict=True))


def _draws(equation: Equation, use: AnyUse | None) -> bool:
    """Whether an equation draws random numbers, in what runs of it."""
    if isinstance(use, Loop) and equation.body is not None:
        return any(_draws(equation.body.equations[step.at], step.use) for step in use.plan.steps)
    return any(name.startswith(_RANDOM) for name in primitive_names(equation))


def _product(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[a] for a in axes)


def _sizes(units: Units) -> tuple[int, ...]:
    return tuple(int(u.sum()) for u in units)


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Up to rounding, if there is any."""
    if not jnp.issubdtype(wanted.dtype, jnp.inexact):
        return bool(np.all(found == wanted))
    rounding, sizes = float(jnp.finfo(wanted.dtype).eps), np.abs(wanted)
    # Of a sum over many; and of a small difference of large ones.
    allowed = rounding**0.5 * sizes + 8 * rounding * np.max(sizes, initial=0)
    return bool(np.all(np.abs(found - wanted) <= allowed))


def _as_numpy(value: Any) -> Any:
    return value if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else np.asarray(value)
