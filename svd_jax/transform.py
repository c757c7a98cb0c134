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

from svd_jax import linear, randomness, tree

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
      ValueError: there is no rng ``'noise'``; nothing is variational; the model doesn't use some
        weight that is; or a weight that ``sampled`` left out cannot be local.

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
    collections = dict(variables)
    params = collections.pop('params')
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
    key: jax.Array,
    *,
    sampled: tree.Where = None,
    threshold: tree.PerPath | None = None,
) -> Any:
    """What a function of parameters returns, with the weights that have a ``log_sigma2`` random.

    Args:
      function: pure; takes ``params`` without ``log_sigma2``.
      params: a variational tree.
      key: for the noise.
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
    dense = tree.collapse(params, lambda path, values, _: values)
    program, shapes = jax.make_jaxpr(function, return_shape=True)(dense)
    marks = tree.collapse(params, lambda path, *_: frozenset([path]))
    paths = [m if isinstance(m, frozenset) else frozenset() for m in _leaves(marks)]
    used = randomness.uses(program, paths, in_loops=sampled is not None)
    drawn = _drawn(used, frozenset().union(*paths), sampled)
    limit = None if threshold is None else tree.per_path(threshold, params, 'threshold')

    def argument(path: str, mean: jax.Array, log_sigma2: jax.Array) -> Any:
        if limit is not None:
            mean = tree.masked(mean, log_sigma2, limit(path))
        if path in drawn:
            return _draw(path, mean, log_sigma2, key)
        dtype = linear.variance_dtype(mean.dtype)
        return randomness.Random(mean, jnp.exp(log_sigma2.astype(dtype)), frozenset([path]))

    arguments = _leaves(tree.collapse(params, argument))
    results = randomness.evaluate(program, randomness.Keys(key), *arguments)
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
      The tree with ``kernel + exp(log_sigma2 / 2) * noise`` in the place of each chosen weight, and
      without its ``log_sigma2``.

    Raises:
      ValueError: nothing is variational.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> params = {'kernel': jnp.ones((3, 2)), 'log_sigma2': jnp.zeros((3, 2))}
      >>> jax.tree.map(jnp.shape, svd.sample(params, jax.random.key(0)))
      {'kernel': (3, 2)}
    """

    def drawn(path: str, values: jax.Array, log_sigma2: jax.Array) -> jax.Array:
        return _draw(path, values, log_sigma2, key)

    return tree.collapse(params, drawn, where)


def _leaves(arguments: PyTree) -> list[Any]:
    ours = (frozenset, randomness.Random)
    return jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, ours))


def _draw(path: str, values: jax.Array, log_sigma2: jax.Array, key: jax.Array) -> jax.Array:
    key = LazyRng.create(key, path).as_jax_rng()
    return linear.draw(values, jnp.exp(log_sigma2.astype(jnp.float32)), key)


def _drawn(
    used: randomness.Uses, random: randomness.Paths, sampled: tree.Where
) -> randomness.Paths:
    """Which weights to draw, after checking that the others can be local."""
    other = used.other.union(*used.results)
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
