"""What is in ``.svd`` files, where their bytes go, and how two of them differ.

All of it is found from the files alone, without knowing the models.
"""

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from svd_jax import arrays, convention, entropy, file, table

PathLike = str | os.PathLike[str]
Counted = tuple[int, int]  # so many of so many


class Stored(NamedTuple):
    """An array in a file.

    Attributes:
      path: in the tree, such as ``'Conv_0/kernel'``.
      shape: of the array.
      dtype: of the array, by name.
      step: which its values are whole multiples of; None: they are exact.
      nonzero: how many of its numbers are not zero.
      inputs: how many of those along the axis before the last have any; None: it has one axis.
      units: how many of those along the last axis have any.
      position_bits: what it takes to say where they are.
      value_bits: what it takes to say what they are.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    step: float | None
    nonzero: Counted
    inputs: Counted | None
    units: Counted | None
    position_bits: float
    value_bits: float

    @property
    def bits(self) -> float:
        """What the array takes in the file."""
        return self.position_bits + self.value_bits

    @property
    def bits_per_weight(self) -> float:
        """Bits by number that is not zero."""
        return self.bits / self.nonzero[0] if self.nonzero[0] else 0.0


class Inspection(NamedTuple):
    """What is in a file; prints as a table.

    Attributes:
      layers: its arrays, in their order in the tree.
      sections: bytes of the ``header`` (names and shapes), of the arrays' ``positions`` and
        ``values``, and of the ``frame`` around them: the format's name, checksum, unused bits.
      dense_bytes: of the arrays in memory.
    """

    layers: tuple[Stored, ...]
    sections: dict[str, float]
    dense_bytes: int

    @property
    def bytes(self) -> int:
        """Of the file."""
        return round(sum(self.sections.values()))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ('array', 'shape', 'type', 'step', 'nonzero', 'of', 'inputs', 'units', 'bits each',
             'bytes')
        ]  # fmt: skip
        for layer in self.layers:
            rows.append((
                layer.path, _shape(layer.shape), layer.dtype,
                '' if layer.step is None else f'{layer.step:.3g}',
                f'{layer.nonzero[0]:,}', f'{layer.nonzero[1]:,}',
                _counted(layer.inputs), _counted(layer.units),
                f'{layer.bits_per_weight:.2f}', f'{layer.bits / 8:,.0f}',
            ))  # fmt: skip
        nonzero, total = (sum(layer.nonzero[i] for layer in self.layers) for i in (0, 1))
        each = f'{8 * self.bytes / nonzero:.2f}' if nonzero else ''
        last = ('total', '', '', '', f'{nonzero:,}', f'{total:,}', '', '', each, f'{self.bytes:,}')
        sections = ', '.join(f'{name} {count:,.0f}' for name, count in self.sections.items())
        return '\n'.join([
            _table(rows, last, left=3),
            f'bytes by section: {sections}',
            f'{self.bytes:,} bytes, {self.dense_bytes / self.bytes:,.1f} times fewer than the '
            f'{self.dense_bytes:,} of its arrays',
        ])  # fmt: skip


class Difference(NamedTuple):
    """How an array differs between two trees; of one that only one has, the other's share is None.

    Attributes:
      path: in the trees.
      shapes: in both.
      dtypes: in both, by name.
      common: positions that are not zero in either; None: the shapes differ.
      only: positions that are not zero in the first alone, and in the second.
      largest: of the differences of values.
      relative: the norm of the difference over the norm of the first.
      bytes: in both files.
      equal: whether they are, bit by bit.
    """

    path: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    common: int | None
    only: Counted | None
    largest: float | None
    relative: float | None
    bytes: tuple[float | None, float | None]
    equal: bool


class Comparison(NamedTuple):
    """How two files differ; prints as a table.

    Attributes:
      layers: every array of either, in the order of the first.
      bytes: of both files.
    """

    layers: tuple[Difference, ...]
    bytes: tuple[int, int]

    @property
    def equal(self) -> bool:
        """Whether they hold the same arrays, bit by bit."""
        return all(layer.equal for layer in self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ('array', 'shape', 'both', 'only A', 'only B', 'largest', 'relative', 'bytes A',
             'bytes B')
        ]  # fmt: skip
        for layer in self.layers:
            numbers = layer.common, *(layer.only or (None, None))
            rows.append((
                layer.path,
                ' -> '.join(dict.fromkeys(
                    'missing' if shape is None else f'{_shape(shape)} {dtype}'
                    for shape, dtype in zip(layer.shapes, layer.dtypes, strict=True)
                )),
                *('' if number is None else f'{number:,}' for number in numbers),
                *('' if x is None else f'{x:.3g}' for x in (layer.largest, layer.relative)),
                *('' if x is None else f'{x:,.0f}' for x in layer.bytes),
            ))  # fmt: skip
        last = ('total', *[''] * 6, *(f'{count:,}' for count in self.bytes))
        differing = sum(not layer.equal for layer in self.layers)
        verdict = f'{differing} of {len(self.layers)} arrays differ' if differing else 'equal'
        return f'{_table(rows, last, left=2)}\n{verdict}'


class Verified(NamedTuple):
    """A file that is sound.

    Attributes:
      bytes: of the file.
      arrays: that it holds.
      numbers: that they hold.
    """

    bytes: int
    arrays: int
    numbers: int

    def __str__(self) -> str:
        return f'sound: {self.bytes:,} bytes, {self.arrays:,} arrays, {self.numbers:,} numbers'


def inspect(path: PathLike, *, max_bytes: int = file.MOST_BYTES) -> Inspection:
    """What is in a ``.svd`` file, and where its bytes go.

    Args:
      path: of the file.
      max_bytes: as for :func:`svd_jax.load`.

    Returns:
      An :class:`Inspection`, by array; prints as a table.

    Raises:
      SvdFormatError: it is not such a file, damaged, or of a later version.
      OSError: it cannot be read.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> import svd_jax as svd
      >>> kernel = np.zeros((300, 100), np.float32)
      >>> kernel[5, [7, 9]] = 0.5
      >>> path = os.path.join(tempfile.mkdtemp(), 'small.svd')
      >>> bytes_written = svd.save(path, {'Dense_0': {'kernel': kernel}})
      >>> found = svd.inspect(path)
      >>> found.bytes == bytes_written
      True
      >>> (layer,) = found.layers
      >>> layer.path, layer.nonzero, layer.inputs, layer.units
      ('Dense_0/kernel', (2, 30000), (1, 300), (2, 100))
    """
    return _inspect(path, max_bytes)[0]


def compare(a: PathLike, b: PathLike, *, max_bytes: int = file.MOST_BYTES) -> Comparison:
    """How the trees in two ``.svd`` files differ, array by array.

    Args:
      a: path of one file.
      b: path of the other.
      max_bytes: as for :func:`svd_jax.load`.

    Returns:
      A :class:`Comparison`; prints as a table.

    Raises:
      SvdFormatError: one is not such a file, damaged, or of a later version.
      ValueError: two arrays of one have the same path.
      OSError: one cannot be read.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> import svd_jax as svd
      >>> paths = [os.path.join(tempfile.mkdtemp(), 'network.svd') for _ in range(2)]
      >>> for path, value in zip(paths, (1.0, 1.5)):
      ...     _ = svd.save(path, {'kernel': np.array([[value, 0.0, 2.0]], np.float32)})
      >>> (layer,) = svd.compare(*paths).layers
      >>> layer.common, layer.only, layer.largest
      (2, (0, 0), 0.5)
    """
    (first, tree_a), (second, tree_b) = (_inspect(path, max_bytes) for path in (a, b))
    of_a, of_b = map(convention.by_path, (tree_a, tree_b))
    sizes = [{layer.path: layer.bits / 8 for layer in found.layers} for found in (first, second)]
    return Comparison(
        tuple(
            _difference(
                path, (of_a.get(path), of_b.get(path)), (sizes[0].get(path), sizes[1].get(path))
            )
            for path in {**of_a, **of_b}
        ),
        (first.bytes, second.bytes),
    )


def verify(path: PathLike, *, max_bytes: int = file.MOST_BYTES) -> Verified:
    """Checks a ``.svd`` file: its checksum, and that every array can be read.

    Args:
      path: of the file.
      max_bytes: as for :func:`svd_jax.load`.

    Returns:
      A :class:`Verified`: what it holds, in a line.

    Raises:
      SvdFormatError: it is not such a file, damaged, or of a later version.
      OSError: it cannot be read.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> import svd_jax as svd
      >>> path = os.path.join(tempfile.mkdtemp(), 'small.svd')
      >>> _ = svd.save(path, {'bias': np.ones(3, np.float32)})
      >>> svd.verify(path)[1:]
      (1, 3)
    """
    sizes = [array.size for _, array in convention.leaves(file.load(path, max_bytes=max_bytes))]
    return Verified(Path(path).stat().st_size, len(sizes), sum(sizes))


class _Meter(entropy.Writer):
    """Writes what it reads again, or what it is given, and says how many bits that takes."""

    def __init__(self, reader: entropy.Reader | None = None) -> None:
        super().__init__()
        self._reader = reader

    def code(self, symbols: np.ndarray | None, count: int, model: Any, *each: Any) -> np.ndarray:
        if self._reader is not None:
            symbols = self._reader.code(None, count, model, *each)
        return super().code(symbols, count, model, *each)

    def bits(self) -> float:
        # Words so far, and how far the coder has narrowed down the next: its range starts as 2^64.
        words, (_, left) = self._encoder.pos()
        return 32 * words + 64 - math.log2(left)


def _inspect(path: PathLike, max_bytes: int) -> tuple[Inspection, Any]:
    """And the tree."""
    tree = file.load(path, max_bytes=max_bytes)  # or an error that names the file
    found = list(convention.leaves(tree))
    data = Path(path).read_bytes()
    opened = file.opened(data, max_bytes)
    meter = _Meter(entropy.Reader(opened.contents))
    layers = tuple(
        _stored(name, array, leaf, meter)
        for (name, array), leaf in zip(found, file.leaves(opened.skeleton), strict=True)
    )
    sections = {
        'header': float(opened.header_bytes),
        'positions': sum(layer.position_bits for layer in layers) / 8,
        'values': sum(layer.value_bits for layer in layers) / 8,
    }
    sections['frame'] = len(data) - sum(sections.values())
    return Inspection(layers, sections, sum(array.nbytes for _, array in found)), tree


def _stored(path: str, array: np.ndarray, leaf: file.Leaf, meter: _Meter) -> Stored:
    before, positions = meter.bits(), _Meter()
    positions.units = copy.deepcopy(meter.units)
    file.code_array(meter, leaf, None, None)
    if array.dtype.kind not in 'biu':  # whole numbers are coded without positions
        shape = arrays.matrix_shape(array.shape)
        entropy.positions(positions, (_bits(array) != 0).reshape(shape), shape)
    return Stored(
        path, array.shape, array.dtype.name, leaf.step,
        (int(np.count_nonzero(array)), array.size),
        _alive(array, -2), _alive(array, -1),
        positions.bits(), max(0.0, meter.bits() - before - positions.bits()),
    )  # fmt: skip


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f'u{array.itemsize}').reshape(array.shape)


def _alive(array: np.ndarray, axis: int) -> Counted | None:
    """How many units along an axis have a number that is not zero."""
    if array.ndim < -axis:
        return None
    others = tuple(a for a in range(array.ndim) if a != array.ndim + axis)
    return int(np.count_nonzero(np.any(array != 0, others))), array.shape[axis]


def _difference(
    path: str,
    pair: tuple[np.ndarray | None, np.ndarray | None],
    sizes: tuple[float | None, float | None],
) -> Difference:
    a, b = pair
    shapes = a if a is None else a.shape, b if b is None else b.shape
    dtypes = a if a is None else a.dtype.name, b if b is None else b.dtype.name
    if a is None or b is None or a.shape != b.shape:
        return Difference(path, shapes, dtypes, None, None, None, None, sizes, False)
    in_a, in_b = a != 0, b != 0
    first, second = a.astype(np.float64), b.astype(np.float64)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    change = np.where(same, 0, np.subtract(first, second, where=~same, out=np.zeros(a.shape)))
    norm, whole = np.linalg.norm(change), np.linalg.norm(first)
    return Difference(
        path, shapes, dtypes,
        int(np.count_nonzero(in_a & in_b)),
        (int(np.count_nonzero(in_a & ~in_b)), int(np.count_nonzero(in_b & ~in_a))),
        float(np.max(np.abs(change), initial=0)),
        float(norm / whole) if whole else math.inf if norm else 0.0,
        sizes,
        a.dtype == b.dtype and bool(np.array_equal(_bits(a), _bits(b))),
    )  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return '×'.join(map(str, shape)) or 'scalar'


def _counted(count: Counted | None) -> str:
    return '' if count is None else f'{count[0]:,} of {count[1]:,}'


def _table(rows: Sequence[tuple[str, ...]], last: tuple[str, ...], left: int) -> str:
    """Columns, the first so many flush left; a rule below the first row and above the last."""
    first, *lines, end = table.aligned([*rows, last], left)
    rule = '-' * max(map(len, (first, *lines, end)))
    return '\n'.join([first, rule, *lines, rule, end])
