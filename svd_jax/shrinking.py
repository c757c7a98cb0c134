"""Training on a smaller network, once units are dropped: faster as it goes on."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from svd_jax import convention, network, transform, tree
from svd_jax.compaction import Compact, Report, compact
from svd_jax.network import Path
from svd_jax.rules import Units
from svd_jax.train import TrainState

PyTree = Any


class Smaller:
    """A network on smaller arrays, with the ``apply`` of a Flax model.

    Attributes:
      compact: what :func:`svd_jax.compact` made of it.
    """

    def __init__(self, compact: Compact) -> None:
        self.compact = compact

    def apply(self, variables: Mapping[str, PyTree], *inputs: Any, **_: Any) -> Any:
        """As a Flax model's; it has no random numbers and no mutable collections."""
        return self.compact.apply(variables['params'], *inputs)

    def __call__(self, params: PyTree, *inputs: Any) -> Any:
        """The same with dense parameters, by the fastest way for this backend, in training too."""
        return transform.evaluate(self.compact.apply, params, *inputs)


class Shrunk(NamedTuple):
    """What is left to train.

    Attributes:
      model: the smaller network, for :func:`svd_jax.apply` and all else that takes a model.
      state: the smaller state.
      report: of what was removed.
      kept: of every array of parameters that is left, by its path, which entries along each axis.
      whole: shapes and types of the state before.
    """

    model: Smaller
    state: TrainState
    report: Report
    kept: dict[Path, Units]
    whole: TrainState

    def expand(self, state: TrainState) -> TrainState:
        """The state of the whole network that a smaller one stands for.

        What was removed is zero, and so dropped at any threshold: :func:`shrink` removes it again.

        Args:
          state: of the smaller network, such as that after some steps.

        Raises:
          ValueError: constants of removed units had no bias to go into.
        """
        places = {path for path, _ in _leaves(self.whole)}
        homeless = sorted('/'.join(path) for path, _ in _leaves(state) if path not in places)
        if homeless:
            raise ValueError(f'the whole network has no place for {", ".join(homeless)}')
        known = dict(_leaves(state))

        def leaf_of(keys: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            path = network.path_of(keys)
            leaf, units = known.get(path), _units_of(path, like.shape, self.kept)
            if leaf is None:
                return jnp.zeros(like.shape, like.dtype)
            if units is None:
                return leaf
            return jnp.zeros(like.shape, like.dtype).at[np.ix_(*units)].set(leaf)

        return jax.tree_util.tree_map_with_path(leaf_of, self.whole)


def shrink(
    model: Any,
    state: TrainState,
    tx: optax.GradientTransformation,
    *example: Any,
    threshold: tree.PerPath = 3.0,
    **options: Any,
) -> Shrunk:
    """Removes the units that sparsify would leave no weight, from a training in progress.

    What is left goes on as it would have: parameters, posteriors, the optimiser's moments. Units
    that are constant go into the next bias, as :func:`svd_jax.compact` has it, so that the outputs
    of the sparsified network are the same to rounding; the noise of what is removed is gone.

    Args:
      model: as for :func:`svd_jax.compact`.
      state: of the training; without mutable collections.
      tx: the optimiser.
      example: as for :func:`svd_jax.compact`.
      threshold: as for :func:`svd_jax.sparsify`.
      options: as for :func:`svd_jax.compact`.

    Returns:
      The smaller network, its state, and a report.

    Raises:
      ValueError: nothing is variational; the state has mutable collections; or no unit is left.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import svd_jax as svd
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)]), jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)['params']
      >>> params = svd.variational(params, (), groups={'layers_2': 'inputs'})
      >>> scales = params['layers_2']['groups']['inputs']
      >>> scales['log_sigma2'] = scales['log_sigma2'].at[:3].set(5.0)  # three units of noise alone
      >>> tx = optax.adam(1e-3)
      >>> state = svd.TrainState.create({'params': params}, tx)
      >>> smaller, state, *_ = svd.shrink(model, state, tx, x)
      >>> state.params['layers_0']['kernel'].shape, state.params['layers_2']['kernel'].shape
      ((3, 2), (2, 2))
      >>> y, kl = svd.apply(smaller, state.variables, x, rngs={'noise': jax.random.key(1)})
    """
    if state.collections:
        raise ValueError(
            f'the state has {", ".join(state.collections)}: a network with mutable collections '
            'does something else in training than what can be made smaller'
        )
    sparse = jax.device_get(tree.sparsify(state.params, threshold))
    if not any(np.any(weight.values) for weight in convention.weights(sparse)):
        raise ValueError('no unit is left: the output of the network is constant')
    small = compact(model, sparse, *example, **options)
    kept = _kept_everywhere(state.params, small.kept)
    arrays = traverse_util.flatten_dict(small.params)
    before = traverse_util.flatten_dict(state.params)
    for weight in convention.weights(state.params):
        # Its means and its posteriors, where compact has what is shipped of them.
        for path in map(_path, _posterior_paths(weight)) if weight.randoms else ():
            if path in kept:
                arrays[path] = before[path][np.ix_(*kept[path])]
    params = traverse_util.unflatten_dict(arrays)
    opt_state = _cut_like(tx.init(params), state.opt_state, kept)
    # A copy: steps donate their state, and the given one must survive that.
    after = jax.tree.map(jnp.array, state.replace(params=params, opt_state=opt_state))
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return Shrunk(Smaller(small), after, small.report, kept, whole)


def _path(joined: str) -> Path:
    return tuple(joined.split('/'))


def _posterior_paths(weight: convention.Weight) -> Iterator[str]:
    """Of the arrays of a random weight: itself, its scales, and their ``log_sigma2``."""
    yield weight.path
    for random in weight.randoms:
        yield random.path
        yield f'{random.path.rpartition("/")[0]}/{convention.LOG_SIGMA2}'.removeprefix('/')


def _kept_everywhere(params: PyTree, kept: Mapping[Path, Units]) -> dict[Path, Units]:
    """Which entries are kept of posteriors and scales too: as of their weights."""
    found = dict(kept)
    for weight in convention.weights(params):
        units = kept.get(_path(weight.path))
        if units is None:
            continue
        for random in weight.randoms:
            own = tuple(
                whole if size == len(whole) else np.ones(1, bool)
                for size, whole in zip(random.location.shape, units, strict=True)
            )
            path = _path(random.path)
            if not all(map(np.array_equal, found.get(path, own), own)):
                raise ValueError(
                    f'layers that share {random.path} keep different units of it: leave these '
                    'layers without scales that they share, or train on the whole network'
                )
            found[path] = found[(*path[:-1], convention.LOG_SIGMA2)] = own
    return found


def _leaves(state: PyTree) -> list[tuple[Path, Any]]:
    found = jax.tree_util.tree_leaves_with_path(state)
    return [(network.path_of(keys), leaf) for keys, leaf in found]


def _units_of(path: Path, shape: tuple[int, ...], kept: Mapping[Path, Units]) -> Units | None:
    """Which entries are kept of an array of a state; None if it is no parameter's nor like one.

    Args:
      path: of the array, which ends with that of its parameter, as those of moments do.
      shape: of the array before any entry is removed.
      kept: of every parameter.
    """
    ends = (path[at:] for at in range(len(path)))
    units = next((kept[end] for end in ends if end in kept), None)
    return units if units is not None and shape == tuple(map(len, units)) else None


def _cut_like(new: PyTree, old: PyTree, kept: Mapping[Path, Units]) -> PyTree:
    """The optimiser's state for the smaller tree: what it knows of the parameters that are left.

    Args:
      new: its state at the start, for the smaller tree.
      old: its state for the whole one.
      kept: which entries are kept of every parameter.
    """
    known = dict(_leaves(old))

    def leaf_of(keys: Any, leaf: jax.Array) -> jax.Array:
        path = network.path_of(keys)
        if path not in known:  # a constant that had no place before
            return leaf
        units = _units_of(path, known[path].shape, kept)
        return known[path] if units is None else known[path][np.ix_(*units)]

    return jax.tree_util.tree_map_with_path(leaf_of, new)
