"""Other ways to a sparse network, on plain Flax parameters: what Sparse VD is compared with.

Pruning goes with any optax optimiser: it is a gradient transformation that stands last in a chain,
whose state has a mask for every kernel.

    tx = optax.chain(optax.adam(1e-3), gradual_pruning(0.99, begin=1_000, end=50_000))

L0 regularisation adds a leaf ``gate`` beside every kernel: see :func:`gated`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

PyTree = Any
Kernels = dict[str, jax.Array]  # by the path of the layer: 'Dense_0', 'Block_1/Conv_0'
Masks = dict[str, jax.Array]  # booleans of the shapes of the kernels: false where pruned
Sparsity = float | Mapping[str, float]  # of all kernels together, or of each layer: share of zeros
Score = Callable[[Kernels], Kernels]  # at least 0; what has the lowest is pruned first


# Kernels by name


def kernels(params: PyTree) -> Kernels:
    """All kernels of a tree by the path of their layer."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_layer(path): leaf for path, leaf in leaves if path[-1].key == 'kernel'}


def with_kernels(params: PyTree, new: Mapping[str, jax.Array]) -> PyTree:
    """The tree with other kernels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new[_layer(path)] if path[-1].key == 'kernel' else leaf, params
    )


def masked(params: PyTree, masks: Masks) -> PyTree:
    """The tree with zeros where a mask is false."""
    own = kernels(params)
    return with_kernels(params, {name: jnp.where(masks[name], own[name], 0) for name in own})


def _layer(path: Any) -> str:
    return jax.tree_util.keystr(path[:-1], simple=True, separator='/')


# Masks


def all_kept(params: PyTree) -> Masks:
    return {name: jnp.ones(kernel.shape, bool) for name, kernel in kernels(params).items()}


def largest(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Which are the ``count`` largest of the scores, exactly so many; of equal ones, the first.

    By the bits of the number at the border, from the highest down: it takes a tenth of the time of
    sorting.

    Args:
      scores: (n,), float32, none of them negative, or -1 for what comes last.
      count: from 0 to n; may be traced.
    """
    # Bits of floats that are not negative are in the order of the floats.
    bits = lax.bitcast_convert_type(scores, jnp.int32).astype(jnp.uint32)
    bits = jnp.where(scores < 0, jnp.uint32(0), bits + 1)

    def add_bit(i: jax.Array, border: jax.Array) -> jax.Array:
        higher = border | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(bits >= higher) >= count, higher, border)

    border = lax.fori_loop(0, 32, add_bit, jnp.uint32(0))
    above, equal = bits > border, bits == border
    return above | (equal & (jnp.cumsum(equal) <= count - jnp.sum(above)))


def prune(
    scores: Kernels, masks: Masks, sparsity: Sparsity, progress: float | jax.Array = 1.0
) -> Masks:
    """The masks with more weights pruned: those of the lowest score, none of them comes back.

    Args:
      scores: at least 0, by layer.
      masks: as they are.
      sparsity: share of zeros that is asked for, of all weights or of each layer's.
      progress: how much of that, from 0 to 1; may be traced.
    """

    def kept(flat: jax.Array, share: float) -> jax.Array:
        zeros = jnp.round(progress * round(share * flat.size)).astype(jnp.int32)
        return largest(flat, flat.size - zeros)

    last = {name: jnp.where(masks[name], score, -1).ravel() for name, score in scores.items()}
    if isinstance(sparsity, Mapping):
        flat = {name: kept(score, sparsity[name]) for name, score in last.items()}
    else:
        ends, total = {}, 0
        for name, score in last.items():
            ends[name] = slice(total, total := total + score.size)
        together = kept(jnp.concatenate(list(last.values())), sparsity)
        flat = {name: together[where] for name, where in ends.items()}
    return {name: keep.reshape(masks[name].shape) for name, keep in flat.items()}


def magnitude(kernels: Kernels) -> Kernels:
    """Of a weight: its absolute value."""
    return {name: jnp.abs(kernel) for name, kernel in kernels.items()}


def random_score(seed: int) -> Score:
    """The same draws each time: what is pruned has nothing to do with the weights."""

    def score(kernels: Kernels) -> Kernels:
        # A training from the same seed splits its key in two: a third branch is free.
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2), len(kernels))
        pairs = zip(kernels.items(), keys, strict=True)
        return {name: jax.random.uniform(own, kernel.shape) for (name, kernel), own in pairs}

    return score


# Pruning as gradient transformations


class PruningState(NamedTuple):
    """What the transformations keep.

    Attributes:
      steps: taken so far, int32.
      masks: of the kernels.
    """

    steps: jax.Array
    masks: Masks


def fixed_masks(masks: Masks) -> optax.GradientTransformation:
    """Keeps what is pruned at zero. Its state has the masks: others may take their place there."""

    def init(params: PyTree) -> PruningState:
        return PruningState(jnp.zeros((), jnp.int32), masks)

    def update(updates: PyTree, state: PruningState, params: PyTree = None) -> Any:
        return _held(updates, params, state.masks), state._replace(steps=state.steps + 1)

    return optax.GradientTransformation(init, update)


def gradual_pruning(
    sparsity: Sparsity, begin: int, end: int, every: int = 100, score: Score = magnitude
) -> optax.GradientTransformation:
    """Prunes more and more of the weights, at first quickly (Zhu & Gupta 2018, arXiv 1710.01878).

    Args:
      sparsity: share of zeros in the end: of all weights, ranked together, or of each layer's.
      begin: the step of the first pruning.
      end: the step by which all is pruned.
      every: how many steps to train between two prunings.
      score: what is pruned first is what has the lowest.

    Raises:
      ValueError: between ``begin`` and ``end`` there are not ``every`` steps.
    """
    prunings = (end - begin) // every
    if begin < 0 or prunings < 1:
        raise ValueError(f'no {every} steps between begin={begin} and end={end}')

    def init(params: PyTree) -> PruningState:
        return PruningState(jnp.zeros((), jnp.int32), all_kept(params))

    def update(updates: PyTree, state: PruningState, params: PyTree = None) -> Any:
        since = state.steps - begin
        due = (since >= 0) & (since <= prunings * every) & (since % every == 0)
        moved = kernels(optax.apply_updates(params, updates))
        masks = lax.cond(
            due,
            lambda: prune(
                score(moved), state.masks, sparsity, cubic(state.steps, begin, prunings * every)
            ),
            lambda: state.masks,
        )
        return _held(updates, params, masks), PruningState(state.steps + 1, masks)

    return optax.GradientTransformation(init, update)


def cubic(step: int | jax.Array, begin: int, length: int) -> jax.Array:
    """Share of the final sparsity at a step, from 0 to 1: equation 1 of Zhu & Gupta with s_i = 0.

    Args:
      step: t.
      begin: t_0, of the first pruning.
      length: n times delta t, from the first pruning to the last.
    """
    left = 1 - jnp.clip((step - begin) / length, 0, 1)
    return 1 - left**3


def _held(updates: PyTree, params: PyTree, masks: Masks) -> PyTree:
    """Updates that end at exactly zero where a mask is false."""
    if params is None:
        raise ValueError('pruning needs the parameters: tx.update(gradients, state, params)')
    own, now = kernels(updates), kernels(params)
    return with_kernels(
        updates, {name: jnp.where(masks[name], own[name], -now[name]) for name in own}
    )


# L0 regularisation


# Of the hard concrete distribution: Louizos et al. 2018, arXiv 1712.01312, section 4.
TEMPERATURE, LOWER, UPPER = 2 / 3, -0.1, 1.1  # beta, gamma, zeta
GATE = 'gate'


def gated(params: PyTree, drop_rate: float = 0.5) -> PyTree:
    """Adds to every kernel a leaf ``gate``, the log alpha of Louizos et al., of the same shape."""
    location = jnp.log(1 - drop_rate) - jnp.log(drop_rate)

    def with_gate(tree: PyTree) -> PyTree:
        if not isinstance(tree, Mapping):
            return tree
        children = {name: with_gate(child) for name, child in tree.items()}
        own = {GATE: jnp.full_like(tree['kernel'], location)} if 'kernel' in tree else {}
        return children | own

    return with_gate(params)


def gates(params: PyTree) -> Kernels:
    """All gates by the path of their layer."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_layer(path): leaf for path, leaf in leaves if path[-1].key == GATE}


def hard_concrete(location: jax.Array, uniform: jax.Array) -> jax.Array:
    """A gate in [0, 1], drawn; equations 10 and 11.

    Args:
      location: log alpha.
      uniform: draws above 0 and below 1, of the same shape.
    """
    logit = jnp.log(uniform) - jnp.log1p(-uniform)
    stretched = jax.nn.sigmoid((logit + location) / TEMPERATURE) * (UPPER - LOWER) + LOWER
    return jnp.clip(stretched, 0, 1)


def open_probability(location: jax.Array) -> jax.Array:
    """That a gate is not zero; its sum is the expected L0 norm, equation 12."""
    return jax.nn.sigmoid(location - TEMPERATURE * jnp.log(-LOWER / UPPER))


def test_gate(location: jax.Array) -> jax.Array:
    """The gate of the trained network; equation 13."""
    return jnp.clip(jax.nn.sigmoid(location) * (UPPER - LOWER) + LOWER, 0, 1)


def expected_l0(params: PyTree) -> jax.Array:
    """How many weights are expected not to be zero."""
    return sum((open_probability(own).sum() for own in gates(params).values()), jnp.zeros(()))


def draw_gates(params: PyTree, key: jax.Array) -> PyTree:
    """Plain parameters, the kernels times one draw of their gates."""
    location = gates(params)
    keys = dict(zip(location, jax.random.split(key, len(location)), strict=True))
    smallest = jnp.finfo(jnp.float32).eps
    return _times(params, {
        name: hard_concrete(own, jax.random.uniform(
            keys[name], own.shape, minval=smallest, maxval=1 - smallest
        ))
        for name, own in location.items()
    })  # fmt: skip


def close_gates(params: PyTree) -> PyTree:
    """Plain parameters, the kernels times the gates of the trained network."""
    return _times(params, {name: test_gate(own) for name, own in gates(params).items()})


def _times(params: PyTree, factors: Kernels) -> PyTree:
    own = kernels(params)
    plain = with_kernels(params, {name: own[name] * factors[name] for name in own})
    return _without_gates(plain)


def _without_gates(tree: PyTree) -> PyTree:
    if not isinstance(tree, Mapping):
        return tree
    return {name: _without_gates(child) for name, child in tree.items() if name != GATE}
