"""The time of an inference: dense, compacted, and compacted with what is left sparse, in one run.

Every way has a process of its own, so that no library's idle threads disturb another. They take
turns for several rounds; the time of a turn is the median over its calls. So the ratios hold where
the machine's speed drifts; times from different runs do not compare. A library that is not
installed is left out, and the run says so.

    python -m benchmarks.inference --out inference.json
    python -m benchmarks.inference --files lenet300.svd lenet5.svd
"""

import dataclasses
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import svd_jax as svd
from experiments import models
from experiments.environment import environment
from experiments.report import write_json
from svd_jax import runtime

Tree = dict[str, dict[str, np.ndarray]]
Call = Callable[[], Any]

_PACKAGES = ('numba', 'scipy', 'torch', 'onnxruntime', 'onnx', 'jax2onnx')


class Network(NamedTuple):
    """One of the paper's networks: convolutions, some of them pooled 2x2, then dense layers.

    Attributes:
      model: in Flax.
      batches: sizes that are timed.
      zeros: percent of every layer's weights.
      image: the shape of one.
      pooled: the convolutions that are.
      same: whether they have zeros around their images, or none.
    """

    model: Any
    batches: tuple[int, ...]
    zeros: dict[str, float]
    image: tuple[int, int, int] = (28, 28, 1)
    pooled: tuple[str, ...] = ('Conv_0', 'Conv_1')
    same: bool = False

    def images(self, count: int) -> np.ndarray:
        """Random ones."""
        shape = (count, *self.image)
        return np.random.default_rng(1).normal(size=shape).astype(np.float32)


class FoldedVGG(nn.Module):
    """The VGG-like network, batch normalisation a part of its convolutions, as runtimes have it.

    Attributes:
      width: factor of all widths.
    """

    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        layers = [
            svd.linen.Conv(round(self.width * channels), (3, 3))
            for _, channels, depth in models.VGGLike.stages
            for _ in range(depth)
        ]
        for number, layer in enumerate(layers):
            x, _ = layer(x, deterministic)
            if f'Conv_{number}' in _POOLED:
                x = svd.linen.max_pool_2x2(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x, _ = svd.linen.Dense(round(self.width * 512))(x, deterministic)
        return svd.linen.Dense(10)(nn.relu(x), deterministic)


_POOLED = tuple(
    f'Conv_{last - 1}'
    for last in itertools.accumulate(depth for _, _, depth in models.VGGLike.stages)
)

# The zeros of the LeNets are the paper's (its table 1). Those of the VGG-like network are of
# experiments/results/vgg-sparse_vd-20epochs-k1-kl0.2-distil0.8-seed0.json.
NETWORKS = {
    'lenet300': Network(
        models.LeNet300(), (1, 100), {'Dense_0': 99.4, 'Dense_1': 98.3, 'Dense_2': 75.2}
    ),
    'lenet5': Network(
        models.LeNet5(),
        (1, 128),
        {'Conv_0': 69.2, 'Conv_1': 98.0, 'Dense_0': 99.8, 'Dense_1': 94.9},
    ),
    'vgg': Network(
        FoldedVGG(),
        (1, 100),
        {
            'Conv_0': 27.89, 'Conv_1': 78.52, 'Conv_2': 79.63, 'Conv_3': 83.47, 'Conv_4': 85.43,
            'Conv_5': 91.32, 'Conv_6': 94.99, 'Conv_7': 98.82, 'Conv_8': 99.76, 'Conv_9': 99.86,
            'Conv_10': 99.92, 'Conv_11': 99.96, 'Conv_12': 99.96, 'Dense_0': 99.06,
            'Dense_1': 73.61,
        },
        (32, 32, 3), _POOLED, True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    files: tuple[Path, ...] = ()
    """Networks, lenet300, lenet5 or the VGG-like one of experiments.vgg, as .svd files; if none,
    random ones of their sparsity."""
    rounds: int = 15
    """How often every way has its turn."""
    seconds: float = 0.3
    """How long a turn lasts; one call at least."""
    out: Path | None = None
    """Write what was measured to this file, as JSON."""


def _kernel_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(network.model.init, jax.random.key(0), network.images(1))['params']
    return {layer: params[layer]['kernel'].shape for layer in network.zeros}


def random_network(name: str, seed: int = 0) -> Tree:
    """Random weights, as many of each layer zero as it says."""
    network, rng = NETWORKS[name], np.random.default_rng(seed)
    params: Tree = {}
    for layer, shape in _kernel_shapes(network).items():
        kernel = rng.normal(size=shape).astype(np.float32)
        count = round(kernel.size * network.zeros[layer] / 100)
        kernel.reshape(-1)[rng.permutation(kernel.size)[:count]] = 0
        params[layer] = {'kernel': kernel, 'bias': rng.normal(size=shape[-1]).astype(np.float32)}
    return params


# The ways. Each takes a network, its parameters and a batch of images, and returns a call that
# computes the logits and is done when it returns, on arrays of the library's own kind; and, where
# it is known, how many multiply-adds that executes for one image.


def _flax(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    model = NETWORKS[name].model
    run = jax.jit(lambda params, x: model.apply({'params': params}, x, deterministic=True))
    arguments = jax.device_put((params, x))
    return lambda: jax.block_until_ready(run(*arguments)), _dense_multiply_adds(name, params)


def _compact(name: str, params: Tree, x: np.ndarray) -> svd.Compact:
    return svd.compact(NETWORKS[name].model, params, x, deterministic=True)


def _compact_xla(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    small, y = _compact(name, params, x), jax.device_put(x)
    return lambda: jax.block_until_ready(small(y)), small.report.multiply_adds[1] // len(x)


def _compact_sparse(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    compiled = runtime.compile(_compact(name, params, x), x)
    layers = compiled.report.layers
    waits = not layers or any(layer.kernel != runtime.SPARSE for layer in layers)
    run = (lambda: jax.block_until_ready(compiled(x))) if waits else (lambda: compiled(x))
    return run, compiled.report.multiply_adds[1] if layers else None


def _compact_onnxruntime(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    import onnxruntime

    small = _compact(name, params, x)
    data = svd.export_onnx(lambda x: small(x)[0], x)  # not the KL divergence, which is 0
    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, inputs), small.report.multiply_adds[1] // len(x)


def _scipy(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    if name != 'lenet300':
        raise ImportError('scipy has no sparse convolutions')
    from scipy.sparse import csr_array

    layers = [(csr_array(layer['kernel'].T), layer['bias'][:, None]) for layer in params.values()]

    def run() -> np.ndarray:
        y = x.reshape(len(x), -1).T
        for weights, bias in layers[:-1]:
            y = np.maximum(weights @ y + bias, 0)
        weights, bias = layers[-1]
        return (weights @ y + bias).T

    return run, sum(weights.nnz for weights, _ in layers)


def _torch(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    import torch
    from torch import nn

    modules: list[Any] = []
    network_of = NETWORKS[name]
    for path, layer in params.items():
        kernel = layer['kernel']
        if kernel.ndim == 4:
            padding = 'same' if network_of.same else 'valid'
            height, width, *channels = kernel.shape
            module: Any = nn.Conv2d(channels[0], channels[1], (height, width), padding=padding)
            pooled = [nn.MaxPool2d(2)] if path in network_of.pooled else []
            modules += [module, *pooled, nn.ReLU()]
            weights = kernel.transpose(3, 2, 0, 1)
        else:
            module = nn.Linear(*kernel.shape)
            modules += [*_flatten(nn, modules), module, nn.ReLU()]
            weights = _channels_first(params, path).T
        with torch.no_grad():
            module.weight[:] = torch.tensor(weights)
            module.bias[:] = torch.tensor(layer['bias'])
    network = nn.Sequential(*modules[:-1]).eval()
    images = torch.tensor(x.transpose(0, 3, 1, 2))

    def run() -> Any:
        with torch.inference_mode():
            return network(images)

    return run, _dense_multiply_adds(name, params)


def _flatten(nn: Any, modules: list[Any]) -> list[Any]:
    return [] if any(isinstance(module, nn.Linear) for module in modules) else [nn.Flatten()]


def _channels_first(params: Tree, path: str) -> np.ndarray:
    """The weights of a dense layer whose inputs, flattened, had the channels first."""
    kernel = params[path]['kernel']
    convolutions = [own for own in params.values() if own['kernel'].ndim == 4]
    if path != 'Dense_0' or not convolutions:
        return kernel
    side = round((kernel.shape[0] / convolutions[-1]['bias'].size) ** 0.5)
    units = kernel.reshape(side, side, -1, kernel.shape[1]).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(units.reshape(kernel.shape))


def _onnxruntime(name: str, params: Tree, x: np.ndarray) -> tuple[Call, int | None]:
    import onnxruntime

    session = onnxruntime.InferenceSession(_onnx(name, params), providers=['CPUExecutionProvider'])
    inputs = {'x': np.ascontiguousarray(x.transpose(0, 3, 1, 2))}
    return lambda: session.run(None, inputs), _dense_multiply_adds(name, params)


def _onnx(name: str, params: Tree) -> bytes:
    """The network as ONNX has it: the channels first, a product and its bias one operation."""
    from onnx import TensorProto, helper, numpy_helper

    network, nodes, weights, last, flat = NETWORKS[name], [], [], 'x', False
    for path, layer in params.items():
        names = [f'{path}/kernel', f'{path}/bias']
        kernel = layer['kernel']
        if kernel.ndim == 4:
            arrays = [kernel.transpose(3, 2, 0, 1), layer['bias']]
            padding = 'SAME_UPPER' if network.same else 'VALID'
            nodes.append(helper.make_node('Conv', [last, *names], [path], auto_pad=padding))
            last = path
            if path in network.pooled:
                pool: dict[str, Any] = {'kernel_shape': [2, 2], 'strides': [2, 2]}
                nodes.append(helper.make_node('MaxPool', [path], [f'{path}/pool'], **pool))
                last = f'{path}/pool'
        else:
            if not flat:
                nodes.append(helper.make_node('Flatten', [last], ['flat']))
                last, flat = 'flat', True
            arrays = [_channels_first(params, path), layer['bias']]
            nodes.append(helper.make_node('Gemm', [last, *names], [path]))
            last = path
        weights += [
            numpy_helper.from_array(np.ascontiguousarray(array), name)
            for array, name in zip(arrays, names, strict=True)
        ]
        if path != list(params)[-1]:
            nodes.append(helper.make_node('Relu', [last], [f'{path}/relu']))
            last = f'{path}/relu'
    *size, channels = network.image
    graph = helper.make_graph(
        nodes, 'network',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['batch', channels, *size])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ['batch', 10])],
        weights,
    )  # fmt: skip
    opset = [helper.make_opsetid('', 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def _dense_multiply_adds(name: str, params: Tree) -> int:
    network, total = NETWORKS[name], 0
    side = network.image[0]
    for path, layer in params.items():
        kernel = layer['kernel']
        if kernel.ndim == 4:
            side = side if network.same else side - kernel.shape[0] + 1
            total += kernel.size * side**2
            side = side // 2 if path in network.pooled else side
        else:
            total += kernel.size
    return total


SPARSE, DENSE, ONNX = 'compact + sparse', 'Flax, dense', 'onnxruntime, dense'
WAYS: dict[str, Callable[[str, Tree, np.ndarray], tuple[Call, int | None]]] = {
    DENSE: _flax,
    ONNX: _onnxruntime,
    'torch, dense': _torch,
    'scipy CSR': _scipy,
    'compact, by XLA': _compact_xla,
    'compact, onnxruntime': _compact_onnxruntime,
    SPARSE: _compact_sparse,
}


def _worker(connection: Connection, way: str, name: str, params: Tree, x: np.ndarray) -> None:
    """Sends the logits and the multiply-adds; then, for every number of seconds, a time."""
    try:
        run, multiply_adds = WAYS[way](name, params, x)
        logits = jax.tree.leaves(run())[0]
    except ImportError as error:
        connection.send(str(error))
        return
    connection.send((np.asarray(logits), multiply_adds))
    while seconds := connection.recv():
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        connection.send(statistics.median(times))


class _Process:
    """A way of running a network, and what it has measured."""

    def __init__(self, way: str, name: str, params: Tree, x: np.ndarray) -> None:
        self.way, self.microseconds = way, []  # type: tuple[str, list[float]]
        context = multiprocessing.get_context('spawn')
        self._connection, theirs = context.Pipe()
        arguments = theirs, way, name, params, x
        self._process = context.Process(target=_worker, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f'{way} failed') from None
        if isinstance(answer, str):
            raise ImportError(answer)
        self.logits, self.multiply_adds = answer

    def turn(self, seconds: float) -> None:
        self._connection.send(seconds)
        self.microseconds.append(1e6 * self._connection.recv())

    def close(self) -> None:
        self._connection.send(0)
        self._process.join()

    def result(self) -> dict[str, Any]:
        low, median, high = np.percentile(self.microseconds, [10, 50, 90])
        return {
            'way': self.way,
            'us': {'p10': low, 'median': median, 'p90': high},
            'rounds_us': self.microseconds,
            'multiply_adds': self.multiply_adds,
        }


def _measure(
    name: str, params: Tree, batch: int, options: Options, console: Console
) -> list[dict[str, Any]]:
    x = NETWORKS[name].images(batch)
    processes: list[_Process] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(WAYS) + options.rounds)
        for way in WAYS:
            progress.update(task, description=f'{name}, batch {batch}: compiling {way}', advance=1)
            try:
                processes.append(_Process(way, name, params, x))
            except ImportError as error:
                console.print(f'left out: {way}: {error}', style='yellow', markup=False)
        for number in range(options.rounds):
            progress.update(
                task, description=f'{name}, batch {batch}: round {number + 1}', advance=1
            )
            for process in processes:
                process.turn(options.seconds)
    for process in processes:
        process.close()
        difference = np.max(np.abs(process.logits - processes[0].logits))
        if difference > 1e-4 * np.max(np.abs(processes[0].logits)):
            raise RuntimeError(f'{process.way} computes something else than {processes[0].way}')
    return [process.result() for process in processes]


def times_faster(results: list[dict[str, Any]], slow: str, fast: str = SPARSE) -> float | None:
    """How many times as long, round by round, in the median; None if one was left out."""
    rounds = {result['way']: result['rounds_us'] for result in results}
    if slow not in rounds or fast not in rounds:
        return None
    return float(np.median(np.divide(rounds[slow], rounds[fast])))


def _print(title: str, results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=title)
    table.add_column('', no_wrap=True)
    for heading in ('us', 'p10', 'p90', 'ratio', 'multiply-adds'):
        table.add_column(heading, justify='right', no_wrap=True)
    for result in results:
        table.add_row(
            result['way'],
            *(f'{result["us"][key]:.1f}' for key in ('median', 'p10', 'p90')),
            f'{times_faster(results, result["way"]):.2f}',
            f'{result["multiply_adds"]:,}',
        )
    console.print(table)


def _folded(params: Tree, statistics: Tree) -> Tree:
    """The VGG-like network's layers, all but the last with the batch normalisation after them."""
    *normalised, last = NETWORKS['vgg'].zeros
    folded = {last: params[last]}
    for number, path in enumerate(normalised):
        own, means = params[f'BatchNorm_{number}'], statistics[f'BatchNorm_{number}']
        scale = own['scale'] / np.sqrt(means['var'] + 1e-5)  # Flax's epsilon
        bias = (params[path]['bias'] - means['mean']) * scale + own['bias']
        folded[path] = {'kernel': params[path]['kernel'] * scale, 'bias': bias}
    return folded


def _network_of(path: Path) -> tuple[str, Tree]:
    tree = svd.load(path)
    tree = tree if isinstance(tree, dict) else {}
    params = tree.get('params', tree)
    found = {layer: np.shape(own['kernel']) for layer, own in params.items() if 'kernel' in own}
    for name, network in NETWORKS.items():
        if _kernel_shapes(network) == found:
            if name == 'vgg' and 'batch_stats' in tree:
                params = _folded(params, tree['batch_stats'])
            return name, {layer: params[layer] for layer in network.zeros}
    raise ValueError(f'{path} holds none of {", ".join(NETWORKS)}')


def main(options: Options) -> None:
    console = Console()
    try:
        networks = [(str(path), *_network_of(path)) for path in options.files]
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    if not networks:
        console.print('random networks of the sparsity of trained ones')
        networks = [(name, name, random_network(name)) for name in NETWORKS]
    measured: list[dict[str, Any]] = []
    for source, name, params in networks:
        total = sum(layer['kernel'].size for layer in params.values())
        left = sum(np.count_nonzero(layer['kernel']) for layer in params.values())
        for batch in NETWORKS[name].batches:
            results = _measure(name, params, batch, options, console)
            _print(
                f'{source}, {total / left:.0f} times fewer weights, batch {batch}', results, console
            )
            measured.append(
                {'network': name, 'source': source, 'compression': total / left, 'batch': batch}
                | {'ways': results, 'times_faster': {
                    slow: times_faster(results, slow) for slow in (DENSE, ONNX)
                }}
            )  # fmt: skip
    if options.out:
        cores = len(os.sched_getaffinity(0))
        write_json(options.out, {**environment(*_PACKAGES), 'cores': cores, 'measured': measured})
        console.print(f'written: {options.out}')


if __name__ == '__main__':
    main(tyro.cli(tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Options), description=__doc__))
