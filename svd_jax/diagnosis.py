"""What is left of a network, and what looks wrong with it.

:func:`sparsity` counts, and warns of what the tree alone shows; :func:`diagnose` also judges what
was measured in training. Every warning says what to do about it.
"""

import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from svd_jax import convention, tree

PyTree = Any

# A trained log_sigma2 differs from weight to weight by several units; by less than this, it has
# hardly left its start.
_HARDLY_MOVED = 0.1
# Of weights at a random start, the smallest few percent count as noise already; not so many.
_TOO_NOISY_START = 0.5
_HARDLY_ANY = 0.01
# How much worse the mean weights may do than sampled ones: half as many errors again, and two in a
# hundred on top, for errors that were counted on few examples.
_FACTOR, _MARGIN = 1.5, 0.02
# The KL term may differ from KL / num_data so much: it may be of another step than the tree.
_SLACK = 5.0


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


class Finding(NamedTuple):
    """Something that looks wrong, and what to do about it.

    Attributes:
      name: for programs, such as ``'everything dropped'``.
      text: for people.
      is_note: whether it is to be expected of a tree that is not trained yet.
    """

    name: str
    text: str
    is_note: bool = False

    def __str__(self) -> str:
        return textwrap.fill(
            f'{"note" if self.is_note else "warning"}: {self.text}', 79, subsequent_indent='  '
        )


class Sparsity(NamedTuple):
    """Counts of weights by layer, and overall, with warnings; prints as a table.

    Attributes:
      layers: weights that are left, by layer.
      warnings: of what looks wrong.
      units: that have a weight left, by layer and group: ``'Conv_0 outputs'``.
    """

    layers: dict[str, Counts]
    warnings: tuple[Finding, ...] = ()
    units: Mapping[str, Counts] = MappingProxyType({})

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
        width = max(len('layer'), *map(len, [*self.layers, *self.units]))

        def row(name: str, counts: Counts) -> str:
            return (
                f'{name:{width}}  {counts.nonzero:>9,}  {counts.total:>11,}  '
                f'{counts.percent:>7.2f} %  {counts.compression:>10.1f}x'
            )

        def heading(name: str, left: str) -> str:
            return f'{name:{width}}  {left:>9}  {"of":>11}  {"zeros":>9}  {"compression":>11}'

        first = heading('layer', 'nonzero')
        rule = '-' * len(first)
        rows = [row(*layer) for layer in self.layers.items()]
        table = [first, rule, *rows, rule, row('total', self.overall)]
        if self.units:
            units = [row(*group) for group in self.units.items()]
            table += ['', heading('units', 'left'), rule, *units]
        return '\n'.join([*table, *map(str, self.warnings)])


class Diagnosis(NamedTuple):
    """What looks wrong; prints one finding after the other."""

    findings: tuple[Finding, ...]

    @property
    def names(self) -> list[str]:
        """The names of the findings."""
        return [finding.name for finding in self.findings]

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing but notes."""
        return all(finding.is_note for finding in self.findings)

    def __str__(self) -> str:
        return '\n'.join(map(str, self.findings)) or 'nothing looks wrong'


def sparsity(params: PyTree, threshold: tree.PerPath = 3.0) -> Sparsity:
    """Counts the weights that are left after ``sparsify``, per layer and in total.

    Args:
      params: a variational tree, or one that was sparsified, or a dense one.
      threshold: as for :func:`svd_jax.sparsify`.

    Returns:
      A :class:`Sparsity`, by layer path (``'Conv_0'``; the weight's own name is left out). Its
      ``warnings``, which are printed under the table, are what the tree alone shows to be wrong;
      :func:`diagnose` says which there are.

    Raises:
      ValueError: the tree has no weights, or a pattern of ``threshold`` or a path is not matched.

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
    layers = _layers(params, threshold)
    if not layers:
        raise ValueError(
            f'the tree has no leaf named {" or ".join(convention.WEIGHTS)}: nothing to count'
        )
    counts = {name: Counts(layer.nonzero, layer.total) for name, layer in layers.items()}
    return Sparsity(counts, tuple(_of_the_tree(layers)), _units(params, threshold))


def diagnose(
    params: PyTree,
    threshold: tree.PerPath = 3.0,
    *,
    initial: PyTree | None = None,
    deterministic_error: float | jax.Array | None = None,
    sampled_error: float | jax.Array | None = None,
    metrics: Mapping[str, Any] | None = None,
    num_data: int | None = None,
    weight: tree.PerPath = 1.0,
) -> Diagnosis:
    """Says what looks wrong with a network in or after training, and what to do about it.

    =========================  =====================================================  ============
    finding                    what it means                                          needs
    =========================  =====================================================  ============
    ``not finite``             a weight or a posterior is NaN or infinite             the tree
    ``everything dropped``     a cold start, or far too large a KL term               the tree
    ``dead layer``             no weight of a layer is left                           the tree
    ``noisy start``            ``log_sigma2_init`` hides most weights                 the tree
    ``untrained`` (a note)     ``log_sigma2`` stands at its start                     the tree
    ``stuck``                  ``log_sigma2`` has hardly left it                      the tree
    ``nothing dropped``        it has moved, and fewer than 1 % are dropped           the tree
    ``signal in the variance`` the mean weights do far worse than sampled ones        both errors
    ``KL too heavy``           the KL is not divided by the number of examples        ``metrics``
    ``KL too light``           it is divided twice, or averaged over weights          ``metrics``,
                                                                                      ``num_data``
    ``step skipped``           the last loss or gradient was not finite               ``metrics``
    =========================  =====================================================  ============

    Args:
      params: a variational tree, or one that was sparsified.
      threshold: as for :func:`svd_jax.sparsify`.
      initial: the variational tree before training, by which to tell how far ``log_sigma2`` moved.
        Without it, that it differs from weight to weight is the sign.
      deterministic_error: the share of wrong answers, 0 to 1, of the mean weights
        (``deterministic=True``), on the same examples as
      sampled_error: that of sampled ones (``deterministic=False``).
      metrics: what the training step returned last; of one's own loop, ``'loss'`` and
        ``'data_term'``, the loss without the KL term, and ``'kl_weight'`` if it is not 1.
      num_data: the number of examples in the training set.
      weight: of the KL by layer, if the loss has any, as for :func:`svd_jax.kl`.

    Returns:
      A :class:`Diagnosis`, which prints its findings.

    Raises:
      ValueError: the tree has no weights; one of the errors is given without the other, or not as
        a share; ``metrics`` lack what is needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import svd_jax as svd
      >>> params = svd.variational({'Dense_0': {'kernel': jnp.ones((3, 2))}})
      >>> print(svd.diagnose(params, deterministic_error=0.4, sampled_error=0.02))
      note: not trained yet: log_sigma2 stands at its start. If this is after
        training, the optimiser leaves log_sigma2 out: look for a mask or label in
        it.
      warning: the mean weights are wrong on 40.0 % where sampled ones are wrong on
        2.0 %: the signal is in the variance of the weights that sparsify drops.
        Raise the threshold, make the KL weight smaller or grow later
        (svd.kl_warmup_for), or train with mask_in_training=True.
    """
    layers = _layers(params, threshold, initial)
    if not layers:
        raise ValueError(
            f'the tree has no leaf named {" or ".join(convention.WEIGHTS)}: nothing to diagnose'
        )
    findings = _of_the_tree(layers, initial is not None)
    if (deterministic_error is None) != (sampled_error is None):
        raise ValueError('pass both deterministic_error and sampled_error, of the same examples')
    if deterministic_error is not None and sampled_error is not None:
        findings += _of_errors(float(deterministic_error), float(sampled_error))
    if metrics is not None:
        findings += _of_metrics(params, metrics, num_data, weight)
    return Diagnosis(tuple(findings))


def _units(params: PyTree, threshold: tree.PerPath) -> dict[str, Counts]:
    left = jax.device_get(tree.units(params, threshold))
    return {
        convention.name_of(group): Counts(int(found.sum()), found.size)
        for group, found in left.items()
    }


class _Layer(NamedTuple):
    """What there is to know of a layer's weights.

    Attributes:
      nonzero: how many sparsify leaves.
      total: how many there are.
      broken: how many are not finite, or have a scale or a log_sigma2 that is not.
      zeros: how many are exactly zero, before any is dropped.
      moved: by how much log_sigma2 left its start on average, or else differs from weight to
        weight; None without a posterior.
    """

    nonzero: int
    total: int
    broken: int
    zeros: int
    moved: float | None


def _layers(
    params: PyTree, threshold: tree.PerPath, initial: PyTree | None = None
) -> dict[str, _Layer]:
    """Of every weight, by the path of its layer."""
    starts = (
        {} if initial is None else {w.path: _log_sigma2(w) for w in convention.weights(initial)}
    )
    facts = {
        weight.path: _facts(
            [weight.values, *(scale.location for scale in weight.scales)],
            _log_sigma2(weight),
            starts.get(weight.path),
        )
        for weight in convention.weights(params)
    }
    totals = {w.path: int(np.prod(jnp.shape(w.values))) for w in convention.weights(params)}
    nonzero, facts = jax.device_get((tree.nonzero(params, threshold), facts))
    return {
        path.rpartition('/')[0] or path: _Layer(
            int(nonzero[path]),
            totals[path],
            # What is not finite in log_sigma2 makes its movement so.
            int(broken) + (moved is not None and not np.isfinite(moved)),
            int(zeros),
            None if moved is None else float(moved),
        )
        for path, (broken, zeros, moved) in facts.items()
    }


def _log_sigma2(weight: convention.Weight) -> list[jax.Array]:
    """Of a weight and its scales."""
    return [random.log_sigma2 for random in weight.randoms]


@jax.jit
def _facts(
    means: list[jax.Array],
    log_sigma2: list[jax.Array],
    start: list[jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """How many numbers are not finite, how many weights zero, how far log_sigma2 has moved.

    Args:
      means: of the weight, and of its scales.
      log_sigma2: of what is random of these.
      start: what that was at the start, if it is known.
    """
    broken = jnp.sum(jnp.asarray([jnp.sum(~jnp.isfinite(each)) for each in means]))
    zeros = jnp.sum(means[0] == 0)
    if not log_sigma2:
        return broken, zeros, None
    size = sum(each.size for each in log_sigma2)
    if not size:
        return broken, zeros, jnp.zeros(())
    starts: list[Any] = [None] * len(log_sigma2) if start is None else start
    distances = list(map(_distance, log_sigma2, starts))
    return broken, zeros, jnp.sum(jnp.stack(distances)) / size


def _distance(log_sigma2: jax.Array, start: jax.Array | None) -> jax.Array:
    """The sum over all entries of how far each is from its start."""
    log_sigma2 = log_sigma2.astype(jnp.float32)
    if not log_sigma2.size:
        return jnp.zeros(())
    if start is None:
        # The middle of the range, for a start that was the same for all: where all are the same
        # still, the distance is exactly zero, which that from a rounded mean is not.
        start = 0.5 * (jnp.min(log_sigma2) + jnp.max(log_sigma2))
    return jnp.sum(jnp.abs(log_sigma2 - start))


def _of_the_tree(layers: dict[str, _Layer], start_is_known: bool = False) -> list[Finding]:
    broken = [name for name, layer in layers.items() if layer.broken]
    if broken:
        return [
            Finding(
                'not finite',
                f'{_listed(broken)}: weights, scales or log_sigma2 are NaN or infinite. Go back to '
                'an earlier state, with a smaller learning rate or clipped gradients; '
                'svd.make_train_step skips steps that are not finite.',
            )
        ]
    dead = [name for name, layer in layers.items() if layer.total and not layer.nonzero]
    if dead and len(dead) == sum(layer.total > 0 for layer in layers.values()):
        return [_everything_dropped(all(layers[name].moved == 0 for name in dead))]
    findings = [_dead_layer(name, layers[name]) for name in dead]
    alive = [layer for layer in layers.values() if layer.nonzero and layer.moved is not None]
    if not alive:
        return findings
    total = sum(layer.total for layer in alive)
    share = 1 - sum(layer.nonzero for layer in alive) / total
    moved = sum(layer.total * (layer.moved or 0.0) for layer in alive) / total
    # Of those that are not exactly zero, as many are in a network that was pruned before.
    weights = total - sum(layer.zeros for layer in alive)
    noise = 1 - sum(layer.nonzero for layer in alive) / weights
    start = _of_the_start(noise, moved, start_is_known)
    if start is not None:
        return [*findings, start]
    return findings if dead or share >= _HARDLY_ANY else [_nothing_dropped(share)]


def _everything_dropped(at_start: bool) -> Finding:
    cause = (
        'log_sigma2_init is too high for these weights: start from svd.variational(params), which '
        'has -10'
        if at_start
        else 'A cold start does this, and a KL term that is too large: let the KL weight grow from '
        '0 (svd.kl_warmup_for), start from log_sigma2_init=-10, and divide the KL by the number '
        'of training examples (svd.elbo_loss)'
    )
    return Finding(
        'everything dropped', f"no weight is left: the network's output is constant. {cause}."
    )


def _dead_layer(name: str, layer: _Layer) -> Finding:
    lost = "unless something goes around it, the network's output is constant"
    remedy = (
        'Give it a smaller KL weight (svd.kl(params, weight=...)) or a higher threshold, both by '
        'layer, or a longer warm-up (svd.kl_warmup_for)'
    )
    if layer.zeros == layer.total and layer.moved is not None:
        remedy += (
            '. If its weights, all exactly zero now, were so at the start, that counted as noise: '
            'begin with small random ones'
        )
    return Finding('dead layer', f'no weight of {name} is left: {lost}. {remedy}.')


def _of_the_start(share: float, moved: float, start_is_known: bool) -> Finding | None:
    """Of log_sigma2 where it has not left its start; ``share`` of the weights are noise."""
    if moved == 0 and share >= _TOO_NOISY_START:
        return Finding(
            'noisy start',
            f'{100 * share:.0f} % of the weights count as noise, with log_sigma2 still at '
            'its start. Before training, log_sigma2_init is too high for the size of the weights: '
            'svd.variational(params) has -10. After it, the optimiser leaves log_sigma2 out: look '
            'for a mask or label in it.',
        )
    if moved == 0:
        return Finding(
            'untrained',
            'not trained yet: log_sigma2 stands at its start. If this is after training, the '
            'optimiser leaves log_sigma2 out: look for a mask or label in it.',
            is_note=True,
        )
    if moved < _HARDLY_MOVED:
        how = 'has moved' if start_is_known else 'differs from weight to weight'
        return Finding(
            'stuck',
            f'log_sigma2 {how} by {moved:.2g} on average, and takes several units to drop a '
            'weight. Train for more steps, or raise the learning rate of log_sigma2: under Adam, '
            'steps times learning rate must come to 5 or more.',
        )
    return None


def _nothing_dropped(share: float) -> Finding:
    return Finding(
        'nothing dropped',
        f'{100 * share:.2f} % of the weights are dropped: the KL term does not pull. See that '
        'its weight has grown to 1 and that it is divided by the number of training examples '
        'once; then train for longer, or raise the KL weight above 1.',
    )


def _of_errors(deterministic: float, sampled: float) -> list[Finding]:
    for name, error in (('deterministic_error', deterministic), ('sampled_error', sampled)):
        if not 0 <= error <= 1:
            raise ValueError(f'{name} must be a share, from 0 to 1, got {error}')
    if deterministic <= _FACTOR * sampled + _MARGIN:
        return []
    return [
        Finding(
            'signal in the variance',
            f'the mean weights are wrong on {100 * deterministic:.1f} % where sampled ones are '
            f'wrong on {100 * sampled:.1f} %: the signal is in the variance of the weights that '
            'sparsify drops. Raise the threshold, make the KL weight smaller or grow later '
            '(svd.kl_warmup_for), or train with mask_in_training=True.',
        )
    ]


def _of_metrics(
    params: PyTree, metrics: Mapping[str, Any], num_data: int | None, weight: tree.PerPath
) -> list[Finding]:
    missing = [name for name in ('loss', 'data_term') if name not in metrics]
    if missing:
        raise ValueError(f'metrics lack {" and ".join(missing)}: they hold {", ".join(metrics)}')
    loss, data_term = float(metrics['loss']), float(metrics['data_term'])
    if not metrics.get('finite', True) or not np.isfinite(loss):
        return [
            Finding(
                'step skipped',
                'the loss or a gradient of the last step was not finite. If this goes on, lower '
                'the learning rate, or clip the gradients (optax.clip_by_global_norm).',
            )
        ]
    whole = float(metrics.get('kl_weight', 1.0)) * float(tree.kl(params, weight=weight))
    term, least = loss - data_term, 1e-3 * abs(loss)  # below, rounding is all there is
    # Without num_data, that the KL is divided by next to nothing is plain all the same.
    if term > max(least, _SLACK * whole / (num_data or _SLACK**2)):
        by = f'divided by {whole / term:.3g}'
        return [
            Finding(
                'KL too heavy',
                f'the KL term of the loss is {term:.3g}, beside a data term of {data_term:.3g}: '
                f'the KL is {by}, not by the number of training examples'
                + (f', {num_data:,}' if num_data else '')
                + '. Divide the sum over all weights by it, as svd.elbo_loss does.',
            )
        ]
    if num_data and max(least, term) < whole / num_data / _SLACK:
        return [
            Finding(
                'KL too light',
                f'the KL term of the loss is {term:.3g}, but {whole:.3g} nats over {num_data:,} '
                f'examples are {whole / num_data:.3g}: it is divided twice, or averaged over the '
                'weights. Sum it, and divide once, as svd.elbo_loss does.',
            )
        ]
    return []


def _listed(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
