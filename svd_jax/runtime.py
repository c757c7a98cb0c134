"""Fast inference of what is left, on a CPU: sparse kernels where they win.

A compacted network is split where a single value passes from one layer to the next. Every part can
run in several ways: dense, by XLA; the same with its convolutions as matrix products
(:mod:`svd_jax.conv`); or as operations on rows that meet no zero weight (:mod:`svd_jax.sparse`).
They are measured, and the fastest one is kept. On other backends the compacted network runs as it
is.
"""

import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from svd_jax import kernels, table
from svd_jax.compaction import Compact
from svd_jax.parts import Network
from svd_jax.sparse import NotCoveredError, Plan

# Bytes of the rows of one block: they should stay in a core's cache.
_CACHE = 1 << 20
# Below this many multiply-adds a thread, a second one costs more than it saves.
_WORTH_A_THREAD = 2_000_000
# Examples that do not fill a vector are a block of their own below this part of a vector's work: to
# read and write them takes longer.
_WORTH_BY_ITSELF = 0.6
# Work spaces that a thread keeps, each for another number of examples.
_SPACES = 4
# A measurement: rounds, and seconds of a turn.
_ROUNDS, _SECONDS = 7, 0.004

DENSE, PRODUCTS, SPARSE = 'dense', 'products', 'sparse'
# Winograd's algorithm has 16 products of 36: where rows save more, it needs no measurement.
_MOST_SAVED = 36 / 16


class Layer(NamedTuple):
    """A part of the network, and how it runs.

    Attributes:
      path: of the modules in it.
      kernel: ``'dense'``, by XLA; ``'products'``, the same with convolutions as matrix products; or
        ``'sparse'``.
      multiply_adds: for one example: of the dense kernel, and executed by the one that is kept;
        convolutions as matrix products may need fewer than they count here.
      dense_us: measured, microseconds for the example input.
      products_us: measured; None where there is no convolution, or sparse kernels save more anyway.
      sparse_us: measured; None where sparse kernels don't cover the part.
      left: what they don't cover.
    """

    path: str
    kernel: str
    multiply_adds: tuple[int, int]
    dense_us: float
    products_us: float | None
    sparse_us: float | None
    left: str = ''

    def as_kept(self, kernel: str) -> 'Layer':
        """With the kernel that is kept in the end."""
        dense, sparse = self.multiply_adds
        return self._replace(
            kernel=kernel, multiply_adds=(dense, sparse if kernel == SPARSE else dense)
        )


class Report(NamedTuple):
    """How a compiled network runs; printed, a table.

    Attributes:
      layers: in the order in which they run; none where the network runs as it is.
      dense_us: of the whole by XLA, measured, microseconds for the example input.
      us: of the whole as it is kept.
      left: why the network runs as it is, if it does.
    """

    layers: tuple[Layer, ...]
    dense_us: float
    us: float
    left: str = ''

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """For one example: of the dense compacted network, and executed."""
        dense, executed = (sum(layer.multiply_adds[at] for layer in self.layers) for at in (0, 1))
        return dense, executed

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (
                'layer', 'kernel', 'dense multiply-adds', 'executed',
                'dense us', 'products us', 'sparse us',
            )
        ]  # fmt: skip
        for layer in self.layers:
            counts = (f'{count:,}' for count in layer.multiply_adds)
            measured = (layer.dense_us, layer.products_us, layer.sparse_us)
            times = ('-' if us is None else f'{us:.1f}' for us in measured)
            rows.append((layer.path, layer.kernel, *counts, *times))
        lines = table.aligned(rows, 2) if self.layers else [f'runs as it is: {self.left}']
        lines += [f'{a.path}: not sparse: {a.left}' for a in self.layers if a.left]
        return '\n'.join([*lines, f'whole: {self.us:.1f} us, by XLA {self.dense_us:.1f} us'])


class _Local(threading.local):
    """Of each thread, for a number of examples: the rows, places, and the blocks."""

    def __init__(self) -> None:
        self.spaces: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}


class _Sparse:
    """A part on rows: (batch, ...) to (batch, ...), NumPy arrays."""

    def __init__(self, plan: Plan, features: tuple[int, ...]) -> None:
        self._run, self._plan, self._features = kernels.compiled(), plan, features
        self._width = math.prod(features)
        self._tables = (*plan[:4], plan.rows)
        self._local = _Local()

    def __call__(self, x: Any) -> np.ndarray:
        # For few examples, what is written here takes as long as the kernel: hence so little.
        x = np.ascontiguousarray(x, np.float32)
        if not x.flags.aligned:
            x = x.copy()
        batch, flat = len(x), x.ravel()
        out = np.empty((batch, self._width), np.float32)
        threads = batch * self._plan.multiply_adds // _WORTH_A_THREAD
        if threads > 1:
            threads = min(threads, _cores(), batch)
            cuts = [batch * thread // threads for thread in range(threads + 1)]
            halves = [
                _threads().submit(self._examples, flat, out, first, last)
                for first, last in itertools.pairwise(cuts)
            ]
            for half in halves:
                half.result()
        elif batch:
            self._examples(flat, out, 0, batch)
        return out if len(self._features) == 1 else out.reshape(batch, *self._features)

    def _examples(self, x: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
        # Work space is kept, for new pages cost more than what is computed on them.
        spaces = self._local.spaces
        if last - first not in spaces:
            if len(spaces) == _SPACES:
                spaces.clear()
            spaces[last - first] = self._space(last - first)
        self._run(x, x.size // len(out), out, *spaces[last - first], first, last, *self._tables)

    def _space(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        blocks = self._blocks(batch)
        numbers, band = (max(map(of, set(blocks))) for of in (self._plan.numbers, self._plan.band))
        places = np.empty((2, band), np.int64)
        return _aligned(numbers + 2 * kernels.WIDTH), places, np.asarray(blocks, np.int64)

    def _blocks(self, batch: int) -> list[int]:
        """Examples in each block: whole vectors, as many as the cache holds; then what is left."""
        width = kernels.WIDTH
        vectors, rest = divmod(batch, width)
        if rest and not self._by_itself(rest):
            vectors, rest = vectors + 1, 0
        fit = max(1, _CACHE // (4 * self._plan.numbers(width)))
        count = -(-vectors // fit)
        cuts = [vectors * block // count * width for block in range(count + 1)] if count else []
        return [b - a for a, b in itertools.pairwise(cuts)] + [rest] * (rest > 0)

    def _by_itself(self, rest: int) -> bool:
        """Whether fewer examples than a vector has take less than a whole vector."""
        ours, whole = map(self._plan.vector_multiply_adds, (rest, kernels.WIDTH))
        return rest == 1 or ours < _WORTH_BY_ITSELF * whole


def _aligned(size: int) -> np.ndarray:
    """Zeros that begin where a vector of the processor may: no row of whole vectors is split."""
    line = 4 * kernels.WIDTH
    numbers = np.zeros(size + kernels.WIDTH, np.float32)
    first = -numbers.ctypes.data % line // 4
    return numbers[first : first + size]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores())


if hasattr(os, 'register_at_fork'):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


class Compiled:
    """A network that runs as fast as it was measured to.

    It takes NumPy or JAX arrays, of any batch size, and returns what the network does, as NumPy or
    JAX arrays. It is not traced: inside ``jax.jit`` or ``jax.grad``, use the compacted network.

    Attributes:
      report: how the network runs.
    """

    def __init__(self, run: Callable[..., Any], example: np.ndarray | None, report: Report) -> None:
        self._run, self.report = run, report
        self._features = None if example is None else example.shape[1:]
        floating = example is not None and jax.numpy.issubdtype(example.dtype, np.floating)
        self._dtype = example.dtype if example is not None and floating else None

    def __call__(self, *inputs: Any) -> Any:
        """The output for these inputs.

        Args:
          inputs: of the shape of the example, but for the batch; numbers of another type become
            those of the example, if that has floating-point numbers.

        Raises:
          ValueError: they are of another shape.
        """
        if self._features is not None and (
            len(inputs) != 1 or np.shape(inputs[0])[1:] != self._features
        ):
            features = ', '.join(map(str, self._features))
            shapes = list(map(np.shape, inputs))
            raise ValueError(f'pass one array of shape (batch, {features}), not {shapes}')
        if self._dtype is not None and getattr(inputs[0], 'dtype', None) != self._dtype:
            inputs = (np.asarray(inputs[0], self._dtype),)
        return self._run(*inputs)


def compile(small: Compact, *example: Any) -> Compiled:
    """Compiles a compacted network for fast inference on this machine.

    On a CPU, measures layer by layer whether kernels that skip the zeros are faster than XLA's
    dense ones, and keeps the faster; so the example should be of a usual size. On other backends,
    and where the network as it is was fastest, that is what runs. Sums are added in another order,
    and zero weights meet no input: where the dense network makes NaN of zero times infinity, this
    one doesn't.

    Args:
      small: what :func:`svd_jax.compact` returns.
      example: example inputs, arrays. The first axis is the batch.

    Returns:
      The network as a function of NumPy or JAX arrays, with a report.

    Raises:
      TypeError: the network has not been through :func:`svd_jax.compact`.
      ValueError: no example input.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)['params']
      >>> small = svd.compact(model, params, x)
      >>> fast = svd.compile(small, x)
      >>> bool(jnp.allclose(fast(x), small(x), atol=1e-6))
      True
      >>> fast(x[:1]).shape
      (1, 2)
    """
    if not isinstance(small, Compact):
        raise TypeError(
            f'compile takes what svd_jax.compact returns, not a {type(small).__name__}: '
            'compile(compact(model, params, x), x)'
        )
    if not example:
        raise ValueError('compile needs an example input: compile(small, x)')
    inputs = jax.tree.map(jax.numpy.asarray, example)

    def whole(*inputs: Any) -> Any:
        return small.apply(small.params, *inputs)

    try:
        if jax.default_backend() != 'cpu':
            raise NotCoveredError(f'the backend is {jax.default_backend()}')
        if len(example) > 1 or not jax.tree_util.all_leaves(example) or not inputs[0].ndim:
            raise NotCoveredError('not one array as input')
        network = Network(small, inputs[0])
    except NotCoveredError as reason:
        (us,) = _microseconds(lambda: whole(*inputs))
        return Compiled(whole, None, Report((), us, us, str(reason)))
    return _fastest(network, whole, np.asarray(inputs[0]))


def _fastest(network: Network, whole: Callable[..., Any], example: np.ndarray) -> Compiled:
    layers = []
    x: Any = example
    for part in range(len(network.parts)):
        layer, x = _measured(network, part, x)
        layers.append(layer)
    # Passing from one kind to the other costs as well, so the whole is measured, too.
    as_whole = (DENSE,) * len(layers)
    chosen = tuple(layer.kernel for layer in layers)
    all_sparse = tuple(layer.kernel if layer.left else SPARSE for layer in layers)
    chains = [chain for chain in dict.fromkeys((chosen, all_sparse)) if chain != as_whole]
    runs = [(whole, as_whole), *((_chain(network, chain), chain) for chain in chains)]
    times = _microseconds(*(functools.partial(run, example) for run, _ in runs))
    us, (run, kinds) = min(zip(times, runs, strict=True), key=lambda pair: pair[0])
    kept = tuple(layer.as_kept(kind) for layer, kind in zip(layers, kinds, strict=True))
    return Compiled(run, example, Report(kept, times[0], us))


def _measured(network: Network, part: int, x: Any) -> tuple[Layer, Any]:
    """A part in all ways, and what it makes of an input."""
    alone, left = slice(part, part + 1), ''
    runs: dict[str, Callable[[], Any]] = {DENSE: functools.partial(network.dense(alone), x)}
    dense_adds = sparse_adds = network.multiply_adds(part)
    try:
        plan = network.plan(alone)
    except NotCoveredError as reason:
        left = str(reason)
    else:
        sparse_adds = plan.multiply_adds
        sparse = _Sparse(plan, network.features(alone))
        runs[SPARSE] = functools.partial(sparse, np.asarray(x))
    times = dict(zip(runs, _microseconds(*runs.values()), strict=True))
    saved = times[DENSE] / times.get(SPARSE, times[DENSE])
    if network.convolves(part) and saved < _MOST_SAVED:
        (times[PRODUCTS],) = _microseconds(functools.partial(network.dense(alone, True), x))
    layer = Layer(
        network.path(part), min(times, key=lambda kind: times[kind]), (dense_adds, sparse_adds),
        times[DENSE], times.get(PRODUCTS), times.get(SPARSE), left,
    )  # fmt: skip
    return layer, runs[DENSE]()


def _chain(network: Network, kinds: Sequence[str]) -> Callable[[Any], Any]:
    """The network with its parts run in these ways, those in a row that run alike as one."""
    runs: list[Callable[[Any], Any]] = []
    for kind, group in itertools.groupby(range(len(kinds)), key=lambda part: kinds[part]):
        numbers = list(group)
        parts = slice(numbers[0], numbers[-1] + 1)
        if kind != SPARSE:
            runs.append(network.dense(parts, kind == PRODUCTS))
        else:
            runs.append(_Sparse(network.plan(parts), network.features(parts)))
    returned = network.output()
    if len(runs) == 1:
        (only,) = runs
        return lambda x: returned(only(x))

    def run(x: Any) -> Any:
        for part_run in runs:
            x = part_run(x)
        return returned(x)

    return run


def _microseconds(*runs: Callable[[], Any]) -> list[float]:
    """The time of each, taking turns: the least of all rounds, for other processes only add."""
    counts = []
    for run in runs:
        jax.block_until_ready(run())  # compiles
        start = time.perf_counter()
        jax.block_until_ready(run())
        counts.append(1 + int(_SECONDS / (time.perf_counter() - start)))
    rounds: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, count, times in zip(runs, counts, rounds, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(run())
            times.append(1e6 * (time.perf_counter() - start) / count)
    return [min(times) for times in rounds]
