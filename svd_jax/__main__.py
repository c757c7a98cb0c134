"""``python -m svd_jax``: what is in ``.svd`` files, how they differ, if they are sound; export."""

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.errors import FlaxError

from svd_jax.compaction import compact
from svd_jax.export import export_arrays, export_onnx, export_stablehlo
from svd_jax.file import MOST_BYTES, SvdFormatError, load
from svd_jax.inspection import compare, inspect, verify

_BAD_INPUT = OSError, ValueError, ImportError, NotImplementedError, MemoryError, FlaxError
_NETWORKS = {'.stablehlo': export_stablehlo, '.onnx': export_onnx}

_EXPORT = """\
The suffix of OUT says as what:
  .npz, .safetensors, .msgpack   the arrays, dense, by name; needs no model
  .stablehlo, .onnx              the network itself, compacted, for batches of any size; it takes
                                 --model, a Python module of yours and a flax.linen.Module in it
                                 (or what makes one), and an --input for each that it has

for example
  python -m svd_jax export lenet5.svd --to lenet5.onnx --model experiments.models:LeNet5 \\
      --input 1,28,28,1 --option deterministic=true
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: of the command line; None: those of this process.

    Returns:
      The exit code. 0: all is well; 1: files that were compared differ, or one that was verified
      is damaged; 2: something cannot be done, and a line on stderr says why.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be Unicode
            stream.reconfigure(errors='backslashreplace')
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _BAD_INPUT as error:
        _complain(error)
        return 2


def _inspect(options: argparse.Namespace) -> int:
    print(inspect(options.file, max_bytes=options.max_bytes))
    return 0


def _compare(options: argparse.Namespace) -> int:
    comparison = compare(options.a, options.b, max_bytes=options.max_bytes)
    print(comparison)
    return 0 if comparison.equal else 1


def _verify(options: argparse.Namespace) -> int:
    code = 0
    for path in options.files:
        try:
            found = verify(path, max_bytes=options.max_bytes)
        except (SvdFormatError, OSError, MemoryError) as error:
            code = max(code, 1 if isinstance(error, SvdFormatError) else 2)
            _complain(error)
        else:
            print(f'{path}: {found}')
    return code


def _export(options: argparse.Namespace) -> int:
    tree, suffix = load(options.file, max_bytes=options.max_bytes), options.to.suffix
    if suffix not in _NETWORKS:
        export_arrays(tree, options.to)
    else:
        if options.model is None or not options.input:
            raise ValueError(f'for {suffix}, --model and --input say what the network is')
        model = _model(options.model)
        try:
            example = [jnp.zeros(shape, dtype) for shape, dtype in options.input]
            small = compact(model, tree, *example, **dict(options.option))
        except TypeError as error:  # of arguments, or of shapes
            raise ValueError(f'the model does not take these: {_line(error)}') from error
        _NETWORKS[suffix](small, *example, path=options.to)
    print(f'{options.to}: {options.to.stat().st_size:,} bytes')
    return 0


def _model(name: str) -> nn.Module:
    """The Flax module that a name such as ``experiments.models:LeNet5`` stands for."""
    module, _, attribute = name.partition(':')
    if not attribute:
        raise ValueError(f'--model {name}: it must be MODULE:ATTRIBUTE, as in models:LeNet5')
    try:
        found = getattr(importlib.import_module(module), attribute)
        model = found if isinstance(found, nn.Module) else found()
    except (AttributeError, TypeError) as error:
        raise ValueError(f'--model {name}: {_line(error)}') from error
    if not isinstance(model, nn.Module):
        raise ValueError(f'--model {name}: it is a {type(model).__name__}, not a flax.linen.Module')
    return model


def _input(text: str) -> tuple[tuple[int, ...], jnp.dtype]:
    """Shape and type of an input: ``1,28,28,1`` or ``1,16:int32``."""
    shape, _, dtype = text.partition(':')
    try:
        sizes, kind = tuple(map(int, shape.split(','))), jnp.dtype(dtype or 'float32')
        if min(sizes) < 0 or not (jnp.issubdtype(kind, jnp.number) or kind.kind == 'b'):
            raise ValueError(text)
        return sizes, kind
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be a shape, as in 1,28,28,1, with a type if not float32: 1,16:int32'
        ) from error


def _option(text: str) -> tuple[str, Any]:
    """An argument of the model's ``__call__``: ``NAME=JSON``."""
    name, _, value = text.partition('=')
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be NAME=JSON, as in deterministic=true'
        ) from error


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return (str(error) or type(error).__name__).splitlines()[0]


def _complain(error: Exception) -> None:
    print(f'svd_jax: {_line(error)}', file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m svd_jax', description=__doc__)
    parser.add_argument(
        '--max-bytes', type=int, default=MOST_BYTES, metavar='N',
        help='what the arrays of a file may take in memory; %(default)s if not given',
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    command = commands.add_parser('inspect', help='what is in a file, and where its bytes go')
    command.add_argument('file', type=Path, metavar='FILE')
    command.set_defaults(run=_inspect)

    command = commands.add_parser('compare', help='how two files differ; exit code 1 if they do')
    command.add_argument('a', type=Path, metavar='A')
    command.add_argument('b', type=Path, metavar='B')
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        'verify', help='whether files can be read; exit code 1 if one is damaged'
    )
    command.add_argument('files', type=Path, nargs='+', metavar='FILE')
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        'export',
        help='as arrays, or as a network, for other programs',
        description=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument('file', type=Path, metavar='FILE')
    command.add_argument('--to', type=Path, required=True, metavar='OUT')
    command.add_argument('--model', metavar='MODULE:ATTRIBUTE')
    command.add_argument(
        '--input', type=_input, action='append', default=[], metavar='SHAPE[:TYPE]',
        help='shape of an input, the batch first: 1,28,28,1; repeat it for several',
    )  # fmt: skip
    command.add_argument(
        '--option', type=_option, action='append', default=[], metavar='NAME=JSON',
        help='what the model is called with besides, such as deterministic=true',
    )  # fmt: skip
    command.set_defaults(run=_export)
    return parser


if __name__ == '__main__':
    sys.exit(main())
