"""The benchmark of inference: what every way computes, and one run of it on a tiny network."""

import json
import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import svd_jax as svd
from benchmarks import inference
from benchmarks.inference import DENSE, NETWORKS, ONNX, SPARSE, WAYS, FoldedVGG, Network, Options
from experiments import models

pytestmark = pytest.mark.usefixtures('quick_compilation', 'narrow')

NARROW = NETWORKS['vgg']._replace(
    model=FoldedVGG(1 / 16), zeros=dict.fromkeys(NETWORKS['vgg'].zeros, 50.0) | {'Dense_0': 96.0}
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VGG-like network of a sixteenth of the width."""
    monkeypatch.setitem(NETWORKS, 'vgg', NARROW)


def images(count: int, *shape: int) -> np.ndarray:
    shape = (count, *(shape or (28, 28, 1)))
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def by_hand(params: dict, x: np.ndarray, network: Network = NETWORKS['lenet5']) -> np.ndarray:
    """The logits, in NumPy: convolutions, some pooled 2x2; ReLU between layers."""
    y = x.astype(np.float64)
    for number, (path, layer) in enumerate(params.items()):
        kernel = layer['kernel']
        y = np.maximum(y, 0) if number else y
        if kernel.ndim == 4:
            if network.same:
                y = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(y, kernel.shape[:2], (1, 2))
            y = np.einsum('nhwiab,abio->nhwo', windows, kernel, optimize=True) + layer['bias']
            n, h, w, c = y.shape
            if path in network.pooled:
                y = y.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        else:
            y = y.reshape(len(y), -1) @ kernel + layer['bias']
    return y


@pytest.mark.parametrize('name', NETWORKS)
def test_a_random_network_is_as_sparse_as_it_should_be(name: str) -> None:
    params, network = inference.random_network(name), NETWORKS[name]
    init = network.model.init
    wanted = jax.eval_shape(init, jax.random.key(1), network.images(1))['params']
    for layer, zeros in network.zeros.items():
        kernel = params[layer]['kernel']
        assert kernel.shape == wanted[layer]['kernel'].shape
        assert params[layer]['bias'].shape == wanted[layer]['bias'].shape
        assert np.count_nonzero(kernel == 0) == round(kernel.size * zeros / 100)
        assert np.std(kernel[kernel != 0]) == pytest.approx(1, rel=0.2)
    assert params.keys() == wanted.keys()


# For every weight, at how many positions it is used.
MULTIPLY_ADDS = {
    'lenet300': 784 * 300 + 300 * 100 + 100 * 10,
    'lenet5': 25 * 20 * 24**2 + 25 * 20 * 50 * 8**2 + 800 * 500 + 500 * 10,
    'vgg': 9 * (
        (3 * 4 + 4 * 4) * 32**2 + (4 * 8 + 8 * 8) * 16**2 + (8 * 16 + 2 * 16 * 16) * 8**2
        + (16 * 32 + 2 * 32 * 32) * 4**2 + 3 * 32 * 32 * 2**2
    ) + 32 * 32 + 32 * 10,
}  # fmt: skip


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('way', WAYS)
def test_every_way_computes_the_network(way: str, name: str) -> None:
    params, x = inference.random_network(name), images(3, *NETWORKS[name].image)
    try:
        run, multiply_adds = WAYS[way](name, params, x)
    except ImportError as error:
        pytest.skip(str(error))
    logits, wanted = np.asarray(jax.tree.leaves(run())[0]), by_hand(params, x, NETWORKS[name])
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    if 'dense' in way:
        assert multiply_adds == MULTIPLY_ADDS[name]
    else:
        left = sum(np.count_nonzero(layer['kernel']) for layer in params.values())
        assert multiply_adds is not None
        assert multiply_adds < MULTIPLY_ADDS[name]
        assert multiply_adds >= left / 2  # some of what is left is in units that nothing reads
    if way == 'scipy CSR':
        assert multiply_adds == left


def result(way: str, *microseconds: float) -> dict[str, Any]:
    return {'way': way, 'rounds_us': list(microseconds)}


def test_ratios_are_of_the_same_round() -> None:
    results = [result(DENSE, 10, 40, 90), result(SPARSE, 5, 10, 10)]
    assert inference.times_faster(results, DENSE) == 4  # of 2, 4 and 9
    assert inference.times_faster(results, SPARSE) == 1
    assert inference.times_faster(results, SPARSE, DENSE) == pytest.approx(1 / 4)
    assert inference.times_faster(results, ONNX) is None
    assert inference.times_faster(results[:1], DENSE) is None


class Thread(threading.Thread):
    """In place of a process: to know the tiny network, and to start at once."""

    def __init__(self, *, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
        self._own = Connection(os.dup(args[0].fileno()))  # the other one is closed
        super().__init__(target=target, args=(self._own, *args[1:]), daemon=daemon)

    def run(self) -> None:
        with self._own:
            super().run()


class Threads:
    Process, Pipe = Thread, staticmethod(multiprocessing.Pipe)


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        assert deterministic
        return nn.Dense(10)(x.reshape(len(x), -1))


def _missing(*_: Any) -> Any:
    raise ImportError("No module named 'missing'")


def _wrong(name: str, params: inference.Tree, x: np.ndarray) -> tuple[inference.Call, int | None]:
    run, multiply_adds = WAYS[DENSE](name, params, x)
    return lambda: 1.01 * run(), multiply_adds


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {DENSE: WAYS[DENSE], ONNX: _missing, SPARSE: WAYS[SPARSE]}
    network = Network(Tiny(), (1, 3), {'Dense_0': 75.0})
    monkeypatch.setattr(inference, 'WAYS', ways)
    monkeypatch.setattr(inference, 'NETWORKS', {'tiny': network})
    monkeypatch.setattr(inference.multiprocessing, 'get_context', lambda method: Threads)
    monkeypatch.setenv('COLUMNS', '120')


@pytest.mark.usefixtures('tiny')
def test_a_run_prints_a_table_and_writes_what_it_measured(tmp_path: Path, capsys) -> None:
    out = tmp_path / 'inference.json'
    inference.main(Options(rounds=4, seconds=1e-3, out=out))
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert report['cores'] >= 1
    assert report['versions']['jax'] == jax.__version__
    assert [(m['network'], m['batch']) for m in report['measured']] == [('tiny', 1), ('tiny', 3)]
    for measured in report['measured']:
        assert measured['compression'] == pytest.approx(4)
        dense, sparse = measured['ways']
        assert (dense['way'], sparse['way']) == (DENSE, SPARSE)
        assert dense['multiply_adds'] == 7840
        assert sparse['multiply_adds'] < 7840
        for way in (dense, sparse):
            assert len(way['rounds_us']) == 4
            assert min(way['rounds_us']) > 0
            low, median, high = (way['us'][key] for key in ('p10', 'median', 'p90'))
            assert min(way['rounds_us']) <= low <= median <= high <= max(way['rounds_us'])
            assert median == pytest.approx(np.median(way['rounds_us']))
        ratios = np.divide(dense['rounds_us'], sparse['rounds_us'])
        assert measured['times_faster'] == {DENSE: pytest.approx(np.median(ratios)), ONNX: None}
        title = f'tiny, 4 times fewer weights, batch {measured["batch"]}'
        table = printed.partition(title)[2].splitlines()
        (row,) = [line for line in table if DENSE in line][:1]
        assert f'{dense["us"]["median"]:.1f}' in row
        assert f'{np.median(ratios):.2f}' in row
        assert '7,840' in row
    assert printed.count(f"left out: {ONNX}: No module named 'missing'") == 2
    assert f'written: {out}' in ' '.join(printed.split())


@pytest.mark.usefixtures('tiny')
def test_a_way_that_computes_something_else_stops_the_run(monkeypatch) -> None:
    monkeypatch.setitem(inference.WAYS, SPARSE, _wrong)
    with pytest.raises(RuntimeError, match=f'{SPARSE.replace("+", ".")} computes something else'):
        inference.main(Options(rounds=1, seconds=1e-3))


@pytest.mark.usefixtures('tiny')
@pytest.mark.parametrize('wrapped', [False, True])
def test_a_network_from_a_file_is_timed(tmp_path: Path, capsys, wrapped: bool) -> None:
    params, path = inference.random_network('tiny', seed=1), tmp_path / 'tiny.svd'
    svd.save(path, {'params': params} if wrapped else params)
    inference.main(Options(files=(path,), rounds=1, seconds=1e-3, out=tmp_path / 'x.json'))
    (first, _) = json.loads((tmp_path / 'x.json').read_text())['measured']
    assert (first['source'], first['network']) == (str(path), 'tiny')
    assert 'random networks' not in capsys.readouterr().out


def test_batch_normalisation_is_folded_into_what_comes_before(tmp_path: Path) -> None:
    model, x = models.VGGLike(width=1 / 16), images(2, 32, 32, 3)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    svd.save(tmp_path / 'vgg.svd', variables := svd.sparsify(variables))
    name, params = inference._network_of(tmp_path / 'vgg.svd')
    assert name == 'vgg'
    folded, _ = NARROW.model.apply({'params': params}, x)
    wanted, _ = model.apply(variables, x, deterministic=True)
    np.testing.assert_allclose(folded, wanted, rtol=1e-4)


def test_a_file_that_is_no_such_network_is_refused(tmp_path: Path, capsys) -> None:
    other = {'Dense_0': {'kernel': np.ones((2, 2), np.float32)}}
    normalised = {'params': other, 'batch_stats': {'BatchNorm_0': {'mean': np.ones(2, 'f')}}}
    svd.save(tmp_path / 'other.svd', other)
    svd.save(tmp_path / 'normalised.svd', normalised)
    for name, message in (
        ('other.svd', 'holds none of lenet300, lenet5, vgg'),
        ('normalised.svd', 'holds none of lenet300, lenet5, vgg'),
        ('gone', 'No such'),
    ):
        with pytest.raises(SystemExit) as stopped:
            inference.main(Options(files=(tmp_path / name,)))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_processes_measure_or_say_that_they_failed(capfd) -> None:
    params, x = inference.random_network('lenet300'), images(2)
    process = inference._Process('scipy CSR', 'lenet300', params, x)
    for _ in range(2):
        process.turn(1e-3)
    process.close()
    np.testing.assert_allclose(process.logits, by_hand(params, x), rtol=1e-4, atol=1e-3)
    assert len(process.result()['rounds_us']) == 2
    with pytest.raises(RuntimeError, match='no such way failed'):
        inference._Process('no such way', 'lenet300', params, x)
    assert 'KeyError' in capfd.readouterr().err
