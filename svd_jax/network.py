"""A network as a function of its tree of variables, as its program is traced.

The tree is that of the parameters; or that of the variables, with the parameters under
``'params'``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from svd_jax import backend
from svd_jax.convention import GROUPS, LOG_SIGMA2
from svd_jax.tree import PerPath, sparsify

PyTree = Any
Path = tuple[str, ...]


def function(model: Any, variables: PyTree, options: dict[str, Any]) -> Callable[..., Any]:
    """The network as a function of its tree and its inputs.

    Args:
      model: a ``flax.linen.Module``, or whatever has such an ``apply``; or a pure function of the
        variables and the inputs.
      variables: its tree.
      options: for ``apply``.
    """
    within = with_collections(variables)
    run = getattr(model, 'apply', model)

    def network(tree: PyTree, *inputs: Any) -> Any:
        # A convolution is best recognised where it is one.
        with backend.override('accelerator'):
            return run(tree if within else {'params': tree}, *inputs, **options)

    return network


def with_collections(variables: PyTree) -> bool:
    """Whether the tree is that of the variables."""
    return isinstance(variables, Mapping) and 'params' in variables


def split(variables: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
    """The parameters, and the other collections by name.

    Raises:
      ValueError: it is not a tree of variables.
    """
    if not with_collections(variables):
        raise ValueError(
            "there is no collection 'params': pass what model.init returns, or {'params': params}"
        )
    collections = dict(variables)
    return collections.pop('params'), collections


def posterior(variables: PyTree) -> str | None:
    """The path of some ``log_sigma2``, if there is one."""
    return next(('/'.join(path) for path in paths(variables) if path[-1:] == (LOG_SIGMA2,)), None)


def dense(variables: PyTree, threshold: PerPath) -> PyTree:
    """The tree without posteriors, those of its weights that are dropped at zero.

    Raises:
      ValueError: a pattern of ``threshold`` or a path is not matched; or weights have scales, whose
        means would be in the weights and beside them.
    """
    if posterior(variables) is None:
        return variables
    grouped = next((path for path in paths(variables) if GROUPS in path), None)
    if grouped is not None:
        raise ValueError(f'{"/".join(grouped)} is of a scale: pass what svd_jax.sparsify returns')
    if with_collections(variables):
        return {**variables, 'params': sparsify(variables['params'], threshold)}
    return sparsify(variables, threshold)


def paths(tree: PyTree) -> list[Path]:
    """The path of every leaf."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_of(keys: Any) -> Path:
    """The names along the keys that JAX gives of a leaf."""
    return tuple(map(_name, keys))


def _name(key: Any) -> str:
    return str(getattr(key, 'key', getattr(key, 'idx', getattr(key, 'name', key))))
