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
# Vectors of a band: what is summed before the next rows of windows are.
BAND = 8

# Its own type does not know that the first argument is not passed.
intrinsic: Any = extending.intrinsic

# What an operation is: the first column of its row in the table.
LINEAR, REDUCE, PAIR, SCALE, MAP = range(5)

# What they do with two numbers (REDUCE, PAIR, and SCALE with a constant), or with one (MAP).
ADD, SUB, MUL, DIV, MAX, MIN = range(6)
ABS, EXP, LOG, LOGISTIC, NEG, RSQRT, SQRT, SQUARE, TANH = range(9)

# The columns of the table; what they mean is said where an operation reads them.
COLUMNS = 18


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


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    kind = ir.FunctionType(_ir_vector, [_ir_vector, _ir_vector])
    name = f'llvm.maximum.v{WIDTH}f32'
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (a, b))


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
        return _maximum(builder, *args)

    return _vector(_vector, _vector), code


# What a function that sums is given.
_SUMS_OF = (
    'work', 'reads', 'start', 'writes', 'to', 'at', 'lanes', 'columns', 'weights', 'first', 'last',
    'bias', 'lower', 'fresh',
)  # fmt: skip


def _sums_of(count: int) -> Any:
    """A function that sums weights times rows for so many vectors.

    They stay in registers, and every weight is read once for all of them. The vectors lie at
    ``start + reads[at]`` and so on, and the sums at ``to + writes[at]``; if they are not ``fresh``,
    they are added to what is there.
    """

    @intrinsic
    def sums(
        typing: Any, work: Any, reads: Any, start: Any, writes: Any, to: Any, at: Any, lanes: Any,
        columns: Any, weights: Any, first: Any, last: Any, bias: Any, lower: Any, fresh: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = dict(zip(_SUMS_OF, signature.args, strict=True))
            given = dict(zip(_SUMS_OF, args, strict=True))

            def element(name: str, at: Any) -> Any:
                data = context.make_array(kinds[name])(context, builder, given[name]).data
                return builder.load(builder.gep(data, [at]))

            def places(name: str, start: Any) -> list[Any]:
                offset = (builder.add(given['at'], ir.Constant(start.type, i)) for i in vectors)
                return [builder.add(start, element(name, place)) for place in offset]

            def pointer(place: Any) -> Any:
                return _pointer(context, builder, kinds['work'], given['work'], place)

            vectors = range(count)
            sources, targets = places('reads', given['start']), places('writes', given['to'])
            bias, lower = (_broadcast(builder, given[name]) for name in ('bias', 'lower'))
            totals = [cgutils.alloca_once(builder, _ir_vector) for _ in vectors]
            for total, target in zip(totals, targets, strict=True):
                before = builder.load(pointer(target), align=4)
                builder.store(builder.select(given['fresh'], bias, before), total)
            with cgutils.for_range_slice(
                builder, given['first'], given['last'], ir.Constant(given['first'].type, 1)
            ) as (k, _):
                column = builder.sext(element('columns', k), given['lanes'].type)
                offset = builder.mul(column, given['lanes'])
                weight = _broadcast(builder, element('weights', k))
                for total, source in zip(totals, sources, strict=True):
                    value = builder.load(pointer(builder.add(source, offset)), align=4)
                    product = builder.fmul(weight, value, flags=('contract',))
                    added = builder.fadd(builder.load(total), product, flags=('contract',))
                    builder.store(added, total)
            for total, target in zip(totals, targets, strict=True):
                largest = _maximum(builder, builder.load(total), lower)
                builder.store(largest, pointer(target), align=4)
            return context.get_dummy_value()

        n = types.intp
        return types.void(
            work, reads, n, writes, n, n, n, columns, weights, n, n,
            types.float32, types.float32, types.boolean,
        ), code  # fmt: skip

    return sums


_four, _two = map(_sums_of, (4, 2))


@intrinsic
def _transpose(
    typing: Any, to: Any, first: Any, step: Any, of: Any, first_of: Any, step_of: Any, count: Any
) -> Any:
    """Sixteen vectors of an array, a step apart, to such of another: first numbers first.

    If there are fewer, the last of them once more.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def places(argument: int, numbers: list[Any]) -> list[Any]:
            kind, (array, first, step) = signature.args[argument], args[argument : argument + 3]
            return [
                _pointer(context, builder, kind, array, builder.add(first, builder.mul(step, i)))
                for i in numbers
            ]

        each = [ir.Constant(args[2].type, i) for i in range(WIDTH)]
        last = builder.sub(args[6], each[1])
        there = [builder.select(builder.icmp_signed('<', i, last), i, last) for i in each]
        sources = places(3, there)
        vectors = [builder.load(source, align=4) for source in sources]
        numbers = range(WIDTH)
        half = WIDTH // 2
        while half:  # swaps two quarters of every square of this size
            first = [j if not j & half else WIDTH + j - half for j in numbers]
            second = [j + half if not j & half else WIDTH + j for j in numbers]
            for i in numbers:
                if not i & half:
                    pair = vectors[i], vectors[i + half]
                    vectors[i], vectors[i + half] = (
                        builder.shuffle_vector(
                            *pair, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), mask)
                        )
                        for mask in (first, second)
                    )
            half //= 2
        for vector, target in zip(vectors, places(0, each), strict=True):
            builder.store(vector, target, align=4)
        return context.get_dummy_value()

    n = types.intp
    return types.void(to, n, n, of, n, n, n), code


@njit(nogil=True)
def _read(work: Any, lanes: int, x: Any, features: int, begin: int, count: int) -> None:
    """Makes rows of ``count`` examples: feature 0 is row 1, and so on.

    Where there are more lanes, what is beyond is the last example once more.
    """
    vectors = features // WIDTH * WIDTH
    if lanes == 1:  # an assignment of slices would take seconds to compile
        at = begin * features
        for f in range(0, vectors, WIDTH):
            _store(work, 1 + f, _load(x, at + f))
        for f in range(vectors, features):
            work[1 + f] = x[at + f]
        return
    done = 0
    if lanes >= WIDTH:
        done = vectors
        for b in range(0, lanes, WIDTH):
            there = min(WIDTH, count - b)
            for f in range(0, vectors, WIDTH):
                at = (begin + b) * features + f
                _transpose(work, (1 + f) * lanes + b, lanes, x, at, features, there)
    for b in range(lanes):
        at = (begin + min(b, count - 1)) * features
        for f in range(done, features):
            work[(1 + f) * lanes + b] = x[at + f]


@njit(nogil=True)
def _write(work: Any, lanes: int, out: Any, stores: Any, begin: int, count: int) -> None:
    """Makes ``count`` examples of rows: feature 0 is row ``stores[0]``, and so on."""
    features = stores.shape[0]
    if lanes < WIDTH:
        for k in range(features):
            for b in range(count):
                out[begin + b, k] = work[stores[k] * lanes + b]
        return
    whole = count // WIDTH * WIDTH
    feature = 0
    while feature < features:
        step = stores[feature + 1] - stores[feature] if feature + 1 < features else 0
        last = feature + 1
        while last < min(feature + WIDTH, features) and stores[last] - stores[last - 1] == step:
            last += 1
        done = 0
        if last - feature == WIDTH:  # rows at equal distances
            done = whole
            for b in range(0, whole, WIDTH):
                at, row = (begin + b) * features + feature, stores[feature] * lanes + b
                _transpose(out, at, features, work, row, step * lanes, WIDTH)
        for k in range(feature, last):
            for b in range(done, count):
                out[begin + b, k] = work[stores[k] * lanes + b]
        feature = last


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
def _one(
    work: Any, here: int, there: int, lanes: int,
    columns: Any, weights: Any, first: int, last: int, bias: Any, lower: Any, fresh: bool,
) -> None:  # fmt: skip
    """The same for one vector, in four sums of their own, so that none waits for another."""
    a = _fill(bias) if fresh else _load(work, there)
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
    _store(work, there, _larger(_add(_add(a, b), _add(c, d)), _fill(lower)))


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


def band_of(n: int, pieces: int, high: int) -> int:
    """Rows of windows to take at a time: ``BAND`` vectors, or what is pooled into one row."""
    vectors = pieces * ((n + WIDTH - 1) // WIDTH)
    return high * max(1, BAND // (vectors * high))


_band_of = njit(nogil=True)(band_of)


@njit(nogil=True)
def _band(
    work: Any, lanes: int, op: Any, whole: Any, floats: Any,
    reads: Any, start: int, writes: Any, to: int, stride: int, vectors: int,
) -> None:  # fmt: skip
    """The sums of all channels for a band of rows.

    Four vectors at a time, and of these, a few inputs at a time: what they read stays in the
    nearest cache while one channel after the other reads it.
    """
    channels, pointers, columns = op[2], whole[op[3] :], whole[op[4] :]
    weights, biases, blocks = floats[op[5] :], floats[op[6] :], op[17]
    at = 0
    while at < vectors:
        left = vectors - at
        count = 4 if left >= 4 else 2 if left >= 2 else 1
        for block in range(blocks):
            fresh, lower = block == 0, np.float32(-np.inf)
            if block == blocks - 1:
                lower = biases[channels]
            for channel in range(channels):
                entry = block * channels + channel
                first, last, bias = pointers[entry], pointers[entry + 1], biases[channel]
                place = to + channel * stride
                if count == 4:
                    _four(work, reads, start, writes, place, at, lanes, columns, weights, first,
                          last, bias, lower, fresh)  # fmt: skip
                elif count == 2:
                    _two(work, reads, start, writes, place, at, lanes, columns, weights, first,
                         last, bias, lower, fresh)  # fmt: skip
                else:
                    _one(work, start + reads[at], place + writes[at], lanes, columns, weights,
                         first, last, bias, lower, fresh)  # fmt: skip
        at += count


@njit(nogil=True)
def _pool(
    work: Any, lanes: int, source: int, target: int,
    rows: int, columns: int, width: int, high: int, wide: int,
) -> None:  # fmt: skip
    """Maxima of windows of a channel, without overlap, from rows of a width."""
    end = target + rows * columns * lanes
    for row in range(rows):
        start, to = source + row * high * width * lanes, target + row * columns * lanes
        if high > 1:  # down first, in the topmost row
            below, at = start + width * lanes, start
            # What a vector reaches beyond is in the rows below, where it was read before.
            while at < below and at + WIDTH <= below + (high - 1) * width * lanes:
                best = _load(work, at)
                for y in range(1, high):
                    best = _larger(best, _load(work, at + y * width * lanes))
                _store(work, at, best)
                at += WIDTH
            for rest in range(at, below):
                for y in range(1, high):
                    work[rest] = _of_two(MAX, work[rest], work[rest + y * width * lanes])
        for column in range(columns):
            here, there, b = start + column * wide * lanes, to + column * lanes, 0
            # What it reaches beyond is in the next columns and rows, and written later.
            while lanes > 1 and b < lanes and there + b + WIDTH <= end:
                best = _load(work, here + b)
                for x in range(1, wide):
                    best = _larger(best, _load(work, here + x * lanes + b))
                _store(work, there + b, best)
                b += WIDTH
            for rest in range(b, lanes):
                top = work[here + rest]
                for x in range(1, wide):
                    top = _of_two(MAX, top, work[here + x * lanes + rest])
                work[there + rest] = top


@njit(nogil=True)
def _linear(
    work: Any, lanes: int, scratch: int, op: Any, whole: Any, floats: Any, places: Any
) -> None:
    """A product or convolution with sparse weights, and the pooling and rectification after it.

    A band of rows of windows at a time: it is pooled while it is in the cache.
    """
    if lanes == 1 and op[7] * op[8] * op[9] == 1:
        _single(work, op, whole, floats)
        return
    to, channels, rows, pieces, run = op[1], op[2], op[7], op[8], op[9]
    row_step, piece_step, high, wide = op[10], op[11], op[12], op[13]
    width, n = pieces * run, run * lanes
    pooled_rows, pooled_width = rows // high, width // wide
    direct = n % WIDTH == 0 and high == 1 and wide == 1
    band, per = _band_of(n, pieces, high), (n + WIDTH - 1) // WIDTH
    # Where the vectors of a band are, in rows and pieces.
    reads, writes = places[0], places[1]
    at = 0
    for row in range(band):
        for piece in range(pieces):
            for vector in range(per):
                read = (row * row_step + piece * piece_step) * lanes
                reads[at] = read + vector * WIDTH
                writes[at] = (row * width + piece * run) * lanes + vector * WIDTH
                at += 1
    for top in range(0, pooled_rows * high, band):
        tall = min(band, pooled_rows * high - top)
        start, vectors = top * row_step * lanes, tall * pieces * per
        if direct:
            place, stride = (to + top * width) * lanes, rows * width * lanes
        else:
            # A vector more: the last one of a channel may reach beyond it.
            place, stride = scratch, band * width * lanes + WIDTH
        _band(work, lanes, op, whole, floats, reads, start, writes, place, stride, vectors)
        if not direct:
            for channel in range(channels):
                out = (to + (channel * pooled_rows + top // high) * pooled_width) * lanes
                # Numbers to the right of the last whole window are in no window.
                _pool(work, lanes, place + channel * stride, out, tall // high, pooled_width,
                      width, high, wide)  # fmt: skip


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
    types.int64[:, ::1], types.int64[::1], _n, _n,
    types.int64[:, ::1], _whole, _floats, _whole, _n,
)  # fmt: skip


@functools.cache
def compiled() -> Callable[..., None]:
    """:func:`run`, compiled when it is first asked for: that takes seconds."""
    return njit(_SIGNATURE, nogil=True)(run)


def run(
    x: Any, features: int, out: Any, work: Any, places: Any, blocks: Any, first: int, last: int,
    table: Any, whole: Any, floats: Any, stores: Any, scratch: int,
) -> None:  # fmt: skip
    """Runs a table on the examples ``first`` to ``last``, a block at a time.

    Args:
      x: inputs, example by example, flat, float32.
      features: of an example.
      out: results, (batch, features), float32, written.
      work: the rows, flat, float32, with room for ``scratch`` and a vector beyond.
      places: where the vectors of a band are, (2, vectors), written.
      blocks: the examples of every block; of the last one, some may not be there.
      first: example.
      last: example, not included.
      table: operations, (operations, COLUMNS).
      whole: the whole numbers that they refer to: rows, pointers.
      floats: the weights and constants that they refer to.
      stores: rows of the result.
      scratch: the first row that no operation owns.
    """
    begin = first
    for lanes in blocks:
        count = min(lanes, last - begin)
        work[:lanes] = 0  # row 0 is all zeros: padding reads it
        _read(work, lanes, x, features, begin, count)
        for at in range(table.shape[0]):
            op = table[at]
            if op[0] == LINEAR:
                _linear(work, lanes, scratch * lanes, op, whole, floats, places)
            elif op[0] == REDUCE:
                _reduce(work, lanes, op, whole)
            else:
                _elementwise(work, lanes, op, whole, floats)
        _write(work, lanes, out, stores, begin, count)
        begin += count
