"""Trees: from a dense tree of parameters to a variational one, and to a sparse one.

Every function here is a pure function from tree to tree that knows no layer class, only the
convention (:mod:`svd_jax.convention`), and passes whatever is not a weight through untouched.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from svd_jax.convention import (
    AND,
    GROUPS,
    LOG_SIGMA2,
    WEIGHTS,
    Number,
    PyTree,
    Weight,
    map_weights,
    randoms,
    weight_paths,
    weights,
    with_groups,
    without_groups,
)

Where = Callable[[str], bool] | str | Collection[str] | None
PerPath = Number | Mapping[str, Number] | Callable[[str], Number]
Axis = str | int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shared:
    """That several layers share scales: a scale for each place along an axis of all their weights.

    Attributes:
      axis: as of a single layer; see :func:`variational`.
      layers: the names of the layers, which lie in one mapping; two or more.

    Example:
      A scale for each hidden neuron of Flax's LSTM cell, whose weights are in four layers:

      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model, x = nn.RNN(nn.OptimizedLSTMCell(5)), jnp.ones((1, 7, 3))
      >>> params = model.init(jax.random.key(0), x)['params']
      >>> neurons = svd.Shared('inputs', ('hi', 'hf', 'hg', 'ho'))
      >>> params = svd.variational(params, where=(), groups={'/h[ifgo]/': neurons})
      >>> jax.tree.map(jnp.shape, params['cell']['groups'])
      {'hf+hg+hi+ho:inputs': {'log_sigma2': (5, 1), 'scale': (5, 1)}}
    """

    axis: Axis
    layers: tuple[str, ...]


Axes = Axis | Shared | list[Axis | Shared] | tuple[Axis | Shared, ...] | None
Groups = Axes | Mapping[str, Axes] | Callable[[str], Axes]


def _paths(params: PyTree) -> list[str]:
    """The paths of all weights and of all scales."""
    found = [path for w in weights(params) for path in (w.path, *(s.path for s in w.scales))]
    return list(dict.fromkeys(found))


def per_path(value: PerPath, params: PyTree, name: str) -> Callable[[str], Number]:
    """A number for every weight.

    Args:
      value: one number for all; or a mapping from regular expressions to numbers, of which the
        first that is found in a weight's path decides, and ``''`` where no other is found; or a
        function of the path.
      params: the tree whose weights are meant, and the scales beside them.
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
    return _numbers(value, _paths(params), name)


def _numbers(value: PerPath, paths: list[str], name: str) -> Callable[[str], Number]:
    """:func:`per_path` for given paths."""
    if not isinstance(value, Mapping):
        return value if callable(value) else lambda path: value
    decided = _decider(value, paths, name)

    def number(path: str) -> Number:
        found = decided(path)
        if found is None:
            raise ValueError(
                f"{name}: no pattern is found in {path}: add one, or the key '' for all that are "
                'left'
            )
        return found

    return number


def _decider(value: Any, paths: list[str], name: str) -> Callable[[str], Any]:
    """What the first pattern that is found in a path has for it; None if none is found.

    Args:
      value: a mapping from patterns; anything else is for all paths.
      paths: that there are.
      name: for the errors.

    Raises:
      ValueError: a pattern decides for no path.
    """
    if not isinstance(value, Mapping):
        return lambda path: value
    # '' last wherever it stands: jax.jit sorts the keys of a dict among its arguments.
    patterns = sorted(value, key=lambda pattern: pattern == '')
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
    return lambda path: None if deciding[path] is None else value[deciding[path]]


def selector(where: Where, paths: list[str]) -> Callable[[str], bool]:
    """Whether a path is chosen; ``where`` as for :func:`variational`, ``paths`` all there are."""
    if where is None:
        return lambda path: True
    if isinstance(where, str):
        pattern = re.compile(where)
        if not any(map(pattern.search, paths)):
            raise ValueError(
                f'the pattern {where!r} is found in none of the weights {", ".join(paths)}'
            )
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


def variational(
    params: PyTree,
    where: Where = None,
    log_sigma2_init: PerPath = -10.0,
    *,
    groups: Groups = None,
    log_normal: bool = False,
) -> PyTree:
    """Gives weights a posterior: adds ``log_sigma2`` beside them; and scales of groups of them.

    A scale multiplies all weights of a unit and has a posterior of its own: where it is only noise,
    the whole unit is dropped, and :func:`svd_jax.compact` makes the arrays smaller.

    Args:
      params: the parameters of any Flax model: nested mappings, lists and tuples of arrays.
      where: which weights get a posterior each. A function of the path (``'Conv_0/kernel'``), a
        regular expression that is searched for in the path, a collection of whole paths (all but
        the last: ``svd.weight_paths(params)[:-1]``), or None for all. ``()`` for none, where
        groups are all that is wanted.
      log_sigma2_init: the logarithm of the variance to start from: a number, or one for every
        path by patterns or a function, see :func:`svd_jax.tree.per_path`.
      groups: which entries share a scale: those that are equal along an axis. ``'outputs'`` (the
        last axis), ``'inputs'`` (the last but one) or another axis by its number; or a list of
        several of these, in which a tuple of numbers stands for a scale to each place along all of
        those axes, and :class:`Shared` for scales that several layers share. Or one of these for
        every path that a pattern is found in, or a function of the path; paths of which it says
        nothing have none.
      log_normal: whether the scales have the truncated log-normal posterior of Neklyudov et al.
        (2017), rather than a Gaussian one.

    Returns:
      The tree with a leaf ``log_sigma2`` beside every chosen ``kernel`` or ``embedding``, of its
      shape and type, and ``groups`` with a ``scale`` (or ``log_scale``) and its ``log_sigma2``.

    Raises:
      ValueError: a chosen weight is variational already, or none was chosen, or ``where``,
        ``log_sigma2_init`` or ``groups`` names what is not there.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))['params']
      >>> jax.tree.map(jnp.shape, svd.variational(params))
      {'bias': (2,), 'kernel': (3, 2), 'log_sigma2': (3, 2)}
      >>> units = svd.variational(params, where=(), groups='outputs')
      >>> jax.tree.map(jnp.shape, units['groups'])
      {'outputs': {'log_sigma2': (1, 2), 'scale': (1, 2)}}
    """
    paths = weight_paths(params)
    chosen = selector(where, paths)
    scales = _scales_for(groups, params, 'log_scale' if log_normal else 'scale')
    all_paths = [*_paths(params), *scales]
    start = _numbers(log_sigma2_init, all_paths, 'log_sigma2_init')

    def add(weight: Weight, node: dict[str, Any]) -> dict[str, Any]:
        if not chosen(weight.path):
            return node
        if weight.log_sigma2 is not None:
            raise ValueError(
                f'{weight.path} is variational already: leave it out with where=, or start '
                'from a tree without its log_sigma2'
            )
        return {**node, LOG_SIGMA2: jnp.full_like(weight.values, start(weight.path))}

    if not any(map(chosen, paths)) and not scales:
        raise ValueError(
            'nothing to make variational: '
            + (f'where={where!r} chose none of {", ".join(paths)}' if paths else
               f'the tree has no leaf named {" or ".join(WEIGHTS)}; of a model of Flax NNX, '
               'svd.nnx.variational makes one')
        )  # fmt: skip
    added = {}
    for path, like in scales.items():
        group, _, name = path.rpartition('/')
        # A scale of 1 changes nothing.
        location = jnp.full(like.shape, float(name == 'scale'), like.dtype)
        added[group] = {name: location, LOG_SIGMA2: jnp.full_like(location, start(path))}
    return with_groups(map_weights(add, params), added)


def _scales_for(groups: Groups, params: PyTree, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths, shapes and types of the scales that ``groups`` asks for."""
    if groups is None:
        return {}
    of = groups if callable(groups) else _decider(groups, weight_paths(params), 'groups')
    known = {scale.group for weight in weights(params) for scale in weight.scales}
    found: dict[str, jax.ShapeDtypeStruct] = {}
    missing: dict[str, set[str]] = {}
    for weight in weights(params):
        wanted, shape = of(weight.path), jnp.shape(weight.values)
        for axis in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
            if axis is None:
                continue
            group, layers, along = _group(axis, len(shape), weight.path)
            if group in known:
                raise ValueError(f'{weight.path} has {group} among its groups already')
            sizes = tuple(n if a in along else 1 for a, n in enumerate(shape))
            like = found.setdefault(
                f'{group}/{name}', jax.ShapeDtypeStruct(sizes, weight.values.dtype)
            )
            if like.shape != sizes:
                raise ValueError(
                    f'groups: layers cannot share the scales of {group}: those of {weight.path} '
                    f'have shape {sizes}, those of another {like.shape}'
                )
            missing.setdefault(group, set(layers)).discard(_layer(weight.path))
    for group, names in missing.items():
        if names:
            raise ValueError(
                f'groups: {group} is to be shared by {", ".join(sorted(names))} too: ask for it on '
                'the weights of all these layers, which must lie in one mapping'
            )
    return found


def _layer(path: str) -> str:
    """The name of the layer that a weight is in."""
    return path.split('/')[-2] if '/' in path else ''


def _group(
    axis: Axis | Shared, ndim: int, path: str
) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """The path of a group, the layers that share it if any, the axes along which scales differ."""
    parent = path.rpartition('/')[0]
    if not isinstance(axis, Shared):
        name, along = _axes(axis, ndim, path)
        return f'{parent}/{GROUPS}/{name}'.removeprefix('/'), (), along
    name, along = _axes(axis.axis, ndim, path)
    layers = tuple(sorted(set(axis.layers)))
    if len(layers) < 2 or _layer(path) not in layers:
        raise ValueError(
            f'groups: {axis} is asked for on {path}: it needs two layers or more, that one of them'
        )
    holder = parent.rpartition('/')[0]
    return f'{holder}/{GROUPS}/{AND.join(layers)}:{name}'.removeprefix('/'), layers, along


def _axes(axis: Axis, ndim: int, path: str) -> tuple[str, tuple[int, ...]]:
    """The name of a group, and the axes along which its scales differ."""
    known = {'outputs': (-1,), 'inputs': (-2,)}
    places: tuple[int, ...]
    match axis:
        case str():
            places = known.get(axis, ())
        case int():
            places = (axis,)
        case _:
            places = axis
    if not places or not all(isinstance(a, int) and -ndim <= a < ndim for a in places):
        raise ValueError(
            f'groups: {axis!r} is no axis of {path}, which has {ndim}: name "outputs", "inputs", '
            'an axis by its number, or a tuple of numbers'
        )
    along = tuple(sorted(place % ndim for place in places))
    return axis if isinstance(axis, str) else f'axis{"_".join(map(str, along))}', along


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
    terms = (factor(random.path) * jnp.sum(random.kl(method)) for random in randoms(params))
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
    for random in randoms(params):
        *parents, name = random.path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = random.log_alpha()
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
    return collapse(params, lambda weight: weight.sparse(limit))


def collapse(params: PyTree, function: Callable[[Weight], Any], where: Where = None) -> PyTree:
    """One leaf in the place of a variational weight, its ``log_sigma2`` and its scales.

    Args:
      params: a variational tree.
      function: makes the leaf of the weight.
      where: of which variational weights; as for :func:`variational`.

    Returns:
      The tree with those leaves; whatever else was there is the same object as before.

    Raises:
      ValueError: nothing is variational.
    """
    randoms(params)
    chosen = selector(where, weight_paths(params))
    gone: set[str] = set()
    left: set[str] = set()
    for weight in weights(params):
        groups = gone if chosen(weight.path) else left
        groups.update(scale.group for scale in weight.scales)
    if gone & left:
        raise ValueError(
            f'{", ".join(sorted(gone & left))} would go with some of the weights that share it '
            'and stay with others: choose all of them, or none'
        )

    def collapsed(weight: Weight, node: dict[str, Any]) -> dict[str, Any]:
        if not weight.randoms or not chosen(weight.path):
            return node
        name, leaf = weight.path.rpartition('/')[2], function(weight)
        return {k: leaf if k == name else v for k, v in node.items() if k != LOG_SIGMA2}

    return without_groups(map_weights(collapsed, params), gone)


def units(params: PyTree, threshold: PerPath = 3.0) -> dict[str, jax.Array]:
    """Which units ``sparsify`` would leave a weight of, per path of their group, as booleans.

    A group's path is that of its scales without their name: ``'Conv_0/groups/outputs'``.
    """
    limit = per_path(threshold, params, 'threshold')
    found: dict[str, jax.Array] = {}
    for weight in weights(params):
        for scale in weight.scales:
            shape = jnp.shape(scale.location)
            shared = tuple(axis for axis, size in enumerate(shape) if size == 1)
            left = jnp.any(weight.sparse(limit) != 0, axis=shared)
            # Of layers that share it, any one.
            found[scale.group] = found.get(scale.group, jnp.zeros_like(left)) | left
    return found


def nonzero(params: PyTree, threshold: PerPath = 3.0) -> dict[str, jax.Array]:
    """How many weights ``sparsify`` would leave, per path, as traced integers.

    Weights without a posterior count too, by being different from zero.
    """
    limit = per_path(threshold, params, 'threshold')
    return {weight.path: jnp.sum(weight.sparse(limit) != 0) for weight in weights(params)}
