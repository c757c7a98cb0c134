"""A file of 25 million weights: the time and memory that it takes to write and to read it.

The tree has the shapes of ResNet-50 and random weights, of which the largest of every layer are
kept: their positions have no structure that would help.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import svd_jax as svd
from benchmarks.worker import resident_bytes

_BLOCKS = (3, 4, 6, 3)


def resnet50_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """The 25,557,032 parameters of ResNet-50 as Flax arranges them, by layer."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def convolution(name: str, size: int, inputs: int, outputs: int) -> None:
        shapes[f'{name}/conv'] = {'kernel': (size, size, inputs, outputs)}
        shapes[f'{name}/norm'] = {'scale': (outputs,), 'bias': (outputs,)}

    convolution('stem', 7, 3, 64)
    inputs = 64
    for stage, blocks in enumerate(_BLOCKS):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f'stage{stage}/block{block}'
            if block == 0:
                convolution(f'{name}/shortcut', 1, inputs, 4 * width)
            convolution(f'{name}/0', 1, inputs, width)
            convolution(f'{name}/1', 3, width, width)
            convolution(f'{name}/2', 1, width, 4 * width)
            inputs = 4 * width
    shapes['head'] = {'kernel': (inputs, 1000), 'bias': (1000,)}
    return shapes


def random_tree(
    shapes: dict[str, dict[str, tuple[int, ...]]], zeros: float
) -> dict[str, dict[str, np.ndarray]]:
    """A tree of these shapes in which so large a part of every kernel is zero: the smallest."""
    rng = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return values
        sizes = np.abs(values)
        values[sizes < np.quantile(sizes, zeros)] = 0
        return values * np.float32(np.sqrt(2 / np.prod(shape[:-1])))

    return {
        name: {leaf: array(shape) for leaf, shape in layer.items()}
        for name, layer in shapes.items()
    }


def measure(zeros: float = 0.9) -> dict[str, Any]:
    """Writes and reads such a tree, each in a process of its own.

    Args:
      zeros: their share in every kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'large.svd'
        return {**_alone(_save, path, zeros), **_alone(_load, path, zeros)}


def _alone(function: Any, *args: Any) -> dict[str, Any]:
    spawned = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        return pool.submit(function, *args).result()


def _save(path: Path, zeros: float) -> dict[str, Any]:
    tree = random_tree(resnet50_shapes(), zeros)
    svd.save(path, {'small': np.ones(1000, np.float32)})  # what only the first call pays
    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    size = svd.save(path, tree)
    seconds, cpu_seconds = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    arrays = [array for layer in tree.values() for array in layer.values()]
    return {
        'weights': sum(array.size for array in arrays),
        'nonzero': sum(int(np.count_nonzero(array)) for array in arrays),
        'dense_bytes': sum(array.nbytes for array in arrays),
        'bytes': size,
        'save_seconds': seconds,
        'save_cpu_seconds': cpu_seconds,
    }


def _load(path: Path, zeros: float) -> dict[str, Any]:
    before = resident_bytes('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts here
    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    loaded = svd.load(path)
    found = {
        'load_seconds': time.perf_counter() - seconds,
        'load_cpu_seconds': time.process_time() - cpu_seconds,
        'load_peak_bytes': resident_bytes('VmHWM') - before,
    }
    for name, layer in random_tree(resnet50_shapes(), zeros).items():
        for leaf, array in layer.items():
            np.testing.assert_array_equal(loaded[name][leaf], array)
    return found
