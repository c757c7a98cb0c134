"""Trees: from a dense tree of parameters to a variational one, and to a sparse one.

One convention carries everything: a weight with a posterior is a leaf ``kernel`` (or
``embedding``) with a sibling leaf ``log_sigma2`` of the same shape::

    {'Conv_0': {'kernel': (5, 5, 1, 20), 'log_sigma2': (5, 5, 1, 20), 'bias': (20,)}, ...}

So every function here is a pure function from tree to tree that knows no layer class, and passes
whatever is not a weight through untouched.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata

from svd_jax import math

PyTree = Any
Where = Callable[[str], bool] | str | Collection[str] | None
Number = float | jax.Array
PerPath = Number | Mapping[str, Number] | Callable[[str], Number]

WEIGHTS = ('kernel', 'embedding')
LOG_SIGMA2 = 'log_sigma2'


class Weight(NamedTuple):
    """A weight in a tree: its path (``'Conv_0/kernel'``), its values, its posterior if any."""

    path: str
    values: jax.Array
    log_sigma2: jax.Array | None


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(str(name), child) for name, child in node.items()]
    if isinstance(node, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(node)]
    return []


def leaves(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """What is in nested mappings, lists and tuples, in order, each with its path."""
    if isinstance(node, (Mapping, list, tuple)):
        for name, child in _children(node):
            yield from leaves(child, f'{path}{name}/')
    else:
        yield path.removesuffix('/'), node


def _rebuild(node: Any, children: dict[str, Any]) -> Any:
    """A container of the type of ``node``."""
    if isinstance(node, Mapping):
        return children if type(node) is dict else type(node)(children)  # type: ignore[call-arg]
    values = children.values()
    return type(node)(*values) if hasattr(node, '_fields') else type(node)(values)


def _is_weight(name: str, leaf: Any) -> bool:
    return name in WEIGHTS and hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)


def _weight_of(node: Mapping[str, Any], path: str) -> Weight | None:
    """The weight that a mapping holds itself, after checking the convention."""
    boxed = [name for name in WEIGHTS if isinstance(node.get(name), AxisMetadata)]
    if boxed:
        raise ValueError(
            f'{path}{boxed[0]} is boxed with metadata: pass flax.linen.meta.unbox(params)'
        )
    names = [name for name in node if _is_weight(name, node[name])]
    log_sigma2 = node.get(LOG_SIGMA2)
    if len(names) > 1:
        raise ValueError(
            f'{path}{names[0]} stands beside {names[1]}: one {LOG_SIGMA2} cannot serve both'
        )
    if log_sigma2 is not None:
        if not names:
            raise ValueError(
                f'{path}{LOG_SIGMA2} has no {" or ".join(WEIGHTS)} beside it: put it beside the '
                'weight whose posterior it is, or remove it'
            )
        if jnp.shape(log_sigma2) != jnp.shape(node[names[0]]):
            raise ValueError(
                f'{path}{LOG_SIGMA2} has shape {jnp.shape(log_sigma2)} but {path}{names[0]} has '
                f'{jnp.shape(node[names[0]])}: they must agree'
            )
    return Weight(f'{path}{names[0]}', node[names[0]], log_sigma2) if names else None


def weights(params: PyTree, path: str = '') -> Iterator[Weight]:
    """All weights of a tree, variational or not, in the order of the tree.

    Raises:
      ValueError: the tree breaks the convention; the message names the path.
    """
    if isinstance(params, Mapping):
        weight = _weight_of(params, path)
        if weight is not None:
            yield weight
    for name, child in _children(params):
        yield from weights(child, f'{path}{name}/')


def weight_paths(params: PyTree) -> list[str]:
    """The paths of all weights, variational or not, in the order of the tree.

    That is the order of the layers in the model for what ``model.init`` returns. What comes out of
    ``jax.jit`` or an optimiser has its keys sorted, ``Dense_10`` before ``Dense_2``: choose by
    position before, and keep the paths.

    Args:
      params: nested mappings, lists and tuples of arrays.

    Returns:
      Such as ``'Conv_0/kernel'``, for ``where`` of :func:`variational`, and what patterns of
      :data:`PerPath` are searched for in.

    Raises:
      ValueError: the tree breaks the convention; the message names the path.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer = {'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)}
      >>> params = {'Dense_0': layer, 'Dense_1': layer, 'Dense_2': layer}
      >>> svd.weight_paths(params)
      ['Dense_0/kernel', 'Dense_1/kernel', 'Dense_2/kernel']
      >>> all_but_the_last = svd.weight_paths(params)[:-1]
      >>> [*svd.variational(params, where=all_but_the_last)['Dense_2']]
      ['kernel', 'bias']
    """
    return [weight.path for weight in weights(params)]


def per_path(value: PerPath, params: PyTree, name: str) -> Callable[[str], Number]:
    """A number for every weight.

    Args:
      value: one number for all; or a mapping from regular expressions to numbers, of which the
        first that is found in a weight's path decides, and ``''`` where no other is found; or a
        function of the path.
      params: the tree whose weights are meant.
      name: what the numbers are, for the errors.

    Returns:
      A function of the path. It raises a ValueError that names a path for which no pattern is
      found.

    Raises:
      ValueError: a pattern decides for no weight, which a slip of the pen would explain.

    Example:
      >>> import jax.numpy as jnp
      >>> from svd_jax import tree
      >>> params = {'Conv_0': {'kernel': jnp.ones(2)}, 'Dense_0': {'kernel': jnp.ones(2)}}
      >>> of = tree.per_path({'Conv': 2.0, '': 3.0}, params, 'threshold')
      >>> of('Conv_0/kernel'), of('Dense_0/kernel')
      (2.0, 3.0)
    """
    if not isinstance(value, Mapping):
        return value if callable(value) else lambda path: value
    # '' last wherever it stands: jax.jit sorts the keys of a dict among its arguments.
    patterns = sorted(value, key=lambda pattern: pattern == '')
    paths = weight_paths(params)
    deciding = {
        path: next((pattern for pattern in patterns if re.search(pattern, path)), None)
        for path in paths
    }
    for pattern in patterns:
        if pattern and pattern not in deciding.values():
            taken = any(re.search(pattern, path) for path in paths)
            raise ValueError(
                f'{name}: the pattern {pattern!r} decides for no weight: '
                + ('patterns before it match all that it matches; put it before them, in an '
                   'OrderedDict if jax.jit, which sorts the keys of a dict, takes it as an argument'
                   if taken else f'it is found in none of {", ".join(paths)}')
            )  # fmt: skip

    def number(path: str) -> Number:
        pattern = deciding[path]
        if pattern is None:
            raise ValueError(
                f"{name}: no pattern is found in {path}: add one, or the key '' for all that are "
                'left'
            )
        return value[pattern]

    return number


def variational_weights(params: PyTree) -> list[tuple[str, jax.Array, jax.Array]]:
    """Path, values and log_sigma2 of the weights that have a posterior."""
    found = [(w.path, w.values, w.log_sigma2) for w in weights(params) if w.log_sigma2 is not None]
    if not found:
        raise ValueError(
            f'no weight has a {LOG_SIGMA2} beside it: make the tree variational first, with '
            'svd.variational(params) or layers of svd.linen'
        )
    return found


def _map_weights(
    function: Callable[[Weight, dict[str, Any]], dict[str, Any]], params: PyTree, path: str = ''
) -> PyTree:
    """Replaces the contents of every mapping that holds a weight."""
    children = {name: _map_weights(function, c, f'{path}{name}/') for name, c in _children(params)}
    if isinstance(params, Mapping):
        weight = _weight_of(params, path)
        return _rebuild(params, function(weight, children) if weight else children)
    return _rebuild(params, children) if isinstance(params, (list, tuple)) else params


def selector(where: Where, paths: list[str]) -> Callable[[str], bool]:
    """Whether a path is chosen; ``where`` as for :func:`variational`, ``paths`` all there are."""
    if where is None:
        return lambda path: True
    if isinstance(where, str):
        pattern = re.compile(where)
        return lambda path: pattern.search(path) is not None
    if isinstance(where, Collection):
        unknown = [path for path in where if path not in paths]
        if unknown:
            raise ValueError(
                f'where names {", ".join(unknown)}, but the weights are {", ".join(paths)}: a '
                'collection holds whole paths, as svd.weight_paths(params) lists them'
            )
        return lambda path: path in where
    return where


def variational(params: PyTree, where: Where = None, log_sigma2_init: PerPath = -10.0) -> PyTree:
    """Gives weights a posterior: adds ``log_sigma2`` beside them.

    Args:
      params: the parameters of any Flax model: nested mappings, lists and tuples of arrays.
      where: which weights. A function of the path (``'Conv_0/kernel'``), a regular expression
        that is searched for in the path, a collection of whole paths (all but the last:
        ``svd.weight_paths(params)[:-1]``), or None for all.
      log_sigma2_init: the logarithm of the variance to start from: a number, or one for every
        path by patterns or a function, see :func:`svd_jax.tree.per_path`.

    Returns:
      The tree with a leaf ``log_sigma2`` beside every chosen ``kernel`` or ``embedding``, of its
      shape and type.

    Raises:
      ValueError: a chosen weight is variational already, or none was chosen, or ``where`` or
        ``log_sigma2_init`` names what is not there.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))['params']
      >>> jax.tree.map(jnp.shape, svd.variational(params))
      {'bias': (2,), 'kernel': (3, 2), 'log_sigma2': (3, 2)}
    """
    paths = weight_paths(params)
    chosen = selector(where, paths)
    start = per_path(log_sigma2_init, params, 'log_sigma2_init')

    def add(weight: Weight, node: dict[str, Any]) -> dict[str, Any]:
        if not chosen(weight.path):
            return node
        if weight.log_sigma2 is not None:
            raise ValueError(
                f'{weight.path} is variational already: leave it out with where=, or start from '
                'a tree without its log_sigma2'
            )
        return {**node, LOG_SIGMA2: jnp.full_like(weight.values, start(weight.path))}

    if not any(map(chosen, paths)):
        raise ValueError(
            'nothing to make variational: '
            + (f'where={where!r} chose none of {", ".join(paths)}' if paths else
               f'the tree has no leaf named {" or ".join(WEIGHTS)}')
        )  # fmt: skip
    return _map_weights(add, params)


def kl(params: PyTree, method: str = 'molchanov', weight: PerPath = 1.0) -> jax.Array:
    """KL divergence of the whole posterior from its prior, summed over all variational weights.

    Equal to the sum of what the layers of ``svd.linen`` return.

    Args:
      params: a variational tree.
      method: ``'molchanov'``, ``'exact'`` or ``'ard'``; see :func:`svd_jax.math.kl`.
      weight: what the KL divergence of a layer's weights counts: a number, or one for every path
        by patterns or a function, see :func:`svd_jax.tree.per_path`.

    Returns:
      A float32 scalar, in nats. Divide it by the number of training examples, once, in the loss.

    Raises:
      ValueError: nothing is variational, the method is unknown, or a pattern of ``weight`` or a
        path is not matched.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer = {'kernel': jnp.ones((3, 2)), 'log_sigma2': jnp.zeros((3, 2))}
      >>> round(float(svd.kl(layer)), 3)
      2.587
      >>> params = {'Conv_0': layer, 'Dense_0': layer}
      >>> round(float(svd.kl(params, weight={'Conv': 0.0, 'Dense': 2.0})), 3)
      5.175
    """
    factor = per_path(weight, params, 'weight')
    terms = (
        factor(path) * jnp.sum(math.kl(math.log_alpha(values, log_sigma2), method))
        for path, values, log_sigma2 in variational_weights(params)
    )
    return sum(terms, jnp.zeros((), jnp.float32))


def log_alpha(params: PyTree) -> PyTree:
    """The logarithm of alpha = sigma^2 / weight^2, for every variational weight.

    Args:
      params: a variational tree.

    Returns:
      Nested dicts with the paths of the variational weights, and nothing else.

    Raises:
      ValueError: nothing is variational.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer = {'kernel': jnp.ones(1), 'log_sigma2': jnp.full(1, -10.0), 'bias': jnp.ones(1)}
      >>> svd.log_alpha({'Dense_0': layer})
      {'Dense_0': {'kernel': Array([-10.], dtype=float32)}}
    """
    tree: dict[str, Any] = {}
    for path, values, log_sigma2 in variational_weights(params):
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = math.log_alpha(values, log_sigma2)
    return tree


def sparsify(params: PyTree, threshold: PerPath = 3.0) -> PyTree:
    """Drops the weights that are only noise, and the posterior: what is left is a dense tree.

    Args:
      params: a variational tree.
      threshold: weights with ``log_alpha >= threshold`` become zero. 3 is the paper's: a noise
        level at which binary dropout would drop 95 % (section 4.2 and 5). A number, or one for
        every path by patterns or a function, see :func:`svd_jax.tree.per_path`.

    Returns:
      The tree without any ``log_sigma2``, which the plain Flax model accepts; whatever was not
      variational is the same object as before. Runs under ``jax.jit``, on any device.

    Raises:
      ValueError: nothing is variational, or a pattern of ``threshold`` or a path is not matched.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer = {'kernel': jnp.asarray([1.0, 0.1]), 'log_sigma2': jnp.zeros(2)}
      >>> svd.sparsify(layer)
      {'kernel': Array([1., 0.], dtype=float32)}
      >>> params = {'Conv_0': layer, 'Dense_0': layer}
      >>> svd.sparsify(params, {'Conv': 9.0, '': 3.0})['Conv_0']
      {'kernel': Array([1. , 0.1], dtype=float32)}
    """
    limit = per_path(threshold, params, 'threshold')
    return collapse(
        params, lambda path, values, log_sigma2: masked(values, log_sigma2, limit(path))
    )


def collapse(
    params: PyTree, function: Callable[[str, jax.Array, jax.Array], Any], where: Where = None
) -> PyTree:
    """One leaf in the place of a variational weight and its ``log_sigma2``.

    Args:
      params: a variational tree.
      function: makes the leaf of the weight's path, its values and its ``log_sigma2``.
      where: of which variational weights; as for :func:`variational`.

    Returns:
      The tree with those leaves; whatever else was there is the same object as before.

    Raises:
      ValueError: nothing is variational.
    """
    variational_weights(params)
    chosen = selector(where, weight_paths(params))

    def collapsed(weight: Weight, node: dict[str, Any]) -> dict[str, Any]:
        if weight.log_sigma2 is None or not chosen(weight.path):
            return node
        name = weight.path.rpartition('/')[2]
        leaf = function(weight.path, weight.values, weight.log_sigma2)
        return {k: leaf if k == name else v for k, v in node.items() if k != LOG_SIGMA2}

    return _map_weights(collapsed, params)


def masked(kernel: jax.Array, log_sigma2: jax.Array, threshold: Number = 3.0) -> jax.Array:
    """The weights of one layer, with those of ``log_alpha >= threshold`` at zero."""
    return jnp.where(math.log_alpha(kernel, log_sigma2) < threshold, kernel, 0)


def nonzero(params: PyTree, threshold: PerPath = 3.0) -> dict[str, jax.Array]:
    """How many weights ``sparsify`` would leave, per path, as traced integers.

    Weights without a posterior count too, by being different from zero.
    """
    limit = per_path(threshold, params, 'threshold')
    return {
        weight.path: jnp.sum(
            weight.values != 0
            if weight.log_sigma2 is None
            else masked(weight.values, weight.log_sigma2, limit(weight.path)) != 0
        )
        for weight in weights(params)
    }
