"""The one convention: what is a weight in a tree, and what belongs to it.

A weight with a posterior is a leaf ``kernel`` (or ``embedding``) with a sibling leaf ``log_sigma2``
of the same shape::

    {'Conv_0': {'kernel': (5, 5, 1, 20), 'log_sigma2': (5, 5, 1, 20), 'bias': (20,)}, ...}

Weights may have scales beside them that whole units share, each with a posterior of its own. Which
entries share one is told by its shape, which is that of the weight with ones::

    {'Conv_0': {'kernel': (5, 5, 1, 20), 'bias': (20,),
                'groups': {'outputs': {'scale': (1, 1, 1, 20), 'log_sigma2': (1, 1, 1, 20)}}}, ...}

The weights of several layers may share scales too. Those lie beside the layers, under their names::

    {'hf': {'kernel': (9, 5)}, 'hi': {'kernel': (9, 5)},
     'groups': {'hf+hi:inputs': {'scale': (9, 1), 'log_sigma2': (9, 1)}}}
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata

from svd_jax import posterior

PyTree = Any
Number = float | jax.Array
_Groups = Mapping[str, Mapping[str, Any]]
_T = TypeVar('_T')

WEIGHTS = ('kernel', 'embedding')
SCALES = ('scale', 'log_scale')
LOG_SIGMA2 = 'log_sigma2'
GROUPS = 'groups'
# Between the names of layers that share scales.
AND = '+'


class Random(NamedTuple):
    """An array of a tree that has a posterior.

    Attributes:
      path: of the array, such as ``'Conv_0/kernel'`` or ``'Conv_0/groups/outputs/scale'``.
      location: the posterior's means; of a ``log_scale``, the locations of the logarithms.
      log_sigma2: logarithms of its variances, of that shape.
    """

    path: str
    location: jax.Array
    log_sigma2: jax.Array

    @property
    def group(self) -> str:
        """The path of the group, if it is of scales: ``'Conv_0/groups/outputs'``."""
        return self.path.rpartition('/')[0]

    @property
    def family(self) -> posterior.Family:
        """Of the posterior, which the array's name decides."""
        log_normal = self.path.rpartition('/')[2] == 'log_scale'
        return posterior.LOG_NORMAL if log_normal else posterior.NORMAL

    def log_alpha(self) -> jax.Array:
        return self.family.log_alpha(self.location, self.log_sigma2)

    def kl(self, method: str) -> jax.Array:
        return self.family.kl(self.location, self.log_sigma2, method)

    def mean(self) -> jax.Array:
        return self.family.mean(self.location, self.log_sigma2)

    def masked(self, threshold: Number = 3.0) -> jax.Array:
        """The means, zero where the noise level is at or above the threshold."""
        kept = self.log_alpha() < threshold + self.family.offset
        return jnp.where(kept, self.mean(), 0).astype(self.location.dtype)


class Weight(NamedTuple):
    """A weight in a tree.

    Attributes:
      path: such as ``'Conv_0/kernel'``.
      values: of it, or the means of its posterior.
      log_sigma2: of its posterior, if it has one.
      scales: of the groups of its entries, if it has any.
    """

    path: str
    values: jax.Array
    log_sigma2: jax.Array | None
    scales: tuple[Random, ...] = ()

    @property
    def randoms(self) -> tuple[Random, ...]:
        """Its own posterior, if any, and those of its scales."""
        if self.log_sigma2 is None:
            return self.scales
        return (Random(self.path, self.values, self.log_sigma2), *self.scales)

    def deviation(self) -> jax.Array:
        """The standard deviation of the weight times its scales, which are independent of it."""
        if not self.scales:
            assert self.log_sigma2 is not None
            return jnp.exp(self.log_sigma2.astype(jnp.float32) / 2)
        mean, growth = self.values.astype(jnp.float32), jnp.zeros(())
        for random in self.randoms:
            # That of a mean of zero, which the product below makes zero, must not be infinite.
            growth += jnp.log1p(jnp.exp(jnp.minimum(random.log_alpha(), 60.0)))
        for scale in self.scales:
            mean *= scale.mean()
        return jnp.abs(mean) * jnp.sqrt(jnp.expm1(growth))

    def sparse(self, limit: Callable[[str], Number]) -> jax.Array:
        """The weight that will be shipped: what is not dropped, times the means of the scales.

        Args:
          limit: the threshold of every path.
        """
        values = self.values
        if self.log_sigma2 is not None:
            values = masked(values, self.log_sigma2, limit(self.path))
        for scale in self.scales:
            values = values * scale.masked(limit(scale.path))
        return values


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(str(name), child) for name, child in node.items()]
    if isinstance(node, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(node)]
    return []


def _children_but_groups(node: Any) -> list[tuple[str, Any]]:
    """Without scales, which belong to the weights."""
    has_scales = _is_layer(node) or _shared_groups(node)
    return [(n, child) for n, child in _children(node) if not (has_scales and n == GROUPS)]


def _shared_groups(node: Any) -> dict[str, Any]:
    """The scales that layers in a mapping share, by the name of the group."""
    groups = node.get(GROUPS) if isinstance(node, Mapping) else None
    if not isinstance(groups, Mapping):
        return {}
    return {name: child for name, child in groups.items() if AND in name}


def is_shared(group: str) -> bool:
    """Whether several layers share the scales of a group, by its path."""
    return AND in group.rpartition('/')[2]


def name_of(group: str) -> str:
    """What a group is called where it is shown: by its layer, as ``'Conv_0 outputs'``."""
    return group.replace(f'{GROUPS}/', ' ').replace('/ ', ' ').strip()


def _shared_by(group: str) -> list[str]:
    """The names of the layers that share scales, by that of their group."""
    return group.partition(':')[0].split(AND)


def leaves(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """What is in nested mappings, lists and tuples, in order, each with its path."""
    if isinstance(node, (Mapping, list, tuple)):
        for name, child in _children(node):
            yield from leaves(child, f'{path}{name}/')
    else:
        yield path.removesuffix('/'), node


def by_path(node: Any) -> dict[str, Any]:
    """The same by path.

    Raises:
      ValueError: two paths are the same, as names that hold a slash can make them.
    """
    return dict(_distinct(leaves(node)))


def _distinct(named: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """The same pairs, unless a name with a slash in it makes two paths one."""
    paths: set[str] = set()
    for path, value in named:
        if path in paths:
            raise ValueError(f'two arrays have the path {path}: rename one of them')
        paths.add(path)
        yield path, value


def _rebuild(node: Any, children: dict[str, Any]) -> Any:
    """A container of the type of ``node``, whose keys need not be the names in paths."""
    if isinstance(node, Mapping):
        keys = {str(key): key for key in node}
        children = {keys.get(name, name): child for name, child in children.items()}
        return children if type(node) is dict else type(node)(children)  # type: ignore[call-arg]
    values = children.values()
    return type(node)(*values) if hasattr(node, '_fields') else type(node)(values)


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mapping) and any(_is_weight(str(name), node[name]) for name in node)


def _is_weight(name: str, leaf: Any) -> bool:
    return name in WEIGHTS and hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)


def _weight_of(node: Mapping[str, Any], path: str, shared: _Groups) -> Weight | None:
    """The weight that a mapping holds itself, after checking the convention.

    Args:
      node: the mapping.
      path: of the mapping, with a slash at its end.
      shared: scales that it shares with others, by the paths of their groups.
    """
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
        _check_shapes(path, names[0], node[names[0]], log_sigma2)
    if not names:
        return None
    values = node[names[0]]
    own = {
        f'{path}{GROUPS}/{name}/': child
        for name, child in node.get(GROUPS, {}).items()
        if AND not in name
    }
    return Weight(f'{path}{names[0]}', values, log_sigma2, _scales_of({**own, **shared}, values))


def _check_shapes(path: str, name: str, location: Any, log_sigma2: Any) -> None:
    if jnp.shape(log_sigma2) != jnp.shape(location):
        raise ValueError(
            f'{path}{LOG_SIGMA2} has shape {jnp.shape(log_sigma2)} but {path}{name} has '
            f'{jnp.shape(location)}: they must agree'
        )


def _scales_of(groups: _Groups, values: Any) -> tuple[Random, ...]:
    """The scales of a weight, in the order of their names, after checking the convention."""
    found = []
    for place, child in sorted(groups.items()):
        if set(child) not in [{name, LOG_SIGMA2} for name in SCALES]:
            raise ValueError(
                f'{place} holds {", ".join(child)}: it must hold a {" or ".join(SCALES)} and its '
                f'{LOG_SIGMA2}'
            )
        name = next(name for name in SCALES if name in child)
        location, shape = child[name], jnp.shape(values)
        _check_shapes(place, name, location, child[LOG_SIGMA2])
        sizes = jnp.shape(location)
        if len(sizes) != len(shape) or any(
            n not in (1, whole) for n, whole in zip(sizes, shape, strict=True)
        ):
            raise ValueError(
                f'{place}{name} has shape {sizes}, the weight that it scales {shape}: it must be '
                'that with ones along the axes whose entries share a scale'
            )
        found.append(Random(f'{place}{name}', location, child[LOG_SIGMA2]))
    return tuple(found)


def _shared_with(node: Any, path: str, name: str) -> _Groups:
    """The scales that a layer in a mapping shares with others in it."""
    return {
        f'{path}{GROUPS}/{group}/': child
        for group, child in _shared_groups(node).items()
        if name in _shared_by(group)
    }


def _check_shared(node: Any, path: str) -> None:
    for group in _shared_groups(node):
        missing = [name for name in _shared_by(group) if not _is_layer(node.get(name))]
        if missing:
            raise ValueError(
                f'{path}{GROUPS}/{group} is shared by {", ".join(missing)}, which holds no weight '
                'there: name the layers beside it'
            )


def weights(params: PyTree) -> Iterator[Weight]:
    """All weights of a tree, variational or not, in the order of the tree.

    Raises:
      ValueError: the tree breaks the convention; the message names the path.
    """
    for _, weight in _distinct((weight.path, weight) for weight in _weights(params, '', {})):
        yield weight


def _weights(node: Any, path: str, shared: _Groups) -> Iterator[Weight]:
    if isinstance(node, Mapping):
        _check_shared(node, path)
        weight = _weight_of(node, path, shared)
        if weight is not None:
            yield weight
    for name, child in _children_but_groups(node):
        yield from _weights(child, f'{path}{name}/', _shared_with(node, path, name))


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


def masked(kernel: jax.Array, log_sigma2: jax.Array, threshold: Number = 3.0) -> jax.Array:
    """The weights of one layer, with those of ``log_alpha >= threshold`` at zero."""
    return Random('kernel', kernel, log_sigma2).masked(threshold)


def randoms(params: PyTree) -> list[Random]:
    """Every array that has a posterior, once: weights and scales, in the order of the tree.

    Raises:
      ValueError: there is none.
    """
    found = list({
        random.path: random for weight in weights(params) for random in weight.randoms
    }.values())  # fmt: skip
    if not found:
        raise ValueError(
            f'no weight has a {LOG_SIGMA2} beside it: make the tree variational first, with '
            'svd.variational(params) or layers of svd.linen'
        )
    return found


def map_weights(
    function: Callable[[Weight, dict[str, Any]], dict[str, Any]], params: PyTree
) -> PyTree:
    """Replaces the contents of every mapping that holds a weight."""
    return _map_weights(function, params, '', {})


def _map_weights(
    function: Callable[[Weight, dict[str, Any]], dict[str, Any]],
    node: Any,
    path: str,
    shared: _Groups,
) -> Any:
    changed = {
        name: _map_weights(function, child, f'{path}{name}/', _shared_with(node, path, name))
        for name, child in _children_but_groups(node)
    }
    if not isinstance(node, Mapping):
        return _rebuild(node, changed) if isinstance(node, (list, tuple)) else node
    children = {str(name): changed.get(str(name), child) for name, child in node.items()}
    weight = _weight_of(node, path, shared)
    return _rebuild(node, children if weight is None else function(weight, children))


def with_groups(params: PyTree, groups: Mapping[str, PyTree], path: str = '') -> PyTree:
    """A tree with groups of scales added, each in the place that its path names."""
    if not isinstance(params, (Mapping, list, tuple)):
        return params
    children = {
        name: with_groups(child, groups, f'{path}{name}/') for name, child in _children(params)
    }
    inside = f'{path}{GROUPS}/'
    added = {
        group.removeprefix(inside): scales
        for group, scales in groups.items()
        if group.startswith(inside) and '/' not in group.removeprefix(inside)
    }
    if added:
        children[GROUPS] = {**children.get(GROUPS, {}), **added}
    return _rebuild(params, children)


def without_groups(params: PyTree, groups: Collection[str], path: str = '') -> PyTree:
    """A tree without the groups of scales that these paths name."""
    if not groups or not isinstance(params, (Mapping, list, tuple)):
        return params
    children = {
        name: without_groups(child, groups, f'{path}{name}/')
        for name, child in _children(params)
        if f'{path}{name}' not in groups
    }
    if not children.get(GROUPS, True):
        del children[GROUPS]
    return _rebuild(params, children)
