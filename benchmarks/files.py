"""Bytes of trained networks as ``.svd`` files, and the errors of what is read from them.

For every run: exact files in float32 and in bfloat16, then coarser and coarser ones, each read
back and evaluated; and what other formats make of the same weights. With a run that held out
training images, the tolerance that ships is chosen on those.

    python -m benchmarks.files --runs runs/lenet300-svd-seed0 runs/lenet5-svd-seed0 \
        --held-out runs/lenet300-held-out --large --out files.json
"""

import dataclasses
import importlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress

import svd_jax as svd
from benchmarks import files_report, formats, large_file, tuning
from benchmarks.files_report import Row, Shown
from experiments import data, models
from experiments.checkpoint import Checkpoints
from experiments.config import Config
from experiments.environment import environment
from experiments.errors import UsageError
from experiments.report import write_json
from experiments.training import Training

NETWORKS: dict[str, type[nn.Module]] = {'lenet300': models.LeNet300, 'lenet5': models.LeNet5}

# A tolerance is fine if the network that is read is worse by no more than this on held-out images.
ERROR_MARGIN = 0.1
"""Percentage points of error."""
LOSS_MARGIN = 0.05
"""Of the loss, as a share of it."""

_EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    runs: tuple[Path, ...] = ()
    """Output folders of experiments, lenet300 or lenet5; of several seeds, the folder of each."""
    held_out: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Output folder of a run with --validation: on its images the tolerance is chosen."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where tensorflow-datasets keeps its data; its own default if not given."""
    tolerances: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    """Of the lossy files, in posterior standard deviations."""
    tune: int = 0
    """Epochs in which the biases of a lossy file are trained again; see benchmarks.tuning."""
    large: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write and read a tree of 25 million weights, 90 % of them zero."""
    pictures: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Draw error against bytes, a picture for every experiment, into this folder."""
    ship: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Write the first run of each experiment at the chosen tolerance, as the package ships it."""
    page: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
    """Put the tables into this page, between its two marks."""
    out: Path | None = None
    """Write what was measured to this file, as JSON."""


class Run(NamedTuple):
    """A network that was trained, folded and its units sorted, and its data.

    Attributes:
      dataset: the images that it was trained on, and those that its files are evaluated on.
      held_out: whether the latter are what it held out of the training images, not the test set.
    """

    experiment: str
    config: Config
    dataset: data.Dataset
    held_out: bool
    params: Any
    epoch: int

    @property
    def label(self) -> str:
        """Which run of its experiment: the seed, and every option that is not the default."""
        told = {'seed', 'validation'}
        parts = [f'seed {self.config.seed}']
        parts += [
            f'{name.replace("_", " ")} {" ".join(map(str, value))}'
            for name, value in _options(self).items()
            if name not in told
        ]
        if self.config.validation:
            parts.append(f'{self.config.validation:,} held out')
        if self.epoch < self.config.total_epochs:
            parts.append(f'epoch {self.epoch}')
        return ', '.join(parts)

    def __str__(self) -> str:
        return f'{self.experiment}, {self.label}'


def _options(run: Run) -> dict[str, list[Any]]:
    """The options of a run that are not its experiment's defaults."""
    defaults = importlib.import_module(f'experiments.{run.experiment}').DEFAULTS.identity()
    return {
        name: value if isinstance(value, list) else [value]
        for name, value in run.config.identity().items()
        if value != defaults[name]
    }


def read_run(folder: Path, data_dir: Path | None, held_out: bool = False) -> Run:
    """Reads the last checkpoint of a run.

    Args:
      folder: its output folder.
      data_dir: as for the experiments.
      held_out: evaluate on what it held out of the training images, not on the test set.

    Raises:
      UsageError: the folder holds no run by Sparse Variational Dropout of a network known here, or
        it held nothing out.
    """
    try:
        facts = json.loads((folder / 'run.json').read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f'{folder} holds no run ({error}): pass an output folder') from error
    experiment, fields = facts['experiment'], {field.name for field in dataclasses.fields(Config)}
    if experiment not in NETWORKS or facts['method'] != 'svd' or facts['seeds'] > 1:
        raise UsageError(
            f'{folder} must be of one network, {" or ".join(NETWORKS)}, trained with --method svd; '
            'of several, each has a folder inside'
        )
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in fields
    }
    config = Config(**options)
    if held_out and not config.validation:
        raise UsageError(f'{folder} held nothing out: train it with --validation')
    dataset = data.load(config.dataset, data_dir)
    if config.validation:
        split = data.validation_split(dataset, config.validation)
        dataset = split if held_out else split._replace(
            test_images=dataset.test_images, test_labels=dataset.test_labels
        )  # fmt: skip
    like = Training(NETWORKS[experiment], config, dataset).init()
    checkpoints = Checkpoints(folder / 'checkpoints', experiment, 'train it again', print)
    found = checkpoints.restore(like)
    if found is None:
        raise UsageError(f'{folder} holds no checkpoint: pass a run that has saved one')
    state, saved = found
    params, image = state.params, np.zeros((1, *dataset.test_images.shape[1:]), np.float32)
    for prepare in (svd.fold, svd.sort_units):
        params = prepare(
            NETWORKS[experiment](), params, image,
            threshold=config.threshold, deterministic=True,
        )  # fmt: skip
    return Run(experiment, config, dataset, held_out, jax.device_get(params), saved['epoch'])


def evaluate(
    experiment: str, params: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Error in percent and cross-entropy in nats of the plain network, on images as it takes them.

    Args:
      experiment: whose network it is.
      params: its parameters, without a posterior.
      images: float32, (N, 28, 28, 1), preprocessed.
      labels: (N,).
    """
    totals = np.zeros(2)
    for start in range(0, len(labels), _EVALUATION_BATCH):
        part = slice(start, start + _EVALUATION_BATCH)
        totals += jax.device_get(_totals(experiment, params, images[part], labels[part]))
    return 100 * totals[0] / len(labels), totals[1] / len(labels)


@partial(jax.jit, static_argnums=0)
def _totals(experiment: str, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits, _ = NETWORKS[experiment]().apply({'params': params}, images, True)
    wrong = jnp.argmax(logits, -1) != labels
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([jnp.sum(wrong), jnp.sum(nats)])


def _save(run: Run, tolerance: float, tune: int, path: Path) -> int:
    """Writes a lossy file, with biases that were trained again; returns its bytes."""
    size = svd.save(path, run.params, tolerance=tolerance, threshold=run.config.threshold)
    if not tune:
        return size
    rounded, model = svd.load(path), NETWORKS[run.experiment]()
    tuned = tuning.tune_biases(model, rounded, run.dataset, tune, run.config.shift)
    params = {name: layer | tuned[name] for name, layer in run.params.items()}
    return svd.save(path, params, tolerance=tolerance, threshold=run.config.threshold)


def measure(
    run: Run, tolerances: tuple[float, ...], tune: int = 0, advance: Any = lambda: None
) -> list[Row]:
    """Writes a network to files, from exact to coarse, reads each again and evaluates it.

    Args:
      run: the network.
      tolerances: of the lossy files.
      tune: epochs in which the biases of the lossy ones are trained again.
      advance: called after each file.
    """
    sparse = jax.device_get(svd.sparsify(run.params, run.config.threshold))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sparse)
    files: list[tuple[str, float | None, Any]] = [
        ('float32, exact', None, sparse),
        ('bfloat16, exact', None, half),
        *((f'tolerance {t:g}', t, None) for t in tolerances),
    ]
    mean = data.mean_image(run.dataset.train_images)
    test, train = (
        (data.preprocess(images, mean), labels)
        for images, labels in (
            (run.dataset.test_images, run.dataset.test_labels),
            (run.dataset.train_images, run.dataset.train_labels),
        )
    )
    kept, rows = svd.sparsity(sparse).nonzero, []
    with tempfile.TemporaryDirectory() as folder:
        for name, tolerance, params in files:
            path = Path(folder) / 'network.svd'
            if tolerance is None:
                size = svd.save(path, params)
            else:
                size = _save(run, tolerance, tune, path)
            loaded = svd.load(path)
            (test_error, test_loss), (_, train_loss) = (
                evaluate(run.experiment, loaded, *examples) for examples in (test, train)
            )
            rows.append(
                {
                    'file': name, 'tolerance': tolerance, 'bytes': size,
                    'bits_per_kept_weight': 8 * size / kept,
                    'nonzero': svd.sparsity(loaded).nonzero,
                    'test_error': test_error, 'test_loss': test_loss, 'train_loss': train_loss,
                }
            )  # fmt: skip
            advance()
    return rows


def choose_tolerance(rows: list[Row]) -> float:
    """The largest tolerance up to which all are within the margins of the exact file.

    Args:
      rows: as from :func:`measure`, of a run whose test images were held out of training.

    Raises:
      UsageError: there is none.
    """
    exact = next(row for row in rows if row['file'] == 'float32, exact')
    chosen = None
    for row in sorted((row for row in rows if row['tolerance']), key=lambda row: row['tolerance']):
        error = row['test_error'] - exact['test_error']
        loss = row['test_loss'] / exact['test_loss'] - 1
        if error > ERROR_MARGIN + 1e-9 or loss > LOSS_MARGIN:
            break
        chosen = row['tolerance']
    if chosen is None:
        raise UsageError('no tolerance is fine on the held-out images: add smaller --tolerances')
    return chosen


# What ships


def ship(run: Run, tolerance: float, tune: int, folder: Path) -> Row:
    """Writes a network into a folder, and evaluates what was written.

    Raises:
      UsageError: the run is not finished.
    """
    if run.epoch < run.config.total_epochs:
        raise UsageError(f'{run} is not finished: only the last epoch ships')
    path = folder / f'{run.experiment}.svd'
    size = _save(run, tolerance, tune, path)
    mean = np.rint(255 * data.mean_image(run.dataset.train_images)).astype(np.uint8)
    svd.save(folder / 'mean_image.svd', mean)
    images = data.preprocess(run.dataset.test_images, mean.astype(np.float32) / 255)
    loaded = svd.load(path)
    error, _ = evaluate(run.experiment, loaded, images, run.dataset.test_labels)
    return {
        'experiment': run.experiment, 'command': command(run), 'tolerance': tolerance,
        'bytes': size, 'nonzero': svd.sparsity(loaded).nonzero, 'test_error': error,
    }  # fmt: skip


def command(run: Run) -> str:
    """The command that trains this network again."""
    words = [f'python -m experiments.{run.experiment} --dataset {run.dataset.name}']
    words.append(f'--seed {run.config.seed}')
    for name, values in _options(run).items():
        option = name.replace('_', '-')
        if name == 'seed':
            continue
        if isinstance(values[0], bool):
            words.append(f'--{option}' if values[0] else f'--no-{option}')
        else:
            words.append(f'--{option} {" ".join(map(str, values))}')
    return ' '.join(words)


_README = """\
# Pretrained networks

MNIST, by Sparse Variational Dropout; `svd_jax.load_pretrained(name)` reads them.

| name | network | bytes | nonzero weights | test error % | trained by |
|---|---|---|---|---|---|
{table}

- Bytes are those of the whole file, biases included.
- The first seed, the last epoch: neither was picked. The test error is that of the network as it
  is read from its file, on the 10,000 test images, prepared as below.
- The tolerance, {tolerance:g} posterior standard deviations, was chosen on a network of its own,
  `{held_out}`,
  by the training images that it had not seen: the largest one up to which their error rises by at
  most {error:g} percentage points over that of the exact file, and their loss by at most {loss}.
  All networks have this one tolerance; the test set played no part.
- Before it was written each network was folded (`svd_jax.fold`) and its units were put in order
  (`svd_jax.sort_units`); once its weights were rounded, its biases were trained again on the
  training images (`--tune {tune}`, epochs).
- Inputs are images scaled to [0, 1] minus the mean of the 60,000 training images. It is in
  `mean_image.svd`, rounded to whole grey levels; `svd_jax.pretrained.preprocess(images)` subtracts
  it from the digits as MNIST has them, uint8, 0 to 255.

All files here are written by

    python -m benchmarks.files --runs DIR ... --held-out DIR --tune {tune} \\
        --ship svd_jax/pretrained_files
"""


def _readme(shipped: list[Row], held_out: Run, tune: int) -> str:
    table = (
        f'| `{row["experiment"]}` | {files_report.TITLES[row["experiment"]]} | {row["bytes"]:,} '
        f'| {row["nonzero"]:,} | {row["test_error"]:.2f} | `{row["command"]}` |'
        for row in shipped
    )
    return _README.format(
        table='\n'.join(table), tolerance=shipped[0]['tolerance'], held_out=command(held_out),
        error=ERROR_MARGIN, loss=f'{100 * LOSS_MARGIN:g} %', tune=tune,
    )  # fmt: skip


def main(options: Options) -> None:
    """Measures, prints and writes what the options ask for.

    Raises:
      UsageError: the options, or a run that they name, cannot be used.
    """
    if options.ship and not options.held_out:
        raise UsageError('--ship needs a tolerance: pass --held-out, a run to choose it on')
    console = Console(highlight=False)
    runs = [read_run(folder, options.data_dir) for folder in options.runs]
    held_out = options.held_out and read_run(options.held_out, options.data_dir, held_out=True)
    facts: dict[str, Any] = {'tune': options.tune, 'runs': []}
    tables: list[Shown] = []

    def show(table: Shown) -> None:
        tables.append(table)
        console.print(table.table())

    def curve(run: Run) -> list[Row]:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(str(run), total=2 + len(options.tolerances))
            advance = partial(progress.advance, task)
            rows = measure(run, options.tolerances, options.tune, advance)
        counts = svd.sparsity(run.params, run.config.threshold)
        title = f'{run}: {counts.nonzero:,} of {counts.total:,} weights kept'
        show(files_report.curve(title, 'held-out' if run.held_out else 'test', rows))
        return rows

    if held_out:
        rows = curve(held_out)
        facts['held_out'] = {'files': rows, 'chosen': choose_tolerance(rows)}
        console.print(f'chosen on the held-out images: {facts["held_out"]["chosen"]:g}')
    first = {run.experiment: run for run in reversed(runs)}
    for run in runs:
        rows = curve(run)
        found: dict[str, Any] = {'run': str(run), 'files': rows}
        if run is first[run.experiment]:
            others = formats.sizes(svd.sparsify(run.params, run.config.threshold))
            show(files_report.by_format(f'{run}: the same weights by others', others, rows))
            found['others'] = others
        facts['runs'].append(found)
    if options.pictures:
        for experiment in first:
            curves = {
                run.label: found['files']
                for run, found in zip(runs, facts['runs'], strict=True)
                if run.experiment == experiment
            }
            files_report.picture(experiment, curves, options.pictures / f'bytes_{experiment}.png')
    if options.ship and held_out:
        shipped = [
            ship(first[name], facts['held_out']['chosen'], options.tune, options.ship)
            for name in sorted(first)
        ]
        (options.ship / 'README.md').write_text(_readme(shipped, held_out, options.tune))
        facts['shipped'] = shipped
        show(files_report.shipped(shipped))
    if options.large:
        facts['large'] = large_file.measure()
        show(files_report.large(facts['large']))
    if options.page:
        files_report.replace_tables(options.page, tables)
    if options.out:
        write_json(options.out, {**environment('scipy', 'safetensors', 'zstandard'), **facts})
        console.print(f'written: {options.out}')


if __name__ == '__main__':
    try:
        main(tyro.cli(tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Options), description=__doc__))
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
