"""Training on a smaller network, once units are dropped: faster as it goes on."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from svd_jax import convention, network, transform, tree
from svd_jax.compaction import Compact, Report, compact_but_read, compact_with_training
from svd_jax.network import Path
from svd_jax.rules import Units
from svd_jax.train import TrainState

PyTree = Any


class Smaller:
    """A network on smaller arrays, with the ``apply`` of a Flax model.

    Attributes:
      compact: what :func:`svd_jax.compact` made of it; of the variables, where there are mutable
        collections.
    """

    def __init__(self, compact: Compact, training: Callable[..., Any] | None = None) -> None:
        self.compact, self._training = compact, training

    def apply(
        self, variables: Mapping[str, PyTree], *inputs: Any, mutable: Any = False, **_: Any
    ) -> Any:
        """As a Flax model's; it has no random numbers.

        Args:
          variables: the smaller ones.
          inputs: as for :func:`shrink`.
          mutable: False to evaluate; or the names of the mutable collections, to run it as in
            training and return ``(outputs, updates)``.
        """
        return self._run(mutable)(self._tree(variables), *inputs)

    def __call__(self, params: PyTree, *inputs: Any, mutable: Any = False) -> Any:
        """The same with dense parameters, by the fastest way for this backend, in training too.

        Args:
          params: the parameters, or the variables.
          inputs: as for :meth:`apply`.
          mutable: as for :meth:`apply`.
        """
        return transform.evaluate(self._run(mutable), self._tree(params), *inputs)

    def _run(self, mutable: Any) -> Callable[..., Any]:
        if mutable is False:
            return self.compact.apply
        if self._training is None:
            raise ValueError('this network has no mutable collections: leave mutable out')
        return self._training

    def _tree(self, given: PyTree) -> PyTree:
        """The variables, or the parameters where those are all."""
        nested = map(network.with_collections, (self.compact.params, given))
        return given['params'] if tuple(nested) == (False, True) else given


class Shrunk(NamedTuple):
    """What is left to train.

    Attributes:
      model: the smaller network, for :func:`svd_jax.apply` and all else that takes a model.
      state: the smaller state.
      report: of what was removed.
      kept: of every array of parameters and collections that is left, by its path, which entries
        along each axis.
      whole: the state before: its collections, and of all else shapes and types.
    """

    model: Smaller
    state: TrainState
    report: Report
    kept: dict[Path, Units]
    whole: TrainState

    def expand(self, state: TrainState) -> TrainState:
        """The state of the whole network that a smaller one stands for.

        What was removed is zero, and so dropped at any threshold: :func:`shrink` removes it again.
        Of the collections it is what it was: no weight reads it.

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

        def leaf_of(keys: Any, like: Any) -> jax.Array:
            path = network.path_of(keys)
            leaf, units = known.get(path), _units_of(path, like.shape, self.kept)
            if isinstance(like, jax.ShapeDtypeStruct):
                like = jnp.zeros(like.shape, like.dtype)
            if leaf is None:
                return jnp.asarray(like)
            return leaf if units is None else jnp.asarray(like).at[np.ix_(*units)].set(leaf)

        return jax.tree_util.tree_map_with_path(leaf_of, self.whole)


def shrink(
    model: Any,
    state: TrainState,
    tx: optax.GradientTransformation,
    *example: Any,
    threshold: tree.PerPath = 3.0,
    training: Callable[..., Any] | None = None,
    **options: Any,
) -> Shrunk:
    """Removes the units that sparsify would leave no weight, from a training in progress.

    What is left goes on as it would have: parameters, posteriors, the optimiser's moments, batch
    statistics. Units that are constant go into the next bias, as :func:`svd_jax.compact` has it, so
    that the outputs of the sparsified network are the same to rounding; the noise of what is
    removed is gone, and so are derivatives of the user's own (see :class:`svd_jax.Compact`). With
    mutable collections constant units stay, since batch statistics make another constant of them
    than running averages do: only what no weight reads is removed.

    Args:
      model: as for :func:`svd_jax.compact`.
      state: of the training.
      tx: the optimiser.
      example: as for :func:`svd_jax.compact`.
      threshold: as for :func:`svd_jax.sparsify`.
      training: of a state with mutable collections: the model in training, a pure function of the
        variables and the inputs that returns ``(outputs, updates)``, without random numbers. The
        smaller network runs it where it is given ``mutable``.
      options: as for :func:`svd_jax.compact`.

    Returns:
      The smaller network, its state, and a report.

    Raises:
      ValueError: nothing is variational; the state has mutable collections and ``training`` is not
        given, or draws random numbers; or no unit is left.

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
    sparse = jax.device_get(tree.sparsify(state.params, threshold))
    if not any(np.any(weight.values) for weight in convention.weights(sparse)):
        raise ValueError('no unit is left: the output of the network is constant')
    # What layers that share a scale keep of it: more and more, until they agree.
    wanted: dict[Path, Units] = {}
    while True:
        smaller = _smaller(model, training, sparse, state.collections, example, options, wanted)
        variables, kept = _by_collection(smaller.compact)
        wanted = _alike_where_shared(state.params, kept)
        if all(all(map(np.array_equal, units, kept[path])) for path, units in wanted.items()):
            break
    kept = _kept_everywhere(state.params, kept)
    arrays = traverse_util.flatten_dict(variables['params'])
    before, places = dict(_leaves(state.params)), _places(state.params)
    for weight in convention.weights(state.params):
        # Its means and its posteriors, where compact has what is shipped of them.
        for path in map(places.get, _posterior_paths(weight)) if weight.randoms else ():
            if path in kept:
                arrays[path] = before[path][np.ix_(*kept[path])]
    params = traverse_util.unflatten_dict(arrays)
    opt_state = _cut_like(tx.init(params), state.opt_state, kept)
    collections = {name: variables.get(name, {}) for name in state.collections}
    after = state.replace(params=params, opt_state=opt_state, collections=collections)
    # A copy: steps donate their state, and the given one must survive that.
    after = jax.tree.map(jnp.array, after)
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    whole = whole.replace(collections=jax.device_get(state.collections))
    return Shrunk(smaller, after, smaller.compact.report, kept, whole)


def _smaller(
    model: Any,
    training: Callable[..., Any] | None,
    sparse: PyTree,
    collections: dict[str, PyTree],
    example: tuple,
    options: dict[str, Any],
    kept: Mapping[Path, Units],
) -> Smaller:
    """The smaller network, evaluated and, with mutable collections, in training.

    It has at least the entries of parameters that are to be kept.
    """
    if not collections:
        return Smaller(compact_but_read(model, sparse, example, kept, options))
    if training is None:
        names = list(collections)
        raise ValueError(
            f'the state has {", ".join(names)}: pass training=, the network as it is in training, '
            f'such as functools.partial(model.apply, train=True, mutable={names})'
        )
    variables = {'params': sparse, **collections}
    kept = {('params', *path): units for path, units in kept.items()}
    return Smaller(*compact_with_training(model, training, variables, example, kept, options))


def _by_collection(small: Compact) -> tuple[dict[str, PyTree], dict[Path, Units]]:
    """The variables, and what is kept of them, of parameters by the path among those."""
    if not network.with_collections(small.params):
        return {'params': small.params}, small.kept
    kept = {path[1:] if path[0] == 'params' else path: u for path, u in small.kept.items()}
    return small.params, kept


def _places(params: PyTree) -> dict[str, Path]:
    """Where every array lies, by its joined path: a name may hold a slash."""
    return {'/'.join(path): path for path, _ in _leaves(params)}


def _posterior_paths(weight: convention.Weight) -> Iterator[str]:
    """Of the arrays of a random weight: itself, its scales, and their ``log_sigma2``."""
    yield weight.path
    for random in weight.randoms:
        yield random.path
        yield f'{random.path.rpartition("/")[0]}/{convention.LOG_SIGMA2}'.removeprefix('/')


def _alike_where_shared(params: PyTree, kept: Mapping[Path, Units]) -> dict[Path, Units]:
    """Which entries to keep of every random weight: of a scale, what any that share it keep."""
    places = _places(params)
    found = {
        places[weight.path]: kept[places[weight.path]]
        for weight in convention.weights(params)
        if weight.randoms and places[weight.path] in kept
    }
    owners = [
        (places[weight.path], random)
        for weight in convention.weights(params)
        for random in weight.randoms
        if places[weight.path] in found
    ]
    shared: dict[str, Units] = {}
    for path, random in owners:
        own = _units_of_random(random, found[path])
        others = shared.get(random.path, own)
        shared[random.path] = tuple(a | b for a, b in zip(own, others, strict=True))
    for path, random in owners:
        pairs = zip(found[path], shared[random.path], strict=True)
        found[path] = tuple(own | more if len(own) == len(more) else own for own, more in pairs)
    return found


def _kept_everywhere(params: PyTree, kept: Mapping[Path, Units]) -> dict[Path, Units]:
    """Which entries are kept of posteriors and scales too: as of their weights."""
    found, places = dict(kept), _places(params)
    for weight in convention.weights(params):
        units = kept.get(places[weight.path])
        if units is None:
            continue
        for random in weight.randoms:
            path, own = places[random.path], _units_of_random(random, units)
            found[path] = found[(*path[:-1], convention.LOG_SIGMA2)] = own
    return found


def _units_of_random(random: convention.Random, units: Units) -> Units:
    """Which entries of a weight's mean or scale go with those of the weight."""
    return tuple(
        whole if size == len(whole) else np.ones(1, bool)
        for size, whole in zip(random.location.shape, units, strict=True)
    )


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
        cut = known[path] if units is None else known[path][np.ix_(*units)]
        if cut.shape != leaf.shape:
            raise ValueError(
                f'{"/".join(path)} of the optimiser is no array like its parameter, such as a '
                'moment of Adam is: shrink with such an optimiser, or start with a new state'
            )
        return cut

    return jax.tree_util.tree_map_with_path(leaf_of, new)
