"""svd_jax.inspection and the commands, against what NumPy finds in the same arrays."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from jax import export

import svd_jax as svd
from svd_jax.__main__ import main
from svd_jax.inspection import compare, inspect, verify

DTYPES = ['float32', 'float16', 'float64', 'int32', 'bool', ml_dtypes.bfloat16]


@st.composite
def arrays(draw) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=shape) * (rng.random(shape) < draw(st.floats(0, 1)))
    return np.asarray(values, draw(st.sampled_from(DTYPES)))


def trees() -> st.SearchStrategy:
    names = st.text('abé/_', min_size=1, max_size=3)
    return st.recursive(
        arrays(),
        lambda children: st.one_of(
            st.dictionaries(names, children, min_size=1, max_size=3),
            st.lists(children, max_size=2),
        ),
        max_leaves=5,
    )


def numpy_leaves(tree: Any) -> list[np.ndarray]:
    """In the order of the tree: jax.tree would sort the names."""
    if isinstance(tree, (dict, list)):
        children = tree.values() if isinstance(tree, dict) else tree
        return [leaf for child in children for leaf in numpy_leaves(child)]
    return [tree]


@hypothesis.given(trees())
def test_inspect_counts_what_numpy_counts(tmp_path_factory, tree) -> None:
    path = tmp_path_factory.mktemp('inspect') / 'a.svd'
    written = svd.save(path, tree)
    leaves, found = numpy_leaves(tree), inspect(path)
    for layer, array in zip(found.layers, leaves, strict=True):
        assert layer.shape == array.shape
        assert layer.dtype == array.dtype.name
        assert layer.step is None
        assert layer.nonzero == (np.sum(array.astype(bool)), array.size)
        for axis, units in ((-1, layer.units), (-2, layer.inputs)):
            if array.ndim < -axis:
                assert units is None
            else:
                rows = np.moveaxis(array.astype(bool), axis, 0)
                assert units == (sum(row.any() for row in rows), array.shape[axis])
    assert found.dense_bytes == sum(array.nbytes for array in leaves)
    assert found.bytes == written == path.stat().st_size
    # Around everything: four bytes, a number, the checksum; and at most two words unused.
    assert 4 < found.sections['frame'] <= 7 + 4 + 8
    assert all(size >= 0 for size in found.sections.values())


def layer(seed: int, shape: tuple[int, int], density: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape) * (rng.random(shape) < density)
    kernel[:, 0] = 0
    return {
        'kernel': kernel.astype(np.float32),
        'log_sigma2': np.full(shape, -6, np.float32),
        'bias': rng.normal(size=shape[1]).astype(np.float32),
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same network, exactly and rounded."""
    network = {'Dense_0': layer(0, (60, 30), 0.1), 'Dense_1': layer(1, (30, 10), 0.3)}
    exact, rounded = tmp_path / 'exact.svd', tmp_path / 'rounded.svd'
    svd.save(exact, network)
    svd.save(rounded, network, tolerance=1.0)
    return exact, rounded


def test_what_an_array_takes_is_what_it_adds_to_a_file(files, tmp_path: Path) -> None:
    tree = svd.load(files[0])
    found = {layer.path: layer.bits / 8 for layer in inspect(files[0]).layers}
    kernel = tree['Dense_0']['kernel']
    alone = svd.save(tmp_path / 'alone.svd', {'kernel': kernel})
    empty = svd.save(tmp_path / 'empty.svd', {'kernel': kernel[:0]})
    assert found['Dense_0/kernel'] == pytest.approx(alone - empty, abs=8)  # whole words


def test_a_table_of_a_rounded_file(files) -> None:
    found = inspect(files[1])
    tree = svd.load(files[1])
    kernel = next(layer for layer in found.layers if layer.path == 'Dense_0/kernel')
    multiples = tree['Dense_0']['kernel'] / kernel.step
    np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-5)
    assert kernel.bits_per_weight < 20
    text = str(found)
    for part in ('Dense_0/kernel', '60×30', '29 of 30', 'bytes by section: header', 'positions'):
        assert part in text
    assert f'{files[1].stat().st_size:,} bytes' in text


def test_compare_counts_what_numpy_counts(files) -> None:
    found = compare(*files)
    assert not found.equal
    a, b = (svd.load(path)['Dense_0']['kernel'] for path in files)
    kernel = next(layer for layer in found.layers if layer.path == 'Dense_0/kernel')
    assert kernel.common == np.sum((a != 0) & (b != 0))
    assert kernel.only == (np.sum((a != 0) & (b == 0)), np.sum((a == 0) & (b != 0)))
    assert kernel.largest == pytest.approx(np.max(np.abs(np.float64(a) - b)))
    assert kernel.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert kernel.bytes[0] > 2 * kernel.bytes[1]
    assert found.bytes == tuple(path.stat().st_size for path in files)
    assert '4 of 4 arrays differ' in str(found)


@pytest.mark.parametrize(
    ('a', 'b', 'equal'),
    [
        (np.float32([1, np.nan, np.inf]), np.float32([1, np.nan, np.inf]), True),
        (np.float32([0.0]), np.float32([-0.0]), False),
        (np.float32([1]), np.float64([1]), False),
        (np.float32([1]), np.float32([[1]]), False),
        (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), True),
        (np.array(True), np.array(True), True),
    ],
)
def test_equal_is_bit_by_bit(tmp_path: Path, a, b, equal: bool) -> None:
    svd.save(tmp_path / 'a.svd', {'x': a})
    svd.save(tmp_path / 'b.svd', {'x': b})
    found = compare(tmp_path / 'a.svd', tmp_path / 'b.svd')
    assert found.equal == equal
    assert found.layers[0].largest in (0, None)


def test_names_that_make_the_same_path(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    svd.save(tmp_path / 'a.svd', {'a/b': one, 'a': {'b': one}})
    assert [layer.path for layer in inspect(tmp_path / 'a.svd').layers] == ['a/b', 'a/b']
    with pytest.raises(ValueError, match='two arrays have the path a/b: rename'):
        compare(tmp_path / 'a.svd', tmp_path / 'a.svd')
    with pytest.raises(ValueError, match='two arrays have the path a/b: rename'):
        svd.export_arrays({'a/b': one, 'a': {'b': one}}, tmp_path / 'a.npz')


def test_as_large_as_one_allows(tmp_path: Path, capsys) -> None:
    path = tmp_path / 'a.svd'
    svd.save(path, {'a': np.ones(100, np.float32)})
    for look in (inspect, verify, lambda path, **limit: compare(path, path, **limit)):
        look(path, max_bytes=400)
        with pytest.raises(ValueError, match='its arrays take 400 bytes: pass max_bytes='):
            look(path, max_bytes=399)
    assert run(capsys, '--max-bytes', '399', 'inspect', path)[0] == 2
    assert run(capsys, '--max-bytes', '400', 'inspect', path)[0] == 0


def test_arrays_that_only_one_file_has(tmp_path: Path) -> None:
    svd.save(tmp_path / 'a.svd', {'x': np.ones(2, np.float32), 'y': np.ones(2, np.float32)})
    svd.save(tmp_path / 'b.svd', {'z': np.ones(2, np.float32), 'x': np.ones(2, np.float32)})
    found = compare(tmp_path / 'a.svd', tmp_path / 'b.svd')
    assert {layer.path: layer.shapes for layer in found.layers} == {
        'x': ((2,), (2,)), 'y': ((2,), None), 'z': (None, (2,)),
    }  # fmt: skip
    assert [layer.equal for layer in found.layers] == [True, False, False]
    assert '2 float32 -> missing' in str(found)


def test_verify_finds_every_damaged_byte(tmp_path: Path) -> None:
    path = tmp_path / 'a.svd'
    size = svd.save(path, {'kernel': np.eye(5, dtype=np.float32), 'bias': np.ones(5, np.float32)})
    assert verify(path) == (size, 2, 30)
    assert str(verify(path)) == f'sound: {size} bytes, 2 arrays, 30 numbers'
    data = path.read_bytes()
    for at in range(size):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(svd.SvdFormatError):
            verify(path)


# The commands.


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_commands_print_what_the_functions_return(files, capsys) -> None:
    exact, rounded = files
    assert run(capsys, 'inspect', exact) == (0, f'{inspect(exact)}\n', '')
    assert run(capsys, 'compare', exact, rounded) == (1, f'{compare(exact, rounded)}\n', '')
    assert run(capsys, 'compare', exact, exact)[0] == 0
    assert run(capsys, 'verify', exact, rounded) == (
        0, f'{exact}: {verify(exact)}\n{rounded}: {verify(rounded)}\n', '',
    )  # fmt: skip


def test_verify_goes_on_after_a_damaged_file(files, tmp_path: Path, capsys) -> None:
    exact, damaged = files
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, out, err = run(capsys, 'verify', damaged, exact)
    assert (code, out) == (1, f'{exact}: {verify(exact)}\n')
    assert err.startswith(f'svd_jax: {damaged}: ')
    assert err.count('\n') == 1
    assert run(capsys, 'verify', tmp_path / 'none.svd', damaged)[0] == 2


class Network(nn.Module):
    """With an argument of its own."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, x, negative: bool = False):
        x = nn.Dense(4)(x)
        return -self.scale * x if negative else x


TWICE = Network(2.0)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    monkeypatch.setitem(sys.modules, 'a_model', sys.modules[__name__])
    params = jax.device_get(TWICE.init(jax.random.key(0), jnp.ones((1, 3)))['params'])
    path = tmp_path / 'network.svd'
    svd.save(path, params)
    return path, params


def test_export_of_arrays_is_read_by_others(network, tmp_path: Path, capsys) -> None:
    path, params = network
    for suffix in ('npz', 'safetensors', 'msgpack'):
        out = tmp_path / f'out.{suffix}'
        code, text, _ = run(capsys, 'export', path, '--to', out)
        assert (code, text) == (0, f'{out}: {out.stat().st_size:,} bytes\n')
    arrays = dict(np.load(tmp_path / 'out.npz'))
    assert arrays.keys() == {'Dense_0/kernel', 'Dense_0/bias'}
    np.testing.assert_array_equal(arrays['Dense_0/kernel'], params['Dense_0']['kernel'])
    # A .safetensors file is a length, names and places as JSON, and the bytes.
    data = (tmp_path / 'out.safetensors').read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    entry = json.loads(data[8:start])['Dense_0/kernel']
    begin, end = (start + offset for offset in entry['data_offsets'])
    kernel = np.frombuffer(data[begin:end], '<f4').reshape(entry['shape'])
    np.testing.assert_array_equal(kernel, params['Dense_0']['kernel'])
    restored = serialization.msgpack_restore((tmp_path / 'out.msgpack').read_bytes())
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_numpys_files_get_bfloat16_as_float32(tmp_path: Path, capsys) -> None:
    svd.save(tmp_path / 'a.svd', {'x': np.asarray([1.5, -2], ml_dtypes.bfloat16)})
    assert run(capsys, 'export', tmp_path / 'a.svd', '--to', tmp_path / 'a.npz')[0] == 0
    x = np.load(tmp_path / 'a.npz')['x']
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [1.5, -2])


@pytest.mark.parametrize('model', ['Network', 'TWICE'])
def test_export_of_a_network(network, tmp_path: Path, capsys, model: str) -> None:
    path, params = network
    code, _, err = run(
        capsys, 'export', path, '--to', tmp_path / 'out.stablehlo', '--model', f'a_model:{model}',
        '--input', '1,3:float32', '--option', 'negative=true',
    )  # fmt: skip
    assert (code, err) == (0, '')
    x = np.float32(np.random.default_rng(0).normal(size=(5, 3)))
    data = (tmp_path / 'out.stablehlo').read_bytes()
    found = export.deserialize(bytearray(data)).call(x)
    dense, scale = params['Dense_0'], {'Network': 1, 'TWICE': 2}[model]
    np.testing.assert_allclose(found, -scale * (x @ dense['kernel'] + dense['bias']), rtol=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['inspect', 'none.svd'], 'none.svd: No such file'),
        (['inspect', '.'], r'\.: Is a directory'),
        (['compare', 'network.svd', 'text'], 'text: not an .svd file'),
        (['export', 'text', '--to', 'out.npz'], 'text: not an .svd file'),
        (['export', 'network.svd', '--to', 'out.h5'], r'out.h5 must end in \.npz'),
        (['export', 'network.svd', '--to', 'none/out.npz'], 'none/out.npz: No such file'),
        (['export', 'network.svd', '--to', 'out.onnx'], 'for .onnx, --model and --input'),
        (['--model', 'Network'], 'must be MODULE:ATTRIBUTE'),
        (['--model', 'no_such_module:Network'], "No module named 'no_such_module'"),
        (['--model', 'a_model:None_such'], "has no attribute 'None_such'"),
        (['--model', 'a_model:jnp'], 'not callable'),
        (['--model', 'a_model:DTYPES'], 'not callable'),
        (['--model', 'a_model:dict'], 'has no attribute|is a dict'),
        (['--model', 'a_model:Network', '--input', '1,5'], 'expected'),
        (['export', 'named.svd', '--to', 'out.npz'], 'cannot be called file in .npz'),
        (['--model', 'a_model:Network', '--option', 'none=1'], "does not take.*'none'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    network, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(network[0].parent)
    Path('text').write_text('some text')
    svd.save('named.svd', {'file': np.ones(1)})
    if arguments[0] == '--model':
        given = [] if '--input' in arguments else ['--input', '1,3']
        arguments = ['export', 'network.svd', '--to', 'out.stablehlo', *arguments, *given]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, '')
    assert err.startswith('svd_jax: ')
    assert err.count('\n') == 1
    assert re.search(message, err)


@pytest.mark.parametrize('text', ['-1,28,28,1', '1,16:str', '1,16:O', '', '1,x'])
def test_an_input_that_is_none(network, capsys, text: str) -> None:
    path = network[0]
    with pytest.raises(SystemExit) as exit_:
        run(capsys, 'export', path, '--to', 'out.onnx', '--model', 'a:b', f'--input={text}')
    assert exit_.value.code == 2
    assert 'must be a shape, as in 1,28,28,1' in capsys.readouterr().err


def test_scalars_stay_scalars(tmp_path: Path) -> None:
    safetensors = pytest.importorskip('safetensors.numpy')
    svd.export_arrays({'a': np.float32(2)}, tmp_path / 'a.safetensors')
    assert safetensors.load_file(tmp_path / 'a.safetensors')['a'].shape == ()


@pytest.mark.parametrize('command', ['verify', 'inspect'])
def test_a_reader_that_has_enough_is_no_error(files, command: str) -> None:
    many = [files[0]] * (300 if command == 'verify' else 1)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, '-m', 'svd_jax', command, *map(str, many)],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, '')


def test_as_a_process(files) -> None:
    command = [sys.executable, '-m', 'svd_jax', 'compare', *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, '')
    assert 'arrays differ' in done.stdout
