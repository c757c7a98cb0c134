"""What other file formats and compressors make of a sparse tree."""

import gzip
import io
import lzma
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import ml_dtypes
import numpy as np
import scipy.sparse

from svd_jax import convention

DENSE = 'dense float32'


def sizes(sparse: Any) -> dict[str, int]:
    """Bytes of a sparsified tree, biases included, by format.

    Args:
      sparse: nested dicts of float32 arrays.

    Returns:
      By name, the largest first. What is not installed is left out.
    """
    arrays = {
        '.'.join(path): np.asarray(leaf)
        for path, leaf in flax.traverse_util.flatten_dict(sparse).items()
    }
    dense, halves = (
        b''.join(array.astype(dtype).tobytes() for array in arrays.values())
        for dtype in (np.float32, ml_dtypes.bfloat16)
    )
    found = {
        DENSE: len(dense),
        'flax.serialization (msgpack)': len(flax.serialization.to_bytes(sparse)),
        'numpy.savez': _written(np.savez, **arrays),
        'numpy.savez_compressed': _written(np.savez_compressed, **arrays),
        'scipy.sparse.save_npz (CSR)': _csr_bytes(sparse, arrays),
    }
    try:
        import safetensors.numpy

        found['safetensors'] = len(safetensors.numpy.save(arrays))
    except ImportError:
        pass
    for name, compress in _compressors().items():
        found[f'float32, {name}'] = len(compress(dense))
        found[f'bfloat16, {name}'] = len(compress(halves))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _compressors() -> dict[str, Callable[[bytes], bytes]]:
    """Each at its strongest."""
    found: dict[str, Callable[[bytes], bytes]] = {
        'gzip': partial(gzip.compress, compresslevel=9),
        'xz': partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME),
    }
    try:
        import zstandard

        found['zstd'] = zstandard.ZstdCompressor(level=22).compress
    except ImportError:
        pass
    return found


def _written(write: Any, *args: Any, **arrays: Any) -> int:
    file = io.BytesIO()
    write(file, *args, **arrays)
    return len(file.getvalue())


def _csr_bytes(sparse: Any, arrays: dict[str, np.ndarray]) -> int:
    """A compressed file for every weight as a matrix, and one for all the rest."""
    names = [weight.path.replace('/', '.') for weight in convention.weights(sparse)]
    matrices = [arrays[name].reshape(-1, arrays[name].shape[-1]) for name in names]
    rest = {name: array for name, array in arrays.items() if name not in names}
    return _written(np.savez_compressed, **rest) + sum(
        _written(scipy.sparse.save_npz, scipy.sparse.csr_array(matrix)) for matrix in matrices
    )
