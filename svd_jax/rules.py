"""How sizes go through primitive operations: which units of an operand make a unit of the result.

A unit is an index along an axis of an array, such as a channel of an activation or a row of a
kernel. For every primitive that is known here, a rule says

- which units of a result are *constant*, the same for every example and position, given those of
  its operands;
- which units of its operands it *reads*, given those that are wanted of its result;
- and with which parameters it then runs on the smaller arrays.

A primitive without a rule reads everything, and its results are not constant.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.lax import GatherScatterMode

from svd_jax.program import Equation

Shape = tuple[int, ...]
Units = tuple[np.ndarray, ...]  # for every axis, which of its units


class Fixed(NamedTuple):
    """The constant units of an array: along one axis, which, and their values."""

    axis: int
    units: np.ndarray
    values: np.ndarray


class View(NamedTuple):
    """What is known of an operand.

    Attributes:
      shape: of the array, for the example input.
      value: the array itself, where it does not depend on the input.
      fixed: its constant units, where it does.
    """

    shape: Shape
    value: np.ndarray | None
    fixed: Fixed | None

    def constant(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Which units along an axis are constant, and their values."""
        size = self.shape[axis]
        if self.value is not None:
            units = np.moveaxis(self.value, axis, 0)
            return _alike(units), units.reshape(size, -1)[:, 0]
        if self.fixed is not None and self.fixed.axis == axis:
            return self.fixed.units, self.fixed.values
        return np.zeros(size, bool), np.zeros(size)


class Work(NamedTuple):
    """Where the multiply-adds of a product with weights are.

    Attributes:
      weights: which operand.
      units: the axes of the weights that make units.
      summed: the axes of the weights that are summed over.
      inputs: the axes of the other operand that hold its units.
    """

    weights: int
    units: tuple[int, ...]
    summed: tuple[int, ...]
    inputs: tuple[int, ...]


class Use(NamedTuple):
    """How an equation runs on smaller arrays.

    Attributes:
      reads: of every operand, the units that it must have.
      makes: the units that the result then has, at least those that are wanted.
      adapt: the parameters, given those for full arrays and the result's smaller shape.
      bias: what constant units of the operands contribute to the result, beside its last axes.
      left: why units were left alone that might have gone, if some were.
      work: for products with weights.
    """

    reads: tuple[Units, ...]
    makes: Units
    adapt: Callable[[dict[str, Any], Shape], dict[str, Any]] = lambda params, shape: params
    bias: tuple[int, np.ndarray] | None = None
    left: str = ''
    work: Work | None = None


Outcome = tuple[int, np.ndarray] | None  # the axis, and which units along it are constant


class Rule(NamedTuple):
    """See the module's docstring.

    Attributes:
      constant: given the equation, its operands and the result's shape.
      use: given the same and the wanted units of the result; None: it cannot be made smaller.
    """

    constant: Callable[[Equation, Sequence[View], Shape], Outcome]
    use: Callable[[Equation, Sequence[View], Shape, Units], Use | None]


def everything(shape: Shape) -> Units:
    return tuple(np.ones(n, bool) for n in shape)


def _along(units: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Ready to broadcast against arrays of this rank."""
    return units.reshape([-1 if a == axis else 1 for a in range(rank)])


def _any_but(mask: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))


def _alike(units: np.ndarray) -> np.ndarray:
    """Of an array with its units along the first axis, which have one value everywhere."""
    rows = units.reshape(len(units), -1)
    return np.all(rows == rows[:, :1], 1) & (rows.shape[1] > 0)


def _fixed_axis(views: Sequence[View]) -> int | None:
    for view in views:
        if view.fixed is not None:
            return view.fixed.axis
    return None


# --- Elementwise ----------------------------------------------------------------------------------


def _elementwise_constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
    axis = _fixed_axis(views)
    if axis is None or any(view.shape and len(view.shape) != len(shape) for view in views):
        return None
    units = np.ones(shape[axis], bool)
    for view in views:
        if view.shape:
            units &= np.broadcast_to(view.constant(axis)[0], units.shape)
        elif view.value is None:  # a number that depends on the input
            return None
    return axis, units


def _elementwise(
    equation: Equation, views: Sequence[View], shape: Shape, wanted: Units
) -> Use | None:
    if any(view.shape and len(view.shape) != len(shape) for view in views):
        return None
    reads = tuple(
        tuple(
            w if n == len(w) else np.ones(n, bool)
            for n, w in zip(view.shape, wanted, strict=bool(view.shape))
        )
        for view in views
    )
    return Use(reads, wanted)


# --- Axes that move -------------------------------------------------------------------------------


Moves = dict[int, int]
Adapt = Callable[[dict[str, Any], Shape, Moves], dict[str, Any]]


def _moved(axes: Callable[[Equation, Shape, Shape], Moves], adapt: Adapt | None = None) -> Rule:
    """A rule where axes of the operand become axes of the result; others are read in full.

    Args:
      axes: from the operand's to the result's, those that keep their units.
      adapt: the parameters, given those for full arrays, the result's smaller shape and ``axes``.
    """

    def constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
        fixed, moves = views[0].fixed, axes(equation, views[0].shape, shape)
        return (moves[fixed.axis], fixed.units) if fixed and fixed.axis in moves else None

    def use(equation: Equation, views: Sequence[View], shape: Shape, wanted: Units) -> Use:
        reads, makes = list(everything(views[0].shape)), list(everything(shape))
        moves = axes(equation, views[0].shape, shape)
        for before, after in moves.items():
            reads[before] = makes[after] = wanted[after]
        lost = views[0].fixed is not None and views[0].fixed.axis not in moves
        return Use(
            (tuple(reads), *(everything(view.shape) for view in views[1:])),
            tuple(makes),
            lambda params, smaller: adapt(params, smaller, moves) if adapt else params,
            left='it works across units' if lost else '',
        )

    return Rule(constant, use)


def transpose_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    return {old: new for new, old in enumerate(equation.params['permutation'])}


def squeeze_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    gone = [axis % len(before) for axis in equation.params['dimensions']]
    return {old: new for new, old in enumerate(a for a in range(len(before)) if a not in gone)}


def broadcast_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    to = equation.params['broadcast_dimensions']
    return {old: new for old, new in enumerate(to) if before[old] == after[new]}


def reduced_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    gone = equation.params['axes']
    return {old: new for new, old in enumerate(a for a in range(len(before)) if a not in gone)}


def window_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    """Those that the window does not touch."""
    p = equation.params
    return {
        axis: axis
        for axis in range(len(before))
        if p['window_dimensions'][axis] == p['window_strides'][axis] == 1
        and tuple(p['padding'][axis]) == (0, 0)
        and p['base_dilation'][axis] == 1
    }


def sliced_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    """Those that are not cut."""
    return {axis: axis for axis, (n, m) in enumerate(zip(before, after, strict=True)) if n == m}


def gathered_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    """Those of which all is taken, as of the columns of an embedding."""
    numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(before)) if axis not in gone]
    taken = zip(kept, numbers.offset_dims, strict=True)
    return {old: new for old, new in taken if sizes[old] == before[old]}


def unreversed_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    return {a: a for a in range(len(before)) if a not in equation.params['dimensions']}


def unpadded_axes(equation: Equation, before: Shape, after: Shape) -> dict[int, int]:
    configuration = equation.params['padding_config']
    return {axis: axis for axis, c in enumerate(configuration) if tuple(c) == (0, 0, 0)}


def _only_if(rule: Rule, keeps: Callable[[Equation, Sequence[View]], Any]) -> Rule:
    """The rule, with only those constant units that this keeps constant too."""

    def constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
        found = rule.constant(equation, views, shape)
        return found and (found[0], found[1] & keeps(equation, views))

    return Rule(constant, rule.use)


def _same_at_the_edge(equation: Equation, views: Sequence[View]) -> Any:
    """Windows that reach over the edge, or over holes, sum fewer entries."""
    assert views[0].fixed is not None
    p = equation.params
    padded = any(tuple(pad) != (0, 0) for pad in p['padding'])
    return (views[0].fixed.values == 0) | (not padded and set(p['base_dilation']) == {1})


def _never_empty(equation: Equation, views: Sequence[View]) -> Any:
    """Windows that hold padding alone have another greatest entry."""
    p = equation.params
    inside = all(max(pad) < n for pad, n in zip(p['padding'], p['window_dimensions'], strict=True))
    return inside and set(p['base_dilation']) == set(p['window_dilation']) == {1}


def _same_as_padding(equation: Equation, views: Sequence[View]) -> Any:
    assert views[0].fixed is not None
    return views[0].fixed.values == views[1].value


def _in_bounds(equation: Equation, views: Sequence[View]) -> Any:
    """What is taken beyond the end may be NaN."""
    return equation.params['mode'] != GatherScatterMode.FILL_OR_DROP


def _take_fewer(params: dict[str, Any], smaller: Shape, moves: Moves) -> dict[str, Any]:
    sizes = (smaller[moves[a]] if a in moves else n for a, n in enumerate(params['slice_sizes']))
    return params | {'slice_sizes': tuple(sizes)}


def _resize(params: dict[str, Any], smaller: Shape, moves: Moves) -> dict[str, Any]:
    return params | {'shape': smaller}


# --- Slices ---------------------------------------------------------------------------------------


def _sliced(equation: Equation, rank: int) -> list[slice]:
    p = equation.params
    strides = p['strides'] or (1,) * rank
    return list(map(slice, p['start_indices'], p['limit_indices'], strides))


def _slice_constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
    fixed = views[0].fixed
    return fixed and (fixed.axis, fixed.units[_sliced(equation, len(shape))[fixed.axis]])


def _slice(equation: Equation, views: Sequence[View], shape: Shape, wanted: Units) -> Use:
    before, reads, makes = views[0].shape, list(everything(views[0].shape)), list(everything(shape))
    # Where all of a piece is wanted it is cut out of the whole: there may be more of that.
    whole = [bool(w.all()) for w in wanted]
    for axis, piece in enumerate(_sliced(equation, len(shape))):
        if not whole[axis]:
            reads[axis] = np.zeros(before[axis], bool)
            reads[axis][piece] = makes[axis] = wanted[axis]

    planned = _sliced(equation, len(shape))

    def adapt(params: dict[str, Any], smaller: Shape) -> dict[str, Any]:
        cut = _sliced(equation._replace(params=params), len(smaller))
        for own, other, w in zip(planned, cut, whole, strict=True):
            if not w and (own.start, own.step) != (other.start, other.step):
                raise ValueError(
                    'the model takes other units for inputs of this shape than for the example: '
                    'call compact again with an example of it'
                )
        cut = [c if w else slice(0, n, 1) for c, w, n in zip(cut, whole, smaller, strict=True)]
        return params | {
            'start_indices': tuple(c.start for c in cut),
            'limit_indices': tuple(c.stop for c in cut),
            'strides': tuple(c.step for c in cut),
        }

    return Use((tuple(reads),), tuple(makes), adapt)


# --- Reshape --------------------------------------------------------------------------------------


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Consecutive axes of either shape that hold the same entries, as few as may be together."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        olds: list[int] = []
        news: list[int] = []
        old = new = 1
        while True:
            if old == new and olds and news:
                break
            if i < len(before) and (old <= new or j >= len(after)):
                olds.append(i)
                old, i = old * before[i], i + 1
            elif j < len(after):
                news.append(j)
                new, j = new * after[j], j + 1
            else:
                break
        groups.append((olds, news))
    return groups


def _reshape_constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
    view, fixed = views[0], views[0].fixed
    if fixed is None:
        return None
    for olds, news in _groups(view.shape, shape):
        if fixed.axis not in olds:
            continue
        sizes = [view.shape[a] for a in olds]
        place = [1] * len(olds)
        place[olds.index(fixed.axis)] = -1
        constant, values = (
            np.broadcast_to(each.reshape(place), sizes).reshape([shape[a] for a in news])
            for each in (fixed.units, fixed.values)
        )
        best: Outcome = None
        for at, axis in enumerate(news):
            units = np.all(np.moveaxis(constant, at, 0).reshape(shape[axis], -1), 1)
            units &= _alike(np.moveaxis(values, at, 0))
            if best is None or units.sum() > best[1].sum():
                best = axis, units
        return best
    return None


def _reshape(equation: Equation, views: Sequence[View], shape: Shape, wanted: Units) -> Use | None:
    before = views[0].shape
    reads, makes = list(everything(before)), list(everything(shape))
    left = ''
    for olds, news in _groups(before, shape):
        whole = all(wanted[a].all() for a in news)
        wide_olds = [a for a in olds if before[a] != 1]
        wide_news = [a for a in news if shape[a] != 1]
        if whole:
            continue
        if len(wide_news) == 1:  # flattened: along each axis, the units that anything is wanted of
            (new,) = wide_news
            grid = wanted[new].reshape([before[a] for a in olds])
            for at, axis in enumerate(olds):
                reads[axis] = np.any(np.moveaxis(grid, at, 0).reshape(before[axis], -1), 1)
            product = np.ones(1, bool)
            for axis in olds:
                product = product[..., None] & reads[axis]
            makes[new] = product.reshape(-1)
        elif len(wide_olds) == 1:  # split
            product = np.ones(1, bool)
            for axis in news:
                product = product[..., None] & wanted[axis]
                makes[axis] = wanted[axis]
            reads[wide_olds[0]] = product.reshape(-1)
        else:
            left = 'a reshape mixes its axes'

    def adapt(params: dict[str, Any], smaller: Shape) -> dict[str, Any]:
        return params | {'new_sizes': smaller}

    return Use((tuple(reads),), tuple(makes), adapt, left=left)


# --- Concatenation --------------------------------------------------------------------------------


def _parts(equation: Equation, views: Sequence[View]) -> list[slice]:
    ends = np.cumsum([view.shape[equation.params['dimension']] for view in views])
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _concatenate_constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
    axis = _fixed_axis(views)
    if axis is None:
        return None
    units = [view.constant(axis)[0] for view in views]
    if axis == equation.params['dimension']:
        return axis, np.concatenate(units)
    values = [view.constant(axis)[1] for view in views]
    same = np.all([value == values[0] for value in values], 0)
    return axis, np.all(units, 0) & same


def _concatenate(
    equation: Equation, views: Sequence[View], shape: Shape, wanted: Units
) -> Use | None:
    along = equation.params['dimension']
    reads = tuple(
        tuple(w[part] if axis == along else w for axis, w in enumerate(wanted))
        for part in _parts(equation, views)
    )
    return Use(reads, wanted)


# --- Products -------------------------------------------------------------------------------------


class _Product(NamedTuple):
    """The axes of a product of activations with weights."""

    weights: int  # which operand
    contracted: tuple[tuple[int, int], ...]  # of the activations, of the weights
    free: tuple[int, ...]  # of the weights
    free_in_result: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]  # free axes of the activations, and in the result


def _product(equation: Equation, views: Sequence[View], shape: Shape) -> _Product | None:
    (contracted, batch) = equation.params['dimension_numbers']
    known = [view.value is not None for view in views]
    if batch[0] or known[0] == known[1]:
        return None
    weights = known.index(True)
    own, other = contracted[weights], contracted[1 - weights]
    free = tuple(a for a in range(len(views[weights].shape)) if a not in own)
    rows = tuple(a for a in range(len(views[1 - weights].shape)) if a not in other)
    first = 0 if weights == 0 else len(rows)
    start = len(free) if weights == 0 else 0
    return _Product(
        weights,
        tuple(zip(other, own, strict=True)),
        free,
        tuple(range(first, first + len(free))),
        tuple((a, start + i) for i, a in enumerate(rows)),
    )


def _dot_constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
    product = _product(equation, views, shape)
    if product is None or not product.free:
        return None
    kernel = views[product.weights].value
    activations = views[1 - product.weights]
    assert kernel is not None
    varies, column = kernel != 0, np.zeros((1,) * kernel.ndim)
    for axis, own in product.contracted:  # along one of which units are constant
        constant, values = activations.constant(axis)
        varies = varies & _along(~constant, own, kernel.ndim)
        column = column + _along(np.where(constant, values, 0), own, kernel.ndim)
    sums = np.sum(kernel * column, tuple(own for _, own in product.contracted))
    alike = _alike(np.moveaxis(sums, -1, 0))  # along the other free axes
    return product.free_in_result[-1], ~_any_but(varies, product.free[-1]) & alike


def _exactly(values: np.ndarray) -> np.ndarray:
    """In double precision, for a long sum; real or complex, as before."""
    return values.astype(np.result_type(values, np.float64))


def _dot(equation: Equation, views: Sequence[View], shape: Shape, wanted: Units) -> Use | None:
    product = _product(equation, views, shape)
    if product is None:
        return None
    view, activations = views[product.weights], views[1 - product.weights]
    kernel = view.value
    assert kernel is not None
    weight_units = list(everything(view.shape))
    activation_units = list(everything(activations.shape))
    makes = list(everything(shape))
    for own, after in zip(product.free, product.free_in_result, strict=True):
        weight_units[own] = makes[after] = wanted[after]
        kernel = np.where(_along(wanted[after], own, kernel.ndim), kernel, 0)
    for axis, after in product.rows:
        activation_units[axis] = makes[after] = wanted[after]
    bias = None
    for axis, own in product.contracted:
        reads = _any_but(kernel != 0, own)
        constant, values = activations.constant(axis)
        if np.any(reads & constant):
            column = _along(_exactly(np.where(constant, values, 0)), own, kernel.ndim)
            bias = np.sum(kernel * column, tuple(other for _, other in product.contracted))
        activation_units[axis] = weight_units[own] = reads & ~constant
    reads_all = [tuple(activation_units), tuple(weight_units)]
    if product.weights == 0:
        reads_all.reverse()
    folded = None if bias is None else ((product.free_in_result or (0,))[0], bias)
    work = Work(
        product.weights,
        product.free,
        tuple(own for _, own in product.contracted),
        tuple(axis for axis, _ in product.contracted),
    )
    return Use(tuple(reads_all), tuple(makes), bias=folded, work=work)


class _Convolution(NamedTuple):
    """The axes of a convolution, and its kernel as (groups, outputs, inputs, positions)."""

    features_in: int
    features_out: int
    outputs: int
    inputs: int
    kernel: np.ndarray
    exact: np.ndarray  # constant inputs that contribute a constant, at the edges too

    @classmethod
    def of(cls, equation: Equation, views: Sequence[View]) -> '_Convolution | None':
        p, weights = equation.params, views[1].value
        if weights is None or views[0].value is not None or p['batch_group_count'] != 1:
            return None
        numbers, groups = p['dimension_numbers'], p['feature_group_count']
        o, i = numbers.rhs_spec[:2]
        kernel = np.moveaxis(weights, (o, i), (0, 1))
        kernel = kernel.reshape(groups, kernel.shape[0] // groups, kernel.shape[1], -1)
        axis = numbers.lhs_spec[1]
        constant, values = views[0].constant(axis)
        padded = any(tuple(pad) != (0, 0) for pad in p['padding'])
        padded = padded or any(d != 1 for d in p['lhs_dilation'])
        exact = constant & ((values == 0) | (not padded))
        return cls(axis, numbers.out_spec[1], o, i, kernel, exact)


def _conv_constant(equation: Equation, views: Sequence[View], shape: Shape) -> Outcome:
    c = _Convolution.of(equation, views)
    if c is None:
        return None
    moving = ~c.exact.reshape(c.kernel.shape[0], 1, -1, 1)
    return c.features_out, ~np.any((c.kernel != 0) & moving, (2, 3)).reshape(-1)


def _conv(equation: Equation, views: Sequence[View], shape: Shape, wanted: Units) -> Use | None:
    c = _Convolution.of(equation, views)
    if c is None:
        return None
    groups, outputs, inputs, _ = c.kernel.shape
    activation_units, weight_units = (list(everything(view.shape)) for view in views)
    makes, bias = list(everything(shape)), None
    out = wanted[c.features_out].reshape(groups, outputs)
    values = views[0].constant(c.features_in)[1]
    if groups == 1:
        kernel = np.where(out[..., None, None], c.kernel, 0)
        reads = np.any(kernel != 0, (0, 1, 3))
        varying = reads & ~c.exact
        if not varying.any():  # XLA wants a channel
            varying[0] = True
        folded = reads & ~varying
        if folded.any():
            column = np.where(folded, _exactly(values), 0)[:, None]
            bias = c.features_out, np.sum(kernel[0] * column, (1, 2))
        activation_units[c.features_in] = weight_units[c.inputs] = varying
        weight_units[c.outputs] = makes[c.features_out] = wanted[c.features_out]
        kept = 1
    else:  # a group goes whole, or stays
        stays = np.asarray(out.any(1))
        stays[0] |= not stays.any()  # XLA wants a group
        activation_units[c.features_in] = np.repeat(stays, inputs)
        weight_units[c.outputs] = makes[c.features_out] = np.repeat(stays, outputs)
        kept = int(stays.sum())

    def adapt(params: dict[str, Any], smaller: Shape) -> dict[str, Any]:
        return params | {'feature_group_count': kept}

    return Use(
        (tuple(activation_units), tuple(weight_units)), tuple(makes), adapt, bias,
        left='' if groups == 1 or out.any(1).sum() * outputs == out.sum()
        else 'a group of channels goes whole or stays',
        work=Work(
            1, (c.outputs,), tuple(a for a in range(len(views[1].shape)) if a != c.outputs),
            (c.features_in,),
        ),
    )  # fmt: skip


ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy
copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma
log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision rem round rsqrt
select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905

_WINDOW = _moved(window_axes)
_REDUCTION = _moved(reduced_axes)

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, Rule(_elementwise_constant, _elementwise)),
    'transpose': _moved(transpose_axes),
    'squeeze': _moved(squeeze_axes),
    'broadcast_in_dim': _moved(broadcast_axes, _resize),
    'slice': Rule(_slice_constant, _slice),
    'gather': _only_if(_moved(gathered_axes, _take_fewer), _in_bounds),
    'rev': _moved(unreversed_axes),
    'pad': _only_if(_moved(unpadded_axes), _same_as_padding),
    **dict.fromkeys(
        ['reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'argmax', 'argmin'], _REDUCTION
    ),
    **dict.fromkeys(['reduce_window_max', 'reduce_window_min'], _only_if(_WINDOW, _never_empty)),
    'reduce_window_sum': _only_if(_WINDOW, _same_at_the_edge),
    'reshape': Rule(_reshape_constant, _reshape),
    'concatenate': Rule(_concatenate_constant, _concatenate),
    'dot_general': Rule(_dot_constant, _dot),
    'conv_general_dilated': Rule(_conv_constant, _conv),
}
