"""Trees: from a dense tree of parameters to a variational one, and to a sparse one.

One convention carries everything: a weight with a posterior is a leaf ``kernel`` (or
``embedding``) with a sibling leaf ``log_sigma2`` of the same shape::

    {'Conv_0': {'kernel': (5, 5, 1, 20), 'log_sigma2': (5, 5, 1, 20), 'bias': (20,)}, ...}

So every function here is a pure function from tree to tree that knows no layer class, and passes
whatever is not a weight through untouched.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata

from svd_jax import math

PyTree = Any
Where = Callable[[str], bool] | str | None

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


def _variational_weights(params: PyTree) -> list[tuple[str, jax.Array, jax.Array]]:
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


def _selector(where: Where) -> Callable[[str], bool]:
    if where is None:
        return lambda path: True
    if isinstance(where, str):
        pattern = re.compile(where)
        return lambda path: pattern.search(path) is not None
    return where


def variational(params: PyTree, where: Where = None, log_sigma2_init: float = -10.0) -> PyTree:
    """Gives weights a posterior: adds ``log_sigma2`` beside them.

    Args:
      params: the parameters of any Flax model: nested mappings, lists and tuples of arrays.
      where: which weights. A function of the path (``'Conv_0/kernel'``), a regular expression
        that is searched for in the path, or None for all.
      log_sigma2_init: the logarithm of the variance to start from.

    Returns:
      The tree with a leaf ``log_sigma2`` beside every chosen ``kernel`` or ``embedding``, of its
      shape and type.

    Raises:
      ValueError: a chosen weight is variational already, or none was chosen.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))['params']
      >>> jax.tree.map(jnp.shape, svd.variational(params))
      {'bias': (2,), 'kernel': (3, 2), 'log_sigma2': (3, 2)}
    """
    chosen = _selector(where)
    paths = [weight.path for weight in weights(params)]

    def add(weight: Weight, node: dict[str, Any]) -> dict[str, Any]:
        if not chosen(weight.path):
            return node
        if weight.log_sigma2 is not None:
            raise ValueError(
                f'{weight.path} is variational already: leave it out with where=, or start from '
                'a tree without its log_sigma2'
            )
        return {**node, LOG_SIGMA2: jnp.full_like(weight.values, log_sigma2_init)}

    if not any(map(chosen, paths)):
        raise ValueError(
            'nothing to make variational: '
            + (f'where={where!r} chose none of {", ".join(paths)}' if paths else
               f'the tree has no leaf named {" or ".join(WEIGHTS)}')
        )  # fmt: skip
    return _map_weights(add, params)


def kl(params: PyTree, method: str = 'molchanov') -> jax.Array:
    """KL divergence of the whole posterior from its prior, summed over all variational weights.

    Equal to the sum of what the layers of ``svd.linen`` return.

    Args:
      params: a variational tree.
      method: ``'molchanov'``, ``'exact'`` or ``'ard'``; see :func:`svd_jax.math.kl`.

    Returns:
      A float32 scalar, in nats. Divide it by the number of training examples, once, in the loss.

    Raises:
      ValueError: nothing is variational, or the method is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer = {'kernel': jnp.ones((3, 2)), 'log_sigma2': jnp.zeros((3, 2))}
      >>> round(float(svd.kl(layer)), 3)
      2.587
    """
    terms = (
        jnp.sum(math.kl(math.log_alpha(values, log_sigma2), method))
        for _, values, log_sigma2 in _variational_weights(params)
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
    for path, values, log_sigma2 in _variational_weights(params):
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = math.log_alpha(values, log_sigma2)
    return tree


def sparsify(params: PyTree, threshold: float | jax.Array = 3.0) -> PyTree:
    """Drops the weights that are only noise, and the posterior: what is left is a dense tree.

    Args:
      params: a variational tree.
      threshold: weights with ``log_alpha >= threshold`` become zero. 3 is the paper's: a noise
        level at which binary dropout would drop 95 % (section 4.2 and 5).

    Returns:
      The tree without any ``log_sigma2``, which the plain Flax model accepts; whatever was not
      variational is the same object as before. Runs under ``jax.jit``, on any device.

    Raises:
      ValueError: nothing is variational.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> svd.sparsify({'kernel': jnp.asarray([1.0, 0.1]), 'log_sigma2': jnp.zeros(2)})
      {'kernel': Array([1., 0.], dtype=float32)}
    """
    _variational_weights(params)

    def drop(weight: Weight, node: dict[str, Any]) -> dict[str, Any]:
        if weight.log_sigma2 is None:
            return node
        name = weight.path.rpartition('/')[2]
        kept = masked(weight.values, weight.log_sigma2, threshold)
        return {k: kept if k == name else v for k, v in node.items() if k != LOG_SIGMA2}

    return _map_weights(drop, params)


def masked(
    kernel: jax.Array, log_sigma2: jax.Array, threshold: float | jax.Array = 3.0
) -> jax.Array:
    """The weights of one layer, with those of ``log_alpha >= threshold`` at zero."""
    return jnp.where(math.log_alpha(kernel, log_sigma2) < threshold, kernel, 0)


def nonzero(params: PyTree, threshold: float | jax.Array = 3.0) -> dict[str, jax.Array]:
    """How many weights ``sparsify`` would leave, per path, as traced integers.

    Weights without a posterior count too, by being different from zero.
    """
    return {
        weight.path: jnp.sum(
            weight.values != 0
            if weight.log_sigma2 is None
            else masked(weight.values, weight.log_sigma2, threshold) != 0
        )
        for weight in weights(params)
    }


class Counts(NamedTuple):
    """How many weights are left of how many."""

    nonzero: int
    total: int

    @property
    def percent(self) -> float:
        """The share of zeros."""
        return 100.0 * (1.0 - self.nonzero / self.total) if self.total else 0.0

    @property
    def compression(self) -> float:
        """Weights / nonzero weights, as in the paper: biases are not counted."""
        return self.total / self.nonzero if self.nonzero else float('inf')


class Sparsity(NamedTuple):
    """Counts of weights by layer, and overall; prints as a table."""

    layers: dict[str, Counts]

    @property
    def overall(self) -> Counts:
        counts = self.layers.values()
        return Counts(sum(c.nonzero for c in counts), sum(c.total for c in counts))

    @property
    def nonzero(self) -> int:
        return self.overall.nonzero

    @property
    def total(self) -> int:
        return self.overall.total

    @property
    def percent(self) -> float:
        """The share of zeros."""
        return self.overall.percent

    @property
    def compression(self) -> float:
        """Weights / nonzero weights, as in the paper: biases are not counted."""
        return self.overall.compression

    def __str__(self) -> str:
        width = max(len('layer'), *map(len, self.layers))
        lines = [
            f'{"layer":{width}}  {"nonzero":>9}  {"of":>11}  {"zeros":>9}  {"compression":>11}'
        ]
        for name, counts in [*self.layers.items(), ('total', self.overall)]:
            lines.append(
                f'{name:{width}}  {counts.nonzero:>9,}  {counts.total:>11,}  '
                f'{counts.percent:>7.2f} %  {counts.compression:>10.1f}x'
            )
        rule = '-' * len(lines[0])
        return '\n'.join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def sparsity(params: PyTree, threshold: float = 3.0) -> Sparsity:
    """Counts the weights that are left after ``sparsify``, per layer and in total.

    Args:
      params: a variational tree, or one that was sparsified, or a dense one.
      threshold: as for :func:`sparsify`.

    Returns:
      A :class:`Sparsity`, by layer path (``'Conv_0'``; the weight's own name is left out).

    Raises:
      ValueError: the tree has no weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> print(svd.sparsity({'Dense_0': {'kernel': jnp.asarray([[2.0, 0.0, 0.0, 0.0]])}}))
      layer      nonzero           of      zeros  compression
      -------------------------------------------------------
      Dense_0          1            4    75.00 %         4.0x
      -------------------------------------------------------
      total            1            4    75.00 %         4.0x
    """
    counts = jax.device_get(nonzero(params, threshold))
    totals = {weight.path: int(np.prod(jnp.shape(weight.values))) for weight in weights(params)}
    if not totals:
        raise ValueError(f'the tree has no leaf named {" or ".join(WEIGHTS)}: nothing to count')
    return Sparsity(
        {
            path.rpartition('/')[0] or path: Counts(int(counts[path]), total)
            for path, total in totals.items()
        }
    )
