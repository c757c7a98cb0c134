"""From a program of primitives to the table of operations on rows that :mod:`svd_jax.kernels` runs.

A value is an array of row numbers: which row holds each of its features. So whatever only moves
numbers (reshape, transpose, take, pad, concatenate) costs nothing: it is done once, on the row
numbers. Row 0 is all zeros. Products and convolutions list their weights that are not zero; a
scale, a bias, a rectification and a max pooling that follow are part of them.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from svd_jax import kernels
from svd_jax.program import Constant, Equation, Operand, bind

# Of the probe that a program is traced for.
EXAMPLES = 2

# Bytes of the inputs of a block, which should stay in a core's nearest cache; weights of a channel
# in it, for which it is worth to read and write the sums.
_NEAREST, _WORTH_A_BLOCK = 24 << 10, 12

_MOVES = {
    'broadcast_in_dim', 'concatenate', 'copy', 'copy_p', 'dynamic_slice', 'expand_dims', 'gather',
    'pad', 'reshape', 'rev', 'slice', 'squeeze', 'stop_gradient', 'transpose',
}  # fmt: skip
_OF_TWO = {
    'add': kernels.ADD, 'add_any': kernels.ADD, 'sub': kernels.SUB, 'mul': kernels.MUL,
    'div': kernels.DIV, 'max': kernels.MAX, 'min': kernels.MIN,
}  # fmt: skip
_COMMUTE = ('add', 'add_any', 'mul', 'max', 'min')
_OF_ONE = {
    'abs': kernels.ABS, 'exp': kernels.EXP, 'log': kernels.LOG, 'logistic': kernels.LOGISTIC,
    'neg': kernels.NEG, 'rsqrt': kernels.RSQRT, 'sqrt': kernels.SQRT, 'square': kernels.SQUARE,
    'tanh': kernels.TANH,
}  # fmt: skip
_REDUCTIONS = {
    'reduce_max': kernels.MAX,
    'reduce_sum': kernels.ADD,
    'reduce_window_max': kernels.MAX,
    'reduce_window_sum': kernels.ADD,
}


class NotCoveredError(Exception):
    """The rows have no operation for this; the message says for what."""


class Plan(NamedTuple):
    """Operations on rows, as :func:`svd_jax.kernels.run` takes them.

    Attributes:
      table: the operations.
      whole: the whole numbers that they refer to.
      floats: the weights and constants that they refer to.
      stores: rows of the result.
      rows: how many there are.
      multiply_adds: for one example.
    """

    table: np.ndarray
    whole: np.ndarray
    floats: np.ndarray
    stores: np.ndarray
    rows: int
    multiply_adds: int

    def numbers(self, lanes: int) -> int:
        """Needed for the rows of so many examples, and what is computed on the way."""
        return self.rows * lanes + max(map(partial(_room, lanes), self._linear), default=0)

    def band(self, lanes: int) -> int:
        """Most vectors of a band, of so many examples."""
        return max(map(partial(_vectors_of_a_band, lanes), self._linear), default=0)

    def vector_multiply_adds(self, lanes: int) -> int:
        """Of so many examples."""
        return sum(
            self.whole[start + blocks * channels] * rows * pieces * _vectors(run * lanes)
            for channels, start, rows, pieces, run, blocks in self._linear[:, _WORK].tolist()
        )

    @property
    def _linear(self) -> np.ndarray:
        return self.table[self.table[:, 0] == kernels.LINEAR]


# Columns of the table: channels, and where the pointers to their weights are; rows, pieces and
# lengths of what they are summed for; blocks of inputs.
_WORK = [2, 3, 7, 8, 9, 17]


def _vectors(numbers: int) -> int:
    return -(-numbers // kernels.WIDTH)


def _vectors_of_a_band(lanes: int, operation: np.ndarray) -> int:
    pieces, run, high = operation[[8, 9, 12]].tolist()
    return kernels.band_of(run * lanes, pieces, high) * pieces * _vectors(run * lanes)


def _room(lanes: int, operation: np.ndarray) -> int:
    """Numbers of a band of all channels, a vector beyond each, and one more for what rounds up."""
    channels, pieces, run, high, wide = operation[[2, 8, 9, 12, 13]].tolist()
    if high == wide == 1 and run * lanes % kernels.WIDTH == 0:
        return 0  # sums are written where they belong
    band = kernels.band_of(run * lanes, pieces, high)
    return channels * (band * pieces * run * lanes + kernels.WIDTH) + kernels.WIDTH


@dataclasses.dataclass
class _Linear:
    """A product or convolution: every channel a sum over its entries, at every position.

    Attributes:
      to: its first row; then channel by channel, position by position.
      channels: how many.
      positions: down and across.
      steps: between rows read for one position and the next, down and across.
      units: of every entry, its channel; sorted.
      inputs: of every entry, which input it reads.
      columns: of every entry, the row that it reads for the first position.
      weights: of every entry.
      reach: how many rows of one input are read for sums of a band's positions.
      bias: of every channel.
      lower: bound of the result.
      window: of the max pooling, down and across.
    """

    to: int
    channels: int
    positions: tuple[int, int]
    steps: tuple[int, int]
    units: np.ndarray
    inputs: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    reach: int
    bias: np.ndarray
    lower: float = -np.inf
    window: tuple[int, int] = (1, 1)

    @property
    def pooled(self) -> tuple[int, int]:
        return self.positions[0] // self.window[0], self.positions[1] // self.window[1]

    @property
    def size(self) -> int:
        return self.channels * self.pooled[0] * self.pooled[1]

    @property
    def multiply_adds(self) -> int:
        return len(self.weights) * self.positions[0] * self.positions[1]


class _Elementwise(NamedTuple):
    kind: int
    to: int
    code: int
    a: np.ndarray  # rows
    b: np.ndarray  # rows, or constants for SCALE, or none


class _Reduce(NamedTuple):
    to: int
    code: int
    pointers: np.ndarray
    sources: np.ndarray


_Operation = _Linear | _Elementwise | _Reduce


def lower(
    equations: Sequence[Equation],
    source: int,
    target: int,
    shapes: dict[int, Any],
    constants: dict[int, np.ndarray],
    consumers: Counter[int],
) -> Plan:
    """A part of a program as operations on rows.

    Args:
      equations: of the part; traced for ``EXAMPLES`` examples.
      source: the number of the value that it reads.
      target: of the value that it makes.
      shapes: of the program.
      constants: values that depend on no input.
      consumers: how often every value is read.

    Returns:
      The operations.

    Raises:
      NotCoveredError: rows can't do it.
    """
    lowering = _Lowering(shapes, constants, consumers)
    lowering.start(source)
    for equation in equations:
        lowering.equation(equation)
    return lowering.plan(target)


class _Lowering:
    def __init__(
        self, shapes: dict[int, Any], constants: dict[int, np.ndarray], consumers: Counter[int]
    ) -> None:
        self._shapes, self._constants, self._consumers = shapes, constants, consumers
        self._rows = 1
        self._fixed = {0}  # rows that are the same for every example
        self._values: dict[int, np.ndarray] = {}
        self._makers: dict[int, _Linear] = {}  # of values that are all of what it makes
        self._operations: list[_Operation] = []

    def start(self, source: int) -> None:
        shape = self._features(source)
        self._values[source] = self._new(int(np.prod(shape))).reshape(shape)

    def _features(self, number: int) -> tuple[int, ...]:
        aval = self._shapes[number]
        if aval.dtype != np.float32:
            raise NotCoveredError(f'numbers of type {aval.dtype}')
        if not aval.shape or aval.shape[0] != EXAMPLES:
            raise NotCoveredError('a value whose first axis is not the batch')
        return aval.shape[1:]

    def _new(self, count: int) -> np.ndarray:
        self._rows += count
        return np.arange(self._rows - count, self._rows)

    def _constant(self, operand: Operand) -> np.ndarray | None:
        if isinstance(operand, Constant):
            return np.asarray(operand.value, operand.value.dtype)
        return self._constants.get(operand)

    def _for_features(self, constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A constant operand, without its batch."""
        if constant.ndim == len(shape) + 1:
            if np.any(constant != constant[:1]):
                raise NotCoveredError('a constant that differs between examples')
            constant = constant[0]
        return np.broadcast_to(constant, shape)

    def equation(self, equation: Equation) -> None:
        name = equation.primitive.name
        if len(equation.outputs) != 1:
            raise NotCoveredError(name)
        (number,) = equation.outputs
        shape = self._features(number)
        if name in _MOVES or name == 'convert_element_type':
            self._move(equation, number, shape)
        elif name in _OF_TWO:
            self._pair(equation, number, shape)
        elif name in _OF_ONE or (name == 'integer_pow' and equation.params['y'] == 2):
            code = _OF_ONE.get(name, kernels.SQUARE)
            rows = self._batched(equation.inputs[0]).reshape(-1)
            self._elementwise(number, kernels.MAP, code, rows, np.zeros(0), shape)
        elif name == 'dot_general':
            self._product(equation, number)
        elif name == 'conv_general_dilated':
            self._convolution(equation, number)
        elif name in _REDUCTIONS:
            self._reduction(equation, number)
        else:
            raise NotCoveredError(name)
        if self._values[number].shape != shape:
            raise NotCoveredError(f'{name} along the batch')

    def _batched(self, operand: Operand) -> np.ndarray:
        if isinstance(operand, Constant) or operand not in self._values:
            raise NotCoveredError('a constant where an input is expected')
        return self._values[operand]

    # What only moves numbers.

    def _move(self, equation: Equation, number: int, shape: tuple[int, ...]) -> None:
        """Runs it on the row numbers, for two examples: so it is seen if it mixes them."""
        far = 1 << 29
        operands, params = [], equation.params
        for operand in equation.inputs:
            constant = self._constant(operand)
            if constant is None:
                rows = self._batched(operand)
                operands.append(np.stack([rows, rows + far]))
            elif constant.dtype == np.float32:
                operands.append(self._constant_rows(constant))
            else:
                operands.append(constant)
        if equation.primitive.name == 'convert_element_type':
            moved = operands[0]  # from float32 to float32: _features has checked
        else:
            if 'fill_value' in params:
                params = params | {'fill_value': -1}
            integers = [jnp.asarray(o, jnp.int32) for o in operands]
            moved = np.asarray(bind(equation, integers, params)[0], np.int64)
        rows, others = moved
        same = (rows == others) & np.isin(rows, list(self._fixed))
        if np.any((rows < 0) | (rows >= self._rows)) or not np.all((others == rows + far) | same):
            raise NotCoveredError(f'{equation.primitive.name} along the batch')
        self._values[number] = rows
        source = equation.inputs[0]
        if isinstance(source, int) and source in self._makers:
            self._pass_on(source, number)

    def _constant_rows(self, values: np.ndarray) -> np.ndarray:
        """Rows of these numbers, the same row for the same number."""
        unique, places = np.unique(values, return_inverse=True)
        rows = np.zeros(len(unique), np.int64)
        other = unique != 0
        rows[other] = self._new(int(other.sum()))
        if other.any():
            zeros = np.zeros(other.sum(), np.int64)
            add = _Elementwise(
                kernels.SCALE, int(rows[other][0]), kernels.ADD, zeros, unique[other]
            )
            self._operations.append(add)
            self._fixed.update(rows.tolist())
        return rows[places].reshape(values.shape)

    def _pass_on(self, source: int, number: int) -> None:
        """What makes a value makes the next as well, if nothing else reads it."""
        maker, rows = self._makers[source], self._values[number]
        if (
            self._consumers[source] == 1
            and rows.size == maker.size
            and np.array_equal(np.sort(rows, None), np.arange(maker.to, maker.to + maker.size))
        ):
            self._makers[number] = maker

    # Number by number.

    def _pair(self, equation: Equation, number: int, shape: tuple[int, ...]) -> None:
        name, (a, b) = equation.primitive.name, equation.inputs
        if self._constant(a) is not None and name in _COMMUTE:
            a, b = b, a
        constant = self._constant(b)
        if self._constant(a) is not None:
            values = self._for_features(np.asarray(self._constant(a)), shape)
            left = self._constant_rows(np.asarray(values, np.float32)).reshape(-1)
        else:
            assert isinstance(a, int)
            left = np.broadcast_to(self._batched(a), shape).reshape(-1)
        code = _OF_TWO[name]
        if constant is None:
            right = np.broadcast_to(self._batched(b), shape).reshape(-1)
            self._elementwise(number, kernels.PAIR, code, left, right, shape)
            return
        values = np.asarray(self._for_features(constant, shape), np.float32)
        if isinstance(a, int) and a in self._makers and self._fold(a, code, values):
            self._values[number] = self._values[a]
            self._makers[number] = self._makers[a]
            return
        self._elementwise(number, kernels.SCALE, code, left, values.reshape(-1), shape)

    def _fold(self, number: int, code: int, values: np.ndarray) -> bool:
        """Makes a constant operand a part of the product that comes before."""
        maker, rows = self._makers[number], self._values[number]
        if self._consumers[number] != 1 or values.shape != rows.shape:
            return False
        in_order = np.empty(maker.size, np.float32)
        in_order[rows.reshape(-1) - maker.to] = values.reshape(-1)
        ordered = in_order.reshape(maker.channels, -1)
        if not ordered.size or np.any(ordered != ordered[:, :1]):
            return False
        by_channel = ordered[:, 0]
        if code == kernels.MAX and np.all(by_channel == by_channel[0]):
            maker.lower = max(maker.lower, float(by_channel[0]))
            return True
        if maker.lower > -np.inf or code not in (
            kernels.ADD, kernels.SUB, kernels.MUL, kernels.DIV,
        ):  # fmt: skip
            return False
        if code in (kernels.ADD, kernels.SUB):
            maker.bias = maker.bias + (by_channel if code == kernels.ADD else -by_channel)
            return True
        with np.errstate(divide='ignore'):
            factor = by_channel if code == kernels.MUL else 1 / by_channel
        if not np.all(np.isfinite(factor)) or (maker.window != (1, 1) and np.any(factor < 0)):
            return False
        maker.bias = maker.bias * factor
        maker.weights = maker.weights * factor[maker.units]
        return True

    def _elementwise(
        self, number: int, kind: int, code: int, a: np.ndarray, b: np.ndarray, shape: Any
    ) -> None:
        rows = self._new(a.size)
        to = int(rows[0]) if rows.size else self._rows
        self._operations.append(_Elementwise(kind, to, code, a, b))
        self._values[number] = rows.reshape(shape)

    # Sums of products.

    def _weights(self, operand: Operand) -> np.ndarray:
        weights = self._constant(operand)
        if weights is None or weights.dtype != np.float32:
            raise NotCoveredError('a product of two values that depend on the input')
        return weights

    def _contiguous(self, grid: np.ndarray) -> int:
        """The first row of a grid in order: its own, or of a copy."""
        flat = grid.reshape(-1)
        if np.array_equal(flat, flat[0] + np.arange(flat.size)):
            return int(flat[0])
        rows = self._new(flat.size)
        pointers = np.arange(flat.size + 1)
        self._operations.append(_Reduce(int(rows[0]), kernels.ADD, pointers, flat))
        return int(rows[0])

    def _product(self, equation: Equation, number: int) -> None:
        (left, right), (left_batch, _) = equation.params['dimension_numbers']
        rows, weights = self._batched(equation.inputs[0]), self._weights(equation.inputs[1])
        if left_batch or 0 in left:
            raise NotCoveredError('dot_general along the batch')
        summed = [axis - 1 for axis in left]
        free = [axis for axis in range(rows.ndim) if axis not in summed]
        kept = [axis for axis in range(weights.ndim) if axis not in right]
        around = [rows.shape[axis] for axis in free]
        units = [weights.shape[axis] for axis in kept]
        positions, channels = int(np.prod(around)), int(np.prod(units))
        if not positions * channels * weights.size:
            raise NotCoveredError('an empty product')
        matrix = weights.transpose(*kept, *right).reshape(channels, -1)
        grid = rows.transpose(*summed, *free).reshape(-1, positions)
        entries = np.nonzero(matrix)
        if positions == 1:
            columns = grid[entries[1], 0]
        else:
            columns = self._contiguous(grid) + entries[1] * positions
        made = self._linear(number, channels, (1, positions), (0, 1), entries[0], entries[1],
                            columns, matrix[entries], kernels.BAND)  # fmt: skip
        self._values[number] = made.T.reshape(*around, *units)

    def _linear(
        self, number: int, channels: int, positions: tuple[int, int], steps: tuple[int, int],
        units: np.ndarray, inputs: np.ndarray, columns: np.ndarray, weights: np.ndarray, reach: int,
    ) -> np.ndarray:  # fmt: skip
        rows = self._new(channels * positions[0] * positions[1])
        bias = np.zeros(channels, np.float32)
        linear = _Linear(
            int(rows[0]), channels, positions, steps, units, inputs, columns, weights, reach, bias
        )
        self._operations.append(linear)
        self._makers[number] = linear
        return rows.reshape(channels, -1)

    def _convolution(self, equation: Equation, number: int) -> None:
        params = equation.params
        rows, weights = self._batched(equation.inputs[0]), self._weights(equation.inputs[1])
        inputs, kernel, outputs = params['dimension_numbers']
        strides, padding = list(params['window_strides']), list(params['padding'])
        dilation, groups = list(params['rhs_dilation']), params['feature_group_count']
        if inputs[0] != 0 or outputs[0] != 0 or params['batch_group_count'] != 1:
            raise NotCoveredError('a convolution along the batch')
        if len(strides) > 2 or max(params['lhs_dilation']) > 1 or np.min(padding) < 0:
            raise NotCoveredError('a convolution of more than two axes, transposed, or cropped')
        grid = rows.transpose([axis - 1 for axis in inputs[1:]])
        matrix = weights.transpose(kernel)
        while len(strides) < 2:
            grid, matrix = np.expand_dims(grid, 1), np.expand_dims(matrix, 2)
            strides.insert(0, 1)
            padding.insert(0, (0, 0))
            dilation.insert(0, 1)
        grid = np.pad(grid, [(0, 0), *padding])
        channels, features = matrix.shape[:2]
        _, high, wide = grid.shape
        positions = tuple(
            (size - (window - 1) * apart - 1) // stride + 1
            for size, window, apart, stride in zip(
                (high, wide), matrix.shape[2:], dilation, strides, strict=True
            )
        )
        if min(positions) < 1 or not channels * features:
            raise NotCoveredError('an empty convolution')
        entries = np.nonzero(matrix)
        units, inner, y, x = entries
        inner = inner + units // (channels // groups) * features
        columns = (inner * high + y * dilation[0]) * wide + x * dilation[1]
        columns = columns + self._contiguous(grid)
        down, across = (
            apart * (size - 1) for apart, size in zip(dilation, matrix.shape[2:], strict=True)
        )
        reach = (down + 1) * (across + kernels.BAND * strides[1])
        made = self._linear(number, channels, positions, (strides[0] * wide, strides[1]), units,
                            inner, columns, matrix[entries], reach)  # fmt: skip
        spatial = len(outputs) - 2
        made = made.reshape(channels, *positions[2 - spatial :])
        self._values[number] = made.transpose(np.argsort([axis - 1 for axis in outputs[1:]]))

    # Windows.

    def _reduction(self, equation: Equation, number: int) -> None:
        name, params = equation.primitive.name, equation.params
        rows = self._batched(equation.inputs[0])
        if 'axes' in params:
            if 0 in params['axes']:
                raise NotCoveredError(f'{name} along the batch')
            axes = [axis - 1 for axis in params['axes']]
            windows = np.moveaxis(rows, axes, range(-len(axes), 0))
            shape = windows.shape[: rows.ndim - len(axes)]
        else:
            window, strides = params['window_dimensions'], params['window_strides']
            padding = params['padding']
            if (window[0], strides[0], *padding[0]) != (1, 1, 0, 0) or np.min(padding) < 0:
                raise NotCoveredError(f'{name} along the batch')
            if max(*params['base_dilation'], *params['window_dilation']) > 1:
                raise NotCoveredError(f'{name} with dilation')
            source = equation.inputs[0]
            if name == 'reduce_window_max' and self._fold_pool(
                source, number, window[1:], strides[1:], padding
            ):
                return
            padded = np.pad(rows, padding[1:], constant_values=-1)
            if any(n < w for n, w in zip(padded.shape, window[1:], strict=True)):
                raise NotCoveredError('an empty result')
            windows = np.lib.stride_tricks.sliding_window_view(padded, window[1:])
            windows = windows[tuple(slice(None, None, stride) for stride in strides[1:])]
            shape = windows.shape[: rows.ndim]
        flat = windows.reshape(int(np.prod(shape)), -1)
        inside = flat >= 0
        if not flat.size or not inside.any(1).all():
            raise NotCoveredError('an empty window')
        pointers = np.concatenate([[0], np.cumsum(inside.sum(1))])
        made = self._new(len(flat))
        self._operations.append(_Reduce(int(made[0]), _REDUCTIONS[name], pointers, flat[inside]))
        self._values[number] = made.reshape(shape)

    def _fold_pool(
        self, source: Operand, number: int, window: Any, strides: Any, padding: Any
    ) -> bool:
        """Makes a max pooling a part of the convolution that comes before."""
        maker = self._makers.get(source) if isinstance(source, int) else None
        if (
            maker is None or self._consumers[source] != 1 or maker.window != (1, 1)  # type: ignore[index]
            or tuple(window) != tuple(strides) or np.any(padding)
        ):  # fmt: skip
            return False
        rows = self._values[source]  # type: ignore[index]
        padded = rows[
            tuple(slice(None, n // w * w) for n, w in zip(rows.shape, window, strict=True))
        ]
        down, across = maker.positions
        # Where every feature is: its channel, and its place among the positions.
        channel, y, x = np.unravel_index(padded - maker.to, (maker.channels, down, across))
        windows = np.lib.stride_tricks.sliding_window_view
        step = tuple(slice(None, None, w) for w in window)
        extents = [np.ptp(windows(v, window)[step], tuple(range(-len(window), 0))) + 1
                   for v in (channel, y, x)]  # fmt: skip
        high, wide = int(extents[1].max(initial=1)), int(extents[2].max(initial=1))
        first = tuple(v[step] for v in (channel, y, x))
        if (
            np.any(extents[0] != 1) or high * wide != int(np.prod(window))
            or np.any(first[1] % high) or np.any(first[2] % wide)
            or not padded.size
        ):  # fmt: skip
            return False
        pooled = down // high, across // wide
        if first[0].size != maker.channels * pooled[0] * pooled[1]:
            return False
        if self._rows == maker.to + maker.size:
            self._rows -= maker.size
            maker.window = high, wide
            self._rows += maker.size
        else:
            maker.window = high, wide
        self._values[number] = maker.to + np.ravel_multi_index(
            (first[0], first[1] // high, first[2] // wide), (maker.channels, *pooled)
        )
        self._makers[number] = maker
        return True

    # The tables.

    def plan(self, target: int) -> Plan:
        stores = self._batched(target).reshape(-1)
        tables = _Tables()
        for operation in self._operations:
            tables.add(operation)
        linears = [o for o in self._operations if isinstance(o, _Linear)]
        return Plan(
            np.asarray(tables.table, np.int64).reshape(-1, kernels.COLUMNS),
            np.concatenate([*tables.whole.parts, np.zeros(0)]).astype(np.int32),
            np.concatenate([*tables.floats.parts, np.zeros(0)]).astype(np.float32),
            stores.astype(np.int32),
            self._rows,
            sum(o.multiply_adds for o in linears),
        )


def _blocks(o: _Linear) -> int:
    """Into how many the inputs are divided, so that what one band reads of each stays in the cache.

    Not into so many that sums go to memory and back for a few weights each.
    """
    inputs = int(o.inputs.max(initial=0)) + 1
    bytes_read = 4 * kernels.WIDTH * o.reach * inputs
    most = len(o.weights) // (_WORTH_A_BLOCK * o.channels)
    return max(1, min(-(-bytes_read // _NEAREST), most, inputs))


class _Pool:
    """Arrays one after another."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self._size = 0

    def add(self, *arrays: Iterable[Any]) -> int:
        place = self._size
        for array in map(np.asarray, arrays):
            self.parts.append(array)
            self._size += array.size
        return place


class _Tables:
    def __init__(self) -> None:
        self.table: list[list[int]] = []
        self.whole, self.floats = _Pool(), _Pool()

    def add(self, operation: _Operation) -> None:
        row = self._row(operation)
        self.table.append([*row, *[0] * (kernels.COLUMNS - len(row))])

    def _row(self, operation: _Operation) -> list[int]:
        whole, floats = self.whole, self.floats
        if isinstance(operation, _Elementwise):
            b = floats if operation.kind == kernels.SCALE else whole
            return [
                operation.kind, operation.to, len(operation.a), operation.code,
                whole.add(operation.a), b.add(operation.b),
            ]  # fmt: skip
        if isinstance(operation, _Reduce):
            return [
                kernels.REDUCE, operation.to, len(operation.pointers) - 1, operation.code,
                whole.add(operation.pointers), whole.add(operation.sources),
            ]  # fmt: skip
        o = operation
        counts = np.bincount(o.units, minlength=o.channels)
        blocks = _blocks(o)
        places = o.inputs * blocks // (o.inputs.max(initial=0) + 1) * o.channels + o.units
        in_blocks = np.argsort(places, kind='stable')
        pointers = np.searchsorted(places[in_blocks], np.arange(blocks * o.channels + 1))
        order = np.argsort(counts, kind='stable')
        by_count = np.argsort(np.argsort(order)[o.units], kind='stable')
        down, across = o.positions
        # Neighbours that are read from neighbouring rows are one run; others are pieces.
        pieces, run = (1, across) if o.steps[1] == 1 else (across, 1)
        return [
            kernels.LINEAR, o.to, o.channels,
            whole.add(pointers), whole.add(o.columns[in_blocks]), floats.add(o.weights[in_blocks]),
            floats.add(o.bias, [o.lower]),
            down, pieces, run, *o.steps, *o.window,
            whole.add(order, [0], np.cumsum(counts[order])), whole.add(o.columns[by_count]),
            floats.add(o.weights[by_count]), blocks,
        ]  # fmt: skip
