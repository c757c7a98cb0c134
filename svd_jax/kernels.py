"""The compiled loop that runs sparse layers: numba, with explicit vectors.

A network is a table of operations on rows. A row is one number for every example of a block of the
batch: the batch is innermost, so a weight meets consecutive numbers, wherever the zeros are. The
tables are what :mod:`svd_jax.sparse` writes; this loop knows no network, and is compiled once.

The sums stay in registers, in vectors of 16: what LLVM's own vectorisation does not see.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.extending import models, register_model

WIDTH = 16

# Its own type does not know that the first argument is not passed.
intrinsic: Any = extending.intrinsic

# What an operation is: the first column of its row in the table.
LINEAR, REDUCE, PAIR, SCALE, MAP = range(5)

# What they do with two numbers (REDUCE, PAIR, and SCALE with a constant), or with one (MAP).
ADD, SUB, MUL, DIV, MAX, MIN = range(6)
ABS, EXP, LOG, LOGISTIC, NEG, RSQRT, SQRT, SQUARE, TANH = range(9)

# The columns of the table; what they mean is said where an operation reads them.
COLUMNS = 17


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__('vector')


_vector = _Vector()
_ir_vector = ir.VectorType(ir.FloatType(), WIDTH)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, _ir_vector)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _ir_vector.as_pointer())


def _broadcast(builder: Any, scalar: Any) -> Any:
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(ir.Constant(_ir_vector, ir.Undefined), scalar, zero)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(_ir_vector, ir.Undefined), mask)


@intrinsic
def _load(typing: Any, array: Any, at: Any) -> Any:
    """Sixteen numbers of a flat array."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=4)

    return _vector(array, types.intp), code


@intrinsic
def _store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Sixteen numbers to a flat array."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), code


@intrinsic
def _fill(typing: Any, scalar: Any) -> Any:
    """Sixteen times a number."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(builder, args[0])

    return _vector(types.float32), code


@intrinsic
def _multiply_add(typing: Any, total: Any, weight: Any, value: Any) -> Any:
    """``total + weight * value``, rounded once where the processor can."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, weight, value = args
        product = builder.fmul(_broadcast(builder, weight), value, flags=('contract',))
        return builder.fadd(total, product, flags=('contract',))

    return _vector(_vector, types.float32, _vector), code


@intrinsic
def _add(typing: Any, a: Any, b: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return _vector(_vector, _vector), code


@intrinsic
def _larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of two, NaN if one is."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_ir_vector, [_ir_vector, _ir_vector])
        name = f'llvm.maximum.v{WIDTH}f32'
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return _vector(_vector, _vector), code


@intrinsic
def _transpose(typing: Any, work: Any, to: Any, lanes: Any, x: Any, at: Any, features: Any) -> Any:
    """Sixteen features of sixteen examples, from examples in a row to features in a row."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        work, to, lanes, x, at, features = args

        def place(kind: Any, array: Any, start: Any, step: Any, i: int) -> Any:
            offset = builder.add(start, builder.mul(step, ir.Constant(step.type, i)))
            return _pointer(context, builder, kind, array, offset)

        vectors = [
            builder.load(place(signature.args[3], x, at, features, i), align=4)
            for i in range(WIDTH)
        ]
        places = range(WIDTH)
        step = WIDTH // 2
        while step:  # swaps two quarters of every square of this size
            first = [j if not j & step else WIDTH + j - step for j in places]
            second = [j + step if not j & step else WIDTH + j for j in places]
            for i in places:
                if not i & step:
                    pair = vectors[i], vectors[i + step]
                    vectors[i], vectors[i + step] = (
                        builder.shuffle_vector(
                            *pair, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), mask)
                        )
                        for mask in (first, second)
                    )
            step //= 2
        for i, vector in enumerate(vectors):
            builder.store(vector, place(signature.args[0], work, to, lanes, i), align=4)
        return context.get_dummy_value()

    n = types.intp
    return types.void(work, n, n, x, n, n), code


@njit(nogil=True)
def _read(work: Any, lanes: int, x: Any, features: int, begin: int, count: int) -> None:
    """Makes rows of ``count`` examples: feature 0 is row 1, and so on."""
    if lanes == 1:
        work[1 : 1 + features] = x[begin * features : (begin + 1) * features]
        return
    whole_features = features // WIDTH * WIDTH
    whole = count // WIDTH * WIDTH if lanes >= WIDTH else 0
    for b in range(0, whole, WIDTH):
        for f in range(0, whole_features, WIDTH):
            at = (begin + b) * features + f
            _transpose(work, (1 + f) * lanes + b, lanes, x, at, features)
        for f in range(whole_features, features):
            for i in range(b, b + WIDTH):
                work[(1 + f) * lanes + i] = x[(begin + i) * features + f]
    for f in range(features):
        for b in range(whole, count):
            work[(1 + f) * lanes + b] = x[(begin + b) * features + f]
        for b in range(count, lanes):
            work[(1 + f) * lanes + b] = 0


@njit(nogil=True, error_model='numpy')
def _of_two(code: int, a: Any, b: Any) -> Any:
    if code == ADD:
        return a + b
    if code == SUB:
        return a - b
    if code == MUL:
        return a * b
    if code == DIV:
        return a / b
    if code == MAX:
        return a if a > b or a != a else b
    return a if a < b or a != a else b


@njit(nogil=True, error_model='numpy')
def _of_one(code: int, a: Any) -> Any:
    one = np.float32(1)
    if code == TANH:
        return np.tanh(a)
    if code == LOGISTIC:
        return one / (one + np.exp(-a))
    if code == EXP:
        return np.exp(a)
    if code == SQUARE:
        return a * a
    if code == SQRT:
        return np.sqrt(a)
    if code == RSQRT:
        return one / np.sqrt(a)
    if code == ABS:
        return abs(a)
    if code == LOG:
        return np.log(a)
    return -a


@njit(nogil=True)
def _sums(
    work: Any, to: int, start: int, n: int, lanes: int,
    columns: Any, weights: Any, first: int, last: int, bias: Any, lower: Any,
) -> None:  # fmt: skip
    """Sums of weights times rows, for ``n`` consecutive numbers, rounded up to whole vectors."""
    at = 0
    while at + 4 * WIDTH <= n:
        a = b = c = d = _fill(bias)
        for k in range(first, last):
            w, x = weights[k], start + at + columns[k] * lanes
            a = _multiply_add(a, w, _load(work, x))
            b = _multiply_add(b, w, _load(work, x + WIDTH))
            c = _multiply_add(c, w, _load(work, x + 2 * WIDTH))
            d = _multiply_add(d, w, _load(work, x + 3 * WIDTH))
        low = _fill(lower)
        _store(work, to + at, _larger(a, low))
        _store(work, to + at + WIDTH, _larger(b, low))
        _store(work, to + at + 2 * WIDTH, _larger(c, low))
        _store(work, to + at + 3 * WIDTH, _larger(d, low))
        at += 4 * WIDTH
    while at < n:
        # One vector: four sums of their own, so that none waits for another.
        here = start + at
        a = _fill(bias)
        b = c = d = _fill(np.float32(0))
        k = first
        while k + 4 <= last:
            a = _multiply_add(a, weights[k], _load(work, here + columns[k] * lanes))
            b = _multiply_add(b, weights[k + 1], _load(work, here + columns[k + 1] * lanes))
            c = _multiply_add(c, weights[k + 2], _load(work, here + columns[k + 2] * lanes))
            d = _multiply_add(d, weights[k + 3], _load(work, here + columns[k + 3] * lanes))
            k += 4
        while k < last:
            a = _multiply_add(a, weights[k], _load(work, here + columns[k] * lanes))
            k += 1
        _store(work, to + at, _larger(_add(_add(a, b), _add(c, d)), _fill(lower)))
        at += WIDTH


@njit(nogil=True)
def _single(work: Any, op: Any, whole: Any, floats: Any) -> None:
    """A product for one example.

    Channels of few entries first: loops of one length after the other, so their ends are predicted.
    """
    channels, biases, order = op[2], floats[op[6] :], whole[op[14] :]
    pointers, columns, weights = order[channels:], whole[op[15] :], floats[op[16] :]
    results, lower = work[op[1] :], biases[channels]
    first = np.uintp(0)
    for place in range(channels):
        # Unsigned, for then no index is asked whether it counts from the end.
        channel, last = np.uintp(order[place]), np.uintp(pointers[place + 1])
        total = biases[channel]
        for k in range(first, last):
            total += weights[k] * work[np.uintp(columns[k])]
        results[channel] = _of_two(MAX, total, lower)
        first = last


@njit(nogil=True)
def _linear(work: Any, lanes: int, scratch: int, op: Any, whole: Any, floats: Any) -> None:
    """A product or convolution with sparse weights, and the pooling and rectification after it.

    A channel at a time, a row of windows at a time: it is pooled while it is in the cache.
    """
    if lanes == 1 and op[7] * op[8] * op[9] == 1:
        _single(work, op, whole, floats)
        return
    to, channels, pointers, columns = op[1], op[2], whole[op[3] :], whole[op[4] :]
    weights, biases = floats[op[5] :], floats[op[6] :]
    rows, pieces, run, row_step, piece_step = op[7], op[8], op[9], op[10], op[11]
    high, wide = op[12], op[13]
    lower = biases[channels]
    width, n = pieces * run, run * lanes
    direct = n % WIDTH == 0 and high == 1 and wide == 1
    pooled_rows, pooled_width = rows // high, width // wide
    for channel in range(channels):
        first, last, bias = pointers[channel], pointers[channel + 1], biases[channel]
        for row in range(pooled_rows):
            out = (to + (channel * pooled_rows + row) * pooled_width) * lanes
            for inner in range(high):
                for piece in range(pieces):
                    start = ((row * high + inner) * row_step + piece * piece_step) * lanes
                    place = (inner * width + piece * run) * lanes
                    place += out if direct else scratch
                    _sums(work, place, start, n, lanes, columns, weights, first, last, bias, lower)
            if direct:
                continue
            for column in range(pooled_width):
                source, target = scratch + column * wide * lanes, out + column * lanes
                if lanes % WIDTH == 0:
                    for b in range(0, lanes, WIDTH):
                        best = _load(work, source + b)
                        for y in range(high):
                            for x in range(wide):
                                there = source + (y * width + x) * lanes + b
                                best = _larger(best, _load(work, there))
                        _store(work, target + b, best)
                else:
                    for b in range(source, source + lanes):
                        top = work[b]
                        for y in range(high):
                            for x in range(wide):
                                top = _of_two(MAX, top, work[b + (y * width + x) * lanes])
                        work[target + b - source] = top


@njit(nogil=True)
def _elementwise(work: Any, lanes: int, op: Any, whole: Any, floats: Any) -> None:
    kind, to, count, code = op[0], op[1], op[2], op[3]
    for row in range(count):
        out = (to + row) * lanes
        a = whole[op[4] + row] * lanes
        if kind == PAIR:
            b = whole[op[5] + row] * lanes
            for i in range(lanes):
                work[out + i] = _of_two(code, work[a + i], work[b + i])
        elif kind == SCALE:
            constant = floats[op[5] + row]
            for i in range(lanes):
                work[out + i] = _of_two(code, work[a + i], constant)
        else:
            for i in range(lanes):
                work[out + i] = _of_one(code, work[a + i])


@njit(nogil=True)
def _reduce(work: Any, lanes: int, op: Any, whole: Any) -> None:
    to, count, code, pointers, sources = op[1], op[2], op[3], whole[op[4] :], whole[op[5] :]
    for row in range(count):
        out, first = (to + row) * lanes, sources[pointers[row]] * lanes
        for i in range(lanes):
            work[out + i] = work[first + i]
        for k in range(pointers[row] + 1, pointers[row + 1]):
            source = sources[k] * lanes
            for i in range(lanes):
                work[out + i] = _of_two(code, work[out + i], work[source + i])


_floats, _whole, _n = types.float32[::1], types.int32[::1], types.intp
# One signature, so it is compiled once: inputs that may not be written to suit it as well.
_SIGNATURE = types.void(
    types.Array(types.float32, 1, 'C', readonly=True), _n, types.float32[:, ::1], _floats,
    _n, _n, _n, types.int64[:, ::1], _whole, _floats, _whole, _n,
)  # fmt: skip


@functools.cache
def compiled() -> Callable[..., None]:
    """:func:`run`, compiled when it is first asked for: that takes seconds."""
    return njit(_SIGNATURE, nogil=True)(run)


def run(
    x: Any, features: int, out: Any, work: Any, lanes: int, first: int, last: int,
    table: Any, whole: Any, floats: Any, stores: Any, scratch: int,
) -> None:  # fmt: skip
    """Runs a table on the examples ``first`` to ``last``, a block of ``lanes`` at a time.

    Args:
      x: inputs, example by example, flat, float32.
      features: of an example.
      out: results, (batch, features), float32, written.
      work: the rows, flat, float32, with room for ``scratch`` and a vector beyond.
      lanes: examples in a block.
      first: example.
      last: example, not included.
      table: operations, (operations, COLUMNS).
      whole: the whole numbers that they refer to: rows, pointers.
      floats: the weights and constants that they refer to.
      stores: rows of the result.
      scratch: the first row that no operation owns.
    """
    work[:lanes] = 0  # row 0 is all zeros: padding reads it
    for begin in range(first, last, lanes):
        count = min(lanes, last - begin)
        _read(work, lanes, x, features, begin, count)
        for at in range(table.shape[0]):
            op = table[at]
            if op[0] == LINEAR:
                _linear(work, lanes, scratch * lanes, op, whole, floats)
            elif op[0] == REDUCE:
                _reduce(work, lanes, op, whole)
            else:
                _elementwise(work, lanes, op, whole, floats)
        for k in range(stores.shape[0]):
            row = stores[k] * lanes
            for b in range(count):
                out[begin + b, k] = work[row + b]
