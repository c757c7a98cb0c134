"""The training loop that all experiments share."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import svd_jax as svd
from experiments import data
from experiments.checkpoint import Checkpoints
from experiments.config import Config, fingerprint
from experiments.environment import environment
from experiments.errors import UsageError
from experiments.report import (
    Report,
    claim_of,
    lock,
    mean_row,
    measure,
    quality,
    read_history,
    write_json,
)
from experiments.training import Training

# What each of several networks has of its own.
_EACH = (
    'bits_per_character', 'bits_per_character_mean_weights', 'validation_bits_per_character',
    'train_error', 'test_error', 'test_error_mean_weights', 'compression', 'nonzero',
    'multiply_adds', 'file_bytes',
)  # fmt: skip


def run(
    experiment: str,
    network: Callable[..., nn.Module],
    config: Config,
    make_training: Callable[..., Training] = Training,
) -> dict[str, Any]:
    """Trains, evaluates and writes everything into the output folder.

    Several networks at once (``--seeds``, ``--kl-weight``) have a folder each inside of it, with
    what each would have written alone; the output folder then holds their means.

    Args:
      experiment: the name under which checkpoints and the summary go.
      network: the architecture.
      config: the options.
      make_training: of the network, the options and the data set.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UsageError: an option, the data or a checkpoint can't be used; the message names the fix.
    """
    dataset = data.load(config.dataset, config.data_dir)
    if config.validation:
        dataset = data.validation_split(dataset, config.validation)
    data.epoch_permutation(config.seed, 0, len(dataset.train_labels), config.batch_size)  # checks
    facts = {
        'experiment': experiment, 'dataset': dataset.name, 'examples': fingerprint(*dataset[1:]),
    }  # fmt: skip
    return run_training(lambda: make_training(network, config, dataset), config, facts)


def run_training(
    make_training: Callable[[], Training], config: Config, facts: dict[str, Any]
) -> dict[str, Any]:
    """:func:`run` for any kind of data.

    Args:
      make_training: called once the output folder is known to be free.
      config: the options.
      facts: what else determines the result: ``experiment``, ``dataset``, ``examples`` (a hash).
    """
    console, out = Console(), config.folder(facts['experiment'])
    with _claimed(out, facts | config.identity(), config.resume):
        return _train(make_training(), out, facts, console)


def _train(
    training: Training, out: Path, facts: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Trains from the last checkpoint, or from the start, to the summary."""
    experiment, config = facts['experiment'], training.config
    checkpoints = _checkpoints(experiment, out, console)
    state, done, seconds = _start(facts, training, checkpoints, console)
    # Only now: a run that could not start leaves its folder free.
    alone = config.alone()
    folders = [out] if len(alone) == 1 else [out / name for name in alone]
    for folder, options in {out: config, **dict(zip(folders, alone.values(), strict=True))}.items():
        folder.mkdir(exist_ok=True)
        write_json(folder / 'run.json', facts | options.identity())
    if done < config.total_epochs:
        (out / 'summary.json').unlink(missing_ok=True)  # its being there says: complete
    if not done:
        _save_frames(folders, 0, training, state)
    title = f'{experiment}, {config.method}, {facts["dataset"]}, ' + ', '.join(alone)
    if training.followed_on != 'test set':
        title += f', tested after each epoch on: {training.followed_on}'
    with contextlib.ExitStack() as opened:

        def report(folder: Path, console: Console) -> Report:
            history = read_history(folder / 'metrics.jsonl', done)
            return opened.enter_context(
                Report(folder, title, history, done, config.total_epochs, training.steps, console)
            )

        # What is shown of several networks is their mean; each has its own files.
        shown = report(out, console)
        quiet = Console(quiet=True, force_terminal=False)
        reports = [shown] if folders == [out] else [report(folder, quiet) for folder in folders]
        saved = time.perf_counter()
        for epoch in range(done + 1, config.total_epochs + 1):
            started = time.perf_counter()
            state, rows = training.epoch(state, epoch, shown.advance)
            seconds += time.perf_counter() - started
            for reported, row in zip(reports, rows, strict=True):
                reported.add(row)
            if len(rows) > 1:
                shown.add(mean_row(rows))
            _save_frames(folders, epoch, training, state)
            last = epoch == config.total_epochs
            if last or time.perf_counter() - saved > config.checkpoint_seconds:
                checkpoints.save(epoch, state, {'seconds': seconds})
                saved = time.perf_counter()
    common = {
        'train_seconds': seconds,
        'steps_per_second': config.total_epochs * training.steps / seconds,
        **environment(),
    }
    summaries = [
        {'experiment': experiment, 'recipe': config.recipe, **results, **common}
        for results in training.results(state)
    ]
    states = training.split(state)
    for folder, own, reported, summary in zip(folders, states, reports, summaries, strict=True):
        if folder != out:  # for --pretrained
            _checkpoints(experiment, folder, console).save(
                config.total_epochs, own, {'seconds': seconds}
            )
        summary |= training.finish(folder, own, reported.history)
        write_json(folder / 'summary.json', summary)
    if len(summaries) == 1:
        _say(console, out, state.params, training.config, summaries[0])
        return summaries[0]
    together = _together(config, summaries)
    write_json(out / 'summary.json', together)
    _say_together(console, out, together)
    return together


def _checkpoints(experiment: str, folder: Path, console: Console) -> Checkpoints:
    return Checkpoints(
        folder / 'checkpoints', experiment, 'start again with another --out',
        partial(_warn, console),
    )  # fmt: skip


def _save_frames(folders: list[Path], epoch: int, training: Training, state: Any) -> None:
    for folder, own in zip(folders, training.split(state), strict=True):
        training.save_frame(folder, epoch, own)


def _together(config: Config, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of several networks: what they share, their means, and each one's result."""
    first = summaries[0]
    each = [field for field in _EACH if field in first]
    result = {k: v for k, v in first.items() if all(s[k] == v for s in summaries)}
    result |= {'seed': config.seed, 'config': config.identity()}
    for field in each:
        values = [summary[field] for summary in summaries]
        if None not in values:
            result[field] = float(np.mean(values))
            result[f'{field}_sd'] = float(np.std(values, ddof=1))
    result['sparsity_per_layer'] = {
        layer: float(np.mean([summary['sparsity_per_layer'][layer] for summary in summaries]))
        for layer in first['sparsity_per_layer']
    }
    result['networks'] = {
        name: {field: summary[field] for field in ('seed', *each)}
        for name, summary in zip(config.alone(), summaries, strict=True)
    }
    return result


@contextlib.contextmanager
def _claimed(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[None]:
    """Makes the output folder this run's, and this process the only one that writes to it.

    Raises:
      UsageError: it holds another run, or this one without ``--resume``; another process is at
        work in it; or it cannot be written to, now or later.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'cannot make the folder {out} ({error}): choose another --out') from error
    try:
        with lock(out):
            _check_claim(out, identity, resume)
            yield
    except OSError as error:  # a full disk above all; the last checkpoint is as it was
        raise UsageError(
            f'cannot write to {out} ({error}): see to that and --resume, or choose another --out'
        ) from error


def _check_claim(out: Path, identity: dict[str, Any], resume: bool) -> None:
    before = claim_of(out, resume)
    if before is None:
        if any(other.name != 'run.tmp' for other in out.iterdir()):  # that, a kill may leave
            raise UsageError(f'{out} is not empty and holds no run: choose another --out')
        return
    for name, value in identity.items():
        if before.get(name) != value:
            option = name if name in ('experiment', 'examples') else _option(name)
            raise UsageError(
                f'{out} holds a run with {option} {before.get(name)}, not {value}: '
                'give --resume the same options, or choose another --out'
            )


def _option(name: str) -> str:
    return '--' + name.replace('_', '-')


def _warn(console: Console, line: str) -> None:
    # A path may hold what looks like markup, and a log file has lines of any length.
    console.print(line, style='yellow', markup=False, highlight=False, soft_wrap=True)


def _start(
    run_facts: dict[str, Any], training: Training, checkpoints: Checkpoints, console: Console
) -> tuple[svd.TrainState, int, float]:
    """The state to start from, the epochs it has behind it and the seconds they took."""
    config = training.config
    if config.distil:
        training.teacher = _dense_variables(run_facts, training, console)
    if config.resume:
        restored = checkpoints.restore(like=training.init())
        if restored is not None:
            state, facts = restored
            done = facts['epoch']
            console.print(
                f'resuming after epoch {done} of {config.total_epochs}'
                if done < config.total_epochs
                else f'all {done} epochs are done: writing the pictures and the summary again'
            )
            return state, done, facts['seconds']
        console.print('no checkpoint yet: starting from the beginning')
    dense = training.teacher or _dense_variables(run_facts, training, console)
    return training.init(dense), 0, 0.0


def _dense_variables(run_facts: dict[str, Any], training: Training, console: Console) -> Any:
    """Of the dense network that ``pretrained`` names; None if it names none."""
    experiment, start = run_facts['experiment'], training.config.pretrained
    if start is None:
        return None
    folder = start / 'checkpoints'
    advice = (
        f'give --pretrained the output folder of `python -m experiments.{experiment} '
        '--method dense`'
    )
    found = Checkpoints(folder, experiment, advice, partial(_warn, console)).restore(
        like=training.dense_state()
    )
    if found is None:
        raise UsageError(f'no checkpoint in {folder}: {advice}')
    # It must not know what is held out here.
    claim = claim_of(start, resume=True)
    if claim is not None and claim.get('examples') != run_facts['examples']:
        raise UsageError(
            f'the network in {start} was trained or tested on other examples: train one with '
            'the --dataset, --validation and labels of this run'
        )
    dense, facts = found
    _warn(console, f'dense weights: those after epoch {facts["epoch"]} in {folder}')
    return dense.variables


def _say(console: Console, out: Path, params: Any, config: Config, summary: dict[str, Any]) -> None:
    console.print()
    weights = ''
    if summary['method'] == 'sparse_vd':
        console.print(str(svd.sparsity(params, config.thresholds)), highlight=False)
        console.print()
        ratio = summary['compression']
        weights = 'no weights left, ' if ratio is None else f'{ratio:.1f} times fewer weights, '
    console.print(
        f'{quality(summary)} ({summary["evaluated_on"]}, {summary["dataset"]}), '
        f'{weights}{summary["train_seconds"]:.0f} s of training'
    )
    console.print(
        f'summary, metrics, checkpoints and pictures: {out}',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _say_together(console: Console, out: Path, summary: dict[str, Any]) -> None:
    table = Table('network', box=box.SIMPLE, show_edge=False)
    table.add_column(measure(summary).heading, justify='right')
    table.add_column('compression', justify='right')
    for name, own in summary['networks'].items():
        ratio = own['compression']
        left = 'no weight left' if ratio is None else f'{ratio:.1f}x'
        table.add_row(name, measure(own).text(own), left)
    console.print()
    console.print(table)
    console.print()
    found = quality(summary)
    if summary.get('compression') is not None:
        found += f', {summary["compression"]:.1f} +- {summary["compression_sd"]:.1f} times'
        found += ' fewer weights'
    console.print(
        f'{found} ({summary["evaluated_on"]}, {summary["dataset"]}, mean and standard deviation '
        f'over {len(summary["networks"])} networks), {summary["train_seconds"]:.0f} s of training'
    )
    console.print(
        f'summaries, metrics, checkpoints and pictures: {out}',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
