"""The file format ``.svd``: a tree of arrays, sparse ones small.

docs/format.md describes it byte by byte. Nothing in a file is executed, what it claims is checked
before it is believed, and it is read without knowing the model.
"""

import contextlib
import math
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from svd_jax import arrays, convention, quantise, tree
from svd_jax.entropy import Coder, Reader, Writer

PyTree = Any

MAGIC = b'SVD'
VERSION = 2

# In the order of their numbers in the file.
_DTYPES = [
    np.dtype(name)
    for name in (
        'float32', ml_dtypes.bfloat16, 'float16', 'float64', 'bool',
        'int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64',
    )
]  # fmt: skip
_DICT, _LIST, _TUPLE, _ARRAY = range(4)
_EXACT, _QUANTISED = range(2)
_DEEPEST, _MOST_AXES, _LONGEST = 64, 32, 2**40

# Steps to the largest number: more than float32 tells apart, and it stays exact.
_MOST_LEVELS = 2**30

# Where bits= looks for the tolerance, and in how many steps.
_TOLERANCES = 2.0**-12, 8.0
_BISECTIONS = 14

_LARGEST_HEADER = 2**20
MOST_BYTES = 2**32  # that arrays take in memory, unless one says otherwise

# What headers often hold, for deflate to refer to.
_PHRASES = (
    b'\x03var\x04mean\x05scale\x09embedding\x06params\x0bbatch_stats\x0bLayerNorm_0\x0bBatchNorm_0'
    b'\x06Conv_1\x00\x02\x04bias\x03\x00\x01\x07Dense_1\x00\x02\x06kernel\x03\x00\x04\x03\x03\x04bias'
    b'\x00\x04\x06Conv_0\x00\x02\x04bias\x03\x00\x01\x06kernel\x03\x00\x04\x05\x05'
    b'\x00\x03\x07Dense_0\x00\x02\x04bias\x03\x00\x01\x06kernel\x03\x00\x02'
)


class SvdFormatError(ValueError):
    """A file is not a ``.svd`` file, damaged, or of another version."""


class Leaf(NamedTuple):
    """An array in a file; ``code``: of the step of its levels, None where it is exact."""

    shape: tuple[int, ...]
    dtype: np.dtype
    code: int | None

    @property
    def step(self) -> float | None:
        """What its values are multiples of."""
        return None if self.code is None else quantise.step(self.code)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    tolerance: float | None = None,
    bits: float | None = None,
    threshold: float = 3.0,
) -> int:
    """Writes a tree of arrays to a ``.svd`` file.

    Args:
      path: of the file; replaced only once all is written.
      params: a sparsified or dense tree: nested dicts, lists and tuples of arrays. Of a variational
        tree, what :func:`svd_jax.sparsify` leaves is written.
      tolerance: None: every bit is kept. A number: weights are rounded, by errors of about so many
        of their own posterior standard deviations, and a bias beside them more finely; takes a
        variational tree. 0.1 is hardly felt, 0.5 is.
      bits: None, or what the file may take for each weight that is kept, in bits: the smallest
        tolerance that does it is found.
      threshold: as for :func:`svd_jax.sparsify`.

    Returns:
      The bytes of the file.

    Raises:
      ValueError: the tree holds what is no array, or an array of a type that the format does not
        know, or more arrays, axes or levels than it has room for; ``tolerance`` is not above 0, or
        there is no posterior to measure it by, or a weight is not finite; both ``tolerance`` and
        ``bits`` are given, or no tolerance makes so few bits.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> import svd_jax as svd
      >>> kernel = np.zeros((300, 100), np.float32)
      >>> kernel[5, 7] = 0.5
      >>> path = os.path.join(tempfile.mkdtemp(), 'small.svd')
      >>> svd.save(path, {'Dense_0': {'kernel': kernel}}) < 100
      True
      >>> bool(np.all(svd.load(path)['Dense_0']['kernel'] == kernel))
      True
    """
    if tolerance is not None and bits is not None:
        raise ValueError('tolerance and bits are two ways to say the same: pass one of them')
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f'tolerance must be above 0, got {tolerance}')
    variational = any(weight.randoms for weight in convention.weights(params))
    if not variational and (tolerance is not None or bits is not None):
        raise ValueError(
            'tolerance and bits need the posterior: pass the variational tree, before svd.sparsify'
        )
    sparse = tree.sparsify(params, threshold) if variational else params
    if bits is not None:
        data = _encode_in(params, sparse, bits)
    else:
        data = _encode(sparse, {} if tolerance is None else dict(_steps(params, sparse, tolerance)))
    _replace(Path(path), data)
    return len(data)


def _encode(sparse: PyTree, steps: Mapping[str, Any]) -> bytes:
    """The file; with step and levels of those arrays that are quantised."""
    header, writer = bytearray(), Writer()
    # The order of the leaves in the header is that of their contents.
    for leaf, array, levels in _describe(sparse, steps, header):
        code_array(writer, leaf, array, levels)
    if len(header) >= _LARGEST_HEADER:
        raise ValueError(
            f'names and shapes take {len(header):,} bytes, a file has room for less than '
            f'{_LARGEST_HEADER:,}: put more into each array'
        )
    packed = _deflate(bytes(header))
    data = MAGIC + bytes([VERSION]) + _number(len(packed)) + packed + writer.finish()
    return data + zlib.crc32(data).to_bytes(4, 'little')


def _encode_in(params: PyTree, sparse: PyTree, bits: float) -> bytes:
    """The file of the smallest tolerance that takes no more bits a weight, found by bisection."""
    kept = sum(int(np.count_nonzero(weight.values)) for weight in convention.weights(sparse))
    low, high = _TOLERANCES
    best = None
    for _ in range(_BISECTIONS):
        tolerance = math.sqrt(low * high)
        data = _encode(sparse, dict(_steps(params, sparse, tolerance)))
        if 8 * len(data) <= bits * kept:
            best, high = data, tolerance
        else:
            low = tolerance
    if best is None:
        raise ValueError(
            f'no tolerance makes so few bits as {bits} a weight: ask for more than '
            f'{8 * len(data) / max(kept, 1):.2f}'
        )
    return best


def load(path: str | os.PathLike[str], *, max_bytes: int = MOST_BYTES) -> PyTree:
    """Reads a tree of arrays from a ``.svd`` file.

    Args:
      path: of the file.
      max_bytes: that the arrays may take; checked before any is made.

    Returns:
      Nested dicts, lists and tuples of NumPy arrays, which any Flax model of that structure takes
      as its parameters.

    Raises:
      SvdFormatError: it is not such a file, damaged, of another version, or larger than allowed.
      OSError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        return _decode(Path(path).read_bytes(), max_bytes)
    except (SvdFormatError, OSError, KeyboardInterrupt, SystemExit, MemoryError) as error:
        if isinstance(error, SvdFormatError):
            raise SvdFormatError(f'{name}: {error}') from error
        raise
    except BaseException as error:  # the coder is compiled, and panics are no Exceptions
        raise SvdFormatError(f'{name} is damaged ({error})') from error


class Opened(NamedTuple):
    """A file whose checksum and header are sound.

    Attributes:
      skeleton: the tree, with descriptions of its arrays.
      header_bytes: what that takes in the file.
      contents: the arrays, coded.
    """

    skeleton: Any
    header_bytes: int
    contents: memoryview


def opened(data: bytes, max_bytes: int = MOST_BYTES) -> Opened:
    """Checks a file before any array is made.

    Raises:
      SvdFormatError: see :func:`load`.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise SvdFormatError('not an .svd file')
    if len(data) < 9 or zlib.crc32(memoryview(data)[:-4]) != int.from_bytes(data[-4:], 'little'):
        raise SvdFormatError('damaged or cut off: its checksum does not match')
    if data[3] != VERSION:
        remedy = 'upgrade svd_jax' if data[3] > VERSION else 'save the network again'
        raise SvdFormatError(f'of format {data[3]}, this version reads {VERSION}: {remedy}')
    outer = _Bytes(memoryview(data)[4:-4])
    packed = outer.take(outer.number())
    header = _Bytes(_inflate(packed))
    skeleton = _skeleton(header, 0)
    if header.rest():
        raise SvdFormatError('damaged: its header is longer than what it describes')
    needed = sum(leaf.nbytes for leaf in leaves(skeleton))
    if needed > max_bytes:
        raise SvdFormatError(
            f'its arrays take {needed:,} bytes: pass max_bytes= to allow more than {max_bytes:,}; '
            'on the command line, --max-bytes before the command'
        )
    return Opened(skeleton, len(packed), memoryview(outer.rest()))


def _decode(data: bytes, max_bytes: int) -> PyTree:
    skeleton, _, contents = opened(data, max_bytes)
    reader = Reader(contents)
    del data, contents  # the reader has a copy

    def filled(node: Any) -> Any:
        if isinstance(node, Leaf):
            return code_array(reader, node, None, None)
        if isinstance(node, dict):
            return {key: filled(child) for key, child in node.items()}
        return type(node)(map(filled, node))

    return filled(skeleton)


def code_array(
    coder: Coder, leaf: Leaf, array: np.ndarray | None, levels: np.ndarray | None
) -> np.ndarray:
    """Writes or reads an array."""
    if leaf.step is None:
        return arrays.exact(coder, array, leaf.shape, leaf.dtype)
    result = np.zeros(leaf.shape, leaf.dtype)
    mask, entries = arrays.quantised(coder, levels, leaf.shape)
    result[mask] = quantise.values(entries, leaf.step, leaf.dtype)
    return result


# What is kept of a variational tree.


def _steps(params: PyTree, sparse: PyTree, tolerance: float) -> Iterator[tuple[str, Any]]:
    """Step and levels of every array that is quantised, by path."""
    for path, dtype, code, levels in _rounded(params, sparse, tolerance):
        # Next to its type's largest number, a value may be rounded beyond it.
        if np.all(np.isfinite(quantise.values(levels, quantise.step(code), dtype))):
            yield path, (code, levels)


def _rounded(
    params: PyTree, sparse: PyTree, tolerance: float
) -> Iterator[tuple[str, np.dtype, int, np.ndarray]]:
    """Path, type, step and levels of every array that may be quantised."""
    kept = {weight.path: np.asarray(weight.values) for weight in convention.weights(sparse)}
    siblings = convention.by_path(sparse)
    for weight in convention.weights(params):
        if not weight.randoms:
            continue
        values = kept[weight.path]
        sigma = np.asarray(weight.deviation())
        used = sigma[values != 0]
        if not used.size:
            continue
        if not np.all(np.isfinite(values)):
            raise ValueError(f'{weight.path} has values that are not finite: nothing rounds them')
        if not np.all((used > 0) & np.isfinite(used)):
            continue  # no error is small beside no noise
        code = quantise.step_code(quantise.step_size(used, tolerance))
        step = quantise.step(code)
        if np.max(np.abs(values.astype(float))) < _MOST_LEVELS * step:
            levels = quantise.levels(values, sigma, step, tolerance)
            yield weight.path, values.dtype, code, levels
        name = f'{weight.path.rpartition("/")[0]}/bias'.removeprefix('/')
        bias = np.asarray(siblings.get(name, np.zeros(0, bool)))
        if bias.dtype.kind in 'fV' and np.all(np.abs(bias.astype(float)) < _MOST_LEVELS * step / 4):
            yield name, bias.dtype, *quantise.bias_levels(bias, step)


# The header.


def _describe(
    node: Any, steps: Mapping[str, Any], header: bytearray, path: str = '', depth: int = 0
) -> Iterator[tuple[Leaf, np.ndarray, np.ndarray | None]]:
    """Appends the description of a tree to the header, and gives its arrays in order."""
    if depth > _DEEPEST:
        raise ValueError(f'{path} is nested deeper than {_DEEPEST}, which is all the format takes')
    if isinstance(node, Mapping):
        header += bytes([_DICT]) + _number(len(node))
        for key, child in node.items():
            if not isinstance(key, str):
                raise ValueError(f'{path}{key!r} is no string: the format has names of strings')
            try:
                encoded = key.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f'{path}{key!r} is no Unicode text: rename it') from error
            header += _number(len(encoded)) + encoded
            yield from _describe(child, steps, header, f'{path}{key}/', depth + 1)
    elif isinstance(node, (list, tuple)):
        header += bytes([_LIST if isinstance(node, list) else _TUPLE]) + _number(len(node))
        for index, child in enumerate(node):
            yield from _describe(child, steps, header, f'{path}{index}/', depth + 1)
    else:
        name = path.removesuffix('/') or 'the tree'
        if not isinstance(node, (np.ndarray, np.generic, jax.Array)):
            raise ValueError(f'{name} is a {type(node).__name__}: the format holds arrays alone')
        if jax.dtypes.issubdtype(node.dtype, jax.dtypes.prng_key):
            raise ValueError(f'{name} is a PRNG key: save jax.random.key_data(key)')
        array = np.asarray(node)
        if array.dtype not in _DTYPES:
            raise ValueError(f'{name} has type {array.dtype}: convert it, to float32 for example')
        if array.ndim > _MOST_AXES or max(array.shape, default=0) >= _LONGEST:
            raise ValueError(
                f'{name} has shape {array.shape}: the format takes {_MOST_AXES} axes, each below '
                f'{_LONGEST:,}'
            )
        step, levels = steps.get(name, (None, None))
        header += bytes([_ARRAY, _DTYPES.index(array.dtype)]) + _number(array.ndim)
        for size in array.shape:
            header += _number(size)
        header += bytes([_EXACT if step is None else _QUANTISED])
        if step is not None:
            header.append(step)
        yield Leaf(array.shape, array.dtype, step), array, levels


def _skeleton(header: '_Bytes', depth: int) -> Any:
    """A tree of :class:`Leaf`."""
    if depth > _DEEPEST:
        raise SvdFormatError(f'nested deeper than {_DEEPEST}')
    kind = header.byte()
    if kind == _DICT:
        result = {}
        for _ in range(header.count()):
            try:
                key = bytes(header.take(header.number())).decode()
            except UnicodeDecodeError as error:
                raise SvdFormatError('damaged: a name is not UTF-8') from error
            if key in result:
                raise SvdFormatError(f'damaged: {key!r} stands twice')
            result[key] = _skeleton(header, depth + 1)
        return result
    if kind in (_LIST, _TUPLE):
        children = [_skeleton(header, depth + 1) for _ in range(header.count())]
        return children if kind == _LIST else tuple(children)
    if kind != _ARRAY:
        raise SvdFormatError(f'damaged: no node is of kind {kind}')
    number = header.byte()
    if number >= len(_DTYPES):
        raise SvdFormatError(f'damaged: no type has number {number}')
    ndim = header.number()
    if ndim > _MOST_AXES:
        raise SvdFormatError(f'damaged: an array of {ndim} axes')
    shape, coding, step = tuple(header.number() for _ in range(ndim)), header.byte(), None
    if max(shape, default=0) >= _LONGEST:
        raise SvdFormatError(f'damaged: an array of shape {shape}')
    if coding == _QUANTISED:
        step = header.byte()
        if _DTYPES[number].kind not in 'fV':
            raise SvdFormatError(f'damaged: levels of {_DTYPES[number]}')
    elif coding != _EXACT:
        raise SvdFormatError(f'damaged: no coding has number {coding}')
    return Leaf(shape, _DTYPES[number], step)


def leaves(node: Any) -> Iterator[Leaf]:
    if isinstance(node, Leaf):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from leaves(child)


class _Bytes:
    """Bytes that are read one after the other, and never beyond their end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes | memoryview:
        if count > len(self._data) - self._at:
            raise SvdFormatError('damaged: it ends too early')
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes | memoryview:
        return self.take(len(self._data) - self._at)

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """Seven bits a byte, the lowest first; the eighth says that more follow."""
        result = shift = 0
        while True:
            byte = self.byte()
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result
            if shift > 63:
                raise SvdFormatError('damaged: a number without end')

    def count(self) -> int:
        """Of things that take a byte each at least."""
        number = self.number()
        if number > len(self._data) - self._at:
            raise SvdFormatError('damaged: it ends too early')
        return number


def _number(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_PHRASES)
    return compressor.compress(data) + compressor.flush()


def _inflate(data: bytes | memoryview) -> bytes:
    decompressor = zlib.decompressobj(-15, zdict=_PHRASES)
    result = decompressor.decompress(data, _LARGEST_HEADER)
    if not decompressor.eof or decompressor.unused_data:
        raise SvdFormatError('damaged: its header does not end where it should')
    return result


def _replace(path: Path, data: bytes) -> None:
    """Writes a file all at once: a full disk leaves what was there."""
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # a device, or a folder, which is an error
        path.write_bytes(data)
        return
    temporary = path.with_name(f'.{secrets.token_hex(8)}.tmp')
    try:
        # Not by tempfile, whose files only their owner may read.
        with temporary.open('xb') as file:
            with contextlib.suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
