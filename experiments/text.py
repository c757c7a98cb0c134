"""Text as arrays of tokens, and the windows that a language model sees of it.

``load('tiny_shakespeare')`` reads what TFDS has prepared, from array_record files, which needs no
TensorFlow. Any other name is the path of a text file.
"""

import importlib.util
import itertools
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import data
from experiments.errors import UsageError

NAME, _VERSION = 'tiny_shakespeare', '1.0.0'
SPLITS = ('train', 'validation', 'test')


class Corpus(NamedTuple):
    """A text in memory: tokens int32 (characters,), places in the alphabet.

    The alphabet holds every byte that occurs, in ascending order.
    """

    name: str
    alphabet: bytes
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load(name: str = NAME, data_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """Loads a text by name.

    Args:
      name: ``'tiny_shakespeare'``, in TFDS's own splits, or the path of a text file, whose first 90
        per cent are for training, the next 5 for validation and the last 5 for the test.
      data_dir: the TFDS data directory; None means TFDS's own default (``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``). A text file needs none.

    Raises:
      UsageError: there is no such text, or it cannot be read; the message names the fix.
    """
    splits = _read_tfds(data_dir) if name == NAME else _read_file(Path(name))
    alphabet = bytes(sorted(set(b''.join(splits))))
    places = np.zeros(256, np.int32)
    places[list(alphabet)] = np.arange(len(alphabet))
    tokens = [places[np.frombuffer(split, np.uint8)] for split in splits]
    return Corpus(name if name == NAME else Path(name).name, alphabet, *tokens)


def _read_file(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f'cannot read the text {path} ({error.strerror}): pass --dataset {NAME}, or the path '
            'of a text file'
        ) from error
    ends = [0, round(0.9 * len(content)), round(0.95 * len(content)), len(content)]
    return [content[start:end] for start, end in itertools.pairwise(ends)]


def _read_tfds(data_dir: str | os.PathLike[str] | None) -> list[bytes]:
    root = data.data_root(data_dir)
    folder = root / NAME / _VERSION
    if not all(any(folder.glob(f'{NAME}-{split}.array_record*')) for split in SPLITS):
        raise UsageError(
            f'{NAME} not found in {root}: looked for {NAME}-train.array_record* and its validation '
            f'and test splits in {folder}; pass another --data-dir, or prepare it with `tfds build '
            f'{NAME} --data_dir={root} --file_format=array_record` (needs TensorFlow and a '
            'network), or pass --dataset with the path of a text file'
        )
    if importlib.util.find_spec('tensorflow_datasets') is None:
        raise UsageError(
            f'reading {NAME} needs `pip install tensorflow-datasets array_record '
            'importlib_resources`'
        )
    logging.getLogger('absl').setLevel(logging.ERROR)
    try:
        import tensorflow_datasets as tfds  # Here, because it takes a second.

        sources = tfds.data_source(f'{NAME}:{_VERSION}', data_dir=root, download=False)
        return [bytes(sources[split][0]['text']) for split in SPLITS]
    except Exception as error:  # Damaged files raise whatever the reader in C++ makes of them.
        raise UsageError(
            f'cannot read {NAME} in {folder} ({data.one_line(error)}): delete that directory and '
            'prepare it again, or pass another --data-dir'
        ) from error


def starts(seed: int, epoch: int, characters: int, length: int, batch_size: int) -> np.ndarray:
    """Where the windows of one epoch start, int32 (steps, batch_size), in a random order.

    The windows lie side by side, from an offset that differs from epoch to epoch, so that each
    character comes once an epoch, but not always in the same context. A pure function of its
    arguments, so that a resumed run sees the same batches as one that was never interrupted.

    Args:
      seed, epoch: choose the offset and the order.
      characters: length of the text.
      length: of a window; the character after its last one is needed too, as a target.
      batch_size: windows in a batch; what fills no batch is left out.

    Raises:
      UsageError: the text does not fill one batch.
    """
    order = data.epoch_permutation(seed, epoch, windows_in(characters, length), batch_size)
    # The spawn key keeps this stream apart from that of the order.
    rng = np.random.default_rng(np.random.SeedSequence((seed, epoch), spawn_key=(0,)))
    return (rng.integers(length) + length * order).astype(np.int32)


def windows_in(characters: int, length: int) -> int:
    """How many windows fit, whatever the offset.

    Example:
      >>> from experiments import text
      >>> text.windows_in(characters=31, length=10)  # offset 0 to 9, and a target after the last
      2
    """
    return max(0, (characters - length) // length)


def evaluation_windows(
    tokens: np.ndarray, length: int, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows in which every character but the first is predicted once, with enough before it.

    Args:
      tokens: (characters,).
      length: of a window.
      context: how many characters, at least, a prediction has to go by, except at the very start.

    Returns:
      Inputs and targets, int32 (windows, length) each; a target is -1 where it is not to be
      counted: it was predicted in the window before, or lies after the end.

    Raises:
      UsageError: the context leaves nothing to predict, or the text has no two characters.

    Example:
      >>> import numpy as np
      >>> from experiments import text
      >>> for array in text.evaluation_windows(np.arange(8), length=4, context=3):
      ...     print(array.tolist())
      [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]]
      [[1, 2, 3, 4], [-1, -1, 5, 6], [-1, -1, 7, -1]]
    """
    if not 0 < context <= length:
        raise UsageError(f'a context of {context} characters does not fit in a window of {length}')
    if len(tokens) < 2:
        raise UsageError(f'a text of {len(tokens)} characters leaves nothing to predict')
    stride = length - context + 1
    first = np.arange(0, max(1, len(tokens) - 1 - (context - 1)), stride)
    at = first[:, None] + np.arange(length)
    inside = at < len(tokens) - 1
    inputs = np.where(inside, tokens[np.where(inside, at, 0)], 0)
    targets = np.where(inside, tokens[np.where(inside, at + 1, 0)], -1)
    targets[1:, : context - 1] = -1
    return inputs.astype(np.int32), targets.astype(np.int32)
