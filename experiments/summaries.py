"""The summaries of finished runs: read, grouped over seeds, and traced back to their commands."""

import dataclasses
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config import Config
from experiments.errors import UsageError

# Runs of earlier versions, by the end of the file's name: what was different is no option now.
EARLIER = {
    '-eps1e-8': "an earlier version, with Adam's eps at 1e-8",
    '-pulled': 'an earlier version, whose budget only pulled',
    '-unfilled': 'an earlier version, whose budget was not filled',
}

_SEED = re.compile(r'-seed\d+$')
_NUMBER = re.compile(r'(\d+)')
# What a summary must have to be shown.
_FIELDS = ('method', 'dataset', 'config', 'compression', 'train_seconds', 'device')


class Run(NamedTuple):
    """A finished run.

    Attributes:
      path: of its summary.
      summary: what that holds.
      config: its options, those that the summary is older than at their defaults.
    """

    path: Path
    summary: dict[str, Any]
    config: Config

    @property
    def earlier(self) -> str:
        """What was different, if an earlier version made it."""
        ends = (what for end, what in EARLIER.items() if self.path.stem.endswith(end))
        return next(ends, '')

    @property
    def method(self) -> str:
        """How it was trained, as one says it."""
        return 'Sparse VD' if self.config.method == 'svd' else self.summary['method']

    @property
    def key(self) -> tuple[Any, ...]:
        """Runs that agree in it differ in nothing but their seed."""
        experiment, method = self.summary['experiment'], self.summary['method']
        return experiment, method, self.earlier, but_for_seed(self.config)


def but_for_seed(config: Config) -> Config:
    """The options that decide what a run is worth: neither its seed nor where its files lie."""
    return dataclasses.replace(config, seed=0, seeds=1, out=None, data_dir=None)


def defaults_of(experiment: str) -> Config | None:
    """The default options of an experiment; None if it is not there, or takes options of its own.

    Args:
      experiment: its name.
    """
    name = f'experiments.{experiment}'
    try:
        found = getattr(importlib.import_module(name), 'DEFAULTS', None)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    return found if isinstance(found, Config) else None


def read(path: Path) -> dict[str, Any]:
    """A summary.

    Raises:
      UsageError: it is damaged.
    """
    try:
        summary = json.loads(path.read_bytes())
        if not isinstance(summary, dict) or not isinstance(summary.get('experiment'), str):
            raise ValueError('it names no experiment')
    except (OSError, ValueError) as error:
        raise UsageError(
            f'{path} is damaged ({error}): copy the summary.json of its run again'
        ) from error
    return summary


def make_run(path: Path, summary: dict[str, Any]) -> Run:
    """A run from its summary.

    Raises:
      UsageError: it is of several networks, or not that of a run of this experiment.
    """
    if 'networks' in summary:
        raise UsageError(f'{path} is of several networks: copy the summary.json of each instead')
    defaults = defaults_of(summary['experiment'])
    if defaults is None:
        raise UsageError(f'{path}: experiments.{summary["experiment"]} is not there')
    missing = [name for name in _FIELDS if name not in summary]
    if missing:
        raise UsageError(f'{path} lacks {", ".join(missing)}: it is no summary of a run')
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in summary['config'].items()
    }
    if values.get('pretrained') is not None:
        values['pretrained'] = Path(values['pretrained'])
    return Run(
        path, summary, with_options(defaults, {**values, 'dataset': summary['dataset']}, path)
    )


def with_options(defaults: Config, values: dict[str, Any], where: Path | str) -> Config:
    """The defaults with other values; a warm-up that is the default one anyway is left out."""
    try:
        config = dataclasses.replace(defaults, **values)
    except (TypeError, ValueError, UsageError) as error:  # an option that is gone, or its value
        raise UsageError(f'{where}: {error}') from error
    without = dataclasses.replace(config, warmup=None)
    return without if without.kl_warmup == config.kl_warmup else config


class Group(NamedTuple):
    """Runs that differ in their seed alone, by seed."""

    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def experiment(self) -> str:
        return self.first.summary['experiment']

    @property
    def options(self) -> str:
        """What sets it apart among runs of as many epochs by the same method."""
        return self.options_but()

    def options_but(self, *names: str) -> str:
        """These options without some, which something else tells."""
        return ' '.join(flags(self.changed_but(*names)))

    def changed_but(self, *names: str) -> dict[str, Any]:
        """The same by name, with their values."""
        known = ('dataset', 'data_dir', 'out', 'epochs', 'seed', 'seeds', 'method', *names)
        values = changed(self.first.config, self.experiment)
        return {k: v for k, v in values.items() if k not in known}

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    def values(self, field: str) -> list[Any]:
        """Of the summaries that have it."""
        return [run.summary[field] for run in self.runs if field in run.summary]

    def seconds(self) -> float:
        """Of all the training: runs that trained at once name the same seconds, each of them."""
        return sum(set(self.values('train_seconds')))

    def commands(self, starts: Collection[Path | None] = ()) -> list[str]:
        """What makes these runs, one for each run of consecutive seeds, if they can be together.

        Args:
          starts: the folders that other runs start from: into them goes a run of that name.
        """
        if self.first.earlier:
            return []
        folder = Path('runs', _SEED.sub('', self.first.path.stem))
        out = {'out': folder} if folder in starts else {}
        config = self.first.config
        alone = [(seed, 1) for seed in self.seeds]
        together = [
            dataclasses.replace(config, seed=seed, seeds=count)
            for seed, count in (stretches(self.seeds) if config.shrink is None else alone)
        ]
        return [
            # Also the data set that is the default: its folder has to be named.
            command(
                self.experiment, {'dataset': own.dataset, **changed(own, self.experiment), **out}
            )
            for own in together
        ]


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Groups of runs: dense ones first, long ones before short ones.

    Raises:
      UsageError: two summaries are of the same run.
    """
    by_key: dict[Any, dict[int, Run]] = {}
    for run in runs:
        same = by_key.setdefault(run.key, {})
        before = same.setdefault(run.config.seed, run)
        if before is not run:
            raise UsageError(f'{before.path} and {run.path} are of the same run: remove one')
    groups = [Group([same[seed] for seed in sorted(same)]) for same in by_key.values()]
    return sorted(groups, key=_order)


def _order(group: Group) -> tuple[Any, ...]:
    run = group.first
    return run.config.method != 'dense', bool(run.earlier), -run.config.epochs, group.options


def stretches(seeds: list[int]) -> list[tuple[int, int]]:
    """Sorted seeds as (first, how many): [0, 1, 2, 5] is [(0, 3), (5, 1)]."""
    found: list[tuple[int, int]] = []
    for seed in seeds:
        if found and sum(found[-1]) == seed:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((seed, 1))
    return found


def spread(values: list[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def in_order(layers: Iterable[str]) -> list[str]:
    """Names of layers, ``Conv_10`` after ``Conv_9``."""

    def parts(name: str) -> list[tuple[int, str]]:
        return [(int(part), '') if part.isdigit() else (-1, part) for part in _NUMBER.split(name)]

    return sorted(layers, key=parts)


def flag(name: str, value: Any) -> list[str]:
    """An option on the command line."""
    option = name.replace('_', '-')
    if isinstance(value, bool):
        return [f'--{option}' if value else f'--no-{option}']
    words = value if isinstance(value, tuple) else (value,)
    return [f'--{option}', *(_word(word) for word in words)]


def _word(value: Any) -> str:
    if isinstance(value, float) and float(f'{value:g}') == value:
        return f'{value:g}'
    return shlex.quote(str(value))


def changed(config: Config, experiment: str) -> dict[str, Any]:
    """The options that are not at the experiment's defaults."""
    defaults = defaults_of(experiment)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: value
        for name, value in values.items()
        if name != 'recipe' and value != getattr(defaults, name)
    }


def flags(values: dict[str, Any]) -> list[str]:
    """Options on the command line."""
    return list(itertools.chain.from_iterable(flag(*item) for item in values.items()))


def command(experiment: str, values: dict[str, Any]) -> str:
    """The command line of an experiment with some options."""
    if values.get('dataset', 'mnist5k') != 'mnist5k':  # that one needs no folder
        values = {'dataset': values['dataset'], 'data_dir': Path('DIR'), **values}
    return ' '.join(['python -m', f'experiments.{experiment}', *flags(values)])
