"""Training: the evidence lower bound, and a jitted step that maximises it.

The negative bound per training example is

    E_q[-log p(y | x, w)] + kl_weight * KL(q(w) || p(w)) / num_data

(equation 3 of the paper, divided by the number of training examples).
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from svd_jax import backend, convention, network, tree

PyTree = Any
Metrics = dict[str, jax.Array]
Schedule = Callable[[jax.Array], jax.Array]
Loss = Callable[[Any, Any], jax.Array | tuple[jax.Array, Metrics]]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: how many steps were taken, int32.
      params: the variational tree.
      opt_state: the optimiser's.
      collections: batch statistics and other mutable collections of the model, by name.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    collections: dict[str, PyTree]

    @classmethod
    def create(cls, variables: PyTree, tx: optax.GradientTransformation) -> 'TrainState':
        """The state before the first step.

        Args:
          variables: what ``model.init`` returns: ``{'params': ..., 'batch_stats': ...}``.
          tx: the optimiser.

        Raises:
          ValueError: there is no collection ``'params'``.
        """
        params, collections = network.split(variables)
        # Copies: steps donate their state, and the caller's own arrays must survive that. Some
        # optimisers begin with the parameters themselves, and no array can be donated twice.
        copies = jax.tree.map(jnp.array, (params, tx.init(params), collections))
        return cls(jnp.zeros((), jnp.int32), *copies)

    @property
    def variables(self) -> dict[str, PyTree]:
        """What ``model.apply`` takes: ``{'params': ..., 'batch_stats': ...}``."""
        return {'params': self.params, **self.collections}


def elbo_loss(
    data_term: jax.Array, kl: jax.Array, num_data: int, kl_weight: float | jax.Array = 1.0
) -> jax.Array:
    """The negative evidence lower bound per training example, which training minimises.

    Args:
      data_term: mean over the batch of the negative log-likelihood, in nats.
      kl: KL divergence of all weights, summed, in nats.
      num_data: the number of examples in the training set (not in the batch).
      kl_weight: 1 for the bound itself; less while warming up.

    Example:
      >>> import svd_jax as svd
      >>> svd.elbo_loss(0.5, 6000.0, num_data=60_000)
      0.6
    """
    return data_term + kl_weight * kl / num_data


def kl_warmup(begin: int, end: int) -> Schedule:
    """KL weight 0 until step ``begin``, then linearly up to 1 at step ``end``.

    Without it, weights are dropped before they have learnt anything (section 5 of the paper, and
    Soenderby et al. 2016).

    Raises:
      ValueError: ``end`` comes before ``begin``, or ``begin`` before 0.

    Example:
      >>> import svd_jax as svd
      >>> [float(svd.kl_warmup(10, 20)(step)) for step in (0, 10, 15, 20, 99)]
      [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if not 0 <= begin <= end:
        raise ValueError(f'kl_warmup needs 0 <= begin <= end, got begin={begin}, end={end}')
    if begin == end:
        return lambda step: jnp.where(step < begin, 0.0, 1.0)
    return optax.linear_schedule(0.0, 1.0, end - begin, begin)


def warmup_epochs(epochs: float) -> tuple[float, float]:
    """The epochs between which the KL weight grows from 0 to 1, for a training of so many.

    Five and twenty, as in the paper's authors' LeNets; a short training needs its share. For
    LeNet-300-100 in 20 epochs, half of them gave 1.90 % at 46 times, three quarters 1.84 % at 36,
    on 5,000 held-out training images.

    Example:
      >>> from svd_jax import train
      >>> train.warmup_epochs(200), train.warmup_epochs(20)
      ((5.0, 20.0), (2.0, 15.0))
    """
    return min(5.0, epochs / 10), min(20.0, 0.75 * epochs)


def kl_warmup_for(
    num_data: int, batch_size: int, epochs: float, between: tuple[float, float] | None = None
) -> Schedule:
    """A :func:`kl_warmup` for a training of so many epochs.

    Args:
      num_data: the number of examples in the training set.
      batch_size: examples per step; those that fill no batch are left out of an epoch.
      epochs: how many there will be in all.
      between: the epochs between which the weight grows from 0 to 1; those of
        :func:`warmup_epochs` if not given.

    Returns:
      The KL weight, a function of the step, for :func:`make_train_step`.

    Raises:
      ValueError: there is no whole batch, or nothing to train for, or ``between`` goes backwards.

    Example:
      >>> import svd_jax as svd
      >>> schedule = svd.kl_warmup_for(num_data=60_000, batch_size=100, epochs=20)
      >>> [float(schedule(600 * epoch)) for epoch in (2, 8.5, 15)]
      [0.0, 0.5, 1.0]
    """
    if not 1 <= batch_size <= num_data:
        raise ValueError(
            f'batch_size must lie between 1 and num_data, got batch_size={batch_size}, '
            f'num_data={num_data}'
        )
    if epochs <= 0:
        raise ValueError(f'epochs must be above 0, got {epochs}')
    begin, end = warmup_epochs(epochs) if between is None else between
    steps = num_data // batch_size
    return kl_warmup(round(begin * steps), round(end * steps))


def classification_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy in nats, and the share of errors; in float32 at least.

    Args:
      logits: (batch, classes).
      labels: (batch,), integers.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {'error': jnp.mean(jnp.argmax(logits, -1) != labels)}


def _reads(jaxpr: Jaxpr) -> set[int]:
    """Which of its inputs a jaxpr reads, by position, looking into nested calls."""
    read = {id(v) for v in jaxpr.outvars}
    for equation in jaxpr.eqns:
        nested = [p for p in equation.params.values() if isinstance(p, (ClosedJaxpr, Jaxpr))]
        called = nested[0] if len(nested) == 1 else None
        called = called.jaxpr if isinstance(called, ClosedJaxpr) else called
        if called is not None and len(called.invars) == len(equation.invars):
            read |= {id(equation.invars[i]) for i in _reads(called)}
        else:
            read |= {id(v) for v in equation.invars}
    return {i for i, v in enumerate(jaxpr.invars) if id(v) in read}


def _unused_log_sigma2(apply: Callable[..., Any], params: PyTree, *args: Any) -> list[str]:
    """Paths of the ``log_sigma2`` leaves that a function of the parameters never reads."""
    read = _reads(jax.make_jaxpr(apply)(params, *args).jaxpr)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for i, (path, _) in enumerate(leaves)
        if getattr(path[-1], 'key', None) == convention.LOG_SIGMA2 and i not in read
    ]


def _mean_over_samples(
    loss: jax.Array, aux: tuple[Metrics, dict[str, PyTree]]
) -> tuple[jax.Array, tuple[Metrics, dict[str, PyTree]]]:
    """Averages over the leading axis; of integers that the model carries, the first stands."""
    metrics, collections = aux
    collections = jax.tree.map(
        lambda x: x.mean(axis=0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0], collections
    )
    return loss.mean(), ({k: v.mean(axis=0) for k, v in metrics.items()}, collections)


def make_train_step(
    apply_fn: Callable[..., Any],
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    num_data: int,
    num_samples: int = 1,
    kl_weight: float | Schedule = 1.0,
    threshold: tree.PerPath = 3.0,
) -> Callable[[TrainState, tuple[Any, Any], jax.Array], tuple[TrainState, Metrics]]:
    """Builds the training step: jitted, vmapped over noise keys, with its state donated.

    Args:
      apply_fn: called as ``apply_fn(variables, inputs, rngs={'noise': key})``, returns
        ``(outputs, kl)``, as the ``apply`` of a model of ``svd.linen`` layers does. If the state
        has mutable collections, also with ``mutable=[names]``, and returns
        ``((outputs, kl), updates)``, as Flax does.
      loss_fn: called as ``loss_fn(outputs, targets)``, returns the negative log-likelihood, which
        is averaged if it is not a scalar, or ``(that, metrics)``;
        for example :func:`classification_loss`.
      tx: any optax optimiser, except those that search along a line (lbfgs).
      num_data: the number of examples in the training set; the KL is divided by it.
      num_samples: draws of the noise per step, over which the loss is averaged.
      kl_weight: a number or a function of the step, such as :func:`kl_warmup_for`.
      threshold: the log_alpha at which the metric ``sparsity`` counts a weight as dropped; a number
        or one for every path, as for :func:`svd_jax.sparsify`.

    Returns:
      ``step(state, (inputs, targets), key) -> (state, metrics)``. The state given is consumed.
      The metrics are scalars: ``loss``, ``data_term``, ``kl``, ``kl_weight``, ``sparsity`` (the
      share of weights that sparsify would drop), ``finite``, and those of ``loss_fn``. Where the
      loss or a gradient is not finite, ``finite`` is false and the state comes back unchanged,
      its step count too.

    Raises:
      ValueError: ``num_data`` or ``num_samples`` is below 1; or, at the first call, ``apply_fn``
        never reads some ``log_sigma2``, whose path the message names, or a metric of ``loss_fn``
        has the name of one of the step.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import svd_jax as svd
      >>> model, tx = svd.linen.Dense(10), optax.adam(1e-3)
      >>> x, y = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)
      >>> state = svd.TrainState.create(model.init(jax.random.key(0), x), tx)
      >>> step = svd.make_train_step(model.apply, svd.classification_loss, tx, num_data=4)
      >>> state, metrics = step(state, (x, y), jax.random.key(1))
      >>> sorted(metrics)
      ['data_term', 'error', 'finite', 'kl', 'kl_weight', 'loss', 'sparsity']
    """
    for name, value in (('num_data', num_data), ('num_samples', num_samples)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    tx = optax.with_extra_args_support(tx)  # some want to know the loss

    def forward(
        params: PyTree, collections: dict[str, PyTree], inputs: Any, key: jax.Array
    ) -> tuple[Any, jax.Array, dict[str, PyTree]]:
        variables, rngs = {'params': params, **collections}, {'noise': key}
        if not collections:
            return *apply_fn(variables, inputs, rngs=rngs), {}
        result, updates = apply_fn(variables, inputs, rngs=rngs, mutable=list(collections))
        return *result, {**collections, **updates}

    def sample_loss(
        params: PyTree, state: TrainState, batch: tuple[Any, Any], key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, PyTree]]]:
        inputs, targets = batch
        outputs, kl, collections = forward(params, state.collections, inputs, key)
        result = loss_fn(outputs, targets)
        data_term, metrics = result if isinstance(result, tuple) else (result, {})
        data_term = jnp.mean(data_term)
        weight = jnp.asarray(kl_weight(state.step) if callable(kl_weight) else kl_weight)
        loss = elbo_loss(data_term, kl, num_data, weight)
        terms = {'loss': loss, 'data_term': data_term, 'kl': kl, 'kl_weight': weight}
        taken = metrics.keys() & {*terms, 'sparsity', 'finite'}
        if taken:
            raise ValueError(
                f'loss_fn has a metric named {min(taken)}, which is one of the step: rename it'
            )
        return loss, ({**terms, **metrics}, collections)

    def mean_loss(
        params: PyTree, state: TrainState, batch: tuple[Any, Any], keys: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, PyTree]]]:
        if num_samples == 1:
            return sample_loss(params, state, batch, keys[0])
        over_keys = jax.vmap(sample_loss, in_axes=(None, None, None, 0))
        return _mean_over_samples(*over_keys(params, state, batch, keys))

    def step(
        state: TrainState, batch: tuple[Any, Any], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        unused = _unused_log_sigma2(forward, state.params, state.collections, batch[0], key)
        if unused:
            raise ValueError(
                f'the model never reads {", ".join(unused)}: use a layer of svd.linen there, or '
                'leave the weight out with svd.variational(params, where=...)'
            )
        keys = jax.random.split(key, num_samples)
        (loss, (metrics, collections)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(
            state.params, state, batch, keys
        )
        finite = jnp.isfinite(loss)
        for gradient in jax.tree.leaves(gradients):
            finite &= jnp.all(jnp.isfinite(gradient))

        def moved(state: TrainState, gradients: PyTree) -> TrainState:
            updates, opt_state = tx.update(gradients, state.opt_state, state.params, value=loss)
            params = optax.apply_updates(state.params, updates)
            return TrainState(state.step + 1, params, opt_state, collections)

        if backend.as_on_cpu():
            kept = lax.cond(finite, moved, lambda state, _: state, state, gradients)
        else:
            kept = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), moved(state, gradients), state
            )
        counts = tree.nonzero(state.params, threshold)
        total = sum(weight.values.size for weight in convention.weights(state.params))
        metrics['sparsity'] = 1 - sum(counts.values()) / total
        metrics['finite'] = finite
        return kept, metrics

    return jax.jit(step, donate_argnums=0)
