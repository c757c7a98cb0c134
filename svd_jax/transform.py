"""Any Flax model, unchanged: run with its weights random.

    params = svd.variational(params)
    y, kl = svd.apply(model, {'params': params}, x, rngs={'noise': key})    # training
    y = model.apply({'params': svd.sparsify(params)}, x)                    # what will be shipped

The model is traced, as ``jax.jit`` traces it, and its linear operations are computed as those of
svd.linen's layers are, wherever they stand: see :mod:`svd_jax.randomness`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng

from svd_jax import linear, network, noise, posterior, randomness, scales, tree
from svd_jax.convention import Number, Weight, masked

PyTree = Any
NOISE = 'noise'


def apply(
    model: Any,
    variables: Mapping[str, PyTree],
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
    mutable: Any = False,
    capture_intermediates: Any = False,
    sampled: tree.Where = None,
    threshold: tree.PerPath | None = None,
    kl_method: str = 'molchanov',
    **kwargs: Any,
) -> Any:
    """``model.apply`` with the weights that have a ``log_sigma2`` random, and their KL.

    A weight that meets inputs in linear operations alone (a matrix product, a convolution, a
    lookup, in any layer, or outside of any) gets the local reparameterisation there, independent
    in every call. Others are drawn once, with :func:`sample`: those that are used in another way,
    and those that are the same in all rounds of a loop, as in a recurrent cell, which keeps one
    draw along time (Chirkova, Lobacheva & Vetrov 2018). In a loop over layers (``nn.scan`` with
    parameters of their own) they are local.

    Args:
      model: a Flax Linen module, or anything with such an ``apply``.
      variables: ``{'params': ..., ...}``, with ``log_sigma2`` beside the weights that are random;
        see :func:`svd_jax.variational`.
      *args: what the model takes.
      rngs: the keys by name, ``'noise'`` among them.
      mutable: as for ``model.apply``.
      capture_intermediates: as for ``model.apply``.
      sampled: which weights are drawn, and which are not, instead of by the rule above: as
        ``where`` of :func:`svd_jax.variational`. ``lambda path: False`` for none.
      threshold: at which log alpha weights are left out of the mean, as they will be once
        sparsified; None for none. What ``mask_in_training`` of svd.linen's layers does.
      kl_method: see :func:`svd_jax.math.kl`.
      **kwargs: what the model takes, and ``method`` of ``model.apply``.

    Returns:
      ``(y, kl)``, with y what the model returns, and the KL divergence of all random weights: a
      float32 scalar, summed over the weights, each counted once. With ``mutable`` or
      ``capture_intermediates``, ``((y, kl), updates)``.

    Raises:
      ValueError: there is no rng ``'noise'`` or no collection ``'params'``; nothing is variational;
        the model doesn't use some weight that is; or a weight that ``sampled`` left out cannot be
        local.

    References:
      Kingma, Salimans & Welling, "Variational Dropout and the Local Reparameterization Trick",
      2015; Molchanov, Ashukha & Vetrov 2017, section 4.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((5, 3))
      >>> params = svd.variational(model.init(jax.random.key(0), x)['params'])
      >>> y, kl = svd.apply(model, {'params': params}, x, rngs={'noise': jax.random.key(1)})
      >>> y.shape, kl.shape
      ((5, 2), ())
    """
    rngs = dict(rngs or {})
    if NOISE not in rngs:
        raise ValueError(
            "svd.apply needs noise: pass rngs={'noise': key}; to evaluate what will be shipped, "
            "model.apply({'params': svd.sparsify(params)}, ...)"
        )
    key = rngs.pop(NOISE)
    params, collections = network.split(variables)
    with_updates = mutable is not False or bool(capture_intermediates)

    def run_model(params: PyTree) -> Any:
        return model.apply(
            {'params': params, **collections},
            *args,
            rngs=rngs,
            mutable=mutable,
            capture_intermediates=capture_intermediates,
            **kwargs,
        )

    result = run(run_model, params, key, sampled=sampled, threshold=threshold)
    kl = tree.kl(params, kl_method)
    return ((result[0], kl), result[1]) if with_updates else (result, kl)


def run(
    function: Callable[[PyTree], Any],
    params: PyTree,
    key: jax.Array | randomness.Keys,
    *,
    sampled: tree.Where = None,
    threshold: tree.PerPath | None = None,
) -> Any:
    """What a function of parameters returns, with the weights that have a ``log_sigma2`` random.

    Args:
      function: pure; takes ``params`` without ``log_sigma2``.
      params: a variational tree.
      key: for the noise; or what makes the keys of it.
      sampled: as for :func:`apply`.
      threshold: as for :func:`apply`.

    Returns:
      What ``function`` returns, of arrays.

    Raises:
      ValueError: as for :func:`apply`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from svd_jax import transform
      >>> params = {'kernel': jnp.ones((3, 2)), 'log_sigma2': jnp.zeros((3, 2))}
      >>> transform.run(lambda p: jnp.ones((4, 3)) @ p['kernel'], params, jax.random.key(0)).shape
      (4, 2)
    """
    dense = tree.collapse(params, lambda weight: weight.values)
    program, shapes = jax.make_jaxpr(function, return_shape=True)(dense)
    marked = tree.collapse(
        params, lambda weight: randomness.Mark(frozenset([weight.path]), _spreads(weight))
    )
    marks = [m if isinstance(m, randomness.Mark) else randomness.Mark() for m in _leaves(marked)]
    used = randomness.uses(program, marks, in_loops=sampled is not None)
    drawn = _drawn(used, randomness.united(marks), sampled)
    limit = None if threshold is None else tree.per_path(threshold, params, 'threshold')
    keys = key if isinstance(key, randomness.Keys) else randomness.Keys(key)

    def argument(weight: Weight) -> Any:
        if limit is not None:
            weight = _masked(weight, limit)
        if weight.path in drawn:
            return _draw(weight, keys.root)
        variance = None
        if weight.log_sigma2 is not None:
            dtype = linear.variance_dtype(weight.values.dtype)
            variance = jnp.exp(weight.log_sigma2.astype(dtype))
        scaled = tuple(
            scales.Scale(
                scale.location.reshape(-1),
                scale.log_sigma2.reshape(-1),
                scale.family,
                spread,
                scale.group,
            )
            for scale, spread in zip(weight.scales, _spreads(weight), strict=True)
            if spread is not None  # or the weight would be drawn
        )
        return randomness.Random(weight.values, variance, frozenset([weight.path]), scaled)

    arguments = _leaves(tree.collapse(params, argument))
    results = randomness.evaluate(program, keys, *arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def evaluate(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, its convolutions by the fastest way for this backend.

    Args:
      function: pure, of arrays.
      *arguments: trees of arrays.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    keys = randomness.Keys(jax.random.key(0))  # nothing is random
    results = randomness.evaluate(program, keys, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def sample(params: PyTree, key: jax.Array, where: tree.Where = None) -> PyTree:
    """One draw of the weights themselves, for all examples and all uses.

    Its gradients are noisier than those of local reparameterisation (section 4.1 of the paper);
    for weights that are not used in linear operations alone, there is nothing else. For several
    draws, ``jax.vmap`` over keys.

    Args:
      params: a variational tree.
      key: for the noise.
      where: which weights: as for :func:`svd_jax.variational`.

    Returns:
      The tree with ``kernel + exp(log_sigma2 / 2) * noise`` in the place of each chosen weight,
      times a draw of each of its scales, and without its ``log_sigma2`` and its ``groups``.

    Raises:
      ValueError: nothing is variational.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> params = {'kernel': jnp.ones((3, 2)), 'log_sigma2': jnp.zeros((3, 2))}
      >>> jax.tree.map(jnp.shape, svd.sample(params, jax.random.key(0)))
      {'kernel': (3, 2)}
    """

    return tree.collapse(params, lambda weight: _draw(weight, key), where)


def _leaves(arguments: PyTree) -> list[Any]:
    ours = (randomness.Mark, randomness.Random)
    return jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, ours))


def _masked(weight: Weight, limit: Callable[[str], Number]) -> Weight:
    """The weight with the means of what will be dropped at zero."""
    values = weight.values
    if weight.log_sigma2 is not None:
        values = masked(values, weight.log_sigma2, limit(weight.path))
    return weight._replace(values=values, scales=tuple(
        # That of a log-normal is never zero.
        scale._replace(location=scale.masked(limit(scale.path)))
        if scale.family is posterior.NORMAL else scale
        for scale in weight.scales
    ))  # fmt: skip


def _draw(weight: Weight, key: jax.Array) -> jax.Array:
    """One draw of a weight, times one of each of its scales."""
    values = weight.values
    for random in weight.randoms:
        own = LazyRng.create(key, random.path).as_jax_rng()
        draws = noise.standard_normal(own, random.location.shape)
        draw = random.family.drawn(random.location, random.log_sigma2, draws)
        draw = draw.astype(values.dtype)
        values = draw if random.path == weight.path else values * draw
    return values


def _spreads(weight: Weight) -> tuple[scales.Spread | None, ...]:
    """How the scales lie in a weight; None for those that differ along several axes."""
    return tuple(scales.Spread.of(jnp.shape(scale.location)) for scale in weight.scales)


def _drawn(
    used: randomness.Uses, random: randomness.Paths, sampled: tree.Where
) -> randomness.Paths:
    """Which weights to draw, after checking that the others can be local."""
    other = used.other | randomness.united(used.results)
    unused = random - used.linear - other
    if unused:
        raise ValueError(
            f'the model does not use {", ".join(sorted(unused))}: leave it out with '
            'svd.variational(params, where=...), or call the method= that uses it'
        )
    if sampled is None:
        return other
    drawn = frozenset(filter(tree.selector(sampled, sorted(random)), random))
    if other - drawn:
        raise ValueError(
            f'{", ".join(sorted(other - drawn))} is not used in linear operations alone, so its '
            'noise cannot be local: have it drawn with sampled=, or leave it out with '
            'svd.variational(params, where=...)'
        )
    return drawn
