"""svd_jax.file: what is saved is what is loaded, small, and nothing else can be loaded."""

import os
import stat
import tracemalloc
import zlib
from collections.abc import Iterator
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
from hypothesis.extra import numpy as npst

import svd_jax as svd
from svd_jax import arrays, entropy, file, quantise

DTYPES = [
    np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.bool_,
    np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
]  # fmt: skip


@st.composite
def leaves(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any bits, with as many zeros as it comes."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    array = np.frombuffer((data & 1 if dtype.kind == 'b' else data).tobytes(), dtype).reshape(shape)
    return np.where(rng.random(shape) < draw(st.floats(0, 1)), array, np.zeros((), dtype))


names = st.text(max_size=6)
trees = st.recursive(
    leaves(),
    lambda children: (
        st.dictionaries(names, children, max_size=3)
        | st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
    ),
    max_leaves=5,
)


def assert_same(found: Any, wanted: Any) -> None:
    """To the last bit, in type, shape and order."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()


@hypothesis.given(trees)
@hypothesis.settings(
    max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_what_was_saved_is_loaded_to_the_last_bit(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / 'tree.svd'
    assert svd.save(path, tree) == path.stat().st_size
    assert_same(svd.load(path), tree)
    assert [p.name for p in tmp_path.iterdir()] == ['tree.svd']


def sparse(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)


def entropy_bytes(density: float, count: int) -> float:
    """Of the positions of a random matrix: no code can do with less."""
    p = np.array([density, 1 - density])
    return float(-np.sum(p * np.log2(p)) * count / 8)


@pytest.mark.parametrize('density', [0.001, 0.01, 0.1, 0.5, 0.9])
def test_random_positions_take_little_more_than_their_entropy(density: float) -> None:
    mask = np.random.default_rng(0).random((400, 500)) < density
    writer = entropy.Writer()
    entropy.positions(writer, mask, mask.shape)
    data = writer.finish()
    bound = entropy_bytes(mask.mean(), mask.size)
    # Which rows and columns have any is told first, which pays only where there is structure.
    slack = 1.06 if density > 0.001 else 1.3
    assert 0.97 * bound < len(data) < slack * bound + 16
    assert np.array_equal(entropy.positions(entropy.Reader(data), None, mask.shape), mask)


def test_dead_rows_and_columns_cost_next_to_nothing() -> None:
    rng, size = np.random.default_rng(0), {}
    for rows, columns in ((40, 50), (400, 500)):
        mask = np.zeros((rows, columns), bool)
        mask[:40, :50] = rng.random((40, 50)) < 0.2
        writer = entropy.Writer()
        entropy.positions(writer, mask, mask.shape)
        size[rows] = len(writer.finish())
    assert size[400] < 1.4 * size[40]


def position_bytes(masks: list[np.ndarray]) -> list[int]:
    """So many are there after each of the masks, which are of one network."""
    writer, sizes = entropy.Writer(), []
    for mask in masks:
        entropy.positions(writer, mask, mask.shape)
        sizes.append(len(writer.finish()))
    reader = entropy.Reader(writer.finish())
    for mask in masks:
        assert np.array_equal(entropy.positions(reader, None, mask.shape), mask)
    return sizes


@pytest.mark.parametrize('positions', [1, 16])
def test_units_of_one_layer_tell_which_inputs_of_the_next_are_read(positions: int) -> None:
    rng = np.random.default_rng(0)
    alive = rng.random(300) < 0.3
    first = (rng.random((100, 300)) < 0.3) & alive
    second = (rng.random((300 * positions, 40)) < 0.3) & np.tile(alive, positions)[:, None]
    other = (rng.random((301, 300)) < 0.3) & alive  # of no size that fits
    together = position_bytes([first, second])
    apart = position_bytes([other[:100], second[rng.permutation(len(second))]])
    # Their entropy by itself, less what they take when it is known.
    saved = entropy_bytes(0.3, len(second))
    assert together[1] - together[0] < apart[1] - apart[0] - 0.8 * saved


def test_a_bias_that_is_zero_for_dead_units_says_it_only_once() -> None:
    rng = np.random.default_rng(0)
    alive = rng.random(300) < 0.3
    kernel = (rng.random((100, 300)) < 0.3) & alive
    for masks in ([kernel, alive[None]], [alive[None], kernel]):
        both = position_bytes(masks)
        assert both[1] < position_bytes([kernel])[0] + 8


def test_neighbouring_pixels_with_the_same_signs_cost_less() -> None:
    rng, size = np.random.default_rng(0), {}
    smooth = np.add.outer(np.arange(28) < 14, np.arange(28) < 14)[..., None] % 2 * np.ones(20)
    for name, signs in (('smooth', 2 * smooth - 1), ('rough', rng.choice([-1, 1], (28, 28, 20)))):
        writer = entropy.Writer()
        levels = signs.astype(np.int64).reshape(784, 20)
        arrays.quantised(writer, levels, levels.shape)
        data = writer.finish()
        mask, entries = arrays.quantised(entropy.Reader(data), None, levels.shape)
        assert np.array_equal(mask, levels != 0)
        assert np.array_equal(entries, levels[mask])
        size[name] = len(data)
    assert size['rough'] > 784 * 20 / 8
    assert size['smooth'] < 0.2 * size['rough']


def test_a_sparse_network_makes_a_small_file_that_plain_flax_runs(tmp_path: Path) -> None:
    rng, model, x = np.random.default_rng(0), nn.Dense(100), jnp.ones((2, 300))
    params = {'kernel': sparse(rng, (300, 100), 0.02), 'bias': np.zeros(100, np.float32)}
    size = svd.save(tmp_path / 'small.svd', params)
    count = np.count_nonzero(params['kernel'])
    # At least the mantissas are random; with signs, exponents and positions.
    assert 23 / 8 * count < size < 4.6 * count
    found = svd.load(tmp_path / 'small.svd')
    assert np.array_equal(model.apply({'params': found}, x), model.apply({'params': params}, x))


def variational(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kernel = sparse(rng, (60, 40), 0.3) + 1e-4
    log_sigma2 = np.log(rng.uniform(0.01, 0.1, kernel.shape).astype(np.float32) ** 2)
    bias = rng.normal(size=40).astype(np.float32)
    return {'layer': {'kernel': kernel, 'log_sigma2': log_sigma2, 'bias': bias}}


def test_of_a_variational_tree_the_sparse_one_is_saved(tmp_path: Path) -> None:
    params, path = variational(), tmp_path / 'a.svd'
    svd.save(path, params, threshold=2.0)
    found, wanted = svd.load(path)['layer'], svd.sparsify(params, 2.0)['layer']
    assert_same(found, {name: np.asarray(leaf) for name, leaf in wanted.items()})


def test_larger_tolerances_make_smaller_files_and_larger_errors(tmp_path: Path) -> None:
    params, path = variational(), tmp_path / 'a.svd'
    wanted = np.asarray(svd.sparsify(params)['layer']['kernel'])
    sigma = np.exp(params['layer']['log_sigma2'] / 2)
    sizes, errors = [svd.save(path, params)], [0.0]
    for tolerance in (0.01, 0.1, 0.5):
        sizes.append(svd.save(path, params, tolerance=tolerance))
        found = svd.load(path)['layer']
        assert found['kernel'].dtype == np.float32
        assert not np.any(found['kernel'][wanted == 0])
        kept = wanted != 0
        errors.append(float(np.sqrt(np.mean(np.square((found['kernel'] - wanted) / sigma)[kept]))))
        assert errors[-1] < 2 * tolerance
        assert np.abs(found['bias'] - params['layer']['bias']).max() < tolerance * sigma.max()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2.5
    assert errors == sorted(errors)


@pytest.mark.parametrize('bits', [7.0, 10.0, 16.0])
def test_a_file_takes_as_many_bits_a_weight_as_it_may(tmp_path: Path, bits: float) -> None:
    params, path = variational(), tmp_path / 'a.svd'
    kept = np.count_nonzero(svd.sparsify(params)['layer']['kernel'])
    size = svd.save(path, params, bits=bits)
    assert size == path.stat().st_size
    assert 0.9 * bits < 8 * size / kept <= bits


@hypothesis.given(st.floats(2.0**-40, 2.0**22))
def test_steps_in_a_byte_are_near_any_size(size: float) -> None:
    code = quantise.step_code(size)
    assert 0 <= code <= 255
    assert abs(quantise.step(code) / size - 1) <= 1 / 8


def test_every_step_has_its_number() -> None:
    assert [quantise.step_code(quantise.step(code)) for code in range(256)] == list(range(256))


def nested(depth: int) -> Any:
    """Dicts in dicts; the array in the last is that deep."""
    tree: Any = np.ones(1)
    for _ in range(depth):
        tree = {'a': tree}
    return tree


@pytest.mark.parametrize(
    ('params', 'options', 'message'),
    [
        ({'kernel': np.ones((2, 2))}, {'tolerance': 0.1}, 'before svd.sparsify'),
        (variational(), {'tolerance': 0.0}, 'tolerance must be above 0, got 0.0'),
        (variational(), {'bits': 0.1}, 'ask for more than'),
        (variational(), {'bits': 8, 'tolerance': 0.1}, 'pass one of them'),
        ({'a': {'b': 3}}, {}, 'a/b is a int: the format holds arrays alone'),
        (3, {}, 'the tree is a int: the format holds arrays alone'),
        ({'a': np.array(['x'])}, {}, 'a has type <U1: convert it'),
        ({3: np.ones(2)}, {}, '3 is no string'),
        ({'a': {'\ud800': np.ones(2)}}, {}, r"a/'\\ud800' is no Unicode text: rename it"),
        ({'a': np.zeros((1,) * 33)}, {}, 'a has shape .* takes 32 axes'),
        ({'a': np.zeros((0, 2**40))}, {}, 'a has shape .* each below'),
        (nested(66), {}, 'nested deeper than 64'),
        (
            variational()['layer'] | {'kernel': np.full((60, 40), np.inf, np.float32)},
            {'tolerance': 0.1},
            'kernel has values that are not finite',
        ),
        (
            {'a/b': variational(), 'a': {'b': variational()}},
            {'tolerance': 0.1},
            'two arrays have the path a/b/',
        ),
        ({'a': jax.random.key(0)}, {}, r'a is a PRNG key: save jax\.random\.key_data'),
    ],
)
def test_what_cannot_be_saved_is_refused(
    tmp_path: Path, params: Any, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        svd.save(tmp_path / 'a.svd', params, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('log_sigma2', [-np.inf, -80.0, -60.0, -48.0, 0.0])
@pytest.mark.parametrize(
    'bias', [np.arange(40), np.float32([0.5, np.nan, np.inf, 2e9] * 10), np.float16([0.5] * 40)]
)
def test_what_rounding_cannot_change_stays_exact(
    tmp_path: Path, log_sigma2: float, bias: np.ndarray
) -> None:
    tree = {**variational()['layer'], 'bias': bias}
    tree['log_sigma2'] = np.full_like(tree['log_sigma2'], -9.0)
    tree['log_sigma2'].flat[0] = log_sigma2  # of one weight
    left = jax.device_get(svd.sparsify(tree))
    svd.save(tmp_path / 'a.svd', tree, tolerance=0.1)
    found = svd.load(tmp_path / 'a.svd')
    np.testing.assert_array_equal(found['bias'], bias)
    rounding = np.max(np.abs(found['kernel'] - left['kernel']))
    assert rounding < 0.1
    assert (rounding == 0) == (log_sigma2 < -40)


def test_what_is_next_to_the_largest_number_of_its_type_stays_finite(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).normal(size=(60, 40)).astype(np.float16)
    kernel[0, :2] = 65504, -65504
    bias = np.full(40, 65504, np.float16)
    tree = {'kernel': kernel, 'log_sigma2': np.full_like(kernel, 8.0), 'bias': bias}
    for tolerance in (0.05, 0.1, 0.15, 0.2, 0.3):
        svd.save(tmp_path / 'a.svd', tree, tolerance=tolerance, threshold=100.0)
        for name, array in svd.load(tmp_path / 'a.svd').items():
            np.testing.assert_allclose(
                array.astype(float), tree[name].astype(float), atol=3 * tolerance * np.exp(4.0)
            )


def test_double_precision_is_rounded_no_more_than_asked(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).normal(size=(60, 40))
    with jax.enable_x64(True):
        tree = {'kernel': kernel, 'log_sigma2': np.full_like(kernel, -40.0)}
        svd.save(tmp_path / 'a.svd', tree, tolerance=0.5)
    found = svd.load(tmp_path / 'a.svd')['kernel']
    assert found.dtype == np.float64
    assert 0 < np.max(np.abs(found - kernel)) < np.exp(-20.0)


def test_any_tolerance_may_be_asked_for(tmp_path: Path) -> None:
    tree = {**variational()['layer'], 'log_sigma2': np.full((60, 40), 4.0)}
    svd.save(tmp_path / 'a.svd', tree, tolerance=1.7e308, threshold=100.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(svd.load(tmp_path / 'a.svd')))


def test_slashes_in_names_are_no_depth(tmp_path: Path) -> None:
    tree = {'/'.join('a' * 100): np.ones(1)}
    svd.save(tmp_path / 'a.svd', tree)
    assert list(svd.load(tmp_path / 'a.svd')) == list(tree)


@pytest.mark.parametrize('depth', [64, 65])
def test_every_depth_that_is_saved_is_loaded(tmp_path: Path, depth: int) -> None:
    if depth > file._DEEPEST:
        with pytest.raises(ValueError, match='nested deeper'):
            svd.save(tmp_path / 'a.svd', nested(depth))
        return
    svd.save(tmp_path / 'a.svd', nested(depth))
    assert jax.tree.structure(svd.load(tmp_path / 'a.svd')) == jax.tree.structure(nested(depth))


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / 'link.svd').symlink_to(tmp_path / 'a.svd')
    svd.save(tmp_path / 'link.svd', {'a': np.ones(3)})
    assert (tmp_path / 'link.svd').is_symlink()
    assert np.array_equal(svd.load(tmp_path / 'a.svd')['a'], np.ones(3))
    svd.save(tmp_path / f'{"a" * 251}.svd', {'a': np.ones(3)})  # the longest name


def test_a_device_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    written = svd.save(pipe, {'a': np.ones(3)})
    assert len(os.read(reader, 1000)) == written
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / 'a.svd'
    svd.save(path, {'a': np.ones(3)})

    def full(handle: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        svd.save(path, {'a': np.zeros(3)})
    assert np.array_equal(svd.load(path)['a'], np.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ['a.svd']


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures('umask')
@pytest.mark.skipif(os.name != 'posix', reason='modes of files are of POSIX')
def test_a_new_file_may_be_read_by_whom_the_umask_lets_and_an_old_one_as_before(
    tmp_path: Path,
) -> None:
    path, opened = tmp_path / 'a.svd', tmp_path / 'opened'
    svd.save(path, {'a': np.ones(3)})
    opened.touch()
    assert mode(path) == mode(opened) == 0o640
    for kept in (0o600, 0o664, 0o444):
        path.chmod(kept)
        svd.save(path, {'a': np.zeros(3)})
        assert mode(path) == kept
    assert np.array_equal(svd.load(path)['a'], np.zeros(3))


@pytest.mark.usefixtures('umask')
@pytest.mark.skipif(os.name != 'posix', reason='modes of files are of POSIX')
@pytest.mark.parametrize('suffix', ['npz', 'safetensors', 'msgpack'])
def test_so_it_is_with_files_of_plain_arrays(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'a.{suffix}'
    svd.export_arrays({'a': np.ones(3)}, path)
    assert mode(path) == 0o640
    path.chmod(0o664)
    svd.export_arrays({'a': np.zeros(3)}, path)
    assert mode(path) == 0o664


# Hostile files.


@pytest.fixture(scope='module')
def real_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Of every coding and many types; small ones stand twice, as they are quickly read."""
    path = tmp_path_factory.mktemp('real') / 'a.svd'
    rng, params = np.random.default_rng(0), variational()
    several = {
        'list': [sparse(rng, (3, 3, 4, 8), 0.2), np.arange(5), np.float16(2.5)],
        'tuple': (np.ones((2, 0), ml_dtypes.bfloat16), np.array([True, False]), rng.normal(size=9)),
    }
    found = []
    for tree, options in ((several, {}), (params | several, {'tolerance': 0.1}), (params, {})):
        svd.save(path, tree, **options)
        found.append(path.read_bytes())
    shipped = Path(svd.__file__).parent / 'pretrained_files'
    files = [(shipped / name).read_bytes() for name in ('mean_image.svd', 'lenet300.svd')]
    return 4 * [found[0], files[0]] + 3 * found[1:] + files


def sealed(body: bytes) -> bytes:
    """With a checksum that is right."""
    return body + zlib.crc32(body).to_bytes(4, 'little')


def decode(data: bytes) -> Any:
    return file._decode(data, 2**20)


def rounds() -> int:
    """SVD_JAX_FUZZ=100000 takes some minutes."""
    return int(os.environ.get('SVD_JAX_FUZZ', '300'))


def test_any_mutation_or_truncation_is_refused(tmp_path: Path, real_files: list[bytes]) -> None:
    rng, path = np.random.default_rng(0), tmp_path / 'a.svd'
    for _ in range(rounds()):
        data = real_files[rng.integers(len(real_files))]
        damaged = bytearray(data)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(data))]
        else:
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        if bytes(damaged) == data:
            continue
        path.write_bytes(damaged)
        with pytest.raises(svd.SvdFormatError, match=r'a\.svd'):
            svd.load(path)


def resealed(rng: np.random.Generator, data: bytes) -> bytes:
    """Mutated or cut off, or both, where it often hurts; with a checksum that is right."""
    damaged, kind = bytearray(data[:-4]), rng.random()
    if kind < 0.2:
        damaged = damaged[: rng.integers(4, len(damaged))]
    if kind < 0.6:
        for _ in range(rng.integers(1, 4)):
            # Often in the header, at the beginning.
            end = len(damaged) if kind < 0.4 else min(len(damaged), 90)
            damaged[rng.integers(min(3, end - 1), end)] ^= int(rng.integers(1, 256))
        return sealed(bytes(damaged))
    # What the header says, not its compression.
    start = 5 + (damaged[4] > 127)
    length = damaged[4] & 127 | (damaged[5] << 7 if start == 6 else 0)
    header = bytearray(file._inflate(damaged[start : start + length]))
    for _ in range(rng.integers(1, 3)):
        header[rng.integers(len(header))] = int(rng.choice([0, 1, 2, 3, 9, 40, 127, 128, 255]))
    return described(bytes(header), bytes(damaged[start + length :]))


def test_mutations_with_the_right_checksum_load_or_are_refused(
    tmp_path: Path, real_files: list[bytes]
) -> None:
    rng, path, outcomes = np.random.default_rng(1), tmp_path / 'a.svd', set()
    for _ in range(rounds()):
        path.write_bytes(resealed(rng, real_files[rng.integers(len(real_files))]))
        try:
            found = svd.load(path, max_bytes=2**24)
        except svd.SvdFormatError:
            outcomes.add('refused')
        else:
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(found)) <= 2**24
            outcomes.add('loaded')
    assert outcomes == {'refused', 'loaded'}


def described(header: bytes, contents: bytes = b'') -> bytes:
    """A file with a header of one's own."""
    packed = file._deflate(header)
    return sealed(
        file.MAGIC + bytes([file.VERSION]) + file._number(len(packed)) + packed + contents
    )


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'not an .svd file'),
        (b'PK\x03\x04 a zip', 'not an .svd file'),
        (b'SVD\x02', 'checksum'),
        (sealed(b'SVD\x03 and more'), r'format 3, this version reads 2: upgrade'),
        (sealed(b'SVD\x01 and more'), r'format 1, this version reads 2: save the network again'),
        (described(bytes([1, 1]) * 100 + bytes([3, 0, 0, 0])), 'nested deeper'),
        (described(bytes([3, 0, 2, *[255, 255, 255, 255, 15] * 2, 0])), 'pass max_bytes='),
        (described(bytes([3, 0, 1, *[255] * 20])), 'a number without end'),
        (described(bytes([0, 255, 255, 3])), 'ends too early'),
        (described(bytes([0, 2, 1, 97, 3, 0, 0, 0, 1, 97, 3, 0, 0, 0])), 'stands twice'),
        (described(bytes([3, 99, 0, 0])), 'no type has number 99'),
        (described(bytes([9])), 'no node is of kind 9'),
        (described(bytes([3, 5, 0, 1, 9])), 'levels of int8'),
        (described(bytes([3, 0, 0, 0]) + bytes(2**25)), 'header'),
        (described(bytes([3, 0, 0, 0, 7])), 'header is longer'),
    ],
)  # fmt: skip
def test_files_made_by_hand_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(svd.SvdFormatError, match=message):
        decode(data)


# Little work, and little memory, whatever a file says.


def zeros(*shape: int, dtype: Any = np.float32) -> tuple[bytes, np.ndarray]:
    """A header of one such array, and the array."""
    array, header = np.zeros(shape, dtype), bytearray()
    list(file._describe(array, {}, header))
    return bytes(header), array


def work_of(monkeypatch: pytest.MonkeyPatch, data: bytes, call: int = 500) -> int:
    """How many symbols are read until a file is refused; a call counts as several."""
    work = 0

    class Reader(entropy.Reader):
        def code(self, symbols: Any, count: int, model: Any, *each: Any) -> np.ndarray:
            nonlocal work
            found = super().code(symbols, count, model, *each)
            work += count + call
            return found

    monkeypatch.setattr(file, 'Reader', Reader)
    with pytest.raises(ValueError, match='more than so few bytes hold'):
        file._decode(data, 2**40)
    return work


@pytest.mark.parametrize(
    'header',
    [
        zeros(2**24)[0],
        zeros(2**24, 1)[0],
        zeros(1, 1, 2**24)[0],
        zeros(2**24, dtype=np.uint8)[0],
        zeros(2**22, dtype=np.int64)[0],
        bytes([1, *file._number(9000)]) + 9000 * zeros(4096)[0],
        bytes([1, *file._number(90_000)]) + 90_000 * zeros(dtype=np.int8)[0],
        bytes([3, 0, 1, *file._number(2**24), 1, 9]),  # quantised
    ],
)
@pytest.mark.parametrize('size', [0, 40, 400])
def test_small_files_that_say_much_are_little_work(
    monkeypatch: pytest.MonkeyPatch, header: bytes, size: int
) -> None:
    monkeypatch.setattr(entropy, '_FREE', 2**18)
    data = described(header, bytes(size))
    assert work_of(monkeypatch, data) <= 2**18 + 2**12 * size


def test_entries_where_many_rows_and_columns_cross_are_work_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    diagonal = np.eye(2000, dtype=np.float32)
    writer = entropy.Writer()
    arrays.exact(writer, diagonal, diagonal.shape, diagonal.dtype)
    contents = writer.finish()[:20]  # all rows and columns have entries; of the cells, little
    header = zeros(*diagonal.shape)[0]
    monkeypatch.setattr(entropy, '_FREE', 2**18)
    monkeypatch.setattr(entropy, '_CALL', 0)
    monkeypatch.setattr(entropy, '_OF_A_BYTE', 0)
    assert 4000 < work_of(monkeypatch, described(header, contents), call=0) <= 2**18


def test_a_file_that_is_much_work_is_as_large_as_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, params = tmp_path / 'a.svd', {'a': np.zeros(2**20, np.float32), 'b': np.ones(2, np.int8)}
    usual = svd.save(path, params)
    assert usual < 100
    monkeypatch.setattr(entropy, '_FREE', 2**18)
    size = svd.save(path, params)
    assert size - usual == pytest.approx((2**20 - 2**18) / 2**12, rel=10)
    assert size > (2**20 - 2**18) / 2**12
    assert_same(svd.load(path), params)
    body = path.read_bytes()[:-4]
    path.write_bytes(sealed(body[:-1]))
    with pytest.raises(svd.SvdFormatError, match='more than so few bytes hold'):
        svd.load(path)


def test_a_large_array_of_zeros_alone_stays_a_tiny_file(tmp_path: Path) -> None:
    params = {'kernel': np.zeros((30_000, 2_000), np.float16)}
    assert svd.save(tmp_path / 'a.svd', params) < 100
    found = svd.load(tmp_path / 'a.svd')['kernel']
    assert (found.shape, found.dtype) == ((30_000, 2_000), np.float16)
    assert not found[::1000].any()


def test_a_header_with_too_much_in_it_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, '_LARGEST_HEADER', 60)
    svd.save(tmp_path / 'a.svd', {'a' * 50: np.ones(1)})
    assert list(svd.load(tmp_path / 'a.svd')) == ['a' * 50]
    with pytest.raises(ValueError, match='63 bytes, a file has room for less than 60: put more'):
        svd.save(tmp_path / 'b.svd', {'a' * 55: np.ones(1)})


def test_a_boolean_is_one_of_two(tmp_path: Path) -> None:
    header, _ = zeros(3, dtype=np.bool_)
    writer = entropy.Writer()
    arrays.exact(writer, np.array([0, 1, 2], np.uint8), (3,), np.dtype(np.uint8))
    (tmp_path / 'a.svd').write_bytes(described(header, writer.finish()))
    with pytest.raises(svd.SvdFormatError, match='neither 0 nor 1'):
        svd.load(tmp_path / 'a.svd')


@pytest.mark.parametrize('dtype', [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize('density', [0.0, 0.02, 1.0])
@pytest.mark.parametrize('shape', [(2**20,), (1024, 1024), (2, 2**19)])
def test_reading_takes_little_more_memory_than_the_arrays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    density: float,
    dtype: Any,
) -> None:
    part = 2**12
    monkeypatch.setattr(entropy, '_PART', part)
    array = (100 * sparse(np.random.default_rng(0), shape, density)).astype(dtype)
    svd.save(tmp_path / 'a.svd', {'a': array})
    tracemalloc.start()
    try:
        found = svd.load(tmp_path / 'a.svd')['a']
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, array)
    file_bytes = (tmp_path / 'a.svd').stat().st_size
    assert peak < 6 * array.nbytes + 2 * file_bytes + 100 * part
