"""svd_jax.export: the files, run where this library is not."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import svd_jax as svd
from sparse_networks import NETWORKS, assert_same, sparse_network
from svd_jax.export import _replay, export_onnx, export_stablehlo
from svd_jax.program import trace

pytestmark = pytest.mark.usefixtures('quick_compilation')

# Runs every FILE of a folder on FILE.npz and writes FILE.out.npz.
RUN_STABLEHLO = """
import pathlib, sys
import jax, numpy as np
for path in pathlib.Path(sys.argv[1]).glob('*.stablehlo'):
    network = jax.export.deserialize(bytearray(path.read_bytes()))
    inputs = np.load(f'{path}.npz').values()
    np.savez(f'{path}.out.npz', *jax.tree.leaves(network.call(*inputs)))
assert 'svd_jax' not in sys.modules
"""
RUN_ONNX = """
import pathlib, sys
import numpy as np, onnxruntime
for path in pathlib.Path(sys.argv[1]).glob('*.onnx'):
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider'])
    inputs = dict(np.load(f'{path}.npz'))
    np.savez(f'{path}.out.npz', *session.run(None, inputs))
assert not {'svd_jax', 'jax'} & set(sys.modules)
"""

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('jax2onnx', 'onnxruntime')),
    reason='the extra onnx is not installed',
)


class TwoInputs(nn.Module):
    """Not compacted; a residual sum over an input of its own, and two results."""

    @nn.compact
    def __call__(self, x, y):
        x = nn.max_pool(nn.Conv(4, (3, 3))(x), (3, 3), (2, 2), padding='SAME').mean((1, 2))
        return {'sum': nn.Dense(3)(x) + y, 'twice': 2 * y}


@functools.cache
def case(name: str) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """A network, example inputs, and others of another batch size."""
    if name == 'two inputs':
        rng = np.random.default_rng(0)
        x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 7, 7, 2), (5, 3)))
        variables = TwoInputs().init(jax.random.key(0), x, y)
        return lambda x, y: TwoInputs().apply(variables, x, y), (x[:2], y[:2]), (x, y)
    model, variables, x, options = sparse_network(name)
    small = svd.compact(model, variables, x, **options)
    return small, (x,), (jnp.concatenate([x, -2 * x, x**2]),)


CASES = [*NETWORKS, 'two inputs']


def outputs(folder: Path, suffix: str, export_to: Any, script: str) -> dict[str, Any]:
    """What was wanted and what another process computed, of every case."""
    wanted = {}
    for name in CASES:
        network, example, others = case(name)
        path = folder / f'{name}.{suffix}'
        assert export_to(network, *example, path=path) == path.read_bytes()
        np.savez(f'{path}.npz', **{f'input_{i}': x for i, x in enumerate(others)})
        wanted[name] = jax.tree.leaves(network(*others))
    subprocess.run([sys.executable, '-c', script, str(folder)], check=True, cwd=folder)
    return {
        name: (list(np.load(folder / f'{name}.{suffix}.out.npz').values()), wanted[name])
        for name in CASES
    }


@pytest.fixture(scope='module')
def stablehlo(tmp_path_factory, quick_compilation) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp('stablehlo')
    return outputs(folder, 'stablehlo', export_stablehlo, RUN_STABLEHLO)


@pytest.fixture(scope='module')
def onnx(tmp_path_factory, quick_compilation) -> dict[str, Any]:
    return outputs(tmp_path_factory.mktemp('onnx'), 'onnx', export_onnx, RUN_ONNX)


@pytest.mark.parametrize('name', CASES)
def test_stablehlo_runs_in_plain_jax(name: str, stablehlo) -> None:
    assert_same(*stablehlo[name])


@needs_onnx
@pytest.mark.parametrize('name', CASES)
def test_onnx_runs_in_onnxruntime(name: str, onnx) -> None:
    assert_same(*onnx[name])


def test_stablehlo_is_for_every_platform_and_any_batch() -> None:
    network, example, _ = case('two inputs')
    loaded = export.deserialize(bytearray(export_stablehlo(network, *example)))
    assert set(loaded.platforms) == {'cpu', 'cuda', 'rocm', 'tpu'}
    assert [str(aval) for aval in loaded.in_avals] == ['float32[batch,7,7,2]', 'float32[batch,3]']


@needs_onnx
def test_onnx_has_a_batch_of_any_size_and_plain_operations() -> None:
    import onnx

    network, example, _ = case('two inputs')
    graph = onnx.load_from_string(export_onnx(network, *example)).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes == {
        'input_0': ['batch', 7, 7, 2],
        'input_1': ['batch', 3],
        'output_0': ['batch', 3],
        'output_1': ['batch', 3],
    }
    assert {'Conv', 'MaxPool'} <= {node.op_type for node in graph.node}


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=15)
def test_what_is_replayed_for_onnx_pools_as_the_network_does(data: st.DataObject) -> None:
    space = data.draw(st.integers(1, 2))

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(space))

    window, strides = draw(1, 3), draw(1, 3)
    padding = data.draw(st.sampled_from(['SAME', 'VALID', [(0, 1)] * space, [(1, 1)] * space]))

    def network(x):
        return nn.max_pool(-x, window, strides, padding)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *draw(3, 6), 3)), jnp.float32)
    (found,) = _replay(trace(network, x))(x)
    np.testing.assert_array_equal(found, network(x))


EXPORTS = [export_stablehlo, pytest.param(export_onnx, marks=needs_onnx)]


@pytest.mark.parametrize('export_to', EXPORTS)
def test_a_network_that_depends_on_the_batch_is_refused(export_to) -> None:
    def network(x):
        return x if x.shape[0] > 4 else 2 * x

    with pytest.raises(ValueError, match=r'another size of the batch.*inconclusive'):
        export_to(network, jnp.ones((2, 3)))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    with pytest.raises(ImportError, match=r'pip install "svd_jax\[onnx\]"'):
        export_onnx(jnp.sin, jnp.ones(2))
