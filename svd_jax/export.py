"""Networks as files that run without this library, StableHLO and ONNX; trees as plain arrays.

A network is exported as a function of the inputs alone, a :class:`svd_jax.Compact` for one: its
parameters become constants of the file. The first axis of every input is the batch, of any size.
docs/export.md shows how such files are run.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import export, lax
from jax.errors import InconclusiveDimensionOperation

from svd_jax import backend, convention
from svd_jax.program import Equation, Program, bind, operand_of, run_equations, trace

Function = Callable[..., Any]
PyTree = Any

_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def export_stablehlo(
    function: Function, *example: Any, path: str | os.PathLike[str] | None = None
) -> bytes:
    """A network as StableHLO, for CPUs, GPUs and TPUs, in JAX's own format.

    ``jax.export.deserialize(data).call(x)`` runs it, in later versions of JAX as well: the data say
    which version of the format they are in.

    Args:
      function: of the inputs alone: what :func:`svd_jax.compact` returns, or, say,
        ``lambda x: model.apply({'params': sparse}, x)``.
      example: example inputs, arrays or trees of arrays. Their first axis is the batch.
      path: of a file to write as well.

    Returns:
      The serialised network.

    Raises:
      ValueError: what the network does depends on the size of the batch.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model, x = nn.Dense(2), jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)['params']
      >>> data = svd.export_stablehlo(svd.compact(model, params, x), x)
      >>> loaded = jax.export.deserialize(bytearray(data))
      >>> loaded.in_avals
      (ShapedArray(float32[batch,3]),)
      >>> loaded.call(jnp.ones((5, 3))).shape
      (5, 2)
    """

    def portable(*inputs: Any) -> Any:
        with backend.override('accelerator'):
            return function(*inputs)

    try:
        exported = export.export(jax.jit(portable), platforms=_PLATFORMS)(*_any_batch(example))
    except InconclusiveDimensionOperation as error:
        raise _depends_on_batch(error) from error
    return _written(bytes(exported.serialize()), path)


def export_onnx(
    function: Function, *example: Any, path: str | os.PathLike[str] | None = None
) -> bytes:
    """A network as ONNX, by way of jax2onnx.

    Inputs are named ``input_0``, ``input_1`` and so on, outputs ``output_0`` and so on, in the
    order of ``jax.tree.leaves``; images are as the network takes them, with the channels last.

    Args:
      function: as for :func:`export_stablehlo`.
      example: as for :func:`export_stablehlo`.
      path: of a file to write as well.

    Returns:
      The serialised network.

    Raises:
      ImportError: the extra ``onnx`` is not installed.
      ValueError: what the network does depends on the size of the batch.
      NotImplementedError: jax2onnx has no counterpart for one of its operations.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise ImportError(
            'export to ONNX needs an extra: pip install "svd_jax[onnx]"', name='jax2onnx'
        ) from error
    like = _any_batch(example)
    try:
        with backend.override('accelerator'):
            program = trace(function, *like)
    except InconclusiveDimensionOperation as error:
        raise _depends_on_batch(error) from error
    inputs, outputs = jax.tree.leaves(like), program.outputs
    with _quiet('onnx_ir.serde'):  # warns of every shape whose type it does not know
        model = jax2onnx.to_onnx(
            _replay(program),
            inputs,
            input_names=[f'input_{i}' for i in range(len(inputs))],
            output_names=[f'output_{i}' for i in range(len(outputs))],
        )
        data = model.SerializeToString()
    return _written(data, path)


def export_arrays(params: PyTree, path: str | os.PathLike[str]) -> None:
    """A tree as a file of plain dense arrays, for programs that read no ``.svd``.

    Arrays are named by their paths, such as ``Conv_0/kernel``; ``.msgpack`` keeps the tree, as
    ``flax.serialization.msgpack_restore`` reads it, with dicts in the place of lists and tuples.

    Args:
      params: nested dicts, lists and tuples of arrays.
      path: of the file; its name ends in ``.npz``, ``.safetensors`` or ``.msgpack``. NumPy's format
        has no bfloat16: there such arrays become float32.

    Raises:
      ImportError: for ``.safetensors``, that package is not installed.
      ValueError: the name ends in something else; two arrays have the same path, or NumPy's format
        has no room for one of that name.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> import svd_jax as svd
      >>> path = os.path.join(tempfile.mkdtemp(), 'network.npz')
      >>> svd.export_arrays({'Dense_0': {'kernel': np.ones((3, 2))}}, path)
      >>> np.load(path)['Dense_0/kernel'].shape
      (3, 2)
    """
    path = Path(path)
    arrays = {name: np.asarray(a, order='C') for name, a in convention.by_path(params).items()}
    if path.suffix == '.npz':
        for name in {'file', 'allow_pickle'} & arrays.keys():  # arguments of np.savez
            raise ValueError(f'an array cannot be called {name} in .npz: put it into a dict')
        known = {name: _known_to_numpy(array) for name, array in arrays.items()}
        np.savez(path, **known)  # type: ignore[arg-type]  # they are no flags
    elif path.suffix == '.safetensors':
        try:
            from safetensors.numpy import save
        except ImportError as error:
            raise ImportError(
                'export to .safetensors needs a package: pip install safetensors',
                name='safetensors',
            ) from error
        # Not by its save_file, which makes files that only their owner may read.
        path.write_bytes(save(arrays))
    elif path.suffix == '.msgpack':
        path.write_bytes(serialization.to_bytes(params))
    else:
        raise ValueError(f'{path} must end in .npz, .safetensors or .msgpack')


def _known_to_numpy(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def _any_batch(example: tuple[Any, ...]) -> Any:
    """Shapes and types of inputs, with the first axis of each of any one size."""
    (batch,) = export.symbolic_shape('batch')

    def like(x: Any) -> jax.ShapeDtypeStruct:
        shape = jnp.shape(x)
        return jax.ShapeDtypeStruct((batch, *shape[1:]) if shape else (), jnp.result_type(x))

    return jax.tree.map(like, example)


def _replay(program: Program) -> Callable[..., list[Any]]:
    """The operations of a program, one by one.

    jax2onnx replaces functions of JAX and Flax while it traces. What was traced before is out of
    its reach, but for pooling: of :func:`flax.linen.max_pool` it makes a MaxPool, while of the
    operation it makes one over batch and channels too, which onnxruntime does not run.
    """

    def run(*inputs: Any) -> list[Any]:
        known = program.constants | dict(zip(program.inputs, inputs, strict=True))
        run_equations(program.equations, known, _bind)
        return [operand_of(output, known) for output in program.outputs]

    return run


def _bind(equation: Equation, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    if equation.primitive.name == 'reduce_window_max' and _over_space(params):
        return [_max_pool(*operands, **params)]
    return bind(equation, operands, params)


def _over_space(params: dict[str, Any]) -> bool:
    """Whether neither batch nor channels, first and last, are pooled, and nothing is dilated."""
    window, strides, padding = (
        params[name] for name in ('window_dimensions', 'window_strides', 'padding')
    )
    return (
        len(window) > 2
        and all(window[a] == strides[a] == 1 and not any(padding[a]) for a in (0, -1))
        and set(params['base_dilation'] + params['window_dilation']) == {1}
    )


def _max_pool(
    x: jax.Array,
    *,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    **_: Any,
) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = np.array(-np.inf if floating else jnp.iinfo(x.dtype).min, x.dtype)
    for axis, widths in enumerate(padding):  # jax2onnx's own padding takes no unknown sizes
        before, after = (
            lax.broadcast(lowest, [width if a == axis else n for a, n in enumerate(x.shape)])
            for width in widths
        )
        x = lax.concatenate([before, x, after], axis) if any(widths) else x
    return nn.max_pool(x, window_shape=window_dimensions[1:-1], strides=window_strides[1:-1])


def _depends_on_batch(error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(
        'the network does something else for another size of the batch, the first axis of its '
        f'inputs: write it without ({reason})'
    )


def _written(data: bytes, path: str | os.PathLike[str] | None) -> bytes:
    if path is not None:
        Path(path).write_bytes(data)
    return data


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
