"""Writes docs/results.md, and its pictures, from the summaries in experiments/results.

With --check it writes nothing, and fails if the page is not up to date.
"""

import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments import published
from experiments.errors import UsageError
from experiments.pictures import BLUE, GREEN, GREY, ORANGE, PINK, RED
from experiments.summaries import (
    Group,
    Run,
    but_for_seed,
    command,
    defaults_of,
    flags,
    grouped,
    in_order,
    make_run,
    read,
    spread,
    stretches,
    with_options,
)

ROOT = Path(__file__).parents[1]
COMMAND = 'python -m experiments.results'

Summary = dict[str, Any]
Cells = dict[str, str]  # a row of a table, by heading

ERROR, BITS, COMPRESSION = 'error %', 'bits per character', 'weights / nonzero'
TRAINING_ERROR, VALIDATION_BITS = 'training error %', 'validation bits per character'
ZEROS, FROM = 'zeros per layer %', 'source or command'
CONSTANTS = ('k1', 'k2', 'k3')
# Of the narrowest VGG-like network, 100,000 steps of 0.18 and 0.41 s on one core, and evaluation.
DENSE_HOURS, SPARSE_HOURS = 6, 12
# Of a table by number of weights.
COLUMNS = (
    '', 'epochs', 'seeds', TRAINING_ERROR, ERROR, VALIDATION_BITS, BITS, COMPRESSION, ZEROS,
    'training', 'device', FROM,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """From what, and where to."""

    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write nothing; fail if the page is not up to date."""
    results: Annotated[Path, tyro.conf.arg(metavar='DIR')] = ROOT / 'experiments/results'
    """Folder of the summaries."""
    page: Annotated[Path, tyro.conf.arg(metavar='FILE')] = ROOT / 'docs/results.md'
    """The page; its pictures go into the folder pictures beside it."""


class Open(NamedTuple):
    """A run that is still to be made.

    Attributes:
      what: it is.
      options: of its command, in their order.
      needs: what it takes.
    """

    what: str
    options: dict[str, Any]
    needs: str


class Section(NamedTuple):
    """A section of the page.

    Attributes:
      experiment: whose results it shows.
      title: its heading.
      text: what is to be said of it, in Markdown.
      open: runs that it should have.
      dataset: of its runs, where nothing else is said; none if its results are not of runs.
      picture: what the picture of its runs shows; none if it has no picture.
    """

    experiment: str
    title: str
    text: str
    open: list[Open]
    dataset: str | None = None
    picture: str = ''


def _vgg_runs() -> list[Open]:
    """Dense, then Sparse VD from there, by width."""
    found = []
    for dataset, k in itertools.product(('cifar10', 'cifar100'), (0.25, 0.5, 1, 1.5)):
        folder = Path(f'runs/vgg-{dataset}-dense-k{k:g}')
        shared = {'dataset': dataset, 'k': k}
        alone, sparse = (
            f'a GPU, or about {hours} hours on a CPU core' if k == 0.25 else 'a GPU'
            for hours in (DENSE_HOURS, SPARSE_HOURS)
        )
        found += [
            Open(f'dense, k = {k:g}, {dataset}', {**shared, 'method': 'dense', 'out': folder},
                 alone),
            Open(f'Sparse VD, k = {k:g}, {dataset}', {**shared, 'pretrained': folder}, sparse),
        ]  # fmt: skip
    return found


SECTIONS = [
    Section(
        'lenet300', 'LeNet-300-100 on MNIST',
        'A network of 266,200 weights: 784-300-100-10.',
        [
            Open(
                'Sparse VD, the options of `--recipe best`, five seeds',
                {'dataset': 'mnist', 'seeds': 5, 'kl_weight': (2.5,), 'shift': 1, 'fine_tune': 10},
                'a GPU, or about 1.5 hours on two CPU cores',
            ),
        ],
        'mnist', picture='Error against number of weights',
    ),
    Section(
        'lenet5', 'LeNet-5-Caffe on MNIST',
        'A network of 430,500 weights: two convolutions of 20 and 50 filters, 500 units and 10.',
        [
            Open(
                'Sparse VD, five seeds', {'dataset': 'mnist', 'seeds': 5},
                'a GPU, or about 8 hours on two CPU cores',
            ),
        ],
        'mnist', picture='Error against number of weights',
    ),
    Section(
        'lenet500300', 'LeNet-500-300 on MNIST',
        'A network of 545,000 weights, 784-500-300-10, which others have made smaller by whole '
        'units.',
        [], 'mnist',
    ),
    Section(
        'compare', 'Beside other methods',
        'What else makes a network sparse, with the same optimiser, batches and epochs. The '
        'pruning methods get the\nsparsity that Sparse VD chose, of the whole network or of each '
        'layer; the others find one themselves, by the\nweight of their penalty. Iterated pruning '
        'shares the epochs out among its rounds.\nNone of them was tuned here, and neither was '
        'Sparse VD, whose recipe is the one of the paper.\n\n'
        'Gradual pruning: Zhu & Gupta 2018, [arXiv:1710.01878](https://arxiv.org/abs/1710.01878). '
        'Iterated pruning with rewinding:\nFrankle & Carbin 2019, '
        '[arXiv:1803.03635](https://arxiv.org/abs/1803.03635), and Frankle et al. 2020, '
        '[arXiv:1912.05671](https://arxiv.org/abs/1912.05671).\nL0, with a gate for every weight: '
        'Louizos et al. 2018, [arXiv:1712.01312](https://arxiv.org/abs/1712.01312). ARD:\n'
        'Kharitonov et al. 2018, [arXiv:1811.00596](https://arxiv.org/abs/1811.00596).',
        [
            Open(
                title,
                {'dataset': 'mnist', 'network': network, 'seeds': 3,
                 'like': Path(f'experiments/results/{network}-sparse_vd-200epochs-seed0.json')},
                needs,
            )
            for network, title, needs in (
                ('lenet300', 'LeNet-300-100', 'about 3 hours on two CPU cores'),
                ('lenet5', 'LeNet-5-Caffe', 'a GPU'),
            )
        ],
    ),
    Section(
        'vgg', 'VGG-like networks on CIFAR, by width',
        'The paper trains networks of k times 64 to 512 filters, k being 0.25, 0.5, 1 and 1.5: '
        'dense ones with\nbinary dropout, then Sparse VD from there. It shows a plot: no accuracy '
        'to speak of is lost, and wider\nnetworks lose more weights. Here, at a KL weight of 1, '
        'they lose many more, and accuracy with them; at a smaller one,\nless of both.',
        _vgg_runs(), 'cifar10', picture='Error and compression against width',
    ),
    Section(
        'random_labels', 'Random labels',
        'The paper: on labels drawn at random, a network with binary dropout learns them by heart; '
        'Sparse VD drops\nevery weight and predicts a constant. Here dense networks learned nearly '
        'all labels of MNIST, and those of a tenth\nof CIFAR-10; all of CIFAR-10 one had hardly '
        'begun to learn when its epochs were over.',
        [
            Open(
                'dense, MNIST', {'dataset': 'mnist', 'epochs': 200, 'method': 'dense'},
                'ten minutes of a CPU core',
            ),
            Open(
                'Sparse VD, MNIST', {'dataset': 'mnist', 'epochs': 50},
                'a quarter of an hour of a CPU core',
            ),
            Open('dense, CIFAR-10', {'dataset': 'cifar10', 'method': 'dense'}, 'a GPU'),
            Open(
                'Sparse VD, CIFAR-10',
                {'dataset': 'cifar10', 'epochs': 16, 'warmup': (0.0, 2.0), 'log_sigma2_rate': 4.0,
                 'shrink': 1.5},
                'an hour of a CPU core',
            ),
        ],
        'mnist',
    ),
    Section(
        'gradient_variance', 'Additive against multiplicative noise',
        "The paper's figure 2: with additive noise the gradient has a lower variance, and bound "
        'and sparsity are higher.',
        [Open('variance of the gradient, bound and sparsity by epoch', {}, 'two CPU cores')],
    ),
    Section(
        'kl_approximation', 'The approximation of the KL divergence',
        "Equation 14 of the paper has three constants. What the approximation is, and how far off, "
        'is in\n[mathematics.md](mathematics.md#three-kl-divergences).',
        [Open('the constants, fitted again', {}, 'two CPU cores')],
    ),
    Section(
        'char_lm', 'Character language models',
        'Plain Flax models on Tiny Shakespeare, an LSTM where no other is named. The published '
        'ones were trained on\nanother text, Penn Treebank: their bits are no reference for ours, '
        'only what they lost from dense to sparse is\n(Chirkova et al. 2018, '
        '[arXiv:1810.10927](https://arxiv.org/abs/1810.10927)).',
        [],
        'tiny_shakespeare',
    ),
]  # fmt: skip

INTRODUCTION = f"""# Results

What the paper reports, what comes out here, and what others have published, side by side. The paper
is Molchanov, Ashukha & Vetrov 2017, {published.PAPER.markdown()}.
One command writes this page from the summaries in [experiments/results](../experiments/results),
and a test checks that it is up to date:

```bash
{COMMAND}
{COMMAND} --check
```

- **Errors** are those of the sparsified network on the test set after the last epoch: no epoch is
  picked. Of several seeds they are mean ± standard deviation, as is the compression.
- **Weights / nonzero** counts weights alone, no biases. The rate of a code counts positions and
  codebooks too, and bytes are those of a whole file. These are three different things and stand in
  tables of their own.
- **Training** is the time that all seeds of a row took together. Most of these machines were shared
  with other work, so it says how long it took, not how fast it could be.
- **Quoted** numbers were read in a later paper's comparison, not in the paper of the link.
- **Numbers** beside the points of a picture are those of the commands below its table.
- **Open** rows have not been run: their command is what fills them in.

`DIR` is the folder of tensorflow-datasets. How the files of the summaries are named is said
[beside them](../experiments/results/README.md).
"""


# Cells


def mean_sd(values: list[float], digits: int) -> str:
    """Mean and, of several, the standard deviation of a sample."""
    if not values:
        return ''
    mean = f'{np.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {np.std(values, ddof=1):.{digits}f}'


def compression(values: list[float | None]) -> str:
    """Of networks that may have no weight left."""
    some = [value for value in values if value is not None]
    if len(some) < len(values):
        return f'no weight left ({len(values) - len(some)} of {len(values)})'
    return mean_sd(some, 1)


def zeros(group: Group) -> str:
    """Percent of each layer's weights."""
    layers = group.values('sparsity_per_layer')
    if not layers or group.first.config.method == 'dense':
        return ''
    return '-'.join(
        f'{np.mean([each[name] for each in layers]):.1f}' for name in in_order(layers[0])
    )


def seeds(found: Iterable[int]) -> str:
    """How many, and which."""
    found = sorted(found)
    parts = [f'{a}' if n == 1 else f'{a} to {a + n - 1}' for a, n in stretches(found)]
    return f'{len(found)} ({", ".join(parts)})'


def duration(seconds: float) -> str:
    return f'{seconds / 3600:.1f} h' if seconds >= 3600 else f'{seconds / 60:.0f} min'


def device(name: str) -> str:
    platform, _, kind = name.partition(': ')
    return 'CPU' if platform == 'cpu' else kind


def label(group: Group, dataset: str | None) -> str:
    """What a row is of, as far as no other column says it."""
    run = group.first
    on = run.summary.get('evaluated_on', 'test')
    parts = (
        f'**svd_jax, {run.method}**',
        group.options and f'`{group.options}`',
        run.config.dataset if run.config.dataset != dataset else '',
        f'errors on {on}' if not on.startswith('test') else '',
        run.earlier,
    )
    return ', '.join(part for part in parts if part)


def measured(group: Group, dataset: str | None) -> Cells:
    """The row of runs of ours."""
    return {
        '': label(group, dataset),
        'epochs': str(group.first.config.epochs),
        'seeds': seeds(group.seeds),
        TRAINING_ERROR: mean_sd(group.values('train_error'), 2),
        ERROR: mean_sd(group.values('test_error'), 2),
        VALIDATION_BITS: mean_sd(group.values('validation_bits_per_character'), 3),
        BITS: mean_sd(group.values('bits_per_character'), 3),
        COMPRESSION: compression(group.values('compression')),
        ZEROS: zeros(group),
        'training': duration(group.seconds()),
        'device': ', '.join(sorted({device(name) for name in group.values('device')})),
    }


def reported(found: published.Weights) -> Cells:
    """The row of a published network."""
    return {
        '': found.method,
        'epochs': '' if found.epochs is None else str(found.epochs),
        ERROR: '' if found.error is None else f'{found.error:.2f}',
        BITS: '' if found.bits is None else f'{found.bits:.3f}',
        COMPRESSION: f'{found.compression:g}',
        ZEROS: found.zeros,
        FROM: found.source.markdown(),
    }


def planned(one: Open) -> Cells:
    """The row of a run that is still to be made."""
    first, count = one.options.get('seed', 0), one.options.get('seeds', 1)
    return {
        '': f'**svd_jax, {one.what}**',
        'seeds': seeds(range(first, first + count)),
        COMPRESSION: '**open**',
        'training': f'needs {one.needs}',
    }


# Tables


def table(rows: list[Cells], columns: Iterable[str] = ()) -> str:
    """A Markdown table, without the columns that would be empty.

    Args:
      rows: of cells, by column.
      columns: in their order; if none are given, as they come in the rows.
    """
    if not rows:
        return ''
    columns = list(columns) or dict.fromkeys(itertools.chain.from_iterable(rows))
    shown = [name for name in columns if any(row.get(name) for row in rows)]
    lines = [[name or ' ' for name in shown], ['---', *('---:' for _ in shown[1:])]]
    lines += [[row.get(name, '') for name in shown] for row in rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def code(commands: list[str]) -> str:
    """Commands, numbered as in the table above them."""
    width = max(map(len, commands))
    lines = [f'{line:{width}}  # {number}' for number, line in enumerate(commands, 1)]
    return '\n'.join(['```bash', *lines, '```'])


def still_open(section: Section, runs: list[Run]) -> list[Open]:
    """What of a section has not been run."""
    defaults = defaults_of(section.experiment)
    if defaults is None:
        return section.open
    done = {(but_for_seed(run.config), run.config.seed) for run in runs if not run.earlier}

    def is_done(one: Open) -> bool:
        where = f'the open run {one.what!r} of experiments.{section.experiment}'
        config = with_options(defaults, one.options, where)
        return all((but_for_seed(own), own.seed) in done for own in config.alone().values())

    return [one for one in section.open if not is_done(one)]


def weights_table(section: Section, runs: list[Run]) -> str:
    """The paper's networks, ours and those of others, and the commands that made ours."""
    others = published.WEIGHTS.get(section.experiment, [])
    papers = [reported(one) for one in others if one.source == published.PAPER]
    peers = [reported(one) for one in others if one.source != published.PAPER]
    ours = [
        *made(section, runs),
        *(
            (planned(one), [command(section.experiment, one.options)])
            for one in still_open(section, runs)
        ),
    ]
    return with_commands(ours, papers, peers)


def made(section: Section, runs: list[Run]) -> list[tuple[Cells, list[str]]]:
    """Rows of runs, with the commands that made them."""
    starts = {run.config.pretrained for run in runs}
    return [(measured(group, section.dataset), group.commands(starts)) for group in grouped(runs)]


def with_commands(
    ours: list[tuple[Cells, list[str]]], before: Iterable[Cells] = (), after: Iterable[Cells] = ()
) -> str:
    """A table of our rows between others, and their commands by number."""
    commands: list[str] = []
    for row, made_by in ours:
        numbers = range(len(commands) + 1, len(commands) + len(made_by) + 1)
        row[FROM] = ', '.join(map(str, numbers))
        commands += made_by
    shown = table([*before, *(row for row, _ in ours), *after], COLUMNS)
    return f'{shown}\n\n{code(commands)}' if commands else shown


def rates_table(experiment: str) -> str:
    return table([
        {'': rate.method, ERROR: f'{rate.error:.2f}', 'dense bits / coded bits': f'{rate.rate:g}',
         FROM: rate.source.markdown()}
        for rate in published.RATES.get(experiment, [])
    ])  # fmt: skip


def files_table(section: Section, runs: list[Run]) -> str:
    """Bytes of whole files; ours are exact ones, as their runs wrote them."""
    ours = [
        {'': f'{label(group, section.dataset)}, exact', 'epochs': str(group.first.config.epochs),
         'seeds': seeds(group.seeds), ERROR: mean_sd(group.values('test_error'), 2),
         BITS: mean_sd(group.values('bits_per_character'), 3),
         'bytes': f'{np.mean(group.values("file_bytes")):,.0f}'}
        for group in grouped(runs) if len(group.values('file_bytes')) == len(group.runs)
    ]  # fmt: skip
    peers = [
        {'': found.method, ERROR: f'{found.error:.2f}', 'bytes': f'{found.nbytes:,}',
         FROM: found.source.markdown()}
        for found in published.FILES.get(section.experiment, [])
    ]  # fmt: skip
    return table([*ours, *peers])


def units_left(group: Group) -> str:
    """Of every group of units, averaged over seeds, in the order of the layers."""
    each = group.values('units')
    return '-'.join(
        f'{np.mean([units[name][0] for units in each]):.0f}' for name in in_order(each[0])
    )


def units_rows(section: Section, runs: list[Run]) -> list[Cells]:
    """Ours, once their arrays are made smaller."""
    return [
        {'': label(group, section.dataset), 'seeds': seeds(group.seeds),
         ERROR: mean_sd(group.values('test_error'), 2),
         BITS: mean_sd(group.values('bits_per_character'), 3), 'units left': units_left(group),
         'times fewer FLOPs': mean_sd([
             run.summary['multiply_adds_dense'] / run.summary['multiply_adds'] for run in group.runs
         ], 1),
         'multiply-adds left': f'{np.mean(group.values("multiply_adds")):,.0f}'}
        for group in grouped(runs) if len(group.values('multiply_adds')) == len(group.runs)
    ]  # fmt: skip


def published_units(section: Section) -> list[Cells]:
    return [
        {'': found.method, ERROR: f'{found.error:.2f}', 'units left': found.left,
         'times fewer FLOPs': found.fewer, 'multiply-adds left': found.operations,
         'times faster, CPU': found.cpu, 'times faster, GPU': found.gpu,
         FROM: found.source.markdown()}
        for found in published.UNITS.get(section.experiment, [])
    ]  # fmt: skip


def noise_table(section: Section, summaries: list[Summary]) -> str:
    """Bound and sparsity in the end, and where the variance of the gradient is lower."""
    if not summaries:
        return table(
            [{'': one.what, 'seeds': f'**open**, needs {one.needs}'} for one in section.open]
        )
    rows = []
    for summary in summaries:
        found = summary['findings']['gradient_variance']
        lower = ', '.join(
            f'{own["additive_lower"]} of {own["bins_above_0"]} ({drawn} drawn)'
            for drawn, own in found.items()
        )
        for name, networks in summary['by_epoch'].items():
            last = [own[-1] for own in networks.values()]
            rows.append({
                '': f'**{name}**', 'epochs': str(summary['epochs']), 'seeds': str(len(last)),
                'bound, nats per image': mean_sd([row['bound'] for row in last], 3),
                'zeros %': mean_sd([row['sparsity'] for row in last], 1),
                ERROR: mean_sd([row['test_error'] for row in last], 2),
                'bins of log alpha above 0 with the lower variance': lower * (name == 'additive'),
            })  # fmt: skip
    return table(rows)


def constants_table(summaries: list[Summary]) -> str:
    """The constants of the paper's approximation of the KL divergence, and those fitted here."""

    def row(values: Iterable[float]) -> dict[str, str]:
        return dict(zip(CONSTANTS, (f'{value:.5f}' for value in values), strict=True))

    fitted = {'the paper': row(published.KL_CONSTANTS)}
    for summary in summaries:
        fitted["the authors' notebook"] = row(summary['constants_of_the_notebook'])
        fitted['**svd_jax**'] = row(summary['constants'])
    fitted.setdefault('**svd_jax**', {'k1': '**open**'})
    return table([{'': name, **constants} for name, constants in fitted.items()])


def errors_table(summary: Summary) -> str:
    """The largest error of each approximation of the KL divergence."""
    from experiments.kl_approximation import LABELS

    return table([
        {'': LABELS.get(name, name), 'largest error': f'{worst["error"]:.2g}',
         'at log alpha': f'{worst["log_alpha"]:.2f}',
         'largest for alpha up to 1': f'{summary["errors_to_alpha_1"][name]["error"]:.2g}'}
        for name, worst in summary['errors'].items()
    ])  # fmt: skip


# The page


def tested(runs: list[Run]) -> list[Run]:
    """Those whose errors are on the test set."""
    return [run for run in runs if not run.config.validation]


def body(section: Section, summaries: list[tuple[Path, Summary]]) -> Iterator[str]:
    """The parts of a section."""
    name = section.experiment
    yield f'## {section.title}'
    yield section.text
    if importlib.util.find_spec(f'experiments.{name}') is None:
        yield f'`experiments.{name}` is still to be written; these are to be its commands.'
    if section.dataset is None:
        yield from study(section, [summary for _, summary in summaries])
        return
    runs = [make_run(*pair) for pair in summaries]
    if section.picture and drawn(runs):
        yield f'![{section.picture}: {section.title}](pictures/results_{name}.png)'
    yield weights_table(section, tested(runs))
    yield from on_held_out(section, [run for run in runs if run.config.validation])
    if name in published.RATES:
        yield '### By rate, in the format of Deep Compression'
        yield rates_table(name)
    if name in published.FILES:
        yield '### By bytes of the file'
        yield files_table(section, tested(runs))
        if name.startswith('lenet'):
            yield 'Ours by bytes, from exact to coarse files: [files.md](files.md).'
    rows = [*units_rows(section, tested(runs)), *published_units(section)]
    if rows:
        yield '### By whole units'
        text = (
            'What is left, layer by layer. How ours are trained is in [units.md](units.md), how '
            'fast sparse networks are in\n[inference.md](inference.md).'
        )
        if name in published.UNITS:
            text += (
                ' The code of Structured Bayesian Pruning keeps the checkpoint of best test '
                'accuracy: its\nerrors are optimistic.'
            )
        yield text
        yield table(rows)


def on_held_out(section: Section, runs: list[Run]) -> Iterator[str]:
    """What was compared without the test set."""
    if not runs:
        return
    yield '### What was compared to choose'
    yield (
        'On training images that were held out, so that options need not be chosen by errors on '
        'the test set.'
    )
    yield with_commands(made(section, runs))
    units = units_rows(section, runs)
    if units:
        yield table(units)
    options = worth_rows(runs)
    if options:
        yield '### What one more option is worth'
        yield (
            'Of the networks above, those that differ in one option alone: error and compression '
            'without and with it.'
        )
        yield table(options)


def worth_rows(runs: list[Run]) -> list[Cells]:
    """Pairs of Sparse VD networks of which one has one option more, or trained longer."""
    sparse = [group for group in grouped(runs) if group.first.config.method == 'svd']
    rows = []
    for without, with_it in itertools.permutations(sparse, 2):
        added = option_between(without, with_it)
        if not added:
            continue
        shown = {
            heading: ' → '.join(show(group.values(field)) for group in (without, with_it))
            for heading, field, show in (
                (ERROR, 'test_error', lambda values: mean_sd(values, 2)),
                (COMPRESSION, 'compression', compression),
            )
        }
        few = without.changed_but('validation')
        rows.append({
            'option': f'`{" ".join(flags(added))}`',
            'beside': f'`{" ".join(flags(few))}`' if few else "the paper's recipe",
            'epochs': str(without.first.config.epochs), 'seeds': seeds(with_it.seeds), **shown,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row['option'], -int(row['epochs']), row['beside']))


def option_between(without: Group, with_it: Group) -> dict[str, Any]:
    """The only option in which the second differs from the first, by name; {} if there is none."""
    first, second = without.first.config, with_it.first.config
    if (first.validation, without.seeds) != (second.validation, with_it.seeds):
        return {}
    few, more = (group.changed_but('validation') for group in (without, with_it))
    if first.epochs != second.epochs:
        longer = few == more and first.epochs < second.epochs
        return {'epochs': second.epochs} if longer else {}
    one_more = len(more) == len(few) + 1 and few.items() <= more.items()
    return {name: value for name, value in more.items() if name not in few} if one_more else {}


def study(section: Section, summaries: list[Summary]) -> Iterator[str]:
    """The parts of a section whose results are not of runs."""
    if section.experiment == 'kl_approximation':
        yield constants_table(summaries)
        if summaries:
            yield f'![{section.title}](pictures/{section.experiment}.png)'
        yield from map(errors_table, summaries)
    elif section.experiment == 'compare':
        yield from comparison(section, summaries)
        return
    else:
        yield noise_table(section, summaries)
        if summaries:
            yield f'![{section.title}](pictures/{section.experiment}.png)'
    yield code([command(section.experiment, {})])


def comparison(section: Section, summaries: list[Summary]) -> Iterator[str]:
    """Tables of all methods, a picture, and the commands that make them."""
    for summary in summaries:
        network = summary['network']
        yield f'### {network}, {summary["epochs"]} epochs, {summary["dataset"]}'
        yield methods_table(summary)
    if summaries:
        yield f'![{section.title}](pictures/results_compare.png)'
    made = {summary['network'] for summary in summaries}
    still = [one for one in section.open if one.options['network'] not in made]
    if still:
        yield table([
            {'': f'**svd_jax, {one.what}**', 'seeds': seeds(range(one.options['seeds'])),
             ERROR: '**open**', 'training': f'needs {one.needs}'}
            for one in still
        ])  # fmt: skip
    # A list in JSON is a tuple among options.
    options = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in summary['options'].items()}
        for summary in summaries
    ]
    yield code([command('compare', own) for own in [*options, *(one.options for one in still)]])


def methods_table(summary: Summary) -> str:
    """The methods of a comparison, each from little to much compression."""
    from experiments.compare import LABELS, points

    return table([
        {'': LABELS[point.method], 'setting': point.setting, 'seeds': seeds(point.values('seed')),
         ERROR: mean_sd(point.values('test_error'), 2),
         COMPRESSION: compression(point.values('compression')),
         ZEROS: '-'.join(
             f'{np.mean([layers[name] for layers in point.values("sparsity_per_layer")]):.1f}'
             for name in point.rows[0]['sparsity_per_layer']
         ),
         'training': duration(sum(point.values('train_seconds')))}
        for point in points(summary)
    ])  # fmt: skip


def read_all(folder: Path) -> list[tuple[Path, Summary]]:
    """The summaries of a folder, each with its file."""
    return [(path, read(path)) for path in sorted(folder.glob('*.json'))]


def page(summaries: list[tuple[Path, Summary]]) -> str:
    """The page.

    Raises:
      UsageError: a summary is damaged, or no section shows it.
    """
    known = {section.experiment for section in SECTIONS}
    for path, summary in summaries:
        if summary['experiment'] not in known:
            raise UsageError(
                f'{path}: no section of the page shows {summary["experiment"]!r}: '
                'add one to experiments/results.py'
            )
    parts = [INTRODUCTION.strip()]
    for section in SECTIONS:
        parts += filter(None, body(section, _of(section, summaries)))
    return '\n\n'.join(parts) + '\n'


def _of(section: Section, summaries: list[tuple[Path, Summary]]) -> list[tuple[Path, Summary]]:
    return [pair for pair in summaries if pair[1]['experiment'] == section.experiment]


def drawn(runs: list[Run]) -> list[Group]:
    """What a picture shows: errors on test sets of networks that have a weight left.

    Whole units are not dropped for the sake of the number of weights. Dense networks are shown
    beside sparse ones only, and a width beside another one.
    """
    shown = [
        group for group in grouped(tested(runs))
        if not group.first.earlier
        and group.first.config.groups != 'units'
        and None not in group.values('compression')
    ]  # fmt: skip
    if all(group.first.config.method == 'dense' for group in shown):
        return []
    if shown[0].experiment == 'vgg' and not lines_by_width(shown):
        return []
    return shown


def picture(section: Section, runs: list[Run], path: Path) -> None:
    """Draws the picture of a section."""
    figure = Figure(figsize=(9.5, 4.4), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    if section.experiment == 'vgg':
        by_width(section, drawn(runs), figure)
    else:
        by_weights(section, drawn(runs), first_commands(runs), figure)
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='0.9', linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def first_commands(runs: list[Run]) -> dict[Any, int]:
    """The number that the first command of a group has under the table of the tested runs."""
    groups = grouped(tested(runs))
    numbers = itertools.accumulate((len(group.commands()) for group in groups), initial=1)
    return dict(zip((group.first.key for group in groups), numbers, strict=False))


def width(group: Group) -> float:
    return group.first.summary['config']['k']


def lines_by_width(groups: list[Group]) -> dict[str, list[Group]]:
    """Networks of several widths that have all else in common, narrow ones first, by that."""
    lines: dict[str, list[Group]] = {}
    for group in sorted(groups, key=width):
        config = group.first.config
        parts = (
            config.dataset, group.first.method, f'{config.epochs} epochs',
            group.options_but('k', 'pretrained'),
        )  # fmt: skip
        lines.setdefault(', '.join(part for part in parts if part), []).append(group)
    return {name: line for name, line in lines.items() if width(line[0]) < width(line[-1])}


def by_width(section: Section, groups: list[Group], figure: Figure) -> None:
    """Error, dense beside Sparse VD, and compression, against the factor of all widths."""
    lines = lines_by_width(groups)
    error, ratio = figure.subplots(1, 2)
    widths = sorted({width(group) for line in lines.values() for group in line})
    colours = itertools.cycle((BLUE, ORANGE, GREEN, PINK, RED, GREY))
    for (name, line), colour in zip(lines.items(), colours, strict=False):
        dense = line[0].first.config.method == 'dense'
        look: dict[str, Any] = {'color': colour, 'capsize': 3, 'label': name}
        for axes, field in ((error, 'test_error'), (ratio, 'compression')):
            if dense and axes is ratio:
                continue  # it has all its weights
            values = [group.values(field) for group in line]
            axes.errorbar(
                list(map(width, line)), [np.mean(each) for each in values],
                [spread(each) for each in values], fmt='o--' if dense else 'o-', **look,
            )  # fmt: skip
    for axes, ylabel in ((error, 'test error, %'), (ratio, 'weights / nonzero weights')):
        axes.set_xticks(widths, labels=[f'{k:g}' for k in widths])
        axes.set_xlim(0, 1.1 * widths[-1])
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.set_xlabel('k, the factor of all widths')
        axes.set_ylabel(ylabel)
    error.set_title(section.title, loc='left', fontweight='bold')
    figure.legend(*error.get_legend_handles_labels(), loc='outside lower center', fontsize=8.5,
                  edgecolor='none')  # fmt: skip


def by_weights(
    section: Section, groups: list[Group], numbers: dict[Any, int], figure: Figure
) -> None:
    """Error against compression by number of weights, ours and published ones.

    Ours have the number of their command under the table.
    """
    axes = figure.subplots()
    peers = [
        one for one in published.WEIGHTS[section.experiment]
        if one.error is not None and one.compression > 1
    ]  # fmt: skip
    methods = list(dict.fromkeys(one.method for one in peers))
    look: dict[str, Any] = {'markersize': 9, 'markeredgecolor': 'white'}  # where points overlap
    for method, colour, marker in zip(
        methods, (GREY, ORANGE, GREEN, PINK, RED), 'Xs^vP', strict=True
    ):
        points = [(one.compression, one.error) for one in peers if one.method == method]
        axes.plot(*zip(*points, strict=True), marker, **look, color=colour, label=method)
    ours = 'svd_jax, by its command'
    for group in groups:
        if group.first.config.method == 'dense':
            continue
        xs, ys = group.values('compression'), group.values('test_error')
        x, y = np.mean(xs), np.mean(ys)
        if len(xs) > 1:
            axes.errorbar(x, y, spread(ys), spread(xs), fmt='none', ecolor=BLUE, capsize=3)
        axes.plot(x, y, 'o', **look, color=BLUE, label=ours)
        axes.annotate(
            str(numbers[group.first.key]), (x, y), (5, 4), textcoords='offset points',
            fontsize=8, color=BLUE,
        )  # fmt: skip
        ours = ''  # in the legend once
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(FixedLocator([10, 20, 30, 50, 70, 100, 150, 200, 300, 500]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=10)
    axes.set_title(section.title, loc='left', fontweight='bold')
    axes.set_xlabel('weights / nonzero weights')
    axes.set_ylabel('test error, %')
    figure.legend(loc='outside right upper', fontsize=8.5, edgecolor='none')


def run(options: Options) -> None:
    """Writes the page and its pictures, or checks it.

    Raises:
      UsageError: a summary can't be used; the message names its file.
      SystemExit: the page is not up to date.
    """
    summaries = read_all(options.results)
    text = page(summaries)
    if options.check:
        committed = options.page.read_text('utf-8') if options.page.exists() else ''
        if committed != text:
            print(f'{options.page} is not up to date: run `{COMMAND}`', file=sys.stderr)
            sys.exit(1)
        return
    folder = options.page.parent / 'pictures'
    folder.mkdir(parents=True, exist_ok=True)
    options.page.write_text(text, 'utf-8')
    for section in SECTIONS:
        if section.picture:
            runs = [make_run(*pair) for pair in _of(section, summaries)]
            if drawn(runs):
                picture(section, runs, folder / f'results_{section.experiment}.png')
        compared = [found for _, found in _of(section, summaries)]
        if section.experiment == 'compare' and compared:
            from experiments import compare

            compare.picture(compared, folder / 'results_compare.png')
    print(f'wrote {options.page}')


def main() -> None:
    """The command line: bad input ends with one line on stderr and exit code 2."""
    try:
        run(tyro.cli(Options, prog=COMMAND, description=__doc__))
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
